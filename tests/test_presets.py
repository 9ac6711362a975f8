"""The published runs: each preset, resolved, against every value of the released configuration and code
(`released.yaml`).
"""

import inspect
from pathlib import Path

import numpy as np
import pytest
import yaml
from diffusers import Flux2KleinPipeline
from typer.testing import CliRunner

from flowbp.active_sets import UniformPair, reverse_bounds
from flowbp.cli.commands import app
from flowbp.config import changed, describe, load
from flowbp.guidance import Guidance
from flowbp.methods import FlowBPSparse, LeapAlign
from flowbp.presets import cards, names

RELEASED = yaml.safe_load((Path(__file__).parent / "released.yaml").read_text())
RUNS = RELEASED["runs"]

EQUAL = {  # released key -> the value of the preset
    "model.gradient_checkpointing": lambda run: run.memory.checkpointing,
    "model.master_weight_type": lambda run: {"bfloat16": "bf16"}[run.backbone.dtype],
    "model.use_ema": lambda run: run.ema is not None,
    "model.ema_decay": lambda run: run.ema,
    "train.seed": lambda run: run.seed,
    "train.train_batch_size": lambda run: run.data.batch_size,
    "train.gradient_accumulation_steps": lambda run: run.data.accumulate,
    "train.max_train_steps": lambda run: run.steps,
    "train.checkpointing_steps": lambda run: run.checkpoint_every,
    "optimizer.learning_rate": lambda run: run.optimizer.lr,
    "optimizer.weight_decay": lambda run: run.optimizer.weight_decay,
    "optimizer.lr_warmup_steps": lambda run: run.optimizer.warmup,
    "optimizer.max_grad_norm": lambda run: run.optimizer.max_grad_norm,
    "distributed.fsdp_sharding_startegy": lambda run: (
        "full" if run.memory.shard and run.memory.shard_gradients else "none"
    ),
    "sampling.h": lambda run: run.rollout.height,
    "sampling.w": lambda run: run.rollout.width,
    "sampling.rollout_steps": lambda run: run.rollout.num_steps,
    "sampling.sampling_steps": lambda run: run.rollout.num_steps,
    "sampling.cfg_guidance": lambda run: run.guidance.embedded or run.guidance.scale,
    "reward.use_hpsv2": lambda run: run.reward["reward"].name == "hpsv2",
    "reward.loss_relu_clip": lambda run: run.reward["reward"].hinge,
    "reward.loss_grad_scale": lambda run: run.reward["reward"].weight,
    "flowbp.min_idx": lambda run: reverse_bounds(run.method.pairs, 25, 0, 2)[0],
    "flowbp.max_idx": lambda run: reverse_bounds(run.method.pairs, 25, 0, 2)[1],
    "flowbp.train_step_tail_ratio": lambda run: run.method.tail_ratio,
    "flowbp.alpha": lambda run: run.method.alpha,
    "flowbp.tau": lambda run: run.method.tau,
    "flowbp.jk_sampling_mode": lambda run: describe(run.method.pairs)["name"],
    "flowbp.jk_dirichlet_alpha_a": lambda run: run.method.pairs.alpha[0],
    "flowbp.jk_dirichlet_alpha_b": lambda run: run.method.pairs.alpha[1],
    "flowbp.jk_dirichlet_alpha_c": lambda run: run.method.pairs.alpha[2],
    "flowbp.jk_dirichlet_max_j_rev": lambda run: run.method.pairs.max_j_rev,
    "refl.last_n_steps": lambda run: run.method.last_n,
    "draft_lv.num_noised_samples": lambda run: run.method.num_renoised,
    "drtune.num_train_steps": lambda run: run.method.num_active,
    "drtune.early_stop_ratio": lambda run: run.method.early_stop_ratio,
    "drtune.early_stop_steps": lambda run: run.method.early_stop_steps,
    "flowbp_sparse.num_active_steps": lambda run: run.method.num_active,
    "flowbp_sparse.late_bias": lambda run: run.method.late_bias,
    "flowbp_sparse.grad_rescale": lambda run: run.method.rescale,
    "flowbp_bridge.alpha": lambda run: run.method.alpha,
    "flowbp_lagrange.alpha": lambda run: run.method.alpha,
    "flowbp_lagrange.tau": lambda run: run.method.tau,
    "flowbp_lagrange.connector_order": lambda run: run.method.order,
    "flowbp_lagrange.grad_support_mode": lambda run: run.method.active,
    "flowbp_lagrange.grad_support_scale": lambda run: run.method.support_scale,
    "flowbp_lagrange.max_active_supports": lambda run: run.method.max_active,
    "flowbp_lagrange.grad_rescale": lambda run: run.method.rescale,
    "flowbp_lagrange.weight_scheme": lambda run: run.method.weights,
    "flowbp_lagrange.anchor_lambda": lambda run: run.method.anchor,
    "flux2.cfg_detach_neg": lambda run: run.guidance.detach_negative,
    "flux2.cfg_grad_norm_compensate": lambda run: run.guidance.compensate,
    "flux2.max_sequence_length": lambda run: run.backbone.max_sequence_length,
    "flux2.text_encoder_out_layers": lambda run: list(
        inspect.signature(Flux2KleinPipeline.encode_prompt).parameters["text_encoder_out_layers"].default
    ),
    "flux2.use_precomputed_embeds": lambda run: run.data.embeddings == "cached",
    "eval.num_imgs_per_prompt": lambda run: run.evaluation.samples / 400,
    "eval.seed": lambda run: run.evaluation.seed,
    "eval.num_steps": lambda run: run.evaluation_rollout.num_steps,
    "eval.guidance_scale": lambda run: run.guidance.embedded or run.guidance.scale,
    "eval.reward_fn.hpsv2": lambda run: [reward.name for reward in run.reward.values()].count("hpsv2"),
    "eval.reward_fn.clipscore": lambda run: [monitor.name for monitor in run.evaluation.monitors.values()].count(
        "clip"
    ),
    "eval.reward_fn.pickscore": lambda run: [monitor.name for monitor in run.evaluation.monitors.values()].count(
        "pickscore"
    ),
    "eval.reward_fn.imagereward": lambda run: [monitor.name for monitor in run.evaluation.monitors.values()].count(
        "imagereward"
    ),
    "noise levels": lambda run: {"published": "linspace(1, 1/N, N)"}[run.rollout.sigmas],
    "dtype of weights, moments and average": lambda run: "float32" if run.tuning.master_weights else run.backbone.dtype,
    "dtype that the network computes in": lambda run: run.backbone.dtype,
    "dtype of latents between network calls": lambda run: (
        run.backbone.dtype if run.backbone.precision == "pipeline" else "float32"
    ),
    # All pipelines but that of SD3.5 round it to bfloat16 themselves.
    "dtype of 1000 sigma": lambda run: run.rollout.timesteps if run.backbone.name == "sd3.5-medium" else "bfloat16",
    "betas": lambda run: list(run.optimizer.betas),
    "eps": lambda run: run.optimizer.eps,
    "text tokens": lambda run: run.backbone.max_sequence_length,
    "generator of the index draws": lambda run: {"shared": "one seed on every rank"}[run.plans],
}
SHOWN = {  # released key -> the test that shows it
    "dtype that gradients are reduced in": "float32 when sharded too: distributed/test_ranks.py",
    "decay of the average": "test_trainer.py: the moving average is a lerp of constant decay from the first step on",
    "loss": "test_golden.py: value, residuals and gradients match the released code",
}
DIFFERENT = {  # released key -> why the preset has another value, or none
    "train.train_sp_batch_size": "no sequence parallelism, in the released runs either (sp_size 1)",
    "train.allow_tf32": "of products in float32 there are those of the reward tower alone, which are kept exact",
    "distributed.sp_size": "no sequence parallelism, in the released runs either",
    "data.num_latent_t": "frames of a video; an image has one",
    "data.cfg": "share of prompts dropped in training: none",
    "data.dataloader_num_workers": "embeddings are read from disk as they are needed; no result depends on it",
    "sampling.sampler_seed": "the order of prompts is drawn from `seed`",
    "flowbp.select_idx_seed": "indices are drawn from `seed`",
    "flowbp.jk_dirichlet_alpha": "stands in for alphas that are not given, and all three are",
    "flowbp_lagrange.detach_history": "has no effect (golden/FORMAT.md)",
    "flowbp_lagrange.debug_connector": "prints",
    "flux2.caption_key": "names a column of the released preprocessing",
    "eval.evaluation_interval": "before and after training; evaluation.every=50 evaluates in between, on fewer prompts",
    "eval.reward_fn.hpsv3": "7 billion parameters (docs/rewards.md): evaluation.monitors.hpsv3={name: hpsv3} adds it",
    "dtype of the reward tower": "float32: finer",
    "noise of training": "on the CPU, one generator a sample: the same on every device and for any number of processes",
    "noise of evaluation": "on the CPU, one generator a sample: the same for any device and number of processes",
    "prompts": "the file is the user's; the header of published.yaml says how it was made",
}


