"""What moecomm runs on here, to paste into a bug report: `python -m moecomm.info`, or with `--json`."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

import moecomm

TESTED = {"torch": ("2.11", "2.13"), "triton": ("3.6", "3.9")}  # the oldest and the newest that the tests ran with
VARIABLES = ("CUDA_", "GLOO_", "HIP_", "MALLOC_", "NCCL_", "OMP_", "PYTORCH_", "TORCH", "TRITON_")


def environment() -> dict[str, str]:
    """The versions, devices, backends and settings that a result may depend on, by name.

    Example:
        >>> from moecomm.info import environment
        >>> environment()["moecomm"] == moecomm.__version__
        True
    """
    found = {"moecomm": moecomm.__version__, "python": platform.python_version(), "system": platform.platform()}
    for package in ("torch", "triton", "numpy"):
        found[package] = _version(package)
    found["CPU"] = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads of torch"
    found["GPUs"] = _gpus()
    found["backends"] = ", ".join(name for name in ("gloo", "nccl", "mpi", "ucc") if getattr(dist, f"is_{name}_available")()) or "none"
    found["CPU tensors take"] = "the paths of ATen and numpy"
    found["CUDA tensors take"] = _kernels()
    found |= {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    return found


def _version(package: str) -> str:
    try:
        found = version(package)
    except PackageNotFoundError:
        return "not installed"
    if package not in TESTED:
        return found
    oldest, newest = TESTED[package]
    tested = _numbers(oldest) <= _numbers(found) <= _numbers(newest)
    return found if tested else f"{found}, not tested: the tests ran with {oldest} to {newest}"


def _numbers(of: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(int(number) for number in of.split(".")[:2])


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch finds"
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(f"{gpu.name} ({gpu.major}.{gpu.minor}), {gpu.total_memory / 2**30:.0f} GiB" for gpu in names) + f"; {runtime}"


def _kernels() -> str:
    if _version("triton") == "not installed":
        return "no path: Triton is missing"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "Triton kernels" + ", in Triton's interpreter (TRITON_INTERPRET is set)" * interpreted


if __name__ == "__main__":
    lines = environment()
    if "--json" in sys.argv[1:]:
        print(json.dumps(lines, indent=2))
    else:
        width = max(map(len, lines))
        print("\n".join(f"{name:{width}}  {value}" for name, value in lines.items()))
