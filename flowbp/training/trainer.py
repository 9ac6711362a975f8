"""The training loop: one for every method, backbone and reward.

    plan -> rollout without gradient -> reward input -> decode -> rewards -> loss -> g = dloss/d(reward input) -> sweep -> AdamW

The VAE and the reward are differentiated first, with nothing else in memory; then the sweep replays the plan's active nodes one at a time.
Every random draw of a step comes from (seed, step, micro-batch): a resumed run repeats what an unbroken one would have done. N processes
with batch b take the step of one process with batch N b: each draws the whole batch's plans and seeds, and trains its own rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from flowbp.backbones import Backbone, bind_velocity, check_guidance, load_backbone
from flowbp.config import EvaluationConfig, RunConfig, dump
from flowbp.evaluation import scores as evaluation
from flowbp.methods import draw_plans
from flowbp.objective import clip_samples, loss_factors, reward_gradient, sample_weights
from flowbp.plan import PlanBatch, SurrogatePlan
from flowbp.replay import Recompute
from flowbp.rewards import Mixture, Reward
from flowbp.runtime.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from flowbp.runtime.console import progress_bar
from flowbp.runtime.data import PromptStream, load_prompts, sample_seeds
from flowbp.runtime.distributed import Ranks, full, process_state
from flowbp.runtime.embeddings import embed_once
from flowbp.runtime.environment import record_environment
from flowbp.runtime.memory import Phases, compile_blocks, now, peak_memory_mb, save_memory
from flowbp.runtime.processes import naming_the_dead
from flowbp.runtime.reproducible import one_thread
from flowbp.runtime.run_folder import METRICS, check_run, keep_first_lines, locked, open_run
from flowbp.runtime.tuning import assign, build_optimizer, hand_over_gradients, master_weights, trainable_parameters, trained
from flowbp.runtime.weights import base_weights, save_weights
from flowbp.surrogate import backward, residuals, reward_input
from flowbp.training.report import Report
from flowbp.training.sentinel import Sentinel
from flowbp.trajectory import Trajectory, rollout

__all__ = ["Trainer", "train"]

DROPOUT, PLANS = 0xD409, 0x91A5  # keep these draws apart from those of the noise


@naming_the_dead()
def train(config: RunConfig, resume: bool = False, overwrite: bool = False) -> Path:
    """Run `config` to its last step, evaluate it against the base weights and write the report. Returns the run's folder.

    On a CPU a process computes on one thread, or on $OMP_NUM_THREADS. All input is checked before the folder is touched.
    Raises ValueError or FileExistsError on bad input, and ConnectionError where another process of the run has ended.
    """
    state = process_state()
    threads = one_thread() if state.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ else nullcontext()
    with threads, locked(config.output) if state.is_main_process else nullcontext():
        check_run(config.output, dump(config), resume, overwrite)
        trainer = Trainer(config)
        if trainer.ranks.is_main:
            open_run(config.output, dump(config), overwrite)
        trainer.accelerator.wait_for_everyone()
        trainer.run()
    return config.output


class Trainer:
    """One run: its models, its trainable parameters, and the step that updates them."""

    def __init__(self, config: RunConfig, backbone: Backbone | None = None, reward: Reward | None = None):
        """backbone and reward take the place of those that `config` names; weight, hinge and the like stay."""
        self.config = config
        self.prompts = PromptStream(load_prompts(config.data.prompts), config.seed)
        self.held_out = load_prompts(config.evaluation.prompts) if config.evaluation else []
        periodic = config.evaluation is not None and config.evaluation.every is not None
        self.sentinel = Sentinel(config.evaluation, config.reward, config.output) if periodic else None
        torch.manual_seed(config.seed)  # LoRA's initial weights
        self.accelerator = Accelerator(cpu=process_state().device.type == "cpu", log_with="tensorboard", project_dir=config.output)
        device = str(self.accelerator.device)
        self.backbone = backbone or load_backbone(**config.backbone.model_dump())  # on the CPU
        check_guidance(self.backbone, config.guidance)
        size = config.rollout
        self.sigmas = self.backbone.sigmas(size.num_steps, size.height, size.width, size.sigmas)
        config.method.plan(self.sigmas.double().numpy(), np.random.default_rng(0))  # a method that does not fit says so now
        if config.data.embeddings == "cached":  # the device holds the text encoders; then, without them, all else
            embed_once(self.backbone, self.texts(), config.data.cache, device)
        self.mixture = Mixture({name: spec.term(device, reward) for name, spec in config.reward.items()})
        self.monitors: dict[str, Reward] = {}
        if config.evaluation is not None:
            watch = config.evaluation.watch
            loaded = config.evaluation.load_monitors(device if watch else "cpu")  # a missing one is found now, not after the training
            self.monitors = loaded if watch else {}

        trainable_parameters(self.backbone, config.tuning)
        save_memory(self.backbone, config.memory)
        if config.compile is not None:
            compile_blocks(self.backbone.denoiser, config.compile)
        self.ranks = Ranks(self.accelerator, self.backbone, config.memory.shard, config.memory.shard_gradients)
        self.parameters = trained(self.backbone)  # by now, shards perhaps
        budget = config.memory.budget_gb
        self.recompute = Recompute(config.memory.recompute, None if budget is None else int(budget * 1e9), config.data.accumulate)
        self.masters = master_weights(self.parameters) if config.tuning.master_weights else self.parameters
        self.optimizer = build_optimizer(self.masters.values(), config.optimizer)
        self.phases = Phases()
        self.ema = None
        if config.ema is not None:
            from diffusers.training_utils import EMAModel

            wide = master_weights(self.masters)  # an average moves by (1 - decay) of a step, which bfloat16 would round away
            self.ema = EMAModel(wide.values(), decay=config.ema, min_decay=config.ema, update_after_step=-1)  # from the first step on

    def texts(self) -> list[str]:
        """Every prompt that the run will draw, in training and in evaluation."""
        config = self.config
        texts = self.prompts.texts(config.steps * config.data.accumulate * config.data.batch_size * self.accelerator.num_processes)
        if config.evaluation is not None:
            texts += [prompt.text for prompt in self.held_out[: config.evaluation.samples]]
        if self.sentinel is not None:
            texts += [prompt.text for prompt in self.sentinel.samples.prompts]
        return texts

    def run(self) -> None:
        config, done = self.config, 0
        found = latest_checkpoint(config.output)
        if found is not None:
            done = load_checkpoint(found, self.masters, self.optimizer, self.ema, self.mixture)
            assign(self.parameters, self.masters)
        main = self.ranks.is_main  # which alone writes
        metrics_path = config.output / METRICS if main else Path(os.devnull)
        keep_first_lines(metrics_path, done)
        if main:
            record_environment(config.output)
        if main and self.sentinel is not None:
            self.sentinel.forget_after(done)
        self.accelerator.init_trackers("tensorboard")
        with metrics_path.open("a") as metrics, progress_bar("train", "step", config.steps, done, main) as bar:
            stopped = self.watch_held_out(done)
            for step in range(done, config.steps if not stopped else done):
                row = {"step": step + 1} | self.step(step)
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
                self.accelerator.log({key: value for key, value in row.items() if key not in ("step", "nodes")}, step=step + 1)
                scores = ", ".join(f"{name} {row[name]:.4f}" for name in config.reward)
                bar.set_postfix_str(f"{scores}, {row['seconds']:.2f} s/step, peak {row['peak_mb']:.0f} MB", refresh=False)
                bar.update()
                stopped = self.watch_held_out(step + 1)
                if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps or stopped:
                    state = (self.masters, self.optimizer, self.ema, self.mixture)
                    save_checkpoint(config.output, step + 1, *state, write=main)
                if stopped:
                    break
        with self.weights(self.tuned):
            save_weights(self.backbone, config.output, write=main)
        self.report()
        self.accelerator.end_training()

    def report(self) -> None:
        """Score base and tuned weights on the same prompts and seeds, draw both, and write everything into the run's folder.

        The processes share the images and all have the scores; one writes.
        """
        config, main = self.config, self.ranks.is_main
        plan = config.method.plan(self.sigmas.double().numpy(), np.random.default_rng(config.seed))
        pages = Report(config, plan, self.sigmas.tolist())
        if config.evaluation is not None:
            samples = evaluation.draw_samples(self.held_out, config.evaluation)
            named = self.scorers(config.evaluation)
            scores = []
            with progress_bar("evaluate", "image", 2 * config.evaluation.samples, shown=main) as bar:
                for name, weights in (("before", self.base), ("after", self.tuned)):
                    with self.weights(weights):
                        scores.append(self.score(samples, named, bar.update))
                    if main:
                        pages.add_grid(name, scores[-1])
                        scores[-1].write_csv(config.output / f"scores_{name}.csv")
            if main:
                pages.add_comparison(evaluation.compare(*scores))
        if main and self.sentinel is not None:
            pages.add_validation(self.sentinel.summary())
        if main:
            pages.write()

    def watch_held_out(self, steps: int) -> bool:
        """Score the weights after `steps` optimizer steps if the sentinel asks for it, keep the best; returns whether training is to stop.

        The processes share the samples; the main one decides and writes. Nothing that training draws is drawn.
        """
        if self.sentinel is None:
            return False
        if self.ranks.main_says(lambda: self.sentinel.due(steps)):
            config = self.config.evaluation
            chosen = config.model_copy(update={"samples": config.validation_samples})
            named = self.scorers(chosen)
            with self.weights(self.tuned):
                scores = self.score(self.sentinel.samples, named)
                if self.ranks.main_says(lambda: self.sentinel.is_best(steps, scores)):
                    save_weights(self.backbone, self.config.output / "best", write=self.ranks.is_main)
            if self.ranks.is_main:
                self.sentinel.record(steps, scores)
            self.accelerator.log({f"validation/{name}": float(values.mean()) for name, values in scores.values.items()}, step=steps)
        return self.ranks.main_says(lambda: self.sentinel.stops)

    def scorers(self, config: EvaluationConfig) -> dict[str, evaluation.Scorer]:
        """What an evaluation scores by; monitors that do not watch the training are loaded for it."""
        device = str(self.accelerator.device)
        return evaluation.scorers(config, self.mixture.rewards, self.monitors or config.load_monitors(device), device)

    def score(
        self, samples: evaluation.Samples, named: Mapping[str, evaluation.Scorer], progress: Callable[[int], object] = lambda done: None
    ) -> evaluation.Scores:
        """Score `samples` with the weights as they are now."""
        return evaluation.evaluate(self.backbone, samples, self.config.evaluation_rollout, self.config.guidance, named, progress)

    # -- one optimizer step --------------------------------------------------------------------------------------------------------

    def step(self, step: int) -> dict:
        """One optimizer step over `data.accumulate` micro-batches; returns what is logged."""
        began, self.phases.seconds = now(), {}
        with self.ranks.averaging():
            rows = [self.accumulate_gradient(step, micro) for micro in range(self.config.data.accumulate)]
        row = self.ranks.mean({key: float(np.mean([r[key] for r in rows])) for key in rows[0] if key != "nodes"})
        row["nodes"] = rows[-1]["nodes"]
        row["images"] = self.ranks.size * len(rows) * self.config.data.batch_size
        with self.phases("update"):
            row |= self.update(step)
        seconds = {f"{name}_seconds": seconds for name, seconds in self.phases.seconds.items()}
        return row | {"seconds": now() - began} | seconds | {"peak_mb": peak_memory_mb()}

    def update(self, step: int) -> dict:
        """Clip the gradient and step the optimizer and the moving average; a broken gradient is skipped.

        Raises ValueError where a trained parameter has none.
        """
        options, missing = self.config.optimizer, [name for name, p in self.parameters.items() if p.grad is None]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self.parameters)} trained parameters take no part in the velocity and would never change, such as "
                f"{missing[0]}: name other modules in tuning.targets"
            )
        hand_over_gradients(self.parameters, self.masters)
        norm = full(torch.nn.utils.clip_grad_norm_(self.masters.values(), options.max_grad_norm)).item()
        lr = options.lr * min(1.0, (step + 1) / (options.warmup + 1))
        if np.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            assign(self.parameters, self.masters)
            if self.ema is not None:
                self.ema.step(self.masters.values())
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "skipped": not np.isfinite(norm), "lr": lr}

    def accumulate_gradient(self, step: int, micro: int) -> dict:
        """Add one micro-batch's gradient to the parameters' .grad."""
        config, data, size = self.config, self.config.data, self.config.rollout
        key = (config.seed, step, micro)
        everyone, rows = self.ranks.size * data.batch_size, self.ranks.rows(data.batch_size)
        draws = np.random.default_rng((config.seed, step, 0 if config.plans == "shared" else micro, PLANS))
        plan = draw_plans(config.method, self.sigmas.double().numpy(), draws, everyone, config.plans)
        if isinstance(plan, PlanBatch):
            plan = plan.rows(rows)
        texts = [prompt.text for prompt in self.prompts.batch(step * data.accumulate + micro, everyone)[rows]]
        generators = [torch.Generator().manual_seed(seed) for seed in sample_seeds(*key, count=everyone)[rows]]
        if config.tuning.dropout:
            torch.manual_seed(sample_seeds(*key, DROPOUT, count=self.ranks.size)[self.ranks.rank])
        self.backbone.denoiser.train(config.tuning.dropout > 0)
        with self.phases("rollout"):
            velocity = bind_velocity(self.backbone, texts, config.guidance, size.timesteps)
            noise = self.backbone.noise(size.height, size.width, generators)
            renoise = [self.backbone.noise(size.height, size.width, generators) for _ in range(plan.num_renoised)]
            trajectory = rollout(velocity, noise, self.sigmas, plan, renoise, self.recompute)
        with self.phases("reward"):
            g, logged = self.reward_cotangent(plan, trajectory, texts, key)
        with self.phases("sweep"):
            reduce_with = self.ranks.reduce_with if micro + 1 == data.accumulate else None
            settings = {"nodes_per_forward": config.memory.nodes_per_forward, "before_last": reduce_with}
            backward(plan, trajectory, velocity.replay, g / data.accumulate, **settings)
        self.backbone.denoiser.eval()
        return logged | {"nodes": [replay.node for replay in plan.sweep if not replay.output]}

    def reward_cotangent(
        self, plan: SurrogatePlan | PlanBatch, trajectory: Trajectory, texts: list[str], key: tuple[int, ...]
    ) -> tuple[Tensor, dict[str, float]]:
        """(dloss/d(reward input), what is logged): the VAE and the reward are differentiated with no network graph in memory."""
        config, copies, logged = self.config, 1 + plan.num_renoised, {}
        z = reward_input(plan, trajectory)
        weights, keep = torch.ones(len(texts), device=z.device), torch.ones(len(texts), dtype=torch.bool, device=z.device)
        if plan.similarity is not None:
            d_j, d_0 = residuals(plan, trajectory)
            weights, keep = sample_weights(plan.similarity, d_j, d_0)
            logged = {"d_j": d_j.mean().item(), "d_0": d_0.mean().item(), "kept": keep.float().mean().item()}
        rows, everyone = self.ranks.rows(len(texts)), self.ranks.size * len(texts)
        watched, seeds = [], [seed for copy in range(copies) for seed in sample_seeds(*key, 1 + copy, count=everyone)[rows]]

        def score(part_of_z: Tensor, part: slice) -> Tensor:
            images, prompts = self.backbone.decode(part_of_z), (texts * copies)[part]
            own = max(0, min(part.stop, len(texts)) - part.start)  # images of the samples themselves; re-noised copies are not watched
            watched.append(self.watch(images.detach()[:own], prompts[:own]))
            return self.mixture.score(images, prompts, seeds[part])

        kept = self.ranks.mean({"kept": keep.sum().item()})["kept"]  # gradients are averaged over processes: so is what divides them
        factors = loss_factors(weights, keep, copies, kept)
        rewards, loss, g = reward_gradient(self.mixture, score, z, factors, config.memory.reward_batch)
        g = g / config.guidance.divisor
        norms = g.flatten(1).norm(dim=1) * len(g)
        logged |= {name: torch.cat([scores[name] for scores in watched]).mean().item() for name in self.monitors}
        logged |= self.mixture.update(self.accelerator.gather(rewards)) | {"loss": loss.item(), "sample_grad_norm": norms.mean().item()}
        return clip_samples(g, config.optimizer.max_sample_grad_norm), logged

    @torch.no_grad()
    def watch(self, images: Tensor, texts: list[str]) -> dict[str, Tensor]:
        """Scores [B] by each monitor of the training images: what is never trained on, watched at every step."""
        return {name: monitor(images, texts) if texts else images.new_empty(0) for name, monitor in self.monitors.items()}

    # -- weights -------------------------------------------------------------------------------------------------------------------

    @property
    def base(self) -> dict[str, Tensor]:
        """The weights that a run starts from: a LoRA of zero, or the checkpoint's own, read again."""
        if self.config.tuning.mode == "full":
            return base_weights(self.backbone)
        return {name: torch.zeros_like(p) if "lora_B" in name else p for name, p in self.parameters.items()}

    @property
    def tuned(self) -> dict[str, Tensor]:
        """The weights that a run delivers: the moving average if there is one, else the last ones."""
        return self.parameters if self.ema is None else dict(zip(self.parameters, self.ema.shadow_params, strict=True))

    @contextmanager
    def weights(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Run the block with the trainable parameters set to `values`; their own wait on the CPU, or in place where they are shards."""
        own = {name: p.detach() for name, p in self.parameters.items()}
        kept = {name: p.to("cpu", copy=True) if self.ranks.sharded is None else p.clone() for name, p in own.items()}
        try:
            assign(self.parameters, values)
            yield
        finally:
            assign(self.parameters, kept)
