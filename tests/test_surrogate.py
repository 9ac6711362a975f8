"""The sweep: equal to its autograd graph for any plan, bounded in memory, sparing with network calls, and loud when
nothing is learned.
"""

import gc
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from autograd_graph import as_graph
from toy import ToyField, as_recompute, toy_reward, toy_rollout, toy_sigmas, toy_velocity

from flowbp.active_sets import stratified
from flowbp.guidance import Guidance, GuidedVelocity
from flowbp.methods import METHODS, FlowBPBridge, FlowBPSparse, LeapAlign, draw_plan, draw_plans
from flowbp.objective import Objective, loss_factors, reward_gradient, sample_weights
from flowbp.plan import Bridge, PlanBatch, PosteriorMean, Similarity, SurrogatePlan
from flowbp.quadrature import ORDERS, solver_table, weights_in
from flowbp.replay import Recompute, spare_bytes, weigh
from flowbp.surrogate import backward, residuals, reward_input
from flowbp.trajectory import rollout, rollout_with_graph
from flowbp_kernels.live_bytes import LiveBytes
from flowbp_kernels.sweep import record

GUIDANCES = {"none": Guidance(), "detached": Guidance(3.5), "both branches": Guidance(3.5, detach_negative=False)}


def sweep_gradient(
    plan, num_steps=12, guidance=Guidance(), recompute=None, nodes_per_forward=1, field=None, solver="euler"
):
    field = field or ToyField()
    trajectory = toy_rollout(field, plan, num_steps, guidance=guidance, recompute=recompute, solver=solver)
    z = reward_input(plan, trajectory).requires_grad_()
    (g,) = torch.autograd.grad(toy_reward(z).mean(), z)
    backward(plan, trajectory, toy_velocity(field, guidance=guidance).replay, g, nodes_per_forward=nodes_per_forward)
    assert not trajectory.kept
    return field.gradient()


def graph_gradient(plan, num_steps=12, guidance=Guidance(), graph=as_graph, solver="euler"):
    field = ToyField()
    trajectory = toy_rollout(field, plan, num_steps, guidance=guidance, solver=solver)
    z = graph(plan, trajectory, toy_velocity(field, guidance=guidance).replay)
    assert torch.equal(z, reward_input(plan, trajectory))
    toy_reward(z).mean().backward()
    return field.gradient()


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
@pytest.mark.parametrize("name", METHODS)
def test_sweep_matches_autograd_graph(name, guidance):
    plan = (
        METHODS[name]().plan(toy_sigmas(12).numpy(), np.random.default_rng(5))
        if name != "refl"
        else METHODS[name](5).plan(toy_sigmas(12).numpy(), np.random.default_rng(5))
    )
    swept = sweep_gradient(plan, guidance=guidance)
    for graph in (as_graph, as_recompute):
        torch.testing.assert_close(swept, graph_gradient(plan, guidance=guidance, graph=graph), rtol=1e-12, atol=1e-14)


def test_cotangents_of_a_bfloat16_reward_gradient_are_kept_in_float32():
    plan, (narrow, wide) = LeapAlign(alpha=1.0).at(toy_sigmas(12).numpy(), 2, 7), (ToyField(), ToyField())
    g = torch.randn(3, 6, generator=torch.Generator().manual_seed(3)).bfloat16()
    for field, seed in ((narrow, g), (wide, g.double())):
        backward(plan, toy_rollout(field, plan, 12), toy_velocity(field).replay, seed)
    torch.testing.assert_close(narrow.gradient(), wide.gradient(), rtol=1e-5, atol=1e-6)


def test_the_hook_before_the_last_backward_sees_the_noise_end_with_all_other_gradients_made():
    field, plan, seen = ToyField(), FlowBPSparse(3, rescale=0.0).at(toy_sigmas(12).numpy(), [1, 5, 8]), []
    trajectory = toy_rollout(field, plan, 12)
    g = torch.ones(3, 6, dtype=torch.float64)
    backward(plan, trajectory, toy_velocity(field).replay, g, before_last=lambda v: seen.append((v, field.gradient())))
    ((v, before),) = seen
    torch.testing.assert_close(
        v, toy_velocity(field)(trajectory.latents[1], trajectory.levels[1]), rtol=1e-12, atol=1e-14
    )
    assert before.any() and not torch.equal(before, field.gradient())


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
@pytest.mark.parametrize("name", ["flowbp-bridge", "flowbp-lagrange", "draft-lv"])
def test_every_way_to_recompute_gives_the_same_gradient(name, guidance):
    plan = METHODS[name]().plan(toy_sigmas(12).numpy(), np.random.default_rng(5))
    replayed = sweep_gradient(plan, guidance=guidance)
    for recompute, nodes_per_forward in (
        (Recompute("never"), 1),
        (Recompute("auto", 5000), 1),
        (None, 3),
        (Recompute("auto", 5000), 2),
    ):
        other = sweep_gradient(plan, guidance=guidance, recompute=recompute, nodes_per_forward=nodes_per_forward)
        torch.testing.assert_close(other, replayed, rtol=1e-12, atol=1e-14)


