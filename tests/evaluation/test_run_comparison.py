"""A comparison of runs says when it is none: every difference is the point, unfair, or shown to change nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flowbp.cli.commands import app
from flowbp.config import dump, load
from flowbp.config.loading import sealed
from flowbp.evaluation.runs import EVALUATED, IMAGES_A_STEP, Run, about, compare_runs, contrast
from flowbp.evaluation.scores import Scores
from flowbp.evaluation.templates import grouped
from flowbp.runtime.files import seal
from flowbp.runtime.run_folder import short_names

WATCHED = ("evaluation.every=10", "evaluation.best=monitor")


def demo_against(*overrides, processes=1):
    """The contrast of the demo with itself, overridden, in the second place of which `processes` take part."""
    runs = [load("demo"), load("demo", overrides)]
    images = [
        count * run.data.batch_size * run.data.accumulate for run, count in zip(runs, (1, processes), strict=True)
    ]
    return contrast([yaml.safe_load(dump(run)) for run in runs], images)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.batch_size=16", IMAGES_A_STEP),
        ("data.accumulate=2", IMAGES_A_STEP),
        ("guidance.scale=3.5", "guidance.scale"),
        ("guidance.detach_negative=false", "guidance.detach_negative"),
        ("rollout.height=64", "rollout.height"),
        ("rollout.num_steps=25", "rollout.num_steps"),
        ("steps=100", "steps"),
        ("seed=1", "seed"),
        ("evaluation.prompts=shapes:dev", "evaluation.prompts"),
        ("evaluation.seed=1", "evaluation.seed"),
        ("backbone.dtype=bfloat16", "backbone.dtype"),
        ("reward.model=shapes-monitor", "reward.model"),
        ("reward.smooth=null", "reward.smooth.copies"),
        ("optimizer.lr=1e-5", "optimizer.lr"),
        ("tuning.rank=4", "tuning.rank"),
        ("memory.vae_tiling=true", "memory.vae_tiling"),
    ],
)
def test_what_reaches_weights_or_scores_is_unfair(override, key):
    found = demo_against(override)
    assert key in found["unfair"] and not found["point"] and found["unfair"][key]["why"]


def test_the_method_is_the_point_and_bookkeeping_changes_nothing():
    found = demo_against(
        "method.name=leapalign", "output=elsewhere", "checkpoint_every=7", "data.batch_size=16", "data.accumulate=2"
    )
    assert not found["unfair"], "16 x 2 images a step are the 32 x 1 of the other run"
    (ours, other), *more = found["point"].values()
    assert ours.startswith("flowbp-lagrange (order 3") and other.startswith("leapalign (alpha 0.3") and not more
    assert set(found["bookkeeping"]) == {"output", "checkpoint_every", "data.batch_size", "data.accumulate"}
    assert demo_against("method.alpha=0.5")["point"] == {"method.alpha": [0.1, 0.5]}


def test_where_memory_is_spent_changes_no_result_but_for_the_seams_of_tiles():
    assert set(demo_against("memory.checkpointing=true", "compile=eager")["bookkeeping"]) == {
        "memory.checkpointing",
        "compile",
    }


def test_images_a_step_count_every_process():
    assert not demo_against("data.batch_size=16", processes=2)["unfair"]
    assert demo_against(processes=2)["unfair"][IMAGES_A_STEP]["values"] == [32, 64]


def test_one_reward_against_several_is_one_difference_in_words():
    several = "reward={style: {name: clip, model: shapes, weight: 0.5}, other: {name: clip, model: shapes-monitor}}"
    found = demo_against(several)
    one, two = found["unfair"]["reward"]["values"]
    assert one.startswith("one reward: clip (model shapes, hinge 0.8")
    assert two == "2 rewards: clip (model shapes, weight 0.5) + clip (model shapes-monitor)"
    assert list(found["unfair"]) == ["reward"]


def test_a_run_without_evaluation_differs_in_that_alone():
    assert list(demo_against("evaluation=null")["unfair"]) == [EVALUATED]
    stopped, unwatched = load("demo", [*WATCHED, "evaluation.patience=2"]), load("demo", ["evaluation=null"])
    found = contrast([yaml.safe_load(dump(run)) for run in (stopped, unwatched)], [32, 32])
    assert set(found["unfair"]) == {EVALUATED, "evaluation.patience"}, "no run without scores stops early"


def test_how_often_a_run_is_watched_matters_only_where_that_can_stop_it():
    assert not demo_against(*WATCHED)["unfair"]
    assert "evaluation.every" in demo_against(*WATCHED, "evaluation.patience=2")["unfair"]


def test_one_slow_step_leaves_the_seconds_a_step_as_they_are():
    rows = [{"seconds": 1.0, "peak_mb": 5.0}, {"seconds": 60.0, "peak_mb": 9.0}, {"seconds": 2.0, "peak_mb": 7.0}]
    told = about(Run("a", Path("a"), load("demo"), rows, None, None, {}))
    assert (told["seconds_a_step"], told["peak_mb"]) == (2.0, 9.0)


def test_values_are_listed_with_the_runs_that_have_them():
    assert grouped([1, None, 1], ["a", "b", "c"]) == [("1", "a, c"), ("–", "b")]


@pytest.fixture(scope="module")
def other(run, tmp_path_factory):
    """A copy of the run that claims another method and guidance, and scores .1 more at every sample."""
    folder = tmp_path_factory.mktemp("others") / "other"
    shutil.copytree(run, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["method"], config["guidance"]["scale"] = {"name": "refl", "last_n": 2}, 4.0
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    scores = Scores.read_csv(folder / "scores_after.csv")
    scores.values["reward"] += 0.1
    (folder / "scores_after.csv").write_text(scores.as_csv())
    return folder


def test_the_command_compares_pair_by_pair_and_warns(run, other, tmp_path):
    result = CliRunner().invoke(app, ["compare", str(run), str(other), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "not a fair comparison" in result.output and "guidance.scale" in result.output
    found = json.loads((tmp_path / "comparison.json").read_text())
    (reward,) = (row for row in found["changes"] if (row["metric"], row["category"]) == ("reward", "all"))
    assert reward["change"] == pytest.approx(0.1, abs=1e-5) and reward["low"] > 0.09
    assert found["point"] == {"method": ["draft-lv (num_renoised 2)", "refl (last_n 2)"]} and list(found["unfair"]) == [
        "guidance.scale"
    ]
    page = (tmp_path / "comparison.html").read_text()
    assert "Not a fair comparison" in page and not re.findall(r'(?:src|href)="(?!data:)', page)


def test_an_unfinished_run_and_other_samples_are_named(run, other, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(other, copy)
    shutil.rmtree(copy / "checkpoints")
    (copy / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    table = (copy / "scores_after.csv").read_text().splitlines()
    (copy / "scores_after.csv").write_text("\n".join(table[:5]) + "\n")
    found = compare_runs([run, copy, other], tmp_path / "out")
    assert found["warnings"] == [
        "copy has taken 1 of 2 steps",
        "copy was scored on other prompts or seeds than small: no paired test",
    ]
    assert {row["run"] for row in found["changes"]} == {"other"}


def test_a_run_that_still_writes_and_one_without_scores_are_compared_as_far_as_they_go(run, other, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(other, copy)
    (copy / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 3, "los')
    (copy / "scores_after.csv").unlink()
    (copy / "environment.json").write_text('{"flowbp": "0.0.9"}')
    found = compare_runs([run, copy], tmp_path / "out")
    assert [one["steps"] for one in found["runs"]] == [2, 2] and not found["changes"]
    missing, versions = found["warnings"]
    assert (
        f"copy. To score runs on the same samples: flowbp eval {run} --weights small={run} --weights copy={copy}"
        in missing
    )
    assert versions.endswith("copy: flowbp 0.0.9")


def test_the_config_of_another_run_is_named(run, tmp_path):
    """Its seal is whole. The checkpoint remembers the run's own, of which steps may grow and the folder may move."""
    copy, own = tmp_path / "copy", (run / "config.yaml").read_text()
    shutil.copytree(run, copy)
    config = load(run)
    foreign = config.model_copy(update={"seed": 7, "output": tmp_path / "theirs"})
    longer = config.model_copy(update={"steps": 9, "output": copy})
    (copy / "config.yaml").write_text(sealed(dump(foreign)))
    said = "copy/config.yaml is another run's: .*step-000002 was trained with seed 42, not 7. Restore it from a copy"
    with pytest.raises(OSError, match=said):
        compare_runs([run, copy], tmp_path / "out")
    result = CliRunner().invoke(app, ["eval", str(copy), "--out", str(tmp_path / "eval")])
    assert isinstance(result.exception, OSError) and re.search(said, str(result.exception))
    for whole in (own, sealed(dump(longer)), dump(foreign)):  # the last has no seal: its owner changed it
        (copy / "config.yaml").write_text(whole)
        assert compare_runs([run, copy], tmp_path / "out")
    about = json.loads((run / "checkpoints/step-000002/step.json").read_text())
    assert about.pop("config")
    (copy / "checkpoints/step-000002/step.json").write_text(json.dumps(about))
    (copy / "checkpoints/step-000002/SHA256SUMS").unlink()
    (copy / "config.yaml").write_text(sealed(dump(foreign)))  # an older run has no record to compare with
    assert compare_runs([run, copy], tmp_path / "out")


