"""norms: the norms of several tensors, whatever float32 holds of their squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moecomm.ops.rows.norms import norms
from tests.ops.cases import FLOATS, seeded, strided


def tensors(dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = seeded(0)
    shapes = [(40, 30), (7,), (), (0, 3), (1,), (300,)]
    sizes = [1.0, 1e-3, 2.0, 1.0, 0.0, 1e38 if dtype != torch.float16 else 1e4]
    values = [torch.randn(shape, generator=generator) * size for shape, size in zip(shapes, sizes, strict=True)]
    return [value.to(device, dtype) for value in values]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_norms_are_those_in_float64(dtype: torch.dtype, device: str) -> None:
    values = tensors(dtype, device)
    got = norms(values)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.cpu(), torch.stack([value.cpu().double().norm() for value in values]), rtol=1e-6, atol=0)
    assert torch.equal(got, norms(values))
    for layout in strided(values[0]):
        torch.testing.assert_close(norms([layout]), got[:1], rtol=1e-6, atol=0)


def test_an_infinity_or_a_nan_shows_in_the_norm_of_its_own_tensor(device: str) -> None:
    values = [torch.tensor(value, device=device) for value in ([1.0, torch.inf], [3.0, 4.0], [torch.nan, torch.inf], [-torch.inf])]
    torch.testing.assert_close(norms(values).cpu(), torch.tensor([torch.inf, 5, torch.nan, torch.inf]).double(), equal_nan=True)


@pytest.mark.slow
def test_norms_pass_opcheck(device: str) -> None:
    opcheck(norms, (tensors(torch.float32, device),), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
