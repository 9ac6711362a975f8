"""Every method on random problems against a second implementation: NumPy alone, from the published update rules, one
method at a time.

The engine runs one table of numbers for all methods. Here each gradient is written as its paper writes it, by explicit
VJPs of the network v(z, s) = W2 tanh(W1 z + b1 + c1 s + U c) + b2, for any noise levels, batch, guidance, hinge and
hyperparameters.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbp.guidance import Guidance, GuidedVelocity
from flowbp.methods import DRaFTLV, DRTune, FlowBPBridge, FlowBPLagrange, FlowBPSparse, LeapAlign, ReFL
from flowbp.objective import Objective, loss_factors, sample_weights
from flowbp.surrogate import backward, residuals, reward_input
from flowbp.trajectory import rollout

SIZE, HIDDEN, TEXT = 5, 7, 3


@dataclass
class Problem:
    """theta: W1 b1 c1 U W2 b2; conditioning p, n [B, TEXT]; reward a z + q z^2 / 2; noise x [B, SIZE]; sigmas [N +
    1].
    """

    theta: list
    p: np.ndarray
    n: np.ndarray
    a: np.ndarray
    q: np.ndarray
    x: np.ndarray
    sigmas: np.ndarray
    guidance: Guidance
    hinge: float | None
    solver: str

    def table(self):
        """B of x_{n+1} = x_n + sum_i B[n, i] v_i: the rule that integrates polynomials through the last nodes."""
        s, order = self.sigmas, {"euler": 1, "adams-2": 2, "adams-3": 3}[self.solver]
        B = np.zeros((len(s) - 1, len(s) - 1))
        for n in range(len(B)):
            for q in range(min(order, n + 1), 0, -1):
                nodes, degree = s[n - q + 1 : n + 1] - s[n], np.arange(q)[:, None]
                moments = (s[n + 1] - s[n]) ** (degree + 1) / (degree + 1)
                row = np.linalg.solve(nodes[None] ** degree, moments)[:, 0]
                if q == 1 or abs(row).sum() <= 5 * (s[n] - s[n + 1]):
                    B[n, n - q + 1 : n + 1] = row
                    break
        return B

    def branch(self, z, s, c):
        W1, b1, c1, U, W2, b2 = self.theta
        return np.tanh(z @ W1.T + b1 + c1 * s + c @ U.T) @ W2.T + b2

    def branch_vjp(self, z, s, c, y):
        W1, b1, c1, U, W2, b2 = self.theta
        hidden = np.tanh(z @ W1.T + b1 + c1 * s + c @ U.T)
        d = (y @ W2) * (1 - hidden**2)
        return [d.T @ z, d.sum(0), s * d.sum(0), d.T @ c, y.T @ hidden, y.sum(0)], d @ W1

    def v(self, z, s):
        w, positive = self.guidance.scale, self.branch(z, s, self.p)
        return positive if w <= 1 else (u := self.branch(z, s, self.n)) + w * (positive - u)

    def vjp(self, z, s, y):
        """(theta-part, x-part) of the guided velocity's VJP."""
        w = self.guidance.scale
        if w <= 1:
            return self.branch_vjp(z, s, self.p, y)
        theta, x = self.branch_vjp(z, s, self.p, w * y)
        if not self.guidance.detach_negative:
            theta_n, x_n = self.branch_vjp(z, s, self.n, (1 - w) * y)
            theta, x = [a + b for a, b in zip(theta, theta_n, strict=True)], x + x_n
        return theta, x

    def loss_gradient(self, z, weight, keep):
        """loss, and d(loss / divisor) / dz; weight, keep: one a row of z."""
        r = z @ self.a + 0.5 * (self.q * z * z).sum(1)
        slope = np.full(len(z), -1.0) if self.hinge is None else np.where(r < self.hinge, -1.0, 0.0)
        losses = -r if self.hinge is None else np.maximum(self.hinge - r, 0)
        count = max(keep.sum(), 1)
        g = (keep * weight * slope / count)[:, None] * (self.a + self.q * z)
        divisor = self.guidance.scale if self.guidance.compensate and self.guidance.scale > 1 else 1.0
        return (keep * weight * losses).sum() / count, g / divisor


@dataclass
class Expected:
    reward_input: np.ndarray
    loss: float
    gradient: np.ndarray


