"""Scripts on several ranks, as torchrun starts them, without its process and without importing torch again in each rank.

Each of these takes seconds of CPU time for each process, which for a small script is most of its time.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.spawn import fork_server


def run_script(script: Path, ranks: int, folder: Path, timeout: float = 200.0, **stance: str) -> str:
    """What ``script`` prints on ``ranks`` ranks that run in ``folder``; AssertionError, with all of it, where a rank fails or hangs.

    ``stance`` goes to `torch.compiler.set_stance`.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))  # the agent's store
    alike = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    alike |= {"TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    alike |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": 1}
    with tempfile.NamedTemporaryFile() as printed:
        variables = [{name: str(value) for name, value in (alike | {"RANK": rank, "LOCAL_RANK": rank}).items()} for rank in range(ranks)]
        processes = [fork_server().Process(target=_run, args=(script, folder, each, printed.name, stance)) for each in variables]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]  # None: it hangs
        for process in processes:
            process.kill()
            process.join()
        text = Path(printed.name).read_text()
    assert codes == [0] * ranks, f"exit codes {codes}\n{text}"
    return text


def _run(script: Path, folder: Path, variables: dict[str, str], printed: str, stance: dict[str, str]) -> None:
    from tests.end_with_parent import end_with_parent

    end_with_parent()
    os.environ.update(variables)
    os.chdir(folder)
    file = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - as long-lived as the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = [str(script)]
    sys.path.insert(0, str(script.parent))  # as Python does for a script
    torch.set_num_threads(1)
    with torch.compiler.set_stance(**stance):
        runpy.run_path(str(script), run_name="__main__")
    sys.stdout.flush()
