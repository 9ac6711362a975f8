"""The prompts of `shapes`, split into train, dev and test. prompts.yaml lists them; `recipe.captions` says how they
were chosen.
"""

from typing import NamedTuple

from flowbp.given import read_data


class Prompt(NamedTuple):
    text: str
    category: str = ""


def splits() -> dict[str, dict[str, list[str]]]:
    """split -> category -> its captions."""
    return read_data(__file__, "prompts.yaml")


def prompts(split: str) -> list[Prompt]:
    """The prompts of a split: 1440 of "train", 288 each of "dev" and "test". They are the same at every call.

    Categories come in turn, so the first 6 n prompts have n of each. Categories of few captions repeat; plain and
    coloured captions alternate.
    """
    if split not in splits():
        raise ValueError(f"split {split!r} does not exist; choose one of {tuple(splits())}")
    categories = splits()[split]
    most = max(map(len, categories.values()))
    return [Prompt(own[i % len(own)], category) for i in range(most) for category, own in categories.items()]
