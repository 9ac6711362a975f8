"""The trainer, on the embedded model: every method trains it, runs resume exactly, and nothing is lost or
half-written.
"""

import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from autograd_graph import as_graph
from typer.testing import CliRunner

from flowbp.backbones import load_backbone
from flowbp.backbones.base import bind_velocity
from flowbp.cli.commands import app
from flowbp.config import dump, load
from flowbp.config.schema import LOGGED, MemoryConfig
from flowbp.evaluation import scores as evaluation
from flowbp.evaluation.scores import Scores, compare
from flowbp.guidance import Guidance
from flowbp.methods import METHODS
from flowbp.objective import clip_samples
from flowbp.replay import Recompute
from flowbp.rewards import Smoothing, load_reward
from flowbp.rewards.weighted import WeightedRewards, smoothed
from flowbp.runtime.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, seal
from flowbp.runtime.data import Prompt, sample_seeds
from flowbp.runtime.files import remove
from flowbp.runtime.interrupts import Stop, heard_by, interrupt
from flowbp.runtime.run_folder import RunFolder, how_to_go_on
from flowbp.runtime.weights import load_weights
from flowbp.surrogate import backward, reward_input
from flowbp.training.run import run, train
from flowbp.training.trainer import Trainer
from flowbp.trajectory import rollout

TINY = ["steps=2", "data.batch_size=2", "rollout.num_steps=6", "checkpoint_every=1", "evaluation=null"]
SHORT = ["rollout.num_steps=2", "method={name: refl, last_n: 1}"]  # steps that are about something else


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """To draw those of a report takes longer than to train; tests/evaluation looks at them."""
    for module in ("flowbp.training.run", "flowbp.evaluation.pages"):
        monkeypatch.setattr(f"{module}.as_png", lambda figure: b"a picture")


def tiny(tmp_path, *overrides):
    return load("demo", [f"output={tmp_path / 'run'}", *TINY, *overrides])