def test_a_deleted_file_of_the_weights_is_named(tmp_path):
    folder = tmp_path / "run/transformer"
    folder.mkdir(parents=True)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (folder / name).write_text("{}")
    seal(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    said = f"{folder}/diffusion_pytorch_model.safetensors is missing, and SHA256SUMS lists it: restore it from a copy"
    for command in (["eval", "demo", "--weights", f"mine={folder}"], ["sample", "demo", "a cat", "--weights"]):
        weights = [] if command[0] == "eval" else [str(folder.parent)]
        with pytest.raises(FileNotFoundError, match=said):
            CliRunner().invoke(app, [*command, *weights], catch_exceptions=False)


def test_a_damaged_table_of_scores_is_named(run, other, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(other, copy)
    for text in ("prompt,category,seed,reward\n", "prompt,category,seed,reward\na circle,,7,"):
        (copy / "scores_after.csv").write_text(text)
        with pytest.raises(ValueError, match="copy/scores_after.csv is no whole table of scores"):
            compare_runs([run, copy], tmp_path / "out")


def test_runs_are_named_by_as_much_of_their_paths_as_tells_them_apart(tmp_path):
    assert short_names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    with pytest.raises(ValueError, match="compared with itself"):
        short_names([tmp_path / "a", tmp_path / "a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match="empty holds no config.yaml, so it is no run: pass the folders that flowbp train wrote"
    ):
        compare_runs([tmp_path / "empty", tmp_path / "other"], tmp_path)
    with pytest.raises(FileNotFoundError, match="missing is no folder"):
        compare_runs([tmp_path / "missing", tmp_path / "other"], tmp_path)
    with pytest.raises(ValueError, match="two runs or more"):
        compare_runs([tmp_path], tmp_path)
