"""N processes with batch b take the gradient of one process with batch N b, copied and sharded (FSDP2), however graphs
come about.
"""

import json
import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from displaced import Displaced
from torch.utils._pytree import keystr, tree_flatten_with_path

sys.path.insert(0, str(Path(__file__).parent))
import ranks_worker  # noqa: E402

from flowbp.config import load  # noqa: E402
from flowbp.estimate.communication import traffic  # noqa: E402
from flowbp.runtime.processes import free_port  # noqa: E402


def launch(world, folder):
    """The results of every rank."""
    context = forked.context()
    port = free_port()
    processes = [
        context.Process(target=ranks_worker.run, args=(rank, world, port, str(folder))) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    for process in processes:
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * world
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    prompts = ["a red circle", "two blue stars", "a cat", "green", "a very long prompt"]  # five, which no batch divides
    (folder / "prompts.txt").write_text("\n".join(prompts))
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    return {case: ranks_worker.train_step(case, folder, 1) for case in ranks_worker.CASES}


@pytest.fixture(scope="module")
def runs_alone(folder):
    return {case: ranks_worker.whole_run(case, folder, 1) for case in ranks_worker.WHOLE}


@pytest.fixture(scope="module")
def scores_alone(folder):
    """(case, offset) -> the scores of one process, computed once."""

    @cache
    def scores(case, offset):
        with Displaced(offset):
            return ranks_worker.scores(case, folder, 1)

    return scores


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, folder):
    """What each rank of 2, then of 4 found."""
    return launch(request.param, folder)


def test_processes_take_the_step_of_one(ranks, alone):
    for case in ranks_worker.CASES if len(ranks) == 2 else ranks_worker.OF_FOUR:
        (row, gradient), (expected_row, expected) = ranks[0][case], alone[case]
        assert gradient.norm() > 0, case
        tolerance = 1e-9 if "lora" not in case else 1e-5  # its weights are float32
        assert (gradient - expected).norm() <= tolerance * expected.norm(), (
            case,
            (gradient - expected).norm() / expected.norm(),
        )
        tolerance = max(tolerance, 1e-6 if "Z-Image" in case else 0)  # its latents are float32
        for key in ("loss", "reward", "grad_norm", "sample_grad_norm"):
            assert row[key] == pytest.approx(expected_row[key], rel=tolerance), (case, key)
        for other_row, other in (rank[case] for rank in ranks):
            assert torch.equal(other, gradient) and other_row["loss"] == row["loss"]
            assert len(other_row["nodes"]) == len(expected_row["nodes"])