def by_hand(problem, kind, method, draw):
    """The released update rule of one method. draw: the indices, and for DRaFT-LV the noise."""
    P, s = problem, problem.sigmas
    N, h, B = len(s) - 1, np.diff(s), P.table()
    xs, vs = [P.x], []
    for i in range(N):
        vs.append(P.v(xs[i], s[i]))
        xs.append(xs[i] + sum(B[i, k] * vs[k] for k in range(i + 1)))
    total = [np.zeros_like(t) for t in P.theta]

    def seed(i, y, z=None):
        """Adds the theta-part of the VJP at node i, returns its x-part."""
        theta, x = P.vjp(xs[i] if z is None else z, s[i], y)
        for sum_, part in zip(total, theta, strict=True):
            sum_ += part
        return x

    def objective(z, weight=None, keep=None):
        ones = np.ones(len(z))
        return P.loss_gradient(z, ones if weight is None else weight, ones if keep is None else keep)

    def done(z, loss):
        return Expected(z, loss, np.concatenate([t.ravel() for t in total]))

    def rho(T, A, strength):
        return 1 + strength * (T / A - 1) if strength > 0 and A > 1e-8 else 1.0

    def similarity(xj_hat, x0_hat, j):
        d_j, d_0 = np.abs(xj_hat - xs[j]).mean(1), np.abs(x0_hat - xs[N]).mean(1)
        keep = np.ones(len(P.x), bool)
        for d, largest in ((d_j, getattr(method, "max_dj", None)), (d_0, getattr(method, "max_d0", None))):
            keep &= largest is None or d <= largest
        return 1 / (np.maximum(d_j, method.tau) + np.maximum(d_0, method.tau)), keep

    if kind == "refl":
        i = draw["node"]
        z = xs[i] - s[i] * vs[i]
        loss, g = objective(z)
        seed(i, -s[i] * g)
        return done(z, loss)

    if kind == "draft-lv":
        i, B = N - 1, len(P.x)
        z0 = xs[i] - s[i] * vs[i]
        noised = [(1 - s[i]) * z0 + s[i] * eps for eps in draw["eps"]]
        z = np.concatenate([z0, *(x - s[i] * P.v(x, s[i]) for x in noised)])
        loss, g = objective(z)
        for m, x in enumerate([xs[i], *noised]):
            seed(i, -s[i] * g[m * B : (m + 1) * B], x)
        return done(z, loss)

    if kind == "drtune":
        e = draw["stop"]
        z = xs[e] - s[e] * vs[e]
        loss, g = objective(z)
        for i in draw["active"]:
            seed(i, -s[e] * g if i == e else h[i] * g)
        return done(z, loss)

    if kind in ("flowbp-sparse", "flowbp-bridge"):
        loss, g = objective(xs[N])
        window = max(1 if kind == "flowbp-sparse" else 3, int(np.ceil(N * method.tail_ratio)))
        j = draw.get("j", 0)  # without a bridge every node is a post step
        W, W_j = B.sum(0), B[:j].sum(0)  # weights of the velocities in x_N and in x_j
        factor = rho(np.abs(W[N - window :]).sum(), np.abs(W[draw["active"]]).sum(), method.rescale)
        g_x = 0.0
        for i in draw["active"]:
            if i >= j:
                x_part = seed(i, factor * W[i] * g)
                g_x = x_part if i == j else g_x
        for i in draw["active"]:
            if i < j:
                seed(i, factor * (W[i] * g + method.alpha * W_j[i] * g_x))
        return done(xs[N], loss)

    k, j = draw["k"], draw["j"]
    if kind == "leapalign":
        weight, keep = similarity(xs[k] + (s[j] - s[k]) * vs[k], xs[j] - s[j] * vs[j], j)
        loss, g = objective(xs[N], weight, keep)
        g_x = seed(j, -s[j] * g)
        seed(k, (s[j] - s[k]) * (g + method.alpha * g_x))
        return done(xs[N], loss)

    def segment(a, b):
        """Supports, weights, and coefficients of the active supports."""
        L, o = b - a, method.order
        nodes = (
            list(range(a, b))
            if L <= o
            else [a]
            if o == 1
            else sorted({a + round(i * (L - 1) / (o - 1)) for i in range(o)})
        )
        if method.weights == "uniform":
            w = [(s[b] - s[a]) / len(nodes)] * len(nodes)
        else:
            w = []
            for m in nodes:
                others = [s[i] for i in nodes if i != m]
                primitive = (
                    np.poly1d(others, r=True) / np.prod([s[m] - o for o in others]) if others else np.poly1d([1.0])
                ).integ()
                w.append(primitive(s[b]) - primitive(s[a]))
        active = {"none": [], "start": nodes[:1], "midpoint": nodes[:2], "all": nodes}[method.active]
        active = active[: method.max_active] if method.max_active else active
        factor = rho(
            sum(map(abs, w)), sum(abs(x) for i, x in zip(nodes, w, strict=True) if i in active), method.rescale
        )
        scale = {i: 1.0 if i == a else method.support_scale for i in nodes}
        return nodes, w, {i: scale[i] * factor * x for i, x in zip(nodes, w, strict=True) if i in active}

    anchor = method.anchor
    nodes_kj, w_kj, first = segment(k, j)
    nodes_j0, w_j0, second = segment(j, N)
    xj_lagrange = xs[k] + sum(w * vs[i] for i, w in zip(nodes_kj, w_kj, strict=True))
    xj_euler = xs[k] + (s[j] - s[k]) * vs[k]
    x0_hat = xs[j] + sum(w * vs[i] for i, w in zip(nodes_j0, w_j0, strict=True))
    weight, keep = similarity(anchor * xj_lagrange + (1 - anchor) * xj_euler, x0_hat, j)
    loss, g = objective(xs[N], weight, keep)
    g_x = 0.0
    for i, coefficient in second.items():
        x_part = seed(i, coefficient * g)
        g_x = x_part if i == j else g_x
    G = g + method.alpha * g_x
    for i, coefficient in first.items():
        if i != k:
            seed(i, anchor * coefficient * G)
    seed(k, (anchor * first.get(k, 0.0) + (1 - anchor) * (s[j] - s[k])) * G)
    return done(xs[N], loss)