def lora_file(output):
    from safetensors.torch import load_file

    return load_file(output / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_the_embedded_model(name, tmp_path):
    extra = ["method.last_n=4"] if name == "refl" else []
    trainer = Trainer(tiny(tmp_path, "rollout.num_steps=12", f"method.name={name}", *extra))
    row = trainer.step(0)
    assert np.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 and not row["skipped"]
    trained, base = trainer.model.parameters, trainer.model.base
    still = [key for key in trained if "lora_B" in key and torch.equal(trained[key], base[key])]
    # the last block drops what the text queries attend to
    assert all("transformer_blocks.3.attn.add_q_proj" in key for key in still)


def test_a_run_rolls_out_and_guides_as_its_config_says_and_evaluates_as_the_model_is_used(tmp_path, monkeypatch):
    interval = "guidance={scale: 3.0, interval: [0.3, 0.9]}"
    calls, samples = [], []

    def watched(velocity, *arguments):
        calls.append((velocity.guidance, arguments[-1]))
        trajectory = rollout(velocity, *arguments)
        samples.append(trajectory.sample)
        return trajectory

    monkeypatch.setattr("flowbp.training.trainer.rollout", watched)
    config = tiny(tmp_path, interval, "rollout.solver=adams-2", "evaluation={prompts: shapes:test}")
    plain = tiny(tmp_path / "plain", interval)
    for each in (config, plain):
        Trainer(each).step(0)
    assert calls == [(config.guidance, "adams-2"), (plain.guidance, "euler")] and not torch.equal(*samples)
    assert config.evaluation_rollout.solver == "euler"
    assert config.evaluation_guidance == plain.evaluation_guidance == Guidance(3.0)
    asked = load("demo", [interval, "evaluation.solver=adams-3", "evaluation.interval=[0.1, 1]"])
    assert asked.evaluation_rollout.solver == "adams-3" and asked.evaluation_guidance.interval == (0.1, 1.0)


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["unguided", "guided"])
def test_sweep_equals_graph_on_every_backbone(scale, backbone_overrides, tmp_path):
    """To float64 accuracy, however the graphs of active nodes come about."""
    config = tiny(tmp_path, *backbone_overrides, f"guidance.scale={scale}")
    backbone = load_backbone(**config.backbone.model_dump() | {"dtype": "float64"})
    backbone.denoiser.requires_grad_(True)
    parameters = list(backbone.denoiser.parameters())
    sigmas = backbone.sigmas(8, 32, 32)
    plan = METHODS["flowbp-bridge"](num_active=3, alpha=0.7).plan(sigmas.double().numpy(), np.random.default_rng(0))
    velocity = bind_velocity(backbone, ["a red circle", "two blue stars"], config.guidance)
    noise = backbone.noise(32, 32, [torch.Generator().manual_seed(s) for s in (0, 1)]).double()

    def gradient():
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        for p in parameters:
            p.grad = None
        return flat

    weighing = Recompute("auto", budget=0)
    trajectory = rollout(velocity, noise, sigmas, plan, recompute=weighing)
    as_graph(plan, trajectory, velocity.replay).pow(3).mean().backward()
    by_graph = gradient()
    for policy, kept, nodes_per_forward in (
        (Recompute("always"), 0, 1),
        (Recompute("always"), 0, 2),
        (Recompute("auto", budget=5 * weighing.graph_bytes // 2), 2, 1),
        (Recompute("never"), 3, 1),
    ):
        trajectory = rollout(velocity, noise, sigmas, plan, recompute=policy)
        assert len(trajectory.kept) == kept
        z = reward_input(plan, trajectory).requires_grad_()
        (g,) = torch.autograd.grad(z.pow(3).mean(), z)
        backward(plan, trajectory, velocity.replay, g, nodes_per_forward=nodes_per_forward)
        assert (gradient() - by_graph).norm() <= 1e-9 * by_graph.norm()


def test_a_resumed_run_equals_an_unbroken_one(backbone_overrides, tmp_path):
    whole = tiny(tmp_path / "whole", "steps=3", "method.name=draft-lv", "anchor={weight: 0.5}", *backbone_overrides)
    train(whole)
    broken = tiny(tmp_path / "broken", "steps=3", "method.name=draft-lv", "anchor={weight: 0.5}", *backbone_overrides)
    stopped = Trainer(broken)
    stopped_at = 2
    RunFolder(broken.output).open(broken)
    rows = [{"step": s + 1} | stopped.step(s) for s in range(stopped_at)]
    # the last row was logged after the checkpoint, before the kill
    lines = [json.dumps(row) for row in rows] + ['{"step": 3, "lost": true}']
    (broken.output / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    save_checkpoint(broken.output, stopped_at, stopped.model, stopped.optimizer, stopped.rewards)
    train(broken, resume=True)
    expected, got = lora_file(whole.output), lora_file(broken.output)
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)
    logged = [json.loads(line) for line in (broken.output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [1, 2, 3] and "lost" not in logged[2]


def test_a_finished_run_goes_on_with_more_steps_and_with_no_other_change(tmp_path):
    whole, short = tiny(tmp_path / "whole", "steps=3"), tiny(tmp_path / "short", "steps=2")
    train(whole)
    train(short)
    changed = tiny(tmp_path / "short", "steps=3", "optimizer.lr=1e-3")
    with pytest.raises(ValueError, match="optimizer.lr from 0.0007 to 0.001, steps from 2 to 3"):
        train(changed, resume=True)
    with pytest.raises(ValueError, match="steps from 2 to 1"):
        train(tiny(tmp_path / "short", "steps=1"), resume=True)
    train(tiny(tmp_path / "short", "steps=3"), resume=True)
    expected, got = lora_file(whole.output), lora_file(short.output)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert "steps: 3" in (short.output / "config.yaml").read_text()


def test_the_folder_of_a_run_is_its_output_wherever_it_was_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(load("demo", ["output=runs/a", *TINY]))
    Path("runs").rename("elsewhere: 1")
    result = CliRunner().invoke(app, ["train", "elsewhere: 1/a", "--resume", "steps=3"])
    assert result.exit_code == 0 and not Path("runs").exists(), result.output
    assert [row["step"] for row in RunFolder(Path("elsewhere: 1/a")).metrics()] == [1, 2, 3]
    assert load("elsewhere: 1/a").output == Path("elsewhere: 1/a")
    result = CliRunner().invoke(app, ["train", "elsewhere: 1/a", "output=b", "steps=1"])
    assert result.exit_code == 0 and Path("b/report.html").exists(), "but for another output="


def test_a_moved_run_that_lost_its_metrics_is_not_trained_where_it_came_from(tmp_path):
    train(tiny(tmp_path))
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "moved/metrics.jsonl").unlink()
    result = CliRunner().invoke(app, ["train", str(tmp_path / "moved"), "--resume", "steps=3"])
    assert "moved exists and is not a run" in str(result.exception) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("killed", [False, True])
def test_a_resume_that_finds_nothing_says_so(killed, tmp_path, caplog):
    config = tiny(tmp_path, "steps=1")
    if killed:
        RunFolder(config.output).open(config)
    train(config, resume=True)
    assert f"--resume: {config.output} holds no checkpoint, so training begins with step 1" in caplog.messages


def test_a_mixed_precision_of_accelerate_is_told_to_play_no_part(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    train(tiny(tmp_path, "steps=1"))
    assert any("backbone.dtype says in what the network computes" in message for message in caplog.messages)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_checkpoint_of_a_device_that_is_gone_still_loads(tmp_path, monkeypatch):
    """As when eight processes resume what the first wrote from its GPU."""
    trainer = Trainer(tiny(tmp_path))
    trainer.step(0)
    state = (trainer.model, trainer.optimizer, trainer.rewards)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:99")
    save_checkpoint(tmp_path, 1, *state)
    assert load_checkpoint(latest_checkpoint(tmp_path), *state) == 1
    devices = {p.device for p in trainer.model.parameters.values()}
    assert {shadow.device for shadow in trainer.model.ema.shadow_params} == devices


def test_a_full_disk_keeps_the_last_checkpoint_and_leaves_no_scraps(tmp_path, monkeypatch):
    trainer = Trainer(tiny(tmp_path))
    state = (trainer.model, trainer.optimizer, trainer.rewards)
    save_checkpoint(tmp_path, 1, *state)

    def full(*arguments):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="step-000002 cannot be written: PytorchStreamWriter failed"):
        save_checkpoint(tmp_path, 2, *state)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_lora_weights_load_into_a_fresh_diffusers_pipeline(tmp_path):
    config = tiny(tmp_path, "tuning.alpha=8", "data.embeddings=live")
    trainer = Trainer(config)
    folder = RunFolder(config.output)
    folder.open(config)
    run(trainer, folder)
    arguments = (["a red circle"], [7], config.rollout, config.guidance)
    with trainer.model.using(trainer.model.tuned):
        expected = evaluation.generate(trainer.model.backbone, *arguments)
    fresh = load_backbone("shapes", max_sequence_length=1)
    base = evaluation.generate(fresh, *arguments)
    load_weights(fresh, config.output)
    torch.testing.assert_close(evaluation.generate(fresh, *arguments), expected, rtol=0, atol=0)
    assert not torch.equal(base, expected)


def test_full_weights_are_saved_as_a_folder_that_loads_back(tmp_path):
    config = tiny(tmp_path, "tuning.mode=full", "optimizer.lr=1e-4", "steps=1")
    trainer = Trainer(config)
    folder = RunFolder(config.output)
    folder.open(config)
    run(trainer, folder)
    fresh = load_backbone("shapes", max_sequence_length=1)
    load_weights(fresh, config.output)
    for name, value in trainer.model.tuned.items():
        assert torch.equal(fresh.denoiser.get_parameter(name), value)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_base_of_a_trained_run_is_the_model_it_started_from(mode, tmp_path):
    trainer = Trainer(tiny(tmp_path, f"tuning.mode={mode}", "data.embeddings=live"))
    trainer.step(0)
    arguments = (["a red circle"], [7], trainer.config.rollout, trainer.config.guidance)
    with trainer.model.using(trainer.model.base):
        base = evaluation.generate(trainer.model.backbone, *arguments)
    assert torch.equal(base, evaluation.generate(load_backbone("shapes", max_sequence_length=1), *arguments))
    assert not torch.equal(base, evaluation.generate(trainer.model.backbone, *arguments))


def test_a_step_tells_where_its_time_went(tmp_path):
    row = Trainer(tiny(tmp_path)).step(0)
    parts = [row[f"{name}_seconds"] for name in ("rollout", "reward", "sweep", "update")]
    assert min(parts) > 0 and sum(parts) <= row["seconds"]


def test_the_columns_of_a_step_are_reserved_names(tmp_path):
    row = Trainer(tiny(tmp_path, "anchor={weight: 1}")).step(0)
    assert {"step", *row} - {"reward"} - {name for name in row if name.endswith("_seconds")} == set(LOGGED)


@pytest.mark.parametrize("gradient", [0.0, float("nan")])
def test_a_broken_reward_changes_nothing(gradient, tmp_path):
    """Not even by momentum, where the gradient is 0."""
    trainer = Trainer(tiny(tmp_path))
    trainer.step(0)
    term = trainer.rewards.terms["reward"]
    reward, term.reward = term.reward, lambda images, prompts: reward(images, prompts) * gradient + float("nan")
    before = {key: p.detach().clone() for key, p in trainer.model.parameters.items()}
    row = trainer.step(1)
    assert row["skipped"] and all(torch.equal(trainer.model.parameters[key], before[key]) for key in before)


def test_accumulated_micro_batches_are_averaged(tmp_path):
    trainer = Trainer(tiny(tmp_path, "data.accumulate=2", "reward.smooth=null"))
    trainer.accumulate_gradient(0, 0)
    first = {key: p.grad.clone() for key, p in trainer.model.parameters.items()}
    trainer.optimizer.zero_grad()
    trainer.accumulate_gradient(0, 1)
    second = {key: p.grad.clone() for key, p in trainer.model.parameters.items()}
    trainer.accumulate_gradient(0, 0)
    for key, p in trainer.model.parameters.items():
        torch.testing.assert_close(p.grad, first[key] + second[key], rtol=1e-4, atol=1e-7)
    alone = Trainer(tiny(tmp_path, "reward.smooth=null"))
    alone.accumulate_gradient(0, 0)  # the same plan, prompts and noise
    for key, p in alone.model.parameters.items():
        torch.testing.assert_close(p.grad, 2 * first[key], rtol=1e-4, atol=1e-7)


def test_a_trained_parameter_without_gradient_is_named(tmp_path):
    trainer = Trainer(tiny(tmp_path))
    trainer.model.parameters["unused"] = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(
        ValueError, match=f"1 of {len(trainer.model.parameters)} trained parameters take no part .* such as unused"
    ):
        trainer.step(0)


@pytest.mark.parametrize(("warmup", "shares"), [(0, [1, 1, 1, 1, 1]), (3, [0.25, 0.5, 0.75, 1, 1])])
def test_the_learning_rate_rises_to_its_value_over_the_warm_up_and_is_never_0(warmup, shares, tmp_path):
    trainer, stepped = Trainer(tiny(tmp_path, f"optimizer.warmup={warmup}")), []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: stepped.append(optimizer.param_groups[0]["lr"]))
    for step in range(5):
        for p in trainer.model.parameters.values():
            p.grad = torch.ones_like(p)
        trainer.update(step)
    assert stepped == pytest.approx([trainer.config.optimizer.lr * share for share in shares])


def test_the_moving_average_is_a_lerp_of_constant_decay_from_the_first_step_on(tmp_path):
    """The released trainers call lerp_(weights, 1 - decay) after every step, on a copy of the base weights."""
    trainer = Trainer(tiny(tmp_path, "steps=3", "ema=0.995"))
    average = {key: p.detach().clone() for key, p in trainer.model.parameters.items()}
    for step in range(3):
        trainer.step(step)
        for key, value in average.items():
            value.lerp_(trainer.model.parameters[key].detach(), 1 - 0.995)
    for key, value in trainer.model.tuned.items():
        torch.testing.assert_close(value, average[key], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["draft-lv", "flowbp-lagrange"])
def test_memory_settings_leave_the_gradient_as_it_is(name, tmp_path):
    overrides = [f"method.name={name}", "data.batch_size=3", "optimizer.max_grad_norm=1e9", "steps=1"]
    trainer = Trainer(tiny(tmp_path, *overrides))
    gradients = []
    for memory in (
        {},
        {"reward_batch": 1},
        {"reward_batch": 2, "recompute": "never"},
        {"reward_batch": 4, "nodes_per_forward": 2},
    ):
        trainer.config = trainer.config.model_copy(update={"memory": MemoryConfig(**memory)})
        trainer.recompute = Recompute(trainer.config.memory.recompute)
        trainer.accumulate_gradient(0, 0)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters.values() if p.grad is not None]))
        trainer.optimizer.zero_grad()
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


