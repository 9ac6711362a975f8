"""`flowbp sweep`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from flowbp.cli import tables
from flowbp.cli.commands import Config, Overrides, app, console, say, say_unwrapped
from flowbp.runtime.inputs import check_inputs
from flowbp.runtime.interrupts import exit_code, heard_by, interrupt
from flowbp.training import sweep as sweeps


@app.command()
def sweep(
    config: Config,
    overrides: Overrides = None,
    processes: Annotated[int, Option(min=1, help="runs at a time, of one thread each; several GPUs take turns")] = 1,
    out: Annotated[Path, Option(help="folder of the runs, sweep.html and sweep.json")] = Path("runs/sweep"),
) -> None:
    """Train every combination of key=a,b,c from the seeds of seeds=0..7, and compare settings over training runs. A
    killed sweep goes on.
    """
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
    console.print(tables.sweep_table(results["rows"], f"{out}: 95 % intervals over training runs"))
    for folder, said in results["failed"].items():
        say_unwrapped(f"failed: {folder}: {said}")
    if results["rows"]:
        say_unwrapped(f"page: {(out / 'sweep.html').resolve()}")
    if results["failed"]:
        raise typer.Exit(1)
