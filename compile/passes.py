"""options: passes over a compiled graph as options of torch.compile, in the order in which they are named."""

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
    """What `torch.compile` takes as ``options`` to run the passes on every graph, forward and backward, after Inductor's own.

    Args:
        passes: functions that change a graph in place, such as `overlap_exchanges`, run in this order; one's own may be among them, and
            Inductor's ``CustomGraphPass`` too. Where compiled code is kept for later, a pass is known by its ``uuid()``, or by the
            source of the file that it is defined in and moecomm's version; a change of another file that it calls is not seen.

    Raises TypeError for what cannot be called.

    >>> from moecomm.compile.overlap import overlap_exchanges
    >>> f = torch.compile(torch.sin, options=options(overlap_exchanges) | {"max_autotune": False})
    """
    for each in passes:
        if not callable(each):
            raise TypeError(f"passes held {each!r}, must be functions of a torch.fx.Graph")
    return {"post_grad_custom_post_pass": _Passes(passes)}


class _Passes(CustomGraphPass):
    """A class, since that is how Inductor asks a pass what its compiled code is to be known by."""

    def __init__(self, passes: tuple[Pass, ...]) -> None:
        self.passes = passes

    def __call__(self, graph: Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        names = [_name(each) for each in self.passes]
        return None if None in names else tuple(names)


def _name(each: Pass) -> Any:
    """What a pass is known by; None, which keeps Inductor from keeping the code at all, where that cannot be found out."""
    if isinstance(each, CustomGraphPass):
        return each.uuid()
    file = inspect.getsourcefile(each) if inspect.isfunction(each) and each.__closure__ is None else None
    if file is None:
        return None
    with open(file, "rb") as source:
        return each.__module__, each.__qualname__, hashlib.sha256(source.read()).hexdigest(), __version__
