"""Kernel launches, FLOPs and bytes of a training step, counted without a GPU:

    python benchmarks/step_traffic.py --json docs/step_traffic.json

The networks have their published sizes and bfloat16 weights, on the meta device, where an op has shapes and no numbers.
A dispatch mode sees every op of PyTorch's that a GPU would run, below autograd. Counted for each network:

pass     one noise level of the rollout, without gradient, with the network calls that its guidance takes
replay   one node of the sweep: forward and backward, its graph kept (no checkpointing)
step     a whole step of FlowBP-Lagrange: rollout of N = 25, decoder and HPSv2's image tower forward and backward, sweep
         over K = 4 nodes with checkpointed blocks, and update (AdamW in one kernel; without the average)

for `plain` (a replay trains all weights), `lora` (peft's float32 adapters of rank 32 on the backbone's default
targets), and both again on fused blocks, `flowbp_kernels.apply`.

A launch is one kernel on a GPU. A view or an allocation is none. An op of ATen is one, except those in LAUNCHES and:
an op on a list of tensors is as many as CUDA's multi-tensor kernels take, and the backward pass of a convolution is one
for each gradient. What cuBLAS and cuDNN add, such as the second kernel of a split-K product, is not counted.

Bytes are the minimum of each op: every input read once, every output written once. A tensor that is expanded counts as
large as it is in memory, one that is passed twice counts once, and one that is overwritten is not read. Caches hide
nothing: what one op writes the next one reads again. So these bytes are those of an op that streams from memory, and
more than a GPU moves where a small tensor is still in its L2 cache.

Bytes of GEMMs (convolutions among them) and of attention are counted apart, and so are their FLOPs, by the formulas of
torch.utils.flop_counter. All other FLOPs are left out. Attention is one fused kernel, and one RMSNorm of PyTorch's own
too, as on a GPU; the meta device would take both apart.

An op of flowbp_kernels has the launches of its Triton kernels, and the bytes of its inputs and outputs; modulation also
those of the partial sums that one kernel of its backward pass leaves to the next. A rule reads the rows of a cache that
it names. lora_linear is PyTorch's own GEMMs, casts and sums, and is counted as these.
"""

import argparse
import importlib
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count  # noqa: E402

import flowbp_kernels  # noqa: E402
from flowbp import surrogate, trajectory  # noqa: E402
from flowbp.backbones.base import Backbone, bind_velocity  # noqa: E402
from flowbp.config.schema import TuningConfig  # noqa: E402
from flowbp.estimate.architectures import ARCHITECTURES, IMAGE_TOWERS, ImageTower, build_backbone  # noqa: E402
from flowbp.guidance import Guidance, GuidedVelocity, NetworkVelocity  # noqa: E402
from flowbp.methods import FlowBPLagrange  # noqa: E402
from flowbp.objective import Objective, reward_gradient  # noqa: E402
from flowbp.runtime.environment import environment  # noqa: E402
from flowbp.runtime.tuning import master_weights, trainable_parameters  # noqa: E402
from flowbp_kernels import sweep  # noqa: E402
from flowbp_kernels.modulation import CHUNK as CHUNK_OF_TOKENS  # noqa: E402

lora_linear: Any = importlib.import_module("flowbp_kernels.lora_linear")

BATCH, STEPS, RANK, SIDE = 8, 25, 32, 512
CASE = {"batch": BATCH, "steps": STEPS, "rank": RANK, "side": SIDE, "dtype": "bfloat16"}
NETWORKS = {"plain": ("full", False), "lora": ("lora", False), "fused": ("full", True), "fused lora": ("lora", True)}
ATTENTION = {"step_traffic::attention": sdpa_flop_count, "step_traffic::attention_backward": sdpa_backward_flop_count}
GEMM = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution", "convolution_backward"}
GEMM |= {"flowbp_kernels::lora_linear", "flowbp_kernels::lora_linear_backward"}
MODULATION = "flowbp_kernels::modulation_backward"
OVERWRITE = {"copy_", "fill_", "zero_"}
LAUNCHES = {
    "step_traffic::attention_backward": 3,  # row sums of out * grad; the gradients; a conversion of that of the queries
    "native_group_norm": 3,  # moments, their products with weight and bias, and the pass over the input
    "native_group_norm_backward": 3,  # the same of the gradient, with a frozen weight and bias
    "slice_backward": 2,  # zeros, and a copy
    "select_backward": 2,
}
# Ops that are PyTorch's own GEMMs, with the functions that run them.
COMPOSED = {
    "flowbp_kernels::lora_linear": lora_linear._run,
    "flowbp_kernels::lora_linear_backward": lora_linear._run_backward,
}
CHUNK, CHUNKS, TENSORS = 65536, 320, 30  # elements, chunks and (about) tensors of one multi-tensor kernel


