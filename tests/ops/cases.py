"""What the tests of the ops share: routings, bounds on rounding, guarded memory, and gradients checked across ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# opcheck on an op that gives the result of an exchange that is still going on: test_aot_dispatch_* compare the values of two such results.
IN_FLIGHT = ("test_schema", "test_autograd_registration", "test_faketensor")
# opcheck on an op that is made of other ops and waits among them: torch's own wait_tensor gives back its input, against its schema, which
# test_schema and test_faketensor find in it wherever it stands. The parts pass both by themselves.
COMPOSED = ("test_autograd_registration", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def routing(tokens: int, k: int, num_experts: int, seed: int, dropped: float = 0.25) -> Tensor:
    """[tokens, k] int64 ids below num_experts, -1 in about the given part of the slots; an expert may repeat in a token."""
    generator = seeded(seed)
    experts = torch.randint(0, num_experts, (tokens, k), generator=generator)
    return experts.masked_fill(torch.rand(tokens, k, generator=generator) < dropped, -1)


def sorted_slots(keys: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order, position, offsets) of keys, as `counting_sort` must give them, by loops."""
    flat = keys.flatten().tolist()
    order = [i for b in range(bins) for i, key in enumerate(flat) if key == b]
    position = torch.full((len(flat),), -1, dtype=torch.int32)
    for place, i in enumerate(order):
        position[i] = place
    offsets = [sum(0 <= key <= b for key in flat) for b in range(bins)]
    return torch.tensor(order, dtype=torch.int32), position.view(keys.shape), torch.tensor(offsets, dtype=torch.int32)


def bounded_slots(keys: Tensor, bins: int, most: int) -> tuple[Tensor, Tensor]:
    """(order, position) of keys, as `bounded_sort` must give them, by loops."""
    flat = keys.flatten().tolist()
    order = torch.full((bins * most,), -1, dtype=torch.int32)
    for b in range(bins):
        for place, i in enumerate([i for i, key in enumerate(flat) if key == b][:most]):
            order[b * most + place] = i
    return order, inverse(order, len(flat), 1).view(keys.shape)


