import pytest

from flowbp.runtime.reproducible import TOO_LATE, one_thread, request_equal_bytes

if not request_equal_bytes():  # the first import of a test run; the processes that tests start inherit it
    raise pytest.UsageError(f"tests compare bytes. {TOO_LATE}")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """Text embeddings go into a folder of the test run, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWBP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def threads_of_the_tests():
    """One: several wait for each other in every operation, and for minutes where another program keeps a core busy."""
    with one_thread():
        yield


@pytest.fixture(
    scope="session",
    params=["shapes", "StableDiffusion3Pipeline", "FluxPipeline", "Flux2KleinPipeline", "ZImagePipeline"],
)
def backbone_overrides(request, tmp_path_factory):
    """The config of the embedded model, then of a tiny random pipeline of every class."""
    if request.param == "shapes":
        return ["backbone.name=shapes", "backbone.max_sequence_length=1"]
    from tiny_pipelines import tiny_pipeline

    folder = tmp_path_factory.mktemp("pipelines") / request.param
    tiny_pipeline(request.param).save_pretrained(folder)
    embedded = ["guidance.embedded=3.5"] if request.param == "FluxPipeline" else []
    return [f"backbone.name={folder}", "backbone.max_sequence_length=48", *embedded]
