"""Processes that are forked from one with all of flowbp in memory: a start costs tenths of a second, and a new
interpreter six seconds of imports.
"""

import multiprocessing
import os
import signal
import sys
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import pytest
import torch

from flowbp.__main__ import main
from flowbp.cli import commands
from flowbp.runtime.console import is_main
from flowbp.runtime.processes import free_port

TESTS = Path(__file__).parent
PRELOADED = ["preloaded"]


def context():
    """The start method of such processes, as the multiprocessing module has it."""
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:  # what the server cannot import it leaves to every process, unsaid
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS / "distributed", TESTS, TESTS.parent))))
        ensure_running()
    return forking


class Flowbp:
    """`flowbp` with some arguments and an environment, to be treated as a subprocess.Popen. It says into files of
    `folder`.
    """

    def __init__(self, arguments, folder, **environment):
        folder.mkdir(parents=True, exist_ok=True)
        self.said, self.errors = folder / "stdout", folder / "stderr"
        options = [str(argument) for argument in arguments], self.said, self.errors, os.environ | environment
        self.process = context().Process(target=run, args=options, daemon=True)  # ends with the tests
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def communicate(self, timeout):
        self.process.join(timeout)
        assert self.returncode is not None, f"not ended after {timeout} seconds: {self.errors.read_text()}"
        return self.said.read_text(), self.errors.read_text()


def ranks(count, arguments, folder, **environment):
    """`flowbp` as `count` processes that a launcher has started."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)} | environment
    group["OMP_NUM_THREADS"] = "1"
    numbers = [str(rank) for rank in range(count)]
    return [Flowbp(arguments, folder / rank, RANK=rank, LOCAL_RANK=rank, **group) for rank in numbers]


def run(arguments, said, errors, environment):
    """What a new interpreter would do with `-m flowbp` and these arguments."""
    for stream, path in ((1, said), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = ["flowbp", *arguments]
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    hear_interrupts()
    commands.console.quiet = not is_main()  # it was made before the process had a rank
    main()


def hear_interrupts():
    """A shell lets what it starts in the background ignore them, and so all that is started from there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
