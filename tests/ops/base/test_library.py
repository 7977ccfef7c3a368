"""How ops are called; that they run on their tensors' device; that graphs in torch's cache are those of the ops as they are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._device import DeviceContext
from torch.utils.flop_counter import FlopCounterMode

from moecomm.ops.base import library
from moecomm.ops.base.library import ROOMS, checksum, define
from moecomm.ops.exchange.slices import define_function
from moecomm.ops.rows.gather import gather

CHECKOUT = Path(__file__).parents[3]
COMPILED = """
import torch
import moecomm.functional as mf
x, loss = torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True)
torch.compile(mf.attach_loss, fullgraph=True)(x, loss, 1.0).sum().backward()
print(loss.grad.item(), torch.compiler.config.cache_key_tag)
"""


@pytest.mark.exhaustive
@pytest.mark.slow
def test_an_op_whose_backward_has_changed_is_compiled_anew(tmp_path: Path) -> None:
    for folder, inside in (("moecomm", "."), ("ops", "ops"), ("compile", "compile")):  # as installed
        shutil.copytree(CHECKOUT / folder, tmp_path / "moecomm" / inside, dirs_exist_ok=True)
    mine = uuid.uuid4().hex  # graphs of this tag are in no cache
    environment = os.environ | {"TORCH_COMPILE_CACHE_KEY_TAG": mine}
    source = tmp_path / "moecomm" / "ops" / "rows" / "attach_loss.py"
    changed = source.read_text().replace("return grad, loss_gradient(", "return grad, 3 * loss_gradient(")
    assert changed != source.read_text()
    tags = []
    for grad in ("1.0", "3.0"):
        done = subprocess.run([sys.executable, "-c", COMPILED], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        found, user, name, checksum = done.stdout.split()
        assert (found, user, name) == (grad, mine, "moecomm")
        tags.append(checksum)
        source.write_text(changed)
    assert tags[0] != tags[1]


def test_the_key_of_compile_caches_depends_on_every_source_of_the_ops(tmp_path: Path) -> None:
    copies = [shutil.copytree(room, tmp_path / room.name) for room in ROOMS]
    key = checksum(*copies)
    assert torch.compiler.config.cache_key_tag.endswith(f" moecomm {key}")
    sources = [path for copy in copies for path in copy.rglob("*.py")]
    assert {path.parent.name for path in sources} >= {"ops", "base", "routing", "rows", "exchange", "compile"}
    for path in sources:
        before = path.read_bytes()
        path.write_bytes(before + b"#")  # one byte more
        assert checksum(*copies) != key, path
        path.write_bytes(before)
    assert checksum(*copies) == key


def test_an_op_runs_with_the_device_of_its_tensors_as_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch's guard keeps the current device, which need not exist. The tensors are fakes on another device.

    Where there are GPUs, torch makes fakes on these alone: the last one, so that one GPU will do.
    """
    other = torch.cuda.device_count() - 1 if torch.cuda.is_available() else 1
    present = other + 1
    current, seen = [present], []

    class Guard:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *error: object) -> None:
            current.pop()

    def run(x: Tensor, y: Tensor | None = None, n: int = 0) -> Tensor:
        seen.append(current[-1])
        if n:
            raise ValueError
        return x

    op = define("test_guarded(Tensor x, Tensor? y=None, int n=0) -> Tensor", run, run, run)
    monkeypatch.setattr(torch.cuda, "_DeviceGuard", Guard)
    with FakeTensorMode():
        here, there = torch.empty(2), torch.empty(2, device=f"cuda:{other}")
    op._op_dk(DispatchKey.CUDA, there)
    op._op_dk(DispatchKey.CUDA, here, there)
    with pytest.raises(ValueError):  # noqa: PT011 - its own
        op._op_dk(DispatchKey.CUDA, there, None, 1)
    assert seen == [other] * 3
    op._op_dk(DispatchKey.CUDA, torch.empty(2))
    op(torch.empty(2))
    assert seen[3:] == [present] * 2
    assert current == [present]


def test_inside_trusting_no_tensor_is_looked_at_again_and_an_error_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Tensor] = []
    plain = library._plain
    monkeypatch.setattr(library, "_plain", lambda tensor: looked.append(tensor) or plain(tensor))

    class Two(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return library.call(op, library.call(op, x))

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 4 * grad

    def run(x: Tensor) -> Tensor:
        if not x.numel():
            raise ValueError("empty")
        return 2 * x

    op = define("test_trusted(Tensor x) -> Tensor", lambda x: torch.empty_like(x), run, run)
    two = define_function("test_trusting(Tensor x) -> Tensor", Two)
    x = torch.ones(3, requires_grad=True)
    y = library.call(two, x)
    assert [each is x for each in looked] == [True]
    y.sum().backward()
    assert y.tolist() == x.grad.tolist() == [4] * 3
    looked.clear()
    for _ in range(2):
        with pytest.raises(ValueError, match="empty"):
            library.trusting((x,), lambda: library.call(op, library.call(op, x).new_empty(0)))
        assert len(looked) == 1
        looked.clear()
    with FlopCounterMode(display=False):  # the dispatcher's, all of them
        assert library.trusting((x,), lambda: library.call(two, x)).tolist() == [4] * 3


def test_a_call_passes_the_dispatcher_by_in_plain_eager_code_alone() -> None:
    """A mode, a transform, a profiler, a tracer, a subclass, and a tensor that waits for its conjugation are the dispatcher's."""

    def run(x: Tensor) -> Tensor:
        through.append(not direct)
        return x.clone()

    op = define("test_called(Tensor x) -> Tensor", lambda x: torch.empty_like(x), run, run)
    overload, through, direct = library._DIRECT[id(op)], [], []
    library._DIRECT[id(op)] = overload._replace(cpu=lambda x: direct.append(1) or run(x))

    class Mine(Tensor):
        pass

    x = torch.ones(2)
    for plain in (x, torch.nn.Parameter(x), x[::2]):
        library.call(op, plain)
        assert direct.pop()
    with torch.inference_mode():
        library.call(op, torch.ones(2))
        assert direct.pop()
    through.clear()
    library.call(op, x.as_subclass(Mine))
    library.call(op, torch.ones(2, dtype=torch.complex64).conj())
    with FlopCounterMode(display=False):
        library.call(op, x)
    with torch.autograd.profiler.profile():
        library.call(op, x)
    with DeviceContext("cpu"):
        library.call(op, x)
    graph = make_fx(lambda x: library.call(op, x))(x)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [op]
    with FakeTensorMode() as fake:
        library.call(op, fake.from_tensor(x))
    assert not direct
    assert through == [True] * 6


def test_a_call_and_the_dispatcher_give_the_same_and_its_gradients() -> None:
    order, position = torch.tensor([2, 0, -1, 3], dtype=torch.int32), torch.tensor([[1, -1], [0, 3]], dtype=torch.int32)
    results = []
    for run in (library.call, lambda op, *args: op(*args)):
        x = torch.arange(6.0).view(2, 3).requires_grad_()
        rows = run(gather, x, order, position)
        (grad,) = torch.autograd.grad((rows**3).sum(), x, create_graph=True)
        results.append((rows, grad, *torch.autograd.grad(grad.square().sum(), x)))
        assert not run(gather, x.detach(), order, position).requires_grad
        with torch.no_grad():
            assert not run(gather, x, order, position).requires_grad
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
