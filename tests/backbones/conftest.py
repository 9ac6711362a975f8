"""Tiny pipelines, built once; a test that changes one must build its own."""

from functools import cache

import pytest
import torch
from diffusers.utils import logging
from tiny_pipelines import tiny_pipeline

from flowbp.backbones.classes import BACKBONES

TOKENS = 48

logging.set_verbosity_error()


@pytest.fixture(scope="session")
def tiny_backbone():
    """(class name, dtype, precision, distilled) -> a backbone on shared weights."""

    @cache
    def pipeline(name, dtype, distilled):
        pipe = tiny_pipeline(name).to(dtype)
        if distilled:
            pipe.register_to_config(is_distilled=True)
        return pipe

    def build(name, dtype=torch.float32, precision="pipeline", distilled=False):
        return BACKBONES[name](pipeline(name, dtype, distilled), precision, TOKENS)

    return build
