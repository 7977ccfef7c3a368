"""Save and load checkpoints. A checkpoint is either complete or does not exist: its folder gets its name only after DCP wrote all files.

Checkpoints are read as data. One that could run code while it is read is refused.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

KEPT = 2  # how many of the newest checkpoints are kept
BY_NAME = StateDictOptions(
    flatten_optimizer_state_dict=True
)  # name the optimizer's state by parameter: its groups differ from stage to stage


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, history: dict[str, Any]) -> None:
    """Save ``folder/step_<history's step>``. All ranks call it. Ranks that are split in any way can continue from it."""
    name, unfinished = folder / f"step_{history['step']:06d}", folder / "unfinished"
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    dcp.save(_state(model, optimizer), checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        with (unfinished / "history.json").open("w") as file:
            json.dump(history, file)
            file.flush()
            os.fsync(file.fileno())  # reach the disk before the folder gets its name, as DCP's files do
        remove(name)
        unfinished.rename(name)
        for old in complete(folder)[:-KEPT]:
            remove(old)
    dist.barrier()


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the newest checkpoint into ``model`` and ``optimizer``, and return its history. All ranks call it."""
    newest = complete(folder)[-1]
    state, reader = _state(model, optimizer), DataReader(newest)
    reader.read_metadata()  # before DCP reads it: in torch 2.11, DCP does not say what is wrong
    dcp.load(state, storage_reader=reader, planner=DataPlanner())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=BY_NAME)
    return json.loads((newest / "history.json").read_text())


def complete(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    return sorted(folder.glob("step_*"))


def remove(name: Path) -> None:
    """Remove a checkpoint, if it exists. It loses its name before the first of its files is removed."""
    removed = name.with_name("removed")
    shutil.rmtree(removed, ignore_errors=True)
    if name.exists():
        name.rename(removed)
        shutil.rmtree(removed)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer, options=BY_NAME)
    return {"model": model_state, "optimizer": optimizer_state}


class DataReader(dcp.FileSystemReader):
    """Reads a checkpoint only if its description, ``.metadata``, is plain data. DCP itself unpickles any file in that place."""

    def read_metadata(self, *args: Any, **keywords: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            DataUnpickler(file).load()  # before torch does
        return super().read_metadata(*args, **keywords)


class DataPlanner(dcp.DefaultLoadPlanner):
    """Loads a value that is not a tensor, such as a learning rate, only if ``torch.load`` can read it without running code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises if it cannot read the value
        value.seek(0)
        super().load_bytes(read_item, value)


DATA = {  # the types that a checkpoint's description consists of
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip


class DataUnpickler(pickle.Unpickler):
    """Unpickles only the types in ``DATA``."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in DATA.get(module, ()):
            raise pickle.UnpicklingError(f"the checkpoint's .metadata names {module}.{name}, which is not what DCP writes there")
        return super().find_class(module, name)