def test_each_copy_of_each_sample_has_noise_and_perturbations_of_its_own(tmp_path, monkeypatch):
    trainer = Trainer(tiny(tmp_path, "method={name: draft-lv, num_renoised: 2}", "rollout.num_steps=2"))
    score, noise, noises, seeds, seeds_of_noise = trainer.rewards.score, trainer.model.backbone.noise, [], [], set()

    def drawn(height, width, generators):
        seeds_of_noise.update(generator.initial_seed() for generator in generators)
        return noise(height, width, generators)

    def rolled(velocity, noise, sigmas, plan, renoise, *others):
        noises.extend(torch.cat([noise, *renoise]).flatten(1))
        return rollout(velocity, noise, sigmas, plan, renoise, *others)

    monkeypatch.setattr("flowbp.training.trainer.rollout", rolled)
    monkeypatch.setattr(trainer.model.backbone, "noise", drawn)
    trainer.rewards.score = lambda images, prompts, own: seeds.extend(own) or score(images, prompts, own)
    trainer.accumulate_gradient(0, 0)
    assert len(seeds) == len(set(seeds)) == len(noises) == 6
    assert seeds_of_noise and seeds_of_noise.isdisjoint(seeds), "a perturbation that is the noise of the sample"
    assert (torch.corrcoef(torch.stack(noises)) - torch.eye(6)).abs().max() < 0.2  # 4 standard errors of 512 values


