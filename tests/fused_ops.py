"""FLOWBP_TEST_KERNELS=auto lets the models of a test run take the fused ops: what changes then, and by how much."""

import os
from inspect import signature

import torch

KERNELS = os.environ.get("FLOWBP_TEST_KERNELS", "off")
BOUND = 1e-5  # relative, in the norm, float32: what the ops may change in a velocity or an image; 3e-7 were seen


def make_default(patch):
    """Let backbone.kernels and load_backbone be KERNELS where nobody names them."""
    if KERNELS not in ("auto", "off"):
        raise ValueError(f"FLOWBP_TEST_KERNELS must be auto or off, not {KERNELS!r}")
    if KERNELS == "off":
        return
    from flowbp.backbones import load_backbone
    from flowbp.config.schema import BackboneConfig, RunConfig

    given = [each for each in signature(load_backbone).parameters.values() if each.default is not each.empty]
    defaults = tuple(KERNELS if each.name == "kernels" else each.default for each in given)
    patch.setattr(load_backbone, "__defaults__", defaults)
    patch.setattr(BackboneConfig.model_fields["kernels"], "default", KERNELS)
    for model in (BackboneConfig, RunConfig):
        model.model_rebuild(force=True)  # pydantic compiled the old default


def assert_as_unfused(ours, theirs):
    """What a model of this test run computes beside what a model of diffusers does: every bit without the fused ops,
    and with them up to BOUND.
    """
    if KERNELS == "off":
        assert torch.equal(ours, theirs)
    else:
        assert (ours - theirs).norm() <= BOUND * theirs.norm()
