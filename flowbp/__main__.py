"""`flowbp` and `python -m flowbp`: the command line, also for launchers of several processes (torchrun -m flowbp eval
...).
"""

import sys

from flowbp.runtime.reproducible import TOO_LATE, request_equal_bytes


def main() -> None:
    """Run the command line. Where the core install (torch, NumPy) lacks a package, say which extra has it."""
    if not request_equal_bytes():
        print(f"warning: {TOO_LATE}", file=sys.stderr)
    try:
        from flowbp.cli import main as run

        run()
    except ModuleNotFoundError as error:
        if (error.name or "flowbp").startswith("flowbp"):  # ours, not a package that is missing
            raise
        sys.exit(
            f"error: {error.name} is not installed. The command line needs the extra train: pip install 'flowbp[train]'"
        )


if __name__ == "__main__":
    main()
