"""Seconds of the demo's training step by threads and by processes, on idle cores and beside busy programs.

    python benchmarks/busy_cores.py [--rounds 12] [--busy 1] [--priority -20] [--json FILE]

The variants take steps in turn, so that all meet the machine in the same state. A busy program is an endless loop on
one thread, in a session of its own, as a browser is. --priority (root, Linux) sets the priority of variants and busy
programs against everything else that runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
BATCH = 32  # of the demo
CORES = len(os.sched_getaffinity(0))
VARIANTS = {  # name: (processes, threads of each, MKL_CBWR)
    f"1 process, {CORES} threads, MKL's own mode": (1, CORES, ""),
    f"1 process, {CORES} threads": (1, CORES, "AUTO"),
    "1 process, 1 thread, MKL's own mode": (1, 1, ""),
    "1 process, 1 thread": (1, 1, "AUTO"),
    "2 processes, 1 thread": (2, 1, "AUTO"),
}


def main() -> None:
    options = parse()
    set_priority(os.getpid(), options.priority)
    workers, programs = {}, []
    try:
        for name, variant in VARIANTS.items():
            workers[name] = start(*variant)
        rows = measure(workers, options.rounds, 0)
        for _ in range(options.busy):
            programs.append(subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True))
            set_priority(programs[-1].pid, options.priority)
        rows += measure(workers, options.rounds, options.busy)
    finally:
        for process in (*programs, *(process for ranks in workers.values() for process in ranks)):
            process.kill()
    if options.json:
        from flowbp_kernels.bench import machine

        report = {"machine": machine("cpu"), "cores": CORES, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def set_priority(pid: int, priority: int) -> None:
    """Set the priority of a process's session against the other sessions."""
    if priority:
        Path(f"/proc/{pid}/autogroup").write_text(str(priority))


def start(count: int, threads: int, mode: str) -> list[subprocess.Popen]:
    """The processes of a variant, once all of them have warmed up."""
    from flowbp.runtime.processes import free_port

    common = {"OMP_NUM_THREADS": str(threads), "MKL_CBWR": mode, "HF_HUB_OFFLINE": "1"}
    if count > 1:
        common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    command = [sys.executable, __file__, "--worker", str(BATCH // count)]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {} for rank in range(count)]
    processes = [subprocess.Popen(command, env=os.environ | common | rank, **pipes) for rank in ranks]
    for process in processes:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"a process of {count} with {threads} threads did not start: run {' '.join(command)}")
    return processes


def measure(workers: dict[str, list[subprocess.Popen]], rounds: int, busy: int) -> list[dict]:
    """One row a variant. A variant whose steps take more than 10 s takes two of them."""
    seconds = {name: [] for name in workers}
    for _ in range(rounds):
        for name, ranks in workers.items():
            if len(seconds[name]) < 2 or seconds[name][-1] < 10:
                for process in ranks:
                    process.stdin.write("step\n")
                    process.stdin.flush()
                seconds[name].append(max(float(process.stdout.readline()) for process in ranks))
    rows = []
    for name, taken in seconds.items():
        rows.append({"variant": name, "busy": busy, "steps": len(taken), "median": round(statistics.median(taken), 3)})
        rows[-1] |= {"least": round(min(taken), 3), "most": round(max(taken), 3)}
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def work(batch_size: int) -> None:
    """Take a step of the demo for every line of stdin, and print its seconds."""
    import torch

    from flowbp.config import load
    from flowbp.training.trainer import Trainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(load("demo", [f"output={folder}", f"data.batch_size={batch_size}", "evaluation=null"]))
        steps = iter(range(10**9))
        trainer.step(next(steps))
        trainer.step(next(steps))
        print("ready", flush=True)
        for _ in sys.stdin:
            began = time.perf_counter()
            trainer.step(next(steps))
            print(time.perf_counter() - began, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="steps of each variant")
    parser.add_argument("--busy", type=int, default=1, help="busy programs beside it in the second part")
    parser.add_argument(
        "--priority", type=int, default=0, help="of the sessions, -20 to 19, where the scheduler groups them"
    )
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    given = parse().worker
    main() if given is None else work(given)
