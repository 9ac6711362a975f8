"""Which tests are fast, which are slow, and what all of them share."""

import gc
from pathlib import Path

import pytest

from flowbp.runtime.reproducible import TOO_LATE, one_thread, request_equal_bytes

if not request_equal_bytes():  # the first import of a test run; the processes that tests start inherit it
    raise pytest.UsageError(f"tests compare bytes. {TOO_LATE}")

# A test is slow if it lies in one of these places, or asks for one of these fixtures; else it is fast. What is slow
# trains, draws pictures, compiles, or starts programs: seconds a test. What is fast is arithmetic: engine, kernels,
# configs and statistics, in tenths of a second.
SLOW_PLACES = (
    "backbones",
    "distributed",
    "reliability",
    "rewards",
    "shapes",
    "evaluation/test_evaluation.py",
    "evaluation/test_geneval.py",
    "evaluation/test_sentinel.py",
    "kernels/test_activations.py",
    "kernels/test_bench.py",
    "kernels/test_compiled_ops.py",
    "kernels/test_example.py",
    "kernels/test_modulation.py",
    "kernels/test_qk_norm.py",
    "kernels/test_setup.py",
    "test_anchor.py",
    "test_cli.py",
    "test_communication.py",
    "test_docs.py",
    "test_embeddings.py",
    "test_estimate.py",
    "test_mistakes.py",
    "test_offload.py",
    "test_performance.py",
    "test_random_cases.py",
    "test_readme.py",
    "test_reproducible.py",
    "test_security.py",
    "test_sweep.py",
    "test_traffic.py",
    "test_train_step.py",
    "test_trainer.py",
    "test_tuning.py",
)
SLOW_FIXTURES = {
    "backbone_overrides",  # a pipeline of every class
    "compile_emulated",
    "compiler",
    "emulated",
    "cuobjdump",
    "new_process",
    "nvcc",
    "process",
    "run",
    "triton_cache",
    "two_processes",
}


def pytest_collection_modifyitems(items):
    """Mark every test `fast` or `slow`, and `gpu` what needs one: by its place, its fixtures and its device. The slow
    ones go first.
    """
    for item in items:
        place = item.path.relative_to(Path(__file__).parent).as_posix()
        slow = place.startswith(SLOW_PLACES) or not SLOW_FIXTURES.isdisjoint(item.fixturenames)
        item.add_marker("slow" if slow else "fast")
        device = item.callspec.params.get("device") if hasattr(item, "callspec") else None
        if "gpu" in item.fixturenames or str(device).startswith("cuda"):
            item.add_marker("gpu")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What the imports make stays until the end. They, and trainers that collect garbage, would search it each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """Text embeddings go into a folder of the test run, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWBP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def kernels_of_the_tests():
    """FLOWBP_TEST_KERNELS=auto: models run the fused ops wherever a test does not say otherwise, as if auto were the
    default of backbone.kernels and of load_backbone.
    """
    import fused_ops  # torch with it, which is not the first import of a test run

    with fused_ops.by_default(fused_ops.KERNELS):
        yield


@pytest.fixture(autouse=True)
def default_kernels(request):
    """The same for one test, and what it then is: some run once without the fused ops and once with them."""
    import fused_ops

    with fused_ops.by_default(getattr(request, "param", "off")):
        yield getattr(request, "param", fused_ops.KERNELS)


def pytest_generate_tests(metafunc):
    import fused_ops

    place = Path(metafunc.module.__file__).relative_to(Path(__file__).parent).as_posix()
    if fused_ops.KERNELS == "off" and metafunc.function.__name__ in fused_ops.TWICE.get(place, ()):
        metafunc.parametrize("default_kernels", ["off", "auto"], indirect=True)


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
