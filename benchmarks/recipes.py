"""The table of the presets for small cards in docs/estimate.md:  python benchmarks/recipes.py

Writes docs/recipes.json: of each preset, by `flowbp estimate`, the peak of its parts and the cost of a step, beside the
same run with neither quantised weights nor offload. Needs no GPU. `python benchmarks/tables.py` makes the table of it.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1]))

from flowbp import presets  # noqa: E402
from flowbp.config import RunConfig, load  # noqa: E402
from flowbp.estimate.estimate import BANDWIDTH, estimate  # noqa: E402
from flowbp.runtime.inputs import parse_size  # noqa: E402

FILE = Path(__file__).parents[1] / "docs" / "recipes.json"
PLAIN = ["backbone.quantise=null", "memory.offload=null"]


def main() -> None:
    rows = [row(name, load(name), load(name, PLAIN)) for name in presets.cards()]
    FILE.write_text(json.dumps({"bandwidth": BANDWIDTH, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def row(name: str, run: RunConfig, plain: RunConfig) -> dict:
    """Bytes; FLOPs of the network's passes in a step, a backward pass as two forward ones."""
    found, without = estimate(run), estimate(plain)
    micro, samples = run.data.accumulate, run.data.batch_size
    step = {"flops": micro * sum(found.calls.values()) * found.network.forward_flops, "copied": found.copied}
    memory = {"card": parse_size(name.rpartition("/")[2]), "peaks": found.peaks, "home": found.network.home_bytes}
    return {"name": name, "batch": [samples, micro]} | memory | step | {"plain peaks": without.peaks}


def table(found: dict) -> str:
    columns = "preset", "batch", "peak, GB", "of the card", "embedding", "plain weights: peak, embedding"
    lines = [*columns, "network, PFLOP a step", "copied, GB a step", f"at {found['bandwidth'] / 1e9:.0f} GB/s"]
    lines = [f"| {' | '.join(lines)} |", "|---" * len(lines) + "|"]
    for each in found["rows"]:
        (peak, part), (plain, plain_part) = most(each["peaks"]), most(each["plain peaks"])
        embedding, plain_embedding = each["peaks"]["embedding"], each["plain peaks"]["embedding"]
        memory = f"{gb(peak)} ({part})", f"{peak / each['card']:.0%}", gb(embedding)
        copied = (gb(each["copied"]), f"{each['copied'] / found['bandwidth']:.0f} s") if each["copied"] else ("–", "–")
        plainly = f"{gb(plain)} ({plain_part}), {gb(plain_embedding)}"
        cells = each["name"], " x ".join(map(str, each["batch"])), *memory, plainly, f"{each['flops'] / 1e15:.1f}"
        lines.append(f"| {' | '.join((*cells, *copied))} |")
    return "\n".join(lines)


def most(peaks: dict) -> tuple[int, str]:
    """The most that a part of a step takes, and which part."""
    part = max((name for name in peaks if name != "embedding"), key=peaks.__getitem__)
    return peaks[part], part


def gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


if __name__ == "__main__":
    main()
