"""A sweep trains every setting from every seed, goes on where it ended, and judges settings over runs."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from flowbp.cli import commands as cli
from flowbp.config import ConfigError, dump
from flowbp.training.sweep import alternatives, planned, summary, surroundings, sweep

TINY = ["steps=1", "data.batch_size=2", "evaluation.samples=6", "evaluation.batch_size=6", "evaluation.grid=2"]


def test_settings_are_all_combinations_and_what_brackets_hold_is_one_value(tmp_path):
    typed = ["rollout.num_steps=6,8", "method.pairs={name: uniform, min_rev: 2},dirichlet", "seeds=3..5"]
    runs = planned("demo", [*typed, "optimizer.betas=[0.9, 0.99]"], tmp_path)
    assert [run.seed for run in runs] == [3, 4, 5] * 4
    assert runs[0].setting == "num_steps=6 pairs={name: uniform, min_rev: 2}"
    assert runs[-1].setting == "num_steps=8 pairs=dirichlet"
    assert runs[0].config.method.pairs.min_rev == 2 and runs[-1].config.rollout.num_steps == 8
    folders = {run.folder for run in runs}
    assert {run.config.output for run in runs} == folders and len(folders) == 12
    assert all(run.config.seed == run.seed and run.config.optimizer.betas == (0.9, 0.99) for run in runs)


def test_without_a_choice_one_setting_is_trained_from_the_configs_seed(tmp_path):
    (run,) = planned("demo", [], tmp_path)
    assert (run.setting, run.seed) == ("as given", 42)


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["seeds=a"], "seeds=a names no seed"),
        (["seeds=1,1"], "names a seed twice"),
        (["seeds=5..4"], "seeds=5..4 names no seed"),
        (["seed=1,2"], "use seeds=0..7"),
        (["seeds=0..3", "seeds=7"], "seeds is given twice"),
        (["steps=1,1"], "two settings would share the folder"),
        (["data.prompts=a b.txt,a_b.txt"], "two settings would share the folder"),
        (["output=x"], "use seeds=0..7 and --out"),
        (["evaluation=null"], "evaluation is null"),
        (["steps=1,-1"], "steps"),
        (["method.alpha"], "key.path=value"),
        (["optimizer.lrate=1,2"], "lrate"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_a_run_starts(overrides, says, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(says)):
        planned("demo", overrides, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def evaluated(run, change):
    run.folder.mkdir(parents=True)
    row = {"metric": "reward", "category": "all", "before": 0.5, "after": 0.5 + change, "change": change}
    row |= {"low": change - 0.01, "high": change + 0.02}
    (run.folder / "evaluation.json").write_text(json.dumps([row, row | {"category": "colours", "change": 9.0}]))


def test_means_and_intervals_are_over_runs_and_differences_over_shared_seeds(tmp_path):
    runs = planned("demo", ["steps=1,2", "seeds=0..3"], tmp_path)
    changes = {("steps=1", 0): 0.1, ("steps=1", 1): 0.3, ("steps=1", 2): 0.2}
    changes |= {("steps=2", 1): 0.35, ("steps=2", 2): 0.28, ("steps=2", 3): 0.6}
    runs = [run for run in runs if (run.setting, run.seed) in changes]
    for run in runs:
        evaluated(run, changes[run.setting, run.seed])
    first, second = summary(runs, "steps=1")
    assert (first["setting"], first["seeds"], second["seeds"]) == ("steps=1", [0, 1, 2], [1, 2, 3])
    low, high = stats.t.interval(0.95, 2, loc=0.2, scale=stats.sem([0.1, 0.3, 0.2]))
    np.testing.assert_allclose(first["change"], (0.2, low, high))
    np.testing.assert_allclose((first["before"], first["after"], *first["images"]), (0.5, 0.7, 0.19, 0.22))
    assert first["difference"] is None
    low, high = stats.t.interval(0.95, 1, loc=0.065, scale=stats.sem([0.05, 0.08]))
    np.testing.assert_allclose(second["difference"], (0.065, low, high))


def test_one_run_has_no_interval(tmp_path):
    (run,) = planned("demo", [], tmp_path)
    evaluated(run, 0.1)
    mean, *ends = summary([run], "as given")[0]["change"]
    assert mean == 0.1 and np.isnan(ends).all()


def test_processes_take_turns_on_several_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert surroundings(1)["OMP_NUM_THREADS"] == "1" and "CUDA_VISIBLE_DEVICES" not in surroundings(1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [surroundings(place)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["0", "1", "0"]
    for listed, taken in (("5", ["5", "5"]), ("3,7", ["3", "7"]), ("", ["", ""])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        assert [surroundings(place)["CUDA_VISIBLE_DEVICES"] for place in range(2)] == taken


@pytest.mark.parametrize(
    "text, values", [("a,b", ["a", "b"]), ("'a, b.txt',c", ["'a, b.txt'", "c"]), ("a),b", ["a)", "b"])]
)
def test_commas_part_values_but_not_within_quotes(text, values):
    assert alternatives(text) == values


def test_a_folder_may_have_any_name(tmp_path):
    for name in ("my #1", "a: b", "[x]"):
        (run,) = planned("demo", [], tmp_path / name)
        assert run.config.output == run.folder == tmp_path / name / "as_given" / "seed-42"


def test_a_finished_run_is_one_that_took_all_its_steps(tmp_path):
    (run,) = planned("demo", ["steps=3"], tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(dump(run.config))
    (run.folder / "metrics.jsonl").write_text("")
    assert not run.finished
    (run.folder / "report.html").write_text("")
    assert run.finished and not planned("demo", ["steps=4"], tmp_path)[0].finished


def test_settings_may_have_rewards_of_their_own_and_intervals_may_be_missing(tmp_path):
    rewards = "reward={a: {name: clip, model: shapes}},{b: {name: clip, model: shapes}}"
    runs = planned("demo", [rewards, "seeds=0,1"], tmp_path)
    for run in runs:
        evaluated(run, 0.1)
        rows = json.loads((run.folder / "evaluation.json").read_text())
        own = rows[0] | {"metric": next(iter(run.config.reward)), "low": None, "high": None}
        (run.folder / "evaluation.json").write_text(json.dumps([*rows, own]))
    rows = summary(runs, runs[0].setting)
    assert [row["metric"] for row in rows] == ["reward", "a", "reward", "b"]
    assert [row["difference"] is None for row in rows] == [True, True, False, True]
    assert np.isnan(rows[1]["images"]).all()


@pytest.mark.parametrize("program, says", [("/bin/false", "ended with code 1"), ("/nowhere/python", "No such file")])
def test_a_run_that_fails_stops_no_other(program, says, tmp_path, monkeypatch):
    runs = planned("demo", ["seeds=0..2"], tmp_path)
    monkeypatch.setattr("flowbp.training.sweep.sys.executable", program)
    results = sweep(runs, tmp_path, processes=1)
    assert results["failed"].keys() == {str(run.folder) for run in runs} and not results["rows"]
    assert all(says in why for why in results["failed"].values())


def test_a_sweep_keeps_what_is_finished_and_goes_on_with_the_rest(tmp_path):
    out = tmp_path / "out"
    command = ["sweep", "demo", *TINY, "rollout.num_steps=5,6", "--out", str(out)]
    first = CliRunner().invoke(cli.app, [*command, "seeds=0", "--processes", "2"])
    assert first.exit_code == 0, first.output
    kept = out / "num_steps=5" / "seed-0" / "report.html"
    was = kept.stat().st_mtime_ns
    (out / "num_steps=6" / "seed-1").mkdir(parents=True)
    (out / "num_steps=6" / "seed-1" / "notes.txt").write_text("mine")
    refused = CliRunner().invoke(cli.app, [*command, "seeds=0,1"])
    assert isinstance(refused.exception, FileExistsError) and "num_steps=6/seed-1" in str(refused.exception)
    (out / "num_steps=6" / "seed-1" / "notes.txt").unlink()
    second = CliRunner().invoke(cli.app, [*command, "seeds=0,1"])
    assert second.exit_code == 0, second.output
    assert kept.stat().st_mtime_ns == was
    results = json.loads((out / "sweep.json").read_text())
    assert [(run["setting"], run["seed"]) for run in results["runs"]] == [
        ("num_steps=5", 0),
        ("num_steps=5", 1),
        ("num_steps=6", 0),
        ("num_steps=6", 1),
    ]
    page = (out / "sweep.html").read_text()
    assert "num_steps=6" in page and "checker" in page and "data:image/png" in page
    changed = CliRunner().invoke(cli.app, [*command, "seeds=0", "ema=0.5"])
    assert isinstance(changed.exception, ValueError) and "ema from 0.995 to 0.5" in str(changed.exception)


def test_sigterm_ends_the_runs_which_write_their_checkpoints(tmp_path):
    out, long = tmp_path / "out", [*TINY[1:], "steps=100000"]
    command = [sys.executable, "-m", "flowbp", "sweep", "demo", *long, "seeds=0..1", "--processes", "2"]
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.PIPE, text=True)
    try:
        while sum(log.read_text().count("\n") > 1 for log in out.glob("*/*/metrics.jsonl")) < 2:
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM and "0 of 2 runs are finished; the same command goes on" in said
    assert len(list(out.glob("*/*/checkpoints/step-*"))) == 2
    running = [pid for pid in os.listdir("/proc") if pid.isdigit() and str(out) in command_line(pid)]
    assert not running


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except OSError:
        return ""
