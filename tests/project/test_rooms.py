"""A folder tells what its code may do: only ops/exchange talks to other ranks, one file reads from the device, and imports go down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
EXCHANGE, READER = "ops/exchange/", "ops/routing/read_sizes.py"
FILES = sorted(str(path.relative_to(ROOT)) for room in ("moecomm", "ops", "compile") for path in (ROOT / room).rglob("*.py"))
NUMBERS = ("moecomm/planner/place.py", "moecomm/planner/imbalance.py")  # they compute on numpy's arrays, and refuse what is on a device
EAGER = [path for path in FILES if not path.startswith("compile/")]  # compile/ names collectives, to find them in graphs; it calls none

# What sends or receives: torch.distributed's own functions, the registry of their Works, and the functional collectives.
KINDS = (
    "all_",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "send",
    "recv",
    "isend",
    "irecv",
    "batch_isend",
    "barrier",
    "monitored_barrier",
)
COLLECTIVES = {name for name in dir(dist) if name.startswith(KINDS)} | {"_register_work"}
FUNCTIONAL = {"_c10d_functional", "_c10d_functional_autograd", "_functional_collectives"}
READS = {"item", "tolist", "cpu", "nonzero", "masked_select", "unique", "unique_consecutive", "bincount", "argwhere"}
# From the top down: a room may import its own files and those of rooms below it.
ORDER = [
    "moecomm.compile",
    "moecomm",
    "moecomm.ops.exchange",
    "moecomm.ops.rows",
    "moecomm.ops.routing",
    "moecomm.ops.base",
    "moecomm.errors",
]


def collectives(source: str) -> list[str]:
    """The collectives that a file calls or imports."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            of_dist = ast.unparse(node.value) in ("dist", "torch.distributed", "torch._C._distributed_c10d")
            if node.attr in FUNCTIONAL or (of_dist and node.attr in COLLECTIVES):
                found.append(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found += [
                alias.name for alias in node.names if alias.name in COLLECTIVES | FUNCTIONAL or "_functional_collectives" in node.module
            ]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.endswith("_functional_collectives")]
    return found


def reads(source: str) -> list[str]:
    """The calls that make the host wait where a tensor is on a device.

    Not those of numpy, which refuses such a tensor, and not those of an op's CPU path, which never gets one.
    """

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef) and child.name.endswith("_cpu"):
                continue
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) and child.func.attr in READS:
                of = ast.unparse(child.func.value)
                if of != "np" and ".numpy()" not in of:
                    yield ast.unparse(child)
            yield from visit(child)

    return list(visit(ast.parse(source)))


def module(path: str) -> str:
    """Under what name a file is imported."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.split(".")[0] == "moecomm" else f"moecomm.{name}"


def imports(path: str) -> Iterator[str]:
    """The modules of moecomm that a file imports where it is imported itself; TYPE_CHECKING counts, the inside of a function does not."""
    names = {module(other) for other in FILES}

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "moecomm":
                for alias in child.names:
                    inside = f"{child.module}.{alias.name}"
                    yield inside if inside in names else str(child.module)
            elif isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names if alias.name in names)
            elif not isinstance(child, ast.FunctionDef):
                yield from visit(child)

    return visit(ast.parse((ROOT / path).read_text()))


def room(name: str) -> int:
    """The index in `ORDER` of a module's room: the longest name that it begins with."""
    return max((len(each), i) for i, each in enumerate(ORDER) if name == each or name.startswith(each + "."))[1]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.distributed as dist\ndist.all_reduce(x)", ["all_reduce"]),
        ("torch.ops._c10d_functional.all_gather_into_tensor(x, 2, g)", ["_c10d_functional"]),
        ("from torch.distributed import broadcast", ["broadcast"]),
        ("from torch.distributed._functional_collectives import all_reduce", ["all_reduce"]),
        ("import torch.distributed._functional_collectives", ["torch.distributed._functional_collectives"]),
        ("torch._C._distributed_c10d._register_work(x, work)", ["_register_work"]),
        ("dist.get_world_size()\nrows.gather(0, index)", []),
    ],
)
def test_a_collective_is_seen(source: str, found: list[str]) -> None:
    assert collectives(source) == found


def test_only_the_exchanges_talk_to_other_ranks() -> None:
    outside = {path: found for path in EAGER if not path.startswith(EXCHANGE) and (found := collectives((ROOT / path).read_text()))}
    assert outside == {}
    assert any(collectives((ROOT / path).read_text()) for path in EAGER if path.startswith(EXCHANGE))


def test_a_read_from_the_device_is_seen() -> None:
    source = "x.sum().item()\nx[0].tolist()\nx.numpy().tolist()\nnp.bincount(x.numpy())\ndef sum_cpu(x):\n  return x.item()"
    assert reads(source) == ["x.sum().item()", "x[0].tolist()"]


def takes_tensors(path: str) -> bool:
    """Whether a file imports torch; another has no tensor to read."""
    nodes = list(ast.walk(ast.parse((ROOT / path).read_text())))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return any(name.split(".")[0] == "torch" for name in names)


def test_the_planner_computes_on_numbers_and_one_file_of_it_measures() -> None:
    searching = {f"moecomm/planner/{name}.py" for name in ("model", "cluster", "splits", "routing", "cost", "memory", "search", "table")}
    assert searching <= set(FILES)
    assert not any(takes_tensors(path) for path in searching)
    assert takes_tensors("moecomm/planner/measure.py")


def test_one_file_alone_reads_from_the_device() -> None:
    read = [path for path in EAGER if path not in (READER, *NUMBERS) and takes_tensors(path)]
    assert {path: found for path in read if (found := reads((ROOT / path).read_text()))} == {}
    assert reads((ROOT / READER).read_text()) == ["tensor.tolist()"]


def test_imports_go_down_and_in_no_circle() -> None:
    graph = {module(path): set(imports(path)) - {"moecomm"} for path in FILES}
    up = [(name, other) for name, others in graph.items() for other in others if room(other) < room(name)]
    assert up == []
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, with the circle
