"""What a user gets: the wheel in an environment of its own, public names with types and examples, imports without side effects."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import typing
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import moecomm
import moecomm.functional as mf

CHECKOUT = Path(__file__).parents[2]
LAYER = """
import importlib, sys
import torch
import moecomm, moecomm.functional as mf
for name in ("", ".functional", ".mesh", ".layer", ".ops", ".ops.exchange", ".compile", ".compile.report"):
    print(importlib.import_module("moecomm" + name).__file__)
experts, weights = torch.tensor([[0, 1], [1, -1]]), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
plan = mf.plan(experts, weights, num_experts=2)
y = mf.combine(mf.dispatch(torch.eye(2), plan), plan)
torch.testing.assert_close(y, torch.tensor([[3.0, 0.0], [0.0, 3.0]]))
"""


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_of_the_checkout(folder: Path) -> Path:
    """A build leaves its litter beside what it builds: so it builds a copy."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(CHECKOUT, folder, ignore=ignored))


def environment_with_torch(folder: Path) -> tuple[Path, Path]:
    """A new environment's Python and its site-packages. It has this one's packages, but not its moecomm.

    A path in a .pth file is not searched for .pth files, and an editable moecomm is one.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "with_torch.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    return python, site


def sources(folder: Path) -> set[str]:
    """Every source of the library in a checkout, by its path in the installed package."""
    rooms = {"moecomm": "", "ops": "ops/", "compile": "compile/"}
    return {
        f"moecomm/{inside}{path.relative_to(folder / room)}" for room, inside in rooms.items() for path in (folder / room).rglob("*.py")
    }


@pytest.mark.slow
def test_a_wheel_made_of_the_sdist_has_every_source_and_works_outside_the_checkout(tmp_path: Path) -> None:
    source, built, wheels, environment = (tmp_path / name for name in ("source", "built", "wheels", "environment"))
    copy_of_the_checkout(source)
    rooms = ("moecomm", "ops", "compile", "tests", "tutorials", "benchmarks", "docs")
    files = {str(path.relative_to(source)) for room in rooms for path in (source / room).rglob("*") if path.is_file()}
    run(sys.executable, "-c", f"import setuptools.build_meta as build; build.build_sdist({str(built)!r})", cwd=source)
    [sdist] = built.iterdir()
    with tarfile.open(sdist) as archive:
        assert files | {"Makefile", "conftest.py", "constraints.txt", "requirements.lock", "README.md", "CHANGELOG.md"} <= {
            name.partition("/")[2] for name in archive.getnames()
        }
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", wheels, sdist, cwd=tmp_path)
    [wheel] = wheels.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    metadata = message_from_string(zipfile.ZipFile(wheel).read(f"moecomm-{moecomm.__version__}.dist-info/METADATA").decode())
    assert {"Summary", "Author", "License-Expression", "License-File", "Keywords", "Classifier", "Requires-Python"} <= set(metadata)
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert re.findall(r"\]\((?!https://)[^)]*\)", metadata.get_payload()) == []  # on PyPI a link between files leads nowhere
    assert {name.split("/")[0] for name in names} == {"moecomm", f"moecomm-{moecomm.__version__}.dist-info"}
    assert {name for name in names if name.endswith(".py")} == sources(CHECKOUT)

    python, site = environment_with_torch(environment)
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    for path in run(python, "-c", LAYER, cwd=tmp_path).split():
        assert Path(path).is_relative_to(environment)
    shutil.rmtree(site / "moecomm")
    hidden = subprocess.run([str(python), "-c", "import moecomm"], cwd=tmp_path, capture_output=True, text=True)
    assert "ModuleNotFoundError: No module named 'moecomm'" in hidden.stderr  # it was the wheel's, and nothing else's


@pytest.mark.slow
def test_an_editable_install_runs_the_checkout(tmp_path: Path) -> None:
    source = copy_of_the_checkout(tmp_path / "source")
    python, _ = environment_with_torch(tmp_path / "environment")
    options = ("--no-deps", "--no-build-isolation", "--no-index")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, "-e", source, cwd=tmp_path)
    for path in run(python, "-c", LAYER, cwd=tmp_path).split():
        assert Path(path).is_relative_to(source)


def test_every_file_has_the_same_version() -> None:
    citation = re.findall(r"^version: (.*)$", (CHECKOUT / "CITATION.cff").read_text(), re.MULTILINE)
    assert [tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"], *citation] == [moecomm.__version__] * 2
    heading, *released = re.findall(r"^## \[(.*)$", (CHECKOUT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading == "Unreleased]"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", each) for each in released)


IMPORTS = """
import sys
import torch.distributed as dist
import moecomm, moecomm.functional
print(sorted(name for name in sys.modules if name.startswith("moecomm.compile")), dist.is_initialized())
"""


@pytest.mark.slow
def test_the_functions_need_nothing_of_compile_and_importing_them_starts_nothing() -> None:
    assert run(sys.executable, "-W", "error", "-c", IMPORTS, cwd=CHECKOUT).strip() == "[] False"


def test_importing_moecomm_alone_is_importing_nothing_else() -> None:
    assert run(sys.executable, "-c", "import sys, moecomm; print('torch' in sys.modules)", cwd=CHECKOUT).strip() == "False"


@pytest.mark.parametrize("name", mf.__all__)
def test_every_public_name_has_an_example(name: str) -> None:
    documented = inspect.getdoc(getattr(mf, name))
    assert documented
    assert ">>> " in documented


@pytest.mark.parametrize("name", [name for name in mf.__all__ if inspect.isfunction(getattr(mf, name))])
def test_every_public_function_is_typed(name: str) -> None:
    function = getattr(mf, name)
    types = typing.get_type_hints(function)
    assert set(types) == {*inspect.signature(function).parameters, "return"}


def test_all_is_sorted_and_complete() -> None:
    public = [name for name in vars(mf) if not name.startswith("_") and not inspect.ismodule(getattr(mf, name))]
    assert mf.__all__ == sorted(mf.__all__)
    assert set(public) == set(mf.__all__)