def test_one_step_of_everything_is_the_true_gradient():
    """With one step there is nothing to approximate: the surrogate is full backpropagation."""
    plan = FlowBPSparse(1, rescale=0.0).at(toy_sigmas(1).numpy(), [0])
    field = ToyField()
    noise = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    toy_reward(rollout_with_graph(toy_velocity(field), noise, toy_sigmas(1))).mean().backward()
    torch.testing.assert_close(sweep_gradient(plan, num_steps=1), field.gradient(), rtol=1e-12, atol=1e-14)


def test_two_steps_with_an_open_bridge_are_the_true_gradient():
    """Two Euler steps hold one Jacobian; a bridge with alpha = 1 chains exactly that one."""
    sigmas = toy_sigmas(2)
    h = torch.diff(sigmas).tolist()
    plan = SurrogatePlan((0, 1), h, h, bridge=Bridge(1, 1.0))
    field = ToyField()
    noise = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    toy_reward(rollout_with_graph(toy_velocity(field), noise, sigmas)).mean().backward()
    torch.testing.assert_close(sweep_gradient(plan, num_steps=2), field.gradient(), rtol=1e-12, atol=1e-14)


def detached_chain(solver, num_steps, bridge=None, alpha=0.0):
    """The gradient of the solver's own chain with every input of the network cut, but a share alpha of the bridge's."""
    field, sigmas, velocities = ToyField(), toy_sigmas(num_steps), []
    velocity, x = (
        toy_velocity(field),
        torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
    )
    for n, row in enumerate(solver_table(sigmas.numpy(), solver)):
        share = alpha if n == bridge else 0.0
        velocities.append(velocity(share * x + (1 - share) * x.detach(), sigmas[n]))
        x = x + sum(weight * v for weight, v in zip(row.tolist(), velocities, strict=False))
    toy_reward(x).mean().backward()
    return x.detach(), field.gradient()


