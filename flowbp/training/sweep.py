"""Runs that differ in a few keys, each from several seeds, and what they have in common.

One run says little: another seed moves its scores further than the interval over its images tells. So a setting is
judged by the mean over training runs, with a 95 % t interval over these runs, and two settings by the differences of
runs that share their seed. Settings are all combinations of the values given for each key. A run is `flowbp train` in a
process of its own, on one thread, in <folder>/<setting>/seed-<n>. A sweep that was interrupted goes on by the same
command: what is finished is kept.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flowbp.config import ConfigError, RunConfig, load, parse_overrides
from flowbp.config.loading import CONFIG, read
from flowbp.given import cut
from flowbp.runtime.console import progress_bar
from flowbp.runtime.files import as_json, read_json, write_file
from flowbp.runtime.run_folder import RunFolder, locked, mark_folder

SEEDS = re.compile(r"(\d+)\.\.(\d+)")  # 0..7: both ends belong to it


@dataclass(frozen=True)
class SweptRun:
    """setting: the keys in which it differs from others, each by the end of its name. arguments: of `flowbp train`."""

    setting: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    config: RunConfig

    @property
    def finished(self) -> bool:
        """Whether it has taken all its steps and written its report, which is the last that it writes."""
        reported = (self.folder / "report.html").is_file()
        return reported and read(self.folder / CONFIG)[0]["steps"] == self.config.steps


def planned(config: str, overrides: Sequence[str], folder: Path) -> list[SweptRun]:
    """The runs of a sweep, setting by setting. `key=a,b` has two values, `key=[a,b]` one, `seeds=0..3` four seeds.

    Raises ConfigError for a setting that no run could have, ValueError for a folder with a run of another setting.
    """
    axes: dict[str, list[str]] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            parse_overrides([override])  # raises
        if key in axes:
            raise ConfigError(f"{cut(key)} is given twice: name all its values at once, as {cut(key)}=a,b")
        axes[key] = alternatives(value)
    given = axes.pop("seeds", [str(load(config).seed)])
    seeds = [seed for text in given for seed in span(text)]
    if "seed" in axes or "output" in axes:
        raise ConfigError("a sweep gives each run its seed and its output: use seeds=0..7 and --out")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds={','.join(given)} names a seed twice: runs are told apart by their seeds")
    swept, runs = [key for key, values in axes.items() if len(values) > 1], []
    last = [key.rpartition(".")[2] for key in swept]
    names = {key: key if last.count(name) > 1 else name for key, name in zip(swept, last, strict=True)}
    for values in itertools.product(*axes.values()):
        named = dict(zip(axes, values, strict=True))
        setting = " ".join(f"{name}={named[key]}" for key, name in names.items()) or "as given"
        for seed in seeds:
            place = folder / re.sub(r"[^\w.=,+-]+", "_", setting) / f"seed-{seed}"
            typed = [f"{key}={value}" for key, value in named.items()]
            typed += [f"seed={seed}", f"output={json.dumps(str(place))}"]  # a string in YAML, whatever stands in it
            run = load(config, typed)
            if run.evaluation is None:
                raise ConfigError(f"{setting}: a sweep compares scores, and evaluation is null: name its prompts")
            if place.exists():
                RunFolder(place).check(run, resume=True, overwrite=False)
            runs.append(SweptRun(setting, seed, place, (config, *typed), run))
    folders = [run.folder for run in runs]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise ConfigError(f"two settings would share the folder {twice[0]}: name each value once, or sweep apart")
    return runs


def alternatives(text: str) -> list[str]:
    """The values of an override, as they are typed: the entries of the YAML list that it is between brackets. A text
    that makes no list is one value.
    """
    try:
        listed = yaml.compose(f"[{text}]", yaml.SafeLoader)
    except yaml.YAMLError:
        return [text]
    return [text[value.start_mark.index - 1 : value.end_mark.index - 1] for value in listed.value] or [text]


def span(text: str) -> list[int]:
    """The seeds that 0..7 or 5 names."""
    text = text.strip()
    ends = SEEDS.fullmatch(text)
    seeds = range(int(ends[1]), int(ends[2]) + 1) if ends else [int(text)] if text.isdecimal() else []
    if not seeds:
        raise ConfigError(f"seeds={cut(text)} names no seed: write 0..7, or 1,2,3")
    return list(seeds)


def sweep(runs: Sequence[SweptRun], folder: Path, processes: int) -> dict[str, Any]:
    """Make the runs that are not finished, `processes` at a time, and write sweep.json and sweep.html into `folder`.

    Returns what sweep.json holds: {"rows": a row for each setting and metric, "failed": {folder: last words}, ...}. A
    run that fails stops no other. KeyboardInterrupt ends the runs under way, which write a checkpoint first.
    """
    with locked(folder, "sweeps", "--out"):
        mark_folder(folder, "flowbp sweep")
        failed = make([run for run in runs if not run.finished], processes, len(runs))
        finished = [run for run in runs if run.finished]
        made_in = [(run, read_json(run.folder / "environment.json")) for run in finished]
        told = [{"setting": r.setting, "seed": r.seed, "scores": overall(r), "environment": e} for r, e in made_in]
        results = {"runs": told, "rows": summary(finished, runs[0].setting), "failed": failed}
        write_file(folder / "sweep.json", as_json(results))
        if finished:
            from flowbp.evaluation.pages import render  # with what it draws: imports matplotlib

            page = render("sweep.html", name=folder.name, config=finished[0].config, runs=finished, results=results)
            write_file(folder / "sweep.html", page)
    return results


def make(runs: Sequence[SweptRun], processes: int, total: int) -> dict[str, str]:
    """Train `runs`, each in a process of its own. Returns {folder: why} of those that failed."""
    failed, stopping = {}, threading.Event()
    here, places = threading.local(), itertools.count()

    def take_place() -> None:
        here.place = next(places)

    def train(run: SweptRun) -> str | None:
        """Train one run to its end. Returns why it failed, or None."""
        log, resume = run.folder.with_suffix(".log"), ["--resume"] if run.folder.exists() else []
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w") as file:
                command = [sys.executable, "-m", "flowbp", "train", *run.arguments, *resume]
                process = subprocess.Popen(command, stdout=file, stderr=file, env=surroundings(here.place))
                while process.poll() is None and not stopping.wait(0.1):
                    pass
                if stopping.is_set():
                    process.terminate()
                code = process.wait()
            said = log.read_text(errors="replace").strip().splitlines()
        except OSError as error:
            return cut(error)
        if code == 0 and run.finished:
            return None
        ended = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"{ended}: {cut(said[-1], 200) if said else 'it said nothing'} ({log})"

    bar = progress_bar("sweep", "run", total, total - len(runs))
    with bar, ThreadPoolExecutor(processes, initializer=take_place) as pool:
        try:
            for run, why in zip(runs, pool.map(train, runs), strict=True):
                if why is not None:
                    failed[str(run.folder)] = why
                bar.update()
        except KeyboardInterrupt:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def surroundings(place: int) -> dict[str, str]:
    """The environment of the run at `place`: one thread, unless OMP_NUM_THREADS is given, and one of the GPUs that this
    process may use.
    """
    import torch

    given = {"OMP_NUM_THREADS": "1"} | os.environ
    listed = given.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(i) for i in range(torch.cuda.device_count())] if listed is None else listed.split(",")
    return given | ({"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if len(gpus) > 1 else {})


def overall(run: SweptRun) -> dict[str, dict[str, float]]:
    """{metric: its row of evaluation.json over all images}, with nan for an interval that too few prompts bear."""
    rows = [row for row in read_json(run.folder / "evaluation.json") if row["category"] == "all"]
    return {row["metric"]: {k: float("nan") if v is None else v for k, v in row.items()} for row in rows}


def summary(runs: Sequence[SweptRun], first: str) -> list[dict[str, Any]]:
    """A row for each setting and metric: over its runs the mean before and after, their changes and the mean change,
    over the runs that share a seed with the setting `first` the difference from it, and the mean ends of a single run's
    interval over its images, which is narrower than that over runs. Intervals are nan for fewer than two runs.
    """
    from flowbp.evaluation.statistics import mean_of_runs  # imports scipy

    scores = {(run.setting, run.seed): overall(run) for run in runs}
    rows = []
    for setting in dict.fromkeys(run.setting for run in runs):
        seeds = [run.seed for run in runs if run.setting == setting]
        for metric in scores[setting, seeds[0]]:
            shared = [seed for seed in seeds if setting != first and metric in scores.get((first, seed), {})]
            own = [scores[setting, seed][metric] for seed in seeds]
            changes = [each["change"] for each in own]
            ours, theirs = (np.array([scores[s, seed][metric]["change"] for seed in shared]) for s in (setting, first))
            row = {"setting": setting, "metric": metric, "seeds": seeds}
            row |= {key: float(np.mean([each[key] for each in own])) for key in ("before", "after")}
            row |= {"changes": changes, "change": mean_of_runs(changes)}
            row |= {"images": [float(np.mean([each[end] for each in own])) for end in ("low", "high")]}
            rows.append(row | {"difference": mean_of_runs(ours - theirs) if shared else None})
    return rows
