"""The command line: train, estimate, sample, export, eval, compare, sweep, plan, rewards, presets, doctor, bench."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.text import Text
from typer import Argument, Option

from flowbp import presets as known_presets
from flowbp.backbones import KNOWN_MODELS, read_index
from flowbp.cli import tables
from flowbp.cli.terminal import Config, Overrides, Processes, app, console, say, say_unwrapped
from flowbp.cli.terminal import main as main
from flowbp.config import build_method, commented, dump, load, parse_overrides
from flowbp.estimate.communication import BANDWIDTH, MACHINE, traffic
from flowbp.evaluation.templates import gigabytes, words
from flowbp.methods import draw_plan
from flowbp.quadrature import Solver
from flowbp.rewards.base import find_callable
from flowbp.rewards.registry import EMBEDDED, REWARDS, find_source, how_to_fetch
from flowbp.runtime import run_folder
from flowbp.runtime.checkpoint import weight_files
from flowbp.runtime.files import as_json, read_json
from flowbp.runtime.inputs import check_inputs, check_target, named_path, parse_size, parse_strengths, try_rewards
from flowbp.runtime.interrupts import exit_code, heard_by, interrupt
from flowbp.training import sweep as sweeps

# What is imported above needs no torch, whose import takes longer than all checks together: commands import that last.


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, Option("--resume", help="go on from the run's last checkpoint")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="delete the run that the output folder holds")] = False,
    processes: Processes = 1,
) -> None:
    """Fine-tune a backbone; writes weights, metrics, samples and report.html into the config's output folder."""
    settings = load(config, overrides or ())
    # With checkpoints it is a run's, even one that lost its metrics, of which `check` then tells.
    of_a_run = run_folder.is_run(Path(config)) or Path(config, run_folder.CHECKPOINTS).is_dir()
    if of_a_run and not known_presets.layers(config) and "output" not in parse_overrides(overrides or ()):
        settings = settings.model_copy(update={"output": Path(config)})
    try:
        folder = run_folder.RunFolder(settings.output)
        with heard_by(interrupt), folder.locked():
            folder.check(settings, resume, overwrite, processes)
            check_inputs(settings, train=True)
        from flowbp.runtime.processes import launched

        with launched(processes):
            with heard_by(interrupt):
                try_rewards(settings, train=True)
            from flowbp.training.run import train as run

            output = run(settings, resume, overwrite)
    except KeyboardInterrupt as stop:
        say_unwrapped(f"\nstopped. {run_folder.how_to_go_on(settings.output)}")
        raise typer.Exit(exit_code(stop)) from None
    except ConnectionError as error:
        raise ConnectionError(f"{error}. {run_folder.how_to_go_on(settings.output)}") from error
    if (file := output / "evaluation.json").is_file():
        console.print(tables.comparison_table(read_json(file), f"{output}: same prompts and seeds"))
    if (file := output / "validation.json").is_file():
        validation = read_json(file)
        for line in validation["warnings"]:
            say(Text("warning:", "bold yellow"), line)
        for line in words("ended", validation=validation, output=output):
            say_unwrapped(line)
    say_unwrapped(f"report: {(output / 'report.html').resolve()}")


