"""A rank that dies, raises or hangs fails the others in the group's timeout; one without tokens takes part; two groups take turns."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import moecomm.functional as mf
from moecomm.group import GroupLike
from tests import reference
from tests.spawn import run_ranks

RANKS, FAULTY, TIMEOUT = 3, 1, 5.0  # TIMEOUT: of the group, in seconds
START, LATE = 150.0, 20.0  # seconds that ranks get to start, and more than TIMEOUT to fail, on a loaded machine
E, K, D = 4, 2, 6


def scaled(rows: Tensor, scale: Tensor, offsets: Tensor) -> Tensor:
    """Experts that multiply: row [N, D] of local expert e times scale[e]."""
    expert = torch.searchsorted(offsets, torch.arange(rows.shape[0], dtype=offsets.dtype), right=True)  # [N]
    return rows * scale[expert].unsqueeze(1)


class Ended(NamedTuple):
    """How a rank's process ended."""

    error: str | None  # what its layer raised; None where it raised nothing, was killed or hung
    seconds: float  # after the layer began
    exit_code: int


def serve(rank: int, port: int, fault: Callable[[str], None], pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, RANKS, is_master=rank == 0, timeout=timedelta(seconds=START))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=START))
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    step(dist.group.WORLD, lambda where: None)  # what is slow the first time
    dist.barrier()
    began = time.monotonic()
    try:
        step(group, fault if rank == FAULTY else lambda where: None)
    except Exception as error:
        pipe.send((f"{type(error).__name__}: {error}", time.monotonic() - began))
    else:
        pipe.send((None, time.monotonic() - began))


def step(group: dist.ProcessGroup, fault: Callable[[str], None]) -> None:
    """A layer, forward and backward, whose experts have the fault."""
    x = torch.ones(5, D, requires_grad=True)
    plan = mf.plan(torch.arange(10).view(5, K) % 3, torch.ones(5, K), 3, group, like=x)
    rows = mf.dispatch(x, plan)
    fault("forward")
    rows.register_hook(lambda grad: fault("backward"))
    mf.combine(rows * 2, plan).sum().backward()


def killed_forward(where: str) -> None:
    if where == "forward":
        os.kill(os.getpid(), signal.SIGKILL)


def killed_backward(where: str) -> None:
    if where == "backward":
        os.kill(os.getpid(), signal.SIGKILL)


def raises_forward(where: str) -> None:
    if where == "forward":
        raise ArithmeticError("in an expert")


def raises_backward(where: str) -> None:
    if where == "backward":
        raise ArithmeticError("in an expert")


def hangs_forward(where: str) -> None:
    if where == "forward":
        time.sleep(600)


def hangs_backward(where: str) -> None:
    if where == "backward":
        time.sleep(600)


def ends_of(fault: Callable[[str], None]) -> list[Ended]:
    """Run a layer on ranks of which one has the fault; processes of their own, since they do not survive it."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "moecomm.functional"])  # as the pools do: it is the same server
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(RANKS):
        ours, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=serve, args=(rank, port, fault, theirs)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    told: list[tuple[str | None, float]] = [(None, 0.0)] * RANKS
    try:
        for rank in sorted(range(RANKS), key=lambda rank: rank == FAULTY):  # the faulty one last: the others do not wait for it
            with suppress(EOFError):  # it was killed
                if pipes[rank].poll(1.0 if rank == FAULTY else START + TIMEOUT + LATE):
                    told[rank] = pipes[rank].recv()
                else:
                    assert rank == FAULTY, f"rank {rank} hangs"
                    processes[rank].kill()
        for process in processes:
            process.join(LATE)
        assert [process.pid for process in processes if process.exitcode is None] == []  # none is left behind
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [Ended(*each, process.exitcode or 0) for each, process in zip(told, processes, strict=True)]


def others(ends: list[Ended]) -> list[Ended]:
    return ends[:FAULTY] + ends[FAULTY + 1 :]


def assert_failed_in_time(end: Ended) -> None:
    """By an error of gloo's in the layer, after which the process ended by itself."""
    assert end.error is not None
    assert end.error.startswith("RuntimeError: ")
    assert "gloo" in end.error
    assert end.seconds < TIMEOUT + LATE
    assert end.exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", [killed_forward, killed_backward])
def test_a_rank_that_is_killed_in_its_experts_fails_the_others_in_the_groups_timeout(fault: Callable[[str], None]) -> None:
    ends = ends_of(fault)
    assert ends[FAULTY].exit_code == -signal.SIGKILL
    for end in others(ends):
        assert_failed_in_time(end)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [raises_forward, raises_backward])
def test_a_rank_whose_experts_raise_ends_and_fails_the_others_in_the_groups_timeout(fault: Callable[[str], None]) -> None:
    ends = ends_of(fault)
    assert (ends[FAULTY].error, ends[FAULTY].exit_code) == ("ArithmeticError: in an expert", 0)
    for end in others(ends):
        assert_failed_in_time(end)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [hangs_forward, hangs_backward])
def test_a_rank_that_does_not_come_fails_the_others_after_the_groups_timeout(fault: Callable[[str], None]) -> None:
    ends = ends_of(fault)
    for end in others(ends):
        assert_failed_in_time(end)
    assert min(end.seconds for end in others(ends)) > 0.9 * TIMEOUT


class Share(NamedTuple):
    """What a rank has of the results: y and gradients."""

    y: Tensor
    x: Tensor
    scales: list[Tensor]


