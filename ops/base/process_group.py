"""The ProcessGroup of a group name.

Ops take a group's name, which is plain data that a graph can hold. They look the group up when they run.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def process_group(name: str) -> dist.ProcessGroup:
    """The ProcessGroup of a name that `resolve_group` returned."""
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
