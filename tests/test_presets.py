"""The published runs: every number of the table that was published, and that each composed preset builds."""

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from flowbp.active_sets import DirichletPair, UniformPair, reverse_bounds
from flowbp.cli import app
from flowbp.config import load
from flowbp.guidance import Guidance
from flowbp.methods import DRaFTLV, DRTune, FlowBPBridge, FlowBPLagrange, FlowBPSparse, LeapAlign, ReFL

SD3, FLUX, KLEIN = "sd3.5-medium", "flux.1-dev", "flux.2-klein-base-9b"


def lagrange(tau, rescale, **fields):
    pairs = fields.pop("pairs", DirichletPair((2.5, 6, 2)))
    return FlowBPLagrange(3, 0.1, tau, rescale, "midpoint", 2, 0.25, "lagrange", 1.0, pairs, **fields)


# Typed from the published table, row by row: (method, batch per GPU) on SD3.5-M, FLUX.1-dev, FLUX.2-klein-base-9B.
PUBLISHED = {
    "refl": [(ReFL(11), 8), (ReFL(11), 4), (ReFL(11), 4)],
    "draft-lv": [(DRaFTLV(2), 4), (DRaFTLV(2), 4), (DRaFTLV(2), 2)],
    "drtune": [(DRTune(3, 0.4), 8), (DRTune(3, 0.4), 4), (DRTune(3, 0.4), 4)],
    "leapalign": [(LeapAlign(0.3, 0.1), 8), (LeapAlign(0.3, 0.1), 8), (LeapAlign(0.3, 0.1), 4)],
    "flowbp-sparse": [(FlowBPSparse(4, 1, 0.5), 8), (FlowBPSparse(3, 2, 1), 4), (FlowBPSparse(4, 2, 0), 4)],
    "flowbp-bridge": [(FlowBPBridge(5, 4, 0, 0.5), 8), (FlowBPBridge(5, 2, 1, 0.1), 8), (FlowBPBridge(3, 4, 0.5, 1), 4)],
    "flowbp-lagrange": [
        (lagrange(0.2, 0.0, pairs=DirichletPair((2.5, 6, 2), max_j_rev=10)), 8),
        (lagrange(0.2, 0.5), 8),
        (lagrange(0.1, 0.0, tail_ratio=0.7), 4),
    ],
}
RUNS = [(backbone, name, *row) for name, rows in PUBLISHED.items() for backbone, row in zip((SD3, FLUX, KLEIN), rows, strict=True)]


@pytest.mark.parametrize(("backbone", "name", "method", "batch"), RUNS)
def test_a_preset_has_every_published_number(backbone, name, method, batch):
    run = load(f"{backbone}/{name}")
    assert run.method == method and run.data.batch_size == batch and run.backbone.name == backbone
    scale = {SD3: {"scale": 3.5}, FLUX: {"embedded": 4.0}, KLEIN: {"scale": 4.0}}[backbone]
    assert run.guidance == Guidance(
        **scale, detach_negative=(backbone, name) != (SD3, "leapalign"), compensate=(backbone, name) == (KLEIN, "flowbp-lagrange")
    )
    assert (run.rollout.num_steps, run.rollout.height, run.rollout.width) == (25, 512, 512)
    options = run.optimizer
    assert (options.lr, options.betas, options.eps, options.weight_decay) == (1e-5, (0.9, 0.999), 1e-8, 1e-4)
    assert (options.name, options.warmup, options.max_grad_norm, options.max_sample_grad_norm) == ("adamw", 0, 1.0, None)
    assert (run.steps, run.ema, run.seed) == (300, 0.995, 42)
    assert (run.backbone.dtype, run.tuning.mode, run.tuning.master_weights) == ("bfloat16", "full", False)
    assert (run.memory.checkpointing, run.memory.shard) == (True, True)
    assert (run.reward["reward"].name, run.reward["reward"].hinge) == ("hpsv2", 0.55)
    assert (run.evaluation.samples, run.evaluation.seed) == (400, 42)
    assert run.evaluation_rollout.num_steps == (40 if backbone == SD3 else 50) and run.evaluation_rollout.height == 512


@pytest.mark.parametrize(("backbone", "name", "method", "batch"), RUNS)
def test_a_preset_draws_plans(backbone, name, method, batch):
    sigmas = np.append(np.linspace(1, 1 / 25, 25), 0.0)
    plan = load(f"{backbone}/{name}").method.plan(sigmas, np.random.default_rng(0))
    plan.check(25)


def test_the_default_pair_range_is_the_published_one():
    assert reverse_bounds(UniformPair(), 25, 0, 2) == reverse_bounds(UniformPair(min_rev=1, max_rev=26), 25, 0, 2) == (1, 26)


def test_overrides_lie_over_a_preset():
    run = load(f"{SD3}/flowbp-sparse", ["method.late_bias=3", "guidance.scale=1", "method.rescale=0"])
    assert run.method == FlowBPSparse(4, 3, 0) and run.guidance == Guidance()
    assert load(f"{SD3}/flowbp-sparse").method == FlowBPSparse(4, 1, 0.5)  # the preset itself is as it was


def test_presets_are_listed_and_printed():
    listed = CliRunner().invoke(app, ["presets"], env={"COLUMNS": "250"})
    assert listed.exit_code == 0 and all(f"{backbone}/{name}" in listed.output for backbone, name, *_ in RUNS) and "demo" in listed.output
    printed = CliRunner().invoke(app, ["presets", f"{FLUX}/leapalign"])
    values = yaml.safe_load(printed.output)
    assert values["method"]["name"] == "leapalign" and values["output"] == f"runs/{FLUX}/leapalign" and values["ema"] == 0.995