def test_a_monitor_watches_each_sample_once_and_no_copy(tmp_path):
    trainer = Trainer(tiny(tmp_path, "method.name=draft-lv", "rollout.num_steps=2"))
    texts = [prompt.text for prompt in trainer.prompts.batch(0, 2)]
    for rows in (None, 1, 3):
        trainer.config = trainer.config.model_copy(update={"memory": MemoryConfig(reward_batch=rows)})
        watched = []
        trainer.watch = lambda images, texts: watched.extend(texts) or {}  # noqa: B023
        trainer.accumulate_gradient(0, 0)
        assert watched == texts


def test_each_micro_batch_of_each_step_has_the_next_prompts(tmp_path, monkeypatch):
    trainer, drawn = Trainer(tiny(tmp_path, "data.accumulate=2")), []
    monkeypatch.setattr("flowbp.training.trainer.bind_velocity", lambda _, texts, *__: drawn.extend(texts) or 1 / 0)
    for step, micro in ((0, 0), (0, 1), (1, 0), (1, 1)):
        with pytest.raises(ZeroDivisionError):
            trainer.accumulate_gradient(step, micro)
    assert drawn == [prompt.text for prompt in trainer.prompts.batch(0, 8)]


def test_each_process_drops_out_other_inputs(tmp_path, monkeypatch):
    trainer, seeds = Trainer(tiny(tmp_path, "tuning.dropout=0.3")), []
    trainer.model.ranks.size = 3
    monkeypatch.setattr("flowbp.training.trainer.bind_velocity", lambda *_: 1 / 0)
    for trainer.model.ranks.rank in range(3):
        with pytest.raises(ZeroDivisionError):
            trainer.accumulate_gradient(0, 0)
        seeds.append(torch.initial_seed())
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_lora_dropout_is_the_same_in_rollout_and_replay(checkpointing, tmp_path):
    gradients = []
    for recompute in ("never", "always"):
        overrides = [
            "tuning.dropout=0.3",
            f"memory.checkpointing={checkpointing}",
            f"memory.recompute={recompute}",
            "guidance.scale=2.0",
        ]
        trainer = Trainer(tiny(tmp_path, *overrides))
        trainer.accumulate_gradient(0, 0)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters.values() if p.grad is not None]))
        assert not trainer.model.backbone.denoiser.training
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()


@pytest.mark.parametrize(("plans", "agree"), [("shared", True), ("per_batch", False)])
def test_the_micro_batches_of_a_step_share_its_plan_unless_told_otherwise(plans, agree, tmp_path):
    trainer = Trainer(
        tiny(tmp_path, f"plans={plans}", "data.accumulate=3", "method={name: flowbp-sparse, num_active: 3}")
    )
    nodes = [[trainer.accumulate_gradient(step, micro)["nodes"] for micro in range(3)] for step in range(2)]
    assert all((own[0] == own[1] == own[2]) == agree for own in nodes) and nodes[0][0] != nodes[1][0]


def test_monitors_that_do_not_watch_the_training_score_all_the_same(tmp_path):
    """They leave memory between evaluations, and a missing one is found before the first step."""
    evaluated = ["evaluation={samples: 4, batch_size: 4, grid: 2}", "steps=1"]
    config = tiny(tmp_path, *evaluated, "evaluation.watch=false")
    train(config)
    assert "monitor" not in json.loads((config.output / "metrics.jsonl").read_text())
    assert "monitor" in {row["metric"] for row in json.loads((config.output / "evaluation.json").read_text())}
    assert not Trainer(config).monitors and Trainer(tiny(tmp_path, *evaluated)).monitors.keys() == {"monitor"}
    with pytest.raises(FileNotFoundError, match="monitors|clip"):
        Trainer(tiny(tmp_path, *evaluated, "evaluation.watch=false", f"evaluation.monitors.monitor.model={tmp_path}"))


