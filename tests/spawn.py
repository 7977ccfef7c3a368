"""Real gloo ranks for the tests: a pool of processes a world size, started once and used by every case.

`run_ranks(fn, ranks, *args)` calls the module-level function ``fn(*args)`` on each rank, in an initialised process group, and
returns each rank's result. A rank that raises, dies or hangs fails the call with that rank's traceback and ends the pool; the
next call starts a new one.

A pool is stopped (SIGSTOP) between its calls. gloo's threads wake up 100 times a second for each process group: pools that only
waited took 0.9 of 2 cores.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing as mp
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest

FOUR = pytest.param(4, marks=pytest.mark.slow)  # ranks: the inner loop has fewer
GRACE = 3.0  # seconds that the other ranks get to report, once one has failed
GROUPS = 12  # process groups that a pool may have made: each has three threads of gloo on each rank, which are never quite idle


class RankFailed(AssertionError):
    """One or more ranks raised, died or hung."""


def run_ranks(fn: Callable[..., Any], ranks: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """What ``fn(*args)`` gave on each of ``ranks`` ranks; RankFailed, with the tracebacks, where it gave none."""
    if ranks in _pools and _pools[ranks].groups > GROUPS:
        _pools.pop(ranks).end(GRACE)
    pool = _pools.get(ranks) or _pools.setdefault(ranks, Pool(ranks))
    try:
        return pool.run(fn, args, timeout)
    except BaseException:  # an answer that cannot be read, or Ctrl-C, leaves answers behind that a next call would take for its own
        _pools.pop(ranks).end()
        raise


class Pool:
    """``ranks`` processes in one gloo group, each serving calls from its pipe."""

    def __init__(self, ranks: int) -> None:
        context = fork_server()
        listening = socket.create_server(("127.0.0.1", 0))  # rank 0 goes on listening: nobody else can take the port
        port = listening.getsockname()[1]
        self.groups = 1
        self.pipes: list[Connection] = []
        self.processes = []
        self.stacks = [tempfile.NamedTemporaryFile(suffix=f".rank{rank}") for rank in range(ranks)]  # noqa: SIM115 - as long-lived as the pool
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            args = (rank, ranks, port, listening if rank == 0 else None, theirs, self.stacks[rank].name)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        listening.close()

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        call = pickle.dumps((fn, args))
        self._signal(signal.SIGCONT)
        for pipe in self.pipes:
            with suppress(OSError):  # a rank that has died since the last call: reading from its pipe says so
                pipe.send_bytes(call)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < len(self.pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in results and rank not in failures}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                for rank in waiting.values():
                    failures[rank] = f"no answer\n{self._stack(rank)}"
                break
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    ok, value, self.groups = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    self.processes[rank].join(1)
                    ok, value = False, f"died with exit code {self.processes[rank].exitcode}"
                (results if ok else failures)[rank] = value
                if not ok:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            first = sorted(failures.items(), key=lambda item: item[1].startswith("no answer"))
            raise RankFailed("\n".join(f"rank {rank}: {text}" for rank, text in first))
        self._signal(signal.SIGSTOP)
        return [results[rank] for rank in range(len(self.pipes))]

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):  # a rank that has died: reading from its pipe says so
                os.kill(process.pid, number)

    def _stack(self, rank: int) -> str:
        """Where a hung rank stands now."""
        os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.2)
        with open(self.stacks[rank].name) as stack:
            return stack.read()

    def end(self, grace: float = 0.0) -> None:
        """End the ranks: those that are idle by themselves within ``grace`` seconds, the others, which may hang, by force."""
        for pipe in self.pipes:
            pipe.close()
        self._signal(signal.SIGCONT)
        for process in self.processes:
            process.join(grace)
            process.kill()
            process.join(5)
        for stack in self.stacks:
            stack.close()


def fork_server() -> ForkServerContext:
    """Where all ranks are started, of whatever test: the first that starts one says for all of them what the server has imported.

    So no rank imports torch again, 3 s of CPU time; `tests/warm.py` has what else.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.end_with_parent", "tests.warm"])
    return context


def _serve(rank: int, ranks: int, port: int, listening: socket.socket | None, pipe: Connection, stack: str) -> None:
    import torch
    import torch._functorch.config
    import torch._inductor.config
    import torch.distributed as dist

    from tests.end_with_parent import end_with_parent

    torch._inductor.config.compile_threads = 1  # no pool of compile workers for each rank: there are more ranks than cores
    torch._functorch.config.enable_autograd_cache = False  # it knows an op by its name, and would give what the op was before an edit
    stack_file = open(stack, "w")  # noqa: SIM115 - faulthandler needs it for the life of the process
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=False)
    end_with_parent()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    file, patience = listening.detach() if listening else None, timedelta(seconds=50)
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0, timeout=patience, master_listen_fd=file)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=patience)
    while True:
        try:
            fn, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return  # the parent needs no more, or is gone
        try:
            value = fn(*args)
            answer = pickle.dumps((True, value, len(dist.distributed_c10d._world.pg_map)))
        except Exception:
            answer = pickle.dumps((False, traceback.format_exc(), 0))
        with suppress(OSError):  # the parent waits no more
            pipe.send_bytes(answer)


_pools: dict[int, Pool] = {}


@atexit.register
def _end_pools() -> None:
    for pool in _pools.values():
        pool.end(GRACE)
