"""Ranks that can be lost: a layer on processes of which one is killed, stopped or raises at a chosen place, and what the others then see.

The processes outlive a case as far as they can: those that only saw another one's fault make a new group for the next case, and one that
was lost is replaced. `lost_ranks` asserts that nothing is left of them in the end.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import moecomm.functional as mf
from tests.spawn import fork_server

RANKS, FAULTY, TIMEOUT = 3, 1, 5.0  # TIMEOUT: of the group, in seconds
TOKENS = 1500  # of each rank: too many for their slots to travel with the counts
START, LATE = 150.0, 20.0  # seconds that ranks get to start, and more than TIMEOUT to fail, on a loaded machine

# Where a rank is lost, in the order in which a layer comes there, and what the others then wait for.
FORWARD, BACKWARD = "(forward)", "(backward)"
PLACES = {
    "counts": f"the counts of plan {FORWARD}",
    "slots": f"the experts and weights of plan {FORWARD}",
    "dispatch": f"the tokens of dispatch {FORWARD}",
    "experts": f"the experts' rows of combine {FORWARD}",
    "combine": f"the experts' rows of combine {FORWARD}",
    "combine's backward": f"the gradients of combine, or the tokens of a dispatch that is repeated {BACKWARD}",
    "experts' backward": f"the gradients of dispatch {BACKWARD}",
    "dispatch's backward": f"the gradients of dispatch {BACKWARD}",
    "weights' backward": f"the gradients of plan's weights {BACKWARD}",
}
SENT = ("counts", "slots", "dispatch", "combine", "combine's backward", "dispatch's backward", "weights' backward")

At = Callable[[str], bool]  # called in each place; whether this rank is to go astray there by itself


class Fault(NamedTuple):
    """What happens to the faulty rank, and where."""

    how: str  # "killed", "stopped", "raises" or "astray": in a way that the step knows
    place: str

    def at(self, place: str) -> bool:
        if place != self.place or self.how == "astray":
            return place == self.place
        if self.how == "raises":
            raise ArithmeticError("in an expert")
        os.kill(os.getpid(), signal.SIGKILL if self.how == "killed" else signal.SIGSTOP)
        return False


class Ended(NamedTuple):
    """How a layer ended on a rank."""

    error: str | None  # what it raised, with its notes; None where it raised nothing or its process was killed
    seconds: float  # after it began
    exit_code: int | None = None  # of its process; None where it was left alive


Step = Callable[[dist.ProcessGroup, At], None]  # a layer's forward and backward over a group


def step(group: dist.ProcessGroup, at: At) -> None:
    """A layer that calls ``at`` in each place, forward and backward."""
    x, weights = torch.ones(TOKENS, 6, requires_grad=True), torch.ones(TOKENS, 2, requires_grad=True)

    def experts(rows: Tensor) -> Tensor:
        at("experts")
        rows.register_hook(lambda grad: grad if at("experts' backward") else None)
        return rows * 2

    with told_of_exchanges(at):
        plan = mf.plan(torch.arange(2 * TOKENS).view(TOKENS, 2) % 3, weights, 3, group, like=x)
        mf.combine(experts(mf.dispatch(x, plan)), plan).sum().backward()


@contextmanager
def told_of_exchanges(at: At) -> Iterator[None]:
    """Call ``at`` before each exchange."""
    send, places = dist.all_to_all_single, iter(SENT)

    def told(*args: object, **keywords: object) -> object:
        at(next(places))
        return send(*args, **keywords)  # type: ignore[arg-type]

    with patch.object(dist, "all_to_all_single", told):
        yield


def nowhere(place: str) -> bool:
    """No fault."""
    return False


class Ranks:
    """``RANKS`` processes that run steps; `case` has one of them fail."""

    def __init__(self) -> None:
        self.context = fork_server()
        self.ever: list[int] = []  # the ids of all processes that were started
        with socket.create_server(("127.0.0.1", 0)) as listening:  # rank 0 goes on listening: nobody else can take the port
            self.port = listening.getsockname()[1]
            self.ranks = [self._start(rank, listening if rank == 0 else None) for rank in range(RANKS)]
        self.shared: set[str] = set()  # the shared memory that they had
        self.cases = 0

    def _start(self, rank: int, listening: socket.socket | None = None) -> tuple[mp.process.BaseProcess, Connection]:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(rank, self.port, listening, theirs))
        process.start()
        theirs.close()
        self.ever.append(process.pid or 0)
        return process, ours

    def case(self, fault: Fault | None, step: Step = step) -> list[Ended]:
        """How the step ended on each rank, the lost one's as far as it can tell."""
        self.cases += 1
        if self.ranks[FAULTY][0].exitcode is not None:
            self.ranks[FAULTY] = self._start(FAULTY)
        for _, pipe in self.ranks:
            pipe.send((self.cases, fault, step))
        ends = [Ended(None, 0.0)] * RANKS
        for rank in sorted(range(RANKS), key=lambda rank: rank == FAULTY):  # the faulty one last: the others do not wait for it
            process, pipe = self.ranks[rank]
            if fault is not None and rank == FAULTY and fault.how == "stopped":
                assert Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
                os.kill(process.pid or 0, signal.SIGCONT)
            assert pipe.poll(START + TIMEOUT + LATE), f"rank {rank} hangs"
            try:
                ends[rank] = Ended(*pipe.recv())
            except EOFError:
                assert fault, f"rank {rank} died"
                assert rank == FAULTY, f"rank {rank} died"
            self.shared |= _shared_memory(process.pid or 0)
        if fault is not None and fault.how != "stopped":
            process, pipe = self.ranks[FAULTY]
            process.join(LATE)
            assert process.exitcode is not None
            ends[FAULTY] = ends[FAULTY]._replace(exit_code=process.exitcode)
            pipe.close()
        return ends

    def end(self) -> None:
        for _, pipe in self.ranks:
            pipe.close()
        for process, _ in self.ranks:
            process.join(LATE)
        left = [process.pid for process, _ in self.ranks if process.exitcode is None]
        for process, _ in self.ranks:
            process.kill()
            process.join()
        assert left == []


