"""A run from its config to its report: train, watch held-out samples, keep checkpoints, evaluate."""

import os
import signal
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from flowbp import log
from flowbp.config import RunConfig, dump
from flowbp.evaluation import figures
from flowbp.evaluation.pages import as_data_uri, as_png, draw_samples, facts, render
from flowbp.evaluation.scores import Scores, compare
from flowbp.methods import draw_plan
from flowbp.runtime.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from flowbp.runtime.console import TextConsole, progress_bar
from flowbp.runtime.distributed import process_state
from flowbp.runtime.environment import environment
from flowbp.runtime.files import as_json, writing
from flowbp.runtime.interrupts import Stop, heard_by, interrupt
from flowbp.runtime.memory import available_bytes
from flowbp.runtime.processes import naming_the_dead
from flowbp.runtime.reproducible import one_thread
from flowbp.runtime.run_folder import BEST, TENSORBOARD, RunFolder, told_at_the_next_call
from flowbp.runtime.weights import pinned, save_weights
from flowbp.training.sentinel import Sentinel
from flowbp.training.trainer import Trainer

SKIPPED = 10  # steps in a row without a finite reward or gradient end the run, and so does a run of nothing else


@naming_the_dead()
def train(config: RunConfig, resume: bool = False, overwrite: bool = False) -> Path:
    """Train `config` to its last step, evaluate it against the base weights and write the report.

    Returns the run's folder. On a CPU a process computes on one thread, or on $OMP_NUM_THREADS. All input is checked
    before the folder is touched. Raises ValueError or FileExistsError on bad input, ConnectionError if another process
    of the run has ended, and KeyboardInterrupt on Ctrl-C or SIGTERM, in training after a checkpoint of the last step.
    """
    on_cpu = process_state().device.type == "cpu"
    config = config.model_copy(update={"tuning": pinned(config.tuning)})
    folder = RunFolder(config.output)
    threads = one_thread() if on_cpu and "OMP_NUM_THREADS" not in os.environ else nullcontext()
    with heard_by(interrupt), threads, folder.locked(), told_at_the_next_call():
        folder.check(config, resume, overwrite)
        if resume and folder.writes and not checkpoints(folder.path):
            log.warning("--resume: %s holds no checkpoint, so training begins with step 1", folder.path)
        trainer = Trainer(config)
        folder.open(config, overwrite)
        run(trainer, folder)
    return folder.path


def run(trainer: Trainer, folder: RunFolder) -> None:
    """Train from the folder's last checkpoint to the last step, or to the sentinel's stop; then evaluate and report."""
    config, model, accelerator = trainer.config, trainer.model, trainer.model.ranks.accelerator
    done = restore(trainer, folder)
    folder.forget_after(done)
    decide_gathering(trainer)
    announce(trainer, folder.path, done)
    if accelerator.mixed_precision != "no":
        log.warning("accelerate's mixed precision plays no part here: backbone.dtype says in what the network computes")
    watched = config.evaluation is not None and config.evaluation.every is not None
    sentinel = Sentinel(config.evaluation, config.reward, folder.validations()) if watched else None
    # TensorBoard hides what a run logged after the checkpoint from which it goes on.
    with writing(folder.path / TENSORBOARD):
        accelerator.init_trackers(TENSORBOARD, init_kwargs={TENSORBOARD: {"purge_step": done + 1}})
    stop, skipped, idle, in_a_row, limit = Stop(), 0, 0, 0, min(SKIPPED, config.steps)
    with heard_by(stop.hear), progress_bar("train", "step", config.steps, done) as bar:
        ends = validate(trainer, sentinel, folder, done)
        for step in range(done, config.steps if not ends else done):
            row = {"step": step + 1} | trainer.step(step)
            folder.log(row)
            folder.track(accelerator, {k: v for k, v in row.items() if k not in ("step", "nodes")}, step + 1)
            scores = ", ".join(f"{name} {row[name]:.4f}" for name in config.reward)
            skipped, in_a_row = skipped + row["skipped"], in_a_row + 1 if row["skipped"] else 0
            if row["skipped"] and skipped == 1 and folder.writes:
                log.warning("step %d has no finite reward or gradient and is skipped; so are others like it", step + 1)
            idle += row["grad_norm"] == 0 and not row["skipped"]
            if row["grad_norm"] == 0 and idle == 1 and folder.writes:
                why = "every sample is dropped or beyond its hinge. Momentum and decay move the weights all the same"
                log.warning("step %d has no gradient: %s; so they do at others like it", step + 1, why)
            counts = {"skipped": skipped, "without gradient": idle}
            told = ", ".join([scores, *(f"{count} {what}" for what, count in counts.items() if count)])
            bar.set_postfix_str(f"{told}, {row['seconds']:.2f} s/step, peak {row['peak_mb']:.0f} MB", refresh=False)
            bar.update()
            asked = model.ranks.mean({"asked": float(stop.number > 0)})["asked"] > 0  # of any process
            # Who asks may not wait for a validation.
            ends = asked or in_a_row == limit or validate(trainer, sentinel, folder, step + 1)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps or ends:
                record = folder.record(config)
                save_checkpoint(folder.path, step + 1, model, trainer.optimizer, trainer.rewards, record)
                process_state().wait_for_everyone()  # the main process writes
            if in_a_row == limit:
                last = f"the last at step {step + 1} ({scores}, gradient {row['grad_norm']:g})"
                way_out = "look at the reward and its images, or train with a lower optimizer.lr"
                raise ValueError(f"{limit} steps in a row had no finite reward or gradient, {last}: {way_out}")
            if asked:
                interrupt(stop.number or signal.SIGTERM)
            if ends:
                break
    if stop.number:
        interrupt(stop.number)
    with model.using(model.tuned) as backbone:
        save_weights(backbone, folder.path)
    report(trainer, sentinel, folder)
    with writing(folder.path / TENSORBOARD):
        accelerator.end_training()


