"""Pictures: a plan, training curves, and grids of samples. Each function returns a matplotlib figure.

One palette serves them all. Its colours are at least 23 apart (CIE76) for normal sight and for each of the three colour
blindnesses (Machado et al. 2009, severity 1), and have a contrast of at least 3:1 on white. Nothing is told by colour
alone: shapes, dashes or marks repeat it.
"""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.text import Text

from flowbp.evaluation.templates import NOT_BETTER, by_metric
from flowbp.plan import SurrogatePlan
from flowbp.runtime.console import plain

INK, QUIET, ACTIVE, BRIDGE, REWARD, EXTRA = "#1f2933", "#b8c1cc", "#2563eb", "#d97706", "#059669", "#86198f"


def finished(figure: Figure, framed: bool = False) -> Figure:
    """`figure`, in which every string is shown as it was typed: a $ of a prompt or a name begins no mathematics.

    framed: leave all four sides of the axes as they are; else they have a left and a lower one.
    """
    for axes in figure.axes if not framed else ():
        axes.spines[["top", "right"]].set_visible(False)
    for text in figure.findobj(Text):
        text.set(text=plain(text.get_text()), parse_math=False, usetex=False)
    return figure


def draw_plan(plan: SurrogatePlan, sigmas: Sequence[float], title: str = "") -> Figure:
    """Above: the rollout from noise to sample, with the nodes that are replayed. Below: the weights of the quadrature
    in the surrogate's value and in its gradient.
    """
    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    path, bars = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    draw_nodes(path, plan, sigmas)
    path.set_ylabel("noise level σ")
    path.set_title(title, loc="left", color=INK)
    path.legend(frameon=False, fontsize=9, loc="lower left", markerscale=0.75, labelspacing=0.6)

    nodes, weights = zip(*plan.active, strict=True) if plan.active else ((), ())
    bars.bar(plan.nodes, plan.weights, width=0.72, color=QUIET, label="value weight")
    bars.vlines(nodes, 0, weights, color=ACTIVE, lw=2)
    bars.scatter(nodes, weights, s=26, color=ACTIVE, zorder=3, label="gradient weight")
    bars.axhline(0, color=INK, lw=0.6)
    bars.set(xlabel=f"node of the rollout (0: noise, {len(sigmas) - 1}: sample)", ylabel="weight (σ units)")
    bars.legend(frameon=False, fontsize=9, loc="best")
    return finished(figure)


def draw_nodes(path: Axes, plan: SurrogatePlan, sigmas: Sequence[float]) -> None:
    """The rollout from noise to sample: what is replayed, what the cache gives, what the reward sees, the bridge."""
    sigmas, total, active = np.asarray(sigmas), len(sigmas) - 1, [node for node, _ in plan.active]
    cached = [i for i, weight in zip(plan.nodes, plan.weights, strict=True) if weight and i not in active]
    visited = plan.num_steps(total)
    reached = total + 1 if plan.reward_input is None else visited
    path.plot(range(reached), sigmas[:reached], color=QUIET, lw=1.2, zorder=1)
    if unread := [i for i in range(visited) if i not in active and i not in cached]:
        path.scatter(unread, sigmas[unread], s=14, color=QUIET, zorder=2, label="rolled out, no gradient")
    if cached:
        ring = {"s": 36, "facecolors": "white", "edgecolors": INK, "zorder": 2}
        path.scatter(cached, sigmas[cached], label="from the cache: in the value, without gradient", **ring)
    path.scatter(active, sigmas[active], s=64, color=ACTIVE, zorder=3, label="active: replayed, with gradient")
    star = {"s": 150, "marker": "*", "color": REWARD, "zorder": 4}
    if plan.reward_input is None:
        path.scatter([total], [sigmas[-1]], label="reward sees the sample", **star)
    else:
        e, leap = plan.reward_input.at, {"arrowstyle": "->", "color": REWARD, "ls": "--", "shrinkB": 7}
        path.annotate("", (total, 0), (e, sigmas[e]), arrowprops=leap)
        path.scatter([total], [0], label=f"reward sees the posterior mean of node {e}", **star)
    if plan.bridge is not None:
        j, label = plan.bridge.node, f"bridge at node {plan.bridge.node}, alpha = {plan.bridge.alpha:g}"
        path.scatter(j, sigmas[j], s=150, facecolors="none", edgecolors=BRIDGE, lw=2, zorder=4, label=label)
        arrow = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=0.25", "mutation_scale": 11, "color": BRIDGE}
        for i in (i for i in active if i < j and plan.active_bridge):
            path.add_patch(FancyArrowPatch((j, sigmas[j]), (i, sigmas[i]), lw=1.2, shrinkA=7, shrinkB=6, **arrow))
    if copies := plan.num_renoised:
        at, label = total - 1 + np.arange(1, copies + 1) / (copies + 1), f"replayed too: {copies} re-noised copies"
        path.scatter(at, [sigmas[-2]] * copies, facecolors="none", edgecolors=ACTIVE, label=label)


