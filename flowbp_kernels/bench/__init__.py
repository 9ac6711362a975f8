"""Times every op beside eager PyTorch and torch.compile:  flowbp bench [options], or python benchmarks/run.py [options]

provider           what runs
cuda, triton, cpu, reference
                   this package, with FLOWBP_KERNELS set to it; forward writes into tensors made before, as a trainer
                   does
eager              the chain of PyTorch calls in the tensors' dtype
einsum, baddbmm    one such call, where one does it
compile            torch.compile, default mode, of the formula with float32 sums, shape and numbers baked in;
                   compile_seconds is the time of its first call
copy               dst.copy_(src) of the same number of bytes, in the same rounds: `percent_of_copy` compares with it
launch             an in-place op on one element (GPU): what it takes to launch anything

GB/s are of the minimum traffic: each input read once, each output written once. A copy on a CPU also fetches the lines
that it overwrites, so an op that mostly reads can pass 100 %. Nothing is left out silently: what cannot run is listed
with its reason.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flowbp_kernels import backend
from flowbp_kernels.bench import measure
from flowbp_kernels.bench.case import DTYPES, LATENTS, Case, Problem
from flowbp_kernels.bench.registry import OPS, cases, footprint, problem

MODES = ("forward", "backward", "full")
PROVIDERS = (*backend.BACKENDS, "eager", "einsum", "baddbmm", "compile", "copy", "launch")


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device; leave --device out to measure on the CPU")
    if options.json and not Path(options.json).parent.is_dir():
        raise ValueError(f"--json {options.json}: there is no folder {Path(options.json).parent}: make it first")
    if options.threads:
        torch.set_num_threads(options.threads)
    room = options.memory_gb * 1e9 if options.memory_gb else _free_memory(options.device) / 2
    report = {"machine": machine(options.device), "rows": [], "left_out": []}
    for case in cases(options.op, options.latent, options.batch, options.steps, options.dtype):
        takes = footprint(case, options.mode)
        if takes > room:
            why = f"takes about {takes / 1e9:.2g} GB of the {room / 1e9:.2g} GB allowed (--memory-gb)"
            rows, left_out = [], [asdict(case) | {"mode": "all", "provider": "all", "why": why}]
        else:
            rows, left_out = run(case, options.device, options.mode, options.provider, options.seconds)
        for row in rows:
            print(_line(row), flush=True)
        for missing in left_out:
            print(
                f"{_name(missing)}{missing['mode']:<9}{missing['provider']:<10}left out: {missing['why']}",
                file=sys.stderr,
            )
        report["rows"] += rows
        report["left_out"] += left_out
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def run(case: Case, device: str, modes=MODES, providers=None, seconds: float = 0.2) -> tuple[list[dict], list[dict]]:
    """(rows, what was left out and why) of one case, with a row for each mode and provider. providers: the names to
    measure, which must run; None for all that run.
    """
    torch.manual_seed(0)
    task = problem(case, device)
    rows, left_out = [], []
    for mode in modes:
        if mode not in task.traffic:
            left_out.append(asdict(case) | {"mode": mode, "provider": "all", "why": "this op has no gradient"})
            continue
        calls, compile_seconds = {}, {}
        for name, (function, choice) in _providers(task, mode, device, providers).items():
            start = time.perf_counter()
            try:
                with measure.kernels(choice):
                    call = _call(function, task, mode)
                    call()
            except Exception as error:  # what cannot run must not end the run of the others, unless it was asked for
                if providers:
                    raise
                why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                left_out.append(asdict(case) | {"mode": mode, "provider": name, "why": why})
                continue
            if name == "compile":
                compile_seconds[name] = time.perf_counter() - start
            calls[name] = call, choice
        timings = measure.interleave(calls, device, seconds)
        for name, (call, choice) in calls.items():
            with measure.kernels(choice):
                row = _row(case, mode, name, timings, task.traffic[mode], device)
                row |= {
                    "peak_bytes": measure.peak_memory(call, device),
                    "launches": measure.launches(call) if device == "cuda" else None,
                }
            rows.append(row | {"compile_seconds": compile_seconds.get(name)})
    return rows, left_out


def machine(device: str) -> dict:
    """What the numbers depend on, without naming the machine."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "versions": versions | {"cuda": torch.version.cuda},
        "backends": {name: why for name, runs, why in backend.report() if runs and name != "cpu"}
        | {"cpu": _compiled_for()},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _providers(task: Problem, mode: str, device: str, wanted=None) -> dict[str, tuple]:
    """By name: the function of the task's inputs, and the FLOWBP_KERNELS that it runs under (None: as it is)."""
    ours = task.ours_into if mode == "forward" else task.ours
    found = {
        name: (ours, name)
        for name, runs, _ in backend.report()
        if name in (wanted or ()) or (runs and not (name, device) == ("cpu", "cuda"))
    }
    found |= {name: (function, None) for name, function in task.baselines.items()}
    torch._dynamo.reset()
    found["compile"] = torch.compile(task.to_compile, dynamic=False, fullgraph=True), None
    source, target = (torch.rand(max(1, task.traffic[mode] // 8), device=device) for _ in range(2))
    found["copy"] = lambda *_: target.copy_(source), None
    if device == "cuda":
        found["launch"] = lambda *_: target[:1].neg_(), None
    return {name: provider for name, provider in found.items() if not wanted or name in (*wanted, "copy")}


def _call(function, task: Problem, mode: str) -> measure.Call:
    """The function without arguments: the forward pass, the backward pass of a graph made once, or both."""
    if mode == "forward":

        def forward():
            with torch.no_grad():
                return function(*task.inputs)

        return forward
    inputs = [tensor.detach().requires_grad_(n in task.leaves) for n, tensor in enumerate(task.inputs)]
    leaves = [inputs[n] for n in task.leaves]

    def outputs():
        result = function(*inputs)
        return [tensor for tensor in (result if isinstance(result, tuple) else (result,)) if tensor.requires_grad]

    made = outputs()
    if not made:  # a copy or an empty launch: the yardstick is the same in every mode
        return outputs
    seeds = [torch.ones_like(tensor) for tensor in made]
    if mode == "backward":
        return lambda: torch.autograd.grad(made, leaves, seeds, retain_graph=True, allow_unused=True)
    return lambda: torch.autograd.grad(outputs(), leaves, seeds, allow_unused=True)


def _row(case: Case, mode: str, provider: str, timings: dict, traffic: int, device: str) -> dict:
    timing, copy = timings[provider], timings["copy"]
    return asdict(case) | {
        "shape": list(case.shape),
        "mode": mode,
        "provider": provider,
        "device": device,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "milliseconds": asdict(timing),
        "traffic_bytes": traffic,
        "gb_per_second": traffic / timing.median / 1e6,
        "percent_of_copy": 100 * (copy.median / timing.median),
        "percent_of_copy_best": 100 * (copy.best / timing.best),
    }


def _line(row: dict) -> str:
    ms = row["milliseconds"]
    times = f"{row['mode']:<9}{row['provider']:<10}{ms['median']:10.4f} ms [{ms['p20']:.4f}, {ms['p80']:.4f}]"
    return f"{_name(row)}{times:<56}{row['gb_per_second']:9.2f} GB/s {row['percent_of_copy']:5.0f} % of copy"


def _name(row: dict) -> str:
    return f"{row['op']} {row['latent']} B={row['batch']} N={row['steps']} {row['dtype']}".ljust(58)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        "flowbp bench",
        description=about[0],
        epilog="\n\n".join(about[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    several: dict[str, Any] = {"nargs": "+", "metavar": ""}
    parser.add_argument("--op", **several, choices=OPS, default=list(OPS), help=f"ops (all): {', '.join(OPS)}")
    parser.add_argument(
        "--latent",
        **several,
        choices=LATENTS,
        default=[n for n in LATENTS if n != "tiny"],
        help=f"latents: {', '.join(LATENTS)}",
    )
    parser.add_argument("--batch", **several, type=int, default=[1, 8], help="samples (1 8)")
    parser.add_argument("--steps", **several, type=int, default=[25, 50], help="rows of the cache (25 50)")
    parser.add_argument(
        "--dtype", **several, choices=DTYPES, default=["bfloat16", "float32"], help=f"dtypes: {', '.join(DTYPES)}"
    )
    parser.add_argument("--mode", **several, choices=MODES, default=list(MODES), help="forward backward full (all)")
    parser.add_argument(
        "--provider", **several, choices=PROVIDERS, help="what to measure beside the copy (all that runs)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of the CPU (torch's own choice)")
    parser.add_argument("--seconds", type=float, default=0.2, help="how long each provider is timed, about (0.2)")
    parser.add_argument("--memory-gb", type=float, help="leave out cases that take more (half of what is free)")
    parser.add_argument("--json", help="file for the rows, written after every case")
    return parser.parse_args(arguments)


def _free_memory(device: str) -> int:
    return (
        torch.cuda.mem_get_info()[0] if device == "cuda" else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )


def _processor() -> str:
    """The processor's name, family and model. The name alone is often no more than a brand on a virtual machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    if "model name" not in fields:
        return platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def _compiled_for() -> str | None:
    """The instruction set of the compiled CPU ops and how they read a cache; None where they are not built."""
    return None if backend.unavailable("cpu") else f"{backend.isa()}, {backend.rows()} rows side by side"


def _commit() -> str | None:
    """The commit of the checkout that this runs from, with a + for changes on top; elsewhere FLOWBP_COMMIT, or None."""
    git = ["git", "-C", str(Path(__file__).parent)]
    # An installed package may lie inside another project's checkout: git must track this very folder.
    tracked = [*git, "ls-files", "--error-unmatch", "."]
    if shutil.which("git") is None or subprocess.run(tracked, capture_output=True).returncode:
        return os.environ.get("FLOWBP_COMMIT")
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    ).stdout
    return head.stdout.strip() + ("+" if changed else "")