def by_flowbp(problem, plan, eps, nodes_per_forward):
    tensors = [torch.tensor(t) for t in problem.theta]
    W1, b1, c1, U, W2, b2 = theta = [t.requires_grad_() for t in tensors]
    p, n, a, q, x = (torch.tensor(t) for t in (problem.p, problem.n, problem.a, problem.q, problem.x))

    def network(z, sigma, conditioning):
        return torch.tanh(z @ W1.T + b1 + c1 * sigma.reshape(-1, 1).to(z) + conditioning["c"] @ U.T) @ W2.T + b2

    velocity = GuidedVelocity(network, {"c": p}, {"c": n}, problem.guidance)
    copies = [torch.tensor(e) for e in eps]
    trajectory = rollout(velocity, x, torch.tensor(problem.sigmas), plan, copies, solver=problem.solver)
    z = reward_input(plan, trajectory).requires_grad_()
    weights, keep = torch.ones(len(x), dtype=x.dtype), torch.ones(len(x), dtype=torch.bool)
    if plan.similarity is not None:
        weights, keep = sample_weights(plan.similarity, *residuals(plan, trajectory))
    factors = loss_factors(weights, keep, 1 + plan.num_renoised) / problem.guidance.divisor
    loss = Objective(problem.hinge).loss(z @ a + 0.5 * (q * z * z).sum(1), factors)
    (g,) = torch.autograd.grad(loss, z)
    backward(plan, trajectory, velocity.replay, g, nodes_per_forward=nodes_per_forward)
    gradient = torch.cat([t.grad.flatten() for t in theta])
    return Expected(z.detach().numpy(), loss.item() * problem.guidance.divisor, gradient.numpy())


unit = st.sampled_from([0.0, 1.0]) | st.floats(0.0, 1.0)


@st.composite
def problems(draw, fewest_steps=1):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    N, B = draw(st.integers(fewest_steps, 12)), draw(st.integers(1, 4))
    shapes = [(HIDDEN, SIZE), (HIDDEN,), (HIDDEN,), (HIDDEN, TEXT), (SIZE, HIDDEN), (SIZE,)]
    if draw(st.booleans()):
        u, shift = 1 - np.arange(N) / N, draw(st.sampled_from([1.0, 3.0, 6.0]))
        sigmas = np.append(shift * u / (1 + (shift - 1) * u), 0.0)
    else:
        sigmas = np.append(np.cumsum(rng.uniform(0.05, 1, N))[::-1], 0.0)
        sigmas /= sigmas[0]
    guidance = Guidance(draw(st.sampled_from([0.0, 1.0, 1.5, 4.5])), draw(st.booleans()), draw(st.booleans()))
    drawn = [rng.standard_normal(shape) / shape[-1] ** 0.5 for shape in shapes]
    p, n = rng.standard_normal((2, B, TEXT))
    a, q = rng.standard_normal((2, SIZE))
    hinge = draw(st.sampled_from([None, 0.0, 1.0]))
    solver = draw(st.sampled_from(["euler", "euler", "adams-2", "adams-3"]))
    return Problem(drawn, p, n, a, q, rng.standard_normal((B, SIZE)), sigmas, guidance, hinge, solver), rng


