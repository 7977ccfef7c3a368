"""What MkDocs does for this site beside rendering docs/*.md, which are written for GitHub.

- A link out of docs/ leads to a page of the site that shows the file; a picture there is copied.
- A file of the repository that a page names in backticks is linked, too.
- A function at the head of a table's row is a link to its entry in the reference.
- ``<!-- README: heading -->`` shows that section of README.
- The reference reads the package as it is installed: `moecomm.ops` and `moecomm.compile` lie beside it here.
"""

from __future__ import annotations

import os
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "build" / "package"
LINK = re.compile(r"\]\((?!\w+:)([\w./-]+)((?:#[\w-]+)?)\)")
NAMED = re.compile(r"(?<![`\[])`((?:moecomm|ops|compile|tests|tutorials|benchmarks)/[\w./-]+\.py)`(?!\])")
README = re.compile(r"^<!-- README: (.+) -->$", re.MULTILINE)
ROW = re.compile(r"^\| (`(\w+)(?:\([^`]*\))?`) \|", re.MULTILINE)
ENTRY = re.compile(r"^::: (moecomm\.functional\.(\w+))$", re.MULTILINE)
PICTURES = (".png", ".svg")


def on_startup(**_: Any) -> None:
    """Before mkdocstrings looks for the package: it forgets a folder that is not there yet."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    for folder, installed in (("moecomm", ""), ("ops", "ops"), ("compile", "compile")):
        shutil.copytree(ROOT / folder, PACKAGE / "moecomm" / installed, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to or name outside docs/, and what these pages link to."""
    todo = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    while todo:
        page = todo.pop()
        for path in [linked(page, target) for target, _ in LINK.findall(text_of(page))] + [
            source(name) for name in NAMED.findall(text_of(page))
        ]:
            uri = place(path)
            if path.startswith("docs/") or files.get_file_from_path(uri) or not (ROOT / path).is_file():
                continue
            if path.endswith(PICTURES):
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
            elif path.endswith(".md"):
                files.append(File.generated(config, uri, content=text_of(path)))
                todo.append(path)
            else:
                code = f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n\n# {path}\n\n~~~~python\n{text_of(path)}\n~~~~\n"
                files.append(File.generated(config, uri, content=code))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    uri = page.file.src_uri
    if uri.startswith("repository/") and uri.endswith(".py.md"):
        return markdown
    of = uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"
    markdown = README.sub(lambda found: relinked(section(found[1]), "README.md", uri), markdown)
    markdown = ROW.sub(lambda found: f"| [{found[1]}][{entries()[found[2]]}] |" if found[2] in entries() else found[0], markdown)
    return relinked(markdown, of, uri)


def relinked(markdown: str, of: str, uri: str) -> str:
    """Text of the file ``of``, with its links as they must be in the site's page ``uri``."""
    here = os.path.dirname(uri)
    markdown = LINK.sub(lambda found: f"]({os.path.relpath(place(linked(of, found[1])), here)}{found[2]})", markdown)

    def named(found: re.Match[str]) -> str:
        path = source(found[1])
        return f"[{found[0]}]({os.path.relpath(place(path), here)})" if (ROOT / path).is_file() else found[0]

    return NAMED.sub(named, markdown)


@cache
def entries() -> dict[str, str]:
    """The functions that the reference has, each with its identifier there."""
    return {name: identifier for identifier, name in ENTRY.findall(text_of("docs/reference/functional.md"))}


def text_of(path: str) -> str:
    return (ROOT / path).read_text()


def linked(page: str, target: str) -> str:
    """The path in the repository of what a file there links to."""
    return os.path.normpath(os.path.join(os.path.dirname(page), target))


def source(name: str) -> str:
    """The path in the repository of a file of the installed package."""
    return re.sub(r"^moecomm/(ops|compile)/", r"\1/", name)


def place(path: str) -> str:
    """Where the site has a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith((".md", *PICTURES)) else f"repository/{path}.md"


def section(heading: str) -> str:
    """A section of README, with its heading."""
    found = re.search(rf"^## {re.escape(heading)}\n.*?(?=^## )", text_of("README.md"), re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"README.md has no section {heading!r}")
    return found[0]
