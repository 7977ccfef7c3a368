"""The training loop of each rank: train, measure the held-out text, save, and plot. `python -m tutorials.demo` starts the ranks."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.distributed.tensor import DTensor
from torch.profiler import profile
from tqdm import tqdm

import moecomm.functional as mf
from moecomm.mesh import MoEMesh
from tutorials.demo import auto, checkpoint, data, launch, parallel, pipeline
from tutorials.demo.model import Shape, Transformer
from tutorials.demo.options import parse, shape_of, under_torchrun
from tutorials.demo.splits import microbatches

LEARNING_RATE, WARM_UP, CLIP = 4e-3, 20, 1.0
HELD_OUT_WINDOWS, HELD_OUT_EVERY = 64, 40
PROMPT, TEMPERATURE = 96, 0.7  # bytes
TIMEOUT = timedelta(minutes=10)  # how long ranks wait for a rank that is alive but late; longer than their compile times differ


def main(options: Namespace) -> None:
    threading.Thread(target=leave_with_parent, args=(os.getppid(),), daemon=True).start()
    asked = stop_requests()
    launch.join("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo", TIMEOUT)
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        run(options, asked, dist.get_rank())
    finally:
        dist.destroy_process_group()


def run(options: Namespace, asked: Callable[[], bool], rank: int) -> None:
    say = print if rank == 0 else lambda *_: None
    text, shape = data.read(options.data), shape_of(options)
    if options.split == "auto":
        options, *found = auto.choose(options, shape)
        say(auto.said(options, *found))
    mesh, dtype = parallel.meshes(options), parallel.compute_dtype(options)
    pp, dp, _, tp = mesh.dense.shape
    held_out = data.windows(text.held_out, -(-HELD_OUT_WINDOWS // dp) * dp, shape.context)  # [windows, context + 1]
    model, parts = parallel.build(shape, mesh, options), microbatches(pp)
    schedule = pipeline.schedule(model, mesh, shape, options.batch, options.slice, dtype, parts)
    optimizer = adamw(model)
    say(
        f"{parameters(model, mesh):,} parameters, {shape.experts} experts a layer, top-{shape.top_k}; "
        f"{options.ranks} ranks = {pp} pp x {dp} dp x {tp} tp, "
        f"for the experts {pp} pp x {mesh.expert.shape[1]} edp x {options.ep} ep x {options.etp} etp; "
        f"{text.train.numel():,} bytes to train on, {text.held_out.numel():,} held out"
    )
    history: dict[str, Any] = {"step": 0, "train": [], "held_out": [], "loads": [], "rows": []}
    if options.resume or (under_torchrun() and checkpoint.complete(options.out / "checkpoints")):
        history = checkpoint.load(options.out / "checkpoints", model, optimizer)
        say(f"resumed at step {history['step']}")
    if options.compile and history["step"] < options.steps:
        say("compiling the block, once for all layers ...")

    bar, stopped = None, False
    while history["step"] < options.steps and not stopped:
        tokens = data.batch(text.train, options.batch, shape.context, options.seed, history["step"]).to(options.device)
        before, after = pipeline.own_part(tokens, mesh, options.slice, parts)
        rate = learning_rate(history["step"], options.steps)
        last = history["step"] == options.steps - 1
        with profile_of(options.out / f"trace_{rank}.json") if last and options.profile else nullcontext():
            loss, load = train_step(model, schedule, optimizer, before, after, rate, mesh, options)
        stopped = record(history, loss, load, asked(), mesh)
        step = history["step"]
        if step % HELD_OUT_EVERY == 0 or step == options.steps:
            history["held_out"].append([step, held_out_bits(model, held_out.to(options.device), mesh, shape, options)])
        if step % options.save_every == 0 or step == options.steps or stopped:
            checkpoint.save(options.out / "checkpoints", model, optimizer, history)
        if bar is None:  # created after the first step, so the time left excludes compilation
            bar = tqdm(total=options.steps, initial=step, unit="step", disable=rank != 0)
        else:
            bar.update()
        speed = (bar.format_dict["rate"] or 0.0) * options.batch * shape.context
        bar.set_postfix_str(f"loss {history['train'][-1]:.3f}, {speed:,.0f} tokens/s")
    if bar is not None:
        bar.close()
    if stopped:
        say(f"stopped at step {history['step']}; its checkpoint is in {options.out}/checkpoints, and --resume goes on from it")
        return
    say(f"\na sample, after {PROMPT} bytes of held-out text:\n{'-' * 80}\n{sample(model, text.held_out, mesh, shape, options)}\n{'-' * 80}")
    unigram, bigram = data.baselines(text.train, held_out)
    if rank == 0:
        from tutorials.demo import plots  # imports matplotlib, which the other ranks do without

        plots.loss(history, unigram, bigram, options.out / "loss.png")
        plots.experts(history, options.out / "experts.png")
    say(
        f"held-out bits per byte: {history['held_out'][-1][1]:.3f}  (bigram {bigram:.3f}, unigram {unigram:.3f})\n"
        f"plots: {options.out}/loss.png, {options.out}/experts.png; checkpoint: {checkpoint.complete(options.out / 'checkpoints')[-1]}"
    )


@contextmanager
def profile_of(file: Path) -> Iterator[None]:
    """Write a trace of the code inside this context. `python -m benchmarks.lanes` draws the traces of all ranks."""
    with profile() as profiled:
        yield
    profiled.export_chrome_trace(str(file))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with one group of parameters per mesh: a fused step takes only parameters of one mesh."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    groups_of = [{"params": group} for group in groups.values()]
    return torch.optim.AdamW(groups_of, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def parameters(model: nn.Module, mesh: MoEMesh) -> int:
    """The number of parameters of the whole model."""
    mine = torch.tensor([sum(p.numel() for p in model.parameters())], device=mesh.stage.device_type)
    return int(mf.slice_gather(mine, mesh.dense["pp"]).sum())


def learning_rate(step: int, steps: int) -> float:
    """The learning rate: linear warm-up, and linear decay to a tenth."""
    warm = min(1.0, (step + 1) / WARM_UP)
    return LEARNING_RATE * warm * (1 - 0.9 * step / steps)


def train_step(
    model: Transformer, schedule: PipelineScheduleSingle, optimizer: torch.optim.Optimizer, before: Tensor, after: Tensor, rate: float,
    mesh: MoEMesh, options: Namespace,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One training step: ``before`` [B, n] are this rank's input tokens, ``after`` [B, n] those to predict.

    Returns the loss, which is zero except on the last stage, and the rows of each of this rank's experts [its layers, L].
    """
    model.loads.clear()
    losses: list[Tensor] = []  # one per microbatch
    # The losses are divided by the number of ranks, and the gradients are summed over the ranks.
    schedule.step(*([before] if model.embed is not None else []), target=after if model.head is not None else None, losses=losses)
    parallel.sync_replicated_(model, mesh, options.slice)
    mf.clip_grad_norm_(model, CLIP, {"*": mesh.dense["pp"]})
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    ranks = pipeline.ranks_of_loss(mesh, options.slice)
    loss = torch.stack([loss.detach() for loss in losses]).mean() * ranks if losses else after.new_zeros((), dtype=torch.float32)
    return loss, torch.stack(model.loads).sum(0)