def padded(order: Tensor, extra: int) -> Tensor:
    """``order`` with ``extra`` entries of -1 among its own: half of them in its middle, the rest behind it."""
    fill = order.new_full((extra,), -1)
    middle = order.shape[0] // 2
    return torch.cat((order[:middle], fill[: extra // 2], order[middle:], fill[extra // 2 :]))


def inverse(order: Tensor, m: int, k: int) -> Tensor:
    """[m, k] int32: where each slot stands in ``order``, -1 where it does not; by a loop."""
    position = torch.full((m * k,), -1, dtype=torch.int32)
    for place, i in enumerate(order.tolist()):
        if i >= 0:
            position[i] = place
    return position.view(m, k)


def strided(x: Tensor) -> Iterator[Tensor]:
    """The same values as x [A, B] in other layouts: as they are, transposed, every other column and every other row of a larger tensor."""
    yield x
    yield x.t().contiguous().t()
    wide = x.new_zeros(x.shape[0], 2 * x.shape[1])
    wide[:, ::2] = x
    yield wide[:, ::2]
    high = x.new_zeros(2 * x.shape[0] + 1, x.shape[1])
    high[1::2] = x
    yield high[1::2]


def assert_within_rounding(got: Tensor, want: Tensor, terms: Tensor, rounding: float, interpreted: bool = False) -> None:
    """|got - want| is at most one rounding of ``want`` (float64) to got's dtype, plus ``rounding`` of the sum of the terms' sizes.

    One rounding is half an eps of the dtype: 2^-24 in float32, 2^-8 in bfloat16, 2^-11 in float16; Triton's interpreter cuts a
    float32 off where a GPU rounds it to bfloat16: a whole eps.
    """
    half = 1.0 if interpreted and got.dtype == torch.bfloat16 else 0.5
    once = half * torch.finfo(got.dtype).eps * want.abs() * 1.01 + torch.finfo(got.dtype).tiny
    excess = (got.cpu().double() - want).abs() - once - rounding * terms
    assert excess.numel() == 0 or excess.max() <= 0, f"{float(excess.max())} more than rounding explains"


def assert_same_layout(fake: Any, real: Any) -> None:
    """What a fake promised of shapes, dtypes and strides holds of the real outputs."""
    for promised, tensor in zip(tree_leaves(fake), tree_leaves(real), strict=True):
        if isinstance(tensor, Tensor):
            assert (promised.shape, promised.dtype) == (tensor.shape, tensor.dtype)
            assert tensor.is_contiguous()
            assert promised.is_contiguous()


class Guarded(TorchFunctionMode):
    """Allocates each tensor between two zones of a known byte, which nothing may write to; memory not written to holds it as well."""

    ZONE, BYTE = 2**14, 0xA5  # a zone is longer than a kernel's block, which then cannot jump over it
    ALLOCATORS = (torch.empty, torch.Tensor.new_empty, torch.zeros_like)

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in self.ALLOCATORS or out.numel() == 0:
            return out
        with torch._C.DisableTorchFunction():
            size = out.numel() * out.itemsize
            buffer = torch.full((size + 2 * self.ZONE,), self.BYTE, dtype=torch.uint8, device=out.device)
            self.buffers.append(buffer)
            inside = buffer[self.ZONE : self.ZONE + size].view(out.dtype).view(out.shape)
            return inside.zero_() if func is torch.zeros_like else inside

    def check(self) -> None:
        for buffer in self.buffers:
            assert (buffer[: self.ZONE] == self.BYTE).all(), "written before the tensor's memory"
            assert (buffer[-self.ZONE :] == self.BYTE).all(), "written behind the tensor's memory"


def guarded(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, with the memory around everything it allocates watched."""
    with Guarded() as guard:
        out = function(*args)
    assert guard.buffers or not any(tensor.numel() for tensor in tree_leaves(out)), "nothing was guarded"
    guard.check()
    return out


def gradient_of(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients of the sum of the cubes of what ``function`` gives, in its arguments, differentiable themselves."""

    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in inputs]
            return torch.autograd.grad((function(*leaves) ** 3).sum(), leaves, create_graph=True)

    return gradients


def check_gradients_across_ranks(function: Callable[..., Any], *inputs: Tensor, seed: int = 0) -> None:
    """On every rank of the default group: the gradients of ``function`` are those of the sum, over all ranks, of <cotangent, output>.

    `torch.autograd.gradcheck` perturbs the inputs of one process. Here a rank's output depends on the others' inputs, so each element
    of each rank's inputs is perturbed in turn, with all ranks taking part in every call. Float64; a rank's inputs may be of any size.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    outputs = [y for y in tree_leaves(function(*inputs)) if y.dtype.is_floating_point]
    cotangents = [torch.randn(y.shape, dtype=torch.float64, generator=seeded(1000 * seed + rank)) for y in outputs]
    analytic = torch.autograd.grad(outputs, inputs, cotangents)
    mine = torch.cat([gradient.flatten() for gradient in analytic])

    flat = torch.cat([x.detach().flatten() for x in inputs])
    lengths: list[Any] = [None] * ranks
    dist.all_gather_object(lengths, flat.numel())

    def loss(changed: Tensor) -> float:
        parts = changed.split([x.numel() for x in inputs])
        with torch.no_grad():
            outputs = tree_leaves(function(*(part.view(x.shape) for part, x in zip(parts, inputs, strict=True))))
        floating = [y for y in outputs if y.dtype.is_floating_point]
        return sum(float((y * v).sum()) for y, v in zip(floating, cotangents, strict=True))

    step = 1e-4
    changes = []
    for owner, length in enumerate(lengths):
        for i in range(length):
            change = torch.zeros_like(flat)
            if owner == rank:
                change[i] = step
            changes.append((loss(flat + change) - loss(flat - change)) / (2 * step))
    numeric = torch.tensor(changes, dtype=torch.float64)
    dist.all_reduce(numeric)
    start = sum(lengths[:rank])
    torch.testing.assert_close(mine, numeric[start : start + lengths[rank]], rtol=1e-6, atol=1e-7)
