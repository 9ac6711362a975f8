"""What was done to flowbp, and what fell: kills, full disks, damaged files, strange input. `make soak` runs it all.

    kills      kill -9 before every file operation and at random times: of a start, of a run that goes on, of
               --overwrite; LoRA and all weights. Then --resume must go on, and every result equal an unbroken run's.
    disks      files that cannot grow, files that cannot be made, a small disk. The error names the file, and after
               --resume every result equals an unbroken run's.
    ranks      one of two processes is killed. The other ends within a minute and names it.
    damages    one file of a run, an evaluation or a cache is changed, cut, emptied, deleted or another run's. The
               result equals the undamaged one's, or the command ends with an error that names the file.
    fuzz       configs, plans, prompt files, LoRA files and calls of the ops: no exception but flowbp's own.

Numbers go to docs/reliability.json. In tests/reliability/test_reliability.py a small part of each runs.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from reliability.forks import (  # noqa: E402
    Ended,
    count_operations,
    files_of_at_most,
    flowbp_command,
    fork,
    full_at,
    killed_after,
    killed_at,
    killed_in_step,
    preload,
)

from flowbp.runtime.environment import environment  # noqa: E402
from flowbp.runtime.processes import free_port  # noqa: E402

TINY = [
    *("steps=3", "checkpoint_every=1", "data.batch_size=1", "rollout.num_steps=2", "method={name: refl, last_n: 1}"),
    *("reward.smooth=null", "tuning.rank=2", "optimizer.lr=1e-2", "evaluation.samples=4", "evaluation.batch_size=2"),
    *("evaluation.grid=2", "evaluation.every=1", "evaluation.validation_samples=4", "evaluation.best=monitor"),
]
MODES = {"lora": [], "full": ["tuning={mode: full, rank: 1}", "optimizer.lr=1e-4", "ema=null"]}
METRICS = "metrics.jsonl"
NOWHERE = Path("/nowhere")
DONE = ("kills", "full disks", "damages", "killed ranks", "fuzz inputs")
FELL = ("refused", "changed", "tracebacks", "nameless", "lost", "silent", "foreign errors", "hangs", "crashes")
COUNTED = (*DONE, *FELL)
CHANGING = ("seconds", "peak_mb")  # what no two runs have in common
# What a run delivers, as patterns: files that equal runs have in common to the byte.
RESULTS = (
    *("*.safetensors", "transformer/*", "best/**/*", "validation/*", "checkpoints/*/parameters.safetensors"),
    *("scores_*.csv", "evaluation.json", "validation.json"),
)
EVALUATION = ("*/*.safetensors", "*/model.json", "results.json", "samples.csv", "samples.json")


@dataclass
class Report:
    """Counts of what was done, and a line for everything that fell. Both are written to `file` as they come."""

    file: Path | None = None
    made_with: dict[str, Any] = field(default_factory=environment)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    fallen: list[str] = field(default_factory=list)
    seconds: dict[str, int] = field(default_factory=dict)

    def count(self, name: str, number: int = 1) -> None:
        self.counts[name] += number
        self.write()

    def write(self) -> None:
        if self.file is not None:
            about = self.made_with | {"counts": self.counts, "fallen": self.fallen, "seconds": self.seconds}
            self.file.write_text(json.dumps(about, indent=1) + "\n")

    def fell(self, name: str, what: str) -> None:
        what = re.sub(r"\S*soak-\w+", "FOLDER", what)
        self.fallen.append(f"{name}: {what}")
        self.count(name)
        print(f"  {name}: {what}", flush=True)


class Soak:
    """Runs in a folder of their own, which everything is compared with, and the faults done to copies of them."""

    def __init__(self, folder: Path, seed: int = 0, json_file: Path | None = None):
        self.folder, self.random, self.report = folder, random.Random(seed), Report(json_file)
        (folder / "temporary").mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "temporary")
        os.environ["FLOWBP_CACHE"] = str(folder / "cache")
        preload()

    # -- runs --------------------------------------------------------------------------------------------------------

    def train(self, output: Path, mode: str = "lora", *options: str, **how) -> Ended:
        return flowbp_command("train", "demo", *TINY, *MODES[mode], f"output={output}", *options, **how)

    def template(self, name: str, mode: str = "lora", *options: str, **how) -> Path:
        """The folder of a run that is made once. It is not to be changed: `copy` makes one to work on."""
        path = self.folder / "runs" / mode / name
        if not path.exists():
            ended = self.train(path, mode, *options, **how)
            assert ended.code in (0, -signal.SIGKILL), ended.said
        return path

    def whole(self, mode: str = "lora") -> Path:
        return self.template("whole", mode)

    def half(self, mode: str = "lora", name: str = "half", *options: str) -> Path:
        """A run that was killed in its last step."""
        return self.template(name, mode, *options, before=killed_in_step(2))

    def longer(self) -> Path:
        return self.template("longer", "lora", "steps=4")

    def other(self, mode: str = "lora") -> Path:
        """A run of another seed."""
        return self.template("other", mode, "seed=7")

    def evaluation(self) -> Path:
        path = self.folder / "runs" / "evaluation"
        if not path.exists():
            for run, out in ((self.whole(), path), (self.other(), path.with_name("other evaluation"))):
                ended = flowbp_command("eval", run, "--weights", f"tuned={run}", "--out", out)
                assert ended.code == 0, ended.said
        return path

    def other_evaluation(self) -> Path:
        return self.evaluation().with_name("other evaluation")

    def copy(self, template: Path) -> Path:
        """A copy to work on, always at the same place."""
        work = self.folder / "tried"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(template, work)
        return work

    def clear(self) -> Path:
        work = self.folder / "tried"
        shutil.rmtree(work, ignore_errors=True)
        return work

    # -- kills -------------------------------------------------------------------------------------------------------

    def kills(self, mode: str, scene: str, every: int = 1, at_random: int = 0) -> None:
        """Kill a run before every `every`-th file operation, and at so many random times; then let it go on.

        scene: "start", "resume" of a half run, or "overwrite" of a finished one.
        """
        options = {"start": [], "resume": ["--resume"], "overwrite": ["--overwrite"]}[scene]
        prepare = {"start": self.clear, "resume": lambda: self.copy(self.half(mode))}.get(
            scene, lambda: self.copy(self.whole(mode))
        )
        self.whole(mode), self.half(mode)
        work = prepare()
        began = time.monotonic()
        count = count_operations(lambda before: self.train(work, mode, *options, before=before), work)
        took = time.monotonic() - began
        first = self.random.randrange(every)
        faults = [killed_at(k, work) for k in range(first, count, every)]
        faults += [killed_after(self.random.uniform(0, took)) for _ in range(at_random)]
        for index, fault in enumerate(faults):
            where = (
                f"{mode}, {scene}, kill {first + index * every if index * every < count else 'at random'} of {count}"
            )
            work = prepare()
            ended = self.train(work, mode, *options, before=fault)
            if ended.code not in (-signal.SIGKILL, -signal.SIGALRM):
                continue  # it had ended before
            self.report.count("kills")
            again = "--overwrite" if scene == "overwrite" and index % 2 else "--resume"
            self.goes_on(work, mode, where, "refused", "changed", again)

    def goes_on(self, work: Path, mode: str, where: str, refused: str, changed: str, *options: str) -> None:
        """Check that a run goes on to what an unbroken one delivers."""
        ended = self.train(work, mode, *options)
        if ended.code != 0:
            return self.report.fell(refused, f"{where}: {ended.error[:300] or ended.said[-300:]}")
        if found := differing(self.whole(mode), work):
            self.report.fell(changed, f"{where}: {', '.join(found)}")

    # -- full disks --------------------------------------------------------------------------------------------------

    def disks(self, mode: str, sizes: Sequence[int], writes: int) -> None:
        """Train where files cannot grow beyond each of `sizes`, and where from one of `writes` places on none can be
        made.
        """
        work = self.clear()
        count = count_operations(lambda before: self.train(work, mode, before=before), work)
        faults = {f"files of at most {size} bytes": files_of_at_most(size) for size in sizes}
        places = sorted(self.random.sample(range(count), min(writes, count)))
        faults |= {f"no file from write {place} of {count} on": full_at(place, work) for place in places}
        for name, fault in faults.items():
            work = self.clear()
            ended = self.train(work, mode, before=fault)
            if ended.code == 0:
                if found := differing(self.whole(mode), work):
                    self.report.fell("lost", f"{mode}, {name}: a success that lacks {', '.join(found)}")
                continue
            self.report.count("full disks")
            if ended.traceback or ended.code != 2:
                self.report.fell("tracebacks", f"{mode}, {name}: code {ended.code}, {ended.said[-400:]}")
            elif str(self.folder) not in ended.error:
                self.report.fell("nameless", f"{mode}, {name}: {ended.error[:300]}")
            self.goes_on(work, mode, name, "lost", "lost", "--resume")

    # -- damages -----------------------------------------------------------------------------------------------------

    def damages(self, scene: str, kinds: Sequence[str] = ("flip", "cut", "empty", "swap", "delete"), share=1.0) -> None:
        """Damage every file that a command reads, in every way of `kinds`, one at a time.

        share: of these, drawn at random.
        """
        template, files, other, command, results = self.scenes()[scene]()
        ended = command(self.copy(template))
        assert ended.code == 0, ended.said
        expected = self.folder / "expected"
        shutil.rmtree(expected, ignore_errors=True)
        (self.folder / "tried").rename(expected)
        for name in (str(file.relative_to(template)) for file in files(template)):
            for kind in kinds:
                if self.random.random() > share or (kind == "swap" and not (other / name).is_file()):
                    continue
                work = self.copy(template)
                if not damage(work / name, kind, other / name, self.random):
                    continue
                self.report.count("damages")
                where = f"{scene}, {kind} {name}"
                ended = command(work)
                file, parents = work / name, [path for path in (work / name).parents if work in path.parents]
                told = any(str(path) in ended.said for path in (file, *parents))
                if ended.traceback or ended.code not in (0, 2):
                    self.report.fell("tracebacks", f"{where}: code {ended.code}, {ended.said[-300:]}")
                elif ended.code == 2 and not (told or (file.parent == work and str(work) in ended.said)):
                    self.report.fell("nameless", f"{where}: {ended.error[:300]}")
                elif ended.code == 0 and (found := differing(expected, work, results)):
                    if not (kind in ("delete", "empty") and told):
                        self.report.fell("silent", f"{where}: {', '.join(found)}; {ended.said[-100:]}")

    # -- one of two processes ----------------------------------------------------------------------------------------

    def ranks(self, killed: int, limit: float = 60) -> None:
        """Kill one of two processes of a run. The other must end within `limit` seconds, and name it."""
        work = self.clear()
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        command = [sys.executable, "-m", "flowbp", "train", "demo", *TINY, "steps=100000", f"output={work}"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        ranks = [
            subprocess.Popen(
                [*command, "evaluation=null"], env=os.environ | where | {"RANK": r, "LOCAL_RANK": r}, **pipes
            )
            for r in "01"
        ]
        try:
            while not (work / METRICS).is_file() or len((work / METRICS).read_bytes().splitlines()) < 2:
                assert all(rank.poll() is None for rank in ranks)
                time.sleep(0.1)
            ranks[killed].kill()
            self.report.count("killed ranks")
            _, said = ranks[1 - killed].communicate(timeout=limit)
            named = f"process {killed} of 0 to 1 ended, and process {1 - killed} cannot go on alone" in said
            if "Traceback" in said or not named:
                self.report.fell("nameless", f"rank {killed} killed: {said[-300:]}")
        except subprocess.TimeoutExpired:
            self.report.fell("hangs", f"rank {killed} killed: the other goes on")
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()

    # -- strange input -----------------------------------------------------------------------------------------------

    def fuzz(self, kind: str, count: int, limit: float = 600) -> None:
        """Try `count` inputs of a kind, in a fork, which may hang or crash."""
        seed, folder = self.random.getrandbits(32), self.folder / "fuzz"
        folder.mkdir(exist_ok=True)

        def attempt() -> None:
            from reliability.inputs import fuzz

            tried = fuzz(kind, count, folder, seed, lambda line: print(f"FOREIGN {line!r}"))
            print(f"TRIED {tried}")

        ended = fork(attempt, limit)
        lines = ended.said.splitlines()
        self.report.count("fuzz inputs", sum(int(line.split()[1]) for line in lines if line.startswith("TRIED ")))
        for line in lines:
            if line.startswith("FOREIGN "):
                self.report.fell("foreign errors", line[8:])
        if ended.code != 0:
            self.report.fell("hangs" if ended.code is None else "crashes", f"{kind}: {ended.code} {ended.said[-500:]}")

    def scenes(self) -> dict[str, Callable[[], tuple]]:
        """Name -> what makes (template, its files to damage, the other of its kind, the command, what is compared)."""

        def of_a_run(run: Path) -> list[Path]:
            patterns = "checkpoints/*/*", "validation/*", "metrics.jsonl", "config.yaml", "*.safetensors", "best/**/*"
            found = [path for pattern in (*patterns, "transformer/*") for path in sorted(run.glob(pattern))]
            return [path for path in found if path.is_file()]

        def weights(run: Path) -> list[Path]:
            return [run / "config.yaml", *run.glob("*.safetensors"), *run.glob("transformer/*")]

        def evaluate(work: Path) -> Ended:
            return flowbp_command("eval", work, "--weights", f"tuned={work}", "--out", work / "eval")

        def compare(work: Path) -> Ended:
            return flowbp_command("compare", work, self.other(), "--out", work / "compared")

        def score_again(work: Path) -> Ended:
            return flowbp_command("eval", self.whole(), "--weights", f"tuned={self.whole()}", "--out", work)

        def cached(work: Path) -> Ended:
            return self.train(work / "run", "lora", f"data.cache={work}", "steps=1")

        def cache() -> Path:
            path = self.folder / "runs" / "cached"
            if not path.exists():
                cached(path)
                shutil.rmtree(path / "run")
            return path

        def resume(work: Path) -> Ended:
            return flowbp_command("train", work, "--resume")

        def lengthen(work: Path) -> Ended:
            return flowbp_command("train", work, "--resume", "steps=4")

        def tensors(folder: Path) -> list[Path]:
            return sorted(folder.rglob("*.safetensors"))

        def chunks(folder: Path) -> list[Path]:
            return [*sorted(folder.glob("*/*.safetensors")), *sorted(folder.glob("*/model.json"))]

        scenes: dict[str, Callable[[], tuple]] = {}
        for mode in MODES:
            half, whole, other = (partial(make, mode) for make in (self.half, self.whole, self.other))
            other_half = partial(self.half, mode, "other half", "seed=7")
            scenes |= {
                f"resume, {mode}": lambda half=half, other=other_half: (half(), of_a_run, other(), resume, RESULTS),
                f"lengthen, {mode}": lambda whole=whole, other=other: (whole(), of_a_run, other(), lengthen, RESULTS),
                f"eval, {mode}": lambda whole=whole: (whole(), weights, NOWHERE, evaluate, ("eval/samples.csv",)),
            }
        logged = lambda run: [run / METRICS, run / "config.yaml"]  # noqa: E731
        page = ("compared/comparison.json",)
        scenes["compare"] = lambda: (self.whole(), logged, self.other(), compare, page)
        named = lambda run: [run / "config.yaml"]  # noqa: E731
        scenes["eval of a config"] = lambda: (self.whole(), named, self.other(), evaluate, ("eval/samples.csv",))
        again = lambda: (self.evaluation(), chunks, self.other_evaluation(), score_again, EVALUATION)  # noqa: E731
        scenes["eval again"] = again
        scenes["cache"] = lambda: (cache(), tensors, cache(), cached, tuple(f"run/{each}" for each in RESULTS))
        return scenes


def damage(file: Path, kind: str, other: Path, draw: random.Random) -> bool:
    """Damage a file. Returns whether it is another one now."""
    content = file.read_bytes()
    if kind == "delete":
        file.unlink()
        return True
    if kind == "flip":
        place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
        changed = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
    else:
        changed = other.read_bytes() if kind == "swap" else content[: len(content) // 2 if kind == "cut" else 0]
    file.write_bytes(changed)
    return changed != content


def differing(expected: Path, got: Path, patterns: Sequence[str] = RESULTS) -> list[str]:
    """Names of the files that one folder lacks or that differ. Rows of metrics are compared without their times."""
    found = []
    for folder in (expected, got):
        paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
        files = {str(path.relative_to(folder)): content(path) for path in paths}
        found.append(files | ({METRICS: without_times(folder / METRICS)} if patterns is RESULTS else {}))
    one, other = found
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def content(path: Path) -> Any:
    """The bytes of a file; of safetensors its tensors, because diffusers leaves the order of the metadata to chance."""
    try:
        return {name: value.tobytes() for name, value in load_file(path).items()}
    except Exception:
        return path.read_bytes()


def without_times(metrics: Path) -> bytes:
    if not metrics.is_file():
        return b""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if not key.endswith(CHANGING)} for row in rows]
    return json.dumps(kept).encode()


# -- all of it ---------------------------------------------------------------------------------------------------------


def all_kills(soak: Soak, share: float) -> None:
    for mode, every, at_random in (("lora", 10, 4), ("full", 20, 2)):
        for scene in ("start", "resume", "overwrite"):
            soak.kills(mode, scene, every=round(every / share), at_random=round(at_random * share))


def all_disks(soak: Soak, share: float) -> None:
    sizes = [0, 300, 1000, 3000, 10_000, 100_000]
    for mode in MODES:
        soak.disks(mode, soak.random.sample(sizes, round(len(sizes) * share)), writes=round(6 * share))


def all_damages(soak: Soak, share: float) -> None:
    for scene in soak.scenes():
        soak.damages(scene, share=share * (0.4 if scene.endswith("full") else 1))


def all_ranks(soak: Soak, share: float) -> None:
    for killed in (0, 1):
        soak.ranks(killed)


def all_fuzz(soak: Soak, share: float) -> None:
    counts = {"configs": 1500, "overrides": 1500, "plans": 3000, "prompt files": 3000, "LoRA files": 500}
    for kind, count in (counts | {"op calls": 1500}).items():
        soak.fuzz(kind, round(count * share))


PARTS: dict[str, Callable[[Soak, float], None]] = {
    "kills": all_kills,
    "disks": all_disks,
    "damages": all_damages,
    "ranks": all_ranks,
    "fuzz": all_fuzz,
}


def short(soak: Soak) -> None:
    """A few of each kind, in half a minute of one core."""
    soak.kills("lora", "resume", every=45)
    soak.disks("lora", [3000], writes=1)
    soak.damages("resume, lora", share=0.08)
    for kind, count in {"configs": 50, "plans": 100, "prompt files": 100, "LoRA files": 20, "op calls": 100}.items():
        soak.fuzz(kind, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; all if none is named")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--share", type=float, default=1.0, help="of all that is done, drawn at random")
    parser.add_argument("--short", action="store_true", help="a few of each kind")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # waits for no disk
    with tempfile.TemporaryDirectory(prefix="soak-", dir=memory) as folder:
        soak = Soak(Path(folder), given.seed, given.json)
        if given.short:
            short(soak)
        for part in () if given.short else given.parts or PARTS:
            began = time.monotonic()
            PARTS[part](soak, given.share)
            soak.report.seconds[part] = round(time.monotonic() - began)
            soak.report.write()
            print(f"{part}: {soak.report.seconds[part]} s", soak.report.counts, flush=True)
    sys.stdout.flush()
    os._exit(1 if soak.report.fallen else 0)  # without what libraries say when an interpreter ends


if __name__ == "__main__":
    main()