def test_plans_a_sample_and_dropout_say_what_they_exclude(tmp_path):
    for override, message in (
        ("memory.recompute=never", "plans=stratified needs memory.recompute=always"),
        ("tuning.dropout=0.1", "plans=stratified needs tuning.dropout=0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(tmp_path, "plans=stratified", "memory.recompute=always", override)
    with pytest.raises(ValueError, match="needs memory.nodes_per_forward=1"):
        tiny(tmp_path, "tuning.dropout=0.1", "memory.nodes_per_forward=2")
    row = Trainer(tiny(tmp_path, "plans=stratified", "memory.recompute=always")).step(0)
    assert np.isfinite(row["grad_norm"]) and any(isinstance(node, tuple) for node in row["nodes"])


def test_clipping_bounds_each_sample_and_leaves_small_ones():
    g = torch.tensor([[3.0, 4.0], [0.03, 0.04]])
    clipped = clip_samples(g, largest=1.0)
    assert (clipped.norm(dim=1) * 2).tolist() == pytest.approx([1.0, 0.1])
    assert clip_samples(g, None) is g


# -- folders ---------------------------------------------------------------------------------------------------------


def run_folder(config):
    """What a run of `config` leaves, without its weights."""
    RunFolder(config.output).open(config)
    (config.output / "metrics.jsonl").write_text('{"step": 1}\n')
    return {path.name: path.read_text() for path in config.output.iterdir()}


def test_a_folder_that_holds_a_run_is_not_touched_without_being_told(tmp_path):
    config, other = tiny(tmp_path), tiny(tmp_path, "seed=7")
    before = run_folder(other)
    with pytest.raises(FileExistsError, match="already holds a run: pass --resume to go on, --overwrite"):
        train(config)
    with pytest.raises(ValueError, match="keeps its config .*changes seed from 7 to 42"):
        train(config, resume=True)
    with pytest.raises(ValueError, match="exclude each other"):
        train(config, resume=True, overwrite=True)
    assert {path.name: path.read_text() for path in config.output.iterdir()} == before


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "years of work"},
        {"config.yaml": "another: program"},
        {"config.yaml": "[1", "metrics.jsonl": ""},
        {"config.yaml": "another: program", "metrics.jsonl": ""},
        {"config.yaml": "RUN", "thesis.tex": "a config that was copied to where one works"},
        {"config.yaml": "{output: a, backbone: {}, method: refl, reward: clip, data: {}}"},  # written by hand
    ],
)
def test_a_folder_of_other_files_is_never_deleted(files, tmp_path):
    config = tiny(tmp_path)
    config.output.mkdir()
    for name, text in files.items():
        (config.output / name).write_text(dump(config) if text == "RUN" else text)
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match="is not a run of flowbp"):
            train(config, **how)
    assert {path.name for path in config.output.iterdir()} == files.keys()


def test_a_run_that_is_overwritten_leaves_nothing_but_what_others_put_there(tmp_path):
    config = tiny(tmp_path)
    run_folder(config)
    for name in ("checkpoints/step-000001", "best/transformer", "validation", "tensorboard"):
        (config.output / name).mkdir(parents=True)
    for name in ("scores_before.csv", "samples_after.png", "report.html", "notes.txt"):
        (config.output / name).write_text("")
    (config.output / ".plan.png.a1b2c3d4.partial" / "half").mkdir(parents=True)
    RunFolder(config.output).open(config, overwrite=True)
    written = ["config.yaml", "environment.json", "metrics.jsonl", "notes.txt"]
    assert sorted(path.name for path in config.output.iterdir()) == written
    assert (config.output / "metrics.jsonl").read_text() == ""


