"""How many kernels the ops of a network launch, in Triton's interpreter: one forward, one backward. The counts of
docs/step_traffic.json take that for granted. test_triton.py runs this file in a process of its own.
"""

import os
from unittest.mock import patch

import pytest
import torch
from triton.runtime import interpreter

import flowbp_kernels as ops

CALLS = {
    "modulated_layer_norm": lambda x, row, heads: ops.modulated_layer_norm(x, row, row),
    "modulated_rms_norm": lambda x, row, heads: ops.modulated_rms_norm(x, row[0], row, eps=1e-5),
    "gated_residual": lambda x, row, heads: ops.gated_residual(x, row, x * 2),
    "gated_residual_layer_norm": lambda x, row, heads: ops.gated_residual_layer_norm(x, row, x * 2, row, row)[1],
    "qk_norm": lambda x, row, heads: ops.qk_norm((heads, heads * 2), (heads, heads * 3), None, None)[0],
    "swiglu": lambda x, row, heads: ops.swiglu(x, x * 2, prefix=x),
    "gelu": lambda x, row, heads: ops.gelu(x, prefix=x),
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="it counts the interpreter's launches")
@pytest.mark.parametrize("op", CALLS)
def test_an_op_is_one_kernel_forward_and_one_backward(op, monkeypatch):
    monkeypatch.setenv("FLOWBP_KERNELS", "triton")
    x, row, heads = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 16), (2, 16), (2, 3, 2, 8)))
    run = interpreter.GridExecutor.__call__
    with patch.object(interpreter.GridExecutor, "__call__", autospec=True, side_effect=run) as launch:
        y = CALLS[op](x, row, heads)
        assert launch.call_count == 1
        y.sum().backward()
        assert launch.call_count == 2
