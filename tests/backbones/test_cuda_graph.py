"""`backbone.cuda_graph`: a run whose passes without gradient are replays on recorded buffers computes the same bits."""

from functools import partial

import pytest
import torch
from recorded_graph import Recorder

import flowbp_kernels
from flowbp.backbones import load_backbone
from flowbp.config import ConfigError, load
from flowbp.evaluation.scores import generate
from flowbp.training.trainer import Trainer
from flowbp_kernels.graphed import GraphedForward

SHORT = ["data.batch_size=2", "rollout.num_steps=3", "evaluation=null", "ema=0.5"]


@pytest.fixture
def recorder(monkeypatch):
    capture = Recorder()
    monkeypatch.setattr(flowbp_kernels, "GraphedForward", partial(GraphedForward, capture=capture, device_type="cpu"))
    return capture


def outcome(tmp_path, *overrides):
    """What two steps of a run log and leave, and images by its last and its first weights.

    No weight changes its place in memory meanwhile: a graph reads the place that it was recorded with, and the stand-in
    would read another.
    """
    config = load("demo", [f"output={tmp_path / 'run'}", *SHORT, *overrides])
    trainer = Trainer(config)
    places = {name: p.data_ptr() for name, p in trainer.model.backbone.denoiser.named_parameters()}
    rows = [trainer.step(step) for step in range(2)]
    rows = [{k: v for k, v in row.items() if not k.endswith(("seconds", "_mb"))} for row in rows]
    model, images = trainer.model, []
    for weights in (model.masters, model.base):
        with model.using(weights) as backbone:
            assert places == {name: p.data_ptr() for name, p in backbone.denoiser.named_parameters()}
            images.append(generate(backbone, ["a red circle"], [7], config.evaluation_rollout, config.guidance))
    return rows, [*model.masters.values(), *images]


def test_steps_and_images_of_every_class_have_the_same_bits(backbone_overrides, recorder, tmp_path):
    """Weights are stepped, averaged and swapped in place, so that a graph of the first step serves all later ones."""
    scale = 1.0 if "Flux" in backbone_overrides[0] and "Klein" not in backbone_overrides[0] else 3.0
    overrides = [*backbone_overrides, f"guidance.scale={scale}", "optimizer.lr=0.01"]
    graphs = "backbone.cuda_graph=true"
    if "ZImage" in backbone_overrides[0]:
        with pytest.raises(ValueError, match="shapes in ZImagePipeline depend on the lengths of prompts: set backbone"):
            outcome(tmp_path, *overrides, graphs)
        return
    rows, tensors = outcome(tmp_path, *overrides)
    same_rows, same_tensors = outcome(tmp_path, *overrides, graphs)
    assert same_rows == rows and all(map(torch.equal, same_tensors, tensors))
    assert not torch.equal(tensors[-1], tensors[-2])  # two steps changed the image
    assert 1 <= len(recorder.pools) <= 4  # of two batch sizes, with both branches or with one of two


def test_without_a_gpu_a_warning_says_that_it_has_no_effect(caplog):
    backbone = load_backbone("shapes", max_sequence_length=1, cuda_graph=True)
    assert "backbone.cuda_graph=true has no effect: torch sees no CUDA device" in caplog.text
    assert backbone.velocity.__wrapped__.__self__ is backbone


@pytest.mark.parametrize(
    "other",
    ["tuning.dropout=0.1", "memory={checkpointing: true, offload: blocks}", "memory.shard=all", "anchor={weight: 0.1}"],
)
def test_what_a_graph_would_not_repeat_is_refused_by_name(other):
    with pytest.raises(ConfigError, match=f"backbone.cuda_graph=true with {other.partition('=')[0]}"):
        load("demo", ["backbone.cuda_graph=true", other])
