import pytest
import tiny_rewards


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """name of a reward -> a folder with a tiny random checkpoint of it, in its published format."""
    return {name: build(tmp_path_factory.mktemp(name)) for name, build in tiny_rewards.FOLDERS.items()}
