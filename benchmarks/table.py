"""The benchmark table of docs/kernels.md, from the committed results:  python benchmarks/table.py [--check]

One line for each op, latent, dtype and kernel backend, at the largest batch and the fewest steps of its file. It shows
the forward pass, or forward and backward together where a file has no forward pass alone. Files of step_share.py and
train_step.py give one sentence a row. --check changes nothing, and fails if the page's table is not the one that the
results give.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/kernels.md"
BEGIN, END = "<!-- benchmarks: begin, written by benchmarks/table.py -->", "<!-- benchmarks: end -->"
KERNELS = ("cuda", "triton", "cpu")
EMPTY = (
    "No results are committed yet: `flowbp bench --json benchmarks/results/NAME.json` makes them, "
    "`python benchmarks/table.py` this table."
)
LEGEND = (
    "`eager takes`, `torch.compile takes`: times the kernel's median. "
    "`of copy`: share of the bandwidth of a copy in the same rounds."
)
HEADER = (
    "| op | latent, batch, steps, dtype | kernel | median ms [20 %, 80 %] | eager takes | torch.compile takes | GB/s | "
    "of copy |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    check = parser.parse_args().check
    old = PAGE.read_text(encoding="utf-8")
    new = insert(old, table(sorted((ROOT / "benchmarks/results").glob("*.json"))))
    if check and new != old:
        sys.exit("the table of docs/kernels.md is not that of benchmarks/results: run python benchmarks/table.py")
    if not check:
        PAGE.write_text(new, encoding="utf-8")


def insert(page: str, text: str) -> str:
    """The page with `text` between the markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def table(files: list[Path]) -> str:
    """Markdown for result files, in the order given: for each, the machine and its table."""
    parts = []
    for file in files:
        report = json.loads(file.read_text(encoding="utf-8"))
        if "shares" in report:  # of step_share.py
            lines = [_share(report["case"], row) for row in report["shares"]]
        elif "options" in report:  # of train_step.py
            lines = [_train_step(report["options"], row) for row in report["rows"]]
        else:
            lines = [HEADER, *_lines(report["rows"])]
        parts.append(_machine(report["machine"]) + "\n\n" + "\n".join(lines))
    return "\n\n".join((LEGEND, *parts)) if parts else EMPTY


def _machine(machine: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    where = f"{machine['device']}, {machine['threads']} thread(s)" if machine["threads"] else machine["device"]
    return f"{where}; {versions}; commit {machine['commit']}, {machine['date']}."


def _share(case: dict, row: dict) -> str:
    network = (
        f"a transformer of width {case['width']}, depth {case['depth']}, on {case['batch']} x {case['tokens']} tokens"
    )
    return (
        f"- `{row['kernels']}`: of a training step of {row['step_ms']:.3g} ms ({network}; {case['steps']} steps of "
        f"rollout) the ops take {row['ops_ms']:.3g} ms, {row['percent']:.2g} %."
    )


def _train_step(options: dict, row: dict) -> str:
    nodes = f" (K = {row['active']})" if row["active"] else ""
    checkpointed = ", checkpointed" if row["checkpointing"] else ""
    if "out_of_memory" in row:
        result = f"out of memory in {row['out_of_memory']}"
    else:
        result = f"{row['step_seconds']:.3g} s a step, {max(row['peak_mb'].values()) / 1e3:.3g} GB at most"
    case = f"`{row['backbone']}` ({row['tuning']}{checkpointed}; {options['steps']} steps, batch {options['batch']})"
    return f"- {case}, {row['method']}{nodes}, {row['mode']}: {result}."


def _lines(rows: list[dict]) -> list[str]:
    modes = {row["mode"] for row in rows}
    rows = [row for row in rows if row["mode"] == ("forward" if "forward" in modes else "full")]
    lines = []
    for key in sorted({_key(row) for row in rows}):
        cell = [row for row in rows if _key(row) == key]
        batch, steps = max(row["batch"] for row in cell), min(row["steps"] for row in cell)
        cell = {row["provider"]: row for row in cell if (row["batch"], row["steps"]) == (batch, steps)}
        lines += [_line(cell, provider) for provider in KERNELS if provider in cell]
    return lines


def _key(row: dict) -> tuple[str, str, str]:
    return row["op"], row["latent"], row["dtype"]


def _line(cell: dict[str, dict], provider: str) -> str:
    row = cell[provider]
    ms = row["milliseconds"]
    times = [
        f"{cell[other]['milliseconds']['median'] / ms['median']:.1f} x" if other in cell else "not measured"
        for other in ("eager", "compile")
    ]
    case = f"{row['latent']}, {row['batch']}, {row['steps']}, {row['dtype']}"
    figures = (
        f"{ms['median']:.3g} [{ms['p20']:.3g}, {ms['p80']:.3g}]",
        *times,
        f"{row['gb_per_second']:.3g}",
        f"{row['percent_of_copy']:.0f} %",
    )
    op = f"`{row['op']}`" + (", forward and backward" if row["mode"] == "full" else "")
    return f"| {op} | {case} | {provider} | {' | '.join(figures)} |"


if __name__ == "__main__":
    main()
