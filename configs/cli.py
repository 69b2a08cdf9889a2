"""Command lines: a recipe file and dotted options become a Recipe, by jsonargparse.

Every script names the sections that it may override; the rest of the recipe is fixed when stage 1 starts. Hyphens and underscores are
equivalent in option names.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import shlex
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader, set_parsing_settings

from configs.data import LOCAL_KEYS, Data
from configs.errors import UserError, fail, require_text
from configs.hub import run_of
from configs.parts import FAMILIES, as_class, as_dict, default_kind, part_class
from configs.run_dir import RunDir, checkout, read_yaml, runs_folder, typed
from configs.schema import PriorPart, Recipe, with_prior

RECIPES = Path(__file__).resolve().parent
DEFAULT_RECIPE = RECIPES / "digits.yaml"
TRAIN_TOKENIZER = typed("stage1_vqvae/train.py", launched=True)
EXTRACT_CODES = typed("stage2_prior/extract_codes.py")
TRAIN_PRIOR = typed("stage2_prior/train.py", launched=True)
SAMPLE = typed("pipelines/sample.py") + " --n 64"
SUMMARY = typed("pipelines/summary.py")
EVALUATE = typed("pipelines/evaluate.py")
REPORT = typed("pipelines/report.py")

SECTIONS: dict[str, type] = typing.get_type_hints(Recipe)
"""Section -> its class; for a part, and for `sampling`, the base of all kinds."""


@dataclass(frozen=True)
class Command:
    """A script's parsed command line."""

    run: RunDir
    recipe: Recipe
    options: Namespace
    """The script's options outside the recipe."""
    arguments: list[str]
    """Arguments as typed."""

    def need_tokenizer(self) -> None:
        """Errors: UserError if stage 1 has not finished in the run."""
        if not self.run.tokenizer.exists():
            command = f"{TRAIN_TOKENIZER} --resume --run {shlex.quote(str(self.run))}"
            raise UserError(f"{self.run}: stage 1 has not finished; run first: {command}")

    def next(self, command: str) -> str:
        """Return the command to type next, with `--run` unless this run was used last."""
        last = RunDir.last_touched()
        if last is not None and last.path.resolve() == self.run.path.resolve():
            return command
        name = self.run.path.name if self.run.path.parent == runs_folder() else str(self.run)
        return f"{command} --run {shlex.quote(name)}"


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


def _families(sections: Sequence[str]) -> list[str]:
    """Return the families whose parts are chosen in these sections."""
    return [family for family in FAMILIES if family.partition(".")[0] in sections]


def _section_class(name: str, kinds: Mapping[str, str]) -> type:
    """Return the class of a section's fields under these kinds of parts."""
    if name == "sampling":
        return typing.cast(type[PriorPart], part_class("prior", kinds["prior"])).SAMPLING
    return part_class(name, kinds[name]) if name in FAMILIES else SECTIONS[name]


def _parser(sections: Sequence[str], kinds: dict[str, str], flat: str | None = None, reads_images: bool = False, **kwargs: Any) -> _Parser:
    """Build a parser of the sections' keys, including those of the parts' kinds. `reads_images`: add the local keys of `data`."""
    parser = _Parser(parser_mode="typed", allow_abbrev=False, print_config=None, add_help=bool(kwargs), **kwargs)
    for name in sections:
        if name not in FAMILIES:
            inside = {family.partition(".")[2] for family in FAMILIES if family.startswith(f"{name}.")}
            parser.add_class_arguments(_section_class(name, kinds), None if name == flat else name, skip=inside)
    if reads_images:
        parser.add_class_arguments(Data, "data", skip={field.name for field in dataclasses.fields(Data)} - set(LOCAL_KEYS))
    for family in _families(sections):
        parser.add_class_arguments(part_class(family, kinds[family]), family)
        # A kind without fields has no group of options.
        group: Any = (parser.groups or {}).get(family, parser)
        names = ", ".join(FAMILIES[family])
        group.add_argument(f"--{family}.kind", type=str, default=kinds[family], help=f"{names}; each has its own options")
    return parser


@functools.cache
def _recipe_parser(kinds: tuple[tuple[str, str], ...]) -> _Parser:
    """Build the parser of a complete recipe with parts of these kinds; cached, because building takes longer than parsing."""
    return _parser(tuple(SECTIONS), dict(kinds))


