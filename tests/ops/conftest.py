"""Where the Triton kernels run in these tests."""

import pytest
import torch


@pytest.fixture
def device() -> str:
    """The device of the tensors that Triton kernels get: a GPU where there is one, else the CPU, in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
