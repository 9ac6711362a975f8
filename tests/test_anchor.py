"""The anchor: its gradient is that of the penalty it names, and the network it compares with is the base model."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from toy import ToyField, toy_reward, toy_sigmas, toy_velocity

from flowbp.anchor import Anchor
from flowbp.config import load
from flowbp.estimate.estimate import estimate
from flowbp.guidance import Guidance
from flowbp.methods import METHODS, draw_plans
from flowbp.replay import Recompute
from flowbp.surrogate import backward, reward_input
from flowbp.training.trainer import Trainer
from flowbp.trajectory import rollout

GUIDANCES = {"none": Guidance(), "detached": Guidance(3.5), "both branches": Guidance(3.5, detach_negative=False)}
WEIGHT = 0.7


class Adapted(ToyField):
    """A toy network with an adapter, which `as_base` switches off."""

    on = True

    def layers(self, x, sigma, text):
        v = super().layers(x, sigma, text)
        return v + torch.tanh(x @ self.inner.T) @ self.outer.T if self.on else v

    @contextmanager
    def as_base(self):
        self.on = False
        yield
        self.on = True


def penalty(kind, v, base):
    """[B], written out."""
    if kind == "velocity":
        return WEIGHT * (v - base).square().mean(1)
    return WEIGHT * torch.relu(v.norm(dim=1) - base.norm(dim=1)).square() / v.shape[1]


def swept(name, kind, guidance, recompute="always", nodes_per_forward=1, plans="shared"):
    """(gradient of reward and penalty by the sweep, of the reward alone, of the penalty by autograd, drift)."""
    gradients, field = [], Adapted()
    method = METHODS[name](5) if name == "refl" else METHODS[name]()
    plan = draw_plans(method, toy_sigmas(12).numpy(), np.random.default_rng(5), 3, plans)
    noise, *renoise = torch.randn(3, 3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain = toy_velocity(field, guidance=guidance)
    anchor = Anchor(kind, WEIGHT, field.as_base)
    anchored = [replay for replay in plan.replays if not replay.gated]
    for velocity in (anchor.around(plain, len(anchored) * 3), plain):
        field.zero_grad()
        graphs = Recompute(recompute)
        trajectory = rollout(velocity, noise, toy_sigmas(12), plan, renoise[: plan.num_renoised], graphs)
        z = reward_input(plan, trajectory).requires_grad_()
        (g,) = torch.autograd.grad(toy_reward(z).mean(), z)
        backward(plan, trajectory, velocity.replay, g, nodes_per_forward=nodes_per_forward)
        gradients.append(field.gradient())

    field.zero_grad()
    branches = (
        [plain.positive, plain.negative] if guidance.active and not guidance.detach_negative else [plain.positive]
    )
    total, gaps = 0.0, []
    for replay in anchored:
        x, sigma = trajectory.latents[replay.node], trajectory.level(replay.node)
        for conditioning in branches:
            with torch.no_grad(), field.as_base():
                base = field(x, sigma, conditioning)
            v = field(x, sigma, conditioning)
            total = total + penalty(kind, v, base).sum() / (3 * len(anchored))
            gaps.append(((v - base).norm(dim=1) / base.norm(dim=1)).detach())
    total.backward()
    return *gradients, field.gradient(), (anchor.take_drift(), torch.cat(gaps).mean().item())


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
@pytest.mark.parametrize("kind", ["velocity", "norm"])
@pytest.mark.parametrize("name", METHODS)
def test_the_sweep_adds_the_gradient_of_the_penalty(name, kind, guidance):
    both, reward, pull, (drift, expected) = swept(name, kind, guidance)
    assert pull.norm() > 0
    torch.testing.assert_close(both, reward + pull, rtol=1e-9, atol=1e-12)
    assert drift == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "way", [("never", 1, "shared"), ("auto", 1, "shared"), ("always", 3, "shared"), ("always", 2, "stratified")]
)
def test_it_does_in_every_way_to_replay(way):
    both, reward, pull, _ = swept("flowbp-sparse", "velocity", Guidance(3.5), *way)
    torch.testing.assert_close(both, reward + pull, rtol=1e-9, atol=1e-12)


def test_the_penalty_falls_along_its_gradient_by_finite_differences():
    field, x = Adapted(), torch.randn(3, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    guided = toy_velocity(field)
    for kind in ("velocity", "norm"):
        velocity = Anchor(kind, WEIGHT, field.as_base).around(guided, 3).network
        field.zero_grad()
        v = velocity(x, torch.tensor(0.5), guided.positive)
        v.backward(torch.zeros_like(v))
        with torch.no_grad(), field.as_base():
            base = field(x, torch.tensor(0.5), guided.positive)
        direction = torch.randn(field.outer.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)

        def at(step, kind=kind, base=base, direction=direction):
            with torch.no_grad():
                field.outer += step * direction
                value = penalty(kind, field(x, torch.tensor(0.5), guided.positive), base).mean()
                field.outer -= step * direction
            return value

        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        assert (field.outer.grad * direction).sum() == pytest.approx(slope.item(), rel=1e-6)


def test_a_shorter_velocity_is_left_alone_by_norm_and_its_value_by_both():
    field = Adapted()
    x, guided = torch.zeros(3, 6, dtype=torch.float64), toy_velocity(field)  # where the adapter adds nothing
    for kind in ("velocity", "norm"):
        velocity = Anchor(kind, WEIGHT, field.as_base).around(guided, 3).network
        v = velocity(x, torch.tensor(0.5), guided.positive)
        assert torch.equal(v, field(x, torch.tensor(0.5), guided.positive))
        v.backward(torch.zeros_like(v))
        assert not field.gradient().any()


def test_a_plan_whose_only_node_is_an_open_bridge_is_refused():
    with pytest.raises(ValueError, match="only active node is an open bridge; let the method replay more nodes"):
        Anchor("velocity", 1.0, Adapted().as_base).around(toy_velocity(Adapted()), 0)


# -- in a run ----------------------------------------------------------------------------------------------------------

FULL = ["tuning.mode=full", "tuning.rank=16"]
TINY = ["data.batch_size=2", "evaluation=null", "optimizer.lr=1e-2"]


def trainer(tmp_path, *overrides):
    return Trainer(load("demo", [f"output={tmp_path / 'run'}", *TINY, *overrides]))


@pytest.mark.parametrize(
    "overrides",
    [["anchor={weight: 20}"], ["anchor={weight: 20, copy_base: true}", *FULL]],
)
def test_a_run_starts_without_drift_and_a_heavy_anchor_holds_it(overrides, tmp_path):
    held, free = trainer(tmp_path, *overrides), trainer(tmp_path, *overrides, "anchor.weight=1e-12")
    base = {name: value.clone() for name, value in held.model.base.items()}
    drifts = [[model.step(step)["drift"] for step in range(12)] for model in (held, free)]
    assert drifts[0][0] == drifts[1][0] == 0
    assert 0 < drifts[0][-1] < 0.7 * drifts[1][-1]
    assert all(torch.equal(held.model.base[name], value) for name, value in base.items())


def test_a_compiled_run_compiles_all_that_it_needs(tmp_path):
    torch._dynamo.reset()
    options = ["data.batch_size=2", "evaluation.samples=6", "evaluation.batch_size=4", "evaluation.num_steps=2"]
    run = Trainer(load("demo", [f"output={tmp_path / 'run'}", *options, "compile=eager", "anchor={weight: 1}"]))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        run.step(0)
        run.evaluator.score(run.model, run.model.tuned, run.evaluator.samples)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_as_base_the_network_is_the_one_that_the_run_started_from(mode, tmp_path):
    model = trainer(
        tmp_path, f"tuning.mode={mode}", "tuning.rank=16", f"anchor={{weight: 1, copy_base: {mode == 'full'}}}"
    ).model
    backbone, tuned = model.backbone, model.backbone.denoiser
    x, conditioning = torch.randn(1, 8, 8, 8), backbone.encode(["a red circle"])

    def velocity():
        with torch.no_grad():
            return backbone.velocity(x, torch.tensor(0.5), conditioning)

    start = velocity()
    for p in model.parameters.values():
        p.data += 0.1
    changed = velocity()
    with model.as_base():
        assert torch.equal(velocity(), start)
    assert backbone.denoiser is tuned and torch.equal(velocity(), changed) and not torch.equal(changed, start)
    assert all(p.requires_grad for p in model.parameters.values())
    with pytest.raises(RuntimeError, match="stop"), model.as_base():
        raise RuntimeError("stop")
    assert torch.equal(velocity(), changed)


@pytest.mark.parametrize(
    "overrides, says",
    [
        (
            [*FULL, "anchor={weight: 1}"],
            "compares with a frozen copy of all weights: set anchor.copy_base=true",
        ),
        (
            ["anchor={weight: 1, copy_base: true}"],
            "compares with the model without its adapter: set anchor.copy_base=false",
        ),
        (
            [*FULL, "anchor={weight: 1, copy_base: true}", "memory.shard=true"],
            "cannot copy sharded weights",
        ),
        (["anchor={weight: 0}"], "greater than 0"),
        (["anchor={kind: kl, weight: 1}"], "'velocity' or 'norm'"),
        (["anchor={}"], "anchor.weight"),
    ],
)
def test_an_anchor_that_means_nothing_is_refused(overrides, says):
    with pytest.raises(ValueError, match=says):
        load("demo", ["tuning.rank=16", *overrides])


def test_the_estimate_counts_its_passes_and_its_copy():
    more = ["method={name: flowbp-bridge, num_active: 4, alpha: 0.5}", "guidance={scale: 3, detach_negative: false}"]
    plain, anchored = (estimate(load("demo", [*more, *anchor])) for anchor in ([], ["anchor={weight: 1}"]))
    assert anchored.calls["anchor"] == 2 * (len(anchored.plans[0].replays) - 1)
    assert "anchor" not in plain.calls
    assert anchored.peak == plain.peak
    plain, anchored = (estimate(load("demo", [*FULL, *a])) for a in ([], ["anchor={weight: 1, copy_base: true}"]))
    network = plain.network.frozen_bytes + plain.network.trained_bytes
    assert anchored.peak - plain.peak == anchored.resident["base model"] == network > 4 * plain.network.parameters
