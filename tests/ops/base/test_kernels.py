"""What a launch takes for its key is all that Triton compiles a kernel for."""

from __future__ import annotations

import itertools

import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from moecomm.ops.base.kernels import _kind

NUMBERS = (
    0,
    1,
    2,
    15,
    16,
    17,
    48,
    -1,
    -16,
    2**31 - 1,
    2**31,
    2**31 + 1,
    -(2**31),
    -(2**31) - 1,
    2**40,
    2**62 + 1,
    2**63,
    2**63 + 8,
    2**64 - 1,
)


def test_arguments_of_one_key_have_one_compiled_kernel() -> None:
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bytes_ = torch.zeros(64, dtype=torch.uint8)
    views = [bytes_[start : start + 16] for start in range(0, 33, 4)]
    tensors = [view.view(dtype) for view in views for dtype in (torch.uint8, torch.bfloat16, torch.float32)] + [torch.empty(0)]
    for one, other in itertools.product([*NUMBERS, *tensors], repeat=2):
        if _kind(one) == _kind(other):
            assert native_specialize_impl(backend, one, False, True, True) == native_specialize_impl(backend, other, False, True, True)
    assert _kind((1, 2)) != _kind((2, 2))
    assert len({_kind(number) for number in (1, 16, 17, 2**31, 2**63)}) == 5
