"""Selective recompute: the value of a cached endpoint, the gradient of the velocities that led there.

For a training loop that keeps its own loss.backward(). The rollout runs under no_grad and caches its latents; backward
is the sweep of `flowbp_kernels.sweep`, from the gradient g at the endpoint.
"""

import contextlib
import functools
import math
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import OptimizedModule
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from flowbp_kernels.arguments import accumulation_dtype
from flowbp_kernels.sweep import Graph, Replay, RngState, as_in_the_rollout, autocast_state, record, sweep


@torch.compiler.disable(reason="selective_recompute replays a Python callable in backward, which no graph can hold")
def selective_recompute(
    value: Tensor,
    velocity: Callable[[Tensor, float | Tensor], Tensor],
    latents: Sequence[Tensor],
    sigmas: Sequence[float] | Tensor,
    grad_weights: Sequence[float],
    bridge: tuple[int, float] | None = None,
    *,
    shares: Sequence[float] | None = None,
    params: Iterable[Tensor],
    rng_states: Sequence[RngState] | None = None,
    reduces_gradients: bool = False,
) -> Tensor:
    """`value`, whose backward replays the active nodes and gives their gradient to `params`.

    value: [B, *S], the cached endpoint (detached).  velocity(x, sigma) -> [B, *S]: the network, as in the rollout.
    latents: K inputs [B, *S] of the active nodes (detached), noise end first.
    sigmas: [K], not increasing, handed to velocity as given.
    grad_weights: K numbers, sigma units; a node of weight 0 is not replayed.
    bridge: (position in latents, alpha in [0, 1]); the nodes before that position also get the pullback through it.
    shares: K factors of that pullback; None for ones. After a multistep solver: the weight of v_i in the bridge's
        latent, over its weight in the endpoint.
    params: what the velocity is differentiated with respect to; each must get a gradient from some node.
    rng_states: RngState.capture(device) from before each node of the rollout, so that dropout draws its mask again.
    reduces_gradients: with several ranks and no DistributedDataParallel, states that the loop reduces gradients itself.

    Gradient: sum_i w_i (dv_i/dparams)^T c_i (see flowbp_kernels.sweep) to params, summed in float32 (float64 for a
    float64 value) and cast to each parameter's dtype; none to value, latents and weights. The replay runs under the
    autocast state of this call and leaves the random state as it finds it. With retain_graph, a second backward replays
    again.
    Under torch.compile this call is a graph break (an error with fullgraph=True). A compiled velocity is fine; torch
    then warns of the hook through which backward sees the modules that it enters, unless the network was compiled in
    place (network.compile()).
    Memory beside one node's graph: the float32 sums of the gradients, which become the parameters' dtype one by one.
    Raises ValueError for inputs outside this contract; RuntimeError, in backward, for create_graph=True, a parameter
    changed since this call, left without gradient or with a gradient hook, random numbers drawn without rng_states, a
    BatchNorm that would count each replay in its running statistics, or gradients that no rank would reduce.

        x_hat = selective_recompute(x_hat, velocity, latents, sigmas, weights, params=adapter_params)
        (-reward(decode(x_hat)).mean()).backward()
    """
    params, latents, grad_weights = tuple(params), tuple(latents), tuple(float(w) for w in grad_weights)
    shares = (1.0,) * len(latents) if shares is None else tuple(float(share) for share in shares)
    _check_params(params)
    _check_nodes(value, latents, sigmas, grad_weights, shares, rng_states)
    gates = {}
    if bridge is not None:
        position, alpha = bridge
        if not 0 <= position < len(latents):
            raise ValueError(f"bridge position {position} is not a node; there are {len(latents)}, counted from 0")
        if not 0 <= alpha <= 1:
            raise ValueError(f"bridge alpha must lie in [0, 1], not {alpha}")
        gates = {position: alpha}
    nodes = range(len(latents) - 1, -1, -1)  # clean end first
    call = _Call(
        velocity=velocity,
        sigmas=sigmas,
        passes=[[(i, grad_weights[i], gates.get(i, 0.0), 0, shares[i])] for i in nodes if grad_weights[i] != 0],
        rng_states=rng_states,
        autocast=autocast_state(value.device.type),
        needs_ddp=not reduces_gradients and _world_size() > 1,
        params=params,
        versions=tuple(p._version for p in params),
    )
    return _SelectiveRecompute.apply(call, value, len(latents), *latents, *params)


