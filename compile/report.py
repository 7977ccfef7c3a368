"""Print what torch.compile makes of a function, in one table: graph breaks, recompiles, host syncs, collectives, memory, kernels.

    python -m moecomm.compile.report package.module:function [--json]
    torchrun --nproc-per-node 4 -m moecomm.compile.report path/to/file.py:function

The function takes no arguments and makes its own inputs. In a checkout of moecomm the default is
the demo's model.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moecomm.compile.watch import Break, Compiling, Recompile, Run, run
from moecomm.errors import wrong_value

DEMO = "tutorials.demo.step:loss"
CALLS = 3  # the first compiles, the second may recompile with dynamic sizes, the third must equal the second


class Report(NamedTuple):
    """The result of `report`. ``str(report)`` is the table, ``report.to_dict()`` the same as plain data."""

    name: str
    graphs: int  # compiled by Dynamo, including recompiled ones
    breaks: list[Break]
    recompiles: list[Recompile]
    seconds: float  # of compilation, forward and backward
    kernels: int  # that Inductor wrote, including those from its cache
    eager: Run
    compiled: Run | None  # the last call; None if compilation failed
    error: str = ""  # why compilation failed

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers."""
        return _plain(self)

    def __str__(self) -> str:
        last = self.eager if self.compiled is None else self.compiled
        lines = [f"{self.name}{_rank()}", *([f"  {'error':<20}{self.error}"] if self.error else [])]
        lines.append(f"  {'graphs':<20}{self.graphs}, compiled in {self.seconds:.1f} s; {self.kernels} kernels")
        lines += _section("graph breaks", str(len(self.breaks)), [f"{found.place}: {found.reason}" for found in self.breaks])
        causes = [f"{found.function} at {found.place}: {found.cause}" for found in self.recompiles]
        lines += _section("recompiles", str(len(self.recompiles)), causes)
        syncs = _phases([sync.phase for sync in last.syncs], [sync.phase for sync in self.eager.syncs])
        lines += _section("host syncs", syncs, [f"{sync.phase:<10}{sync.op:<28}{sync.place}" for sync in self.eager.syncs])
        sent = _phases([each.phase for each in last.collectives], [each.phase for each in self.eager.collectives])
        lines += _section("collectives", sent, [f"{each.phase:<10}{each.op:<28}{_size(each.bytes)}" for each in last.collectives])
        lines.append(f"  {'saved for backward':<20}{_size(last.saved)}; eager: {_size(self.eager.saved)}")
        return "\n".join(lines)