def main() -> None:
    about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=about[0], epilog="\n\n".join(about[1:]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ["sd3.5-medium", "flux.1-dev", "flux.2-klein-base-4b", "z-image"]
    parser.add_argument("--backbone", nargs="+", choices=ARCHITECTURES, default=default, metavar="NAME")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--json", type=Path, help="file for the rows, written after each")
    options = parser.parse_args()
    report = {"environment": environment(), "case": CASE, "rows": []}
    for backbone in options.backbone:
        for network in options.network:
            row = {"backbone": backbone, "network": network} | count(backbone, network)
            report["rows"].append(row)
            print(json.dumps({key: part for key, part in row.items() if key != "ops"}), flush=True)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def count(name: str, network: str) -> dict[str, Any]:
    """The tallies of a pass, of a replay, of the parts of a step and of the whole step; and the step's by op."""
    backbone, parameters = build(name, network)
    velocity, latents = inputs(backbone, name)
    with as_on_a_gpu():
        with Traffic() as one_pass, torch.no_grad():
            velocity.branches(latents, torch.empty((), device="meta"))
        with Traffic() as one_replay:
            replay(velocity, latents)
        for p in parameters.values():
            p.grad = None
        backbone.denoiser.enable_gradient_checkpointing()
        parts = step(backbone, velocity, parameters, latents)
    whole = Traffic()
    for part in parts.values():
        whole.add(part)
    counted = {"pass": one_pass, "replay": one_replay, **parts, "step": whole}
    by_op = sorted(whole.ops.items(), key=lambda each: -each[1].bytes)
    return {key: traffic.summary() for key, traffic in counted.items()} | {
        "ops": {op: {"launches": tally.launches, "gb": tally.bytes / 1e9} for op, tally in by_op}
    }


def build(name: str, network: str) -> tuple[Backbone, dict[str, Tensor]]:
    """A backbone on the meta device, and its parameters to train by name."""
    mode, fused = NETWORKS[network]
    backbone = build_backbone(ARCHITECTURES[name], "meta", torch.bfloat16)
    with torch.device("meta"):
        parameters = trainable_parameters(backbone, TuningConfig(mode=mode, rank=RANK))
    if fused:
        flowbp_kernels.apply(backbone.denoiser)
    return backbone, parameters


def inputs(backbone: Backbone, name: str) -> tuple[GuidedVelocity, Tensor]:
    """(the velocity of a batch under its usual guidance, latents)."""
    velocity = bind_velocity(backbone, [""] * BATCH, Guidance(**ARCHITECTURES[name].guidance))
    return velocity, torch.empty(BATCH, *backbone.latent_shape(*backbone.token_grid(SIDE, SIDE)), device="meta")


def replay(velocity: GuidedVelocity, latents: Tensor) -> None:
    v = velocity.replay(latents, torch.empty((), device="meta"))
    v.backward(torch.empty_like(v))


def step(
    backbone: Backbone, velocity: GuidedVelocity, parameters: dict[str, Tensor], noise: Tensor
) -> dict[str, "Traffic"]:
    """One step as `flowbp.training.trainer` takes it, by its parts."""
    sigmas = backbone.sigmas(STEPS, SIDE, SIDE)
    plan = FlowBPLagrange(order=2, active="all").plan(sigmas.double().numpy(), np.random.default_rng(0))
    assert len(plan.replays) == 4
    tower, objective = ImageTower(IMAGE_TOWERS["hpsv2"], "meta", torch.float32), Objective(hinge=0.55)

    def score(part: Tensor, rows: slice) -> Tensor:
        return tower(backbone.decode(part), [""] * len(part))

    with Traffic() as rollout:
        rolled = trajectory.rollout(
            replace(velocity, network=counted_once(velocity.network, rollout)), noise, sigmas, plan
        )
        z = surrogate.reward_input(plan, rolled)
        surrogate.residuals(plan, rolled)
    with Traffic() as reward:
        _, _, g = reward_gradient(objective, score, z, torch.empty(BATCH, device="meta"))
    with Traffic() as replays:
        surrogate.backward(plan, rolled, velocity.replay, g)
    masters = master_weights(parameters)
    moments = [[torch.empty_like(p) for p in masters.values()] for _ in range(2)]
    counts = [torch.empty((), device="meta") for _ in masters]
    with Traffic() as update, torch.no_grad():
        grads = [p.grad.to(masters[name].dtype) for name, p in parameters.items()]
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        torch._foreach_mul_(grads, (1.0 / norm).clamp(max=1.0))
        adamw = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.999, "weight_decay": 1e-4, "eps": 1e-8}
        torch._fused_adamw_(list(masters.values()), grads, *moments, [], counts, amsgrad=False, maximize=False, **adamw)
        for name, p in parameters.items():
            if masters[name] is not p:
                p.copy_(masters[name])
    return {"rollout": rollout, "reward": reward, "sweep": replays, "update": update}


