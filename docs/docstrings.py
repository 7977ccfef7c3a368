"""An extension of griffe, which reads the docstrings for the reference: it turns their layout into Markdown.

Sections get a bold title, entries of Args and Raises become lists, examples and tables those of Markdown, and the name of a public
function in backticks a link to it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import griffe

ROOT = Path(__file__).parents[1]
SECTION = re.compile(r"^(Args|Returns|Raises|Example)\b([^:]*)::?$")
ENTRY = re.compile(r"^(\*{0,2}\w+(?:, [\w ]+)*):(?: (.*))?$")
LEAD = re.compile(r"^([A-Z]\w*(?: \w+){0,3}(?: \([^)]*\))?:)(?= |$)")
TABLE = re.compile(r"^( *)==+ +==.*\n(?: *\S.*\n)+? *==+ +==.*(?:\n(?: *\S.*\n)+? *==+ +==.*)?$", re.MULTILINE)
NAME = re.compile(r"(?<![`\w])`(\w+)`(?!`)")


class Markdown(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Make the fields of a NamedTuple a list below its docstring, each with the comment behind it."""
        fields = [field for field in cls.members.values() if field.is_attribute]
        if cls.docstring is None or not fields:
            return
        items = []
        for field in fields:
            code, _, comment = field.source.partition("  # ")
            items.append(f"- `{code.strip()}`" + (f": {comment.strip()}" if comment else ""))
            cls.del_member(field.name)
        cls.docstring.value += linked("\n\n**Fields**\n\n" + "\n".join(items))


def markdown(text: str) -> str:
    out: list[str] = []
    lines = TABLE.sub(table, text).splitlines()
    while lines:
        if not lines[0]:
            end = 1
            out.append("")
        elif (title := SECTION.match(lines[0])) and next(filter(None, lines[1:]), "").startswith("    "):
            end = next((i for i, line in enumerate(lines[1:], 1) if line and line[0] != " "), len(lines))
            body = dedent("\n".join(lines[1:end])).strip().splitlines()
            out += ["", f"**{title[1]}{title[2]}**", "", *(examples(body) if title[1] == "Example" else entries(body)), ""]
        else:
            end = next((i for i, line in enumerate(lines[1:], 1) if not line or SECTION.match(line)), len(lines))
            paragraph = lines[:end]
            if paragraph[0].startswith(">>>"):
                out += examples(paragraph)
            else:
                out += spaced([LEAD.sub(r"**\1**", paragraph[0]) if out else paragraph[0], *paragraph[1:]])
        del lines[:end]
    return linked("\n".join(out))


def entries(body: list[str]) -> list[str]:
    """``name: text`` and what is indented below it, as items of a list; other text as it is."""
    out: list[str] = []
    for line in body:
        if entry := ENTRY.match(line):
            names = ", ".join(written(name) for name in entry[1].split(", "))
            out.append(f"- {names}: {entry[2] or ''}")
        elif line and line[0] != " " and out and out[-1].startswith(("- ", "    ")):
            out += ["", line]
        else:
            out.append(line)
    return spaced(out)


def written(name: str) -> str:
    """A name at the head of an entry: an error may be a link, an argument is not the function of its name; other words are text."""
    if not (name.startswith("*") or name.isidentifier()):
        return name
    return f"`{name}`" if name.endswith("Error") else f"``{name}``"


def spaced(lines: list[str]) -> list[str]:
    """Blank lines around the lists in a text, which Markdown needs and docstrings lack."""
    out: list[str] = []
    inside: int | None = None  # the indentation of the list that the line before belongs to
    for line in lines:
        indentation = len(line) - len(line.lstrip())
        item = line.lstrip().startswith("- ")
        if (item and (inside is None or indentation > inside)) or (not item and inside is not None and line and indentation <= inside):
            out.append("")
        if line:
            inside = indentation if item else inside if inside is not None and indentation > inside else None
        out.append(line)
    return out


def examples(body: list[str]) -> list[str]:
    """Sessions at the prompt in fences; a body without any is one piece of code, and text between sessions is text."""
    if not any(line.startswith(">>>") for line in body):
        return ["```python", *body, "```"]
    out: list[str] = []
    for block in "\n".join(body).split("\n\n"):
        out += ["", "```pycon", *block.splitlines(), "```", ""] if block.startswith(">>>") else ["", block, ""]
    return out


def table(found: re.Match[str]) -> str:
    """A simple table of reStructuredText, with a head or without. A row of which one side is empty continues the one above."""
    lines = dedent(found[0]).splitlines()
    starts = [column.start() for column in re.finditer(r"=+", lines[0])]
    rows: list[list[str]] = [] if sum(line.startswith("==") for line in lines) == 3 else [[""] * len(starts)]
    for line in lines:
        cells = [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        if line.startswith("=="):
            continue
        if cells[0] and any(cells[1:]):
            rows.append(cells)
        else:
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    return indent("\n" + "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(starts), *rows[1:])) + "\n", found[1])


def public() -> dict[str, str]:
    """Each public name, and its identifier in the reference."""
    names = {name: "moecomm.errors." + name for name in ("MoECommError", "ExpertIdError")}
    for module, file in (("planner", "planner/__init__.py"), ("mesh", "mesh.py"), ("functional", "functional.py")):
        for node in ast.parse((ROOT / "moecomm" / file).read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                for name in ast.literal_eval(node.value):
                    hidden = (ROOT / "moecomm" / module / f"{name}.py").exists()  # a module of the function's name is found in its place
                    names[name] = f"moecomm.{module}.{name}.{name}" if hidden else f"moecomm.{module}.{name}"
    return names


PUBLIC = public()


def linked(text: str) -> str:
    """Names of public functions in single backticks, and pages of docs/, as links. Code in fences stays."""
    text = re.sub(r"(?<![`/\w])docs/(\w+)\.md", r"[docs/\1.md](../\1.md)", text)
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else NAME.sub(_link, part) for part in parts)


def _link(found: re.Match[str]) -> str:
    return f"[`{found[1]}`][{PUBLIC[found[1]]}]" if found[1] in PUBLIC else found[0]