@pytest.mark.parametrize("solver", ORDERS)
@pytest.mark.parametrize("bridge", [None, *range(8)])
def test_a_dense_plan_is_the_chain_of_its_solver(solver, bridge):
    """All steps active: the surrogate is the multistep chain with its network inputs cut, for every bridge."""
    sigmas = toy_sigmas(8).numpy()
    if bridge is None:
        plan = FlowBPSparse(8, rescale=0.0).at(sigmas, range(8), solver)
    else:
        plan = FlowBPBridge(8, rescale=0.0, alpha=0.7).at(sigmas, bridge, range(8), solver)
    sample, expected = detached_chain(solver, 8, bridge, 0.7)
    torch.testing.assert_close(toy_rollout(ToyField(), plan, 8, solver=solver).sample, sample, rtol=1e-12, atol=1e-14)
    for found in (sweep_gradient(plan, 8, solver=solver), graph_gradient(plan, 8, solver=solver)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    by_function = graph_gradient(plan, 8, graph=as_recompute, solver=solver)
    torch.testing.assert_close(by_function, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("solver", ["adams-2", "adams-3"])
def test_two_steps_of_a_multistep_solver_with_an_open_bridge_are_the_true_gradient(solver):
    table = solver_table(toy_sigmas(2).numpy(), solver)
    weights, through = weights_in(table, 2), weights_in(table, 1)
    plan = SurrogatePlan((0, 1), weights, weights, bridge=Bridge(1, 1.0), shares=through / weights)
    field = ToyField()
    noise = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    toy_reward(rollout_with_graph(toy_velocity(field), noise, toy_sigmas(2), solver)).mean().backward()
    swept = sweep_gradient(plan, num_steps=2, solver=solver)
    torch.testing.assert_close(swept, field.gradient(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("solver", ["adams-2", "adams-3"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_sweeps_a_multistep_rollout(name, solver):
    method = METHODS[name](5) if name == "refl" else METHODS[name]()
    plan = draw_plan(method, toy_sigmas(12).numpy(), np.random.default_rng(5), solver)
    swept = sweep_gradient(plan, solver=solver)
    for graph in (as_graph, as_recompute):
        other = graph_gradient(plan, graph=graph, solver=solver)
        torch.testing.assert_close(swept, other, rtol=1e-12, atol=1e-14)


def test_a_multistep_rollout_keeps_the_velocities_of_its_last_steps_alone():
    plan = FlowBPSparse(2).at(toy_sigmas(12).numpy(), [1, 5], "adams-2")
    assert len(toy_rollout(ToyField(), plan, 12, solver="adams-2").velocities.rows) == 2
    leaps = LeapAlign().at(toy_sigmas(12).numpy(), 2, 7)  # reads v_2 and v_7 at the end
    assert len(toy_rollout(ToyField(), leaps, 12, solver="adams-3").velocities.rows) == 2 + 3
    assert len(toy_rollout(ToyField(), plan, 12).velocities.rows) == 0


def test_alpha_zero_equals_no_bridge():
    closed = LeapAlign(alpha=0.0).at(toy_sigmas(12).numpy(), 2, 7)
    cut = sweep_gradient(replace(closed, bridge=None, similarity=None))
    torch.testing.assert_close(sweep_gradient(closed), cut, rtol=1e-12, atol=1e-14)


def test_alpha_scales_the_cross_node_path_linearly():
    grads = [sweep_gradient(LeapAlign(alpha=a).at(toy_sigmas(12).numpy(), 2, 7)) for a in (0.0, 0.5, 1.0)]
    assert (grads[2] - grads[0]).norm() > 1e-6
    torch.testing.assert_close(grads[1] - grads[0], (grads[2] - grads[0]) / 2, rtol=1e-10, atol=1e-14)


def test_a_free_composition_needs_no_engine_change():
    """A posterior mean reached by an uneven rule through a bridge: no published method, the same engine."""
    plan = SurrogatePlan(
        (1, 4, 6, 8), (-0.2, -0.1, -0.3, -0.1), (-0.2, 0.0, -0.5, -0.1), start=1,
        reward_input=PosteriorMean(8), bridge=Bridge(6, 0.7), similarity=Similarity(0.1),
    )  # fmt: skip
    torch.testing.assert_close(sweep_gradient(plan), graph_gradient(plan), rtol=1e-12, atol=1e-14)


@dataclass(frozen=True)
class StratifiedSparse:
    """The example of docs/methods.md: inverse-probability weights."""

    num_active: int = 4

    def plan(self, sigmas, rng):
        steps = np.diff(sigmas)
        nodes, probabilities = stratified(range(len(steps)), self.num_active, rng)
        return SurrogatePlan(nodes, steps[list(nodes)], steps[list(nodes)] / probabilities)


def test_stratified_sparse_averages_to_the_dense_detached_gradient():
    sigmas, rng = toy_sigmas(6).numpy(), np.random.default_rng(0)
    dense = sweep_gradient(FlowBPSparse(6, rescale=0.0).at(sigmas, range(6)), num_steps=6)
    draws = torch.stack([sweep_gradient(StratifiedSparse(3).plan(sigmas, rng), num_steps=6) for _ in range(300)])
    error = draws.std(dim=0) / 300**0.5
    assert ((draws.mean(dim=0) - dense).abs() <= 5 * error + 1e-12).all()


def test_a_detached_negative_branch_is_not_re_forwarded():
    plan = FlowBPSparse(4, rescale=0.0).at(toy_sigmas(12).numpy(), [1, 5, 8, 11])
    for guidance, rows in ((GUIDANCES["detached"], 4 * 3), (GUIDANCES["both branches"], 2 * 4 * 3)):
        field = ToyField()
        trajectory = toy_rollout(field, plan, 12, guidance=guidance)
        assert (field.rows, field.rows_with_graph) == (12 * 2 * 3, 0)
        backward(plan, trajectory, toy_velocity(field, guidance=guidance).replay, torch.ones(3, 6, dtype=torch.float64))
        assert field.rows - 12 * 2 * 3 == field.rows_with_graph == rows


@pytest.mark.parametrize(
    ("guidance", "calls"), [("none", (12, 4)), ("detached", (12 + 4, 4)), ("both branches", (12, 4))]
)
def test_a_replay_costs_one_call_and_a_kept_graph_none(guidance, calls):
    """N rollout steps cost N calls, batched over both branches (two at an active node whose negative branch is a
    constant).
    """
    plan = FlowBPSparse(4, rescale=0.0).at(toy_sigmas(12).numpy(), [1, 5, 8, 11])
    for recompute, nodes_per_forward, expected in (
        ("always", 1, calls),
        ("always", 3, (calls[0], 2)),
        ("never", 1, (calls[0], 0)),
    ):
        field = ToyField()
        trajectory = toy_rollout(field, plan, 12, guidance=GUIDANCES[guidance], recompute=Recompute(recompute))
        rolled_out = field.calls
        replay = toy_velocity(field, guidance=GUIDANCES[guidance]).replay
        backward(plan, trajectory, replay, torch.ones(3, 6, dtype=torch.float64), nodes_per_forward=nodes_per_forward)
        assert (rolled_out, field.calls - rolled_out) == expected


def test_branches_that_may_not_share_a_call_run_apart_in_batched_replays_too():
    plan, field = FlowBPSparse(4, rescale=0.0).at(toy_sigmas(12).numpy(), [1, 5, 8, 11]), ToyField()
    velocity = toy_velocity(field, guidance=GUIDANCES["both branches"])
    velocity.batched = False
    trajectory = rollout(velocity, torch.randn(3, 6, dtype=torch.float64), toy_sigmas(12), plan)
    assert field.calls == 2 * 12
    backward(plan, trajectory, velocity.replay, torch.ones(3, 6, dtype=torch.float64), nodes_per_forward=2)
    assert field.calls == 2 * 12 + 2 * 2


def test_the_rollout_stops_at_the_posterior_mean():
    field = ToyField()
    plan = METHODS["refl"](5).at(toy_sigmas(12).numpy(), 7)
    toy_rollout(field, plan, 12)
    assert field.rows == 8 * 3


def test_the_guided_velocity_has_the_same_value_with_and_without_gradient():
    for guidance in GUIDANCES.values():
        velocity, x = toy_velocity(ToyField(), guidance=guidance), torch.randn(3, 6, dtype=torch.float64)
        with torch.no_grad():
            without = velocity(x, torch.tensor(0.4))
        torch.testing.assert_close(velocity(x, torch.tensor(0.4)), without, rtol=1e-14, atol=1e-14)


# -- guidance in an interval -------------------------------------------------------------------------------------------

WITHIN = {
    "detached": Guidance(3.3, interval=(0.3, 0.8)),
    "both branches": Guidance(3.3, detach_negative=False, interval=(0.3, 0.8)),
}


@pytest.mark.parametrize("guidance", WITHIN.values(), ids=WITHIN)
@pytest.mark.parametrize("name", ["flowbp-bridge", "flowbp-lagrange", "draft-lv"])
def test_levels_outside_the_interval_take_the_positive_branch_alone(name, guidance):
    plan, sigmas = METHODS[name]().plan(toy_sigmas(12).numpy(), np.random.default_rng(5)), toy_sigmas(12).tolist()
    guided, field = [0.3 <= sigma <= 0.8 for sigma in sigmas[:-1]], ToyField()
    trajectory, x = toy_rollout(field, plan, 12, guidance=guidance), None
    copies = plan.num_renoised * (1 + guided[-1])
    assert field.rows == 3 * (sum(1 + each for each in guided) + copies) and 0 < sum(guided) < 12
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for i, each in enumerate(guided):
        velocity = toy_velocity(field, guidance=Guidance(3.3 if each else 1.0))
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity(x, torch.tensor(sigmas[i], dtype=torch.float64)).detach()
    torch.testing.assert_close(trajectory.sample, x, rtol=1e-12, atol=1e-14)
    swept = sweep_gradient(plan, guidance=guidance)
    for other in (
        graph_gradient(plan, guidance=guidance),
        sweep_gradient(plan, guidance=guidance, nodes_per_forward=3),
        sweep_gradient(plan, guidance=guidance, recompute=Recompute("never")),
        by_levels(plan, guidance),
    ):
        torch.testing.assert_close(other, swept, rtol=1e-12, atol=1e-14)


def by_levels(plan, guidance):
    """The sweep's gradient with a guidance of its own at each level: that of the interval, or none."""
    field = ToyField()
    trajectory = toy_rollout(field, plan, 12, guidance=guidance)
    z = reward_input(plan, trajectory).requires_grad_()
    (g,) = torch.autograd.grad(toy_reward(z).mean(), z)

    def velocity(x, sigma):
        inside = replace(guidance, interval=None) if 0.3 <= sigma <= 0.8 else Guidance()
        return toy_velocity(field, guidance=inside).replay(x, sigma)

    backward(plan, trajectory, velocity, g)
    return field.gradient()


def test_a_level_on_the_border_is_guided_in_the_rollout_and_in_the_replay():
    guidance, sigma = Guidance(3.5, interval=(0.1, 0.3)), torch.tensor(0.3)  # in float32 a little above .3
    assert guidance.guides(sigma.item()) == (guidance.scale_at(sigma).item() == 3.5)
    assert guidance.guides(0.1) and guidance.guides(0.3) and not guidance.guides(0.31) and not Guidance().guides(0.2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"interval": (0.8, 0.3)}, "0 <= low < high <= 1, not 0.8, 0.3"),
        ({"interval": (0.3, float("nan"))}, "not 0.3, nan"),
        ({"interval": (0.3, 1.0), "compensate": True}, "compensate to false"),
    ],
)
def test_an_interval_that_means_nothing_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Guidance(3.5, **options)


def test_residuals_vanish_when_every_step_is_a_support():
    plan = METHODS["flowbp-bridge"]().plan(toy_sigmas(12).numpy(), np.random.default_rng(0))
    plan = replace(plan, similarity=Similarity(0.1))
    for d in residuals(plan, toy_rollout(ToyField(), plan, 12)):
        assert d.shape == (3,) and d.max() < 1e-14


# -- one plan a sample -------------------------------------------------------------------------------------------------


def batch_gradient(plan, guidance=Guidance(), field=None, only=None, nodes_per_forward=1, solver="euler"):
    """The gradient of the summed weighted reward, of the whole toy batch or of sample `only`; and the residuals."""
    field, rows = field or ToyField(), slice(None) if only is None else slice(only, only + 1)
    whole = toy_velocity(field, guidance=guidance)
    conditioning = ({"text": side["text"][rows]} for side in (whole.positive, whole.negative))
    velocity = GuidedVelocity(field, *conditioning, guidance)
    generator = torch.Generator().manual_seed(2)
    noise, *renoise = (
        torch.randn(3, 6, generator=generator, dtype=torch.float64)[rows] for _ in range(1 + plan.num_renoised)
    )
    trajectory = rollout(velocity, noise, toy_sigmas(12), plan, renoise, solver=solver)
    d = residuals(plan, trajectory) if plan.similarity else ()
    weights = sample_weights(plan.similarity, *d)[0] if d else torch.ones_like(noise[:, 0])
    z = reward_input(plan, trajectory).requires_grad_()
    (g,) = torch.autograd.grad((toy_reward(z) * weights.repeat(1 + plan.num_renoised)).sum(), z)
    backward(plan, trajectory, velocity.replay, g, nodes_per_forward=nodes_per_forward)
    return field.gradient(), d


@pytest.mark.parametrize(
    ("guidance", "solver"), [*((each, "euler") for each in GUIDANCES), ("none", "adams-2"), ("detached", "adams-3")]
)
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_plans_sums_the_gradients_of_its_samples(name, guidance, solver):
    method, rng = METHODS[name](5) if name == "refl" else METHODS[name](), np.random.default_rng(5)
    plans = [draw_plan(method, toy_sigmas(12).numpy(), rng, solver) for _ in range(3)]
    settings = {"guidance": GUIDANCES[guidance], "solver": solver}
    alone = [batch_gradient(plan, only=b, **settings) for b, plan in enumerate(plans)]
    for nodes_per_forward in (1, 2):
        together, d = batch_gradient(PlanBatch(plans), nodes_per_forward=nodes_per_forward, **settings)
        torch.testing.assert_close(together, sum(gradient for gradient, _ in alone), rtol=1e-11, atol=1e-13)
        for which, residual in enumerate(d):
            torch.testing.assert_close(residual, torch.cat([ds[which] for _, ds in alone]), rtol=1e-12, atol=1e-14)
    if name != "draft-lv":
        assert len(set(plans)) > 1


def test_a_batch_of_equal_plans_is_a_shared_plan():
    plan = METHODS["flowbp-bridge"]().plan(toy_sigmas(12).numpy(), np.random.default_rng(5))
    assert PlanBatch([plan] * 3).replays == plan.replays
    torch.testing.assert_close(
        batch_gradient(PlanBatch([plan] * 3))[0], batch_gradient(plan)[0], rtol=1e-12, atol=1e-14
    )


def test_samples_with_fewer_active_nodes_sit_out_the_last_replays():
    sigmas = toy_sigmas(12).numpy()
    plans = [FlowBPSparse(len(nodes), rescale=0.0).at(sigmas, nodes) for nodes in ([2], [1, 5, 9], [0, 11])]
    batch = PlanBatch(plans)
    assert [replay.weight[0] for replay in batch.replays] == [0.0, 0.0, plans[0].replays[0].weight]
    field = ToyField()
    together, _ = batch_gradient(batch, field=field)
    torch.testing.assert_close(
        together, sum(batch_gradient(plan, only=b)[0] for b, plan in enumerate(plans)), rtol=1e-12, atol=1e-14
    )
    assert field.rows_with_graph == 3 * 3
    assert len(batch.rows(slice(0, 1)).replays) == 3  # a rank's part makes as many replays as the whole


def test_plans_that_one_batch_cannot_mix_are_refused_by_name():
    sigmas = toy_sigmas(12).numpy()
    sparse, leap, refl = (
        FlowBPSparse(2).at(sigmas, [1, 4]),
        LeapAlign().at(sigmas, 2, 7),
        METHODS["refl"](5).at(sigmas, 8),
    )
    with pytest.raises(ValueError, match="must agree in reward_input"):
        PlanBatch([sparse, refl, sparse])
    with pytest.raises(ValueError, match="must agree in similarity"):
        PlanBatch([sparse, leap, sparse])
    with pytest.raises(ValueError, match="2 plans for a batch of 3 samples"):
        toy_rollout(ToyField(), PlanBatch([sparse, sparse]), 12)
    with pytest.raises(ValueError, match="recompute='never' keeps the graph"):
        toy_rollout(ToyField(), PlanBatch([sparse] * 3), 12, recompute=Recompute("never"))
    with pytest.raises(ValueError, match="one plan for the batch"):
        batch_gradient(PlanBatch([sparse, FlowBPSparse(2).at(sigmas, [2, 4]), sparse]), field=ToyField(dropout=0.3))


def test_plans_drawn_for_each_sample_leave_the_expected_gradient_as_it_is():
    """Enumerated: the gradient of sample b under node i is a table, over which 1000 batches are drawn of each kind."""
    sigmas, rng = toy_sigmas(6).numpy(), np.random.default_rng(0)
    method, batch = FlowBPSparse(1, late_bias=1.0, rescale=0.0), 3
    plans = [method.at(sigmas, [i]) for i in range(6)]

    def sample_gradient(b, plan):
        field = ToyField()
        velocity = GuidedVelocity(field, {"text": toy_velocity(field).positive["text"][b : b + 1]}, None, Guidance())
        noise = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)[b : b + 1]
        trajectory = rollout(velocity, noise, toy_sigmas(6), plan)
        backward(plan, trajectory, velocity.replay, torch.cos(trajectory.sample))
        return field.gradient().numpy()

    table = np.array([[sample_gradient(b, plan) for plan in plans] for b in range(batch)])  # [B, node, parameter]
    expected = (table.mean(axis=0) * (np.arange(1, 7) / 21)[:, None]).sum(axis=0)
    variance = {}
    for kind in ("shared", "per_sample", "stratified"):
        draws = []
        for _ in range(1000):
            drawn = draw_plans(method, sigmas, rng, batch, kind)
            nodes = [plan.active[0][0] for plan in (drawn.plans if kind != "shared" else [drawn] * batch)]
            draws.append(np.mean([table[b, i] for b, i in enumerate(nodes)], axis=0))
        error = np.std(draws, axis=0) / 1000**0.5
        assert (np.abs(np.mean(draws, axis=0) - expected) <= 5 * error).all(), kind
        variance[kind] = np.var(draws, axis=0).sum()
    assert variance["stratified"] < variance["per_sample"] < variance["shared"]


# -- memory ------------------------------------------------------------------------------------------------------------


class DeepField(torch.nn.Module):
    """Activations far larger than a latent, as in a real denoiser."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            *[m for _ in range(6) for m in (torch.nn.Linear(64, 512), torch.nn.GELU(), torch.nn.Linear(512, 64))]
        )

    def forward(self, x, sigma, conditioning):
        return self.layers(x + sigma)


def deep_field():
    return GuidedVelocity(DeepField(), {"text": torch.zeros(32, 1)}, None, Guidance()), torch.randn(32, 64)


def tiny_transformer(overrides, checkpointing):
    from flowbp.backbones import load_backbone
    from flowbp.backbones.base import bind_velocity
    from flowbp.config import load

    config = load("demo", overrides)
    backbone = load_backbone(**config.backbone.model_dump())
    backbone.denoiser.requires_grad_(True)
    if checkpointing:
        backbone.denoiser.enable_gradient_checkpointing()
    noise = backbone.noise(32, 32, [torch.Generator().manual_seed(seed) for seed in range(8)])
    return bind_velocity(backbone, ["a red circle"] * 8, config.guidance), noise


def peak_bytes(run, num_active, velocity, noise, recompute="always"):
    sigmas = torch.linspace(1, 0, 9)
    nodes = np.linspace(0, 7, num_active).astype(int)
    plan = FlowBPSparse(num_active, rescale=0.0).at(sigmas.double().numpy(), nodes)
    network = velocity.network if isinstance(velocity.network, torch.nn.Module) else velocity.network.__self__.denoiser
    parameters = list(network.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    with LiveBytes([*parameters, *(p.grad for p in parameters)]) as live:
        trajectory = rollout(velocity, noise, sigmas, plan, recompute=Recompute(recompute))
        run(plan, trajectory, velocity.replay)
    return live.peak


def run_sweep(plan, trajectory, velocity):
    backward(plan, trajectory, velocity, torch.ones_like(trajectory.sample))


def run_graph(plan, trajectory, velocity):
    as_graph(plan, trajectory, velocity).sum().backward()


def check_peak_memory(capsys, velocity, noise, graphs_grow=2.0):
    gc.collect()
    sweep, graph = (
        [peak_bytes(run, num_active, velocity, noise) for num_active in (1, 8)] for run in (run_sweep, run_graph)
    )
    with capsys.disabled():
        print(f"\npeak live bytes, K = 8 over K = 1: sweep {sweep[1] / sweep[0]:.3f}, graph {graph[1] / graph[0]:.3f}")
    assert sweep[1] <= 1.05 * sweep[0]
    assert graph[1] > graphs_grow * graph[0]  # the counter does see graphs
    assert peak_bytes(run_sweep, 8, velocity, noise, "never") > graphs_grow * sweep[0]


def test_auto_keeps_as_many_graphs_as_the_budget_holds_from_the_clean_end(monkeypatch):
    plan = FlowBPSparse(4, rescale=0.0).at(toy_sigmas(12).numpy(), [1, 5, 8, 11])
    weight = Recompute("auto", budget=0)
    toy_rollout(ToyField(), plan, 12, recompute=weight)
    for graphs, kept in ((0.9, set()), (1.1, {11}), (3.9, {11, 8, 5}), (4.0, {11, 8, 5, 1}), (1e9, {11, 8, 5, 1})):
        policy = Recompute("auto", budget=round(graphs * weight.graph_bytes))
        for _ in range(2):  # the first rollout weighs while it keeps
            assert toy_rollout(ToyField(), plan, 12, recompute=policy).kept.keys() == kept

    monkeypatch.setattr("flowbp.replay.spare_bytes", lambda device: 3 * weight.graph_bytes)
    measured = Recompute("auto")
    assert [toy_rollout(ToyField(), plan, 12, recompute=measured).kept.keys() for _ in range(3)] == [
        set(),
        {11, 8},
        {11, 8},
    ]
    accumulated = Recompute("auto", rollouts=2)  # the optimizer, which makes its moments after two, comes first
    assert [len(toy_rollout(ToyField(), plan, 12, recompute=accumulated).kept) for _ in range(4)] == [0, 0, 2, 2]


def test_a_graph_weighs_what_it_adds_to_live_memory():
    sigmas, policy = torch.linspace(1, 0, 13), Recompute("auto", budget=0)
    plan = FlowBPSparse(1, rescale=0.0).at(sigmas.double().numpy(), [0])
    velocity = GuidedVelocity(DeepField(), {"text": torch.zeros(32, 1)}, None, Guidance())
    rollout(velocity, torch.randn(32, 64), sigmas, plan, recompute=policy)
    with LiveBytes(velocity.network.parameters()) as live, torch.enable_grad():
        before = live.alive
        v = velocity(torch.randn(32, 64), torch.tensor(0.5))
    assert policy.graph_bytes == pytest.approx(live.alive - before, rel=0.05) and v.requires_grad


def test_a_tensor_that_a_graph_saves_twice_weighs_once():
    scale, x = torch.nn.Parameter(torch.ones(5)), torch.ones(3, 5)
    _, graph_bytes = weigh(
        lambda: record(lambda x, sigma: (scale * x).square() * (scale * x).exp(), x, torch.tensor(0.5), False), x.device
    )
    assert graph_bytes == 4 * x.nbytes  # x, the first product, its square, and the exponential


def test_a_part_that_a_graph_saves_weighs_as_much_as_the_whole_that_it_keeps_alive():
    scale, x = torch.nn.Parameter(torch.ones(5)), torch.ones(3, 5)
    _, graph_bytes = weigh(
        lambda: record(lambda x, sigma: scale * x.repeat(4, 1)[:3], x, torch.tensor(0.5), False), x.device
    )
    assert graph_bytes == 4 * x.nbytes


def test_frozen_weights_that_a_graph_saves_weigh_nothing():
    scale, frozen, x = (torch.nn.Parameter(torch.ones(5)) for _ in range(3))
    frozen.requires_grad_(False)
    _, graph_bytes = weigh(
        lambda: record(lambda x, sigma: scale * x * frozen, x, torch.tensor(0.5), False), torch.device("cpu")
    )
    assert graph_bytes == x.nbytes


def test_free_memory_is_measured():
    assert 0 < spare_bytes(torch.device("cpu")) < 1 << 50


def test_free_memory_is_what_was_free_when_this_process_was_at_its_largest(monkeypatch):
    texts = {"meminfo": "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n", "status": "VmHWM:\t600 kB\nVmRSS:\t280 kB\n"}
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: texts[path.name])
    assert spare_bytes(torch.device("cpu")) == 1024 * (5000 - (600 - 280))


# -- dropout and autocast ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
def test_a_replay_draws_the_dropout_masks_of_the_rollout(guidance, checkpointing):
    plan = METHODS["flowbp-bridge"](4, alpha=0.7).plan(toy_sigmas(12).numpy(), np.random.default_rng(5))
    gradients = []
    for recompute in ("never", "always"):
        torch.manual_seed(7)
        field = ToyField(dropout=0.3, checkpointing=checkpointing)
        gradients.append(sweep_gradient(plan, guidance=guidance, recompute=Recompute(recompute), field=field))
        after = torch.get_rng_state()
        torch.manual_seed(7)
        toy_rollout(ToyField(dropout=0.3), plan, 12, guidance=guidance)
        assert torch.equal(torch.get_rng_state(), after)  # replays leave the random stream where the rollout left it
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    assert (gradients[0] - sweep_gradient(plan, guidance=guidance)).norm() > 1e-3 * gradients[
        0
    ].norm()  # dropout does something


def test_masks_that_cannot_be_drawn_again_are_refused():
    plan = FlowBPSparse(4, rescale=0.0).at(toy_sigmas(12).numpy(), [1, 5, 8, 11])
    with pytest.raises(ValueError, match="use nodes_per_forward=1"):
        sweep_gradient(plan, nodes_per_forward=2, field=ToyField(dropout=0.3))
    field = ToyField(dropout=0.3).eval()
    trajectory = toy_rollout(field, plan, 12)
    with pytest.raises(RuntimeError, match="the rollout none"):
        backward(plan, trajectory, toy_velocity(field.train()).replay, torch.ones(3, 6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_replay_runs_under_the_autocast_of_the_rollout(dtype):
    sigmas = torch.linspace(1, 0, 13)
    plan = FlowBPSparse(3, rescale=0.0).at(sigmas.double().numpy(), [1, 5, 9])
    gradients = {}
    for recompute in ("always", "never"):
        velocity = GuidedVelocity(DeepField(), {"text": torch.zeros(4, 1)}, None, Guidance())
        with torch.autocast("cpu", dtype):
            noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
            trajectory = rollout(velocity, noise, sigmas, plan, recompute=Recompute(recompute))
        backward(plan, trajectory, velocity.replay, torch.ones(4, 64))
        gradients[recompute] = torch.cat([p.grad.flatten() for p in velocity.network.parameters()])
    torch.testing.assert_close(gradients["always"], gradients["never"], rtol=0, atol=0)


def test_peak_memory_of_the_sweep_does_not_grow_with_the_active_set(capsys):
    check_peak_memory(capsys, *deep_field())


def test_peak_memory_of_the_sweep_does_not_grow_on_any_backbone(capsys, backbone_overrides):
    check_peak_memory(capsys, *tiny_transformer(backbone_overrides, checkpointing=False))


def test_peak_memory_of_a_sweep_with_checkpointing_does_not_grow(capsys):
    shapes = ["backbone.name=shapes", "backbone.max_sequence_length=1"]
    check_peak_memory(capsys, *tiny_transformer(shapes, checkpointing=True), graphs_grow=1.05)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_replay_without_gradient_raises():
    field = ToyField().requires_grad_(False)
    plan = FlowBPSparse(2, rescale=0.0).at(toy_sigmas(6).numpy(), [1, 4])
    trajectory = toy_rollout(field, plan, 6)
    with pytest.raises(RuntimeError, match="no gradient to any parameter of ToyField"):
        backward(plan, trajectory, toy_velocity(field).replay, torch.ones(3, 6, dtype=torch.float64))


def test_a_frozen_network_raises_at_the_bridge_too():
    """There the velocity does require grad, but of its input alone."""
    field = ToyField().requires_grad_(False)
    plan = LeapAlign(alpha=0.5).at(toy_sigmas(12).numpy(), 2, 7)
    for recompute in ("always", "never"):
        with pytest.raises(RuntimeError, match="no gradient to any parameter of ToyField"):
            sweep_gradient(plan, field=field, recompute=Recompute(recompute))
    with pytest.raises(RuntimeError, match="no gradient to any parameter of ToyField"):
        record(toy_velocity(field), torch.ones(3, 6, dtype=torch.float64), torch.tensor(0.5), requires_grad=False)


def test_recompute_names_what_it_knows():
    with pytest.raises(ValueError, match="'always', 'never' or 'auto', not 'sometimes'"):
        Recompute("sometimes")
    with pytest.raises(ValueError, match="needs recompute='auto'"):
        Recompute("never", budget=10)
    plan = FlowBPSparse(4, rescale=0.0).at(toy_sigmas(12).numpy(), [1, 5, 8, 11])
    with pytest.raises(ValueError, match="nodes_per_forward must be at least 1, got 0"):
        sweep_gradient(plan, nodes_per_forward=0)


def test_reading_an_uncached_node_says_which_are_cached():
    field = ToyField()
    plan = FlowBPSparse(2, rescale=0.0).at(toy_sigmas(6).numpy(), [1, 4])
    with pytest.raises(KeyError, match=r"latents of nodes \[2\] are not cached \(cached: \(1, 4\)\)"):
        toy_rollout(field, plan, 6).latents[2]


def test_renoising_needs_as_much_noise_as_the_plan_has_copies():
    plan = METHODS["draft-lv"](2).at(toy_sigmas(6).numpy())
    with pytest.raises(ValueError, match="re-noises 2 copies"):
        rollout(toy_velocity(ToyField()), torch.zeros(3, 6, dtype=torch.float64), toy_sigmas(6), plan)


def test_compensation_divides_by_the_scale_where_guidance_multiplies_by_it():
    assert [Guidance(scale, compensate=True).divisor for scale in (0.5, 1.0, 3.5)] == [1.0, 1.0, 3.5]
    assert Guidance(3.5).divisor == 1.0


def test_guidance_without_a_negative_prompt_is_refused():
    with pytest.raises(ValueError, match="needs the negative conditioning"):
        GuidedVelocity(ToyField(), {"text": torch.zeros(3, 6)}, None, Guidance(2.0))


# -- objective ---------------------------------------------------------------------------------------------------------


def test_the_hinge_has_no_gradient_from_the_target_on():
    rewards = torch.tensor([0.2, 0.55, 0.9], requires_grad=True)
    Objective(hinge=0.55).loss(rewards).backward()
    assert rewards.grad.tolist() == pytest.approx([-1 / 3, 0.0, 0.0])


def test_dropped_samples_leave_the_mean_and_its_divisor():
    rewards = torch.tensor([1.0, 2.0, 4.0])
    keep = torch.tensor([True, False, True])
    assert Objective().loss(rewards, loss_factors(torch.ones(3), keep)).item() == pytest.approx(-2.5)
    assert Objective().loss(rewards, loss_factors(torch.ones(3), torch.zeros(3, dtype=torch.bool))).item() == 0.0
    assert Objective().loss(
        rewards, loss_factors(torch.ones(3), torch.ones(3, dtype=torch.bool))
    ).item() == pytest.approx(-7 / 3)
    of_copies = loss_factors(torch.tensor([1.0, 2.0, 3.0]), keep, copies=2)  # those of the batch, then of its copies
    assert of_copies.tolist() == [0.25, 0.0, 0.75, 0.25, 0.0, 0.75]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 100, None])
def test_the_reward_gradient_is_the_same_in_parts_of_any_size(rows):
    z, targets = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = loss_factors(
        torch.linspace(0.5, 2, 5, dtype=torch.float64), torch.tensor([True, True, False, True, True])
    )
    objective, alive = Objective(hinge=-1.0), []

    def score(part, which):
        assert not any(graph() is not None for graph in alive)  # one part's graph is gone before the next is made
        squares = (part - targets[which]).square()
        alive.append(weakref.ref(squares))
        return -squares.sum(dim=1)

    rewards, loss, g = reward_gradient(objective, score, z, factors, rows)
    leaf = z.clone().requires_grad_()
    whole = objective.loss(-(leaf - targets).square().sum(dim=1), factors)
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(g, torch.autograd.grad(whole, leaf)[0], rtol=1e-14, atol=0)
    assert rewards.shape == (5,) and not rewards.requires_grad and g[2].abs().max() == 0


def test_similarity_weights_floor_each_residual_separately():
    weights, keep = sample_weights(Similarity(0.1, max_dj=0.5), torch.tensor([0.05, 0.6]), torch.tensor([0.3, 0.02]))
    assert weights.tolist() == pytest.approx([1 / 0.4, 1 / 0.7]) and keep.tolist() == [True, False]


def test_a_residual_at_its_maximum_is_kept():
    d = torch.tensor([0.25, 0.5, 0.75])
    assert sample_weights(Similarity(0.1, max_dj=0.5), d, torch.zeros(3))[1].tolist() == [True, True, False]
    assert sample_weights(Similarity(0.1, max_d0=0.5), torch.zeros(3), d)[1].tolist() == [True, True, False]
