"""Tests whose models take the fused ops, as if backbone.kernels were `auto` by default: what changes then, and by how
much.
"""

import os
import sys
from contextlib import contextmanager
from inspect import signature

import pytest
import torch

KERNELS = os.environ.get("FLOWBP_TEST_KERNELS", "off")  # what a model of the running test takes where nobody says
BOUND = 1e-5  # relative, in the norm, float32: what the ops may change in a velocity or an image; 3e-7 were seen
# Tests that train or draw in float32, which conftest.py runs a second time with the fused ops.
TWICE = {
    "backbones/test_backbones.py": ["test_a_saved_pipeline_loads_offline_and_draws_the_same"],
    "backbones/test_blocks.py": [
        "test_a_backbone_takes_the_ops_if_it_is_told_to",
        "test_off_is_the_default_and_the_word_for_what_yaml_makes_of_it",
    ],
    "backbones/test_weights.py": [
        "test_a_lora_of_every_method_changes_the_images_and_loads_into_a_fresh_pipeline",
    ],
    "test_trainer.py": [
        "test_every_method_trains_the_embedded_model",
        "test_lora_dropout_is_the_same_in_rollout_and_replay",
        "test_lora_weights_load_into_a_fresh_diffusers_pipeline",
        "test_memory_settings_leave_the_gradient_as_it_is",
        "test_the_base_of_a_trained_run_is_the_model_it_started_from",
    ],
}


@contextmanager
def by_default(kernels):
    """Let backbone.kernels and load_backbone be `kernels` where nobody names them."""
    if kernels not in ("auto", "off"):
        raise ValueError(f"FLOWBP_TEST_KERNELS must be auto or off, not {kernels!r}")
    if kernels == "off":
        yield
        return
    from flowbp.backbones import load_backbone
    from flowbp.config.schema import BackboneConfig, RunConfig

    def compile_defaults():
        for model in (BackboneConfig, RunConfig):  # pydantic has compiled the other one
            model.model_rebuild(force=True)

    given = [each for each in signature(load_backbone).parameters.values() if each.default is not each.empty]
    defaults = tuple(kernels if each.name == "kernels" else each.default for each in given)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(load_backbone, "__defaults__", defaults)
            patch.setattr(BackboneConfig.model_fields["kernels"], "default", kernels)
            patch.setattr(sys.modules[__name__], "KERNELS", kernels)
            compile_defaults()
            yield
    finally:
        compile_defaults()


def assert_as_unfused(ours, theirs):
    """What a model of this test computes beside what a model of diffusers does: every bit without the fused ops, and
    with them up to BOUND.
    """
    if KERNELS == "off":
        assert torch.equal(ours, theirs)
    else:
        assert (ours - theirs).norm() <= BOUND * theirs.norm()
