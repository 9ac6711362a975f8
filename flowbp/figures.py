"""Pictures: a plan, training curves, and grids of samples. Each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from flowbp.plan import SurrogatePlan

__all__ = ["curves", "draw_plan", "overlaid_curves", "sample_grid"]

INK, QUIET, ACTIVE, BRIDGE, REWARD = "#1f2933", "#b8c1cc", "#2563eb", "#d97706", "#059669"


def draw_plan(plan: SurrogatePlan, sigmas: Sequence[float], title: str = "") -> Figure:
    """Above: the rollout from noise to sample, with what is re-forwarded. Below: the weights of the quadrature and of the gradient."""
    sigmas = np.asarray(sigmas)
    total = len(sigmas) - 1
    active = dict(plan.active)
    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    path, bars = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])

    visited = plan.num_steps(total)
    path.plot(range(total + 1), sigmas, color=QUIET, lw=1.2, zorder=1)
    path.scatter(range(visited), sigmas[:visited], s=14, color=QUIET, zorder=2, label="rolled out, no gradient")
    path.scatter(list(active), sigmas[list(active)], s=64, color=ACTIVE, zorder=3, label="active: replayed with gradient")
    if plan.reward_input is None:
        path.scatter([total], [sigmas[-1]], s=150, marker="*", color=REWARD, zorder=4, label="reward sees the sample")
    else:
        e = plan.reward_input.at
        path.annotate("", (total, 0), (e, sigmas[e]), arrowprops={"arrowstyle": "->", "color": REWARD, "ls": "--"})
        path.scatter([e], [sigmas[e]], s=150, marker="*", color=REWARD, zorder=4, label=f"reward sees the posterior mean of node {e}")
    if plan.bridge is not None:
        j = plan.bridge.node
        at_j = (j, sigmas[j])
        ring = {"s": 150, "facecolors": "none", "edgecolors": BRIDGE, "lw": 2, "zorder": 4}
        path.scatter(*at_j, label=f"bridge at node {j}, alpha = {plan.bridge.alpha:g}", **ring)
        arrow = {"connectionstyle": "arc3,rad=0.25", "arrowstyle": "-|>", "mutation_scale": 11, "color": BRIDGE, "shrinkA": 7, "shrinkB": 6}
        for i in (i for i in active if i < j and plan.active_bridge):
            path.add_patch(FancyArrowPatch(at_j, (i, sigmas[i]), lw=1.2, **arrow))
    path.set_ylabel("noise level $\\sigma$")
    path.set_title(title, loc="left", color=INK)
    path.legend(frameon=False, fontsize=8, loc="lower left")

    bars.bar(plan.nodes, plan.weights, width=0.72, color=QUIET, label="value weight")
    nodes, weights = list(active), list(active.values())
    bars.vlines(nodes, 0, weights, color=ACTIVE, lw=2)
    bars.scatter(nodes, weights, s=26, color=ACTIVE, zorder=3, label="gradient weight")
    bars.axhline(0, color=INK, lw=0.6)
    bars.set_xlabel("node (0: noise end)")
    bars.set_ylabel("weight ($\\sigma$ units)")
    bars.legend(frameon=False, fontsize=8, loc="best")
    for axes in (path, bars):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def curves(rows: Sequence[dict], keys: dict[str, str]) -> Figure:
    """One panel for each of `keys` (metric -> title) that the rows of metrics.jsonl hold: values, and their running mean over a tenth."""
    shown = [key for key in keys if any(key in row for row in rows)]
    figure = Figure(figsize=(3.3 * len(shown), 2.5), layout="constrained")
    steps = [row["step"] for row in rows]
    window = max(1, len(rows) // 10)
    for axes, key in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        values = np.array([row.get(key, np.nan) for row in rows], dtype=float)
        axes.plot(steps, values, color=QUIET, lw=0.8)
        if len(rows) >= window > 1:
            axes.plot(steps[window - 1 :], np.convolve(values, np.ones(window) / window, mode="valid"), color=ACTIVE, lw=1.8)
        axes.set_title(keys[key], fontsize=10, color=INK, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def overlaid_curves(runs: Mapping[str, Sequence[dict]], keys: Mapping[str, str]) -> Figure:
    """One panel for each of `keys` (metric -> title): the running mean over a tenth of each run's rows, in a colour a run."""
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.5 * rows + 0.3), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for key, axes in zip(keys, panels, strict=False):  # in this order: zip takes no panel beyond the last key
        for name, logged in runs.items():
            values = np.array([row.get(key, np.nan) for row in logged], dtype=float)
            window = max(1, len(logged) // 10)
            steps = [row["step"] for row in logged][window - 1 :]
            axes.plot(steps, np.convolve(values, np.ones(window) / window, mode="valid"), lw=1.6, label=name)
        axes.set_title(keys[key], fontsize=10, color=INK, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(panels):
        axes.axis("off")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside upper left", ncols=4)
    return figure


def sample_grid(images: np.ndarray, captions: Sequence[str], passed: Sequence[bool | None], columns: int = 4) -> Figure:
    """images [n, H, W, 3] in [0, 1] with their captions; a green or red frame where a checker passed or failed them (None: no frame)."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.75 * columns, 2.05 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, caption, ok in zip(figure.axes, images, captions, passed, strict=False):
        axes.imshow(image, interpolation="nearest" if image.shape[0] < 128 else "antialiased")
        axes.set_title("\n".join(wrap(caption, 22)), fontsize=7.5, color=INK)
        if ok is not None:
            axes.axis("on")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=REWARD if ok else "#dc2626", linewidth=2.2)
    return figure


def wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, max_lines=3, placeholder=" ...") or [""]
