"""How often a 95 % interval holds the true mean, by the number of prompts.

    python benchmarks/interval_coverage.py [--evaluations 400]

The scores of a prompt are drawn from a normal law, from an exponential law, and as successes of probability .2 (as
those of a checker).
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy import stats

from flowbp.evaluation import statistics

LAWS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "exponential": lambda rng, n: rng.exponential(size=n) - 1,
    "successes": lambda rng, n: (rng.random(n) < 0.2) - 0.2,
}


def covered(draw, prompts: int, evaluations: int) -> tuple[float, float]:
    """Shares of evaluations whose interval holds 0: by `statistics.interval`, and by Student's t."""
    rng, names, ones = np.random.default_rng(0), [str(i) for i in range(prompts)], np.ones(prompts)
    held = np.zeros(2)
    for _ in range(evaluations):
        scores = draw(rng, prompts)
        half = stats.t.ppf(0.975, prompts - 1) * scores.std(ddof=1) / prompts**0.5
        low, high = statistics.interval(scores, ones, names)
        held += low <= 0 <= high, abs(scores.mean()) <= half
    return tuple(held / evaluations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluations", type=int, default=400)
    parser.add_argument("--prompts", type=int, nargs="+", default=[6, 10, 20, 40, 100])
    options = parser.parse_args()
    statistics.RESAMPLES = 1999
    print("| prompts | " + " | ".join(LAWS) + " |")
    print("|---" * (1 + len(LAWS)) + "|")
    for prompts in options.prompts:
        shares = [covered(draw, prompts, options.evaluations) for draw in LAWS.values()]
        print(f"| {prompts} | " + " | ".join(f"{ours:.1%} (t {by_t:.1%})" for ours, by_t in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
