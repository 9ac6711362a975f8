"""One optimizer step, for every method, backbone and reward.

    plan -> rollout without gradient -> reward input -> decode -> rewards -> loss -> g = dloss/d(reward input) -> sweep
    -> AdamW

The VAE and the reward are differentiated first, with nothing else in memory. Then the sweep replays the plan's active
nodes one at a time. Every random draw of a step comes from (seed, step, micro-batch), so that a resumed run repeats
what an unbroken one would have done. N processes with batch b take the step of one process with batch N b: each draws
the plans and seeds of the whole batch, and trains its own rows.
"""

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from flowbp.backbones.base import Backbone, bind_velocity
from flowbp.config import RunConfig
from flowbp.evaluation.scores import Evaluator
from flowbp.methods import draw_plans
from flowbp.objective import clip_samples, loss_factors, reward_gradient, sample_weights
from flowbp.plan import Plan, PlanBatch
from flowbp.replay import Recompute
from flowbp.rewards import Reward
from flowbp.rewards.weighted import WeightedRewards
from flowbp.runtime.data import PromptStream, load_prompts, sample_seeds
from flowbp.runtime.distributed import process_state, unshard
from flowbp.runtime.memory import Phases, now, peak_memory_mb
from flowbp.runtime.tuned_model import TunedModel
from flowbp.runtime.tuning import build_optimizer
from flowbp.surrogate import backward, residuals, reward_input
from flowbp.training.sentinel import validation_samples
from flowbp.trajectory import Trajectory, rollout

DROPOUT, PLANS = 0xD409, 0x91A5  # parts of seeds, which keep these draws apart from those of the noise