@dataclass(frozen=True)
class _Call:
    """What backward needs to know beside the latents."""

    velocity: Callable[[Tensor, float | Tensor], Tensor]
    sigmas: Sequence[float] | Tensor
    passes: Sequence[Sequence[Replay]]
    rng_states: Sequence[RngState] | None
    autocast: tuple[dict, ...]
    needs_ddp: bool
    params: tuple[Tensor, ...]
    versions: tuple[int, ...]


class _SelectiveRecompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, value, num_nodes, *latents_and_params):
        ctx.call = call
        ctx.save_for_backward(*latents_and_params[:num_nodes])
        return value.view_as(value)

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "selective_recompute has no second derivative: its graph is gone once a node is replayed. "
                "Call backward without create_graph=True."
            )
        latents = ctx.saved_tensors
        gradients = _gradients(ctx.call, latents, g)
        return (None, None, None, *(None for _ in latents), *gradients)


def _gradients(call: _Call, latents: tuple[Tensor, ...], g: Tensor) -> list[Tensor]:
    """What the sweep from g gives to each of the params."""
    params = call.params
    if tuple(p._version for p in params) != call.versions:
        raise RuntimeError(
            "a parameter was changed in place between selective_recompute and its backward, so value and gradient "
            "would belong to different networks: call backward before optimizer.step()."
        )
    if any(p._backward_hooks for p in params):
        raise RuntimeError(
            "a parameter has a gradient hook (Tensor.register_hook), which would run once a node and again on the sum: "
            "use register_post_accumulate_grad_hook, which runs once."
        )
    totals: list[Any] = [None] * len(params)  # a Tensor from the first gradient on

    def add_to(k: int, gradient: Tensor) -> Tensor:
        """Add a node's gradient to the parameter's sum, and give autograd zeros that take no memory to keep instead."""
        if totals[k] is None:
            # A copy, because autograd may give one tensor to two parameters.
            totals[k] = gradient.to(accumulation_dtype(gradient), copy=True)
        else:
            totals[k] += gradient
        return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)

    def forward(replays: Sequence[Replay]) -> Graph:
        ((i, _, gate, _, _),) = replays
        rng = None if call.rng_states is None else call.rng_states[i]
        with as_in_the_rollout(g.device, call.autocast, rng):
            return record(call.velocity, latents[i], call.sigmas[i], requires_grad=gate != 0)

    def pull(x: Tensor, v: Tensor, seed: Tensor) -> Tensor | None:
        wanted = (*params, x) if x.requires_grad else params
        return torch.autograd.grad(v, wanted, seed, allow_unused=True)[-1]

    with _watch_modules(call.needs_ddp), contextlib.ExitStack() as stack:
        for k, p in enumerate(params):
            stack.callback(p.register_hook(functools.partial(add_to, k)).remove)
        sweep([g], call.passes, forward, pull)
    missing = [tuple(p.shape) for p, total in zip(params, totals, strict=True) if total is None]
    if missing:
        raise RuntimeError(
            f"{len(missing)} of {len(params)} params took no part in the replayed velocities; the first has shape "
            f"{missing[0]}. Pass only parameters that velocity uses; a sharded or copied parameter is not in its graph."
        )
    for k, p in enumerate(params):
        totals[k] = totals[k].to(p.dtype)  # one by one: memory never holds all sums in both dtypes
    return totals


