"""The tables of README and docs that come from committed figures:  python benchmarks/tables.py [--check]

A table stands between <!-- table NAME --> and <!-- end of table --> and is written from the JSON file that its line in
TABLES names. --check changes nothing, and fails where a page has another table than its file gives.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import controls
import few_steps
import fidelity
import full_size
import kernel_tables
import recipes
import strengths
import tuned_methods

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
METRICS = {
    "reward": "reward (trained on)",
    "monitor": "monitor (a reward never trained on)",
    "checker": "checker (share of images that show their caption)",
    "diversity": "diversity among images of a prompt",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    check = parser.parse_args().check
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = page.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}\n{block[3]}", old)
        if new != old and check:
            sys.exit(f"a table of {page.relative_to(ROOT)} is not that of its file: run python benchmarks/tables.py")
        if new != old:
            page.write_text(new, encoding="utf-8")


def of(file: str, written: Callable[[dict], str]) -> Callable[[], str]:
    """What makes a table of a file in docs/."""
    return lambda: written(json.loads((ROOT / "docs" / file).read_text(encoding="utf-8")))


def one_setting(sweep: dict) -> str:
    """Of a sweep with one setting: a row a metric, means before and after, and the change with its standard deviation
    between training runs.
    """
    lines = ["| | before | after | change |", "|---|---|---|---|"]
    for metric, said in METRICS.items():
        scores = [run["scores"][metric] for run in sweep["runs"]]
        before, after = (short(statistics.mean(score[key] for score in scores)) for key in ("before", "after"))
        lines.append(f"| {said} | {before} | {after} | {with_deviation([score['change'] for score in scores])} |")
    return "\n".join(lines)


def by_setting(sweep: dict) -> str:
    """Of a sweep with several: a row a setting, the changes with their standard deviations between training runs."""
    lines = [f"| | runs | {' | '.join(METRICS)} |", f"|{'---|' * (2 + len(METRICS))}"]
    for setting in dict.fromkeys(run["setting"] for run in sweep["runs"]):
        own = [run["scores"] for run in sweep["runs"] if run["setting"] == setting]
        cells = [with_deviation([scores[metric]["change"] for scores in own]) for metric in METRICS]
        lines.append(f"| `{setting}` | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def short(number: float) -> str:
    return f"{number:.3f}".replace("0.", ".", 1)


def with_deviation(values: list[float]) -> str:
    """Mean and standard deviation (n - 1)."""
    return f"{statistics.mean(values):+.3f} ± {statistics.stdev(values):.3f}".replace("0.", ".")


TABLES: dict[str, Callable[[], str]] = {
    "anchor": of("anchor.json", by_setting),
    "compiled": of("compiled_traffic.json", kernel_tables.compiled),
    "controls": of("controls.json", lambda found: controls.table(found["rows"])),
    "demo": of("demo/seeds.json", one_setting),
    "few-steps": of("few_steps.json", lambda found: few_steps.table(found["rows"])),
    "fidelity": of("fidelity.json", fidelity.table),
    "full-size": of("full_size.json", lambda found: full_size.table(found["rows"])),
    "recipes": of("recipes.json", recipes.table),
    "shares": of("step_traffic.json", kernel_tables.shares),
    "strengths": of("strengths.json", lambda found: strengths.table(found["rows"])),
    "times": lambda: kernel_tables.table(sorted((ROOT / "benchmarks/results").glob("*.json"))),
    "tuned": of("methods/tuned.json", tuned_methods.table),
    "tuning": of("methods/tuning.json", lambda found: tuned_methods.trials(found["runs"], found["chosen"])),
    "traffic": of("step_traffic.json", kernel_tables.traffic),
}

if __name__ == "__main__":
    main()
