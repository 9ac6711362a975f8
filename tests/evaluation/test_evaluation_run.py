"""`flowbp eval`: the same numbers however the work was split or interrupted, and never a mixture of two evaluations."""

import json
import re
import shutil
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import yaml
from displaced import OFFSETS, Displaced
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flowbp.backbones import load_backbone
from flowbp.cli.commands import app
from flowbp.config import load
from flowbp.evaluation import models as evaluation_run
from flowbp.evaluation import scores as evaluation
from flowbp.evaluation.models import name_models, run_evaluation
from flowbp.runtime import tuned_model
from flowbp.runtime.checkpoint import latest_checkpoint
from flowbp.runtime.run_folder import locked
from flowbp.runtime.weights import LORA, load_weights
from flowbp.training.run import train


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The folder of an evaluation in one go."""
    folder = tmp_path_factory.mktemp("whole") / "eval"
    run_evaluation(load(run / "config.yaml"), {"base": None, "tuned": run}, folder)
    return folder


def test_a_killed_evaluation_resumes_to_the_same_bytes_wherever_tensors_lie(run, whole, tmp_path, monkeypatch):
    config, models, folder = load(run / "config.yaml"), {"base": None, "tuned": run}, tmp_path / "eval"
    written, write = [], evaluation_run.write_tensors

    def write_until_killed(path, part, about):
        if len(written) == 2:
            left = path.with_name(f".{path.name}.a1b2c3d4.partial")
            left.mkdir()
            (left / path.name).write_bytes(b"half a chu")
            raise KeyboardInterrupt
        write(path, part, about)
        written.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation_run, "write_tensors", write_until_killed)
        with pytest.raises(KeyboardInterrupt):
            run_evaluation(config, models, folder)
    before = {path: path.stat().st_mtime_ns for path in written}
    loads, scorers = [], evaluation_run.scoring.scorers
    monkeypatch.setattr(evaluation_run.scoring, "scorers", lambda *options: loads.append(1) or scorers(*options))
    with Displaced(OFFSETS[0]):  # test_reproducible.py takes them all
        run_evaluation(config, models, folder)
    assert len(loads) == 1, "both models are scored by the same rewards, monitors and checker"
    assert {path: path.stat().st_mtime_ns for path in written} == before, "chunks that were whole are scored once"
    expected, got = contents(whole), contents(folder)
    assert expected.keys() == got.keys() and not [name for name in expected if expected[name] != got[name]]


def test_a_damaged_chunk_is_made_again(run, whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "eval")
    one, two, cut = (tmp_path / "eval" / "tuned" / f"0000{i}.safetensors" for i in range(3))
    one.write_bytes(two.read_bytes())  # whole, and of other samples
    cut.write_bytes(cut.read_bytes()[:-1])
    run_evaluation(load(run / "config.yaml"), {"base": None, "tuned": run}, tmp_path / "eval")
    assert contents(tmp_path / "eval") == contents(whole)
    told = [line for line in caplog.messages if line.endswith("It is made again")]
    assert str(one) in told[0] and str(cut) in told[1] and len(told) == 2


def test_weights_that_are_replaced_while_they_are_read_are_not_scored_as_others(run, tmp_path, monkeypatch):
    weights = tmp_path / "best"
    shutil.copytree(run, weights)
    load_backbone = tuned_model.frozen_backbone

    def replaced_meanwhile(*arguments):
        lora_b = load_file(weights / LORA)
        save_file({name: value + 1 for name, value in lora_b.items()}, weights / LORA)
        return load_backbone(*arguments)

    monkeypatch.setattr(tuned_model, "frozen_backbone", replaced_meanwhile)
    config = load(run / "config.yaml", ["evaluation.samples=4"])
    with pytest.raises(OSError, match="best was replaced while it was read"):
        run_evaluation(config, {"tuned": weights}, tmp_path / "eval")
    assert not list((tmp_path / "eval" / "tuned").glob("*.safetensors"))


def test_two_evaluations_do_not_write_into_one_folder(run, tmp_path):
    with locked(tmp_path / "eval", "evaluates", "--out"):
        with pytest.raises(FileExistsError, match="another process evaluates in .*eval right now: .* another --out"):
            run_evaluation(load(run / "config.yaml"), {"base": None}, tmp_path / "eval")


def test_two_processes_write_the_same_bytes_as_one(run, whole, tmp_path):
    command = ["eval", run / "config.yaml", "--weights", f"tuned={run}", "--out", tmp_path / "eval"]
    for process in forked.ranks(2, command, tmp_path, ACCELERATE_USE_CPU="true"):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    expected, got = contents(whole), contents(tmp_path / "eval")
    assert expected.keys() == got.keys() and not [name for name in expected if expected[name] != got[name]]


def test_every_form_of_the_weights_gives_the_same_scores(run, tmp_path):
    step = latest_checkpoint(run)
    lora = tmp_path / "renamed.safetensors"
    lora.write_bytes((run / LORA).read_bytes())
    forms = {"run": run, "file": run / LORA, "renamed": lora, "folder": tmp_path, "checkpoint": step}
    config = load(run / "config.yaml")
    images = {}
    for name, source in forms.items():
        backbone = load_backbone(**config.backbone.model_dump())
        load_weights(backbone, source)
        images[name] = evaluation.generate(backbone, ["a red circle"], [7], config.rollout, config.guidance)
    base = evaluation.generate(
        load_backbone(**config.backbone.model_dump()), ["a red circle"], [7], config.rollout, config.guidance
    )
    assert not torch.equal(images["run"], base)
    assert not [name for name in images if not torch.equal(images[name], images["run"])]


def test_results_repeat_the_scores_of_the_samples(run, whole):
    results, samples = (json.loads((whole / name).read_text()) for name in ("results.json", "samples.json"))
    lines = (whole / "samples.csv").read_text().splitlines()
    assert len(samples) == 9 == len(lines) - 1 and lines[0].startswith(
        "prompt,category,seed,base reward,base monitor,base checker"
    )
    by_hand = {model: np.mean([row["scores"][model]["reward"] for row in samples]) for model in ("base", "tuned")}
    (mean,) = (r for r in results["means"] if (r["model"], r["metric"], r["category"]) == ("tuned", "reward", "all"))
    (change,) = (r for r in results["changes"] if (r["metric"], r["category"]) == ("reward", "all"))
    assert mean["mean"] == pytest.approx(by_hand["tuned"]) and change["change"] == pytest.approx(
        by_hand["tuned"] - by_hand["base"]
    )
    trained = json.loads((run / "evaluation.json").read_text())
    for ours, theirs in zip(trained, results["changes"], strict=True):
        for keys, rounding in (
            (("count", "before", "after", "change"), 1e-5),
            (("low", "high"), 1e-3),
        ):  # quantiles amplify it
            assert [ours[key] for key in keys] == pytest.approx([theirs[key] for key in keys], abs=rounding), (
                "the run's own table agrees"
            )
    assert all(row["low"] <= row["change"] <= row["high"] for row in results["changes"] if row["low"] is not None)
    page = (whole / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "the page must stand alone"


def test_scores_of_other_settings_or_weights_are_never_mixed(run, tmp_path):
    config, folder = load(run / "config.yaml", ["evaluation.samples=4"]), tmp_path / "eval"
    run_evaluation(config, {"base": None}, folder)
    before = contents(folder / "base")
    run_evaluation(config, {"base": None, "tuned": run}, folder)
    assert contents(folder / "base") == before
    with pytest.raises(
        ValueError, match=r"evaluation: settings.rollout.num_steps was 4 and is 5. Choose another --out, or"
    ):
        run_evaluation(
            load(run / "config.yaml", ["evaluation.samples=4", "rollout.num_steps=5"]), {"base": None}, folder
        )
    with pytest.raises(ValueError, match="another evaluation: sha256 was None and is [0-9a-f]{64}"):
        run_evaluation(config, {"base": run}, folder)
    for override in ("guidance.scale=2", "backbone.dtype=bfloat16", "reward.model=shapes-monitor", "evaluation.seed=1"):
        with pytest.raises(ValueError, match=f"another evaluation: .*settings.{override.partition('=')[0]} was"):
            run_evaluation(load(run / "config.yaml", ["evaluation.samples=4", override]), {"base": None}, folder)
    run_evaluation(
        load(run / "config.yaml", ["evaluation.samples=4", "rollout.num_steps=5"]),
        {"base": None},
        folder,
        overwrite=True,
    )
    assert contents(folder / "base") != before


@pytest.mark.parametrize("name", ["base/thesis.txt", "base/model.json", "report.html", "samples.csv"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_another_program_wrote_is_not_touched(run, name, overwrite, tmp_path):
    """base/model.json is what an export for TensorFlow.js looks like."""
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("{}")
    with pytest.raises(FileExistsError, match="out holds what flowbp eval did not write there: choose another --out"):
        run_evaluation(load(run / "config.yaml", ["evaluation.samples=4"]), {"base": None}, out, overwrite)
    assert [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()] == [name]
    assert (out / name).read_text() == "{}"


def test_scores_that_are_overwritten_take_no_other_file_with_them(run, tmp_path):
    run_evaluation(load(run / "config.yaml", ["evaluation.samples=4"]), {"base": None}, tmp_path / "eval")
    (tmp_path / "eval/base/notes.txt").write_text("what I saw")
    (tmp_path / "eval/base/notes.safetensors").write_text("my own")
    run_evaluation(
        load(run / "config.yaml", ["evaluation.samples=6"]), {"base": None}, tmp_path / "eval", overwrite=True
    )
    assert {"notes.txt", "notes.safetensors"} < {path.name for path in (tmp_path / "eval/base").iterdir()}


def test_a_run_of_0_1_is_evaluated_and_not_resumed(run, tmp_path):
    """Its config names no noise levels: 0.1 trained on the sampler's, and they end next to zero. Its checkpoints say
    nothing of the run.
    """
    old = tmp_path / "old"
    shutil.copytree(run, old)
    config = yaml.safe_load((old / "config.yaml").read_text())
    del config["rollout"]["sigmas"], config["rollout"]["timesteps"], config["evaluation"]["sigmas"]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    for step in old.glob("checkpoints/*/step.json"):
        said = json.loads(step.read_text())
        step.write_text(json.dumps({key: said[key] for key in ("step", "processes")}))
        (step.parent / "SHA256SUMS").unlink()
    with pytest.raises(
        ValueError, match=r"was trained by flowbp 0.1, .* cannot go on; its weights still evaluate \(flowbp eval"
    ):
        train(load(old, ["steps=9", f"output={old}"]), resume=True)
    for name, source in {"new": run, "of 0.1": old}.items():
        run_evaluation(
            load(source / "config.yaml", ["evaluation.samples=4"]), {"base": None, "tuned": source}, tmp_path / name
        )
    new, of_0_1 = (json.loads((tmp_path / name / "samples.json").read_text()) for name in ("new", "of 0.1"))
    assert new == of_0_1 and new[0]["scores"]["tuned"] != new[0]["scores"]["base"]


def test_tuned_weights_are_scored_at_every_strength_that_is_named(run, whole, tmp_path):
    options = ["eval", str(run), "--out", str(tmp_path / "eval"), "--strength"]
    result = CliRunner().invoke(app, [*options, "0.5,1"])
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert [(about["name"], about.get("strength")) for about in results["models"]] == [
        ("base", None),
        ("small 0.5", 0.5),
        ("small", None),
    ]
    rewards = [row["mean"] for row in results["means"] if (row["metric"], row["category"]) == ("reward", "all")]
    assert len(set(rewards)) == 3
    at_one = [row for row in results["means"] if row["model"] == "small"]
    before = json.loads((whole / "results.json").read_text())["means"]
    assert at_one == [row | {"model": "small"} for row in before if row["model"] == "tuned"]
    assert "Strength of" in (tmp_path / "eval" / "report.html").read_text()
    assert CliRunner().invoke(app, [*options, "0.25"]).exit_code == 0  # beside those that are there


@pytest.mark.parametrize(
    "models, strengths, says",
    [
        (["a", "a 0.5"], [0.5, 1.0], "two models are called 'a 0.5': take other names, --weights NAME=PATH"),
        (["a"], [0.3333333, 0.33333331], "two models are called 'a 0.333333'"),
        ([], [0.5], "there are none: name the folder of a run, or --weights"),
    ],
)
def test_strengths_without_a_model_of_their_own_are_refused(models, strengths, says, run, tmp_path):
    models = {"base": None} | dict.fromkeys(models, run)
    with pytest.raises(ValueError, match=says):
        run_evaluation(load(run / "config.yaml"), models, tmp_path / "eval", strengths=strengths)
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize("text", ["0", "-1", "half", "nan", "0.5,", "inf", ""])
def test_a_strength_that_is_none_is_refused(text, run, tmp_path):
    result = CliRunner().invoke(app, ["eval", str(run), "--out", str(tmp_path / "eval"), "--strength", text])
    assert isinstance(result.exception, ValueError) and "finite numbers above 0" in str(result.exception)
    assert not (tmp_path / "eval").exists()


def test_models_are_named_after_their_folders_or_as_told(tmp_path):
    assert name_models(["runs/a", "b=runs/x"]) == {"base": None, "a": Path("runs/a"), "b": Path("runs/x")}
    (tmp_path / "lr=1e-4").mkdir()  # as flowbp sweep names the folders of settings
    folder = str(tmp_path / "lr=1e-4")
    assert name_models([folder, f"b={folder}"]) == {"base": None, "lr=1e-4": Path(folder), "b": Path(folder)}
    with pytest.raises(ValueError, match="two models are called 'a'"):
        name_models(["runs/a", "other/a"])
    with pytest.raises(ValueError, match="two models are called 'base'"):
        name_models(["runs/base"])
    with pytest.raises(ValueError, match="cannot be a folder's name"):
        name_models(["a/b=runs/x"])


def test_the_command_scores_a_run_by_its_folder(run, tmp_path):
    result = CliRunner().invoke(
        app, ["eval", str(run), "--out", str(tmp_path / "eval"), "evaluation.samples=4", "evaluation.batch_size=2"]
    )
    assert result.exit_code == 0, result.output
    for said in (
        "small against base",
        "diversity compares images of one prompt",
        "fewer than six prompts bear no 95 % interval",
    ):
        assert said in result.output
    assert (tmp_path / "eval" / "report.html").is_file()
    result = CliRunner().invoke(app, ["eval", str(run), "--weights", str(tmp_path), "--out", str(tmp_path / "other")])
    assert isinstance(result.exception, FileNotFoundError) and "pass the folder of a finished run" in str(
        result.exception
    )


def test_the_page_of_several_rewards_names_each(tmp_path):
    overrides = [
        f"output={tmp_path / 'none'}",
        "evaluation={samples: 4, batch_size: 4, grid: 2}",
        "rollout.num_steps=3",
    ]
    rewards = "reward={one: {name: clip, model: shapes}, two: {name: clip, model: shapes-monitor, weight: 0.5}}"
    results = run_evaluation(load("demo", [*overrides, rewards]), {"base": None}, tmp_path / "eval")
    assert {"one", "two"} < {row["metric"] for row in results["means"]}
    assert "one and two" in (tmp_path / "eval" / "report.html").read_text()
