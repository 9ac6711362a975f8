"""Plans: what each method draws, how methods relate, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbp.active_sets import (
    DirichletPair,
    MidpointJPair,
    MidpointPair,
    UniformPair,
    equally_spaced,
    stratified,
    stratified_draws,
)
from flowbp.methods import (
    METHODS,
    DRaFTLV,
    DRTune,
    FlowBPBridge,
    FlowBPLagrange,
    FlowBPSparse,
    LeapAlign,
    ReFL,
    draw_plans,
)
from flowbp.plan import Bridge, PosteriorMean, Similarity, SurrogatePlan

SIGMAS = np.append(3 * (u := 1 - np.arange(25) / 25) / (1 + 2 * u), 0.0)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(METHODS)), st.integers(12, 40), st.integers(0, 2**32))
def test_every_plan_integrates_from_its_start_to_the_clean_end(name, num_steps, seed):
    sigmas = 1.0 - np.arange(num_steps + 1) / num_steps
    plan = METHODS[name]().plan(sigmas, np.random.default_rng(seed))
    assert sum(plan.weights) == pytest.approx(-sigmas[plan.start])
    plan.check(num_steps)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_draws_the_same_plan_and_plans_are_hashable(name):
    method = METHODS[name]()
    first, second = (method.plan(SIGMAS, np.random.default_rng(3)) for _ in range(2))
    assert first == second and len({first, second}) == 1


def test_leapalign_is_lagrange_of_order_one():
    lagrange = FlowBPLagrange(order=1, alpha=0.3, tau=0.1, rescale=0.0, active="start")
    assert LeapAlign(alpha=0.3, tau=0.1).at(SIGMAS, 4, 17) == lagrange.at(SIGMAS, 4, 17)


def test_draft_lv_without_copies_is_refl_of_the_last_node():
    assert DRaFTLV(num_renoised=0).at(SIGMAS) == ReFL(last_n=1).plan(SIGMAS, np.random.default_rng(0))


def test_draft_lv_takes_two_copies_unless_told_otherwise():
    assert [replay.output for replay in DRaFTLV().at(SIGMAS).replays] == [0, 1, 2]


def test_draft_lv_has_the_gradient_of_sparse_with_only_the_last_node():
    assert DRaFTLV(0).at(SIGMAS).active == FlowBPSparse(1, rescale=0.0).at(SIGMAS, [24]).active


def test_lagrange_with_all_steps_as_supports_is_exact_in_length_per_leap():
    plan = FlowBPLagrange(order=4, active="all", max_active=0).at(SIGMAS, 21, 23)
    assert sum(plan.weights[:2]) == pytest.approx(SIGMAS[23] - SIGMAS[21])


def test_bridge_keeps_its_node_active_and_one_node_on_each_side():
    for seed in range(50):
        plan = FlowBPBridge(num_active=2).plan(SIGMAS, np.random.default_rng(seed))
        (first, _), (second, _) = plan.active
        assert first < plan.bridge.node == second


def nodes_of(method):
    return lambda rng: tuple(node for node, _ in method.plan(np.linspace(1, 0, 9), rng).active)


def pair_of(sampler):
    return lambda rng: sampler(8, 2, rng)


@pytest.mark.parametrize(
    ("draw", "allowed"),
    [
        (nodes_of(ReFL(last_n=3)), {(5,), (6,), (7,)}),
        (nodes_of(FlowBPSparse(num_active=2, tail_ratio=0.4)), {(4, 5), (4, 6), (4, 7), (5, 6), (5, 7), (6, 7)}),
        (
            nodes_of(DRTune(num_active=2, early_stop_ratio=0.25)),
            {(start, start + stride) for stride in (3, 4) for start in range(4)},  # up to node 6, up to node 7
        ),
        (lambda rng: equally_spaced(8, 3, rng), {(start, start + 2, start + 4) for start in range(4)}),
        (pair_of(UniformPair(min_rev=0)), {(k, j) for j in range(3, 8) for k in range(2, j)}),
        (pair_of(UniformPair(min_rev=2, max_rev=5)), {(4, 5), (4, 6), (5, 6)}),
        (pair_of(UniformPair(max_j_rev=2)), {(k, j) for j in (6, 7) for k in range(2, j)}),
        (pair_of(DirichletPair(alpha=(1, 1, 1))), {(k, j) for j in range(3, 7) for k in range(2, j)}),
        (pair_of(DirichletPair(alpha=(1, 1, 1), max_j_rev=2)), {(k, 6) for k in range(2, 6)}),
        (pair_of(MidpointPair()), {(2, 5), (3, 5), (4, 6), (5, 6), (6, 7)}),
        (pair_of(MidpointJPair()), {(1, 3), (2, 4), (2, 5), (3, 6), (3, 7)}),
    ],
)
def test_many_draws_are_all_that_may_be_drawn_and_nothing_else(draw, allowed):
    rng = np.random.default_rng(0)
    assert {draw(rng) for _ in range(1000)} == allowed


def test_the_shortest_window_of_a_bridge_is_three_steps():
    plan = FlowBPBridge(rescale=1.0, tail_ratio=0.01).at(SIGMAS, 23, [22, 23])
    assert sum(w for _, w in plan.active) == pytest.approx(-SIGMAS[22])


def test_each_stratified_draw_is_distributed_as_one_draw_alone():
    rng = np.random.default_rng(0)
    draws = np.array([stratified_draws(lambda rng: rng.random(), 2, float, rng) for _ in range(2000)])
    assert np.allclose(draws.mean(0), 0.5, atol=0.04)  # 6 standard errors of a uniform mean
    assert np.corrcoef(draws.T)[0, 1] < -0.3  # together they cover the range: independent draws have 0


def test_strata_are_cut_by_the_mean_node_weighted_by_absolute_gradient_weights():
    """By plain means the order would be B, C, A, D, and A would meet B."""
    rules = {
        "A": ((0, 8), (-0.9, -0.1)),
        "B": ((1, 2), (-0.5, -0.5)),
        "C": ((1, 3), (0.1, -0.9)),
        "D": ((5, 6), (-1, 1)),
    }
    plans = {SurrogatePlan(nodes, weights, weights): name for name, (nodes, weights) in rules.items()}

    class InTurn:
        turns = 0

        def plan(self, sigmas, rng):
            self.turns += 1
            return list(plans)[self.turns % 4]

    drawn = draw_plans(InTurn(), SIGMAS, np.random.default_rng(0), 2, "stratified").plans
    assert {plans[plan] for plan in drawn} in ({"A", "C"}, {"B", "D"})


@pytest.mark.parametrize("draw", [
    lambda: FlowBPSparse().at(SIGMAS, [3, 25]), lambda: FlowBPBridge().at(SIGMAS, 4, [-1, 4]),
    lambda: DRTune().at(SIGMAS, 20, [3, 21]),
])  # fmt: skip
def test_an_active_node_outside_the_rollout_is_refused(draw):
    with pytest.raises(ValueError, match=r"active nodes must lie in \[0, 2[04]\], got \[(25|-1|21)\]"):
        draw()


def test_a_bridge_that_no_earlier_node_crosses_collects_no_gradient():
    assert FlowBPBridge(alpha=0.5).at(SIGMAS, 4, [4, 9]).active_bridge is None
    assert FlowBPBridge(alpha=0.5).at(SIGMAS, 4, [3, 4]).active_bridge == Bridge(4, 0.5)


def test_a_bridge_that_is_not_active_is_refused():
    with pytest.raises(ValueError, match="bridge node 4 must be an active node; active nodes are .3, 5."):
        FlowBPBridge().at(SIGMAS, 4, [3, 5])


def test_rescaled_sparse_gradient_weights_cover_the_whole_interval():
    plan = FlowBPSparse(3, rescale=1.0).at(SIGMAS, [2, 9, 20])
    assert sum(w for _, w in plan.active) == pytest.approx(-1.0)


def test_inverse_probability_weights_are_an_unbiased_estimate_of_the_dense_sum():
    rng, dense = np.random.default_rng(0), np.diff(SIGMAS)
    total = np.zeros(25)
    for _ in range(20_000):
        nodes, probabilities = stratified(range(25), 4, rng)
        total[list(nodes)] += dense[list(nodes)] / probabilities
    assert np.allclose(total / 20_000, dense, rtol=0.1)


def test_alpha_zero_cuts_the_bridge():
    assert LeapAlign(alpha=0.0).at(SIGMAS, 4, 17).active_bridge is None
    assert LeapAlign(alpha=0.1).at(SIGMAS, 4, 17).active_bridge == Bridge(17, 0.1)


def test_only_what_the_plan_reads_is_cached():
    sparse = FlowBPSparse(3, rescale=1.0).at(SIGMAS, [2, 9, 20])
    assert sparse.cached_latents == {2, 9, 20} and sparse.cached_velocities == set()
    refl = ReFL().at(SIGMAS, 18)
    assert refl.cached_latents == refl.cached_velocities == {18} and refl.num_steps(25) == 19
    leap = LeapAlign().at(SIGMAS, 3, 15)
    assert leap.cached_latents == leap.cached_velocities == {3, 15}


def plan_with(**changes):
    return SurrogatePlan(**({"nodes": (1, 3), "weights": (-0.5, -0.5), "grad_weights": (-0.5, -0.5)} | changes))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Bridge(3, 1.5), r"\[0, 1\], got 1.5"),
        (lambda: Bridge(3, float("nan")), r"\[0, 1\], got nan"),
        (lambda: Similarity(0.0), "must be positive, got 0.0"),
        (lambda: plan_with(nodes=(3, 1)), "strictly increasing"),
        (lambda: plan_with(nodes=(-1, 3)), "non-negative"),
        (lambda: plan_with(weights=(1.0,)), "as many weights of each kind"),
        (lambda: plan_with(weights=(1.0, float("inf"))), "finite"),
        (lambda: plan_with(grad_weights=(0.0, 0.0)), "no node"),
        (lambda: plan_with(start=2), "start must lie in"),
        (lambda: plan_with(bridge=Bridge(2, 0.5)), r"bridge node 2 must be a node of the plan; its nodes are \(1, 3\)"),
        (lambda: plan_with(reward_input=PosteriorMean(1)), "last node 3"),
        (lambda: plan_with(similarity=Similarity(0.1)), "give the plan a bridge"),
        (lambda: plan_with(num_renoised=-1), r"\[0, 1000\], got -1"),
        (lambda: plan_with().check(3), "outside a rollout of 3 steps"),
        (lambda: plan_with(num_renoised=1).check(9), "last node 8"),
        (
            lambda: FlowBPSparse(num_active=26).plan(SIGMAS, np.random.default_rng(0)),
            r"num_active must lie in \[1, 25\].*got 26",
        ),
        (lambda: FlowBPSparse(num_active=9, tail_ratio=0.3).plan(SIGMAS, np.random.default_rng(0)), r"\[1, 8\]"),
        (lambda: FlowBPBridge(num_active=1).plan(SIGMAS, np.random.default_rng(0)), "one node on each side"),
        (lambda: FlowBPBridge(num_active=30).plan(SIGMAS, np.random.default_rng(0)), r"\[1, 25\]"),
        (lambda: DRTune(num_active=26).plan(SIGMAS, np.random.default_rng(0)), r"\[1, 25\]"),
        (lambda: DRTune(early_stop_ratio=1.2).plan(SIGMAS, np.random.default_rng(0)), "early_stop_ratio"),
        (
            lambda: DRTune(early_stop_steps=26).plan(SIGMAS, np.random.default_rng(0)),
            r"early_stop_steps must lie in \[0, 25\].*got 26",
        ),
        (lambda: ReFL(last_n=40).plan(SIGMAS, np.random.default_rng(0)), r"last_n must lie in \[1, 25\]"),
        (lambda: LeapAlign(tail_ratio=0.0).plan(SIGMAS, np.random.default_rng(0)), r"tail_ratio must lie in \(0, 1\]"),
        (lambda: LeapAlign().plan(np.array([1.0, 0.5, 0.0]), np.random.default_rng(0)), "at least 3 steps, got 2"),
        (lambda: LeapAlign(pairs=UniformPair(min_rev=25)).plan(SIGMAS, np.random.default_rng(0)), "widen them"),
        (lambda: LeapAlign().at(SIGMAS[::-1], 1, 3), "strictly decrease"),
        (lambda: DirichletPair(alpha=(1.0, 0.0, 1.0)), "three positive numbers"),
        (lambda: FlowBPLagrange(anchor=2.0).at(SIGMAS, 1, 3), "anchor must lie in"),
    ],
)
def test_bad_input_names_the_value_and_the_rule(make, says):
    with pytest.raises(ValueError, match=says):
        make()
