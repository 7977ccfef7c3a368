"""The ProcessGroup that a name stands for: ops take a group's name, as plain data that a graph can hold, and look it up when they run."""

from __future__ import annotations

import torch
import torch.distributed as dist


def process_group(name: str) -> dist.ProcessGroup:
    """The ProcessGroup of a name that `resolve_group` gave."""
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