def released(name):
    """key -> value of everything that the released files, parsers and trainers say of a run."""
    values = {
        f"{section}.{key}": value
        for section, keys in RUNS[name].items()
        if section != "file"
        for key, (value, _) in keys.items()
    }
    sections = {key.split(".")[0] for key in values}
    defaults = {key: value for key, (value, _) in RELEASED["defaults"].items() if key.split(".")[0] in sections}
    code = {key: value for key, (value, _) in RELEASED["code"].items()}
    return defaults | values | code


def reads(name, key):
    """Whether the run's method, or its backbone, has this setting at all."""
    backbone, method = name.split("/")
    pairs = method in ("leapalign", "flowbp-bridge", "flowbp-lagrange")
    window = method.startswith("flowbp") or method == "leapalign"
    return {
        "flowbp.min_idx": pairs, "flowbp.max_idx": pairs, "flowbp.jk_sampling_mode": pairs,
        "flowbp.train_step_tail_ratio": window,
    }.get(key, True)  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_preset_has_every_released_value(name):
    run, values = load(name), released(name)
    assert not values.keys() - EQUAL.keys() - SHOWN.keys() - DIFFERENT.keys(), "neither compared nor explained"
    compared = {key: (value, EQUAL[key](run)) for key, value in values.items() if key in EQUAL and reads(name, key)}
    assert {key: pair for key, pair in compared.items() if pair[1] != pytest.approx(pair[0])} == {}
    assert run.method_name == name.split("/")[1] and run.backbone.name == name.split("/")[0]