def record(history: dict[str, Any], loss: Tensor, load: Tensor, asked: bool, mesh: MoEMesh) -> bool:
    """Add a step to ``history``, the same on all ranks, with one message. Return whether any rank was asked to stop."""
    mine = torch.cat((loss.double()[None], load.flatten().double(), loss.new_full((1,), asked).double()))
    everyone = mf.slice_gather(mine[None], None).cpu()  # [ranks, 1 + layers / pp * L + 1]: a step's host sync
    loads = everyone[:, 1:-1].view(*mesh.expert.shape, *load.shape)  # [pp, edp, ep, etp, layers / pp, L]
    history["step"] += 1
    history["train"].append(everyone[:, 0].view(mesh.dense.shape[0], -1)[-1].mean().item())
    # The etp ranks have parts of the same experts, so they have the same rows.
    history["loads"].append(loads[:, :, :, 0].sum(1).transpose(1, 2).flatten(2).flatten(0, 1).int().tolist())  # [layers, E]
    history["rows"].append((loads.sum((4, 5)) / load.shape[0]).flatten().tolist())  # [ranks]: the mean over its layers
    return bool(everyone[:, -1].any())


def held_out_bits(model: Transformer, tokens: Tensor, mesh: MoEMesh, shape: Shape, options: Namespace) -> float:
    """Bits per byte on the held-out windows ``tokens`` [windows, context + 1]."""
    before, after = pipeline.own_part(tokens, mesh, options.slice)
    logits = pipeline.forward(model, before, mesh, shape, parallel.compute_dtype(options))
    loss = pipeline.cross_entropy(logits, after) if model.head is not None else torch.zeros((), device=tokens.device)
    losses = mf.slice_gather(loss[None].double(), None).view(mesh.dense.shape[0], -1)[-1]  # from the last stage's ranks
    return losses.mean().item() / math.log(2)


def sample(model: Transformer, text: Tensor, mesh: MoEMesh, shape: Shape, options: Namespace) -> str:
    """A prompt of held-out text and the model's continuation, the same on all ranks. Every rank must call it."""
    generator = torch.Generator().manual_seed(options.seed)
    start = int(torch.randint(text.numel() - PROMPT, (1,), generator=generator))
    tokens, writer = text[start : start + PROMPT], int(mesh.dense.mesh[-1, 0, 0, 0])
    for _ in range(options.sample):
        seen = tokens[-shape.context :].int()
        # Padding after a byte does not change its prediction. It keeps a length that the tp ranks can divide.
        padded = F.pad(seen, (0, shape.context - len(seen)))[None].to(options.device)
        mine = padded if options.slice else mf.slice_scatter(padded, mesh.dense["tp"], dim=1)
        logits = pipeline.forward(model, mine, mesh, shape, parallel.compute_dtype(options))
        if not options.slice:
            logits = mf.slice_gather(logits, mesh.dense["tp"], dim=1)
        byte = torch.zeros(1, dtype=torch.uint8, device=options.device)
        if model.head is not None:
            chances = (logits[0, len(seen) - 1].cpu() / TEMPERATURE).softmax(0)  # [vocabulary]
            byte.copy_(torch.multinomial(chances, 1, generator=generator))
        dist.broadcast(byte, src=writer)
        tokens = torch.cat((tokens, byte.cpu()))
    return bytes(tokens.tolist()).decode(errors="replace")


def stop_requests() -> Callable[[], bool]:
    """A function that returns whether this rank was asked to stop: by SIGINT, by SIGTERM, or by the launcher's file."""
    file, signals = Path(os.environ.get(launch.STOP_FILE, "")), []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: signals.append(received))
    return lambda: bool(signals) or file.is_file()


def leave_with_parent(parent: int) -> None:
    """End this process when its launcher ends. The ranks have their own sessions, so a killed launcher would leave them behind."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main(parse())