class Killed(BaseException):
    pass


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_is_killed_while_it_starts_is_resumed_or_overwritten(overwrite, tmp_path, monkeypatch):
    """At every file operation, of which some lie between two files, and some within a folder that is removed."""
    config, folder, kill_at, killed = tiny(tmp_path), RunFolder(tmp_path / "run"), 0, True
    saved = config.output / "checkpoints"
    while killed:
        if overwrite:
            run_folder(config)
            for name in ("step-000001/parameters.safetensors", "step-000001/step.json"):
                (saved / name).parent.mkdir(parents=True, exist_ok=True)
                (saved / name).write_text('{"step": 1, "processes": 1}')
        left = kill_at

        def counted(operation, *arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return operation(*arguments, **options)

        with monkeypatch.context() as patch:
            for name in ("mkdir", "replace", "fsync", "unlink", "rmdir"):
                patch.setattr(os, name, partial(counted, getattr(os, name)))
            try:
                folder.open(config, overwrite)
                killed = False
            except Killed:
                kill_at += 1
        for how in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
            folder.check(config, **how)
        assert not saved.exists() or len(list(saved.glob("*/*"))) == 2
        remove(config.output)
    assert kill_at > 8


def test_bad_input_is_found_before_an_old_run_is_overwritten(tmp_path):
    config = tiny(tmp_path, "guidance.embedded=3.5")  # which this backbone does not read
    before = run_folder(tiny(tmp_path, "seed=7"))
    with pytest.raises(ValueError, match="set guidance.embedded to null"):
        train(config, overwrite=True)
    assert {path.name: path.read_text() for path in config.output.iterdir()} == before


def test_bad_input_leaves_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        train(tiny(tmp_path, "data.prompts=nowhere.txt"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("told", "taken"), [(None, 1), ("3", 3)])
def test_training_on_a_cpu_takes_one_thread_unless_told(told, taken, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("flowbp.training.run.run", lambda trainer, folder: seen.append(torch.get_num_threads()))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # as torch does where it is told so before it is loaded
    try:
        train(tiny(tmp_path))
        assert seen == [taken] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    config = tiny(tmp_path)
    before = run_folder(config)
    with RunFolder(config.output).locked():
        for how in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(FileExistsError, match="another process trains in .*run right now"):
                train(config, **how)
    assert {path.name: path.read_text() for path in config.output.iterdir()} == before


def test_a_folder_that_cannot_be_used_says_why(tmp_path, monkeypatch):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(FileExistsError, match="run is a file: choose another output="):
        train(tiny(tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # who runs as root may write anywhere
    with pytest.raises(PermissionError, match="cannot be written to: choose another output="):
        train(tiny(tmp_path / "locked"))


def saved_run(config):
    """A run with a checkpoint after its first step."""
    run_folder(config)
    trainer = Trainer(config)
    state = (trainer.model, trainer.optimizer, trainer.rewards)
    save_checkpoint(config.output, 1, *state)
    return latest_checkpoint(config.output), state


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_saves_its_last_whole_step_and_goes_on_exactly(number, tmp_path, monkeypatch):
    whole = tiny(tmp_path / "whole", "steps=3", "checkpoint_every=100")
    train(whole)
    config, step = tiny(tmp_path, "steps=3", "checkpoint_every=100"), Trainer.step

    def interrupted(self, index):
        if index == 1:
            os.kill(os.getpid(), number)
        return step(self, index)

    # A shell that starts the tests in the background lets them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        result = CliRunner().invoke(app, ["train", str(written(tmp_path / "config.yaml", dump(config)))])
    signal.signal(signal.SIGINT, before)
    assert result.exit_code == 128 + number, result.output
    assert f"2 steps are saved; to go on: flowbp train {config.output} --resume" in result.output.replace("\n", "")
    train(config, resume=True)
    expected, got = lora_file(whole.output), lora_file(config.output)
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_two_processes_stop_after_the_same_step_whichever_is_asked(tmp_path):
    small = ["data.batch_size=1", *SHORT, f"output={tmp_path / 'run'}"]
    options = ["evaluation=null", "steps=100000", "checkpoint_every=100000", "--processes", "2"]
    first = forked.Flowbp(["train", "demo", *small, *options], tmp_path / "said")
    try:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_text()):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.1)
        second = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()[-1]
        os.kill(int(second), signal.SIGTERM)
        said, errors = first.communicate(timeout=60)
    finally:
        first.kill()
    steps = len(metrics.read_text().splitlines())
    assert first.returncode == 128 + signal.SIGTERM and "Traceback" not in errors
    assert f"{steps} steps are saved; to go on: flowbp train {tmp_path / 'run'} --resume --processes 2" in said


def written(path, text):
    path.write_text(text)
    return path


def test_a_second_request_to_stop_interrupts_at_once_and_an_echo_of_the_first_does_not(monkeypatch):
    stop, clock = Stop(), iter([10.0, 10.5, 12.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    stop.hear(signal.SIGINT)
    stop.hear(signal.SIGTERM)
    assert stop.number == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        stop.hear(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with heard_by(interrupt):
        heard = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert heard == signal.SIG_IGN


def test_before_the_first_checkpoint_the_way_on_starts_as_many_processes(tmp_path, monkeypatch):
    run_folder(tiny(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert how_to_go_on(tmp_path / "run").endswith(" --resume --processes 2")


def test_sigterm_before_the_first_step_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "check", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    result = CliRunner().invoke(app, ["train", "demo", *TINY, f"output={tmp_path / 'run'}"])
    assert result.exit_code == 128 + signal.SIGTERM and "stopped. Nothing was trained yet" in result.output
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def broken_at(steps, monkeypatch, gradient=0.0):
    """Let all rewards be NaN at `steps`, which begin with 0. gradient: 0 as behind a hinge, or NaN."""
    scored, step = WeightedRewards.score, Trainer.step

    def take(self, index):
        self.rewards.broken = index in steps
        return step(self, index)

    def score(self, *arguments):
        scores = scored(self, *arguments)
        return scores * gradient + float("nan") if self.broken else scores

    monkeypatch.setattr(Trainer, "step", take)
    monkeypatch.setattr(WeightedRewards, "score", score)


@pytest.mark.parametrize("gradient", [0.0, float("nan")])
def test_a_run_whose_every_image_is_nan_ends_with_an_error(gradient, tmp_path, monkeypatch, caplog):
    broken_at(range(100), monkeypatch, gradient)
    config = tiny(tmp_path, "steps=99", "checkpoint_every=99", *SHORT)
    with pytest.raises(ValueError, match="^10 steps in a row had no finite reward or gradient.*last at step 10"):
        train(config)
    assert [record.getMessage()[:6] for record in caplog.records if "skipped" in record.getMessage()] == ["step 1"]
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (config.output / "metrics.jsonl").open()]
    assert len(rows) == 10 and all(row["skipped"] and row["reward"] is None for row in rows)
    assert latest_checkpoint(config.output).name == "step-000010"
    with pytest.raises(ValueError, match="^2 steps in a row"):
        train(tiny(tmp_path / "short", *SHORT))


def test_skipped_steps_are_counted_and_end_a_run_only_in_a_row(tmp_path, monkeypatch, capsys):
    broken_at([0, 2], monkeypatch)
    monkeypatch.setattr("flowbp.training.run.SKIPPED", 2)
    config = tiny(tmp_path, "steps=3", *SHORT)
    train(config)
    assert [row["skipped"] for row in RunFolder(config.output).metrics()] == [True, False, True]
    assert "2 of 3 steps, which had no finite reward or gradient" in (config.output / "report.html").read_text()
    assert ", 2 skipped" in capsys.readouterr().err


def test_a_step_without_gradient_is_told_and_counted(tmp_path, caplog, capsys):
    config = tiny(tmp_path, "reward.hinge=-10", *SHORT)
    train(config)
    told = [line for line in caplog.messages if "no gradient" in line]
    assert len(told) == 1 and told[0].startswith("step 1 has no gradient: every sample is dropped or beyond its hinge")
    assert "2 of 2 steps, every sample of which was dropped" in (config.output / "report.html").read_text()
    assert ", 2 without gradient" in capsys.readouterr().err


def test_what_a_checkpoint_remembers_must_be_whole_or_gone(tmp_path, caplog):
    watched = ["evaluation={prompts: 'shapes:test', samples: 4, grid: 1, every: 1, validation_samples: 4}"]
    config = load("demo", [*TINY[:-1], f"output={tmp_path / 'run'}", *SHORT, *watched])
    train(config)
    metrics, first = config.output / "metrics.jsonl", config.output / "validation/step-000001.safetensors"
    expected = {file: file.read_bytes() for file in (metrics, first)}
    for file, content in expected.items():
        joined = content.replace(b"\n" if file == metrics else b"}", b"", 1)
        for damaged in (content.replace(b"1", b"2", 1), joined, content[: content.find(b"\n") // 2]):
            file.write_bytes(damaged)
            with pytest.raises(OSError, match=f"{file} is damaged"):
                train(config, resume=True)
            file.write_bytes(content)
    first.unlink()
    train(config, resume=True)
    assert f"{first} is gone: the run goes on without what it held" in caplog.messages


def test_the_metrics_that_a_checkpoint_remembers_are_on_the_disk(tmp_path, monkeypatch):
    config, seen, fsync = tiny(tmp_path), [], os.fsync
    run_folder(config)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: seen.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle))
        RunFolder(config.output).record(config)
    assert seen == [str(config.output / "metrics.jsonl")]


def test_without_a_checkpoint_nothing_that_was_validated_is_kept(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (0, 1):
        folder.keep_validation(step, {"reward": np.zeros(2)})
    folder.forget_after(0)
    assert folder.validations() == {}


@pytest.mark.parametrize("name", ["parameters.safetensors", "state.pt", "step.json"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_damaged_checkpoint_is_named(name, share, tmp_path):
    folder, state = saved_run(tiny(tmp_path))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(OSError, match=r"checkpoint .*step-000001 is damaged \(.*\): delete it"):
        load_checkpoint(folder, *state)


def test_no_flipped_bit_of_a_checkpoint_goes_unseen(tmp_path):
    folder, state = saved_run(tiny(tmp_path))
    for file in folder.iterdir():
        content = file.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1}:
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(OSError, match="step-000001 is damaged"):
                load_checkpoint(folder, *state)
        file.write_bytes(content)
    assert load_checkpoint(folder, *state) == 1


@pytest.mark.parametrize("damaged", ["state.pt", "step.json"])
def test_where_the_newest_checkpoint_is_damaged_the_one_before_it_is_used(damaged, tmp_path, caplog):
    config = tiny(tmp_path, "steps=3", *SHORT)
    train(config)
    expected, rows = lora_file(config.output), RunFolder(config.output).metrics()
    older, newest = sorted((config.output / "checkpoints").iterdir())
    (newest / damaged).write_bytes(b"")
    train(config, resume=True)
    assert any("step-000003 is damaged" in line and "The one before it is used" in line for line in caplog.messages)
    got, again = lora_file(config.output), RunFolder(config.output).metrics()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    for folder in (older, newest):
        (folder / damaged).write_bytes(b"")
    with pytest.raises(OSError, match="step-00000. is damaged .*: delete it"):
        train(config, resume=True)


def test_the_last_two_checkpoints_are_kept_and_nothing_of_others_is_one(tmp_path):
    trainer, saved = Trainer(tiny(tmp_path)), tmp_path / "checkpoints"
    own = [
        "step-best",
        "step-7",
        "step-0000007",
        "step-000009.tar.gz",
        "step-000005 (copy)",
        ".step-000001.a1b2c3d4.partial/half",
    ]
    for name in own:
        (saved / name).mkdir(parents=True)
    (saved / "step-000008").touch()
    for step in (3, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, trainer.model, trainer.optimizer, trainer.rewards)
        assert latest_checkpoint(tmp_path).name == f"step-{step:06d}"
    kept = {"step-000008", "step-999999", "step-1000000", *own[:-1]}
    assert {path.name for path in saved.iterdir()} == kept
    config = tiny(tmp_path / "other")
    RunFolder(config.output).open(config)
    (config.output / "validation").mkdir()
    (config.output / "validation" / "step-best.safetensors").touch()
    assert RunFolder(config.output).validations() == {}


def test_a_run_goes_on_under_keys_that_are_newer_than_it(tmp_path):
    config = tiny(tmp_path)
    folder, _ = saved_run(config)
    about = json.loads((folder / "step.json").read_text())
    about["config"] = yaml.safe_load(dump(config))

    def check():
        (folder / "step.json").write_text(json.dumps(about))
        seal(folder)
        RunFolder(config.output).check(config, True, False, 1)

    about["config"]["backbone"]["attention"] = "native"
    with pytest.raises(ValueError, match="changes backbone.attention from native to auto"):
        check()
    del about["config"]["backbone"]["attention"]
    check()


def test_a_resumed_run_has_as_many_processes(tmp_path):
    config = tiny(tmp_path)
    folder, _ = saved_run(config)
    (folder / "step.json").write_text('{"step": 1, "processes": 8}')
    seal(folder)
    with pytest.raises(ValueError, match="step-000001 is of 8 processes, and this run has 1: .* Start 8"):
        train(config, resume=True)


def test_loading_weights_from_nowhere_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass the folder of a finished run"):
        load_weights(load_backbone("shapes", max_sequence_length=1), tmp_path)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no model_index.json"):
        load_backbone(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "LTXPipeline"}')
    with pytest.raises(ValueError, match="no backbone for LTXPipeline"):
        load_backbone(str(tmp_path))


# -- evaluation and report -------------------------------------------------------------------------------------------


def test_a_paired_interval_excludes_zero_only_for_a_real_change():
    rng = np.random.default_rng(0)
    prompts, seeds = [Prompt(str(i), "ab"[i % 2]) for i in range(500)], list(range(500))
    luck = rng.normal(size=500)
    before = Scores(prompts, seeds, {"reward": luck, "checker": luck})
    after = Scores(
        prompts,
        seeds,
        {"reward": luck + 0.1 + 0.1 * rng.normal(size=500), "checker": luck + 0.1 * rng.normal(size=500)},
    )
    real, none = (row for row in compare(before, after) if row["category"] == "all")
    assert 0 < real["low"] < real["change"] < real["high"] and real["p_value"] < 0.001
    assert none["low"] < 0 < none["high"] and none["p_value"] > 0.05
    # the luck of a seed cancels in pairs
    assert real["high"] - real["low"] == pytest.approx(2 * 1.96 * 0.1 / 500**0.5, rel=0.1)
    with pytest.raises(ValueError, match="same prompts and seeds"):
        compare(before, Scores(prompts, seeds[::-1], after.values))


def test_the_same_seed_gives_the_same_image_in_any_batch():
    backbone, size = load_backbone("shapes", max_sequence_length=1), load("demo").rollout
    seeds = sample_seeds(5, count=3)
    texts = ["a red circle", "two blue stars", "a green square"]
    together = evaluation.generate(backbone, texts, seeds, size, Guidance())
    alone = evaluation.generate(backbone, texts[1:2], seeds[1:2], size, Guidance())
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-4)


def test_smoothing_keeps_a_constant_reward_and_reaches_the_pixels():
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    flat = torch.full((2, 3, 32, 32), 0.25)
    of = partial(smoothed, lambda x, _: x.mean(dim=(1, 2, 3)), Smoothing(4, 1, 0.0), prompts=[], seeds=[0, 1])
    torch.testing.assert_close(of(flat), torch.tensor([0.25, 0.25]))
    of(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_clip_reward_is_differentiable_at_any_size_and_independent_of_the_batch():
    reward = load_reward("clip", "shapes")
    texts = ["a red circle", "two blue stars"]
    for shape in ((32, 32), (48, 64)):
        images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        scores = reward(images, texts)
        assert scores.shape == (2,) and scores.abs().max() <= 1
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(reward(images[1:], texts[1:])[0], scores[1], rtol=1e-4, atol=1e-5)


def test_the_command_line_trains_reports_and_samples(tmp_path):
    run = tmp_path / "run"
    overrides = [*TINY[:-1], f"output={run}", "evaluation.samples=12", "evaluation.grid=4"]
    cli = CliRunner()
    result = cli.invoke(app, ["train", "demo", *overrides])
    assert result.exit_code == 0, result.output
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "pytorch_lora_weights.safetensors",
        "samples_before.png",
        "samples_after.png",
        "plan.png",
        "evaluation.json",
        "scores_before.csv",
        "scores_after.csv",
        "report.html",
    ):
        assert (run / name).stat().st_size > 0, name
    assert list(run.glob("tensorboard/**/events.*"))
    page = (run / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "the page must stand alone"
    metrics = {row["metric"] for row in json.loads((run / "evaluation.json").read_text())}
    assert metrics == {"reward", "monitor", "checker", "saturation", "high_frequency"}, (
        "one image a prompt has no diversity"
    )
    assert yaml.safe_load((run / "config.yaml").read_text())["steps"] == 2

    picture = tmp_path / "drawn.png"
    result = cli.invoke(
        app, ["sample", str(run / "config.yaml"), "a red circle", "--weights", str(run), "--out", str(picture)]
    )
    assert result.exit_code == 0 and picture.stat().st_size > 0, result.output


@pytest.mark.parametrize("name", METHODS)
def test_plan_command_prints_and_draws_every_method(name, tmp_path):
    result = CliRunner().invoke(app, ["plan", name, "--steps", "25", "--png", str(tmp_path / "plan.png")])
    assert result.exit_code == 0 and "active" in result.output and (tmp_path / "plan.png").stat().st_size > 0


def test_doctor_names_versions_and_kernels():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0 and "torch" in result.output and "reference" in result.output
