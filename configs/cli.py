"""Recipe file + dotted overrides -> Recipe, by jsonargparse. Every script's command line is built here.

A script names the sections it may override; the rest of the recipe is fixed when stage 1 begins. Hyphens and
underscores are the same in option names.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from configs.errors import UserError, fail
from configs.run_dir import REPOSITORY, RunDir
from configs.schema import PRESETS, Prior, Recipe

set_parsing_settings(docstring_parse_attribute_docstrings=True)

DEFAULT_RECIPE = REPOSITORY / "configs" / "digits.yaml"
TRAIN_TOKENIZER = "accelerate launch stage1_vqvae/train.py"
EXTRACT_CODES = "python stage2_prior/extract_codes.py"
TRAIN_PRIOR = "accelerate launch stage2_prior/train.py"
SAMPLE = "python pipelines/sample.py --n 64"
SUMMARY = "python pipelines/summary.py"
EVALUATE = "python pipelines/evaluate.py"
REPORT = "python pipelines/report.py"

SECTIONS: dict[str, type] = {name: type(section) for name, section in vars(Recipe()).items()}


@dataclass(frozen=True)
class Command:
    """A command line, understood."""

    run: RunDir
    recipe: Recipe
    options: Namespace
    """The script's own options."""
    arguments: list[str]
    """As typed."""

    def need_tokenizer(self) -> None:
        """Errors: UserError if stage 1 has not finished in the run."""
        if not self.run.tokenizer.exists():
            command = f"{TRAIN_TOKENIZER} --resume --run {shlex.quote(str(self.run))}"
            raise UserError(f"{self.run}: stage 1 has not finished; run first: {command}")

    def next(self, command: str) -> str:
        """The command to type next, with `--run` unless this run is the one last touched."""
        last = RunDir.last_touched()
        if last is not None and last.path.resolve() == self.run.path.resolve():
            return command
        name = self.run.path.name if self.run.path.parent == REPOSITORY / "runs" else str(self.run)
        return f"{command} --run {shlex.quote(name)}"


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_plainly(str(message)))


def _plainly(message: str) -> str:
    """jsonargparse's message on a wrong type, in the words of all our messages."""
    found = re.search(r'Parser key "(?P<key>[^"]+)":\s+Expected an? (?P<type>.+)\. Got value: (?P<value>.+)', message, re.DOTALL)
    if not found:
        return message
    expected = re.sub(r"<class '(.+?)'>", r"\1", found["type"]).replace("typing.Literal", "one of ")
    return f"{found['key']}: expected {expected}, found {found['value']}"


def _parser(sections: Sequence[str], flat: str | None = None, **kwargs: Any) -> _Parser:
    parser = _Parser(allow_abbrev=False, print_config=None, add_help=bool(kwargs), **kwargs)
    for name in sections:
        parser.add_class_arguments(SECTIONS[name], None if name == flat else name)
    return parser


def _build(values: Namespace, sections: Sequence[str], flat: str | None, base: Recipe | None) -> Recipe:
    """`sections` from parsed values, the others from `base`."""
    built: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        if name == flat:
            own = [f.name for f in dataclasses.fields(section)]
            built[name] = section(**{key: values[key] for key in own})
        elif name in sections:
            built[name] = section(**vars(values[name]))
        elif base is not None:
            built[name] = getattr(base, name)
    return Recipe(**built)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file. Errors: UserError for a missing file, unknown key, wrong type or impossible value."""
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except OSError:
        raise UserError(f"{path}: expected a recipe (a YAML file), found no readable file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected YAML, found {error}") from None
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise UserError(f"{path}: expected sections {', '.join(SECTIONS)} with keys, found {content!r}")
    for name, section in content.items():
        known = [f.name for f in dataclasses.fields(SECTIONS[name])] if name in SECTIONS else list(SECTIONS)
        unknown = [f"{name}.{key}" for key in section if key not in known] if name in SECTIONS else [name]
        if unknown:
            raise UserError(f"{path}: unknown key {unknown[0]}; known are {', '.join(known)}")
    try:
        return _build(_parser(tuple(SECTIONS)).parse_object(content), tuple(SECTIONS), None, None)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain dictionaries, for YAML and JSON."""
    return dataclasses.asdict(recipe)


def differences(recipe: Recipe, other: Recipe, but: Sequence[str] = ()) -> list[str]:
    """Keys in which two recipes differ, as `section.key: A, not B`; sections and dotted keys in `but` aside."""
    found = []
    for section, values in recipe_dict(recipe).items():
        for key, value in values.items():
            there = getattr(getattr(other, section), key)
            if value != there and section not in but and f"{section}.{key}" not in but:
                found.append(f"{section}.{key}: {value}, not {there}")
    return found


