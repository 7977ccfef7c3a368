"""What is locked is what is tested, by hash; and the audit of it never takes what it could not ask about for clean."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    return {normal(name): version for name, version in re.findall(r"^([\w.-]+)==([^\s;+]+)", text, re.MULTILINE)}


def test_the_lock_has_the_tested_versions() -> None:
    assert pins(LOCK) == pins((ROOT / "constraints.txt").read_text())


def test_every_locked_package_has_its_hashes() -> None:
    packages = re.split(r"^(?=[\w.-]+==)", LOCK, flags=re.MULTILINE)[1:]
    assert len(packages) == len(pins(LOCK))
    for package in packages:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", package), package


def test_whatever_a_contributor_needs_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"--extra (\w+)", (ROOT / "Makefile").read_text())  # torchtitan's packages contradict these
    assert extras
    wanted = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    assert {normal(re.match(r"[\w.-]+", each)[0]) for each in wanted} <= set(pins(LOCK))  # type: ignore[index]


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CLEAN = {"name": "numpy", "version": "2.4.6", "vulns": []}
FOUND = {"name": "pillow", "version": "13.0.0", "vulns": [{"id": "CVE-1", "fix_versions": ["13.0.1"]}]}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("packages", "code", "message"),
    [
        ([CLEAN], 0, "no known vulnerability in 1 packages"),
        ([CLEAN, FOUND], 1, "known vulnerabilities:\npillow 13.0.0: CVE-1, mended in ['13.0.1']"),
        ([CLEAN, FOUND, UNKNOWN], 1, "known vulnerabilities:\npillow 13.0.0: CVE-1, mended in ['13.0.1']\nnot audited: torch"),
        ([CLEAN, UNKNOWN], 2, "not audited: torch; no known vulnerability in the other 1 packages"),
        ([UNKNOWN], 2, "not audited: the index that is reached from here tells of vulnerabilities of none of 1 packages"),
        ([], 2, "not audited: the index that is reached from here tells of vulnerabilities of none of 0 packages"),
    ],
)
def test_the_audit_tells_clean_found_and_unknown_apart(audit: ModuleType, packages: list[Any], code: int, message: str) -> None:
    assert audit.verdict(json.dumps({"dependencies": packages}), "") == (code, message)


def test_no_answer_is_no_clean_audit(audit: ModuleType) -> None:
    code, message = audit.verdict("", "ConnectionError: the name could not be resolved")
    assert code == 2
    assert message == "not audited: the index could not be reached, or pip-audit failed:\nConnectionError: the name could not be resolved"


def test_a_build_of_torch_is_asked_about_as_the_version_that_it_is(audit: ModuleType) -> None:
    assert "\ntorch==2.13.0+cpu \\\n" in LOCK
    assert "\ntorch==2.13.0 \\\n" in audit.as_published(LOCK)
    assert pins(audit.as_published(LOCK)) == pins(LOCK)
