"""What a card receives in a step, by the formula of rings; and where a rollout holds the whole network."""

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from flowbp.cli.commands import app
from flowbp.config import load
from flowbp.estimate.communication import BANDWIDTH, traffic
from flowbp.estimate.estimate import MARGIN, estimate
from flowbp.evaluation.pages import facts
from flowbp.training import run

NVLINK, NETWORK = BANDWIDTH
GIGA = 10**9


def received(cards, once, *overrides, bandwidth=BANDWIDTH):
    """(GB gathered, GB reduced, seconds) of a step: 12e9 bfloat16 weights, all trained; 25 calls, 4 replays."""
    network = SimpleNamespace(weight_bytes=24 * GIGA, trained_bytes=24 * GIGA, trained=12 * GIGA)
    config = load("demo", ["tuning.mode=full", "memory.recompute=always", "memory.checkpointing=true", *overrides])
    calls = {"rollout": 25.0, "replays": 4.0, "backward": 12.0}
    found = traffic(SimpleNamespace(config=config, calls=calls, network=network), cards, once, bandwidth)
    return found["gathered"] / GIGA, found["reduced"] / GIGA, found["seconds"]


@pytest.mark.parametrize(("once", "passes"), [(False, 25 + 2 * 4), (True, 1 + 2 * 4)])
@pytest.mark.parametrize(("cards", "link"), [(8, NVLINK), (64, NETWORK)])
def test_a_card_receives_the_shares_of_the_others_at_every_gathering(once, passes, cards, link):
    others = (cards - 1) / cards
    gathered, reduced = passes * 24 * others, 48 * others  # gradients in float32
    expected = gathered, reduced, (gathered + reduced) / link
    assert received(cards, once, "memory.shard=all") == pytest.approx(expected)


def test_shards_of_a_node_cross_no_network_and_the_average_over_machines_does():
    gathered, scattered, averaged = 9 * 24 * 7 / 8, 48 * 7 / 8, 2 * 48 / 8 * 7 / 8
    expected = gathered, scattered + averaged, (gathered + scattered) / 400 + averaged / 20
    assert received(64, True, "memory.shard=node", bandwidth=(400, 20)) == pytest.approx(expected)
    assert received(8, True, "memory.shard=node") == received(8, True, "memory.shard=all")


def test_split_gradients_are_reduced_in_every_backward_pass_and_copied_ones_once_in_their_own_dtype():
    split = "memory={shard: all, shard_gradients: true}"
    assert received(8, True, split, "data.accumulate=2")[1] == pytest.approx(2 * 4 * 48 * 7 / 8)
    assert received(8, True, "data.accumulate=2")[:2] == pytest.approx((0, 2 * 24 * 7 / 8))
    assert received(1, False, split) == (0, 0, 0)


def test_several_nodes_of_a_forward_pass_share_its_gatherings():
    assert received(8, True, "memory={shard: all, nodes_per_forward: 4}")[0] == pytest.approx((1 + 1 + 1) * 24 * 7 / 8)


def test_the_estimate_splits_over_a_node_and_counts_the_whole_network_in_a_rollout_that_gathers_once():
    overrides = ["tuning.mode=full"]
    every, node, once, copied = (
        estimate(load("demo", [*overrides, *more]), 16)
        for more in (["memory.shard=all"], ["memory.shard=node"], ["memory={shard: all, gather: rollout}"], [])
    )
    assert every.resident["optimizer"] == copied.resident["optimizer"] // 16
    assert node.resident["optimizer"] == copied.resident["optimizer"] // 8
    others = once.network.weight_bytes - once.network.block_bytes
    assert once.peaks["rollout"] - every.peaks["rollout"] == others > 0
    assert once.peaks["sweep"] == every.peaks["sweep"] and copied.working["other blocks"] == 0


@pytest.mark.parametrize("spare", [-1, 1])
def test_a_rollout_gathers_once_where_the_least_memory_of_a_process_holds_the_whole_network(spare, monkeypatch):
    config = load("demo", ["tuning.mode=full", "memory.shard=all"])
    needed = estimate(load("demo", ["tuning.mode=full", "memory={shard: all, gather: rollout}"]), 8).peaks["rollout"]
    monkeypatch.setattr(run, "available_bytes", lambda device: (needed + spare) / (1 - MARGIN))
    device = SimpleNamespace(device=torch.device("cpu"))
    ranks = SimpleNamespace(sharded=object(), size=8, accelerator=device, mean=dict, gathers_once=False)
    trainer = SimpleNamespace(config=config, model=SimpleNamespace(ranks=ranks))
    run.decide_gathering(trainer)
    assert ranks.gathers_once == (spare > 0)
    ranks.mean = lambda values: {name: value - 1 / 8 for name, value in values.items()}  # another has less
    run.decide_gathering(trainer)
    assert not ranks.gathers_once


def test_a_run_says_how_shards_are_gathered_before_its_first_step():
    about = {"device": "cpu", "processes": 8, "parameters": 1, "output": "run", "done": 0}
    config = load("demo", ["memory.shard=node"])
    for once, says in ((True, "once a rollout, and kept until its end"), (False, "for every pass")):
        line = facts(config, **about, gathers_once=once).of_start["shards"]
        assert line == f"memory.shard=node; each block is gathered {says}"
    assert "shards" not in facts(config, **about, gathers_once=None).of_start


def test_the_command_prints_and_writes_what_1_8_and_64_cards_receive(tmp_path):
    command = ["estimate", "demo", "memory.shard=node", "--json", str(tmp_path / "found.json"), "--bandwidth", "2", "1"]
    shown = CliRunner().invoke(app, command)
    rows = json.loads((tmp_path / "found.json").read_text())["communication"]
    assert [(row["cards"], row["gathers"]) for row in rows] == [
        (cards, gathers) for cards in (1, 8, 64) for gathers in ("every pass", "once a rollout")
    ]
    every, once = rows[2:4]
    assert every["seconds"] == pytest.approx((every["gathered"] + every["reduced"]) / 2e9)
    assert every["gathered"] > once["gathered"] > 0 and every["reduced"] == once["reduced"]
    assert "at 2 GB/s in a machine of 8, 1 between (assumed)" in " ".join(shown.output.split())
    assert f"64 cards: {rows[-1]['gathered'] / 1e9:.3f} GB of weights (once a rollout), " in shown.output


@pytest.mark.parametrize("rates", [("0", "50"), ("450", "nan"), ("450", "inf")])
def test_a_bandwidth_is_a_positive_number(rates):
    shown = CliRunner().invoke(app, ["estimate", "demo", "--bandwidth", *rates])
    assert isinstance(shown.exception, ValueError) and "must be above 0, in GB/s" in str(shown.exception)