def tokens_of(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D], weights [T, K] and the gradient of y [T, D] of all ranks' tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(sum(shape), wide, generator=generator, dtype=torch.float64) for wide in (D, K, D))  # type: ignore[return-value]


def scales_of(layers: int) -> list[Tensor]:
    return list(1 + torch.rand(layers, E, generator=torch.Generator().manual_seed(7), dtype=torch.float64))


def truth(shape: tuple[int, ...], seed: int, experts: list[Tensor], parallel: bool) -> Share:
    """All experts densely: layers one behind the other, or side by side and added up."""
    x, weights, grad = tokens_of(shape, seed)
    leaves = [x.requires_grad_(), *(scale.clone().requires_grad_() for scale in scales_of(len(experts)))]
    factors = [(reference.mix(ids, weights, E) @ scale).unsqueeze(1) for ids, scale in zip(experts, leaves[1:], strict=True)]
    y = sum((x * factor for factor in factors), torch.zeros_like(x)) if parallel else x * factors[0] * factors[1]
    gradients = torch.autograd.grad(y, leaves, grad)
    return Share(y.detach(), gradients[0], list(gradients[1:]))


def layer(x: Tensor, ids: Tensor, weights: Tensor, scale: Tensor, group: GroupLike) -> Tensor:
    plan = mf.plan(ids, weights, E, group, like=x)
    return mf.combine(scaled(mf.dispatch(x, plan), scale, plan.offsets), plan)


SHAPE, STEPS = (3, 0, 4, 2), 20


def starving(step: int) -> list[Tensor]:
    """Two layers' experts: all tokens choose one expert, another one each step, but those of a rank in turn, which choose none."""
    first = [torch.full((tokens, K), -1 if rank == step % 5 else step % E) for rank, tokens in enumerate(SHAPE)]
    return [torch.cat(first), torch.full((sum(SHAPE), K), (step // E) % E)]


def starving_here() -> list[Share]:
    rank, shares = dist.get_rank(), []
    own = slice(sum(SHAPE[:rank]), sum(SHAPE[: rank + 1]))
    for number in range(STEPS):
        x, weights, grad = (part[own] for part in tokens_of(SHAPE, number))
        leaves = [x.requires_grad_(), *(scale[rank : rank + 1].clone().requires_grad_() for scale in scales_of(2))]
        y = x
        for ids, scale in zip(starving(number), leaves[1:], strict=True):
            y = layer(y, ids[own], weights, scale, None)
        gradients = torch.autograd.grad(y, leaves, grad)
        shares.append(Share(y.detach(), gradients[0], list(gradients[1:])))
    return shares


def test_ranks_that_send_none_and_that_get_none_take_part_in_every_exchange() -> None:
    assert len(SHAPE) == E  # an expert each
    for number, *shares in zip(range(STEPS), *run_ranks(starving_here, len(SHAPE)), strict=True):
        want = truth(SHAPE, number, starving(number), parallel=False)
        torch.testing.assert_close(torch.cat([share.y for share in shares]), want.y)
        torch.testing.assert_close(torch.cat([share.x for share in shares]), want.x)
        for i, scale in enumerate(want.scales):
            torch.testing.assert_close(torch.cat([share.scales[i] for share in shares]), scale)


def ids_of(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    return [torch.randint(-1, E, (sum(SHAPE), K), generator=generator) for _ in range(2)]


def interleaved_here() -> list[Share]:
    """The same tokens through a layer over this rank's row of the mesh and one over its column, their exchanges in turns."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("column", "row"))
    rank, groups = dist.get_rank(), (mesh["row"], mesh["column"])
    own, shares = slice(sum(SHAPE[:rank]), sum(SHAPE[: rank + 1])), []
    for number in range(5):
        x, weights, grad = (part[own] for part in tokens_of(SHAPE, number))
        mine = [group.get_local_rank() for group in groups]
        leaves = [x.requires_grad_(), *(s.chunk(2)[i].clone().requires_grad_() for s, i in zip(scales_of(2), mine, strict=True))]
        row, column = (mf.plan(ids[own], weights, E, group, like=x) for ids, group in zip(ids_of(number), groups, strict=True))
        to_row, to_column = mf.dispatch(x, row), mf.dispatch(x, column)
        of_column = mf.combine(scaled(to_column, leaves[2], column.offsets), column)
        y = mf.combine(scaled(to_row, leaves[1], row.offsets), row) + of_column
        gradients = torch.autograd.grad(y, leaves, grad)
        shares.append(Share(y.detach(), gradients[0], list(gradients[1:])))
    return shares


def test_the_exchanges_of_two_groups_of_the_same_ranks_take_turns() -> None:
    for number, *shares in zip(range(5), *run_ranks(interleaved_here, 4), strict=True):
        want = truth(SHAPE, number, ids_of(number), parallel=True)
        torch.testing.assert_close(torch.cat([share.y for share in shares]), want.y)
        torch.testing.assert_close(torch.cat([share.x for share in shares]), want.x)
        # The ranks that hold an expert, 0 and 2 or 1 and 3 in rows, 0 and 1 or 2 and 3 in columns, each have a part of its gradient.
        for i, ((a, b), (c, d)) in enumerate((((0, 2), (1, 3)), ((0, 1), (2, 3)))):
            part = [share.scales[i] for share in shares]
            torch.testing.assert_close(torch.cat((part[a] + part[b], part[c] + part[d])), want.scales[i])