@app.command()
def estimate(
    config: Config,
    overrides: Overrides = None,
    gpu_memory: Annotated[str | None, Option(help="does it fit, and if not, what does: 24GB or 80e9")] = None,
    processes: Annotated[int, Option(min=1, help="GPUs of the run, one process each")] = 1,
    json_file: Annotated[Path | None, Option("--json", help="write all numbers here, in bytes")] = None,
    bandwidth: Annotated[tuple[float, float], Option(help="GB/s in a machine, and between machines")] = BANDWIDTH,
) -> None:
    """Predict the peak memory and the cost of a training step. Needs no GPU and reads no weights."""
    run = load(config, overrides or (), run_code=False)
    memory = None if gpu_memory is None else parse_size(gpu_memory)
    if json_file is not None:
        check_target("--json", json_file)
    if run.backbone.name not in KNOWN_MODELS:  # their sizes are known
        read_index(run.backbone.name)
    if not all(0 < rate < float("inf") for rate in bandwidth):
        raise ValueError(f"--bandwidth {bandwidth[0]:g} {bandwidth[1]:g}: both must be above 0, in GB/s")
    from flowbp.estimate import estimate as estimates

    whole = estimates.estimate(run, processes)
    on = f"{processes} process{'es' if processes > 1 else ''}"
    console.print(tables.table("estimate", f"{config}, {on}", whole=whole))
    say(*words("cost", whole=whole))
    if whole.copied:
        say(*words("copied", size=whole.copied, bandwidth=estimates.BANDWIDTH))
    for note in whole.notes:
        say(Text("not counted:", "yellow"), note)
    ways = (False, True)[: 1 + bool(run.memory.shard)]
    received = [traffic(whole, cards, once, bandwidth) for cards in (1, 8, 64) for once in ways]
    if run.memory.shard or processes > 1:
        for line in words("received", rows=received, bandwidth=bandwidth, machine=MACHINE):
            say_unwrapped(line)
    if json_file is not None:
        json_file.write_text(as_json(whole.as_dict() | {"communication": received}), encoding="utf-8")
    if memory is None:
        return
    share = f"{whole.peak / memory:.0%} of {gpu_memory}; {estimates.MARGIN:.0%} are left for what is not counted"
    if whole.fits(memory):
        return say(Text("fits:", "green"), share)
    say(Text("does not fit:", "red"), share)
    if whole.resident["master weights"]:
        say(*words("without_masters", narrow=estimates.without_masters(run, processes), lr=run.optimizer.lr))
    say("looking for what fits:")
    for added, count, found in estimates.suggest(config, overrides or [], memory, processes):
        if count == 2 * processes:
            say(f"no setting that is known here fits {on}:")
        if added:
            more = f"{count} processes, " if count > processes else ""
            say_unwrapped(f"  {gigabytes(found.peak)} GB with {more}{added[-1]}")
    say(*words("suggested", found=found, fits=found.fits(memory)))
    say_unwrapped(f"  {' '.join(added) or 'nothing changed'}")
    if count > processes:
        say(f"on {count} processes")
    if found.copied:
        say(*words("copied", size=found.copied, bandwidth=estimates.BANDWIDTH))
        if (other := estimates.quantised(config, overrides or [], added, memory, count)) is not None:
            say(f"or, with fewer bits a frozen weight and no copies: {gigabytes(other[1].peak)} GB, with")
            say_unwrapped(f"  {' '.join(other[0])}")


@app.command()
def sample(
    config: Annotated[str, Argument(help="the folder of a run, a YAML file, or a preset")],
    prompts: Annotated[list[str], Argument(help="prompts to draw")],
    weights: Annotated[Path | None, Option(help="of a finished run; default: the base model")] = None,
    out: Annotated[Path, Option(help="PNG to write")] = Path("samples.png"),
    seed: Annotated[int, Option(min=0, help="seed of the initial noise")] = 0,
) -> None:
    """Draw prompts with the base or the tuned model."""
    run, count = load(config, run_code=False), len(prompts)
    check_target("--out", out, ".png")
    read_index(run.backbone.name)
    if weights is not None:
        run_folder.check_whole(weights)
        weight_files(weights)
    from flowbp.evaluation.figures import sample_grid
    from flowbp.evaluation.scores import generate
    from flowbp.runtime.data import sample_seeds
    from flowbp.runtime.distributed import process_state
    from flowbp.runtime.tuned_model import frozen_backbone

    backbone = frozen_backbone(run, weights, str(process_state().device))
    seeds, sampling = sample_seeds(seed, count=count), (run.evaluation_rollout, run.evaluation_guidance)
    pixels = generate(backbone, prompts, seeds, *sampling).permute(0, 2, 3, 1).cpu().numpy()
    sample_grid(pixels, prompts, [None] * count, columns=min(4, count)).savefig(out, dpi=110)
    console.print(f"wrote {out}")


