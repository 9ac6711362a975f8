"""How times and memory are measured. Every provider of a case takes its turn, round after round, so that a noisy
machine disturbs all of them alike.
"""

import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The profiler, which measures peak memory, would otherwise write to stderr at every call.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

Call = Callable[[], object]
SAMPLE_SECONDS = 2e-3  # a CPU sample repeats the call for at least this long, against the error of the clock
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call over the rounds of one provider."""

    best: float
    p20: float
    median: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        ordered = sorted(seconds)
        p20, median, p80 = (1e3 * ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8))
        return cls(1e3 * ordered[0], p20, median, p80, len(ordered))


@contextmanager
def kernels(backend: str | None):
    """FLOWBP_KERNELS set to a backend, and put back; None leaves it as it is."""
    before = os.environ.get("FLOWBP_KERNELS")
    if backend is not None:
        os.environ["FLOWBP_KERNELS"] = backend
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("FLOWBP_KERNELS", None)
        else:
            os.environ["FLOWBP_KERNELS"] = before


def interleave(calls: dict[str, tuple[Call, str | None]], device: str, seconds: float) -> dict[str, Timing]:
    """Time each call, under its FLOWBP_KERNELS, for about `seconds` a provider. A round takes one sample of each; the
    order is rotated every round.
    """
    sample, names = (_cuda_sampler(), list(calls)) if device == "cuda" else (_cpu_sample, list(calls))
    repeats = {}
    for name, (call, backend) in calls.items():
        with kernels(backend):
            call()
            once = min(sample(call, 1) for _ in range(2))
        repeats[name] = 1 if device == "cuda" else max(1, round(SAMPLE_SECONDS / max(once, 1e-7)))
    samples = {name: [] for name in names}
    deadline = time.perf_counter() + seconds * len(names)
    while len(samples[names[0]]) < MIN_ROUNDS or time.perf_counter() < deadline:
        first = len(samples[names[0]]) % len(names)
        for name in names[first:] + names[:first]:
            call, backend = calls[name]
            with kernels(backend):
                samples[name].append(sample(call, repeats[name]))
    return {name: Timing.of(taken) for name, taken in samples.items()}


def _cpu_sample(call: Call, repeats: int) -> float:
    # The time of one thread leaves out what other programs had of the core.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def _cuda_sampler() -> Callable[[Call, int], float]:
    """Seconds of one call between two events. Before it, 8 times the size of the L2 cache is overwritten, so that no
    input is in the cache and the launch is hidden.
    """
    size = 8 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(size, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(call: Call, repeats: int) -> float:
        flush.zero_()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / repeats

    return sample


def peak_memory(call: Call, device: str) -> int:
    """Bytes that one call holds at most beyond what lay there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    trace: Any = profiler.profiler
    events = [event for event in trace.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def launches(call: Call) -> int:
    """What one call puts on the GPU: kernels, copies and fills."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA  # pyright: ignore[reportPrivateImportUsage]
    return sum(event.device_type == on_gpu for event in profiler.events() or ())
