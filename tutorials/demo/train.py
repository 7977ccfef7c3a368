"""What each rank runs: train, watch the held-out text, save, and show. `python -m tutorials.demo` starts the ranks."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import moecomm.functional as mf
from tutorials.demo import checkpoint, data, parallel, plots
from tutorials.demo.model import Experts, Shape, Transformer
from tutorials.demo.options import parse

LEARNING_RATE, WARM_UP, CLIP = 4e-3, 20, 1.0
BALANCE = 0.01  # the weight of the balance loss
HELD_OUT_WINDOWS, HELD_OUT_EVERY, SAVE_EVERY = 64, 40, 80
PROMPT, TEMPERATURE = 96, 0.7  # bytes
STOP_FILE = "MOECOMM_DEMO_STOP"  # the variable that names a file: once it exists, the ranks save and leave


def main(options: Namespace) -> None:
    threading.Thread(target=leave_with_parent, args=(os.getppid(),), daemon=True).start()
    asked = stop_requests()
    dist.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo")
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        run(options, asked, dist.get_rank())
    finally:
        dist.destroy_process_group()


def run(options: Namespace, asked: Callable[[], bool], rank: int) -> None:
    say = print if rank == 0 else lambda *_: None
    text, shape = data.read(options.data), Shape(experts=options.experts, top_k=options.top_k)
    held_out = data.windows(text.held_out, -(-HELD_OUT_WINDOWS // options.ranks) * options.ranks, shape.context)  # [windows, context + 1]
    meshes = parallel.Meshes(options.device, options.ranks, options.ep)
    model = parallel.build(shape, meshes, options)
    optimizer = adamw(model)
    say(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {options.experts} experts a layer, top-{options.top_k}; "
        f"{options.ranks} ranks = {options.ranks // options.ep} edp x {options.ep} ep; "
        f"{text.train.numel():,} bytes to train on, {text.held_out.numel():,} held out"
    )
    history: dict[str, Any] = {"step": 0, "train": [], "held_out": [], "loads": [], "rows": []}
    if options.resume:
        history = checkpoint.load(options.out / "checkpoints", model, optimizer)
        say(f"resumed at step {history['step']}")
    if options.compile and history["step"] < options.steps:
        say("compiling the block, once for all layers ...")

    bar, stopped = None, False
    while history["step"] < options.steps and not stopped:
        tokens = data.batch(text.train, options.batch, shape.context, options.seed, history["step"]).chunk(options.ranks)[rank]
        loss, load = train_step(model, meshes, optimizer, tokens.to(options.device), learning_rate(history["step"], options.steps))
        stopped = record(history, loss, load, asked(), options)
        step = history["step"]
        if step % HELD_OUT_EVERY == 0 or step == options.steps:
            history["held_out"].append([step, held_out_bits(model, held_out.chunk(options.ranks)[rank].to(options.device))])
        if step % SAVE_EVERY == 0 or step == options.steps or stopped:
            checkpoint.save(options.out / "checkpoints", model, optimizer, history)
        if bar is None:  # made after the first step, so that the time left does not count compilation
            bar = tqdm(total=options.steps, initial=step, unit="step", disable=rank != 0)
        else:
            bar.update()
        rate = bar.format_dict["rate"] or 0.0
        bar.set_postfix_str(f"loss {history['train'][-1]:.3f}, {rate * options.batch * shape.context:,.0f} tokens/s")
    if bar is not None:
        bar.close()
    if stopped:
        say(f"stopped at step {history['step']}; its checkpoint is in {options.out}/checkpoints, and --resume goes on from it")
        return
    say(f"\na sample, after {PROMPT} bytes of held-out text:\n{'-' * 80}\n{sample(model, text.held_out, shape, options)}\n{'-' * 80}")
    unigram, bigram = data.baselines(text.train, held_out)
    if rank == 0:
        plots.loss(history, unigram, bigram, options.out / "loss.png")
        plots.experts(history, options.out / "experts.png")
    say(
        f"held-out bits per byte: {history['held_out'][-1][1]:.3f}  (bigram {bigram:.3f}, unigram {unigram:.3f})\n"
        f"plots: {options.out}/loss.png, {options.out}/experts.png; checkpoint: {checkpoint.complete(options.out / 'checkpoints')[-1]}"
    )


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """One group of parameters a mesh: a fused step takes the parameters of one mesh together."""
    experts = {p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    dense = [p for p in model.parameters() if p not in experts]
    groups = [{"params": dense}, {"params": [p for p in model.parameters() if p in experts]}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to a tenth."""
    warm = min(1.0, (step + 1) / WARM_UP)
    return LEARNING_RATE * warm * (1 - 0.9 * step / steps)


