"""The sweep: pulls a gradient at the end of a cached rollout back through its nodes, one network graph at a time.

A rollout without gradient has cached its latents x_i, and g = dR/dx_hat is the gradient at its end. Backpropagation
through the whole rollout would hold all its graphs. The sweep replays one node after the other, clean end first. The
network runs on x_i once more, with a graph; the cotangent c_i is pulled back through that graph to the parameters
theta; and the graph is freed. At most one node j is a bridge. The bridge's graph also gives g_x, the gradient of the
input x_j, and the cotangents of the nodes before j are made of both g and g_x.

    dR/dtheta = sum_i w_i (dv_i/dtheta)^T c_i
          c_i = g                            i >= j, or no bridge
          c_i = g + alpha s_i g_x            i <  j          g_x = w_j (dv_j/dx)^T g

s_i is 1 for Euler. A multistep solver takes v_i into steps on both sides of j, and s_i is its weight in x_j over w_i.

Callers differ in the last move alone: flowbp's trainer calls v.backward, `selective_recompute` torch.autograd.grad.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowbp_kernels.bridge_cotangents import bridge_cotangents

Number = float | tuple[float, ...]  # one for the whole batch, or one a sample
Replay = tuple[Any, Number, Number, int, Number]  # (node, weight, gate, output, share): see sweep


class Graph(NamedTuple):
    """A forward pass that waits for its backward pass: x [B, *S] is a leaf, v [B, *S] the output with its graph."""

    x: Tensor
    v: Tensor


def sweep(
    grads: Sequence[Tensor],
    passes: Sequence[Sequence[Replay]],
    forward: Callable[[Sequence[Replay]], Graph],
    pull: Callable[[Tensor, Tensor, Tensor], Tensor | None],
) -> None:
    """Run the passes in the order given, which is clean end first; one graph is alive at a time.

    grads: g [B, *S], the gradient at the end of the rollout, then at each further output of nodes; any float dtype.
    passes: each a sequence of n replays (node, weight, gate, output, share), which run as one batch of n B samples.
        node: known to `forward` alone.  weight: w_i, one for the batch or one a sample.
        gate: alpha at a bridge, one for the batch or one a sample; 0 at any other node. A bridge has a pass of its
            own. A sample has one bridge at most; those of two samples may be in different passes.
        output: which of `grads` the node starts from. What comes back through a bridge joins the first of them.
        share: s_i, one for the batch or one a sample.
    forward(replays): the graph of a pass, x and v [n B, *S]; x requires grad at a bridge.
    pull(x, v, seed): runs the backward pass of v from seed [n B, *S], of v's dtype; returns dR/dx at a bridge.

    A seed is w_i c_i, summed in float32 (float64 if a gradient is float64) and rounded once. A weight or gate of 0
    cuts, NaN included. Raises RuntimeError if v does not depend on the input of a bridge.
    """
    grads = [g.detach() for g in grads]
    g_x, alpha = grads[0], 0.0  # nothing has come back through a bridge yet: with alpha = 0, g_x takes no part
    for replays in passes:
        x, v = forward(replays)
        # The seeds of this pass alone: those of all nodes at once would hold K latents beside the network's graph.
        seed = v.new_empty(len(replays), *g_x.shape)
        for row, (_, weight, _, output, share) in zip(seed.split(1), replays, strict=True):
            bridge_cotangents(
                grads[output], g_x, [weight], [0.0 if output else _times(alpha, share, len(g_x))], out=row
            )
        pulled = pull(x, v, seed.view_as(v))
        if x.requires_grad:
            if pulled is None:
                raise RuntimeError("velocity at the bridge node does not depend on its input x: is x detached in it?")
            ((_, _, gate, _, _),) = replays
            if alpha:  # the bridge of other samples was in an earlier pass: they keep what came back through it
                before, here = _each(alpha, len(g_x)), _each(gate, len(g_x))
                earlier = torch.tensor([sample for sample, a in enumerate(before) if a], device=g_x.device)
                pulled = pulled.index_copy(0, earlier, g_x[earlier])
                gate = tuple(map(max, before, here))
            g_x, alpha = pulled, gate
        del x, v, seed  # free this graph before the next is recorded


def _each(number: Number, batch: int) -> tuple[float, ...]:
    """The number of each sample."""
    return number if isinstance(number, tuple) else (number,) * batch


def _times(a: Number, b: Number, batch: int) -> Number:
    if isinstance(a, tuple) or isinstance(b, tuple):
        return tuple(x * y for x, y in zip(_each(a, batch), _each(b, batch), strict=True))
    return a * b


def record(velocity: Callable[[Tensor, Any], Tensor], x: Tensor, sigma: Any, requires_grad: bool) -> Graph:
    """v = velocity(x, sigma) with its graph; x collects a gradient of its own if `requires_grad`.

    Raises RuntimeError when v has another shape than x, or no graph: nothing would be learned from it.
    """
    x = x.detach().requires_grad_(requires_grad)
    with torch.enable_grad():
        v = velocity(x, sigma)
    if v.shape != x.shape:
        raise RuntimeError(f"velocity returned shape {tuple(v.shape)} for a latent of shape {tuple(x.shape)}")
    if not v.requires_grad:
        raise RuntimeError(
            "velocity returned a tensor without graph, so with no gradient to any parameter of "
            f"{_network_of(velocity)}: none requires grad, or the network ran under no_grad, or on detached copies"
        )
    return Graph(x, v)


def _network_of(velocity: Callable) -> str:
    """The class of the network behind a velocity, for error messages."""
    owner = getattr(velocity, "__self__", velocity)
    network = inspect.unwrap(getattr(owner, "network", owner))
    backbone = getattr(network, "__self__", network)
    return type(getattr(backbone, "denoiser", backbone)).__name__


# -- what a replay repeats of the rollout ------------------------------------------------------------------------------


@dataclass(frozen=True)
class RngState:
    """State of the random number generators that a network on `device` draws from (dropout): the CPU's and its own."""

    device: torch.device
    states: tuple[Tensor, ...]

    @classmethod
    def capture(cls, device: torch.device | str = "cpu") -> "RngState":
        device = torch.device(device)
        states = (torch.get_rng_state(),)
        if device.type != "cpu":
            states += (torch.get_device_module(device).get_rng_state(device),)
        return cls(device, states)

    def restore(self) -> None:
        torch.set_rng_state(self.states[0])
        if self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(self.states[1], self.device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RngState) and all(map(torch.equal, self.states, other.states))


def autocast_state(device_type: str) -> tuple[dict, ...]:
    """Arguments of the `torch.autocast` blocks that restore the current autocast, of the device and of the CPU."""
    return tuple(
        {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in sorted({device_type, "cpu"})
    )


@contextmanager
def as_in_the_rollout(device: torch.device, autocast: Sequence[dict], rng: RngState | None) -> Iterator[None]:
    """A replay in this context runs under the rollout's autocast and draws the rollout's random numbers. Autocast and
    random state are afterwards as they were before.

    rng: the random state before the node's forward pass in the rollout; None if that pass drew nothing, or if its state
        was not recorded.
    Raises RuntimeError if the replay draws although rng is None: value and gradient would disagree.
    """
    found = RngState.capture(device)
    with ExitStack() as stack:
        stack.callback(found.restore)
        for state in autocast:
            stack.enter_context(torch.autocast(**state))
        if rng is not None:
            rng.restore()
        yield
        if rng is None and RngState.capture(device) != found:
            raise RuntimeError(
                "the replay drew random numbers (dropout), the rollout none, or others that were not recorded: value "
                "and gradient would disagree. Pass rng_states=[RngState.capture(device) before each node] to "
                "selective_recompute, or call the network in the same mode both times, train() or eval()."
            )
