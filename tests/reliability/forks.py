"""The command line in forks of this process, which has imported everything: a start costs milliseconds, not seconds.

What a command meets there is set up in the fork before it runs: a kill at the k-th file operation, a disk that is full
from the k-th write on, a limit to the size of files.
"""

import errno
import gc
import os
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flowbp.runtime.reproducible import request_equal_bytes

request_equal_bytes()
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import accelerate.tracking  # noqa: E402, F401
import diffusers.training_utils  # noqa: E402, F401
import matplotlib.figure  # noqa: E402
import peft  # noqa: E402, F401
import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401

import flowbp.__main__  # noqa: E402
import flowbp.evaluation.figures  # noqa: E402
import flowbp.evaluation.models  # noqa: E402
import flowbp.evaluation.runs  # noqa: E402, F401
import flowbp.training.run  # noqa: E402
from flowbp.backbones import load_backbone  # noqa: E402
from flowbp.training.trainer import Trainer  # noqa: E402

torch.set_num_threads(1)
WRITES = ("open", "os.rename", "os.mkdir")
OPERATIONS = (*WRITES, "os.remove", "os.rmdir")


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: as a shell has it, negative for a signal; None where it ran past its time."""

    code: int | None
    said: str

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.said

    @property
    def error(self) -> str:
        """What it says of its error, on one line."""
        return " ".join(re.split(r"(?:^|[\r\n])error:", self.said)[-1].split())  # not after "I/O error:"


def flowbp_command(*arguments: object, before: Callable[[], None] = lambda: None, limit: float = 120) -> Ended:
    """Run `flowbp ARGUMENTS` in a fork. before: runs there first. limit: seconds after which it is killed."""

    def command() -> None:
        sys.argv = ["flowbp", *map(str, arguments)]
        for name in ("curves", "draw_plan", "sample_grid"):  # pictures would take most of the time
            setattr(flowbp.evaluation.figures, name, lambda *_, **__: matplotlib.figure.Figure())
        before()
        flowbp.__main__.main()

    return fork(command, limit)


def fork(function: Callable[[], None], limit: float = 120) -> Ended:
    """Run `function` in a fork, whose output is read through a pipe, because its disk may be full."""
    gc.freeze()
    sys.stdout.flush(), sys.stderr.flush()
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reads)
        os.dup2(writes, 1), os.dup2(writes, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        torch.set_num_threads(1)  # builds torch's pool of threads anew, before several threads would
        os._exit(code_of(function))
    os.close(writes)
    said, deadline = b"", time.monotonic() + limit
    while select.select([reads], [], [], max(0.0, deadline - time.monotonic()))[0]:
        block = os.read(reads, 1 << 16)
        if not block:
            break
        said += block
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(reads)
    late = time.monotonic() >= deadline
    status = os.waitpid(pid, 0)[1]
    return Ended(None if late else os.waitstatus_to_exitcode(status), said.decode(errors="replace"))


def code_of(function: Callable[[], None]) -> int:
    """The exit code of a program that runs `function`; its traceback goes to stderr, where there is one."""
    try:
        function()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: B036
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
    return 0


# -- faults, which are set up in a fork --------------------------------------------------------------------------------


def at_operation(number: int, folder: Path, do: Callable[[], None], kinds: tuple[str, ...] = OPERATIONS) -> None:
    """Do something before the `number`-th operation from now on that changes files of `folder`, counted from 0."""
    seen, prefix = 0, str(folder)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event not in kinds or not changes(event, arguments, prefix):
            return
        seen += 1
        if seen > number:
            do()

    sys.addaudithook(hook)


def changes(event: str, arguments: tuple, prefix: str) -> bool:
    """Whether an audited operation changes what lies under `prefix`. A name beside an open folder counts."""
    path = arguments[0]
    if not isinstance(path, (str, bytes, os.PathLike)):
        return False
    path = os.fsdecode(path)
    inside = path.startswith(prefix) or (event != "open" and not os.path.isabs(path))
    return inside and (event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))


def killed_at(number: int, folder: Path) -> Callable[[], None]:
    return lambda: at_operation(number, folder, lambda: os.kill(os.getpid(), signal.SIGKILL))


def killed_after(seconds: float) -> Callable[[], None]:
    """By the kernel, at any instruction: an alarm that nobody handles ends a process as kill -9 does."""

    def arm() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))

    return arm


def killed_in_step(step: int) -> Callable[[], None]:
    """While the step after `step` others is computed."""

    def arm() -> None:
        take = Trainer.step
        Trainer.step = lambda self, index: os.kill(os.getpid(), signal.SIGKILL) if index == step else take(self, index)

    return arm


def full_at(number: int, folder: Path) -> Callable[[], None]:
    """No file can be made from the `number`-th write on."""

    def no_space() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: at_operation(number, folder, no_space, WRITES)


def files_of_at_most(size: int) -> Callable[[], None]:
    """A write beyond `size` bytes fails, as on a full disk, in whatever library it happens."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def count_operations(run: Callable[[Callable[[], None]], Ended], folder: Path) -> int:
    """How many operations `run` makes on files of `folder`, where it is not disturbed."""
    reads, writes = os.pipe()
    ended = run(lambda: at_operation(0, folder, lambda: os.write(writes, b".")))
    os.close(writes)
    count = len(os.read(reads, 1 << 16))
    os.close(reads)
    assert ended.code == 0, ended.said
    return count


def preload() -> None:
    """Load the embedded model once: what it caches in memory is shared by all forks."""
    load_backbone("shapes", max_sequence_length=1)
