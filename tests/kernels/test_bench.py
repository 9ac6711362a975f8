"""The benchmark harness: what a row says, percentages from the same rounds, and the docs' table as a function of the
results.
"""

import importlib.util
import json
import math
import time
from pathlib import Path

import pytest
import torch

from flowbp_kernels import bench
from flowbp_kernels.bench import measure, network
from flowbp_kernels.bench.case import LATENTS, Case
from flowbp_kernels.bench.registry import OPS, cases, footprint, problem

ROOT = Path(__file__).parents[2]
QUICK = ("reference", "eager", "einsum", "baddbmm")


def script(name):
    """benchmarks/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(op, dtype="float32", steps=3):
    return Case(op, "tiny", 2, steps, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_every_provider_computes_the_same_op(op, dtype):
    torch.manual_seed(0)
    task = problem(tiny(op, dtype), "cpu")
    tolerance = 8 * torch.finfo(getattr(torch, dtype)).eps
    expected = task.to_compile(*task.inputs)
    for function in (task.ours, task.ours_into, *task.baselines.values()):
        torch.testing.assert_close(
            function(*task.inputs), expected, rtol=tolerance, atol=4 * tolerance, check_dtype=False
        )


@pytest.mark.parametrize("op", OPS)
def test_a_row_says_what_was_measured(op):
    rows, left_out = bench.run(tiny(op), "cpu", providers=QUICK, seconds=0)
    assert {row["mode"] for row in rows} == ({"forward"} if op == "leap_residuals" else set(bench.MODES))
    assert {"reference", "eager", "copy"} <= {row["provider"] for row in rows}
    assert all(set(missing) >= {"op", "mode", "provider", "why"} for missing in left_out)
    assert json.loads(json.dumps(rows)) == rows
    for row in rows:
        assert (row["op"], row["latent"], row["shape"], row["threads"]) == (
            op,
            "tiny",
            [2, *LATENTS["tiny"]],
            torch.get_num_threads(),
        )
        ms = row["milliseconds"]
        assert 0 < ms["best"] <= ms["p20"] <= ms["median"] <= ms["p80"] and ms["rounds"] >= measure.MIN_ROUNDS
        assert math.isclose(row["gb_per_second"], row["traffic_bytes"] / ms["median"] / 1e6)
        copy = next(r for r in rows if r["provider"] == "copy" and r["mode"] == row["mode"])
        assert copy["percent_of_copy"] == 100
        assert math.isclose(row["percent_of_copy"], 100 * row["gb_per_second"] / copy["gb_per_second"])
        assert row["launches"] is None and row["compile_seconds"] is None and row["peak_bytes"] >= 0


def test_traffic_is_each_tensor_once():
    element = 4 * torch.Size(tiny("").shape).numel()
    assert problem(tiny("quadrature_update"), "cpu").traffic == {
        "forward": 5 * element,
        "backward": 4 * element,
        "full": 9 * element,
    }
    assert problem(tiny("cfg_euler_step"), "cpu").traffic["forward"] == 5 * element
    assert problem(tiny("cfg_multistep_step"), "cpu").traffic["forward"] == 7 * element
    assert problem(tiny("leap_residuals"), "cpu").traffic == {"forward": 6 * element}


def test_rounds_take_every_provider_in_turn():
    order = []

    def provider(name, seconds):
        def call():
            order.append(name)
            end = time.thread_time() + seconds  # at work: on one thread, sleep is not counted
            while time.thread_time() < end:
                pass

        return call, None

    timings = measure.interleave(
        {name: provider(name, seconds) for name, seconds in (("a", 3e-3), ("b", 4e-3))}, "cpu", 0
    )
    rounds = order[6:]  # after one warm call and two to choose the repeats of each
    assert rounds == ["a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]
    assert timings["a"].best >= 3 and timings["b"].best >= 4 and timings["a"].rounds == 5


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.ones(1000)

    def two_at_once():
        a = x + x
        b = a * a
        del a
        return b + b

    assert 8000 <= measure.peak_memory(two_at_once, "cpu") < 8100


def test_a_backend_that_was_asked_for_and_cannot_run_raises():
    if torch.cuda.is_available():
        pytest.skip("the CUDA backend may run here")
    with pytest.raises((RuntimeError, ValueError), match="FLOWBP_KERNELS"):
        bench.run(tiny("quadrature_update"), "cpu", modes=("forward",), providers=("cuda",), seconds=0)


def test_an_op_is_measured_where_it_works_and_without_a_cache_at_one_number_of_steps():
    ops, latents = ["cfg_euler_step", "quadrature_update", "gelu"], ["sd3.5-512", "flux-block"]
    chosen = list(cases(ops, latents, [1, 8], [25, 50], ["float32"]))
    assert [(case.op, case.latent, case.batch, case.steps) for case in chosen] == [
        ("cfg_euler_step", "sd3.5-512", 1, 1),
        ("cfg_euler_step", "sd3.5-512", 8, 1),
        ("quadrature_update", "sd3.5-512", 1, 25),
        ("quadrature_update", "sd3.5-512", 1, 50),
        ("quadrature_update", "sd3.5-512", 8, 25),
        ("quadrature_update", "sd3.5-512", 8, 50),
        ("gelu", "flux-block", 1, 1),
        ("gelu", "flux-block", 8, 1),
    ]
    assert footprint(chosen[5], ["forward"]) > 4 * 50 * 8 * 65536 * 4


@pytest.mark.parametrize("op", sorted(network.OPS))
def test_a_case_of_a_network_fits_its_footprint(op):
    case = Case(op, "flux-block", 8, 1, "bfloat16")
    task = problem(case, "meta")
    assert sum(t.nbytes for t in task.inputs) + max(task.traffic.values()) < footprint(case, ["full"])


def test_the_command_writes_rows_and_says_what_it_left_out(tmp_path, capsys):
    arguments = [
        "--op",
        "quadrature_update",
        "--latent",
        "tiny",
        "--batch",
        "1",
        "--steps",
        "2",
        "3000",
        "--dtype",
        "float32",
    ]
    arguments += [
        "--mode",
        "forward",
        "--provider",
        "reference",
        "eager",
        "--seconds",
        "0",
        "--device",
        "cpu",
        "--memory-gb",
        "0.01",
    ]
    bench.main([*arguments, "--json", str(tmp_path / "rows.json")])
    report = json.loads((tmp_path / "rows.json").read_text())
    assert [row["provider"] for row in report["rows"]] == ["reference", "eager", "copy"]
    (missing,) = report["left_out"]
    assert missing["steps"] == 3000 and "memory-gb" in missing["why"]
    assert set(report["machine"]) == {"device", "threads", "versions", "backends", "commit", "date", "load_average"}
    assert str(Path.home()) not in json.dumps(report["machine"]) and str(ROOT) not in json.dumps(report["machine"])
    assert "left out" in capsys.readouterr().err


def row(provider, median, **changes):
    case = {
        "op": "quadrature_update",
        "latent": "sd3.5-512",
        "batch": 8,
        "steps": 25,
        "dtype": "float32",
        "mode": "forward",
    }
    ms = {"best": 0.9 * median, "p20": 0.95 * median, "median": median, "p80": 1.2 * median, "rounds": 9}
    return (
        case
        | {"provider": provider, "milliseconds": ms, "gb_per_second": 30 / median, "percent_of_copy": 80 / median}
        | changes
    )


def test_the_table_follows_from_the_rows_alone(tmp_path):
    table = script("kernel_tables").table
    machine = {
        "device": "a processor",
        "threads": 1,
        "versions": {"torch": "2.13.0", "cuda": None},
        "commit": "abc",
        "date": "2026-01-01",
    }
    rows = [
        row("cpu", 1.0),
        row("eager", 5.0),
        row("compile", 1.5),
        row("copy", 0.8),
        row("cpu", 9.0, batch=1),
        row("cpu", 7.0, steps=50),
    ]
    texts = []
    for name, shuffled in (("a.json", rows), ("b.json", rows[::-1])):
        (tmp_path / name).write_text(json.dumps({"machine": machine, "rows": shuffled, "left_out": []}))
        texts.append(table([tmp_path / name]))
    assert texts[0] == texts[1]
    expected = "| `quadrature_update` | sd3.5-512, 8, 25, float32 | cpu | 1 [0.95, 1.2] | 5.0 x | 1.5 x | 30 | 80 % |"
    assert texts[0].splitlines()[-1] == expected
    assert "a processor, 1 thread(s); torch 2.13.0; commit abc, 2026-01-01" in texts[0]


def test_a_file_without_forward_rows_shows_both_passes_and_one_of_whole_steps_its_sentences(tmp_path):
    table, rows = script("kernel_tables").table, [row("cpu", 1.0) | {"mode": mode} for mode in ("backward", "full")]
    machine = {
        "device": "a GPU",
        "threads": None,
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
        "date": "2026-01-01",
    }
    (tmp_path / "both.json").write_text(json.dumps({"machine": machine, "rows": rows, "left_out": []}))
    assert (
        table([tmp_path / "both.json"])
        .splitlines()[-1]
        .startswith("| `quadrature_update`, forward and backward | sd3.5-512, 8, 25")
    )
    case = {
        "backbone": "flux.1-dev",
        "tuning": "lora",
        "checkpointing": True,
        "method": "flowbp-sparse",
        "mode": "sweep",
        "active": 4,
    }
    rows = [
        case | {"step_seconds": 3.21, "peak_mb": {"rollout": 900.0, "sweep": 25100.0}},
        case | {"out_of_memory": "reward"},
    ]
    (tmp_path / "steps.json").write_text(
        json.dumps({"machine": machine, "options": {"steps": 25, "batch": 1}, "rows": rows})
    )
    start = "- `flux.1-dev` (lora, checkpointed; 25 steps, batch 1), flowbp-sparse (K = 4), sweep: "
    ends = ["3.21 s a step, 25.1 GB at most.", "out of memory in reward."]
    assert table([tmp_path / "steps.json"]).splitlines()[-2:] == [start + end for end in ends]
