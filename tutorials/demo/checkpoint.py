"""Checkpoints that are complete or do not exist: DCP writes a folder of its own, which gets its name only when all of it is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

KEPT = 2  # the newest checkpoints
BY_NAME = StateDictOptions(
    flatten_optimizer_state_dict=True
)  # the optimizer's state by parameters' names: its groups differ from stage to stage


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, history: dict[str, Any]) -> None:
    """All ranks: ``folder/step_<history's step>``, from which any arrangement of ranks can go on."""
    name, unfinished = folder / f"step_{history['step']:06d}", folder / "unfinished"
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    dcp.save(_state(model, optimizer), checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        (unfinished / "history.json").write_text(json.dumps(history))
        shutil.rmtree(name, ignore_errors=True)
        unfinished.rename(name)
        for old in complete(folder)[:-KEPT]:
            shutil.rmtree(old)
    dist.barrier()


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All ranks: the newest checkpoint into ``model`` and ``optimizer``; its history."""
    newest = complete(folder)[-1]
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=newest)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=BY_NAME)
    return json.loads((newest / "history.json").read_text())


def complete(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    return sorted(folder.glob("step_*"))


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer, options=BY_NAME)
    return {"model": model_state, "optimizer": optimizer_state}
