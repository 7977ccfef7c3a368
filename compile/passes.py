"""options: turns passes over a compiled graph, and a partition function, into options of torch.compile."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn
from torch.fx import Graph, GraphModule

from moecomm import __version__

Pass = Callable[[Graph], None]
Partition = Callable[..., tuple[GraphModule, GraphModule]]


def options(*passes: Pass, partition: Partition | None = None) -> dict[str, Any]:
    """The ``options`` of `torch.compile` that run these passes on every graph, forward and backward, after Inductor's own passes.

    Args:
        passes: functions that change a graph in place, such as `overlap_exchanges`, in the order in
            which they run. Your own functions and Inductor's ``CustomGraphPass`` are allowed, too.
        partition: a function that divides the traced graph into forward and backward, such as
            `keep_less`. None for torch's own.

    Returns:
        A dict, which may be joined with other options.

    Raises:
        TypeError: a pass or ``partition`` is not callable.

    >>> from moecomm.compile.overlap import overlap_exchanges
    >>> f = torch.compile(torch.sin, options=options(overlap_exchanges) | {"max_autotune": False})

    Inductor's cache of compiled code identifies a pass and a partition function by its ``uuid()``; or else by the source of
    the file that defines it and moecomm's version. It does not see a change of another file that
    the pass calls.
    """
    for each in passes:
        if not callable(each):
            raise TypeError(f"passes held {each!r}, must be functions of a torch.fx.Graph")
    chosen: dict[str, Any] = {"post_grad_custom_post_pass": _Passes(passes)}
    if partition is not None:
        if not callable(partition):
            raise TypeError(f"partition was {partition!r}, must be a function of a torch.fx.GraphModule")
        chosen["custom_partitioner_fn"] = _Partition(partition)
    return chosen


class _Passes(CustomGraphPass):
    """All passes as one CustomGraphPass: Inductor asks this class by which key to cache the compiled code."""

    def __init__(self, passes: tuple[Pass, ...]) -> None:
        self.passes = passes

    def __call__(self, graph: Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        names = [_name(each) for each in self.passes]
        return None if None in names else tuple(names)


class _Partition(CustomPartitionerFn):
    """A partition function as Inductor takes it."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition

    def __call__(self, gm: GraphModule, joint_inputs: Sequence[object], **keywords: Any) -> tuple[GraphModule, GraphModule]:
        return self.partition(gm, joint_inputs, **keywords)

    def uuid(self) -> Any:
        return _name(self.partition)


def _name(each: Pass | Partition) -> Any:
    """The key of a pass in Inductor's cache. None if there is no way to find one: Inductor then does not cache the code."""
    if isinstance(each, CustomGraphPass):
        return each.uuid()
    file = inspect.getsourcefile(each) if inspect.isfunction(each) and each.__closure__ is None else None
    if file is None:
        return None
    with open(file, "rb") as source:
        return each.__module__, each.__qualname__, hashlib.sha256(source.read()).hexdigest(), __version__
