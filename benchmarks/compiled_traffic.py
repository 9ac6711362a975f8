"""Launches and bytes of a transformer's block: eager PyTorch, torch.compile, flowbp_kernels.apply. It needs no GPU:

    python benchmarks/compiled_traffic.py --json docs/compiled_traffic.json

Blocks of published size with bfloat16 weights, each alone, on the inputs that a pass of `step_traffic.py` gives it.
`pass` is the block without gradient, `replay` forward and backward, and both are counted as there.

Inductor lowers and schedules for an NVIDIA H100 (capability 9.0, 132 multiprocessors): it is told what such a GPU would
answer. Its decisions are those of the default mode: what it fuses, what backward computes again in order to save less,
where it splits a reduction. The count stops before Triton code is written. Each node of the schedule is one launch. Its
bytes are inductor's own count, of each buffer that a node touches. Attention is one call, as it is eagerly; GEMMs are
calls of cuBLAS.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import step_traffic  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._dynamo.device_interface import CudaInterface  # noqa: E402
from torch._guards import detect_fake_mode  # noqa: E402
from torch._inductor import compile_fx, ir, scheduler  # noqa: E402
from torch._inductor.debug import DebugContext  # noqa: E402
from torch._inductor.fx_passes import reinplace  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

from flowbp.runtime.environment import environment  # noqa: E402

BLOCKS = {
    "sd3.5-medium": ("transformer_blocks.0", "transformer_blocks.13"),  # with and without a second attention
    "flux.1-dev": ("transformer_blocks.0", "single_transformer_blocks.0"),
}
H100 = SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, warp_size=32, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20,
)  # fmt: skip


class Counted(Exception):
    """The backward pass has been counted, and cannot run."""


def main() -> None:
    about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=about[0], epilog="\n\n".join(about[1:]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", nargs="+", choices=BLOCKS, default=list(BLOCKS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="file for the rows, written after each")
    options = parser.parse_args()
    report = {"environment": environment(), "case": step_traffic.CASE, "rows": []}
    for name in options.backbone:
        for network in step_traffic.NETWORKS:
            for row in rows(name, network):
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def rows(name: str, network: str) -> list[dict[str, Any]]:
    """A row for each block of a network, as it runs eagerly; of one that is not fused also as it is compiled."""
    backbone, _ = step_traffic.build(name, network)
    blocks = {label: backbone.denoiser.get_submodule(label) for label in BLOCKS[name]}
    velocity, latents = step_traffic.inputs(backbone, name)
    inputs = inputs_of(blocks, lambda: velocity(latents, torch.empty((), device="meta")))
    found = []
    for label, block in blocks.items():
        runs = {"fused" if network.startswith("fused") else "eager": eager}
        runs |= {} if network.startswith("fused") else {"compile": compiled}
        for kind, count in runs.items():
            case = {"backbone": name, "block": label, "weights": step_traffic.NETWORKS[network][0], "runs": kind}
            found.append(case | count(block, *inputs[label]))
    return found


def inputs_of(blocks: dict[str, nn.Module], run: Callable[[], object]) -> dict[str, tuple[tuple, dict]]:
    """(args, kwargs) with which run() calls each block."""
    seen = {}
    with ExitStack() as stack:
        for label, block in blocks.items():

            def note(module, args, kwargs, label=label):
                seen[label] = args, kwargs

            stack.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
        stack.enter_context(step_traffic.as_on_a_gpu())
        run()
    return seen


def eager(block: nn.Module, args: tuple, kwargs: dict) -> dict[str, dict]:
    args, kwargs = leaves((args, kwargs), "meta")
    with step_traffic.as_on_a_gpu():
        with step_traffic.Traffic() as alone, torch.no_grad():
            block(*args, **kwargs)
        with step_traffic.Traffic() as replay:
            out = outputs(block(*args, **kwargs))
            torch.autograd.backward(out, [torch.empty_like(t) for t in out])
    for p in block.parameters():
        p.grad = None
    return {"pass": brief(alone.summary()), "replay": brief(replay.summary())}


def compiled(block: nn.Module, args: tuple, kwargs: dict) -> dict[str, dict]:
    """Dynamo and AOTAutograd see tensors of a CPU without numbers; inductor is told that they lie on a GPU."""
    counts = []

    def schedule(graph, inputs, is_inference=False, is_backward=False, **_):
        counts.append(scheduled(graph, inputs, is_inference, is_backward))
        if is_backward:
            raise Counted
        return graph

    mode = FakeTensorMode()
    with mode:
        args, kwargs = leaves((args, kwargs), "cpu")
        for module in block.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(leaves(p, "cpu"), requires_grad=p.requires_grad)
    torch._dynamo.reset()
    run = torch.compile(
        block, backend=lambda graph, inputs: compile_fx.compile_fx(graph, inputs, schedule), fullgraph=True
    )
    with patch.object(F, "scaled_dot_product_attention", step_traffic.fused_attention):
        with torch.no_grad():
            run(*args, **kwargs)
        out = outputs(run(*args, **kwargs))
        with mode:
            seeds = [torch.empty_like(t) for t in out]
        try:
            torch.autograd.backward(out, seeds)
        except Counted:
            pass
    alone, forward, backward = counts
    return {"pass": alone, "replay": {key: forward[key] + backward[key] for key in alone}}


def scheduled(graph, inputs: list, is_inference: bool, is_backward: bool) -> dict[str, float]:
    """What `tally` says of a graph that AOTAutograd has made."""
    mode = detect_fake_mode(inputs)
    with mode:
        on_gpu = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in inputs]
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = node.kwargs | {"device": torch.device("cuda:0")}
    kinds = {"is_inference": is_inference, "is_backward": is_backward}
    with as_for_a_gpu(), torch.no_grad(), V.set_fake_mode(mode):
        compile_fx.view_to_reshape(graph)
        compile_fx.fake_tensor_prop(graph, on_gpu)
        compile_fx._recursive_record_original_output_strides(graph)
        compile_fx._recursive_post_grad_passes(graph, is_inference=is_inference)
        lowered = GraphLowering(graph, on_gpu, shape_env=compile_fx.shape_env_from_inputs(on_gpu), **kinds)
        with V.set_graph_handler(lowered), V.set_extern_kernel_nodes([]):
            lowered.run(*on_gpu)
            lowered.init_wrapper_code()
            lowered._update_scheduler()
            return tally(lowered.scheduler.nodes)


def tally(nodes: list) -> dict[str, float]:
    """Launches, gigabytes outside of GEMMs and attention, and gigabytes of GEMMs."""
    launches = moved = of_gemms = 0
    for node in nodes:
        if isinstance(node, scheduler.ExternKernelSchedulerNode):
            if isinstance(node.node, ir.MultiOutput):  # one of the results of the call before
                continue
            op = getattr(node.node, "op_overload", None)
            name = f"{op.namespace}::{op._opname}" if op is not None else ""
            launches += step_traffic.LAUNCHES.get(name, 1)
            of_gemms += 0 if name in step_traffic.ATTENTION else node.get_read_write_buffers_sizes()
        elif not isinstance(node, scheduler.NopKernelSchedulerNode):
            launches += 1
            moved += node.get_read_write_buffers_sizes()
    return {"launches": launches, "gb_outside": moved / 1e9, "gb_gemm": of_gemms / 1e9}


@contextmanager
def as_for_a_gpu():
    """What inductor asks about the GPU. It also lets one of its passes write into a tensor of the GPU to learn the
    result's shape, which needs a driver; the shape is that of the tensor.
    """
    properties = {
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (9, 0),
    }
    with ExitStack() as stack:
        stack.enter_context(V.set_debug_handler(DebugContext()))
        stack.enter_context(patch.multiple(torch.cuda, **properties))
        stack.enter_context(patch.object(CudaInterface, "get_device_properties", properties["get_device_properties"]))
        stack.enter_context(patch.object(scheduler, "has_triton", lambda *_: True))
        stack.enter_context(patch.object(reinplace, "_inplace_generalized_scatter", lambda into, source, views: into))
        yield


def leaves(values: Any, device: str) -> Any:
    """Empty tensors like those in `values`, which ask for a gradient where these do."""

    def like(t: Tensor) -> Tensor:
        empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
        return empty.requires_grad_(t.requires_grad)

    return tree_map_only(Tensor, like, values)


def outputs(result: Any) -> list[Tensor]:
    return [t for t in step_traffic.tensors(result) if t.requires_grad]


def brief(summary: dict[str, float]) -> dict[str, float]:
    return {key: summary[key] for key in ("launches", "gb_outside", "gb_gemm")}


if __name__ == "__main__":
    main()
