"""What it saves to take a multistep solver's step in one pass over memory, on one thread of a CPU.

One pass is `cfg_multistep_step`; two passes are `cfg_euler_step`, and then `quadrature_update` over the same rows and
velocity. They take turns, into tensors that were made before. SD3.5's latents at 512 px, batch 8, guided.

    python benchmarks/one_pass.py --json docs/one_pass.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from flowbp.quadrature import ORDERS
from flowbp.runtime.environment import environment
from flowbp_kernels import cfg_euler_step, cfg_multistep_step, quadrature_update

SHAPE = (8, 16, 64, 64)
STEP = (4.5, -0.04)  # guidance and h


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for solver, order in list(ORDERS.items())[1:]:
            x, v, v_neg, out, *cache = (torch.randn(SHAPE, dtype=dtype) for _ in range(4 + order))
            velocities = torch.stack(cache)
            earlier, weights = list(range(1, order)), [0.03] * (order - 1)
            into = {"velocity_out": velocities[0], "out": out}

            def one_pass(x=x, v=v, v_neg=v_neg, cache=velocities, nodes=earlier, weights=weights, into=into):
                cfg_multistep_step(x, v, v_neg, *STEP, cache, nodes, weights, **into)

            def two_passes(x=x, v=v, v_neg=v_neg, cache=velocities, nodes=earlier, weights=weights, into=into):
                cfg_euler_step(x, v, v_neg, *STEP, **into)
                quadrature_update(x, cache, [*nodes, 0], [*weights, STEP[1]], out=into["out"])

            seconds = np.array([[timed(call) for call in (one_pass, two_passes)] for _ in range(arguments.rounds)])[10:]
            best, median = (statistic(seconds, axis=0) for statistic in (np.min, np.median))
            row = {
                "dtype": str(dtype)[6:],
                "solver": solver,
                "best": best[1] / best[0],
                "median": median[1] / median[0],
            }
            rows.append(row | {"one_pass_ms": 1e3 * best[0]})
            print("{dtype:9} {solver}: best {best:.2f} x, median {median:.2f} x".format(**row), flush=True)
    if arguments.json:
        about = {"environment": environment(), "shape": SHAPE, "rounds": arguments.rounds}
        arguments.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def timed(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