@pytest.mark.parametrize("name", RUNS)
def test_evaluation_samples_as_the_pipeline_does(name):
    found = load(name).evaluation_rollout
    assert (found.timesteps, found.sigmas) == ("float32", "pipeline")


def test_no_row_is_explained_twice_or_for_nothing():
    keys = set().union(*map(released, RUNS)) | RELEASED["defaults"].keys()
    tables = [*EQUAL, *SHOWN, *DIFFERENT]
    assert len(set(tables)) == len(tables) and set(tables) == keys


@pytest.mark.parametrize("name", [name for name in names() if "/" in name])
def test_a_preset_draws_plans(name):
    sigmas = np.append(np.linspace(1, 1 / 25, 25), 0.0)
    load(name).method.plan(sigmas, np.random.default_rng(0)).check(25)


@pytest.mark.parametrize(
    ("reward", "alpha", "hinge"), [("hpsv2", 0.3, 0.55), ("pickscore", 0.1, 40.0), ("hpsv3", 0.1, 13.5)]
)
def test_leapaligns_own_recipe_is_its_papers(reward, alpha, hinge):
    run = load("flux.1-dev/leapalign-original" + ("" if reward == "hpsv2" else f"-{reward}"))
    assert run.method == LeapAlign(alpha, 0.1) and (run.reward["reward"].name, run.reward["reward"].hinge) == (
        reward,
        hinge,
    )
    assert (run.rollout.height, run.rollout.width, run.guidance) == (720, 720, Guidance(embedded=3.5))
    assert 16 * run.data.batch_size * run.data.accumulate == 64 and run.steps == 300
    monitors = {monitor.name for monitor in run.evaluation.monitors.values()}
    assert reward not in monitors  # it is trained on


def test_the_default_pair_range_is_the_published_one():
    assert (
        reverse_bounds(UniformPair(), 25, 0, 2)
        == reverse_bounds(UniformPair(min_rev=1, max_rev=26), 25, 0, 2)
        == (1, 26)
    )


def test_overrides_lie_over_a_preset():
    run = load("sd3.5-medium/flowbp-sparse", ["method.late_bias=3", "guidance.scale=1", "method.rescale=0"])
    assert run.method == FlowBPSparse(4, 3, 0) and run.guidance == Guidance()
    assert load("sd3.5-medium/flowbp-sparse").method == FlowBPSparse(4, 1, 0.5)  # the preset itself is as it was


def test_null_takes_a_monitor_away():
    assert load("sd3.5-medium/refl", ["evaluation.monitors.clip=null"]).evaluation.monitors.keys() == {
        "pickscore",
        "imagereward",
    }
    assert load("sd3.5-medium/refl", ["evaluation.monitors=null"]).evaluation.monitors == {}


@pytest.mark.parametrize("name", names())
def test_a_fast_preset_differs_in_the_sampler_and_in_what_memory_buys(name):
    slow, fast = (load(preset, ["output=runs/x"]) for preset in (name, f"{name}-fast"))
    assert load(f"{name}-fast").output == Path("runs", f"{name}-fast")
    differences = {"rollout.num_steps", "memory.recompute", "compile", "method.last_n", "evaluation.num_steps"}
    dumped = (run.model_dump(mode="json") for run in (slow, fast))
    assert differences >= changed(*dumped).keys() >= {"rollout.num_steps", "memory.recompute"}
    assert (fast.rollout.num_steps, fast.memory.recompute) == (8, "auto")
    assert fast.compile == ("inductor" if "/" in name and name not in cards() else None)
    assert fast.evaluation_rollout == slow.evaluation_rollout


def test_presets_are_listed_and_printed():
    listed = CliRunner().invoke(app, ["presets"], env={"COLUMNS": "250"})
    assert listed.exit_code == 0 and all(name in listed.output for name in names())
    printed = CliRunner().invoke(app, ["presets", "flux.1-dev/leapalign"])
    values = yaml.safe_load(printed.output)
    assert (
        values["method"]["name"] == "leapalign"
        and values["output"] == "runs/flux.1-dev/leapalign"
        and values["ema"] == 0.995
    )
