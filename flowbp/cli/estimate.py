"""`flowbp estimate`: the peak memory and the cost of a training step, and what would fit."""

from pathlib import Path
from typing import Annotated

from rich.text import Text
from typer import Option

from flowbp.backbones import KNOWN_MODELS, read_index
from flowbp.cli import tables
from flowbp.cli.terminal import Config, Overrides, console, say, say_unwrapped
from flowbp.config import load
from flowbp.estimate.communication import BANDWIDTH, MACHINE, traffic
from flowbp.evaluation.templates import gigabytes, words
from flowbp.runtime.files import as_json
from flowbp.runtime.inputs import check_target, parse_size


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