def parse(
    description: str | None,
    sections: Sequence[str],
    argv: Sequence[str] | None = None,
    *,
    flat: str | None = None,
    starts_run: bool = False,
    begun_in: Callable[[RunDir, str | None], Path] | None = None,
    options: Callable[[ArgumentParser], None] = lambda parser: None,
) -> Command:
    """A script's command line.

    Args:
        description: the script's docstring.
        sections: the recipe's sections that this script may override.
        argv: arguments; None = the process's.
        flat: the one of `sections` whose options have no prefix.
        starts_run: whether this script may begin a run (stage 1) or needs one.
        begun_in: for a training script, its folder in the run, given `--name` (or else `--prior.kind`, a prior's name if it
            has no other): what was begun there goes on with the recipe it has there, and then `--config` only says which
            run is meant.
        options: adds the script's own options.
    Errors: exits with code 2 and one line on any mistake.
    """
    argv = [_underscored(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    where = _WhereParser(add_help=False, allow_abbrev=False)
    where.add_argument("--config", type=Path)
    where.add_argument("--run")
    where.add_argument("--name")
    where.add_argument("--prior.kind", dest="kind")
    where.add_argument("--prior.preset", dest="preset")
    where.add_argument("--resume", action="store_true")
    help_wanted = "--help" in argv or "-h" in argv
    try:
        known, _ = where.parse_known_args([argument for argument in argv if argument not in ("--help", "-h")])
        run, base = _locate(known, starts_run, help_wanted, begun_in)
        usage = "%(prog)s [--option value ...]"
        parser = _parser(sections, flat, usage=usage, description=description, formatter_class=_Help)
        parser.add_argument("--config", metavar="FILE", help="recipe; its run is runs/NAME (default: configs/digits.yaml)")
        parser.add_argument("--run", help="name of a run in runs/, or a path (default: the recipe's, else the run last touched)")
        parser.add_argument("--print_recipe", action="store_true", help="print the resolved recipe and do nothing")
        options(parser)
        parser.set_defaults(_defaults(base, sections, flat))
        values = parser.parse_args(argv)
        recipe = _build(values, sections, flat, base)
        if starts_run and recipe.data.path is not None:
            # Later commands may be typed elsewhere.
            path = str(Path(recipe.data.path).expanduser().resolve())
            recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=path))
    except ValueError as error:
        fail(str(error))
    if values.print_recipe:
        print(yaml.safe_dump(recipe_dict(recipe), sort_keys=False), end="")
        sys.exit(0)
    return Command(run, recipe, values, list(argv))


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _defaults(base: Recipe, sections: Sequence[str], flat: str | None) -> dict[str, Any]:
    defaults = {}
    for name in sections:
        for key, value in vars(getattr(base, name)).items():
            defaults[key if name == flat else f"{name}.{key}"] = value
    return defaults


def _locate(
    known: argparse.Namespace, starts_run: bool, help_wanted: bool, begun_in: Callable[[RunDir, str | None], Path] | None
) -> tuple[RunDir, Recipe]:
    """The run a command line means, and the recipe its overrides start from."""
    if known.run is not None:
        run = RunDir.named(known.run)
    elif known.config is not None:
        run = RunDir.named(known.config.stem)
    else:
        last = RunDir.last_touched() if known.resume or not starts_run else None
        run = last or RunDir.named(DEFAULT_RECIPE.stem)
    exists = run.exists()
    if exists and begun_in is not None:
        folder = begun_in(run, known.name or (known.kind if known.kind in PRESETS else None))
        own = run.recipe if starts_run else folder / "recipe.yaml"
        # A changed recipe file must not pass unnoticed, unless the user says to go on with what was begun.
        if RunDir.begun(folder) and own.exists() and (known.resume or known.config is None or not starts_run):
            return run, load_recipe(own)
    if starts_run:
        return run, _of_another_prior(load_recipe(known.config or DEFAULT_RECIPE), known)
    if exists:
        return run, _of_another_prior(load_recipe(run.recipe), known)
    if help_wanted:
        return run, load_recipe(known.config or DEFAULT_RECIPE)
    raise UserError(f"{run}: there is no such run; start it with: {TRAIN_TOKENIZER}")


def _of_another_prior(recipe: Recipe, known: argparse.Namespace) -> Recipe:
    """The recipe with the preset's sizes, if the command line asks for a preset or another kind: its own are another model's."""
    if known.preset is None and known.kind in (None, recipe.prior.kind):
        return recipe
    prior = dataclasses.replace(recipe.prior, layers=0, width=0, heads=0, attention_interval=0, kernel_size=Prior().kernel_size)
    return dataclasses.replace(recipe, prior=prior)


class _WhereParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, options with their defaults."""