def decide_gathering(trainer: Trainer) -> None:
    """With `memory.gather=auto` let rollouts gather each block once where the estimate says that memory holds the whole
    network on every process. All processes must do alike.
    """
    ranks, config = trainer.model.ranks, trainer.config
    if ranks.sharded is not None and config.memory.gather == "auto":
        from flowbp.estimate.estimate import MARGIN, estimate

        memory = config.memory.model_copy(update={"gather": "rollout"})
        needed = estimate(config.model_copy(update={"memory": memory}), ranks.size).peaks["rollout"]
        holds = needed <= (1 - MARGIN) * available_bytes(ranks.accelerator.device)
        ranks.gathers_once = ranks.mean({"holds": float(holds)})["holds"] == 1


def announce(trainer: Trainer, output: Path, done: int) -> None:
    """Say on the main process's stderr what will be trained, on what and from where, before the first step."""
    config, model, ranks = trainer.config, trainer.model, trainer.model.ranks
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else str(ranks.accelerator.device)
    parameters = sum(p.numel() for p in model.parameters.values())
    about = {"device": device, "processes": ranks.size, "parameters": parameters, "output": output, "done": done}
    about["gathers_once"] = None if ranks.sharded is None else ranks.gathers_once
    console = TextConsole(stderr=True)
    for label, text in facts(config, **about).of_start.items():
        console.print(f"{label:8} {text}", highlight=False, soft_wrap=True)


def restore(trainer: Trainer, folder: RunFolder) -> int:
    """Load the newest checkpoint of the folder that is whole, as are the files that it remembers; returns its step, or
    0 if there is none at all.

    Raises OSError if there is no such checkpoint among several.
    """
    found = list(checkpoints(folder.path).values())
    for path in reversed(found):
        try:
            folder.check_record(path)
            return load_checkpoint(path, trainer.model, trainer.optimizer, trainer.rewards)
        except OSError as error:
            if path == found[0]:
                raise
            if folder.writes:
                log.warning("%s. The one before it is used", error)
    return 0


def validate(trainer: Trainer, sentinel: Sentinel | None, folder: RunFolder, step: int) -> bool:
    """Score the weights after `step` optimizer steps if they are due, and keep the best. Returns whether to stop.

    No random number of training is drawn. All processes have all scores, and so decide alike.
    """
    if sentinel is None:
        return False
    if sentinel.due(step):
        model = trainer.model
        scores = trainer.evaluator.score(model, model.tuned, sentinel.samples)
        if is_best := sentinel.record(step, scores):
            with model.using(model.tuned) as backbone:
                save_weights(backbone, folder.path / BEST)
            folder.write(f"{BEST}/step.json", as_json({"step": step}))
        folder.keep_validation(step, scores.values, is_best)
        means = {f"validation/{name}": float(values.mean()) for name, values in scores.values.items()}
        folder.track(model.ranks.accelerator, means, step)
    return sentinel.stops


def report(trainer: Trainer, sentinel: Sentinel | None, folder: RunFolder) -> None:
    """Score base and tuned weights on the same prompts and seeds, and write all that the run has to show into its
    folder. The main process writes.

    plan.png          an example of a plan
    scores_NAME.csv   scores before and after training, and samples_NAME.png the images that they kept
    evaluation.json   the paired changes between both scores
    validation.json   the sentinel's summary
    report.html       all of it on one page, with the curves of training
    """
    config, model, scores = trainer.config, trainer.model, {}
    if trainer.evaluator is not None:
        with progress_bar("evaluate", "image", 2 * config.evaluation.samples) as bar:
            for name, weights in (("before", model.base), ("after", model.tuned)):
                scores[name] = trainer.evaluator.score(model, weights, trainer.evaluator.samples, bar.update)
    if folder.writes:
        write_report(trainer, sentinel, folder, scores)
    folder.check_best(None if sentinel is None else sentinel.best)


def write_report(trainer: Trainer, sentinel: Sentinel | None, folder: RunFolder, scores: Mapping[str, Scores]) -> None:
    config, sigmas = trainer.config, trainer.model.sigmas.double().numpy()
    plan = draw_plan(config.method, sigmas, np.random.default_rng(config.seed), config.rollout.solver)
    drawn = figures.draw_plan(plan, sigmas.tolist(), f"{config.method_name}: one plan of {len(sigmas) - 1} steps")
    plan_png = as_png(drawn)
    folder.write("plan.png", plan_png)
    for name, each in scores.items():
        folder.write(f"samples_{name}.png", as_png(draw_samples(each)))
        folder.write(f"scores_{name}.csv", each.as_csv())
    differences = compare(*scores.values()) if scores else []
    if scores:
        folder.write("evaluation.json", as_json(differences))
    validation = None if sentinel is None else sentinel.summary()
    if validation is not None:
        folder.write("validation.json", as_json(validation))
    page = render(
        "report.html",
        name=folder.path.name,
        config=config,
        scorers=[*config.reward, *(config.evaluation.monitors if config.evaluation else ())],
        shares=[f"{name}_share" for name in config.reward],
        rows=folder.metrics(),
        scores=scores,
        differences=differences,
        validation=validation,
        plan=as_data_uri(plan_png),
        environment=environment(),
        settings=dump(config),
    )
    folder.write("report.html", page)
