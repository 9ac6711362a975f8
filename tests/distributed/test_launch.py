"""`flowbp train` in several processes, by any launcher: they log the steps of one, one speaks, none outlives
another.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[2]
OWN = ["-m", "flowbp"]
CPUS = ["--config_file", str(ROOT / "configs/accelerate/2-cpus.yaml")]
LAUNCHERS = {  # arguments before the command, of a new interpreter if there are any, and after it
    "flowbp": ([], ["--processes", "2", "memory.shard=node"]),
    "torchrun": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *OWN], []),
    "accelerate": (["-m", "accelerate.commands.launch", *CPUS, "--main_process_port", "0", *OWN], []),
}
LONG = [
    "steps=100000",
    "checkpoint_every=1",
    "data.batch_size=1",
    "rollout.num_steps=2",
    "method={name: refl, last_n: 1}",
]
COUNTING = """
import os
import torch
from pathlib import Path

def reward(images, prompts):
    Path(os.environ["COUNTED"], os.environ["RANK"]).write_text(str(torch.get_num_threads()))
    return images.mean(dim=(1, 2, 3))
"""
# What a launcher runs in the place of flowbp: it hands its arguments and environment to this test, and ends with it.
STAND_IN = """
import json, os, sys, time
from pathlib import Path

mine, parent = Path(os.environ["HANDED"], os.environ["RANK"]), os.getppid()
mine.with_suffix(".partial").write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
mine.with_suffix(".partial").rename(mine.with_suffix(".json"))
while not mine.with_suffix(".ended").exists() and os.getppid() == parent:
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def start():
    """Starts `flowbp train` of the embedded model into a folder, by itself or by a launcher beside that folder."""
    started = []

    def process(output, launcher, options, **environment):
        arguments = ["train", "demo", f"output={output}", "evaluation=null", *options]
        environment = {"PYTHONPATH": str(ROOT), "FLOWBP_CACHE": f"{output}-cache"} | environment
        if launcher:
            how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": output.parent}
            command = [sys.executable, *launcher, *arguments]
            started.append(subprocess.Popen(command, env=os.environ | environment, **how))
        else:
            started.append(forked.Flowbp(arguments, output.parent / "said", **environment))
        return started[-1]

    yield process
    for one in started:
        one.kill()  # where a test failed


def logged(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def wait_for_steps(output, count, *processes):
    """Until the run has logged `count` steps."""
    deadline = time.monotonic() + 300
    while not (output / "metrics.jsonl").is_file() or len(logged(output)) < count:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.1)


def take_steps(start, output, batch_size, launcher=(), options=()):
    options = ["steps=2", f"data.batch_size={batch_size}", *options]
    run = by_launcher if launcher else by_itself
    said, errors = run(start, output, launcher, options)
    assert said.count("report:") == errors.count("embed: 0/") == errors.count("train: 0/2") == 1
    assert "Warning" not in errors
    assert errors.count("; each block is gathered") == ("memory.shard=node" in options)
    return logged(output)


def ended(process):
    """What a process said, which must have ended well."""
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return said, errors


def by_itself(start, output, launcher, options):
    return ended(start(output, launcher, options, OMP_NUM_THREADS="1"))


def by_launcher(start, output, launcher, options):
    """What both processes said. With the arguments and the environment that a launcher gave to each they are forked:
    new interpreters would import for seven seconds each.
    """
    handed = output.parent / "handed"
    (handed / "flowbp").mkdir(parents=True)
    (handed / "flowbp" / "__init__.py").touch()  # or the installed package would come first
    (handed / "flowbp" / "__main__.py").write_text(STAND_IN)
    launched = start(output, launcher, options, OMP_NUM_THREADS="1", HANDED=str(handed), PYTHONPATH=str(handed))
    deadline, given = time.monotonic() + 120, [handed / "0.json", handed / "1.json"]
    while not all(path.exists() for path in given):
        assert time.monotonic() < deadline and launched.poll() is None
        time.sleep(0.05)
    ranks = []
    for path in given:
        arguments, environment = json.loads(path.read_text())
        ranks.append(forked.Flowbp(arguments, handed / path.stem, **environment))
    said = [ended(rank) for rank in ranks]
    for path in given:
        path.with_suffix(".ended").touch()
    ended(launched)
    return ["".join(parts) for parts in zip(*said, strict=True)]


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    return take_steps(start, tmp_path_factory.mktemp("alone") / "run", 8)


@pytest.mark.parametrize(("launcher", "options"), LAUNCHERS.values(), ids=LAUNCHERS)
def test_two_launched_processes_train_as_one_with_twice_the_batch(launcher, options, alone, start, tmp_path):
    for row, expected in zip(take_steps(start, tmp_path / "run", 4, launcher, options), alone, strict=True):
        assert row["nodes"] == expected["nodes"] and row["images"] == expected["images"]
        for key in ("reward", "loss", "grad_norm"):
            assert row[key] == pytest.approx(expected[key], rel=1e-3), key  # float32 sums in another order


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_whose_peer_is_killed_ends_within_a_minute_and_names_it(killed, tmp_path):
    arguments = ["train", "demo", f"output={tmp_path / 'run'}", "evaluation=null", *LONG]
    ranks = forked.ranks(2, arguments, tmp_path)
    wait_for_steps(tmp_path / "run", 2, *ranks)
    ranks[killed].kill()
    _, errors = ranks[1 - killed].communicate(timeout=60)
    assert ranks[1 - killed].returncode == 2
    assert f"error: process {killed} of 0 to 1 ended, and process {1 - killed} cannot go on alone" in errors
    assert f"steps are saved; to go on: flowbp train {tmp_path / 'run'} --resume --processes 2" in errors


def test_a_process_that_never_meets_the_others_ends_them(start, tmp_path):
    """Before they have met they share no connection that could break."""
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('RANK') == '1': os._exit(3)\n")
    process = start(tmp_path / "run", [], [*LONG, "--processes", "2"], PYTHONPATH=f"{tmp_path}:{ROOT}")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "error: process 1 of 0 to 1 ended with code 3" in errors


def test_processes_that_flowbp_starts_take_one_thread_each_and_say_once_how_to_go_on(start, tmp_path, monkeypatch):
    """Of one run, which is interrupted: a start takes longer than its steps."""
    (tmp_path / "counting.py").write_text(COUNTING)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    options = [*LONG, "reward={name: 'counting:reward'}", "--processes", "2"]
    process = start(tmp_path / "run", [], options, PYTHONPATH=f"{tmp_path}:{ROOT}", COUNTED=str(tmp_path))
    wait_for_steps(tmp_path / "run", 2, process)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["1", "1"]
    others = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (*map(int, others), process.pid):  # a terminal interrupts all of them
        os.kill(pid, signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and said.count("stopped. ") == 1 and "Traceback" not in errors
    assert "--resume --processes 2" in said


def test_a_launcher_starts_as_many_processes_as_the_command_says(start, tmp_path):
    process = start(tmp_path / "run", [], [*LONG, "--processes", "3"], WORLD_SIZE="2", RANK="0")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "--processes 3 is in a command that a launcher starts 2 times" in errors
