"""The documentation site: its examples print what they say, each of its pages opens, and every link of theirs leads somewhere."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

import moecomm.functional as mf
from tests.scripts import run_script

ROOT = Path(__file__).parents[2]
DOCS, SITE = ROOT / "docs", ROOT / "build" / "site"
SOURCES = ("docs", "moecomm", "ops", "compile", "mkdocs.yml", "README.md", "CONTRIBUTING.md")
ON_RANKS = ("guide", "concepts", "fsdp2", "checkpoints", "placement", "debugging")  # pages with code for several ranks
NAMES = (*ON_RANKS, "numerics", "from_fastmoe", "from_megatron", "from_deepspeed", "from_tutel")
# Code that runs: the ranks that run it, if there are several; and what it prints, up to rounding.
EXAMPLE = re.compile(r"(?:<!-- ([^>\n]*\d ranks?[^>\n]*) -->\n)?```python\n(.*?)```\n(?:(?:(?!```).)*```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+")


def examples(page: str) -> list[tuple[list[int], str, str]]:
    found = EXAMPLE.findall((DOCS / f"{page}.md").read_text())
    return [([int(ranks) for ranks in re.findall(r"(\d) rank", where)], code, printed) for where, code, printed in found]


def assert_prints(printed: str, said: str) -> None:
    """The same text; numbers that are written with a point may be rounded otherwise."""
    assert NUMBER.sub("_", printed) == NUMBER.sub("_", said)
    assert [float(x) for x in NUMBER.findall(printed)] == pytest.approx([float(x) for x in NUMBER.findall(said)], rel=0.1)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # a checkpoint of one process
@pytest.mark.parametrize("page", NAMES)
def test_the_examples_of_a_page_run_and_print_what_it_says(page: str) -> None:
    assert examples(page)
    for ranks, code, said in examples(page):
        if not ranks:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, {"__name__": "example"})
            if "print(" in code:
                assert_prints(printed.getvalue(), said)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [name if name in ("concepts", "debugging") else pytest.param(name, marks=pytest.mark.exhaustive) for name in ON_RANKS]
)
def test_the_examples_of_a_page_run_on_several_ranks(page: str, tmp_path: Path) -> None:
    several = [(ranks, code, said) for ranks, code, said in examples(page) if ranks]
    assert several
    for ranks, code, said in several:
        (tmp_path / "train.py").write_text(code)
        printed = [run_script(tmp_path / "train.py", number, tmp_path) for number in ranks]
        for each in printed if page == "guide" else ["".join(printed)]:  # of the guide, each prints the same
            assert_prints(each, said)


@pytest.mark.exhaustive
def test_the_layer_of_the_guide_trains_alike_when_it_is_compiled(tmp_path: Path) -> None:
    ((_, code, said),) = [each for each in examples("guide") if each[0]]
    eager, compiled = "    step = layer\n", "    step = torch.compile(layer, fullgraph=True)\n"
    assert eager in code
    assert compiled in (DOCS / "guide.md").read_text()
    (tmp_path / "train.py").write_text(code.replace(eager, compiled))
    assert_prints(run_script(tmp_path / "train.py", 1, tmp_path, force_backend="aot_eager"), said)


def test_tests_that_a_page_names_exist() -> None:
    named = {name for page in DOCS.glob("*.md") for name in re.findall(r"`(test_\w+)`", page.read_text())}
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py")), re.MULTILINE))
    assert named
    assert named - defined == set()


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_drawings_are_those_that_their_program_draws() -> None:
    drawn = dict(module("drawings").drawings())
    assert drawn == {path.name: path.read_text() for path in DOCS.glob("*.svg")}


DOCSTRING = """A function.

Args:
    x: [T, D], in one of two
        ways:
        - one;
        - another.
        More of it.

Raises:
    TypeError, ValueError: an argument is wrong.
    All before anything is sent.

Example::

    y = f(x)

Backward: to ``x``, as in `combine`. docs/plan.md has more.

===  =======
a    what
===  =======
b    this
     and that
===  =======

>>> f(1)
1
"""
MARKDOWN = """A function.

**Args**

- ``x``: [T, D], in one of two
    ways:

    - one;
    - another.

    More of it.

**Raises**

- `TypeError`, `ValueError`: an argument is wrong.

All before anything is sent.

**Example**

```python
y = f(x)
```

**Backward:** to ``x``, as in [`combine`][moecomm.functional.combine]. [docs/plan.md](../plan.md) has more.

| a | what |
| --- | --- |
| b | this and that |

```pycon
>>> f(1)
1
```"""


def test_a_docstring_becomes_markdown() -> None:
    pytest.importorskip("griffe", reason="the site's tools are not installed")
    assert re.sub(r"\n{3,}", "\n\n", module("docstrings").markdown(DOCSTRING)).strip() == MARKDOWN


class Page(NamedTuple):
    """A page's links and pictures, the places in it that a link can name, and its HTML."""

    links: list[str]
    places: set[str]
    html: str


def read(path: Path) -> Page:
    html = path.read_text()
    links, places = (re.findall(rf'<[^>]* {of}=("[^"]*"|[^\s>]+)', html) for of in ("(?:href|src)", "id"))
    return Page([unescape(link.strip('"')) for link in links], {unescape(place.strip('"')) for place in places}, html)


def newest() -> float:
    files = [file for name in SOURCES for file in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))]
    return max(file.stat().st_mtime for file in files if file.suffix != ".pyc" and file.name != "__pycache__" and file.is_file())


@pytest.fixture(scope="module")
def site() -> dict[Path, Page]:
    """The pages of the site that ``make docs`` has built. Built here, as strictly, if it is not there or older than its sources."""
    pytest.importorskip("mkdocs", reason="the site's tools are not installed")
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may run other tests of this file
        if not (SITE / "index.html").exists() or (SITE / "index.html").stat().st_mtime < newest():
            command = [sys.executable, "-m", "mkdocs", "build", "--strict"]  # quiet would count no warning
            built = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
            assert built.returncode == 0, built.stdout + built.stderr
    return {path: read(path) for path in SITE.rglob("*.html")}


@pytest.mark.slow
def test_every_link_and_picture_of_every_page_is_there(site: dict[Path, Page]) -> None:
    assert {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")} <= {path.relative_to(SITE) for path in site}
    files, missing, followed = set(SITE.rglob("*")), [], 0
    for path, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or path.name == "404.html":  # of another server; 404.html is read from any place
                continue
            target = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            target = target / "index.html" if target / "index.html" in files else target
            followed += 1
            if target not in files or (parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in site[target].places):
                missing.append(f"{path.relative_to(SITE)}: {link}")
    assert missing == []
    assert followed > 1000


@pytest.mark.slow
def test_every_public_function_is_in_the_reference(site: dict[Path, Page]) -> None:
    entries = site[SITE / "reference" / "functional.html"].places
    assert {f"moecomm.functional.{name}" for name in mf.__all__} <= entries


@pytest.mark.slow
def test_no_page_shows_the_layout_of_a_docstring_or_asks_another_server_for_a_part_of_itself(site: dict[Path, Page]) -> None:
    text = {path.name: re.sub("<[^>]*>", "", page.html) for path, page in site.items() if path.parent.name == "reference"}
    assert [name for name, shown in text.items() if re.search(r"\w+::(?!\w)|={5,}|^ *:::", shown)] == []
    loaded = re.compile(r'<(?:script|img|iframe|source)[^>]*?src="?https?://|<link[^>]*?rel="?stylesheet"?[^>]*?https?://')
    assert [path.name for path in site if loaded.search(site[path].html)] == []
