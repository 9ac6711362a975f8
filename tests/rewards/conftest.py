import pytest
import tiny_rewards

from flowbp.rewards.hpsv3 import HPSv3


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """HPSv3's pictures take 256 tokens: cut them to 6."""
    monkeypatch.setattr(HPSv3, "PIXELS", 6 * 28 * 28)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """name of a reward -> a folder with a tiny random checkpoint of it, in its published format."""
    return {name: build(tmp_path_factory.mktemp(name)) for name, build in tiny_rewards.FOLDERS.items()}
