"""Recipe file + dotted overrides -> Recipe, by jsonargparse. Every script's command line is built here.

A script names the sections it may override; the rest of the recipe is fixed when stage 1 begins. Hyphens and
underscores are the same in option names.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader, set_parsing_settings

from configs.data import LOCAL_KEYS, Data
from configs.errors import UserError, fail, require_text
from configs.hub import run_of
from configs.parts import FAMILIES, as_dict, default_kind, of_kind, part_class
from configs.run_dir import RunDir, checkout, read_yaml, runs_folder, typed
from configs.schema import Recipe

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
"""The recipe's sections and their classes; that of a section which is a part is the base of all its kinds."""


@dataclass(frozen=True)
class Command:
    """A script's parsed command line: which run it is about, with which recipe."""

    run: RunDir
    recipe: Recipe
    options: Namespace
    """The options that only this script has."""
    arguments: list[str]
    """The arguments as they were typed."""

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
        name = self.run.path.name if self.run.path.parent == runs_folder() else str(self.run)
        return f"{command} --run {shlex.quote(name)}"


def _typed_value(text: str) -> Any:
    """A value of the command line: `null` alone, which never comes here, is none; all else that is nothing in YAML (`~`, `#1`) is text."""
    value = get_loader("yaml")(text)
    return text if value is None else value


set_loader("typed", _typed_value, exceptions=(yaml.YAMLError,))


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


def _parts_of(sections: Sequence[str]) -> list[str]:
    """The families whose parts are chosen in those sections."""
    return [family for family in FAMILIES if family.partition(".")[0] in sections]


def _parser(sections: Sequence[str], kinds: dict[str, str], flat: str | None = None, reads_images: bool = False, **kwargs: Any) -> _Parser:
    """A parser of the sections' keys; of each part, of those that its kind has; and of those of `data` that are the machine's."""
    parser = _Parser(parser_mode="typed", allow_abbrev=False, print_config=None, add_help=bool(kwargs), **kwargs)
    for name in sections:
        if name not in FAMILIES:
            inside = {family.partition(".")[2] for family in FAMILIES if family.startswith(f"{name}.")}
            parser.add_class_arguments(SECTIONS[name], None if name == flat else name, skip=inside)
    if reads_images:
        parser.add_class_arguments(Data, "data", skip={field.name for field in dataclasses.fields(Data)} - set(LOCAL_KEYS))
    for family in _parts_of(sections):
        parser.add_class_arguments(part_class(family, kinds[family]), family)
        # Without fields a kind has no group of options to stand in.
        group: Any = (parser.groups or {}).get(family, parser)
        names = ", ".join(FAMILIES[family])
        group.add_argument(f"--{family}.kind", type=str, default=kinds[family], help=f"{names}; each has options of its own")
    return parser


@functools.cache
def _recipe_parser(kinds: tuple[tuple[str, str], ...]) -> _Parser:
    """The parser of a whole recipe whose parts are of those kinds; building it takes longer than parsing."""
    return _parser(tuple(SECTIONS), dict(kinds))


def _build(values: Namespace, sections: Sequence[str], flat: str | None, base: Recipe | None) -> Recipe:
    """`sections` from parsed values, the others from `base`."""
    built: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        if name == flat:
            own = [f.name for f in dataclasses.fields(section)]
            built[name] = section(**{key: values[key] for key in own})
        elif name in sections:
            built[name] = _built(name, values[name])
        elif base is not None:
            built[name] = getattr(base, name)
    recipe = Recipe(**built)
    for key, value in flattened(recipe_dict(recipe)).items():
        require_text(key, value)
    return recipe


def _built(name: str, values: Any) -> Any:
    """The section or the part of that name from parsed values; any other value as it is."""
    if not isinstance(values, Namespace):
        return values
    given = {key: _built(f"{name}.{key}", value) for key, value in vars(values).items()}
    return part_class(name, given.pop("kind"))(**given) if name in FAMILIES else SECTIONS[name](**given)


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
        found = content.get(section, {})
        if key and key in found:
            # A copy: what was read stays as it is.
            content[section] = found = {**found, key: {"kind": found[key]} if isinstance(found[key], str) else found[key]}
            if not isinstance(found[key], dict):
                raise UserError(f"{family}: expected a kind, or a kind with its fields, found {found[key]!r}")
        kinds[family] = (found.get(key, {}) if key else found).get("kind", default_kind(family))
    return content, kinds