class Trainer:
    """A model, its rewards and its optimizer; `step` updates the model once."""

    def __init__(self, config: RunConfig, backbone: Backbone | None = None, reward: Reward | None = None):
        """backbone, reward: take the place of those that `config` names. Weight, hinge and the like stay."""
        self.config = config
        self.prompts = PromptStream(load_prompts(config.data.prompts), config.seed)
        on_cpu = process_state().device.type == "cpu"
        accelerator = Accelerator(cpu=on_cpu, log_with="tensorboard", project_dir=config.output)
        self.model = TunedModel(config, accelerator, self.texts(accelerator.num_processes), backbone)
        device = str(accelerator.device)
        self.rewards = WeightedRewards({name: spec.term(device, reward) for name, spec in config.reward.items()})
        self.rewards.warn_of_mixtures()
        self.evaluator = Evaluator(config, self.rewards.rewards, device) if config.evaluation is not None else None
        # What scores the training images and is never trained on.
        self.monitors = self.evaluator.monitors if self.evaluator is not None else {}
        self.optimizer = build_optimizer(self.model.masters.values(), config.optimizer)
        budget = None if config.memory.budget_gb is None else int(config.memory.budget_gb * 1e9)
        self.recompute = Recompute(config.memory.recompute, budget, config.data.accumulate)
        self.phases = Phases()

    def texts(self, processes: int) -> list[str]:
        """Every prompt that the run will draw, in training and in evaluation, to be embedded before."""
        data, evaluation = self.config.data, self.config.evaluation
        texts = self.prompts.texts(self.config.steps * data.accumulate * data.batch_size * processes)
        if evaluation is not None:
            texts += [prompt.text for prompt in load_prompts(evaluation.prompts)[: evaluation.samples]]
            if evaluation.every is not None:
                texts += [prompt.text for prompt in validation_samples(evaluation).prompts]
        return texts

    def step(self, step: int) -> dict:
        """One optimizer step over `data.accumulate` micro-batches; returns what is logged."""
        began, self.phases.seconds = now(), {}
        with self.model.ranks.averaging():
            rows = [self.accumulate_gradient(step, micro) for micro in range(self.config.data.accumulate)]
        row = self.model.ranks.mean({key: float(np.mean([r[key] for r in rows])) for key in rows[0] if key != "nodes"})
        row["nodes"] = rows[-1]["nodes"]
        row["images"] = self.model.ranks.size * len(rows) * self.config.data.batch_size
        with self.phases("update"):
            row |= self.update(step, row.pop("finite") > 0)
        seconds = {f"{name}_seconds": seconds for name, seconds in self.phases.seconds.items()}
        return row | {"seconds": now() - began} | seconds | {"peak_mb": peak_memory_mb()}

    def update(self, step: int, rewarded: bool = True) -> dict:
        """Clip the gradient, and step the optimizer and the average. A gradient that is not finite is skipped.

        rewarded: whether any sample has a finite reward. Without one the step is skipped too, because a hinge gives NaN
        a gradient of 0.

        Raises ValueError if a trained parameter has no gradient.
        """
        options, masters = self.config.optimizer, self.model.masters
        self.model.take_gradients()
        norm = unshard(torch.nn.utils.clip_grad_norm_(masters.values(), options.max_grad_norm)).item()
        lr = options.lr * min(1.0, (step + 1) / (options.warmup + 1))
        skipped = not (rewarded and np.isfinite(norm))
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.model.follow_masters()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "skipped": skipped, "lr": lr}

    def accumulate_gradient(self, step: int, micro: int) -> dict:
        """Add one micro-batch's gradient to the parameters' .grad."""
        config, data, size, anchor = self.config, self.config.data, self.config.rollout, self.model.anchor
        key = (config.seed, step, micro)
        everyone, rows = self.model.ranks.size * data.batch_size, self.model.ranks.rows(data.batch_size)
        draws = np.random.default_rng((config.seed, step, 0 if config.plans == "shared" else micro, PLANS))
        levels = self.model.sigmas.double().numpy()
        plan = draw_plans(config.method, levels, draws, everyone, config.plans, size.solver)
        if isinstance(plan, PlanBatch):
            plan = plan.rows(rows)
        texts = [prompt.text for prompt in self.prompts.batch(step * data.accumulate + micro, everyone)[rows]]
        generators = [torch.Generator().manual_seed(seed) for seed in sample_seeds(*key, count=everyone)[rows]]
        if config.tuning.dropout:
            torch.manual_seed(sample_seeds(*key, DROPOUT, count=self.model.ranks.size)[self.model.ranks.rank])
        self.model.backbone.denoiser.train(config.tuning.dropout > 0)
        with self.phases("rollout"), self.model.ranks.gathering():
            velocity = bind_velocity(self.model.backbone, texts, config.guidance, size.timesteps)
            if anchor is not None:
                anchored = sum(not replay.gated for replay in plan.replays)
                velocity = anchor.around(velocity, anchored * len(texts) * data.accumulate)
            noise = self.model.backbone.noise(size.height, size.width, generators)
            renoise = [self.model.backbone.noise(size.height, size.width, generators) for _ in range(plan.num_renoised)]
            trajectory = rollout(velocity, noise, self.model.sigmas, plan, renoise, self.recompute, size.solver)
        with self.phases("reward"):
            g, logged = self.reward_cotangent(plan, trajectory, texts, key)
        with self.phases("sweep"):
            reduce_with = self.model.ranks.reduce_with if micro + 1 == data.accumulate else None
            settings = {"nodes_per_forward": config.memory.nodes_per_forward, "before_last": reduce_with}
            backward(plan, trajectory, velocity.replay, g / data.accumulate, **settings)
        self.model.backbone.denoiser.eval()
        logged |= {} if anchor is None else {"drift": anchor.take_drift()}
        return logged | {"nodes": [replay.node for replay in plan.replays if not replay.output]}

    def reward_cotangent(
        self, plan: Plan, trajectory: Trajectory, texts: list[str], key: tuple[int, ...]
    ) -> tuple[Tensor, dict[str, float]]:
        """(dloss/d(reward input), what is logged). Of the network, memory holds only the graphs that were kept."""
        config, ranks, batch, copies = self.config, self.model.ranks, len(texts), 1 + plan.num_renoised
        z, logged, watched = reward_input(plan, trajectory), {}, []
        weights, keep = torch.ones(batch, device=z.device), torch.ones(batch, dtype=torch.bool, device=z.device)
        if plan.similarity is not None:
            d_j, d_0 = residuals(plan, trajectory)
            weights, keep = sample_weights(plan.similarity, d_j, d_0)
            logged = {"d_j": d_j.mean().item(), "d_0": d_0.mean().item(), "kept": keep.float().mean().item()}
        draws = (sample_seeds(*key, 1 + copy, count=ranks.size * batch) for copy in range(copies))
        seeds = [seed for seeds_of_all in draws for seed in seeds_of_all[ranks.rows(batch)]]

        def score(part_of_z: Tensor, part: slice) -> Tensor:
            images, prompts = self.model.backbone.decode(part_of_z), (texts * copies)[part]
            own = max(0, min(part.stop, batch) - part.start)  # samples themselves; re-noised copies are not watched
            watched.append(self.watch(images.detach()[:own], prompts[:own]))
            return self.rewards.score(images, prompts, seeds[part])

        # Gradients are averaged over processes, so the number that divides them is averaged too.
        kept = ranks.mean({"kept": keep.sum().item()})["kept"]
        factors = loss_factors(weights, keep, copies, kept)
        rewards, loss, g = reward_gradient(self.rewards, score, z, factors, config.memory.reward_batch)
        g = g / config.guidance.divisor
        logged |= {name: torch.cat([scores[name] for scores in watched]).mean().item() for name in self.monitors}
        logged |= self.rewards.update(ranks.accelerator.gather(rewards))
        logged["finite"] = rewards.isfinite().all(dim=1).float().mean().item()  # share of samples
        logged |= {"loss": loss.item(), "sample_grad_norm": (g.flatten(1).norm(dim=1) * len(g)).mean().item()}
        return clip_samples(g, config.optimizer.max_sample_grad_norm), logged

    @torch.no_grad()
    def watch(self, images: Tensor, texts: list[str]) -> dict[str, Tensor]:
        """Scores [B] of training images by each monitor."""
        monitors = self.monitors.items()
        return {name: monitor(images, texts) if texts else images.new_empty(0) for name, monitor in monitors}