def _build(values: Namespace, sections: Sequence[str], flat: str | None, base: Recipe | None) -> Recipe:
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
        recipe = _build(_recipe_parser(tuple(kinds.items())).parse_object(content), tuple(SECTIONS), None, None)
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


def differences(recipe: Recipe, other: Recipe, ignored: Sequence[str] = ()) -> list[str]:
    """Return the keys in which two recipes differ, as `section.key: A, not B`; `ignored`: sections and dotted keys to skip."""
    ours, theirs = flattened(recipe_dict(recipe)), flattened(recipe_dict(other))
    lines = []
    for key, value in ours.items():
        # Fields that only one of two kinds has are skipped: the line of the kind itself tells it.
        if key in theirs and value != theirs[key] and key not in ignored and key.partition(".")[0] not in ignored:
            lines.append(f"{key}: {value}, not {theirs[key]}")
    return lines


def parse(
    description: str | None,
    sections: Sequence[str],
    argv: Sequence[str] | None = None,
    *,
    flat: str | None = None,
    starts_run: bool = False,
    training_folder: Callable[[RunDir, str | None, str | None], Path] | None = None,
    drawn_prior: Callable[[RunDir, str | None], PriorPart | None] | None = None,
    reads_images: bool = False,
    options: Callable[[ArgumentParser], None] = lambda parser: None,
    check: bool = True,
) -> Command:
    """Parse a script's command line.

    Args:
        description: the script's docstring.
        sections: the recipe's sections that this script may override.
        argv: arguments; None: those of the process.
        flat: the section of `sections` whose options have no prefix.
        starts_run: whether this script may start a run (stage 1) or needs an existing one.
        training_folder: for a training script, returns the training's folder from the run, `--name` (by default `--prior.kind`, unless
            there is a level) and `--level`. A training started there continues with its own recipe, and `--config` only selects the run.
        drawn_prior: for a script that draws samples, returns the fields of the prior from the run and `--prior`; its kind decides the
            settings of `sampling`. None: the recipe's own prior.
        reads_images: whether this script may override the local keys of `data`: where the data set is on this machine, and how it is read.
        options: adds the script's own options.
        check: whether the recipe's sections must fit one another; False where the script replaces some.
    Errors: exits with code 2 and one line on any mistake.
    """
    argv = [_spelled(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    shows_help = "--help" in argv or "-h" in argv
    # The fields' docstrings are their help. Extracting them is slow, so it is done for --help alone.
    set_parsing_settings(docstring_parse_attribute_docstrings=shows_help)
    try:
        _refuse_empty(argv)
        run_parser = _run_parser(_families(sections))
        known, _ = run_parser.parse_known_args([argument for argument in argv if argument not in ("--help", "-h")])
        run, base, saved, started = _locate(known, starts_run, shows_help, training_folder)
        if starts_run and not started:
            base = _with_tokenizer_of(known, base, saved)
        base = _with_parts(base if started else _with_counted_steps(base, argv), known)
        if drawn_prior is not None and (prior := drawn_prior(run, known.prior_name)) is not None:
            base = with_prior(base, prior)
        kinds = {family: _part(base, family).kind for family in FAMILIES}
        usage = "%(prog)s [--option value ...]"
        parser = _parser(sections, kinds, flat, reads_images, usage=usage, description=_localised(description), formatter_class=_Help)
        _add_run_options(parser)
        options(parser)
        if reads_images or training_folder is not None:
            accept_option(parser)
        parser.set_defaults(_defaults(base, sections, flat))
        if reads_images:
            parser.set_defaults({f"data.{key}": getattr(base.data, key) for key in LOCAL_KEYS})
        values = parser.parse_args(argv)
        recipe = _build(values, sections, flat, base)
        if reads_images:
            recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **vars(values.data)))
        if check:
            recipe.check()
        if starts_run:
            recipe = _with_absolute_paths(recipe)
    except ValueError as error:
        fail(str(error))
    if values.print_recipe:
        print(yaml.safe_dump(recipe_dict(recipe), sort_keys=False), end="")
        sys.exit(0)
    return Command(run, recipe, values, list(argv))


