import pytest

from flowbp.config import load
from flowbp.training.run import train

SMALL = [
    "steps=2",
    "data.batch_size=2",
    "rollout.num_steps=4",
    "checkpoint_every=1",
    "evaluation.samples=9",
    "evaluation.batch_size=4",
    "evaluation.grid=4",
    "optimizer.lr=1e-2",
    "method.name=draft-lv",
]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a finished run of two steps, its evaluation included."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    return train(load("demo", [f"output={folder}", *SMALL]))
