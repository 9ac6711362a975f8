"""`flowbp eval`: base and tuned weights on the same prompts and seeds, resumable, by any number of processes.

    FOLDER/<model>/model.json             what was scored: settings, versions, SHA-256 of prompts and weights
    FOLDER/<model>/00000.safetensors ...  one chunk each, written whole: scores, and the images of the grid
    FOLDER/results.json                   means and paired changes with their intervals
    FOLDER/samples.csv, samples.json      one row an image: prompt, category, seed, and every score of every model
    FOLDER/samples_<model>.png, report.html

The processes of a distributed run (torchrun, accelerate launch) take chunks in turn. A killed run leaves whole chunks
behind, and the next one scores what is missing. The results are the same to the byte however the chunks came about; on
a CPU, every process computes on one thread for that.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flowbp import log
from flowbp.config import ConfigError, RunConfig, changed
from flowbp.evaluation import scores as scoring
from flowbp.evaluation.pages import write_evaluation
from flowbp.evaluation.scores import Part, Samples, Scorers, Scores, means_and_changes
from flowbp.given import cut, digest_files, digest_text
from flowbp.image_statistics import IMAGE_STATISTICS
from flowbp.runtime.console import progress_bar
from flowbp.runtime.data import load_prompts
from flowbp.runtime.distributed import on_main, process_state
from flowbp.runtime.environment import versions
from flowbp.runtime.files import as_json, read_json, write_file
from flowbp.runtime.inputs import named_path
from flowbp.runtime.processes import naming_the_dead
from flowbp.runtime.reproducible import one_thread
from flowbp.runtime.run_folder import contents, locked, mark_folder
from flowbp.runtime.tensors import read_tensors, write_tensors
from flowbp.runtime.weights import check_base, weight_files

MANIFEST, CHUNKS = "model.json", "[0-9]" * 5 + ".safetensors"

Models = Mapping[str, Path | None]  # name in the results -> weights to score; None: the base model's


def name_models(specs: Iterable[str]) -> Models:
    """The base model, then each of `specs`: "PATH" (named after its last part) or "NAME=PATH".

    Raises ValueError for equal names, and for one that cannot be a folder's.
    """
    models: dict[str, Path | None] = {"base": None}
    for spec in specs:
        name, path = named_path(spec)
        name = name or path.resolve().stem
        if name in models:
            raise ValueError(f"two models are called {name!r}: give them names of their own, --weights NAME=PATH")
        if not "".join(c for c in name if c not in "-_. =").isalnum():
            raise ValueError(f"{name!r} cannot be a folder's name: use letters, digits, . - _ in --weights NAME=PATH")
        models[name] = path
    return models


@naming_the_dead()
def run_evaluation(
    config: RunConfig, models: Models, folder: Path, overwrite: bool = False, strengths: Sequence[float] = (1.0,)
) -> dict[str, Any]:
    """Score every model that is not scored yet and write the results into `folder`; returns what results.json holds.

    strengths: of the tuned weights. At strength s the model NAME is called "NAME s", and NAME at 1.

    Raises ValueError where `folder` holds scores of other settings or weights, unless `overwrite` says to throw those
    away, where two models have one name, and for a strength without weights; ConnectionError where another process has
    ended.
    """
    options = config.evaluation
    if options is None:
        raise ConfigError("this config has no evaluation: add evaluation.prompts=... to say what to score")
    samples = scoring.draw_samples(load_prompts(options.prompts), options)
    manifests = [
        manifest(config, samples, name, weights, strength)
        for name, weights in models.items()
        for strength in (strengths if weights is not None else (1.0,))
    ]
    names = [about["name"] for about in manifests]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two models are called {twice[0]!r}: take other names, --weights NAME=PATH, or strengths")
    if names == ["base"] and [*strengths] != [1.0]:
        raise ValueError("--strength is of tuned weights, and there are none: name the folder of a run, or --weights")
    state = process_state()

    def open_all() -> None:
        mark_folder(folder, "flowbp eval")
        for about in manifests:
            open_model(folder / about["name"], about, overwrite)

    @cache
    def load_scorers() -> Scorers:
        device = str(state.device)
        rewards = {name: spec.load(device) for name, spec in config.reward.items()}
        return scoring.scorers(options, rewards, options.load_monitors(device), device)

    with locked(folder, "evaluates", "--out"):
        on_main(open_all)
        for about in manifests:
            # If the main process refused a folder, the others refuse it here too, instead of waiting for scores.
            open_model(folder / about["name"], about)
            score_model(config, about, samples, folder, load_scorers)
        state.wait_for_everyone()
        metrics = (*config.reward, *options.monitors, "checker", *IMAGE_STATISTICS)
        scores = {about["name"]: read_scores(folder, about, samples, metrics) for about in manifests}
        results = {"models": manifests} | means_and_changes("model", scores, names[0], names[1:])
        on_main(lambda: write_results(config, folder, results, scores))
    return results


def manifest(config: RunConfig, samples: Samples, name: str, weights: Path | None, strength: float) -> dict[str, Any]:
    """All that the scores of a model depend on."""
    if weights is not None:
        check_base(weight_files(weights)[0].parent, bool(config.backbone.quantise and config.backbone.quantise.weights))
    settings = config.model_dump(mode="json", include={"backbone", "guidance", "reward", "evaluation"})
    settings["rollout"] = config.evaluation_rollout.model_dump(mode="json")
    at = {} if strength == 1 else {"strength": strength}
    return {
        "name": f"{name} {strength:g}" if at else name,
        "weights": None if weights is None else str(weights),
        "sha256": None if weights is None else digest_files(weight_files(weights)),
        "prompts_sha256": digest_text(json.dumps(samples.prompts)),
        "settings": settings,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions("flowbp", "torch", "diffusers", "transformers", "numpy"),
    } | at


def open_model(folder: Path, about: dict[str, Any], overwrite: bool = False) -> None:
    """Make the folder of a model's scores, or check that the one there holds scores of the same things.

    overwrite: scores of other things are removed; no other file is.
    """
    path = folder / MANIFEST
    if path.is_file():
        if not (differing := differences(read_json(path), about)):
            return
        scores = list(folder.glob(CHUNKS))
        if not overwrite and scores:
            way_out = "Choose another --out, or pass --overwrite to lose them"
            raise ValueError(f"{folder} holds scores of another evaluation: {'; '.join(differing)}. {way_out}")
        for file in scores:
            file.unlink()
    elif folder.exists() and contents(folder):
        raise FileExistsError(f"{folder} exists and holds no scores (it has no {MANIFEST}): choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(about, indent=1))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """How two manifests differ, in words. The place of the weights is no difference; their SHA-256 is compared."""
    before, after = ({key: value for key, value in side.items() if key != "weights"} for side in (old, new))
    return [f"{key} was {cut(was)} and is {cut(now)}" for key, (was, now) in changed(before, after).items()]


def score_model(
    config: RunConfig, about: dict[str, Any], samples: Samples, folder: Path, load: Callable[[], Scorers]
) -> None:
    """Score this process's share of the chunks that have no whole file yet, by the scorers that `load` gives. Nothing
    is loaded if no process lacks any.

    Raises OSError if the weights are not those of `about`, as where a training replaced them meanwhile.
    """
    state = process_state()
    state.wait_for_everyone()
    if not (missing := [i for i in range(len(samples.chunks)) if read_chunk(folder, about, i) is None]):
        return
    from flowbp.runtime.tuned_model import frozen_backbone

    weights = None if about["weights"] is None else Path(about["weights"])
    texts, strength = [prompt.text for prompt in samples.prompts], about.get("strength", 1.0)
    backbone = frozen_backbone(config, weights, str(state.device), texts, strength)
    if weights is not None and digest_files(weight_files(weights)) != about["sha256"]:
        raise OSError(f"{weights} was replaced while it was read: evaluate it once its training is over")
    named = load()
    share = [(i, samples.chunks[i]) for i in missing if i % state.num_processes == state.process_index]
    with one_thread(), progress_bar(about["name"], "image", sum(scoring.length(chunk) for _, chunk in share)) as bar:
        for i, chunk in share:
            path, said = chunk_file(folder, about, i)
            write_tensors(path, scoring.score_chunk(backbone, samples, config, named, chunk), said)
            bar.update(scoring.length(chunk))


def chunk_file(folder: Path, about: Mapping[str, Any], index: int) -> tuple[Path, dict[str, str]]:
    """The file of a chunk, and what it says of itself: its number, and a digest of all that its scores depend on."""
    settings = json.dumps({key: value for key, value in about.items() if key not in ("name", "weights")})
    return folder / about["name"] / f"{index:05d}.safetensors", {"chunk": f"{index} of {digest_text(settings)}"}


def read_chunk(folder: Path, about: Mapping[str, Any], index: int) -> Part | None:
    """A chunk, or None if it must be made: it has no file, or a damaged one, which is told."""
    try:
        return read_tensors(*chunk_file(folder, about, index))[0]
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s. It is made again", error)
        return None


def read_scores(folder: Path, about: Mapping[str, Any], samples: Samples, metrics: Sequence[str]) -> Scores:
    """The scores of a model, all chunks of which are there; `metrics` is the order in which they are reported."""
    files = (chunk_file(folder, about, i) for i in range(len(samples.chunks)))
    scores = scoring.join(samples, [read_tensors(*file)[0] for file in files])
    return replace(scores, values={name: scores.values[name] for name in metrics if name in scores.values})


# -- results -----------------------------------------------------------------------------------------------------------


def write_results(config: RunConfig, folder: Path, results: dict[str, Any], scores: Mapping[str, Scores]) -> None:
    """results.json, samples.csv, samples.json, samples_<model>.png and report.html."""
    first = next(iter(scores.values()))
    columns = {f"{model} {metric}": column for model, own in scores.items() for metric, column in own.values.items()}
    write_file(folder / "samples.csv", replace(first, values=columns).as_csv(number_format="", line_end="\n"))
    rows = []
    for i, (prompt, seed) in enumerate(zip(first.prompts, first.seeds, strict=True)):
        found = {name: {metric: float(x[i]) for metric, x in own.values.items()} for name, own in scores.items()}
        rows.append({"prompt": prompt.text, "category": prompt.category, "seed": seed, "scores": found})
    write_file(folder / "samples.json", as_json(rows))
    write_file(folder / "results.json", as_json(results))
    write_evaluation(config, folder, results, scores)
