"""Pictures of README and docs:  python docs/pictures.py  writes these beside this file.

plans.png        one plan of each method, over 12 steps
step.svg         one optimizer step, drawn here in plain SVG on a card of its own, so that it reads on any background
before_after.png the first eight prompts of demo/samples_before.png above those of demo/samples_after.png, each with the
                 checker's verdict; the 32 x 32 images are read back out of the two grids
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

DOCS = Path(__file__).parent
INK, GREY, QUIET, ACTIVE, BRIDGE, REWARD = "#1f2933", "#52606d", "#b8c1cc", "#2563eb", "#b45309", "#047857"
STEPS, PLANNED, GATED = 10, (2, 5, 7, 9), 7  # the rollout that is drawn: its steps, active nodes and bridge
LINE, SWEEP, TOTAL = 122, 268, 364  # heights of the rollout, of the replays and of the sum of gradients


def step_picture() -> str:
    """One optimizer step as SVG: plan, rollout and cache, reward gradient, sweep, optimizer."""
    at = [62 + 56 * node for node in range(STEPS + 1)]
    last = at[-1]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 436" role="img" font-family="sans-serif" '
        f'font-size="13" fill="{INK}">',
        "<title>One step: plan, rollout and cache, reward gradient, sweep, optimizer</title>",
        "<defs>" + "".join(arrowhead(colour) for colour in (GREY, ACTIVE, BRIDGE, REWARD)) + "</defs>",
        '<rect x="1" y="1" width="958" height="434" rx="10" fill="#ffffff" stroke="#d0d7de"/>',
        heading(1, 28, 34, "Plan", "the method draws which nodes are active, their weights, and at most one bridge"),
        heading(2, 28, 70, "Rollout", "N steps without gradient; the cache holds what the plan reads"),
    ]
    # 2: the rollout and its cache
    parts += [arrow(x + 9, LINE, x + 46, LINE, GREY) for x in at[:-1]]
    for node, x in enumerate(at[:-1]):
        active = node in PLANNED
        parts.append(circle(x, LINE, 8 if active else 5, ACTIVE if active else QUIET))
    parts.append(circle(at[GATED], LINE, 12, "none", BRIDGE))
    parts += [text(at[0], LINE + 28, "noise", anchor="middle"), text(last, LINE - 14, "sample", anchor="middle")]
    parts.append(circle(last, LINE, 8, REWARD))
    for node in PLANNED:
        parts += [line(at[node], LINE + 14, at[node], LINE + 34, QUIET), box(at[node], LINE + 46, 46, 22, QUIET)]
        parts.append(text(at[node], LINE + 51, f"x{sub(node)}, v{sub(node)}", size=12, anchor="middle"))
    # 3: the reward's gradient
    parts += [arrow(last + 11, LINE, 700, LINE, REWARD), box(738, LINE, 72, 40, REWARD), arrow(776, LINE, 806, LINE)]
    parts += [box(856, LINE, 96, 40, REWARD), text(738, LINE + 5, "VAE", anchor="middle")]
    parts += [text(856, LINE + 5, "reward", anchor="middle")]
    parts.append(heading(3, 700, 70, "Reward gradient", ""))
    parts.append(text(700, LINE + 44, "g = ∂loss/∂sample; no graph of", GREY))
    parts.append(text(700, LINE + 61, "the network is in memory yet", GREY))
    parts.append(path(f"M 856 {LINE + 72} V {SWEEP} H {at[9] + 30}", REWARD))
    parts.append(text(752, SWEEP - 8, "g", REWARD, anchor="middle"))
    # 4: the sweep, from the clean end to the noise end
    parts += [text(28, LINE + 51, "cache", GREY), heading(4, 28, 222, "Sweep", "")]
    for node, before in zip(PLANNED, (*PLANNED[1:], None), strict=True):
        parts += [line(at[node], LINE + 58, at[node], SWEEP - 19, QUIET, dashed=True)]
        parts += [box(at[node], SWEEP, 52, 36, BRIDGE if node == GATED else ACTIVE)]
        parts.append(text(at[node], SWEEP + 5, f"∇v{sub(node)}", anchor="middle"))
        parts.append(arrow(at[node], SWEEP + 19, at[node], TOTAL - 22, ACTIVE))
        if before is not None:
            parts.append(arrow(at[before] - 27, SWEEP, at[node] + 30, SWEEP, BRIDGE if before <= GATED else REWARD))
    parts.append(text((at[2] + at[5]) / 2, SWEEP - 8, "g + α gₓ", BRIDGE, anchor="middle"))
    parts.append(text(at[GATED] + 4, SWEEP - 26, "bridge", BRIDGE, size=12))
    note = ("one node at a time: replay it,", "v.backward(weight · cotangent),", "free its graph")
    parts += [text(660, SWEEP + 24 + 17 * i, said, GREY) for i, said in enumerate(note)]
    # 5: the sum and the optimizer
    parts.append(box(330, TOTAL, 560, 40, ACTIVE))
    parts.append(text(330, TOTAL + 5, "gradient of the weights = sum over active nodes", anchor="middle"))
    parts += [arrow(612, TOTAL, 652, TOTAL, ACTIVE), heading(5, 660, TOTAL + 5, "Optimizer", "")]
    parts.append(text(660, TOTAL + 24, "clip, AdamW, moving average", GREY))
    parts.append(text(28, 418, "In memory at a time: the cache, and the graph of one network call.", GREY))
    return "\n".join([*parts, "</svg>", ""])


def sub(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def arrowhead(colour: str) -> str:
    return (
        f'<marker id="{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'
    )


def path(d: str, colour: str) -> str:
    return f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="1.6" marker-end="url(#{colour[1:]})"/>'


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str = REWARD) -> str:
    return path(f"M {x1} {y1} L {x2} {y2}", colour)


def line(x1: float, y1: float, x2: float, y2: float, colour: str, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="1.4"{dashes}/>'


def circle(x: float, y: float, radius: float, fill: str, stroke: str = "none") -> str:
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{fill}" stroke="{stroke}" stroke-width="2.2"/>'


def box(x: float, y: float, width: float, height: float, stroke: str) -> str:
    corner = f'x="{x - width / 2}" y="{y - height / 2}"'
    return (
        f'<rect {corner} width="{width}" height="{height}" rx="5" fill="#ffffff" stroke="{stroke}" stroke-width="1.8"/>'
    )


def text(x: float, y: float, said: str, colour: str = INK, size: float = 13, anchor: str = "start", bold: bool = False):
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>{escape(said)}</text>'
    )


def heading(number: int, x: float, y: float, title: str, said: str) -> str:
    return text(x, y, f"{number}  {title}", size=15, bold=True) + (text(x + 92, y, said, GREY) if said else "")


def before_after(count: int = 8):
    """The first prompts of the demo, before above after, as a matplotlib figure."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    from flowbp.runtime.data import load_prompts
    from flowbp.shapes import check

    corners = [(left, top) for top in (25, 260, 496, 732) for left in (8, 200, 392, 585)]  # insides of the frames
    pixel = (np.arange(32) + 0.5) * 179.5 / 32  # an inside is 179.5 pixels wide, an image 32
    captions = [prompt.text for prompt in load_prompts("shapes:test")[:count]]
    figure = Figure(figsize=(1.22 * count, 3.15), layout="constrained")
    panels = figure.subplots(2, count)
    for row, name in zip(panels, ("before", "after"), strict=True):
        grid = imread(DOCS / f"demo/samples_{name}.png")[..., :3]
        for axes, caption, (left, top) in zip(row, captions, corners, strict=False):
            image = grid[np.ix_((top + pixel).astype(int), (left + pixel).astype(int))]
            shown = check((255 * image).round().astype(np.uint8), caption)
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(
                    color="#059669" if shown else "#d97706", linewidth=2.4, linestyle="-" if shown else (0, (4, 2))
                )
            if name == "before":
                axes.set_title("\n".join(textwrap.wrap(caption, 15)), fontsize=9, color=INK)
            axes.set_xlabel("✓" if shown else "✗", fontsize=10, color=INK, labelpad=2)
        row[0].set_ylabel(name, fontsize=11, color=INK)
    return figure


