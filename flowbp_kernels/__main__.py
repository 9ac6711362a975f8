"""python -m flowbp_kernels: which backends run on this machine, and why."""

import torch

import flowbp_kernels
from flowbp_kernels import backend


def main() -> None:
    wanted = backend.requested()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, FLOWBP_KERNELS={wanted}\n")
    print(f"{'backend':<12}{'runs':<6}why")
    for name, runs, why in backend.report():
        print(f"{name:<12}{'yes' if runs else 'no':<6}{why}")
    print("\n" + (flowbp_kernels.__doc__ or "").split("\n\n")[1])


if __name__ == "__main__":
    main()