@pytest.mark.parametrize("case", ranks_worker.RESUMED)
def test_processes_resume_exactly_and_average_the_weights_of_one(ranks, case, folder):
    if f"resume: {case}" not in ranks[0]:
        pytest.skip("two processes take it")
    same, expected = ranks_worker.resumes(case, folder, 1)
    assert same
    for same, average in (rank[f"resume: {case}"] for rank in ranks):
        assert same
        if case not in ranks_worker.BFLOAT16:
            # AdamW turns rounding of small gradients into steps
            torch.testing.assert_close(average, expected, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("shard", ["false", "true"])
def test_replays_draw_the_masks_of_the_rollout_on_every_process(ranks, shard):
    if f"dropout, shard={shard}" not in ranks[0]:
        pytest.skip("two processes take it")
    replayed, kept = zip(*(rank[f"dropout, shard={shard}"] for rank in ranks), strict=True)
    for gradient in (*replayed, *kept):
        assert (gradient - replayed[0]).norm() <= 1e-5 * replayed[0].norm() > 0


def test_a_loop_of_its_own_around_ddp_takes_the_step_of_one(ranks):
    expected = ranks_worker.own_loop(0, 1)
    for rank in ranks:
        assert (rank["own loop"] - expected).norm() <= 1e-12 * expected.norm()


def test_every_process_keeps_as_many_graphs_as_fit_on_all(ranks):
    capacities, fit = zip(*(rank["auto capacity"] for rank in ranks), strict=True)
    assert set(capacities) == {min(fit)} and min(fit) < max(fit)


@pytest.mark.parametrize("case", ranks_worker.GATHERED)
def test_the_main_process_alone_gets_what_is_gathered(ranks, case, folder):
    if f"gathered: {case}" not in ranks[0]:
        pytest.skip("two processes take it")
    weights = ranks_worker.gathers(case, folder, 1)["weights"]
    main, *others = (rank[f"gathered: {case}"] for rank in ranks)
    assert main["step"] == 3 and main["weights"].keys() == weights.keys()
    assert all(torch.equal(main["weights"][name], value) for name, value in weights.items())
    assert all(other == {"weights": dict.fromkeys(weights), "step": 3} for other in others)


def test_gradients_are_split_between_backward_passes_where_the_config_says(ranks):
    if "splits gradients: sharded bridge" not in ranks[0]:
        pytest.skip("two processes take it")
    for rank in ranks:
        assert not rank["splits gradients: sharded bridge"] and rank["splits gradients: sharded gradients"]


def calls(counts, kind, size=0):
    """How many collective calls of a kind there were, in all or of as many bytes."""
    return sum(count for (name, nbytes), count in counts.items() if kind in name and size in (0, nbytes))


def test_a_rollout_gathers_each_block_once_or_at_every_call(ranks):
    """Of 6 calls a micro-batch, and 3 replays, which gather forward and backward; two micro-batches."""
    for rank in ranks:
        every, blocks = rank["sent: sharded bridge, block"]
        once, _ = rank["sent: sharded bridge, rollout"]
        assert len(blocks) == 2
        for size in set(blocks):
            assert calls(every, "allgather", size) == 2 * (6 + 2 * 3) * blocks.count(size)
            assert calls(once, "allgather", size) == 2 * (1 + 2 * 3) * blocks.count(size)
        estimated = SimpleNamespace(
            config=load("demo", ["memory.shard=true", "data.accumulate=2", "memory.recompute=always"]),
            calls={"rollout": 6, "replays": 3, "backward": 2 * 3},
            network=SimpleNamespace(weight_bytes=sum(blocks), trained_bytes=0, trained=0),
        )
        for counts, rollout in ((every, False), (once, True)):
            received = sum(size * calls(counts, "allgather", size) for size in set(blocks)) / 2  # of two, the other's
            assert traffic(estimated, 2, rollout)["gathered"] == received


def test_machines_average_their_shards_once_a_step(ranks):
    """Gradients are split in each of 2 x 3 backward passes."""
    machines = len(ranks) // 2
    for rank in ranks:
        counts, blocks = rank["sent: sharded gradients, rollout"]
        assert len(blocks) == 2
        for size in set(blocks):
            assert calls(counts, "reduce_scatter", size) == 2 * 3 * blocks.count(size)
            assert calls(counts, "allreduce", size / 2) == (machines > 1) * blocks.count(size)


def test_every_process_starts_from_the_weights_of_the_main_one_which_alone_does_what_one_must_do(ranks):
    assert all(rank["starting weights"] == [[1.0, 1.0], [1.0, 1.0]] for rank in ranks)
    assert [rank["main work"] for rank in ranks] == [[0], *[[]] * (len(ranks) - 1)]


def test_sharded_gradients_of_a_bfloat16_network_add_up_in_float32(ranks):
    assert (
        all(rank["sum of backward passes"] == 264.0 for rank in ranks)
        and ranks_worker.sum_of_backward_passes(1) == 256.0
    )


@pytest.mark.parametrize("offset", [0, 8])  # of float64
@pytest.mark.parametrize("case", ["bridge, guided", "sharded bridge"])
def test_processes_share_an_evaluation_and_have_the_scores_of_one_to_the_byte(ranks, case, offset, scores_alone):
    if f"scores: {case}" not in ranks[0]:
        pytest.skip("two processes take it")
    values, images, chunks = scores_alone(case, offset)
    assert chunks == 3 and values.keys() > {"reward", "saturation"} and len(images) == 3
    for rank in ranks:
        found, pictures, share = rank[f"scores: {case}"]
        assert share == -(-chunks // len(ranks))
        assert found.keys() == values.keys() and all(torch.equal(found[name], values[name]) for name in values)
        assert torch.equal(pictures, images)


def readings(output):
    """The numbers in a run's JSON files, by file, those of time and memory left out; and the names of all its files."""
    said = {name: json.loads((output / name).read_text()) for name in ("evaluation.json", "validation.json")}
    said["metrics.jsonl"] = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    numbers = {}
    for name, tree in said.items():
        leaves = [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(tree)[0]]
        numbers[name] = [leaf for key, leaf in leaves if isinstance(leaf, float) and not re.search("seconds|_mb", key)]
    return numbers, {str(path.relative_to(output)) for path in output.rglob("*") if "tensorboard" not in path.parts}


@pytest.mark.parametrize("case", ranks_worker.WHOLE)
def test_processes_train_watch_evaluate_and_report_as_one_and_the_main_one_alone_writes(ranks, case, runs_alone):
    if f"whole run: {case}" not in ranks[0]:
        pytest.skip("two processes take it")
    output, written = zip(*(rank[f"whole run: {case}"] for rank in ranks), strict=True)
    assert written[0] and not any(written[1:])
    numbers, files = readings(runs_alone[case])
    found, found_files = readings(Path(output[0]))
    assert found_files == files > {"report.html", "validation.json", "evaluation.json"}
    for name, values in numbers.items():
        assert values and found[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name


def test_the_filter_keeps_another_number_on_each_rank(alone):
    assert alone["filtered"][0]["kept"] == 0.25