@st.composite
def cases(draw, kind):
    """(problem, method, indices, plan, noise of the copies)"""
    problem, rng = draw(problems(fewest_steps=3 if kind in ("flowbp-bridge", "leapalign", "flowbp-lagrange") else 1))
    s, N, eps = problem.sigmas, len(problem.sigmas) - 1, ()
    tail, alpha, rescale = draw(st.floats(0.05, 1.0)), draw(unit), draw(st.floats(0, 2))
    if kind == "refl":
        method, indices = ReFL(), {"node": draw(st.integers(0, N - 1))}
        plan = method.at(s, indices["node"])
    elif kind == "draft-lv":
        method = DRaFTLV(draw(st.integers(0, 3)))
        eps = rng.standard_normal((method.num_renoised, *problem.x.shape))
        indices, plan = {"eps": eps}, method.at(s)
    elif kind == "drtune":
        stop = draw(st.integers(0, N - 1))
        indices = {"stop": stop, "active": sorted(draw(st.sets(st.integers(0, stop), min_size=1)))}
        method = DRTune()
        plan = method.at(s, stop, indices["active"])
    elif kind == "flowbp-sparse":
        method = FlowBPSparse(rescale=rescale, tail_ratio=tail)
        indices = {"active": sorted(draw(st.sets(st.integers(0, N - 1), min_size=1)))}
        plan = method.at(s, indices["active"], problem.solver)
    elif kind == "flowbp-bridge":
        method, j = FlowBPBridge(rescale=rescale, alpha=alpha, tail_ratio=tail), draw(st.integers(0, N - 1))
        indices = {"j": j, "active": sorted(draw(st.sets(st.integers(0, N - 1))) | {j})}
        plan = method.at(s, j, indices["active"], problem.solver)
    else:
        k, j = sorted(draw(st.lists(st.integers(0, N - 1), min_size=2, max_size=2, unique=True)))
        indices, tau = {"k": k, "j": j}, draw(st.sampled_from([1e-3, 0.1, 10.0]))
        if kind == "leapalign":
            method = LeapAlign(alpha, tau)
        else:
            anchor = draw(unit)
            active = draw(st.sampled_from(["start", "midpoint", "all"] + ["none"] * (anchor < 1)))
            method = FlowBPLagrange(
                draw(st.integers(1, 5)), alpha, tau, rescale, active, draw(st.integers(0, 3)), draw(unit),
                draw(st.sampled_from(["lagrange", "uniform"])), anchor,
                max_dj=draw(st.none() | st.floats(1e-3, 1.0)), max_d0=draw(st.none() | st.floats(1e-3, 1.0)),
            )  # fmt: skip
        plan = method.at(s, k, j)
    return problem, method, indices, plan, eps


METHODS = ["refl", "draft-lv", "drtune", "leapalign", "flowbp-sparse", "flowbp-bridge", "flowbp-lagrange"]


@pytest.mark.parametrize("kind", METHODS)
def test_a_method_is_its_published_rule(kind):
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(case=cases(kind), nodes_per_forward=st.integers(1, 3))
    def check(case, nodes_per_forward):
        problem, method, indices, plan, eps = case
        expected, mine = by_hand(problem, kind, method, indices), by_flowbp(problem, plan, eps, nodes_per_forward)
        scale, tolerance = np.abs(expected.reward_input).max(), 1e-9
        assert np.abs(mine.reward_input - expected.reward_input).max() <= tolerance * scale
        assert mine.loss == pytest.approx(expected.loss, rel=tolerance, abs=tolerance * scale)
        assert np.linalg.norm(mine.gradient - expected.gradient) <= tolerance * max(
            np.linalg.norm(expected.gradient), 1e-6
        )

    check()
