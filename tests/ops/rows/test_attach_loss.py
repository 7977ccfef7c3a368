"""attach_loss: x, and a loss whose gradient is a constant."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from moecomm.ops.rows.attach_loss import attach_loss, loss_gradient
from tests.ops.cases import COMPOSED


@pytest.mark.slow
def test_attach_loss_passes_opcheck(device: str) -> None:
    for shape in ((3, 4), (0, 2), ()):
        x, loss = torch.ones(shape, device=device, requires_grad=True), torch.tensor(2.0, device=device, requires_grad=True)
        opcheck(attach_loss, (x, loss, 0.5), test_utils=COMPOSED)
        opcheck(attach_loss, (x.detach(), loss, 0.5), test_utils=COMPOSED)
        opcheck(attach_loss, (x, loss.detach(), 0.5), test_utils=COMPOSED)


@pytest.mark.slow
def test_the_gradient_of_a_loss_passes_opcheck() -> None:
    for dtype in (torch.float32, torch.float64):
        opcheck(loss_gradient, (torch.ones(2, 3), 0.5, dtype, torch.device("cpu")))
        assert loss_gradient(torch.ones(2, 3), 0.5, dtype, torch.device("cpu")).tolist() == 0.5