def _check_keys(content: dict[str, Any], kinds: dict[str, str]) -> None:
    """Errors: UserError for a key that no section, or not the chosen kind of a part, has."""
    for name, section in content.items():
        if name not in SECTIONS:
            raise UserError(f"unknown key {name}; known are {', '.join(SECTIONS)}")
        for where, values in (
            (name, section),
            *((f"{name}.{key}", value) for key, value in section.items() if f"{name}.{key}" in FAMILIES),
        ):
            is_part = where in FAMILIES
            found = part_class(where, kinds[where]) if is_part else SECTIONS[name]
            known = [*(["kind"] if is_part else []), *(f.name for f in dataclasses.fields(found))]
            unknown = [key for key in values if key not in known]
            if unknown:
                of_kind = f" of kind {kinds[where]}" if is_part else ""
                raise UserError(f"unknown key {where}.{unknown[0]}; known{of_kind} are {', '.join(known)}")


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain dictionaries, for YAML and JSON."""
    return as_dict(recipe)


def flattened(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def differences(recipe: Recipe, other: Recipe, but: Sequence[str] = ()) -> list[str]:
    """Keys in which two recipes differ, as `section.key: A, not B`; sections and dotted keys in `but` aside."""
    ours, theirs = flattened(recipe_dict(recipe)), flattened(recipe_dict(other))
    found = []
    for key, value in ours.items():
        # A field that the other's kind of a part does not have: that the kinds differ is said before.
        if key in theirs and value != theirs[key] and key not in but and key.partition(".")[0] not in but:
            found.append(f"{key}: {value}, not {theirs[key]}")
    return found


def parse(
    description: str | None,
    sections: Sequence[str],
    argv: Sequence[str] | None = None,
    *,
    flat: str | None = None,
    starts_run: bool = False,
    begun_in: Callable[[RunDir, str | None, str | None], Path] | None = None,
    reads_images: bool = False,
    options: Callable[[ArgumentParser], None] = lambda parser: None,
    whole: bool = True,
) -> Command:
    """Parse a script's command line.

    Args:
        description: the script's docstring.
        sections: the recipe's sections that this script may override.
        argv: arguments; None = the process's.
        flat: the one of `sections` whose options have no prefix.
        starts_run: whether this script may begin a run (stage 1) or needs one.
        begun_in: for a training script, its folder in the run, given `--name` (or else `--prior.kind`, a prior's name if it has no
            other and is not a level's) and `--level`: what was begun there goes on with the recipe it has there, and then `--config`
            only says which run is meant.
        reads_images: whether this script may say where the data set is on this machine, and how it is read, and nothing else of it.
        options: adds the script's own options.
        whole: whether the recipe's parts have to fit one another; False where the script puts in others.
    Errors: exits with code 2 and one line on any mistake.
    """
    argv = [_spelled(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    where = _WhereParser(add_help=False, allow_abbrev=False)
    where.add_argument("--config", type=_recipe_path)
    where.add_argument("--run")
    where.add_argument("--name")
    where.add_argument("--level")
    where.add_argument("--prior.preset", dest="preset")
    where.add_argument("--stage1.init_from", dest="init_from")
    where.add_argument("--resume", action="store_true")
    families = _parts_of(sections)
    for family in families:
        where.add_argument(f"--{family}.kind", dest=family)
    help_wanted = "--help" in argv or "-h" in argv
    # The fields' docstrings are their help. Finding them takes longer than all else here, so nobody else waits for it.
    set_parsing_settings(docstring_parse_attribute_docstrings=help_wanted)
    try:
        _refuse_empty(argv)
        known, _ = where.parse_known_args([argument for argument in argv if argument not in ("--help", "-h")])
        run, base, own, begun = _locate(known, starts_run, help_wanted, begun_in)
        if starts_run and not begun:
            base = _with_tokenizer_of(known, base, own)
        base = _with_parts(base if begun else _with_counted_steps(base, argv), known)
        kinds = {family: _part(base, family).kind for family in families}
        usage = "%(prog)s [--option value ...]"
        parser = _parser(sections, kinds, flat, reads_images, usage=usage, description=_as_typed(description), formatter_class=_Help)
        parser.add_argument("--config", metavar="FILE", help="recipe; its run is runs/NAME (default: configs/digits.yaml)")
        parser.add_argument(
            "--run", help="name of a run in runs/, a path, or hf:USER/NAME (default: the recipe's, else the run last touched)"
        )
        parser.add_argument("--print_recipe", action="store_true", help="print the resolved recipe and do nothing")
        options(parser)
        if reads_images or begun_in is not None:
            accept_option(parser)
        parser.set_defaults(_defaults(base, sections, flat))
        if reads_images:
            parser.set_defaults({f"data.{key}": getattr(base.data, key) for key in LOCAL_KEYS})
        values = parser.parse_args(argv)
        recipe = _build(values, sections, flat, base)
        if reads_images:
            recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **vars(values.data)))
        if whole:
            recipe.check()
        if starts_run:
            recipe = _with_whole_paths(recipe)
    except ValueError as error:
        fail(str(error))
    if values.print_recipe:
        print(yaml.safe_dump(recipe_dict(recipe), sort_keys=False), end="")
        sys.exit(0)
    return Command(run, recipe, values, list(argv))


def accept_option(parser: ArgumentParser) -> None:
    """Add the option by which a command goes on with data that has changed."""
    accepted = "go on although images, classes or codes have changed since training began with them (data.json)"
    parser.add_argument("--accept_changed_data", action="store_true", help=accepted)


def _as_typed(description: str | None) -> str | None:
    """A script's docstring, its commands as they are typed here."""

    def command(found: re.Match[str]) -> str:
        return typed(found["script"], found["how"] != "python") if checkout() is None else found[0]

    return re.sub(r"(?P<how>python|accelerate launch) (?P<script>(stage\d_\w+|pipelines)/\w+\.py)", command, description or "") or None


def _with_whole_paths(recipe: Recipe) -> Recipe:
    """The recipe with its paths written out, since later commands may be typed elsewhere."""

    def whole(section: Any, key: str) -> Any:
        path = getattr(section, key, None)
        return section if path is None else dataclasses.replace(section, **{key: str(Path(path).expanduser().resolve())})

    stage1 = recipe.stage1
    if stage1.init_from is not None:
        stage1 = dataclasses.replace(stage1, init_from=str(run_of(stage1.init_from).path.resolve()))
    terms: dict[str, Any] = {name: whole(getattr(stage1, name), "weights") for name in ("perceptual", "adversarial")}
    return dataclasses.replace(recipe, data=whole(whole(recipe.data, "path"), "cache"), stage1=dataclasses.replace(stage1, **terms))


def _refuse_empty(argv: Sequence[str]) -> None:
    """Errors: UserError that names the option, if its value is empty, as that of an unset shell variable."""
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
    """The recipe file meant: as typed, or the one of that name that comes with the code, where nothing stands at the path."""
    path = Path(typed).expanduser()
    shipped = RECIPES / path.name
    return shipped if not path.exists() and str(path.parent) in (".", RECIPES.name) and shipped.exists() else path


def _part(recipe: Recipe, family: str) -> Any:
    """The part of a recipe that a family names."""
    found: Any = recipe
    for name in family.split("."):
        found = getattr(found, name)
    return found


def _defaults(base: Recipe, sections: Sequence[str], flat: str | None) -> dict[str, Any]:
    values = flattened({name: as_dict(getattr(base, name)) for name in sections})
    return {key.removeprefix(f"{flat}."): value for key, value in values.items()}


class _Base(NamedTuple):
    """The run of a command line, and the recipe that its options override."""

    run: RunDir
    recipe: Recipe
    own: bool = False
    """Whether the recipe is the one that the run, or the prior, has already."""
    begun: bool = False
    """Whether training by it has left a checkpoint, or a result."""


def _locate(
    known: argparse.Namespace, starts_run: bool, help_wanted: bool, begun_in: Callable[[RunDir, str | None, str | None], Path] | None
) -> _Base:
    """The run a command line means, and the recipe its options override.

    What a run or a prior has as recipe.yaml is its recipe, whether a checkpoint was ever written or not; only `--config` of a command that
    starts runs takes another, until training has begun. From then on a changed recipe file must not pass unnoticed, unless the user says to
    go on with what was begun.
    """
    if known.run is not None:
        run = run_of(known.run)
    elif known.config is not None:
        run = RunDir.named(known.config.stem)
    else:
        last = RunDir.last_touched() if known.resume or not starts_run else None
        run = last or RunDir.named(DEFAULT_RECIPE.stem)
    exists = run.exists()
    if exists and begun_in is not None:
        folder = begun_in(run, known.name or (None if known.level else _prior_kind(known)), known.level)
        path, begun = run.recipe if starts_run else folder / "recipe.yaml", RunDir.begun(folder)
        if path.exists() and (known.config is None or not starts_run or (begun and known.resume)):
            return _Base(run, load_recipe(path), True, begun)
    if starts_run:
        return _Base(run, load_recipe(known.config or DEFAULT_RECIPE))
    if exists:
        return _Base(run, load_recipe(run.recipe))
    if help_wanted:
        return _Base(run, load_recipe(known.config or DEFAULT_RECIPE))
    raise UserError(f"{run}: there is no such run; start it with: {TRAIN_TOKENIZER}")


def _prior_kind(known: argparse.Namespace) -> str | None:
    """The prior's kind, if the command line names one there is."""
    kind = getattr(known, "prior", None)
    return kind if kind in FAMILIES["prior"] else None


def _with_counted_steps(recipe: Recipe, argv: Sequence[str]) -> Recipe:
    """The recipe without its time budget for a stage whose steps are counted on the command line."""
    named = {argument.partition("=")[0] for argument in argv}
    for stage in ("stage1", "stage2"):
        if f"--{stage}.steps" in named and f"--{stage}.minutes" not in named:
            changed: dict[str, Any] = {stage: dataclasses.replace(getattr(recipe, stage), minutes=0.0)}
            recipe = dataclasses.replace(recipe, **changed)
    return recipe


def _with_tokenizer_of(known: argparse.Namespace, recipe: Recipe, own: bool) -> Recipe:
    """The recipe with the tokenizer of the run that training is to begin from, if there is one, which a run's `own` recipe has already;
    without a recipe, all of that run's.

    Errors: UserError if there is no such run, or the new one has no name.
    """
    source = known.init_from or recipe.stage1.init_from
    if source is None or (own and known.init_from is None):
        return recipe
    if known.run is None and known.config is None:
        raise UserError("--init-from: expected a name for the new run beside it (--run NAME), found none")
    run = run_of(source)
    if not run.tokenizer.exists():
        raise UserError(f"--init-from {source}: expected a run with a finished tokenizer, found none at {run}")
    theirs = load_recipe(run.recipe)
    return theirs if known.config is None and not own else dataclasses.replace(recipe, tokenizer=theirs.tokenizer)


def _with_parts(recipe: Recipe, known: argparse.Namespace) -> Recipe:
    """The recipe with the kinds that the command line asks for; and with the sizes of a preset, if it asks for one: the recipe's
    own are another model's.
    """
    for family in FAMILIES:
        kind, (section, _, key) = getattr(known, family, None), family.partition(".")
        if kind is not None:
            part = of_kind(_part(recipe, family), family, kind)
            chosen: Any = dataclasses.replace(getattr(recipe, section), **{key: part}) if key else part
            changed: dict[str, Any] = {section: chosen}
            recipe = dataclasses.replace(recipe, **changed)
    if known.preset is not None and hasattr(recipe.prior, "preset"):
        sizes: dict[str, Any] = dict.fromkeys(("layers", "width", "heads"), 0)
        recipe = dataclasses.replace(recipe, prior=dataclasses.replace(recipe.prior, **sizes))
    return recipe


class _WhereParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, options with their defaults."""