def train_step(
    model: Transformer, meshes: parallel.Meshes, optimizer: torch.optim.Optimizer, tokens: Tensor, rate: float
) -> tuple[Tensor, Tensor]:
    """One step on this rank's ``tokens`` [B, context + 1]: its loss, and the rows of each of its experts [layers, L]."""
    logits, balance, load = model(tokens[:, :-1].int())
    loss = cross_entropy(logits, tokens)
    ((loss + BALANCE * balance) / meshes.dense.size()).backward()  # the gradients are summed over the ranks
    parallel.sync_replicated_(model, meshes)
    mf.clip_grad_norm_(model, CLIP)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), load


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().long())


def record(history: dict[str, Any], loss: Tensor, load: Tensor, asked: bool, options: Namespace) -> bool:
    """Add a step to ``history``, alike on all ranks, in one message; whether any rank was asked to stop."""
    mine = torch.cat((loss.double()[None], load.flatten().double(), loss.new_full((1,), asked).double()))
    everyone = mf.slice_gather(mine[None], None).cpu()  # [ranks, 1 + layers * L + 1]: the host sync of a step
    loads = everyone[:, 1:-1].view(-1, options.ep, *load.shape)  # [edp, ep, layers, L]
    history["step"] += 1
    history["train"].append(everyone[:, 0].mean().item())
    history["loads"].append(loads.sum(0).transpose(0, 1).flatten(1).int().tolist())  # [layers, E]
    history["rows"].append(loads.sum((2, 3)).flatten().int().tolist())  # [ranks]
    return bool(everyone[:, -1].any())


def held_out_bits(model: Transformer, tokens: Tensor) -> float:
    """Bits a byte on all ranks' held-out windows, of which ``tokens`` [windows, context + 1] are this rank's."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # another batch size: not worth a compilation
        loss = cross_entropy(model(tokens[:, :-1].int())[0], tokens)
    return mf.slice_gather(loss[None].double(), None).mean().item() / math.log(2)


def sample(model: Transformer, text: Tensor, shape: Shape, options: Namespace) -> str:
    """A prompt of held-out text and what the model makes of it; every rank must take part, each with a text of its own."""
    generator = torch.Generator().manual_seed(options.seed + dist.get_rank())
    start = int(torch.randint(text.numel() - PROMPT, (1,), generator=generator))
    tokens = text[start : start + PROMPT]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for _ in range(options.sample):
            logits = model(tokens[None, -shape.context :].int().to(options.device))[0][0, -1].cpu()  # [vocabulary]
            tokens = torch.cat((tokens, torch.multinomial((logits / TEMPERATURE).softmax(0), 1, generator=generator).byte()))
    return bytes(tokens.tolist()).decode(errors="replace")


def stop_requests() -> Callable[[], bool]:
    """Whether this rank was asked to stop: by SIGINT, by SIGTERM, or by the launcher's file."""
    file, signals = Path(os.environ.get(STOP_FILE, "")), []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: signals.append(received))
    return lambda: bool(signals) or file.is_file()


def leave_with_parent(parent: int) -> None:
    """End this process once torchrun has: it starts the ranks in sessions of their own, and leaves them behind when it is killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main(parse())