def counted_once(network: NetworkVelocity, total: "Traffic") -> NetworkVelocity:
    """The network, which runs once for each shape of x and is then only added to `total`: without a graph, every noise
    level of a rollout is the same work.
    """
    seen: dict[torch.Size, tuple[Traffic, Tensor]] = {}

    def call(x, sigma, conditioning):
        if x.shape in seen:
            total.add(seen[x.shape][0])
        else:
            with Traffic() as once:
                v = network(x, sigma, conditioning)
            seen[x.shape] = once, v
        return seen[x.shape][1]

    return call


# -- counting ----------------------------------------------------------------------------------------------------------


class Tally(NamedTuple):
    """What the calls of one op come to."""

    launches: int = 0
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*map(sum, zip(self, other, strict=True)))


class Traffic(TorchDispatchMode):
    """Counts what runs within it, by op."""

    def __init__(self):
        super().__init__()
        self.ops: dict[str, Tally] = defaultdict(Tally)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._opname if func.namespace == "aten" else f"{func.namespace}::{func._opname}"
        if name in COMPOSED:
            with Traffic() as inside:
                out = COMPOSED[name](*args, **kwargs)
            for op, tally in inside.ops.items():
                self.ops[name if op in GEMM else f"{name}, casts and sums"] += tally
            return out
        if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"):
            with self:  # a composite op without a kernel, which autograd would have taken apart
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if func._opname.startswith(("empty", "new_empty")) or is_view(func, args, out):
            return out
        arguments = {
            argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)
        } | kwargs
        read, written = traffic(func, arguments, out)
        if (on_gpu(read) or on_gpu(written)) and any(t.numel() for t in written):
            count = launches(name, arguments, out)
            moved = sizes(read) + sizes(written) + partial_sums(name, arguments, out)
            self.ops[name] += Tally(count, flops(name, func, args, kwargs, out), moved)
        return out

    def add(self, other: "Traffic") -> None:
        for op, tally in other.ops.items():
            self.ops[op] += tally

    def summary(self) -> dict[str, float]:
        """Launches, TFLOPs and gigabytes, those of GEMMs and of attention apart."""
        gemm, attention, other = Tally(), Tally(), Tally()
        for op, tally in self.ops.items():
            if op in ATTENTION:
                attention += tally
            elif op in GEMM:
                gemm += tally
            else:
                other += tally
        found = {"launches": gemm.launches + attention.launches + other.launches}
        found |= {"gemm_tflop": gemm.flops / 1e12, "attention_tflop": attention.flops / 1e12}
        return found | {
            "gb_outside": other.bytes / 1e9,
            "gb_gemm": gemm.bytes / 1e9,
            "gb_attention": attention.bytes / 1e9,
        }


def is_view(func, args: tuple, out: Any) -> bool:
    """Whether an op only names memory that is there."""
    outputs = tensors(out)
    given = {storage(t) for t in tensors(args)}
    return bool(outputs) and not func._schema.is_mutable and all(storage(t) in given for t in outputs)