def _run_parser(families: Sequence[str]) -> _RunParser:
    """Build a parser of the options that select the run, its recipe and the kinds of parts, which decide all other options."""
    parser = _RunParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=_recipe_path)
    parser.add_argument("--run")
    parser.add_argument("--name")
    parser.add_argument("--level")
    parser.add_argument("--prior.preset", dest="preset")
    parser.add_argument("--prior", dest="prior_name")
    parser.add_argument("--stage1.init_from", dest="init_from")
    parser.add_argument("--resume", action="store_true")
    for family in families:
        parser.add_argument(f"--{family}.kind", dest=family)
    return parser


def _add_run_options(parser: ArgumentParser) -> None:
    """Add the options of every script: the recipe, the run, and printing the resolved recipe."""
    parser.add_argument("--config", metavar="FILE", help="recipe; its run is runs/NAME (default: configs/digits.yaml)")
    parser.add_argument("--run", help="name of a run in runs/, a path, or hf:USER/NAME (default: the recipe's, else the run last touched)")
    parser.add_argument("--print_recipe", action="store_true", help="print the resolved recipe and do nothing")


def accept_option(parser: ArgumentParser) -> None:
    """Add the option that accepts changed data."""
    accepted = "go on although images, classes or codes have changed since training started (data.json)"
    parser.add_argument("--accept_changed_data", action="store_true", help=accepted)


def _localised(description: str | None) -> str | None:
    """Return a script's docstring with its commands as they are typed on this installation."""

    def command(match: re.Match[str]) -> str:
        return typed(match["script"], match["program"] != "python") if checkout() is None else match[0]

    return re.sub(r"(?P<program>python|accelerate launch) (?P<script>(stage\d_\w+|pipelines)/\w+\.py)", command, description or "") or None


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute paths: later commands may run in another folder."""

    def absolute(section: Any, key: str) -> Any:
        path = getattr(section, key, None)
        return section if path is None else dataclasses.replace(section, **{key: str(Path(path).expanduser().resolve())})

    stage1 = recipe.stage1
    if stage1.init_from is not None:
        stage1 = dataclasses.replace(stage1, init_from=str(run_of(stage1.init_from).path.resolve()))
    terms: dict[str, Any] = {name: absolute(getattr(stage1, name), "weights") for name in ("perceptual", "adversarial")}
    return dataclasses.replace(recipe, data=absolute(absolute(recipe.data, "path"), "cache"), stage1=dataclasses.replace(stage1, **terms))


def _refuse_empty(argv: Sequence[str]) -> None:
    """Errors: UserError that names an option with an empty value, such as an unset shell variable."""
    option = "the command line"
    for argument in argv:
        is_option = argument.startswith("--")
        name, equals, value = argument.partition("=")
        option = name if is_option else option
        if equals or not is_option:
            require_text(option, value if is_option else argument)


def _spelled(argument: str) -> str:
    """Normalise an argument for the parser: underscores for hyphens, and a part named alone means its kind."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    if name == "init_from":
        name = "stage1.init_from"
    if name in FAMILIES and "." in name:
        name += ".kind"
    return f"--{name}{equals}{value}"


def _recipe_path(typed: str) -> Path:
    """Return the recipe's path as typed; if there is no such file, that of the shipped recipe of this name."""
    path = Path(typed).expanduser()
    shipped = RECIPES / path.name
    return shipped if not path.exists() and str(path.parent) in (".", RECIPES.name) and shipped.exists() else path


def _part(recipe: Recipe, family: str) -> Any:
    """Return a recipe's part of a family."""
    part: Any = recipe
    for name in family.split("."):
        part = getattr(part, name)
    return part


def _defaults(base: Recipe, sections: Sequence[str], flat: str | None) -> dict[str, Any]:
    values = flattened({name: as_dict(getattr(base, name)) for name in sections})
    return {key.removeprefix(f"{flat}."): value for key, value in values.items()}


class _Base(NamedTuple):
    """The run of a command line, and the recipe that its options override."""

    run: RunDir
    recipe: Recipe
    saved: bool = False
    """Whether the recipe was read from the run's or the prior's folder."""
    started: bool = False
    """Whether the training has a checkpoint or a result."""


