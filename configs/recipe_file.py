"""Recipe files: YAML to a Recipe and back, by jsonargparse.

A file names the settings that differ from the defaults; a part is named by its kind, alone or with its fields.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from configs.data import LOCAL_KEYS, Data
from configs.errors import UserError, require_text
from configs.parts import FAMILIES, PriorPart, as_dict, default_kind, part_class
from configs.run_dir import read_yaml
from configs.schema import Recipe

RECIPES = Path(__file__).resolve().parent
DEFAULT_RECIPE = RECIPES / "digits.yaml"

SECTIONS: dict[str, type] = typing.get_type_hints(Recipe)
"""Section -> its class; for a part, and for `sampling`, the base of all kinds."""


def _typed_value(text: str) -> Any:
    """Parse an option's value. `null` is parsed before; other texts that YAML reads as null (`~`, `#1`) stay text."""
    value = get_loader("yaml")(text)
    return text if value is None else value


set_loader("typed", _typed_value, exceptions=(yaml.YAMLError,))


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_reworded(str(message)))


def _reworded(message: str) -> str:
    """Reword jsonargparse's message on a wrong type as "expected X, found Y"."""
    match = re.search(r'Parser key "(?P<key>[^"]+)":\s+Expected an? (?P<type>.+)\. Got value: (?P<value>.+)', message, re.DOTALL)
    if not match:
        return message
    expected = re.sub(r"<class '(.+?)'>", r"\1", match["type"]).replace("typing.Literal", "one of ")
    return f"{match['key']}: expected {expected}, found {match['value']}"


def families_of(sections: Sequence[str]) -> list[str]:
    """Return the families whose parts are chosen in these sections."""
    return [family for family in FAMILIES if family.partition(".")[0] in sections]


def _section_class(name: str, kinds: Mapping[str, str]) -> type:
    """Return the class of a section's fields under these kinds of parts."""
    if name == "sampling":
        return typing.cast(type[PriorPart], part_class("prior", kinds["prior"])).SAMPLING
    return part_class(name, kinds[name]) if name in FAMILIES else SECTIONS[name]


def build_parser(
    sections: Sequence[str], kinds: dict[str, str], flat: str | None = None, reads_images: bool = False, **kwargs: Any
) -> _Parser:
    """Build a parser of the sections' keys, including those of the parts' kinds. `reads_images`: add the local keys of `data`."""
    parser = _Parser(parser_mode="typed", allow_abbrev=False, print_config=None, add_help=bool(kwargs), **kwargs)
    for name in sections:
        if name not in FAMILIES:
            inside = {family.partition(".")[2] for family in FAMILIES if family.startswith(f"{name}.")}
            parser.add_class_arguments(_section_class(name, kinds), None if name == flat else name, skip=inside)
    if reads_images:
        parser.add_class_arguments(Data, "data", skip={field.name for field in dataclasses.fields(Data)} - set(LOCAL_KEYS))
    for family in families_of(sections):
        parser.add_class_arguments(part_class(family, kinds[family]), family)
        # A kind without fields has no group of options.
        group: Any = (parser.groups or {}).get(family, parser)
        names = ", ".join(FAMILIES[family])
        group.add_argument(f"--{family}.kind", type=str, default=kinds[family], help=f"{names}; each has its own options")
    return parser


@functools.cache
def _recipe_parser(kinds: tuple[tuple[str, str], ...]) -> _Parser:
    """Build the parser of a complete recipe with parts of these kinds; cached, because building takes longer than parsing."""
    return build_parser(tuple(SECTIONS), dict(kinds))


def build_recipe(values: Namespace, sections: Sequence[str], flat: str | None, base: Recipe | None) -> Recipe:
    """Build a recipe: `sections` from parsed values, the others from `base`."""
    built: dict[str, Any] = {}
    for name in SECTIONS:  # the prior, which decides the class of `sampling`, comes first
        if name not in sections:
            assert base is not None
            built[name] = getattr(base, name)
            continue
        section = built["prior"].SAMPLING if name == "sampling" else SECTIONS[name]
        if name == flat:
            names = [field.name for field in dataclasses.fields(section)]
            built[name] = section(**{key: values[key] for key in names})
        else:
            built[name] = _built(name, section, values[name])
    recipe = Recipe(**built)
    for key, value in flattened(recipe_dict(recipe)).items():
        require_text(key, value)
    return recipe


def _built(name: str, section: type, values: Any) -> Any:
    """Build a part, or a section of that class, from parsed values; other values stay as they are."""
    if not isinstance(values, Namespace):
        return values
    fields = {key: _built(f"{name}.{key}", section, value) for key, value in vars(values).items()}
    return part_class(name, fields.pop("kind"))(**fields) if name in FAMILIES else section(**fields)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file. Errors: UserError for a missing file, unknown key, wrong type or impossible value."""
    content = read_yaml(path)
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise UserError(f"{path}: expected sections {', '.join(SECTIONS)} with keys, found {content!r}")
    try:
        content, kinds = _spelled_out(content)
        _check_keys(content, kinds)
        recipe = build_recipe(_recipe_parser(tuple(kinds.items())).parse_object(content), tuple(SECTIONS), None, None)
        recipe.check()
        return recipe
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _spelled_out(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a copy of a recipe's content with each bare kind expanded to `{kind: name}`, and the kind of every part."""
    content, kinds = dict(content), {}
    for family in FAMILIES:
        section, _, key = family.partition(".")
        values = content.get(section, {})
        if key and key in values:
            # A copy, so that the argument does not change.
            content[section] = values = {**values, key: {"kind": values[key]} if isinstance(values[key], str) else values[key]}
            if not isinstance(values[key], dict):
                raise UserError(f"{family}: expected a kind, or a kind with its fields, found {values[key]!r}")
        kinds[family] = (values.get(key, {}) if key else values).get("kind", default_kind(family))
    return content, kinds


def _check_keys(content: dict[str, Any], kinds: dict[str, str]) -> None:
    """Errors: UserError for a key that is unknown in its section, or for the chosen kind of its part."""
    for name, section in content.items():
        if name not in SECTIONS:
            raise UserError(f"unknown key {name}; known are {', '.join(SECTIONS)}")
        for where, values in (
            (name, section),
            *((f"{name}.{key}", value) for key, value in section.items() if f"{name}.{key}" in FAMILIES),
        ):
            is_part = where in FAMILIES
            section_class = part_class(where, kinds[where]) if is_part else _section_class(name, kinds)
            known = [*(["kind"] if is_part else []), *(f.name for f in dataclasses.fields(section_class))]
            unknown = [key for key in values if key not in known]
            if unknown:
                kind = f" of kind {kinds[where]}" if is_part else f" for prior {kinds['prior']}" if name == "sampling" else ""
                raise UserError(f"unknown key {where}.{unknown[0]}; known{kind} are {', '.join(known)}")


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """Convert a recipe to plain dictionaries, for YAML and JSON."""
    return as_dict(recipe)


def flattened(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten the dictionaries of sections and parts into one with dotted keys; a field that is a mapping stays one."""
    result: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        result |= flattened(value, f"{name}.") if name in SECTIONS or name in FAMILIES else {name: value}
    return result