def traffic(func, arguments: dict[str, Any], out: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(tensors that an op reads, tensors that it writes)."""
    changed = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    overwrites = func._opname in OVERWRITE or func.namespace == "flowbp_kernels"
    arguments = dict(arguments)
    if func.namespace == "flowbp_kernels" and arguments.get("nodes") is not None:
        arguments["velocities"] = arguments["velocities"][: len(arguments["nodes"])]
    read = tensors([value for name, value in arguments.items() if not (overwrites and name in changed)])
    written = tensors([value for name, value in arguments.items() if name in changed])
    return read, written or tensors(out)


def launches(name: str, arguments: dict[str, Any], out: Any) -> int:
    if name.startswith(("_foreach", "_fused_adamw")):
        given = tensors(arguments["self"])
        return max(-(-sum(-(-t.numel() // CHUNK) for t in given) // CHUNKS), -(-len(given) // TENSORS))
    if name == "convolution_backward":
        return len(tensors(out))
    if name == MODULATION:
        return 2 if out[2].numel() else 1
    if name.endswith(("qk_norm_backward", "rms_norm_backward")):  # that of a weight is summed by parts, then over them
        streams = ("x", "queries", "keys", "queries_2", "keys_2")
        return 1 + 2 * (len(out) - sum(arguments.get(stream) is not None for stream in streams))
    return LAUNCHES.get(name, 1)


def partial_sums(name: str, arguments: dict[str, Any], out: Any) -> int:
    """Bytes that the first kernel of a modulation's backward pass writes and the second reads: sums of few tokens."""
    if name != MODULATION or not out[2].numel():
        return 0
    tokens = next(arguments[g] for g in ("g_s", "g") if arguments[g] is not None).shape[1]
    return 2 * -(-tokens // CHUNK_OF_TOKENS) * out[2].nbytes


def flops(name: str, func, args: tuple, kwargs: dict, out: Any) -> int:
    if name in ATTENTION:
        count = ATTENTION[name]
        return count(*(t.shape for t in args[: 4 if count is sdpa_backward_flop_count else 3]))
    formula = flop_registry.get(getattr(torch.ops.aten, name.removesuffix("_"), None))
    return formula(*args, **kwargs, out_val=out) if formula is not None else 0


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def on_gpu(group: Iterable[Tensor]) -> bool:
    return any(t.is_meta for t in group)


def sizes(group: Iterable[Tensor]) -> int:
    """Bytes of the tensors on the GPU, each once, without the copies that `expand` only pretends to make."""
    once = {(storage(t), t.storage_offset(), t.shape, t.stride()): t for t in group if t.is_meta}
    return sum(
        t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)
        for t in once.values()
        if t.numel()
    )


# -- what runs on a GPU as one kernel ----------------------------------------------------------------------------------


@torch.library.custom_op("step_traffic::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("only counted")


@torch.library.custom_op("step_traffic::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("only counted")


@torch.library.custom_op("step_traffic::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("only counted")


@torch.library.custom_op("step_traffic::rms_norm_backward", mutates_args=())
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, of_weight: bool) -> list[Tensor]:
    raise NotImplementedError("only counted")


# As fused attention does, an output lies in memory as its input does.
attention.register_fake(lambda q, k, v, mask: (torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)))
attention_backward.register_fake(lambda grad, *qkv: tuple(map(torch.empty_like, qkv[:3])))
rms_norm.register_fake(lambda x, w: (torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)))
rms_norm_backward.register_fake(
    lambda grad, x, w, rstd, of_w: [torch.empty_like(t) for t in ((x, w) if of_w else (x,))]
)


def save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def norm_gradients(ctx, grad, _):
    x, weight, _, rstd = ctx.saved_tensors
    found = torch.ops.step_traffic.rms_norm_backward(grad, x, weight, rstd, ctx.needs_input_grad[1])
    return found[0], found[1] if ctx.needs_input_grad[1] else None


attention.register_autograd(
    lambda ctx, grad, _: (*torch.ops.step_traffic.attention_backward(grad, *ctx.saved_tensors), None),
    setup_context=save,
)
rms_norm.register_autograd(norm_gradients, setup_context=save)


def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Takes the place of F.scaled_dot_product_attention."""
    assert not enable_gqa and not is_causal and not dropout_p
    return torch.ops.step_traffic.attention(query, key, value, attn_mask)[0]


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Attention and RMSNorm are one kernel each, and the meta device has no random numbers and no autocast."""

    def norm(x, shape, weight=None, eps=None):
        return torch.ops.step_traffic.rms_norm(x, weight)[0]

    def gemm_into_float32(left, right):
        return torch.mm(left.t(), right, out_dtype=torch.float32)

    of_cpu = sweep.RngState.capture
    with ExitStack() as stack:
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", fused_attention))
        stack.enter_context(patch.object(F, "rms_norm", norm))
        stack.enter_context(patch.object(lora_linear, "_accumulated", gemm_into_float32))
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda *kind: False))
        stack.enter_context(patch.object(torch, "autocast", lambda *_, **__: nullcontext()))
        stack.enter_context(patch.object(sweep.RngState, "capture", lambda device: of_cpu("cpu")))
        stack.enter_context(patch.object(trajectory, "autocast_state", lambda kind: ()))
        yield


if __name__ == "__main__":
    main()
