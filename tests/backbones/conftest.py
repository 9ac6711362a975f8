"""Tiny pipelines, built once; a test that changes one must build its own."""

from functools import cache

import pytest
import torch
from diffusers.utils import logging

from flowbp.backbones import BACKBONES
from flowbp.backbones.tiny import tiny_pipeline

TOKENS = 48

logging.set_verbosity_error()


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Threads cost more than tensors of this size are worth: seconds a test where several processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
