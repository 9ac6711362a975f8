"""What bfloat16 does to small steps: all weights of the embedded model are trained in float32, and in bfloat16 with and
without master weights.

    python benchmarks/master_weights.py --steps 50

The three runs have the same prompts, noise and plans. Reported of the weights that the optimizer steps: the share that
is unchanged after the last step, the length of the whole change, and the cosine of the change with that of the float32
run.
"""

import argparse
import tempfile

import torch

from flowbp.config import load
from flowbp.training.trainer import Trainer

RUNS = {
    "float32": ["backbone.dtype=float32"],
    "bfloat16, master weights": ["backbone.dtype=bfloat16"],
    "bfloat16": ["backbone.dtype=bfloat16", "tuning.master_weights=false"],
}


def way(overrides: list[str], steps: int, lr: float) -> torch.Tensor:
    """The change of all stepped weights, flat, in float64."""
    with tempfile.TemporaryDirectory() as folder:
        small = ["tuning.mode=full", "data.batch_size=8", "evaluation=null"]
        trainer = Trainer(
            load("demo", [f"output={folder}", f"optimizer.lr={lr}", f"steps={steps}", *small, *overrides])
        )
        start = [p.detach().double() for p in trainer.model.masters.values()]
        for step in range(steps):
            trainer.step(step)
    return torch.cat(
        [(p.detach().double() - s).flatten() for p, s in zip(trainer.model.masters.values(), start, strict=True)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-5, help="that of the published runs")
    options = parser.parse_args()
    ways = {name: way(overrides, options.steps, options.lr) for name, overrides in RUNS.items()}
    print("| | still | length | cosine with float32 |\n|---|---|---|---|")
    for name, found in ways.items():
        cosine = torch.cosine_similarity(found, ways["float32"], dim=0)
        print(f"| {name} | {(found == 0).double().mean():.1%} | {found.norm():.4f} | {cosine:.3f} |")


if __name__ == "__main__":
    main()