def _check_params(params: tuple[Tensor, ...]) -> None:
    if not params:
        raise ValueError("params is empty: nothing would be trained")
    if len({id(p) for p in params}) < len(params):
        raise ValueError("params names a parameter twice, which would double its gradient; pass each once")
    frozen = [tuple(p.shape) for p in params if not p.requires_grad]
    if frozen:
        raise ValueError(f"{len(frozen)} of {len(params)} params do not require grad, as {frozen[0]}; leave them out")
    dtensor = sys.modules.get("torch.distributed.tensor")  # loaded wherever a DTensor exists
    if dtensor is not None and any(isinstance(p, dtensor.DTensor) for p in params):
        raise ValueError(
            "params are sharded (DTensor, FSDP2): the replayed graph holds their unsharded copies, so no gradient "
            "would reach them. Run the sweep with ordinary backward calls instead: flowbp.surrogate.backward."
        )


def _check_nodes(value, latents, sigmas, grad_weights, shares, rng_states) -> None:
    counts = {
        "latents": len(latents), "sigmas": len(sigmas), "grad_weights": len(grad_weights), "shares": len(shares),
    }  # fmt: skip
    if rng_states is not None:
        counts["rng_states"] = len(rng_states)
    if len(set(counts.values())) > 1:
        raise ValueError(f"each needs one entry a node; got {counts}")
    for name, numbers in (("grad_weights", grad_weights), ("shares", shares)):
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{name} must be finite, not {list(numbers)}")
    if not any(grad_weights):
        raise ValueError(f"no node has a weight: grad_weights is {list(grad_weights)}, so nothing would be trained")
    levels = [float(sigma) for sigma in sigmas]
    if any(later > earlier for earlier, later in zip(levels, levels[1:], strict=False)):
        raise ValueError(f"nodes must run from the noise end to the clean end; sigmas increase: {levels}")
    for name, tensor in (("value", value), *((f"latents[{i}]", x) for i, x in enumerate(latents))):
        if tensor.requires_grad:
            raise ValueError(f"{name} requires grad, and that graph would be cut in silence: pass {name}.detach()")
        if tensor.shape != value.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the endpoint {tuple(value.shape)}")


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


# The wrappers that a thread's sweep has entered. All sweeps share one hook under one name, because torch.compile traces
# anew whenever the names of the hooks change.
_ENTERED: dict[int, list[DistributedDataParallel]] = {}
_HOOKS: Any = torch.nn.modules.module._global_forward_pre_hooks


def _look_at(module: torch.nn.Module, _) -> None:
    """The hook: runs whenever a replay enters a module. The parts of a compiled module are looked at from outside."""
    if torch.compiler.is_compiling() or threading.get_ident() not in _ENTERED:
        return
    if isinstance(module, DistributedDataParallel):
        _ENTERED[threading.get_ident()].append(module)
    for part in module.modules() if isinstance(module, OptimizedModule) else (module,):
        if isinstance(part, _NormBase) and part.training and part.track_running_stats:
            raise RuntimeError(
                f"{type(part).__name__} in training mode would count each replay in its running statistics, which the "
                "rollout has counted already: put it in eval() for both, or build it with track_running_stats=False."
            )


@contextlib.contextmanager
def _watch_modules(needs_ddp: bool):
    """Raise RuntimeError where a replay enters a module that it must not enter. With needs_ddp, also raise where the
    sweep entered no DistributedDataParallel, which would reduce the gradients.
    """
    entered = _ENTERED[threading.get_ident()] = []
    _HOOKS["flowbp_kernels.selective_recompute"] = _look_at
    try:
        yield
    finally:
        del _ENTERED[threading.get_ident()]
        if not _ENTERED:
            del _HOOKS["flowbp_kernels.selective_recompute"]
    if needs_ddp and not entered:
        raise RuntimeError(
            f"there are {_world_size()} ranks and velocity did not call the network through DistributedDataParallel: "
            "the gradients would not be reduced and the ranks would drift apart. Call the wrapper, not its .module; "
            "or, if your loop reduces gradients itself, say so with reduces_gradients=True."
        )
    if needs_ddp and any(wrapper.static_graph for wrapper in entered):
        raise RuntimeError(
            "DistributedDataParallel(static_graph=True) waits for the gradients of its first graph, and a replay's "
            "graphs are gone before any gradient reaches a parameter: nothing would be reduced and the ranks would "
            "drift apart. Leave static_graph out."
        )