def _locate(
    known: argparse.Namespace, starts_run: bool, shows_help: bool, training_folder: Callable[[RunDir, str | None, str | None], Path] | None
) -> _Base:
    """Return the run of a command line, and the recipe that its options override.

    The recipe of a run or a prior is its recipe.yaml, with or without checkpoints. Until training has started, `--config` of a command that
    starts runs replaces it; from then on a changed recipe file is an error, unless the user types `--resume`.
    """
    if known.run is not None:
        run = run_of(known.run)
    elif known.config is not None:
        run = RunDir.named(known.config.stem)
    else:
        last = RunDir.last_touched() if known.resume or not starts_run else None
        run = last or RunDir.named(DEFAULT_RECIPE.stem)
    exists = run.exists()
    if exists and training_folder is not None:
        folder = training_folder(run, known.name or (None if known.level else _prior_kind(known)), known.level)
        path, started = run.recipe if starts_run else folder / "recipe.yaml", RunDir.started(folder)
        if path.exists() and (known.config is None or not starts_run or (started and known.resume)):
            return _Base(run, load_recipe(path), True, started)
    if starts_run:
        return _Base(run, load_recipe(known.config or DEFAULT_RECIPE))
    if exists:
        return _Base(run, load_recipe(run.recipe))
    if shows_help:
        return _Base(run, load_recipe(known.config or DEFAULT_RECIPE))
    raise UserError(f"{run}: there is no such run; start it with: {TRAIN_TOKENIZER}")


def _prior_kind(known: argparse.Namespace) -> str | None:
    """Return the kind of prior that the command line names; None: none, or an unknown one."""
    kind = getattr(known, "prior", None)
    return kind if kind in FAMILIES["prior"] else None


def _with_counted_steps(recipe: Recipe, argv: Sequence[str]) -> Recipe:
    """Return the recipe without the time budget of a stage whose steps are typed."""
    named = {argument.partition("=")[0] for argument in argv}
    for stage in ("stage1", "stage2"):
        if f"--{stage}.steps" in named and f"--{stage}.minutes" not in named:
            changed: dict[str, Any] = {stage: dataclasses.replace(getattr(recipe, stage), minutes=0.0)}
            recipe = dataclasses.replace(recipe, **changed)
    return recipe


def _with_tokenizer_of(known: argparse.Namespace, recipe: Recipe, saved: bool) -> Recipe:
    """Return the recipe with the tokenizer section of the run of `--init-from`; without `--config`, that run's complete recipe.

    `saved`: the recipe was read from the run and already contains them. Errors: UserError if there is no such run, or the new run has no
    name.
    """
    source = known.init_from or recipe.stage1.init_from
    if source is None or (saved and known.init_from is None):
        return recipe
    if known.run is None and known.config is None:
        raise UserError("--init-from: expected a name for the new run beside it (--run NAME), found none")
    run = run_of(source)
    if not run.tokenizer.exists():
        raise UserError(f"--init-from {source}: expected a run with a finished tokenizer, found none at {run}")
    source_recipe = load_recipe(run.recipe)
    return source_recipe if known.config is None and not saved else dataclasses.replace(recipe, tokenizer=source_recipe.tokenizer)


def _with_parts(recipe: Recipe, known: argparse.Namespace) -> Recipe:
    """Return the recipe with the command line's kinds of parts, and without the prior's sizes if a preset is typed."""
    for family in FAMILIES:
        kind, (section, _, key) = getattr(known, family, None), family.partition(".")
        if kind is not None:
            part: Any = as_class(_part(recipe, family), part_class(family, kind))
            if family == "prior":
                recipe = with_prior(recipe, part)
            else:
                changed: dict[str, Any] = {section: dataclasses.replace(getattr(recipe, section), **{key: part}) if key else part}
                recipe = dataclasses.replace(recipe, **changed)
    if known.preset is not None and hasattr(recipe.prior, "preset"):
        sizes: dict[str, Any] = dict.fromkeys(("layers", "width", "heads"), 0)
        recipe = dataclasses.replace(recipe, prior=dataclasses.replace(recipe.prior, **sizes))
    return recipe


class _RunParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the docstring's lines and shows defaults."""
