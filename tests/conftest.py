import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """Text embeddings go into a folder of the test run, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWBP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
