"""Start the ranks on one machine, and end them together.

The ranks listen only on the loopback interface. torchrun's own store listens on all interfaces.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

LISTEN = "MOECOMM_DEMO_LISTEN"  # an environment variable: rank 0's listening socket, "" on the other ranks
STOP_FILE = "MOECOMM_DEMO_STOP"  # an environment variable that names a file: once the file exists, the ranks save and leave
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
INTERRUPTED = 128 + signal.SIGINT
GRACE = 5.0  # after one rank failed, seconds for the other ranks to print their errors


def start(ranks: int, arguments: list[str], variables: dict[str, str]) -> list[subprocess.Popen[bytes]]:
    """Start the processes of `tutorials.demo.train`. Each gets ``variables`` and the variables that `join` needs."""
    processes = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listening.getsockname()[1])} | only_loopback()
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            own[LISTEN] = str(listening.fileno()) if rank == 0 else ""
            # With its own session, a rank does not get Ctrl-C. The launcher gets it, and asks the ranks to save and leave.
            process = subprocess.Popen(
                [sys.executable, "-m", "tutorials.demo.train", *arguments], env=os.environ | variables | at | own,
                pass_fds=[listening.fileno()] if rank == 0 else [], start_new_session=True,
            )  # fmt: skip
            processes.append(process)
    return processes


def only_loopback() -> dict[str, str]:
    """Environment variables that keep gloo and NCCL on this machine, unless the user has set them."""
    return {name: os.environ.get(name, LOOPBACK) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}


def join(backend: str, timeout: timedelta) -> None:
    """Create the default group of all ranks, from a rank's process. `start` or torchrun may have started the process."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if LISTEN in os.environ:
        file, host, port = os.environ[LISTEN], os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, world, rank == 0, timeout, master_listen_fd=int(file) if file else None)
    else:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:  # one machine
            os.environ.update(only_loopback())
            # torchrun (2.13) restarts ranks on the old store. It still has the lost ranks' addresses, and new ranks would wait for them.
            store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def wait(ranks: list[subprocess.Popen[bytes]], stop: Path) -> int:
    """Wait for the ranks, and return the exit code of the first that fails, or 0.

    The first SIGINT or SIGTERM asks the ranks to stop. The second ends them.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        try:
            return finish(ranks)
        except KeyboardInterrupt:
            print("\nstopping after this step, with a checkpoint; interrupt again to end at once", flush=True)
            stop.touch()
        return finish(ranks) or INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def finish(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait until all ranks have ended. After one fails, wait at most ``GRACE`` seconds for the others."""
    failed, deadline = 0, float("inf")
    while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
        for rank, process in enumerate(ranks):
            if process.poll() and not failed:
                failed, deadline = process.returncode, time.monotonic() + GRACE
                print(f"rank {rank} ended with exit code {failed}; the other ranks will be ended too", file=sys.stderr, flush=True)
    codes = [process.poll() for process in ranks]
    return failed or next((code for code in codes if code), 0)
