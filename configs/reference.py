"""Generator of docs/settings.md, the reference of all settings, from the recipe's classes: `make settings` runs it."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal

from configs.parts import FAMILIES, PriorPart, default_kind, part_class
from configs.recipe_file import SECTIONS
from configs.run_dir import REPOSITORY, write_text

PAGE = REPOSITORY / "docs" / "settings.md"
_HEAD = """# Settings

All settings of a recipe, by section. `make settings` writes this page from the classes that read recipes.

A recipe is a YAML file with these sections; [recipes.md](recipes.md) explains the format. On the command line a setting is an option of the
same name: `--stage1.lr 1e-3`. `sample.py` and `complete.py` take the settings of `sampling` without the section's name, and `evaluate.py`
those of `evaluation`. Where there is a `kind`, each kind has settings of its own; those of `sampling` depend on the prior's.
"""
_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", dict: "mapping", NoneType: "null"}


def write_page() -> None:
    """Write the page."""
    write_text(PAGE, page())


def page() -> str:
    """Compose the page."""
    lines = [_HEAD]
    for name, section in SECTIONS.items():
        lines += [f"## {name}", ""]
        lines += _sampling(section) if name == "sampling" else _kinds(name) if name in FAMILIES else _fields(name, section)
        for family in FAMILIES:
            if family.startswith(f"{name}."):
                lines += [f"### {family}", "", *_kinds(family)]
    return "\n".join(lines)


def _fields(name: str, section: type) -> Iterator[str]:
    """Yield the lines of a section: its summary and a table of its settings, without those that have kinds."""
    yield from (_summary(section), "")
    fields = [field for field in dataclasses.fields(section) if f"{name}.{field.name}" not in FAMILIES]
    yield from _table(
        ("setting", "values", "default", "meaning"), ([f"`{name}.{field.name}`", *_cells(section, field)] for field in fields)
    )


def _kinds(family: str) -> Iterator[str]:
    """Yield the lines of a family: its kinds, and their settings."""
    kinds = {kind: part_class(family, kind) for kind in FAMILIES[family]}
    yield from _table(
        (f"`{family}.kind`", "meaning"),
        ([f"`{kind}`{' (default)' * (kind == default_kind(family))}", _summary(part)] for kind, part in kinds.items()),
    )
    yield from _settings_by_kind(family, "kinds", kinds)


def _sampling(section: type) -> Iterator[str]:
    """Yield the lines of the section `sampling`, whose settings depend on the prior's kind."""
    yield from (_summary(section), "")
    parts = {kind: typing.cast(type[PriorPart], part_class("prior", kind)) for kind in FAMILIES["prior"]}
    yield from _settings_by_kind("sampling", "priors", {kind: part.SAMPLING for kind, part in parts.items()})


def _settings_by_kind(name: str, column: str, kinds: Mapping[str, type]) -> Iterator[str]:
    """Yield the lines of one table of the settings of all kinds, in which kinds that share a setting share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for kind, section in kinds.items():
        for field in dataclasses.fields(section):
            rows.setdefault((f"`{name}.{field.name}`", *_cells(section, field)), []).append(f"`{kind}`")
    columns = ("setting", column, "values", "default", "meaning")
    yield from _table(columns, ([setting, ", ".join(row_kinds), *cells] for (setting, *cells), row_kinds in rows.items()))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table and an empty line."""
    for cells in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _summary(section: type) -> str:
    """Return the first paragraph of a class's docstring, on one line."""
    return " ".join((inspect.getdoc(section) or "").partition("\n\n")[0].split())


def _cells(section: type, field: dataclasses.Field[Any]) -> list[str]:
    """Return a field's values, default and explanation."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    shown = default if isinstance(default, str) else json.dumps(default)
    return [_values(typing.get_type_hints(section)[field.name]), f"`{shown}`", _explanations(section)[field.name]]


def _values(hint: Any) -> str:
    """Name a type: `Literal["a", "b"] | None` is "`a`, `b`, null"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (UnionType, typing.Union):
        return ", ".join(map(_values, arguments))
    if origin in (list, tuple):
        return f"list of {_values(arguments[0])}s"
    return _WORDS[origin or hint]


@functools.cache
def _explanations(section: type) -> dict[str, str]:
    """Return the strings below the fields of a dataclass and its bases, on one line each."""
    explanations = {}
    for base in filter(dataclasses.is_dataclass, reversed(section.__mro__)):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for entry, text in itertools.pairwise(definition.body):
            match entry, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(explanation))):
                    explanations[name] = " ".join(explanation.split())
    return explanations
