"""Is it the reward's gradient that aligns a model? The demo beside five ways to train without it, or with all of it.

Every run takes the demo's optimizer steps at batch 16, and its images are scored alike, with 25 steps of Euler:

    surrogate          FlowBP-Lagrange, as in the demo
    random gradient    each sample's reward gradient is replaced by normal noise of the same norm
    shuffled prompts   the reward compares each image with the caption of another
    one node           FlowBP-Sparse with a single replayed node
    whole rollout      backpropagation through all steps, every Jacobian chained: what surrogates stand in for
    best of 4          no training: of four images of the base model, the one that the reward prefers

Seeds are shared, so that differences from `surrogate` are paired: 95 % t intervals over training runs. A call is one
forward pass of an image, rollout and replays together. For `best of 4` a seed is that of the noise, and calls are those
of drawing one image. A run is kept in the JSON file when it ends, and is not made again.

    python benchmarks/controls.py --json docs/controls.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from few_steps import COMMON, METRICS, collect, summary, told, trained

from flowbp.backbones.base import bind_velocity
from flowbp.config import load
from flowbp.objective import clip_samples, reward_gradient
from flowbp.runtime.data import sample_seeds
from flowbp.training.trainer import Trainer
from flowbp.trajectory import rollout_with_graph


class RandomGradient(Trainer):
    def reward_cotangent(self, plan, trajectory, texts, key):
        g, logged = super().reward_cotangent(plan, trajectory, texts, key)
        generator = torch.Generator().manual_seed(sample_seeds(*key, 0x4A4D, count=1)[0])
        noise = torch.randn(g.shape, generator=generator).to(g)
        sizes = [t.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for t in (g, noise)]
        return noise * sizes[0] / sizes[1], logged


class ShuffledPrompts(Trainer):
    def reward_cotangent(self, plan, trajectory, texts, key):
        return super().reward_cotangent(plan, trajectory, texts[1:] + texts[:1], key)


class WholeRollout(Trainer):
    def accumulate_gradient(self, step: int, micro: int) -> dict:
        config, size, batch = self.config, self.config.rollout, self.config.data.batch_size
        key = (config.seed, step, micro)
        texts = [prompt.text for prompt in self.prompts.batch(step, batch)]
        generators = [torch.Generator().manual_seed(seed) for seed in sample_seeds(*key, count=batch)]
        velocity = bind_velocity(self.model.backbone, texts, config.guidance)
        noise = self.model.backbone.noise(size.height, size.width, generators)
        sample = rollout_with_graph(velocity, noise, self.model.sigmas, size.solver)
        seeds = sample_seeds(*key, 1, count=batch)

        def score(z, part):
            return self.rewards.score(self.model.backbone.decode(z), texts[part], seeds[part])

        factors = torch.full((batch,), 1 / batch)
        rewards, loss, g = reward_gradient(self.rewards, score, sample.detach(), factors)
        sample.backward(clip_samples(g, config.optimizer.max_sample_grad_norm))
        finite = rewards.isfinite().all(dim=1).float().mean().item()
        return {"loss": loss.item(), "finite": finite, "nodes": list(range(size.num_steps))}


SURROGATE = "surrogate"
CONTROLS = {
    SURROGATE: (Trainer, []),
    "random gradient": (RandomGradient, []),
    "shuffled prompts": (ShuffledPrompts, []),
    "one node": (Trainer, ["method={name: flowbp-sparse, num_active: 1, rescale: 1.0}"]),
    "whole rollout": (WholeRollout, []),
    "best of 4": (None, []),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[42, 43, 44, 45, 46], help="none: only sum up")
    parser.add_argument("--controls", nargs="+", default=list(CONTROLS), choices=CONTROLS, metavar="NAME")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    found = collect(arguments.json, arguments.seeds, arguments.controls, control)
    made = [name for name in CONTROLS if any(run["setting"] == name for run in found["runs"])]
    found["rows"] = [summary(name, SURROGATE, found["runs"]) for name in made]
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found["rows"]))


def control(name: str, seed: int, earlier: list[dict]) -> dict:
    kind, settings = CONTROLS[name]
    base = next((run["before"] for run in earlier if run["seconds"]), None)
    return best_of(4, seed) if kind is None else trained(settings, seed, base, kind)


def best_of(count: int, seed: int) -> dict:
    """Mean scores of `count` images of the base model, and of the one among them that the reward prefers."""
    draws = []
    for draw in range(count):
        with tempfile.TemporaryDirectory() as folder:
            config = load("demo", [f"output={folder}", *COMMON, f"evaluation.seed={seed * count + draw}"])
            trainer = Trainer(config)
        draws.append(trainer.evaluator.score(trainer.model, trainer.model.base).values)
    best = np.argmax([values["reward"] for values in draws], axis=0)
    values = {name: np.choose(best, [values[name] for values in draws]) for name in METRICS if name != "diversity"}
    before = {name: float(np.mean([np.nanmean(scores[name]) for scores in draws])) for name in values}
    after = {name: float(np.nanmean(scores)) for name, scores in values.items()}
    return {"calls": count * config.evaluation.num_steps, "seconds": None, "before": before, "after": after}


def table(rows: list[dict]) -> str:
    """Markdown: the changes of each control, and the checker's difference from the surrogate."""
    lines = [f"| | runs | calls | CPU s | {' | '.join(METRICS)} | checker less surrogate's |", f"|{'---|' * 9}"]
    for row in rows:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f}".lstrip("0")
        cells = [row["setting"], str(len(row["seeds"])), f"{row['calls']:g}", seconds]
        cells += [told(row["change"][metric]) if metric in row["change"] else "" for metric in METRICS]
        cells.append(told(row["difference"]["checker"]) if row["difference"] else "")
        lines.append(" | ".join(["", *cells, ""]).strip())
    return "\n".join(lines)


if __name__ == "__main__":
    main()