def plans(steps: int = 12, seed: int = 3):
    """One plan of each method on the noise levels of `shapes`, as a matplotlib figure with one legend."""
    import numpy as np
    from matplotlib.figure import Figure

    from flowbp.evaluation.figures import draw_nodes, finished
    from flowbp.methods import METHODS

    u = np.linspace(1, 1 / steps, steps)
    sigmas = [*(2 * u / (1 + u)), 0.0]  # shift 2
    figure = Figure(figsize=(9.6, 8.4), layout="constrained")
    axes, told = figure.subplots(4, 2).flat, {}
    for axis, (name, method) in zip(axes, METHODS.items(), strict=False):
        draw_nodes(axis, method().plan(np.array(sigmas), np.random.default_rng(seed)), sigmas)
        axis.set_title(name, loc="left", color=INK)
        axis.set(xticks=range(0, steps + 1, 3), yticks=[0, 1], ylabel="σ", ylim=(-0.12, 1.5))
        for mark, label in zip(*axis.get_legend_handles_labels(), strict=True):
            told[re.sub(r" (at|of) node \d+|, alpha.*", "", label)] = mark
    axes[-1].axis("off")
    axes[-1].legend(told.values(), told.keys(), frameon=False, fontsize=9, loc="center left", labelspacing=0.9)
    return finished(figure)


if __name__ == "__main__":
    plans().savefig(DOCS / "plans.png", dpi=100)
    (DOCS / "step.svg").write_text(step_picture(), encoding="utf-8")
    before_after().savefig(DOCS / "demo/before_after.png", dpi=100)
