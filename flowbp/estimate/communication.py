"""What a step sends between cards, and the time of it at a given bandwidth.

A ring of n cards gathers B bytes, or reduces and splits them, while each card receives B (n - 1) / n. It averages B
bytes with twice as many. A card of a run on m copies of the weights, each split over n cards, receives

    gathered  =  micro-batches x passes x W (n - 1) / n
    reduced   =  reductions x G (n - 1) / n  +  2 G / n (m - 1) / m

W         bytes of all weights, as the network holds them
passes    through each block: the rollout's (1 where it gathers once), and two for each replay, forward and backward
G         bytes of the gradients: float32 where weights are sharded, else as the trained weights
reductions  one a step, or one a backward pass with `memory.shard_gradients`

What belongs to no block (0.5 % of FLUX.1) is gathered less often and counted as a block. Seconds are bytes over the
bandwidth of the slowest link of their ring, as if no pass ran meanwhile.
"""

from typing import Any

MACHINE = 8  # cards of a machine
BANDWIDTH = 450.0, 50.0  # GB/s that a card receives from its machine (NVLink 4), and from others (400 Gbit/s): assumed


def shards(shard: str | bool, cards: int) -> int:
    """How many of `cards` split the weights by `memory.shard`."""
    return {"all": cards, "node": min(cards, MACHINE)}.get(str(shard), 1)


def traffic(estimate: Any, cards: int, once: bool, bandwidth: tuple[float, float] = BANDWIDTH) -> dict[str, Any]:
    """What a card receives in a step of the `Estimate` on `cards`: {"cards", "gathers", "gathered" and "reduced" in
    bytes, "seconds"}. once: a rollout gathers each block once.
    """
    memory, calls, network = estimate.config.memory, estimate.calls, estimate.network
    n, steps = shards(memory.shard, cards), estimate.config.data.accumulate
    backward = calls["backward"] / (3 if memory.checkpointing else 2) / memory.nodes_per_forward
    replays = (calls["replays"] + calls.get("anchor", 0)) / memory.nodes_per_forward
    passes = (1 if once else calls["rollout"]) + replays + backward
    gradients = max(network.trained_bytes, 4 * network.trained) if n > 1 else network.trained_bytes
    gathered = steps * passes * network.weight_bytes * (n - 1) / n
    scattered = (steps * backward if memory.shard_gradients else 1) * gradients * (n - 1) / n
    averaged = 2 * gradients / n * (1 - n / cards)
    within, among = (1e9 * bandwidth[ring > MACHINE] for ring in (n, cards))
    told = {"cards": cards, "gathers": "once a rollout" if once else "every pass"}
    seconds = (gathered + scattered) / within + averaged / among
    return told | {"gathered": gathered, "reduced": scattered + averaged, "seconds": seconds}