def report(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Report what torch.compile makes of ``fn(*args, **kwargs)``: forward and, if the result needs gradients, backward.

    Args:
        fn: a function or module. If it is compiled already, or calls compiled code, as a training
            step does, it runs unchanged. Otherwise it is compiled here. Graph breaks are then
            allowed, so that the report finds all of them; apart from that, the compiler captures
            what it captures with fullgraph=True.
        args, kwargs: its arguments, the same for each call.

    Returns:
        A `Report`:

        ==================================  ====================================================================================
        ``graphs``, ``seconds``,            how much was compiled, how long it took, and the kernels that Inductor wrote
        ``kernels``
        ``breaks``                          each graph break's ``place``, file:line, and ``reason``
        ``recompiles``                      each recompile's ``function``, ``place`` and ``cause``, the guard that failed
        ``eager``, ``compiled``             one run each: its host ``syncs`` with their place; its ``collectives`` with the
                                            bytes that this rank receives, also from itself; and the bytes ``saved`` for the
                                            backward pass, without parameters and arguments
        ``error``                           what was raised, if fullgraph=True refuses a graph break or compilation fails;
                                            ``compiled`` is then None
        ==================================  ====================================================================================

    Raises what ``fn`` raises in eager mode.

    >>> from moecomm.compile.report import report
    >>> def layer(x):
    ...     a_plan = plan(torch.tensor([[1], [0]]), torch.ones(2, 1), num_experts=2)
    ...     return combine(dispatch(x, a_plan).exp(), a_plan)
    >>> with torch.compiler.set_stance(force_backend="aot_eager"):
    ...     found = report(layer, torch.zeros(2, 3, requires_grad=True))
    >>> found.graphs, found.breaks, found.recompiles, [(sync.op, sync.phase) for sync in found.compiled.syncs]
    (1, [], [], [('plan_sizes', 'forward')])
    >>> torch.compiler.reset()  # what was compiled for the report

    Calls ``fn`` once in eager mode, and then three times compiled. If ``fn`` is compiled here, it
    runs once more, uncompiled, before that. On several ranks all ranks make the same call, and each
    gets its own report. Without an accelerator, a read of a tensor on the CPU counts as the host
    synchronization that it would be with one.

    Side effects: earlier compiled code is dropped (`torch._dynamo.reset`) and compiled again.
    ``.grad`` of the parameters and arguments is unchanged. What ``fn`` itself changes, such as an
    optimizer's step, changes at each call.
    """
    torch._dynamo.reset()
    with torch.compiler.set_stance("force_eager"):
        eager = run(fn, args, kwargs, eager=True)
    before = _kernels()
    compiled, error = None, ""
    with Compiling() as compiling:
        try:
            compiled = run(fn, args, kwargs, eager=False)
            if not compiling.graphs and not compiling.breaks:  # fn does not use compiled code
                with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
                    compiled = _calls(torch.compile(fn), args, kwargs, CALLS)
            else:
                compiled = _calls(fn, args, kwargs, CALLS - 1)
        except torch._dynamo.exc.TorchDynamoException as exception:
            compiled, error = None, f"{type(exception).__name__}: {str(exception).strip().splitlines()[0]}"
    name = getattr(fn, "__qualname__", type(fn).__qualname__)
    found = compiling.graphs, compiling.breaks, compiling.recompiles, compiling.seconds
    return Report(name, *found, _kernels() - before, eager, compiled, error)


def _calls(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> Run:
    """Run ``fn`` this number of times, and return the last run."""
    return [run(fn, args, kwargs, eager=False) for _ in range(number)][-1]


def _kernels() -> int:
    import torch._inductor.metrics  # slow to import, and needed only to compile

    return torch._inductor.metrics.generated_kernel_count


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return {name: _plain(part) for name, part in value._asdict().items()}  # type: ignore[attr-defined]
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _rank() -> str:
    return f" on rank {dist.get_rank()} of {dist.get_world_size()}" if dist.is_initialized() else ""


def _section(title: str, summary: str, lines: list[str]) -> list[str]:
    return [f"  {title:<20}{summary}", *(f"    {line}" for line in lines)]


def _phases(compiled: list[str], eager: list[str]) -> str:
    numbers = [f"{phases.count('forward')} forward, {phases.count('backward')} backward" for phases in (compiled, eager)]
    return f"{numbers[0]}; eager: {numbers[1]}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"


def find(target: str) -> Callable[..., Any]:
    """The function that ``package.module:name`` or ``path/to/file.py:name`` names."""
    where, _, name = target.rpartition(":")
    if not where:
        wrong_value("target", repr(target), "package.module:function or path/to/file.py:function")
    names = runpy.run_path(where) if where.endswith(".py") else vars(importlib.import_module(where))
    if name not in names:
        wrong_value("target", repr(target), f"one of {where}'s functions")
    return names[name]


def main(arguments: list[str]) -> None:
    targets = [argument for argument in arguments if argument != "--json"]
    if not targets and importlib.util.find_spec("tutorials"):
        targets = [DEMO]
    if len(targets) != 1:
        sys.exit(__doc__)
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    found = report(find(targets[0]))
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(json.dumps(found.to_dict(), indent=2) if "--json" in arguments else found)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, "")  # find modules in the current directory, as `python file.py` does in the file's
    main(sys.argv[1:])
