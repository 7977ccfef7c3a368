"""What every test and every doctest starts from."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each of the processes that run tests side by side has a core, and so has what it starts. Read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before moecomm is imported

# The examples of an integration are collected where its library is installed.
collect_ignore = [f"moecomm/integrations/{library}.py" for library in ("transformers", "torchtitan") if not find_spec(library)]


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, object]) -> None:
    """The examples in moecomm's docstrings take torch and moecomm's own functions as known."""
    import moecomm.functional as mf

    doctest_namespace.update({"torch": torch, "mf": mf}, **{name: getattr(mf, name) for name in mf.__all__})
