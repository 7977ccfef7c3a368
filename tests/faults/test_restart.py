"""The demo loses a rank under torchrun, starts again, and ends as if undisturbed; its checkpoints are whole, and data; it stays at home."""

from __future__ import annotations

import functools
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.faults.faults import FAULTY, RANKS, At, Fault, lost_ranks
from tests.spawn import run_ranks
from tests.tutorials.test_demo import EAGER, ROOT, TEXT, history, undisturbed
from tutorials.demo import checkpoint

STEPS = 8
SMALL = ("--data", TEXT, "--batch", "4", "--sample", "2", *EAGER.split(), "--steps", str(STEPS), "--save-every", "2")
DEMO = (sys.executable, "-m", "tutorials.demo", *SMALL)
PATIENCE = 400.0  # seconds, on a loaded machine


def torchrun(*arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", "torch.distributed.run", *arguments, "-m", "tutorials.demo", *SMALL


class Job(NamedTuple):
    """A command, and the file that has what it writes."""

    process: subprocess.Popen[bytes]
    log: Path

    def ended(self) -> str:
        """What it wrote, once it has ended well."""
        code = self.process.wait(PATIENCE)
        assert code == 0, self.log.read_text()
        return self.log.read_text()

    def wait_for(self, pattern: str) -> None:
        """Wait until it has written so, in what it may yet go on with."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, self.log.read_text()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)


@contextmanager
def started(out: Path, *command: str, log: str = "log") -> Iterator[Job]:
    """A demo that writes to ``out``, which does not outlive this."""
    out.mkdir(exist_ok=True)
    with (out / log).open("wb") as file:
        variables = os.environ | {"PYTHONUNBUFFERED": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1" if "--nnodes" in command else "0"}
        process = subprocess.Popen([*command, "--out", str(out)], cwd=ROOT, stdout=file, stderr=file, env=variables)
    try:
        yield Job(process, out / log)
    finally:
        process.kill()
        process.wait()


def family_of(parent: int) -> dict[int, str]:
    """A process and all that it started, and they in turn: their ids, and the RANK in their environments or ""."""
    parents, ranks = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found = re.search(rb"\0RANK=(\d+)\0", b"\0" + (folder / "environ").read_bytes())
            ranks[int(folder.name)] = found[1].decode() if found else ""
    family = {parent}
    while more := {pid for pid, of in parents.items() if of in family} - family:
        family |= more
    return {pid: ranks.get(pid, "") for pid in family}


class Socket(NamedTuple):
    listens: bool
    own: str
    other: str


def sockets_of(family: dict[int, str]) -> set[Socket]:
    """The internet sockets of processes, as Linux's /proc shows them: addresses in hexadecimal, without ports."""
    inodes = set()
    for pid in family:
        with suppress(OSError):
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    inodes.add(os.readlink(file))
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, own, other, state, *_, inode = line.split()[:10]
            if f"socket:[{inode}]" in inodes:
                found.add(Socket(state == "0A", own.partition(":")[0], other.partition(":")[0]))
    return found


V6 = "0000000000000000FFFF0000"  # what stands before an IPv4 address in an IPv6 one
LOOPBACK = {"0100007F", f"{V6}0100007F", "00000000000000000000000001000000"}  # 127.0.0.1, the same in IPv6, and ::1


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_the_demo_listens_on_loopback_and_talks_to_nobody_else(tmp_path: Path) -> None:
    sockets = set()
    with started(tmp_path, *DEMO, "--ranks", "2", "--steps", "1") as job:
        while job.process.poll() is None:
            sockets |= sockets_of(family_of(job.process.pid))
            time.sleep(0.05)
        job.ended()
    assert any(each.listens for each in sockets)
    assert {each.own for each in sockets} <= LOOPBACK
    assert {each.other for each in sockets if not each.listens} <= LOOPBACK  # so that it downloads nothing, either


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
@pytest.mark.exhaustive  # in every run tests/tutorials/test_demo.py interrupts the demo, and it resumes
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_a_random_step_it_starts_again_and_ends_with_the_same_losses(seed: int, tmp_path: Path) -> None:
    run_ranks(undisturbed, 2, ["--ranks", "2", *SMALL, "--out", str(tmp_path / "whole")], timeout=PATIENCE)
    chance = random.Random(seed)
    step, rank, later = chance.randrange(3, STEPS - 1), str(chance.randrange(2)), chance.random() / 5
    with started(tmp_path / "parts", *torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", "2")) as job:
        job.wait_for(rf"\b[{step}-{STEPS}]/{STEPS} ")
        time.sleep(later)
        (lost,) = (pid for pid, of in family_of(job.process.pid).items() if of == rank)
        os.kill(lost, signal.SIGKILL)
        output = job.ended()
    assert [2 <= int(at) <= STEPS for at in re.findall(r"resumed at step (\d+)", output)] == [True], output
    assert history(tmp_path / "parts") == history(tmp_path / "whole")  # all losses, and the rows of all experts, to the bit


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_it_goes_on_with_the_ranks_that_are_left(tmp_path: Path) -> None:
    """Two machines of two ranks each, of which one is lost for good: the experts were spread over 4 ranks, and then are over 2."""
    with started(tmp_path / "whole", *DEMO, "--ranks", "4", "--ep", "4") as job:
        job.ended()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ("--nnodes", "1:2", "--nproc-per-node", "2", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "demo")
    command += ("--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1", "--rdzv-conf")
    with (
        started(tmp_path / "parts", *torchrun(*command, "is_host=1,last_call_timeout=20"), "--ep", "4", log="first") as first,
        started(tmp_path / "parts", *torchrun(*command, "is_host=0,last_call_timeout=20"), "--ep", "4", log="second") as second,
    ):
        deadline = time.monotonic() + PATIENCE
        while not checkpoint.complete(tmp_path / "parts" / "checkpoints"):
            assert time.monotonic() < deadline, first.log.read_text() + second.log.read_text()
            time.sleep(0.05)
        lost = family_of(second.process.pid)
        for pid in lost:
            os.kill(pid, signal.SIGKILL)
        output = first.ended() + second.log.read_text()
    assert "4 ranks = 1 pp x 4 dp x 1 tp, for the experts 1 pp x 1 edp x 4 ep x 1 etp" in output
    assert "2 ranks = 1 pp x 2 dp x 1 tp, for the experts 1 pp x 1 edp x 2 ep x 1 etp" in output
    assert "resumed at step" in output
    whole, parts = history(tmp_path / "whole"), history(tmp_path / "parts")
    torch.testing.assert_close(parts["train"], whole["train"], rtol=1e-5, atol=0)


def model_of(group: dist.ProcessGroup) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of which each rank has a layer of its own to write."""
    torch.manual_seed(0)
    model = nn.ModuleDict({f"of rank {group.rank()}": nn.Linear(8, 8)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model[f"of rank {group.rank()}"](torch.ones(8)).sum().backward()
    optimizer.step()
    return model, optimizer


def saves(group: dist.ProcessGroup, at: At, folder: Path) -> None:
    """A step that saves one more checkpoint, in which a rank can be lost: its file is written, but not yet all on the disk."""
    model, optimizer = model_of(group)
    sync = os.fsync

    def syncing(file: int) -> None:
        at("write")
        sync(file)

    with patch.object(os, "fsync", syncing):
        checkpoint.save(folder, model, optimizer, {"step": len(checkpoint.complete(folder)) + 1})


@pytest.mark.slow
def test_a_checkpoint_that_a_rank_was_killed_in_is_never_taken_for_complete(tmp_path: Path) -> None:
    step = functools.partial(saves, folder=tmp_path)
    with lost_ranks() as ranks:
        ends = ranks.case(Fault("killed", "write"), step)  # the first is saved before the fault, the second is not
        assert ends[FAULTY].exit_code == -signal.SIGKILL
        assert all(end.error for rank, end in enumerate(ends) if rank != FAULTY)
        assert (tmp_path / "unfinished").exists()
        assert [each.name for each in checkpoint.complete(tmp_path)] == ["step_000001"]
        assert [end.error for end in ranks.case(None, step)] == [None] * RANKS
    assert [each.name for each in checkpoint.complete(tmp_path)] == ["step_000002", "step_000003"]


class Stop(BaseException):
    """The process would be killed here."""


def cut_short(folder: Path) -> list[list[str]]:
    """The complete checkpoints after each of a few saves that do not end: before the new folder's name, and while an old one goes."""
    model, optimizer = model_of(dist.group.WORLD)
    names = []

    def save(step: int) -> None:
        with suppress(Stop):
            checkpoint.save(folder, model, optimizer, {"step": step})
        names.append([each.name for each in checkpoint.complete(folder)])

    rename = Path.rename

    def unnamed(path: Path, name: Path) -> Path:
        if path.name == "unfinished":
            raise Stop
        return rename(path, name)

    save(1)
    with patch.object(Path, "rename", unnamed):
        save(2)
    save(3)

    def half(path: Path, *_: Any, **__: Any) -> None:
        if path.name != "unfinished" and path.exists():
            next(path.rglob("*.distcp")).unlink()
            raise Stop

    with patch.object(shutil, "rmtree", half):
        save(4)
    save(5)
    checkpoint.load(folder, model, optimizer)
    return names


def test_a_checkpoint_has_its_name_only_while_all_of_it_is_there(tmp_path: Path) -> None:
    one, two, three, four, five = run_ranks(cut_short, 1, tmp_path)[0]
    assert (one, two, three) == (["step_000001"], ["step_000001"], ["step_000001", "step_000003"])
    assert (four, five) == (["step_000003", "step_000004"], ["step_000004", "step_000005"])


class Trap:
    """What makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def read_traps(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """What was said of two checkpoints that would run code, and the history of a good one."""
    model, optimizer = model_of(dist.group.WORLD)
    checkpoint.save(folder, model, optimizer, {"step": 1})
    good, said = checkpoint.load(folder, model, optimizer), []
    description = folder / "step_000001" / ".metadata"
    description.write_bytes(pickle.dumps(Trap(folder / "trapped")))
    optimizer.param_groups[0]["lr"] = Trap(folder / "trapped")
    for _ in range(2):
        try:
            checkpoint.load(folder, *model_of(dist.group.WORLD))
        except BaseException as error:
            said.append(f"{error!r} {error!s}")
        checkpoint.save(folder, model, optimizer, {"step": 2})
    return said, good


@pytest.mark.slow
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (description, value), good = run_ranks(read_traps, 1, tmp_path)[0]
    assert "names posix.mkdir, which is not what DCP writes there" in description
    assert "Weights only load failed" in value
    assert good == {"step": 1}
    assert not (tmp_path / "trapped").exists()