def _serve(rank: int, port: int, listening: socket.socket | None, pipe: Connection) -> None:
    os.setsid()  # what it starts, if anything, is in a session of its number
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    wait = timedelta(seconds=START)
    file = listening.detach() if listening else None
    store = dist.TCPStore("127.0.0.1", port, None, is_master=rank == 0, timeout=wait, master_listen_fd=file)
    while True:
        try:
            number, fault, step = pipe.recv()
        except EOFError:
            return
        dist.init_process_group("gloo", store=dist.PrefixStore(f"case {number}", store), rank=rank, world_size=RANKS, timeout=wait)
        step(dist.group.WORLD, nowhere)  # what is slow the first time
        dist.barrier()
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT), dist.group.WORLD)
        at, error, began = fault.at if fault and rank == FAULTY else nowhere, None, time.monotonic()
        try:
            step(dist.group.WORLD, at)
        except Exception as raised:
            error = "".join(traceback.format_exception_only(raised))
        pipe.send((error, time.monotonic() - began))
        if at is not nowhere and fault.how != "stopped":
            return
        dist.destroy_process_group()


@contextmanager
def lost_ranks() -> Iterator[Ranks]:
    """Ranks for some cases; of which then no process, no open port and no shared memory is left."""
    ranks = Ranks()
    try:
        yield ranks
    finally:
        ranks.end()
    assert [pid for pid, session in _sessions().items() if session in ranks.ever] == []
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", ranks.port)) != 0
    assert [name for name in ranks.shared if os.path.exists(name)] == []


def _sessions() -> dict[int, int]:
    """The session of each process."""
    sessions = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            sessions[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
    return sessions


def _shared_memory(pid: int) -> set[str]:
    """What a process has of /dev/shm, open or mapped."""
    with suppress(OSError):  # it has ended
        folder = Path(f"/proc/{pid}")
        names = [os.readlink(file) for file in (folder / "fd").iterdir()] + (folder / "maps").read_text().split()
        return {name for name in names if name.startswith("/dev/shm/")}
    return set()
