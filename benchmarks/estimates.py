"""The table of docs/estimate.md:  python benchmarks/estimates.py

For every published preset, by `flowbp estimate`: the gigabytes that a process takes at the peak of a step, and while it
embeds the prompts before the first step, with the text encoders on the device. Needs no GPU.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1]))

from flowbp import presets  # noqa: E402
from flowbp.config import load  # noqa: E402
from flowbp.estimate.estimate import Estimate, estimate  # noqa: E402


def main() -> None:
    peaks = ("full, 1 process", "full, 8 processes", "gradients whole", "no masters", "LoRA, 1 process", "embedding")
    columns = ("preset", "batch", *peaks, "cost, x sampling")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in presets.names():
        if "/" not in name or name in presets.cards():
            continue
        changes = ([], ["memory.shard_gradients=false"], ["tuning.master_weights=false"], ["tuning.mode=lora"])
        full, whole, narrow, lora = (load(name, overrides) for overrides in changes)
        found = [estimate(full), *(estimate(run, processes=8) for run in (full, whole, narrow)), estimate(lora)]
        cells = " | ".join(step_peak(each) for each in found)
        embedding = found[1].peaks["embedding"] / 1e9
        cost = found[0].relative_cost
        print(f"| {name} | {full.data.batch_size} | {cells} | {embedding:.1f} | {cost:.1f} |", flush=True)


def step_peak(found: Estimate) -> str:
    """The most that a part of a step takes, and which part."""
    part = max((name for name in found.peaks if name != "embedding"), key=found.peaks.get)
    return f"{found.peaks[part] / 1e9:.1f} ({part})"


if __name__ == "__main__":
    main()