@app.command()
def export(
    run: Annotated[Path, Argument(help="folder of a finished LoRA run")],
    out: Annotated[Path, Argument(help="file to write, such as my-lora.safetensors")],
) -> None:
    """Write a run's LoRA as one file for ComfyUI, alpha / rank in the weights. (A run's own file is for diffusers.)"""
    check_target("the file", out, ".safetensors")
    weight_files(run)
    from flowbp.runtime.weights import export_comfyui

    export_comfyui(run, out)
    console.print(f"wrote {out}", soft_wrap=True)


@app.command("eval")
def evaluate(
    config: Annotated[str, Argument(help="the folder of a run, which is then scored too, a config.yaml, or a preset")],
    overrides: Overrides = None,
    weights: Annotated[list[str] | None, Option(help="PATH or NAME=PATH of a run or LoRA; may repeat")] = None,
    out: Annotated[Path | None, Option(help="folder of the results; default: <run>-eval")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="delete the folder's scores of other settings")] = False,
    strength: Annotated[str, Option(help="of the tuned weights, one or several: 0.25,0.5,1")] = "1",
    processes: Processes = 1,
) -> None:
    """Score base and tuned models on the same prompts and seeds: intervals, paired tests, a page. Goes on if killed."""
    run, of_a_run = load(config, overrides or ()), Path(config, run_folder.CONFIG).is_file()
    run_folder.check_whole(Path(config))
    for spec in weights or ():
        _, source = named_path(spec)
        run_folder.check_whole(source)
        weight_files(source)
    folder = out or Path(f"{config.rstrip('/') if of_a_run else run.output}-eval")
    run_folder.check_mark(folder, "flowbp eval")
    strengths = parse_strengths(strength)
    check_inputs(run)
    from flowbp.evaluation.models import name_models, run_evaluation
    from flowbp.runtime.processes import launched

    models = name_models(weights or ([config] if of_a_run else []))
    with launched(processes):
        try_rewards(run)
        results = run_evaluation(run, models, folder, overwrite, strengths)
    title = f"{run.evaluation.prompts}, {run.evaluation.samples} images, seed {run.evaluation.seed}"
    for name in [model["name"] for model in results["models"][1:]]:
        rows = [row for row in results["changes"] if row["model"] == name]
        console.print(tables.comparison_table(rows, f"{name} against base: {title}", "base", "tuned"))
    if not results["changes"]:
        console.print(tables.table("base", f"base: {title}", rows=results["means"]))
    say_unwrapped(f"report: {(folder / 'report.html').resolve()}")


@app.command("compare")
def compare(
    runs: Annotated[list[Path], Argument(help="folders of runs; the first is the one that others are compared with")],
    out: Annotated[Path, Option(help="folder of comparison.html and comparison.json")] = Path("comparison"),
) -> None:
    """Put several runs into one table and one page, and name the differences that make their comparison unfair."""
    run_folder.short_names(runs)
    for folder in runs:
        run_folder.check_run(folder)
    run_folder.check_mark(out, "flowbp compare")
    from flowbp.evaluation.runs import compare_runs

    results = compare_runs(runs, out)
    first, *others = names = [run["name"] for run in results["runs"]]
    if results["unfair"]:
        reason = "more than the method differs" if results["point"] else "the methods are equal, other settings differ"
        title = Text.assemble(("not a fair comparison", "bold yellow"), f": {reason}")
        values, why = ({key: row[part] for key, row in results["unfair"].items()} for part in ("values", "why"))
        console.print(tables.table("differences", title, runs=names, values=values, why=why))
    for warning in results["warnings"]:
        say(Text("warning:", "bold yellow"), warning)
    if results["point"]:
        console.print(tables.table("differences", "what is compared", runs=names, values=results["point"]))
    if results["means"]:
        console.print(tables.table("means", "means over all images", rows=results["means"], who="run"))
    for name in others:
        if rows := [row for row in results["changes"] if row["run"] == name and row["category"] == "all"]:
            console.print(tables.comparison_table(rows, f"{name} against {first}", "first", "other"))
    say_unwrapped(f"page: {(out / 'comparison.html').resolve()}")


