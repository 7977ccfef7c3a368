"""Do hours of training leave anything behind: memory, open files, threads or process groups, on any rank?

    python -m benchmarks.soak --minutes 30     # or: make soak

It trains the demo's MoE layer on gloo processes (NCCL on GPUs): forward, backward and an optimizer step. Steps alternate between eager and
compiled. Each rank gets another number of tokens at each step. After every round of steps it samples each process. After the warm-up
nothing may grow. The samples go to benchmarks/results/soak_<device>.json. If something grows, the run ends with an error that says what,
on which rank, and by how much.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import multiprocessing as mp
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from tutorials.demo.model import Groups, MoE, Shape

SHAPE = Shape(experts=8, top_k=2, dim=64, hidden=64, layers=1)
TOKENS = 512  # at most, of a rank at a step
ROUND = 20  # steps between two samples
WARM = 0.4  # of the samples: the allocators, the compiler's caches and gloo's buffers have come to what they need by then


class Sample(NamedTuple):
    """What a process has after a round of steps."""

    seconds: float  # since the first round, which compiles
    steps: int
    memory: float  # resident, in MiB
    device: float  # that torch's allocator has given out on the GPU, in MiB
    files: int
    threads: int
    groups: int  # process groups


class Line(NamedTuple):
    """One figure of one rank: what it was once warm, and at the end."""

    rank: int
    what: str
    before: float
    after: float
    allowed: float  # growth

    @property
    def grows(self) -> bool:
        return self.after > self.before + self.allowed


# How much more a figure may be in the last part of a run than in the part before. What glibc keeps of memory that was given back differs
# by up to 7 MiB from one minute to the next, in either direction.
ALLOWED = {"memory": 16.0, "device": 1.0, "files": 0.0, "threads": 0.0, "groups": 0.0}

Step = Callable[[int], None]  # the step of this number
MakeStep = Callable[[str], Step]  # on this device, in an initialised process group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="a folder")
    options = parser.parse_args()
    samples = soak(demo_layer, options.ranks, 60 * options.minutes, options.device)
    lines = judge(samples)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    about = {"device": name, "torch": torch.__version__, "ranks": options.ranks, "minutes": round(samples[0][-1].seconds / 60, 2)}
    about |= {"steps": samples[0][-1].steps, "tokens": f"0 to {TOKENS} a rank and step", "shape": SHAPE._asdict()}
    every = -(-len(samples[0]) // 60)
    kept = [[sample._asdict() for sample in of_rank[::every]] for of_rank in samples]
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"soak_{options.device}.json"
    file.write_text(json.dumps({"about": about, "lines": [line._asdict() for line in lines], "samples": kept}, indent=1) + "\n")
    for line in lines:
        print(f"rank {line.rank} {line.what:8} {line.before:9.1f} -> {line.after:9.1f}{'   GROWS' if line.grows else ''}")
    print(f"{about['steps']} steps in {about['minutes']} minutes on {options.ranks} ranks")
    grown = [f"{line.what} of rank {line.rank} from {line.before:.1f} to {line.after:.1f}" for line in lines if line.grows]
    if grown:
        sys.exit(f"it grows: {'; '.join(grown)}")


def soak(make_step: MakeStep, ranks: int, seconds: float, device: str = "cpu") -> list[list[Sample]]:
    """The samples of each rank, of so many seconds of steps."""
    context = mp.get_context("spawn")
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (make_step, rank, ranks, seconds, device, f"{folder}/store", theirs)
            processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        samples = []
        for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
            try:
                samples.append(pipe.recv())
            except EOFError:
                process.join()
                raise RuntimeError(f"rank {rank} ended with exit code {process.exitcode}") from None
        for process in processes:
            process.join()
    return samples


def judge(samples: list[list[Sample]]) -> list[Line]:
    """What each figure was in the first third of the samples after the warm-up, and in the last: the median, of a count the highest."""
    lines = []
    for rank, of_rank in enumerate(samples):
        warm = of_rank[round(WARM * len(of_rank)) :]
        third = len(warm) // 3
        if third == 0:
            raise ValueError(f"{len(of_rank)} samples in {of_rank[-1].seconds:.0f} s are too few to tell what grows: let it run longer")
        for what, allowed in ALLOWED.items():
            of = statistics.median if what in ("memory", "device") else max
            before, after = (of([getattr(sample, what) for sample in part]) for part in (warm[:third], warm[-third:]))
            lines.append(Line(rank, what, before, after, allowed))
    return lines


def _rank(make_step: MakeStep, rank: int, ranks: int, seconds: float, device: str, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # oneDNN keeps what it made for the last 1,024 shapes: with other sizes at every step that is 0.5 GiB, and takes a minute to fill.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    step = make_step(device)
    for number in range(ROUND):  # compiles, which may take longer than the run
        step(number)
    samples: list[Sample] = []
    number, began, over = ROUND, time.monotonic(), torch.zeros(1, device=device)
    while not over.item():
        for _ in range(ROUND):
            step(number)
            number += 1
        samples.append(_sample(time.monotonic() - began, number))
        over.fill_(float(time.monotonic() - began > seconds))
        dist.broadcast(over, 0)  # all ranks make as many steps as the first
    pipe.send(samples)
    dist.destroy_process_group()


def _sample(seconds: float, steps: int) -> Sample:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    device = torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    files, threads = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
    return Sample(seconds, steps, resident, device, files, threads, len(dist.distributed_c10d._world.pg_map))


def demo_layer(device: str) -> Step:
    """The demo's MoE layer over all ranks, in bfloat16, which a compiler takes on CPUs, too; compiled at every other step."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD.group_name
    torch.manual_seed(0)
    moe = MoE(SHAPE, Groups(experts=group, tokens=group, ranks=ranks))
    for name, parameter in moe.named_parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        if "experts" in name:
            parameter.data = parameter.data.chunk(ranks)[rank].clone()  # as DTensors over the ranks have it
    moe = moe.to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-4)
    ways = [moe, torch.compile(moe, fullgraph=True, dynamic=True)]
    return functools.partial(_demo_step, ways, optimizer, torch.Generator().manual_seed(rank), device)


def _demo_step(ways: list[torch.nn.Module], optimizer: torch.optim.Optimizer, generator: torch.Generator, device: str, number: int) -> None:
    tokens = int(torch.randint(0, TOKENS + 1, (), generator=generator))
    x = torch.randn(tokens, SHAPE.dim, generator=generator).to(device, torch.bfloat16).requires_grad_()
    torch._dynamo.decorators.mark_unbacked(x, 0)  # one graph for all sizes, 0 and 1 among them
    y, _ = ways[number % len(ways)](x)
    (y.float() - x.float()).square().mean().nan_to_num().backward()
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    main()
