"""The command line as one meets it: what is mistyped, missing or interrupted ends in one line that says what to do."""

import re
import sys

import pytest
import yaml
from typer.testing import CliRunner

import flowbp.__main__
from flowbp.cli import commands as cli
from flowbp.cli import tables
from flowbp.cli.terminal import console
from flowbp.config import load
from flowbp.quadrature import solver_table
from flowbp.training.trainer import Trainer

TINY = ["steps=3", "data.batch_size=2", "rollout.num_steps=12", "checkpoint_every=1", "evaluation=null"]


def interrupted(tmp_path, monkeypatch, at):
    """The output and the folder of a run that is stopped by Ctrl-C in step `at`."""
    step = Trainer.step

    def stop(self, index):
        if index == at:
            raise KeyboardInterrupt
        return step(self, index)

    monkeypatch.setattr(Trainer, "step", stop)
    result = CliRunner().invoke(cli.app, ["train", "demo", *TINY, f"output={tmp_path / 'run'}"])
    assert result.exit_code == 130 and "Traceback" not in result.output
    return " ".join(result.output.split()), tmp_path / "run"


def test_ctrl_c_says_what_is_saved_and_how_to_go_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        output, run = interrupted(tmp_path, patch, at=2)
    assert f"stopped. 2 steps are saved; to go on: flowbp train {run} --resume" in output
    result = CliRunner().invoke(cli.app, ["train", str(run), "--resume"])
    assert result.exit_code == 0, result.output
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    said = " ".join(result.output.split())
    for fact in (
        "flowbp-lagrange",
        "LoRA of rank 32",
        "clip (model shapes",
        "2 images on",
        "goes on after step 2 of 3",
    ):
        assert fact in said
    assert steps_in_tensorboard(run) == [1, 2, 3]


def steps_in_tensorboard(run):
    """The steps of the loss, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("loss")]


def test_ctrl_c_before_the_first_checkpoint_says_so(tmp_path, monkeypatch):
    output, run = interrupted(tmp_path, monkeypatch, at=0)
    assert "No step is saved yet" in output and f"flowbp train {run} --resume" in output


def test_the_folder_of_a_run_is_its_config(tmp_path):
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"output": "here"} | load("demo", ["seed=7"]).model_dump(mode="json"))
    )
    assert load(tmp_path) == load("demo", ["seed=7"])


def test_a_preset_is_printed_with_what_its_keys_mean_and_is_a_config(tmp_path):
    printed = CliRunner().invoke(cli.app, ["presets", "demo"]).output
    assert "  hinge: 0.8  # target in the reward's own units" in printed and "  every: null  # steps between" in printed
    (tmp_path / "config.yaml").write_text(printed)
    assert load(tmp_path) == load("demo")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["evl"], "Did you mean 'eval'"),
        (["train", "demo", "--overwite"], "--overwrite"),
        (["train"], "Missing argument 'config'"),
        (["train", "dmo"], "unknown preset 'dmo'; did you mean 'demo'? flowbp presets lists them"),
        # Brackets are no tag of rich's.
        (["train", "demo", "tuning={mode: full, targets: [to_q]}"], "targets=['to_q'] is a setting of LoRA"),
        (["plan", "lepalign"], "did you mean 'leapalign'"),
        (["plan", "refl", "--solver", "heun"], "'heun' is not one of 'euler', 'adams-2', 'adams-3'"),
        (["rewards", "hpsv"], "did you mean 'hpsv"),
        (["export", "nowhere", "out.safetensors"], "nowhere holds no pytorch_lora_weights.safetensors"),
    ],
)
def test_what_is_mistyped_is_answered_in_words(arguments, says, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["flowbp", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        flowbp.__main__.main()
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_a_plan_is_drawn_on_the_published_levels_under_the_shift(monkeypatch):
    levels = []
    monkeypatch.setattr(tables, "table", lambda name, title, plan, sigmas: levels.extend(sigmas) or title)
    result = CliRunner().invoke(cli.app, ["plan", "refl", "last_n=1", "--steps", "4", "--shift", "3"])
    assert result.exit_code == 0, result.output
    assert levels == pytest.approx([3 * u / (1 + 2 * u) for u in (1, 0.75, 0.5, 0.25, 0)])


@pytest.mark.parametrize("solver", ["euler", "adams-2"])
def test_a_plan_has_the_weights_of_the_solver_that_is_asked_for(solver, monkeypatch):
    plans = []
    monkeypatch.setattr(tables, "table", lambda name, title, plan, sigmas: plans.append((plan, sigmas)) or title)
    result = CliRunner().invoke(cli.app, ["plan", "flowbp-sparse", "--steps", "6", "--solver", solver])
    assert result.exit_code == 0 and f"6 {solver} steps" in result.output
    ((drawn, sigmas),) = plans
    assert drawn.weights == pytest.approx(solver_table(sigmas, solver).sum(axis=0))


@pytest.mark.parametrize(("package", "module"), [("typer", "flowbp.cli.commands"), ("pydantic", "flowbp.config")])
def test_a_package_that_is_missing_names_its_extra(package, module, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["flowbp", "presets", "demo"])
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit, match=rf"error: {package} is not installed.* pip install 'flowbp\[train\]'"):
        flowbp.__main__.main()


def test_bench_hands_its_options_to_the_kernels_benchmark():
    result = CliRunner().invoke(cli.app, ["bench", "--help"])
    assert result.exit_code == 0 and "--latent" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "leapalign"], "gradient weight: -0.0982"),
        (["presets"], "sd3.5-medium/flowbp-lagrange\n  batch: 8"),
        (["rewards"], "camenduru/improved-aesthetic-predictor"),
        (["rewards", "hpsv2"], "hinge: 0.55"),
        (["estimate", "demo"], "frozen weights: 0.009"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_narrow_terminal_shows_every_number_and_name(arguments, says, monkeypatch):
    shown = {}
    for columns in (40, 80):
        monkeypatch.setattr(console, "_width", columns)  # rich reads $COLUMNS once, when a console is made
        result = CliRunner().invoke(cli.app, arguments)
        table, *_ = result.output.split("\nFetch it")  # commands are not wrapped
        assert result.exit_code == 0 and max(map(len, table.splitlines())) <= columns
        shown[columns] = result.output
    assert "…" not in shown[40] + shown[80] and ("┃" in shown[80]) and ("┃" not in shown[40])
    assert says in shown[40]
    numbers = {number for number in re.findall(r"[+-]?\d+\.\d+", shown[80]) if number in shown[80].split()}
    assert numbers <= set(re.findall(r"[+-]?\d+\.\d+", shown[40]))
