"""options: turns passes over a compiled graph into options of torch.compile. They run in the order given."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from moecomm import __version__

Pass = Callable[[Graph], None]


def options(*passes: Pass) -> dict[str, Any]:
    """The ``options`` of `torch.compile` that run these passes on every graph, forward and backward, after Inductor's own passes.

    Args:
        passes: functions that change a graph in place, such as `overlap_exchanges`, in the order in
            which they run. Your own functions and Inductor's ``CustomGraphPass`` are allowed, too.

    Returns:
        A dict, which may be joined with other options.

    Raises:
        TypeError: a pass is not callable.

    >>> from moecomm.compile.overlap import overlap_exchanges
    >>> f = torch.compile(torch.sin, options=options(overlap_exchanges) | {"max_autotune": False})

    Inductor's cache of compiled code identifies a pass by its ``uuid()``; or else by the source of
    the file that defines it and moecomm's version. It does not see a change of another file that
    the pass calls.
    """
    for each in passes:
        if not callable(each):
            raise TypeError(f"passes held {each!r}, must be functions of a torch.fx.Graph")
    return {"post_grad_custom_post_pass": _Passes(passes)}


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


def _name(each: Pass) -> Any:
    """The key of a pass in Inductor's cache. None if there is no way to find one: Inductor then does not cache the code."""
    if isinstance(each, CustomGraphPass):
        return each.uuid()
    file = inspect.getsourcefile(each) if inspect.isfunction(each) and each.__closure__ is None else None
    if file is None:
        return None
    with open(file, "rb") as source:
        return each.__module__, each.__qualname__, hashlib.sha256(source.read()).hexdigest(), __version__