def styles(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """{"color", "linestyle"} of each name's line, all different up to fifteen names; then they repeat."""
    colours, dashes = (ACTIVE, BRIDGE, REWARD, EXTRA, INK), ("solid", "dashed", "dotted")
    return {name: {"color": colours[i % 5], "linestyle": dashes[i // 5 % 3]} for i, name in enumerate(names)}


def curves(runs: Mapping[str, Sequence[Mapping]], metric: str, title: str, unit: str, smooth: bool = True) -> Figure:
    """A metric of the rows of metrics.jsonl over steps, one line a run: its running mean over a tenth of the run, with
    each step faint behind.

    smooth = False marks every value instead, for metrics that few steps have.
    """
    figure = Figure(figsize=(3.6, 2.6), layout="constrained")
    axes, marks = figure.subplots(), {"marker": "" if smooth else "o", "ms": 4}
    for name, style in styles(list(runs)).items():
        if not (logged := [(row["step"], row[metric]) for row in runs[name] if metric in row]):
            continue
        steps, values = np.array(logged, dtype=float).T
        window = max(1, len(values) // 10) if smooth else 1
        if window > 1:
            axes.plot(steps, values, color=style["color"], lw=0.7, alpha=0.25)
        axes.plot(steps[window - 1 :], running_mean(values, window), lw=1.8, label=name, **marks, **style)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.locator_params(nbins=5)
    return finished(figure)


def changes_of_runs(metric: str, rows: Sequence[Mapping]) -> Figure:
    """The change of a metric in each training run, by the rows of sweep.json, one a setting: a dot a run, and the mean
    with its 95 % interval over runs.
    """
    figure = Figure(figsize=(7.0, 1.0 + 0.5 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(rows):
        values, (mean, low, high) = row["changes"], row["change"]
        axis.plot(values, [place + 0.2] * len(values), "o", ms=4, color=QUIET)
        axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="s", ms=6, color=ACTIVE, capsize=3)
    axis.axvline(0, color=QUIET, lw=1)
    axis.set_yticks(range(len(rows)), ["\n".join(textwrap.wrap(row["setting"], 40)) for row in rows])
    axis.set(ylim=(len(rows) - 0.5, -0.5), xlabel=f"change of {metric}")
    return finished(figure)


def strengths(models: Sequence[Mapping], changes: Sequence[Mapping]) -> Figure:
    """Each metric's paired change from the base model, with its 95 % interval, against the strength of the tuned
    weights: one panel a metric. At strength 0 nothing changes.

    models: of results.json, those with the same weights. changes: its rows, of these and of others.
    """
    rows_of = {metric: rows for metric, rows in by_metric(changes, "model").items() if metric not in NOT_BETTER}
    figure = Figure(figsize=(2.8 * len(rows_of), 2.8), layout="constrained")
    for axis, (metric, rows) in zip(figure.subplots(1, len(rows_of), squeeze=False)[0], rows_of.items(), strict=True):
        tuned = [(model.get("strength", 1.0), rows[model["name"]]) for model in models]
        points = [(0.0,) * 4, *((s, row["change"], row["low"], row["high"]) for s, row in tuned)]
        strength, change, low, high = np.array(sorted(points)).T
        axis.errorbar(strength, change, yerr=[change - low, high - change], fmt="s-", ms=5, color=ACTIVE, capsize=3)
        axis.axhline(0, color=QUIET, lw=1)
        axis.set_title(f"change of {metric}", loc="left", color=INK)
        axis.set_xlabel("strength")
    return finished(figure)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Means [n - window + 1] of the finite values in each window of values [n]; nan where a window has none."""
    finite, ones = np.isfinite(values), np.ones(window)
    counts = np.convolve(finite, ones, mode="valid")
    sums = np.convolve(np.where(finite, values, 0.0), ones, mode="valid")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def sample_grid(images: np.ndarray, captions: list[str], passed: Sequence[bool | None], columns: int = 4) -> Figure:
    """images [n, H, W, 3] in [0, 1] with their captions.

    passed: the checker's verdicts, shown as a tick and a solid frame, or a cross and a dashed one; None: not judged.
    """
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.75 * columns, 2.1 * rows), layout="constrained")
    figure.subplots(rows, columns, subplot_kw={"xticks": [], "yticks": [], "frame_on": False})
    for axes, image, caption, ok in zip(figure.axes, images, captions, passed, strict=False):
        axes.imshow(image, interpolation="nearest" if image.shape[0] < 128 else "antialiased")
        mark = {None: "", True: "\N{CHECK MARK} ", False: "\N{BALLOT X} "}[ok]
        lines = textwrap.wrap(caption, 21, max_lines=3, placeholder=" ...") or [""]
        axes.set_title(mark + "\n".join(lines), fontsize=9, color=INK)
        if ok is not None:
            axes.set_frame_on(True)
            for spine in axes.spines.values():
                spine.set(color=REWARD if ok else BRIDGE, linewidth=2.2, linestyle="solid" if ok else (0, (4, 2)))
    return finished(figure, framed=True)