@app.command()
def sweep(
    config: Config,
    overrides: Overrides = None,
    processes: Annotated[int, Option(min=1, help="runs at a time, of one thread each; several GPUs take turns")] = 1,
    out: Annotated[Path, Option(help="folder of the runs, sweep.html and sweep.json")] = Path("runs/sweep"),
) -> None:
    """Train each combination of key=a,b,c from seeds=0..7; compare settings over training runs. Goes on if killed."""
    runs = sweeps.planned(config, overrides or (), out)
    for run in {run.setting: run for run in runs}.values():
        check_inputs(run.config, train=True)
    try:
        with heard_by(interrupt):
            results = sweeps.sweep(runs, out, processes)
    except KeyboardInterrupt as stop:
        done = sum(run.finished for run in runs)
        say(f"\nstopped. {done} of {len(runs)} runs are finished; the same command goes on")
        raise typer.Exit(exit_code(stop)) from None
    title = f"{out}: 95 % intervals over training runs"
    console.print(tables.table("sweep", title, rows=results["rows"]))
    for folder, said in results["failed"].items():
        say_unwrapped(f"failed: {folder}: {said}")
    if results["rows"]:
        say_unwrapped(f"page: {(out / 'sweep.html').resolve()}")
    if results["failed"]:
        raise typer.Exit(1)


@app.command()
def plan(
    method: Annotated[str, Argument(help="a method's name, such as flowbp-lagrange")],
    overrides: Annotated[list[str] | None, Argument(help="field=value of the method, such as alpha=0.3")] = None,
    steps: Annotated[int, Option(min=1, max=1000, help="rollout steps")] = 25,
    shift: Annotated[float, Option(min=1e-3, help="timestep shift of the noise schedule")] = 3.0,
    solver: Annotated[Solver, Option(help="of the rollout, as rollout.solver")] = "euler",
    seed: Annotated[int, Option(min=0, help="seed of the draw")] = 0,
    png: Annotated[Path | None, Option(help="also draw the plan")] = None,
) -> None:
    """Draw one plan of a method and print its nodes, noise levels, weights and bridge."""
    if png is not None:
        check_target("--png", png, ".png")
    u = 1.0 - np.arange(steps) / steps
    sigmas = np.append(shift * u / (1.0 + (shift - 1.0) * u), 0.0)
    built = build_method({"name": method} | parse_overrides(overrides or ()))
    drawn = draw_plan(built, sigmas, np.random.default_rng(seed), solver)
    console.print(tables.table("plan", f"{method}, {steps} {solver} steps, seed {seed}", plan=drawn, sigmas=sigmas))
    say(*words("drawn", plan=drawn))
    if png is not None:
        from flowbp.evaluation import figures

        figures.draw_plan(drawn, sigmas, f"{method}: one plan of {steps} steps").savefig(png, dpi=130)
        console.print(f"wrote {png}")


@app.command()
def rewards(name: Annotated[str | None, Argument(help="say what this one is and how to fetch it")] = None) -> None:
    """List the rewards: their checkpoints, licences, scores and usual hinges."""
    if name in EMBEDDED:
        return say(f"{name} is a model of the reward clip, and part of flowbp: reward={{name: clip, model: {name}}}")
    if name is not None and ":" in name:
        find_callable(name)
        return say(f"{name} is a reward of your own, and was found: reward={{name: '{name}'}}")
    sources = REWARDS if name is None else {name: find_source(name)}
    console.print(tables.table("rewards", "flowbp rewards", sources=sources))
    if name is None:
        say("flowbp rewards NAME says how to fetch one; a function of your own is reward.name=module:function")
    else:
        say_unwrapped(how_to_fetch(name, find_source(name).files, f"rewards/{name}"))


@app.command()
def presets(name: Annotated[str | None, Argument(help="print this one as a config")] = None) -> None:
    """List the presets, or print one as a config to start from."""
    if name is not None:
        return typer.echo(commented(dump(load(name, run_code=False))), nl=False)
    title = "flowbp train PRESET; defaults are left out, flowbp presets PRESET prints all"
    console.print(tables.table("presets", title, presets={preset: load(preset) for preset in known_presets.names()}))


@app.command()
def doctor() -> None:
    """Print versions, the device, and which kernels run and why."""
    console.print(tables.doctor_table())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Time the kernels beside eager PyTorch and torch.compile (options: flowbp bench --help)."""
    from flowbp_kernels.bench import main as run

    run(context.args)
