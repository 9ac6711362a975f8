"""The processes of one command: how they are started on a machine, and what the others do when one of them ends.

torchrun and accelerate launch start processes too, also on several machines. `launched` does it without a launcher:

    flowbp train demo --processes 2 data.batch_size=16
"""

import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from accelerate.utils import gather_object

from flowbp.runtime.distributed import process_state

LOCALHOST = "127.0.0.1"
GRACE = 20  # seconds in which the main process may end by itself after another one has failed


@contextmanager
def launched(count: int) -> Iterator[None]:
    """Run the block as the first of `count` processes on this machine.

    The others run the same command line, and end with the block. A process that was itself started by this or another
    launcher starts none. If one of the others fails, the block has GRACE seconds to notice and to end; then this
    process exits. Raises ValueError if another launcher started another number of processes than `count`.
    """
    given = os.environ.get("WORLD_SIZE")
    if given is not None and count not in (1, int(given)):
        raise ValueError(f"--processes {count} is in a command that a launcher starts {given} times: leave it out")
    if given is not None or count == 1:
        yield
        return
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": LOCALHOST, "MASTER_PORT": str(free_port())}
    if "OMP_NUM_THREADS" not in os.environ:  # as torchrun does, but this process has loaded torch already
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    over, others = threading.Event(), []

    def watch(rank: int, process: subprocess.Popen) -> None:
        if process.wait() != 0 and not over.wait(GRACE):
            print(f"error: process {rank} of 0 to {count - 1} ended with code {process.returncode}", file=sys.stderr)
            os._exit(1)

    for rank in range(1, count):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        others.append(subprocess.Popen([sys.executable, "-m", "flowbp", *sys.argv[1:]], env=environment))
        threading.Thread(target=watch, args=(rank, others[-1]), daemon=True).start()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    try:
        yield
        for process in others:
            process.wait()
    finally:
        over.set()
        for process in others:
            process.terminate()


def free_port() -> int:
    """A port on which nobody listens.

    It lies below the ports that Linux gives to outgoing connections, so that none of them takes it meanwhile.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32000)  # no seed of a run is touched
        with suppress(OSError), socket.create_server((LOCALHOST, port)):
            return port


@contextmanager
def naming_the_dead() -> Iterator[None]:
    """Run the block in every process. If this one cannot go on because others have ended, raise ConnectionError.

    A process that ends closes its connections, which breaks the next collective call of the others on gloo. Every
    process listens on a port as long as it lives, so that the others on its machine can find out which one has ended.
    """
    state = process_state()
    if state.num_processes == 1:
        yield
        return
    with socket.create_server((LOCALHOST, 0)) as listening:
        ports = gather_object([(socket.gethostname(), listening.getsockname()[1])])
        try:
            yield
        except RuntimeError as error:
            time.sleep(1)  # a process that ends does not close all that it holds at once
            if not (dead := [str(index) for index, (machine, port) in enumerate(ports) if not lives(machine, port)]):
                raise
            ended = f"process{'es' if len(dead) > 1 else ''} {', '.join(dead)} of 0 to {len(ports) - 1} ended"
            raise ConnectionError(f"{ended}, and process {state.process_index} cannot go on alone") from error


def lives(machine: str, port: int) -> bool:
    """Whether somebody listens on a port of `machine`; True if it is another machine than this one."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return machine != socket.gethostname() or probe.connect_ex((LOCALHOST, port)) == 0
