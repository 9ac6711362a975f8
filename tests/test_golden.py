"""Every golden case: the paper's released training step, recomputed by the sweep and by the graph.

A case is NN_<method>.json (scalars) beside NN_<method>.npz (float64 arrays). The network is
v(z, s, c) = W2 tanh(W1 z + b1 + c1 s + U c) + b2, the reward r(z) = <a, z> + sum(q z^2) / 2.
FLOWBP_GOLDEN names another folder of the same format.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from autograd_graph import as_graph
from toy import as_recompute

from flowbp.active_sets import DirichletPair, MidpointJPair, MidpointPair, UniformPair, bridge_allocation, train_window
from flowbp.guidance import Guidance, GuidedVelocity
from flowbp.methods import DRaFTLV, DRTune, FlowBPBridge, FlowBPLagrange, FlowBPSparse, LeapAlign, ReFL
from flowbp.objective import Objective, loss_factors, reward_gradient, sample_weights
from flowbp.plan import Similarity
from flowbp.quadrature import lagrange_supports
from flowbp.replay import Recompute
from flowbp.surrogate import backward, residuals, reward_input
from flowbp.trajectory import rollout, rollout_with_graph
from flowbp_kernels import backend

BUNDLED = Path(__file__).parent / "golden"
BESIDE = Path(__file__).parents[2] / "shared" / "golden"
FOLDER = Path(os.environ.get("FLOWBP_GOLDEN") or (BESIDE if BESIDE.is_dir() else BUNDLED))
CASES = sorted(path.stem for path in FOLDER.glob("[0-9]*_*.json"))
PARAMETERS = ("W1", "b1", "c1", "U", "W2", "b2")
TOLERANCE = 1e-9  # relative, on all parameters' gradients concatenated, float64
SINGLE = 1e-5  # the same in float32


def test_the_folder_holds_cases():
    assert CASES, f"no golden case in {FOLDER}: set FLOWBP_GOLDEN to a folder of NN_<method>.json and .npz files"


class Case:
    """One stored training step, with its plan rebuilt by the method from the stored hyperparameters and indices."""

    def __init__(self, name: str, dtype=torch.float64, device="cpu"):
        self.meta = json.loads((FOLDER / f"{name}.json").read_text())
        with np.load(FOLDER / f"{name}.npz") as arrays:
            self.sigmas = torch.from_numpy(arrays["sigmas"])
            self.arrays = {key: torch.from_numpy(arrays[key]).to(device, dtype) for key in arrays.files}
        self.theta = {key: self.arrays[key].clone().requires_grad_() for key in PARAMETERS}
        self.guidance = Guidance(
            self.meta["cfg_guidance"], self.meta["cfg_detach_neg"], self.meta["cfg_grad_norm_compensate"]
        )
        self.plan = rebuild_plan(self.meta, self.sigmas.numpy())

    def network(self, z, sigma, conditioning):
        t = self.theta
        hidden = z @ t["W1"].T + t["b1"] + t["c1"] * sigma.reshape(-1, 1).to(z) + conditioning["c"] @ t["U"].T
        return torch.tanh(hidden) @ t["W2"].T + t["b2"]

    def reward(self, z):
        return z @ self.arrays["a"] + 0.5 * (self.arrays["q"] * z * z).sum(dim=1)

    def velocity(self, guidance=None):
        positive, negative = {"c": self.arrays["p"]}, {"c": self.arrays["n"]}
        return GuidedVelocity(self.network, positive, negative, guidance or self.guidance)

    def rollout(self, plan=None, recompute=None):
        return rollout(
            self.velocity(),
            self.arrays["x_init"],
            self.sigmas,
            plan or self.plan,
            self.arrays.get("eps", ()),
            recompute,
        )

    def weights(self, trajectory):
        if self.plan.similarity is None:
            return torch.ones_like(trajectory.sample[:, 0]), torch.ones_like(trajectory.sample[:, 0], dtype=torch.bool)
        return sample_weights(self.plan.similarity, *residuals(self.plan, trajectory))

    def factors(self, trajectory):
        return loss_factors(*self.weights(trajectory), 1 + self.plan.num_renoised) / self.guidance.divisor

    @property
    def objective(self):
        return Objective(self.meta["loss_relu_clip"])

    def loss(self, z, trajectory):
        return self.objective.loss(self.reward(z), self.factors(trajectory))

    def check_gradients(self, prefix="grad_", tolerance=TOLERANCE):
        ours = torch.cat([self.theta[key].grad.flatten() for key in PARAMETERS])
        theirs = torch.cat([self.arrays[prefix + key].flatten() for key in PARAMETERS])
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def rebuild_plan(meta, sigmas):
    hyper, method = meta["hyper"], meta["method"]
    tail = meta.get("train_step_tail_ratio", 1.0)
    if method == "refl":
        return ReFL(hyper["refl_last_n_steps"]).at(sigmas, meta["selected_idx"])
    if method == "draft_lv":
        return DRaFTLV(hyper["draft_lv_num_noised_samples"]).at(sigmas)
    if method == "drtune":
        stop = {name: hyper.get(f"drtune_{name}") for name in ("early_stop_ratio", "early_stop_steps")}
        ours = DRTune(
            hyper["drtune_num_train_steps"], **{name: value for name, value in stop.items() if value is not None}
        )
        return ours.at(sigmas, meta["early_stop_idx"], meta["active_indices"])
    if method == "leapalign":
        ours = LeapAlign(hyper["alpha"], hyper["tau"], tail_ratio=tail)
        return ours.at(sigmas, meta["k_idx"], meta["j_idx"])
    if method in ("flowbp_sparse", "flowbp_bridge"):
        shared = dict(
            num_active=hyper["flowbp_sparse_num_active_steps"],
            late_bias=hyper["flowbp_sparse_late_bias"],
            rescale=hyper["flowbp_sparse_grad_rescale"],
            tail_ratio=tail,
        )
        if method == "flowbp_sparse":
            return FlowBPSparse(**shared).at(sigmas, meta["active_indices"])
        return FlowBPBridge(alpha=hyper["alpha"], **shared).at(sigmas, meta["j_idx"], meta["active_indices"])
    if method == "flowbp_lagrange":
        ours = FlowBPLagrange(
            order=hyper["flowbp_lagrange_connector_order"],
            alpha=hyper["alpha"],
            tau=hyper["tau"],
            rescale=hyper["flowbp_lagrange_grad_rescale"],
            active=hyper["flowbp_lagrange_grad_support_mode"],
            max_active=hyper.get("flowbp_lagrange_max_active_supports") or 0,
            support_scale=hyper["flowbp_lagrange_grad_support_scale"],
            weights=hyper["flowbp_lagrange_weight_scheme"],
            anchor=hyper["flowbp_lagrange_anchor_lambda"],
            tail_ratio=tail,
            max_dj=hyper.get("traj_filter_dj_max"),
            max_d0=hyper.get("traj_filter_d0_max"),
        )
        return ours.at(sigmas, meta["k_idx"], meta["j_idx"])
    raise ValueError(f"golden case of unknown method {method!r}")


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


def test_value_residuals_and_gradients_match_the_released_code(case):
    trajectory = case.rollout()
    z = reward_input(case.plan, trajectory)
    assert torch.allclose(z, case.arrays["reward_input"], rtol=1e-12, atol=1e-12)

    if case.plan.similarity is not None:
        d_j, d_0 = residuals(case.plan, trajectory)
        weights, keep = case.weights(trajectory)
        assert torch.allclose(d_j, case.arrays["d_j"], rtol=TOLERANCE, atol=1e-12)
        assert torch.allclose(d_0, case.arrays["d_0"], rtol=TOLERANCE, atol=1e-12)
        assert torch.allclose(weights, case.arrays["sample_weights"], rtol=TOLERANCE)
        assert case.meta["keep_mask"] in (None, keep.tolist())

    leaf = z.clone().requires_grad_()
    loss = case.loss(leaf, trajectory)
    assert loss.item() * case.guidance.divisor == pytest.approx(case.meta["loss"], rel=TOLERANCE)
    (g,) = torch.autograd.grad(loss, leaf)
    assert torch.allclose(g, case.arrays["g"], rtol=TOLERANCE, atol=1e-14)
    backward(case.plan, trajectory, case.velocity().replay, g)
    case.check_gradients()


@pytest.mark.parametrize(
    ("recompute", "nodes_per_forward"),
    [("never", 1), ("auto", 1), ("always", 2), ("auto", 3), ("always", 100)],
    ids=["never", "auto", "pairs", "auto-threes", "one-forward"],
)
def test_every_way_to_recompute_matches_the_released_code(case, recompute, nodes_per_forward):
    policy = Recompute(recompute, budget=4000 if recompute == "auto" else None)  # bytes: one or two graphs
    trajectory = case.rollout(recompute=policy)
    if recompute == "never":
        assert trajectory.kept.keys() == {replay.node for replay in case.plan.replays}
    z = reward_input(case.plan, trajectory)
    _, loss, g = reward_gradient(
        case.objective, lambda part, _: case.reward(part), z, case.factors(trajectory), nodes_per_forward
    )
    assert loss.item() * case.guidance.divisor == pytest.approx(case.meta["loss"], rel=TOLERANCE)
    backward(case.plan, trajectory, case.velocity().replay, g, nodes_per_forward=nodes_per_forward)
    case.check_gradients()


def test_selective_recompute_matches_the_released_code(case):
    trajectory = case.rollout()
    z = as_recompute(case.plan, trajectory, case.velocity().replay, tuple(case.theta.values()))
    case.loss(z, trajectory).backward()
    case.check_gradients()


def check_single_precision(case):
    trajectory = case.rollout()
    leaf = reward_input(case.plan, trajectory).requires_grad_()
    torch.testing.assert_close(leaf.detach(), case.arrays["reward_input"], rtol=SINGLE, atol=SINGLE)
    if case.plan.similarity is not None:
        for d, stored in zip(residuals(case.plan, trajectory), ("d_j", "d_0"), strict=True):
            torch.testing.assert_close(d, case.arrays[stored], rtol=SINGLE, atol=SINGLE)
    (g,) = torch.autograd.grad(case.loss(leaf, trajectory), leaf)
    backward(case.plan, trajectory, case.velocity().replay, g)
    case.check_gradients(tolerance=SINGLE)


BACKENDS = [("cpu", "cpu"), ("reference", "cpu"), ("cuda", "cuda"), ("triton", "cuda")]


@pytest.mark.parametrize(("kernels", "device"), BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_every_backend_matches_the_released_code_in_float32(name, kernels, device, monkeypatch):
    if backend.unavailable(kernels):
        pytest.skip(backend.unavailable(kernels))
    monkeypatch.setenv("FLOWBP_KERNELS", kernels)
    check_single_precision(Case(name, torch.float32, device))


def test_graph_gradients_match_the_released_code(case):
    trajectory = case.rollout()
    z = as_graph(case.plan, trajectory, case.velocity().replay)
    assert torch.allclose(z, case.arrays["reward_input"], rtol=1e-12, atol=1e-12)
    case.loss(z, trajectory).backward()
    case.check_gradients()


def test_full_backpropagation_matches_the_oracle(case):
    velocity = case.velocity(replace(case.guidance, detach_negative=False))
    (-case.reward(rollout_with_graph(velocity, case.arrays["x_init"], case.sigmas))).mean().backward()
    case.check_gradients("oracle_")


def test_the_plan_has_the_stored_indices_and_factors(case):
    meta, plan = case.meta, case.plan
    if meta["method"] == "flowbp_lagrange":
        split = plan.nodes.index(meta["j_idx"])
        assert list(plan.nodes[:split]) == meta["support_kj"]
        assert list(plan.nodes[split:]) == meta["support_j0"]
        first = case.arrays["weights_kj"].numpy() * meta["hyper"]["flowbp_lagrange_anchor_lambda"]
        assert np.allclose(plan.weights[1:split], first[1:], rtol=1e-9, atol=1e-13)
        assert np.allclose(plan.weights[split:], case.arrays["weights_j0"], rtol=1e-9, atol=1e-13)
    elif "active_indices" in meta:
        assert [i for i, _ in plan.active] == sorted(meta["active_indices"])
    if meta["method"] == "flowbp_bridge":
        quadrature = replace(plan, similarity=Similarity(1.0))
        for d in residuals(quadrature, case.rollout(quadrature)):
            assert d.abs().max() < 1e-12  # the composition of Euler steps is exact
        h = np.diff(case.sigmas.numpy())
        assert all(w == pytest.approx(meta["grad_rescale_factor"] * h[i], rel=1e-12) for i, w in plan.active)


# -- index sampling ----------------------------------------------------------------------------------------------------
# Tables hold exactly. Draws come from another generator than the released code's, so they are compared in distribution:
# every frequency within 6 standard errors of a two-sample difference (fixed seed; a false alarm has probability below
# 1e-5 over the file).

RULES = json.loads(
    (FOLDER if (FOLDER / "sampling_rules.json").is_file() else BUNDLED).joinpath("sampling_rules.json").read_text()
)
DRAWS = 4000


def frequencies(draws, size):
    counts = np.zeros(size)
    for draw in draws:
        counts[list(draw)] += 1
    return counts / len(draws)


def assert_same_frequencies(ours, theirs, their_count):
    pooled = (ours * DRAWS + np.array(theirs) * their_count) / (DRAWS + their_count)
    error = np.sqrt(pooled * (1 - pooled) * (1 / DRAWS + 1 / their_count))
    assert np.all(np.abs(ours - theirs) <= 6 * error), (ours, theirs)


def pair_sampler(args):
    bounds = {"min_rev": args["min_idx"], "max_rev": args["max_idx"]}
    cap = {"max_j_rev": args.get("jk_dirichlet_max_j_rev")}
    mode = args.get("jk_sampling_mode", "uniform")
    if mode == "dirichlet":
        alpha = tuple(args.get(f"jk_dirichlet_alpha_{part}", args["jk_dirichlet_alpha"]) for part in "abc")
        return DirichletPair(alpha, **bounds, **cap)
    return {
        "uniform": UniformPair(**bounds, **cap),
        "midpoint": MidpointPair(**bounds),
        "midpoint_j": MidpointJPair(**bounds),
    }[mode]


def label(rule):
    return (
        "-".join(str(value) for key, value in rule["args"].items() if key not in ("min_idx", "max_idx"))
        + f"-N{rule['N']}"
    )


@pytest.mark.parametrize("rule", RULES["jk"], ids=label)
def test_pairs_are_drawn_with_the_released_frequencies(rule):
    num_steps, rng = rule["N"], np.random.default_rng(0)
    start, _ = train_window(num_steps, rule["args"].get("train_step_tail_ratio", 1.0), min_length=3)
    draws = [pair_sampler(rule["args"])(num_steps, start, rng) for _ in range(DRAWS)]
    assert all(0 <= k < j < num_steps for k, j in draws)
    assert_same_frequencies(frequencies([(k,) for k, _ in draws], num_steps), rule["freq_k"], rule["freq_samples"])
    assert_same_frequencies(frequencies([(j,) for _, j in draws], num_steps), rule["freq_j"], rule["freq_samples"])


@pytest.mark.parametrize(
    "rule",
    RULES["late_biased"],
    ids=lambda r: f"K{r['K']}-bias{r['late_bias']}-window{r['window'][0]}-{r['window'][1]}",
)
def test_sparse_nodes_are_drawn_with_the_released_inclusion_frequencies(rule):
    (start, stop), rng = rule["window"], np.random.default_rng(0)
    method = FlowBPSparse(rule["K"], rule["late_bias"], tail_ratio=(stop - start) / stop)
    sigmas = 1.0 - np.arange(stop + 1) / stop
    draws = [[i for i, _ in method.plan(sigmas, rng).active] for _ in range(DRAWS)]
    assert all(len(set(draw)) == rule["K"] for draw in draws)
    if None in rule["exact_inclusion_probability"]:
        # There were too many subsets to enumerate: these are frequencies of at least 5000 draws.
        expected, count = rule["freq_included"], 5000
    else:
        expected, count = rule["exact_inclusion_probability"], 1e12
    assert_same_frequencies(frequencies(draws, stop)[-len(expected) :], np.array(expected), count)


@pytest.mark.parametrize("rule", RULES["bridge_draws"], ids=lambda r: f"N{r['N']}-K{r['K']}-bias{r['late_bias']}")
def test_bridge_draws_keep_the_released_allocation(rule):
    num_steps, rng = rule["N"], np.random.default_rng(0)
    start, _ = train_window(num_steps, rule["train_step_tail_ratio"], min_length=3)
    for draw in rule["draws"]:  # the stored draws obey our allocation
        assert (len(draw["pre"]), len(draw["post"])) == bridge_allocation(
            rule["K"], draw["j"] - start, num_steps - draw["j"]
        )
    method = FlowBPBridge(rule["K"], rule["late_bias"], tail_ratio=rule["train_step_tail_ratio"])
    for _ in range(300):  # and so do ours
        plan = method.plan(1.0 - np.arange(num_steps + 1) / num_steps, rng)
        active, j = [i for i, _ in plan.active], plan.bridge.node
        assert j in active and start <= min(active)
        assert (sum(i < j for i in active), sum(i >= j for i in active)) == bridge_allocation(
            rule["K"], j - start, num_steps - j
        )


@pytest.mark.parametrize(
    "rule", RULES["drtune_draws"], ids=lambda r: f"N{r['N']}-K{r['K']}-stop{r['early_stop_ratio']}"
)
def test_drtune_draws_the_released_stops_and_strides(rule):
    num_steps, rng = rule["N"], np.random.default_rng(0)
    table = {(length, K): row for length, K, *row in RULES["drtune_train_index_sets_prefixlen_K_to_stride_maxstart"]}
    for stop, active in rule["draws_stop_train"]:
        assert_is_drtune_set(active, stop + 1, rule["K"], table)
    method = DRTune(min(rule["K"], num_steps), rule["early_stop_ratio"])
    stops = set()
    for _ in range(400):
        plan = method.plan(1.0 - np.arange(num_steps + 1) / num_steps, rng)
        stops.add(plan.reward_input.at)
        assert_is_drtune_set([i for i, _ in plan.active], plan.reward_input.at + 1, rule["K"], table)
    latest = round(num_steps * rule["early_stop_ratio"])
    assert stops == set(range(num_steps - max(latest, 1), num_steps))


def assert_is_drtune_set(active, length, K, table):
    if K >= length:
        assert active == list(range(length))
        return
    stride = length // K
    if (length, K) in table:
        assert table[length, K][0] in (stride, None) and table[length, K][1] == length - 1 - (K - 1) * stride
    assert len(active) == K and all(b - a == stride for a, b in zip(active, active[1:], strict=False))
    assert 0 <= active[0] <= length - 1 - (K - 1) * stride


def test_bridge_allocation_table():
    for K, pre_length, post_length, pre, post in RULES["bridge_allocation_K_prelen_postlen_to_counts"]:
        assert bridge_allocation(min(K, pre_length + post_length), pre_length, post_length) == (pre, post), (
            K,
            pre_length,
            post_length,
        )


def test_lagrange_support_table():
    for length, order, offsets in RULES["lagrange_support_offsets_len_order"]:
        assert lagrange_supports(7, 7 + length, order) == tuple(7 + offset for offset in offsets)


def test_train_window_table():
    for num_steps, ratio, shortest, start, stop in RULES["windows_N_ratio_minwindow_to_start_end"]:
        assert train_window(num_steps, ratio, shortest) == (start, stop)
