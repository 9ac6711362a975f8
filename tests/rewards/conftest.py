import pytest
import tiny_rewards

from flowbp.rewards import hpsv3, unifiedreward


@pytest.fixture(autouse=True)
def short_and_small(monkeypatch):
    """The instructions run to thousands of the tiny tokenizer's tokens, and HPSv3's pictures to 256: cut both."""
    monkeypatch.setattr(hpsv3, "instruction", lambda name: "Rate {prompt}: <|Reward|> END")
    monkeypatch.setattr(hpsv3.HPSv3, "PIXELS", 6 * 28 * 28)
    monkeypatch.setattr(unifiedreward, "instruction", lambda name: "Rate {prompt}")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """name of a reward -> a folder with a tiny random checkpoint of it, in its published format."""
    return {name: build(tmp_path_factory.mktemp(name)) for name, build in tiny_rewards.FOLDERS.items()}
