"""Recipes and command lines."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import inspect
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from configs.cli import parse
from configs.data import LOCAL_KEYS
from configs.errors import UserError
from configs.parts import FAMILIES, as_dict, part_class
from configs.recipe_file import SECTIONS, flattened, load_recipe, recipe_dict
from configs.run_dir import COMMANDS, REPOSITORY, RunDir
from configs.schema import Recipe, Stage1, keys_that_may_change
from training.resumption import differences

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


def stage1(argv: list[str]) -> None:
    parse("doc", tuple(SECTIONS), argv, starts_run=True, options=lambda parser: parser.add_argument("--resume", action="store_true"))


def resolved(*argv: str, **kwargs: object) -> Recipe:
    return parse("doc", tuple(SECTIONS), list(argv), starts_run=True, **kwargs).recipe  # type: ignore[arg-type]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_loads_the_launcher_settings(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    assert f"--config_file {path.relative_to(REPOSITORY)}" in path.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse_and_build(path: Path) -> None:
    from stage1_vqvae.model import VQVAE

    recipe = load_recipe(path)
    with torch.device("meta"):  # shapes without numbers: some of them are large
        model = VQVAE(recipe.tokenizer, recipe.data.height, recipe.data.width, recipe.data.channels)
    assert all(h >= 1 and w >= 1 for h, w in model.grids)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_repeat_no_default(path: Path) -> None:
    recipe, settings = load_recipe(path), flattened(yaml.safe_load(path.read_text()))
    default = flattened(recipe_dict(Recipe()))
    for family in FAMILIES:
        kind = operator.attrgetter(family)(recipe).kind
        default |= {f"{family}.{key}": value for key, value in as_dict(part_class(family, kind)()).items() if key != "kind"}
    repeated = [key for key, value in settings.items() if not key.startswith("data.") and value == default[key]]
    assert not repeated, f"{repeated} is the default"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_state_command_hardware_time_and_figures(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    for word in ("accelerate launch stage1_vqvae/train.py", "hardware:", "minutes:", "expected:"):
        assert word in header, word


def section_classes() -> list[type]:
    """Return the dataclasses of all sections and of every kind of every part."""
    kinds = [part_class(family, kind) for family, kind_names in FAMILIES.items() for kind in kind_names]
    return [*(section for name, section in SECTIONS.items() if name not in FAMILIES), *kinds, *sampling_classes()]


def sampling_classes() -> list[type]:
    """Return the classes of the section `sampling`, one per way in which priors draw."""
    return list({part_class("prior", kind).SAMPLING: None for kind in FAMILIES["prior"]})  # type: ignore[attr-defined]


@pytest.mark.parametrize("section", section_classes(), ids=lambda section: section.__name__)
def test_every_field_has_a_docstring(section: type) -> None:
    """`--help` prints the docstring under each field."""
    source = "".join(inspect.getsource(base) for base in section.__mro__ if dataclasses.is_dataclass(base)).splitlines()
    for field in dataclasses.fields(section):
        lines = [number for number, line in enumerate(source) if line.startswith(f"    {field.name}: ")]
        assert lines, field.name
        is_part = any(f"{name.lower()}.{field.name}" in FAMILIES for name in [section.__name__])
        assert is_part or all(source[number + 1].strip().startswith('"""') for number in lines), field.name


def test_overrides_win_over_the_recipe_in_any_order(tiny_recipe: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "new")
    before = resolved("--stage1.lr", "5e-4", "--config", str(tiny_recipe), "--run", run)
    after = resolved("--config", str(tiny_recipe), "--run", run, "--stage1.lr=5e-4")
    assert before == after
    assert before.stage1.lr == 5e-4
    assert differences(before, load_recipe(tiny_recipe)) == ["stage1.lr: 0.0005, not 0.003"]


def test_hyphens_in_options_are_read_as_underscores(tmp_path: Path) -> None:
    assert resolved("--stage1.batch-size", "32", "--run", str(tmp_path / "new")).stage1.batch_size == 32


def test_only_null_means_none_on_the_command_line(tmp_path: Path) -> None:
    """YAML's other spellings of null may be the name of a column, a class or a folder."""

    values = {
        "label_column": "~",
        "image_column": "#1",
        "train_split": "NULL",
        "validation_split": "no",
        "test_split": "1e3",
        "name": "null",
    }
    options = [f"--data.{key}={value}" for key, value in values.items()]
    data = resolved(*options, "--data.path=~", "--run", str(tmp_path / "new")).data
    assert {key: getattr(data, key) for key in values} == {**values, "name": None}
    assert data.path == str(Path.home().resolve())


def test_recipe_survives_writing_and_reading(tmp_path: Path) -> None:
    recipe = resolved("--stage1.lr", "1e-5", "--data.path", "/some/where", "--run", str(tmp_path / "new"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_dict(recipe)))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_print_recipe_prints_the_recipe_and_runs_nothing(tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        stage1(["--config", str(tiny_recipe), "--run", str(tmp_path / "new"), "--stage1.steps", "77", "--print-recipe"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["stage1"]["steps"] == 77
    assert not (tmp_path / "new").exists()


def test_help_explains_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        stage1(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "Peak learning rate." in text
    digits = load_recipe(REPOSITORY / "configs" / "digits.yaml")
    assert all(f"--{key}" in text for key in flattened(recipe_dict(digits)))
    assert f"default: {digits.stage1.steps}" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--stage1.lr", "-1"], ["stage1.lr", "above 0", "-1"]),
        (["--stage1.lr", "fast"], ["stage1.lr", "float", "fast"]),
        (["--tokenizer.quantizer", "magic"], ["tokenizer.quantizer.kind", "ema, gradient", "magic"]),
        (["--tokenizer.quantizer", "fsq", "--tokenizer.quantizer.num_codes", "500"], ["tokenizer.quantizer.num_codes"]),
        (["--tokenizer.quantizer.kind=fsq", "--tokenizer.quantizer.levels", "[1,512]"], ["quantizer.levels", "2 to 256", "[1, 512]"]),
        (["--tokenizer.quantizer", "simvq", "--tokenizer.quantizer.decay", "0.9"], ["tokenizer.quantizer.decay"]),
        (["--tokenizer.quantizer", "lfq", "--tokenizer.quantizer.entropy_weight", "0"], ["quantizer.entropy_weight", "above 0"]),
        (["--tokenizer.quantizer", "lfq", "--tokenizer.quantizer.num_codes", "500"], ["quantizer.num_codes", "power of two", "500"]),
        (["--tokenizer.quantizer.groups", "3"], ["tokenizer.quantizer.groups", "divisor of the 16 channels", "3"]),
        (["--tokenizer.quantizer.groups", "16", "--tokenizer.quantizer.metric", "cosine"], ["quantizer.metric", "one channel"]),
        (["--tokenizer.quantizer.depth", "2", "--tokenizer.quantizer.metric", "cosine"], ["quantizer.metric", "euclidean at depth 2"]),
        (["--tokenizer.quantizer.shared_codebook", "true"], ["tokenizer.quantizer.shared_codebook", "false at depth 1"]),
        (["--tokenizer.quantizer.entropy_weight", "0.1", "--stage1.accumulation", "2"], ["stage1.accumulation", "whole batch", "2"]),
        (["--tokenizer.quantizer.num_codes", "1"], ["tokenizer.quantizer.num_codes", "at least 2", "1"]),
        (["--tokenizer.network.downsampling", "3"], ["tokenizer.network.downsampling", "power of two", "3"]),
        (["--tokenizer.network.downsampling", "8"], ["tokenizer.network.downsampling 8", "divisor of data.height", "28"]),
        (["--prior.kind", "transformer", "--prior.kernel_size", "5"], ["prior.kernel_size"]),
        (["--stage1.learning_rate", "1"], ["--stage1.learning_rate"]),
        (["--stage1.batch_size", "7", "--stage1.accumulation", "2"], ["stage1.batch_size", "multiple of accumulation 2", "7"]),
        (["--prior.heads", "5"], ["prior.width", "multiple of 4 x 5 heads"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "expected a recipe"]),
        (["--run", str(REPOSITORY / "tests")], ["tests", "expected a run"]),
        (["--data.path", ""], ["--data.path: expected a value, found ''"]),
        (["--data.cache=\t"], ["--data.cache: expected a value"]),
        (["--data", "{path: ' '}"], ["data.path: expected a value, found ' '"]),
        (["--init-from", ""], ["--stage1.init_from: expected a value"]),
        (["--config", " "], ["--config: expected a value"]),
        (["--run", ""], ["--run: expected a value"]),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], parts: list[str], tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    run_option = [] if "--run" in arguments else ["--run", tmp_path / "new"]
    line = one_line_error(stage1, *arguments, *run_option)
    assert all(part in line for part in parts), line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("stage1: {learning_rate: 1}", ["stage1.learning_rate", "unknown"]),
        ("stage3: {lr: 1}", ["stage3", "unknown"]),
        ("tokenizer: {quantizer: {kind: fsq, depth: 2}}", ["unknown key tokenizer.quantizer.depth", "of kind fsq are kind, levels"]),
        ("tokenizer: {quantizer: magic}", ["tokenizer.quantizer.kind", "ema, gradient", "magic"]),
        ("tokenizer: {quantizer: 3}", ["tokenizer.quantizer", "a kind", "3"]),
        ("prior: {kind: transformer, attention_rate: 2}", ["unknown key prior.attention_rate", "of kind transformer are kind, dropout"]),
        ("{data: {path: x}, stage1: {lr: fast}}", ["stage1.lr", "float", "fast"]),
        ("{data: {path: x}, stage1: {lr: 0}}", ["stage1.lr", "above 0"]),
        ("stage1: 3", ["sections"]),
        ("a: [", ["YAML"]),
        ("", ["empty file"]),
        ("data: {path: x, cache: ''}", ["data.cache: expected a value, found ''"]),
        ("stage1: {lr: 1}\ndata: {path: x}\nstage1: {steps: 3}", ["expected each key once, found stage1 in lines 1 and 3"]),
        ("stage1:\n  lr: 1\n  steps: 2\n  lr: 3", ["found stage1.lr in lines 2 and 4"]),
        ("tokenizer: {quantizer: {kind: fsq, levels: [8], levels: [5]}}", ["found tokenizer.quantizer.levels twice in line 1"]),
    ],
)
def test_errors_in_recipes_name_file_and_key(content: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert all(part in str(error.value) for part in [str(path), *parts]), error.value


def test_keys_override_those_of_a_yaml_anchor(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("stage1: &loop {steps: 7, lr: 0.1}\nstage2: {<<: *loop, steps: 8}")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.stage1.steps, recipe.stage2.steps, recipe.stage2.lr) == (7, 8, 0.1)


MAY_CHANGE = {
    "data": "path cache decode stream workers",
    "tokenizer": "network.gradient_checkpointing",
    "stage1": "steps lr clip_norm accumulation log_interval validation_interval checkpoint_interval keep_checkpoints init_from "
    "perceptual.weights adversarial.weights",
    "condition": "",
    "extraction": "batch_size",
    "prior": "",
    "stage2": "steps lr clip_norm accumulation log_interval validation_interval checkpoint_interval keep_checkpoints "
    "embedding_lr gradient_checkpointing",
    "sampling": "batch_size",
    "evaluation": "features weights n seed batch_size",
    "compute": "threads mixed_precision compile sharded hang_timeout_minutes tracker",
}
FIXED = {
    "data": "name config revision image_column label_column train_split validation_split test_split height width channels background white "
    "validation_share seed transform.* on_error most_skipped",
    "tokenizer": "code_dim quantizer.* network.* objective.*",
    "stage1": "seed minutes batch_size warmup_steps final_lr_share weight_decay weight_average weight_average_share restart_interval "
    "augmentation trained perceptual.* adversarial.*",
    "condition": "*",
    "extraction": "augmentation shard_rows",
    "prior": "*",
    "stage2": "seed minutes batch_size warmup_steps final_lr_share weight_decay optimizer condition_dropout weight_average "
    "weight_average_share",
    "sampling": "temperature top_k top_p min_p guidance guidance_schedule guidance_power guidance_interval precision rounds",
    "evaluation": "",
    "compute": "",
}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_is_listed_as_changeable_or_fixed(section: str) -> None:
    """For all kinds, `keys_that_may_change` are those listed; a new field must be added to one of the lists."""
    free = {f"{section}.{key}" for key in MAY_CHANGE[section].split()}
    fixed = [f"{section}.{key}" for key in FIXED[section].split()]
    checked = set()
    for number in range(max(map(len, FAMILIES.values()))):
        recipe = Recipe()
        for family, kinds in FAMILIES.items():
            part = part_class(family, list(kinds)[min(number, len(kinds) - 1)])()
            name, _, key = family.partition(".")
            changed: Any = {name: dataclasses.replace(getattr(recipe, name), **{key: part}) if key else part}
            recipe = dataclasses.replace(recipe, **changed)
        allowed = keys_that_may_change(recipe, (section,))
        for key in flattened(as_dict(getattr(recipe, section)), f"{section}."):
            checked.add(key)
            assert (key in allowed or section in allowed) == (key in free), key
            assert key in free or any(fnmatch.fnmatch(key, pattern) for pattern in fixed), key
    assert free <= checked


def test_sections_refuse_wrong_values() -> None:
    with pytest.raises(ValueError, match=r"stage1\.steps: expected at least 1, found 0"):
        Stage1(steps=0)


def test_later_commands_override_only_their_sections_of_the_recipe(finished_run: Path, one_line_error: Callable[..., str]) -> None:
    def extract(argv: list[str]) -> Recipe:
        return parse("doc", ("extraction", "compute"), argv).recipe

    recipe = extract(["--run", str(finished_run), "--extraction.batch_size", "5"])
    assert differences(recipe, load_recipe(finished_run / "recipe.yaml")) == ["extraction.batch_size: 5, not 7"]
    assert "--stage1.lr" in one_line_error(extract, "--run", finished_run, "--stage1.lr", "1")


def test_config_selects_the_recipes_run_and_the_latest_run_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("configs.run_dir.runs_folder", lambda: tmp_path / "runs")
    for age, name in ((30, "old"), (10, "digits"), (20, "other")):
        run = RunDir.named(name)
        run.path.mkdir(parents=True)
        run.recipe.write_text(yaml.safe_dump(recipe_dict(Recipe())))
        import os

        os.utime(run.recipe, (1e9 - age, 1e9 - age))
    assert parse("doc", (), []).run.path.name == "digits"
    RunDir.named("other").record("test", [], {})
    assert parse("doc", (), []).run.path.name == "other"
    assert parse("doc", (), ["--config", "configs/old.yaml"]).run.path.name == "old"
    assert parse("doc", (), ["--run", "digits"]).run.path.name == "digits"


def test_a_word_in_place_of_a_part_selects_its_kind(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("tokenizer: {quantizer: fsq}")
    expected = load_recipe(tmp_path / "recipe.yaml").tokenizer.quantizer
    assert expected == part_class("tokenizer.quantizer", "fsq")()
    assert resolved("--tokenizer.quantizer", "fsq", "--run", str(tmp_path / "new")).tokenizer.quantizer == expected


def test_changing_the_kind_keeps_fields_that_both_kinds_have(tmp_path: Path) -> None:
    settings = ("--tokenizer.quantizer.num_codes", "64", "--tokenizer.quantizer.decay", "0.9", "--prior.dropout", "0.3")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe_dict(resolved(*settings, "--run", str(tmp_path / "new")))))
    changed = resolved("--config", str(tmp_path / "base.yaml"), "--tokenizer.quantizer", "simvq", "--prior.kind", "pixelcnn")
    assert changed.tokenizer.quantizer == part_class("tokenizer.quantizer", "simvq")(num_codes=64)  # type: ignore[call-arg]
    assert changed.prior == part_class("prior", "pixelcnn")(dropout=0.3)  # type: ignore[call-arg]


def test_help_lists_only_fields_of_the_chosen_kind(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        stage1(["--tokenizer.quantizer", "fsq", "--help"])
    text = capsys.readouterr().out
    assert "--tokenizer.quantizer.levels" in text
    assert "--tokenizer.quantizer.num_codes" not in text
    assert "ema, gradient, simvq, fsq, lfq" in text


class Recorder:
    """Parser that only records the names of its options."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def add_argument(self, *names: str, **_: object) -> None:
        self.names |= {name.removeprefix("--") for name in names}


class Parsed(Exception):
    """Carries the arguments of a script's call of `parse`."""


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """Options per script, over all kinds of its parts."""
    options_by_script: dict[str, set[str]] = {}

    def record(_: str, sections: tuple[str, ...], __: object = None, **keywords: Any) -> None:
        raise Parsed(sections, keywords)

    for script in COMMANDS:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(module, "parse", record)
            with pytest.raises(Parsed) as parsed:
                module.main([])
        sections, keywords = parsed.value.args
        recorder = Recorder()
        keywords.get("options", lambda _: None)(recorder)
        names = {
            "config",
            "run",
            "print_recipe",
            "help",
            *recorder.names,
            *(f"data.{key}" for key in LOCAL_KEYS if keywords.get("reads_images")),
        }
        for section in sections:
            families = {family: kinds for family, kinds in FAMILIES.items() if family.partition(".")[0] == section}
            classes = [(family, part_class(family, kind)) for family, kinds in families.items() for kind in kinds]
            classes += [(section, SECTIONS[section])] if section not in FAMILIES else []
            classes += [(section, sampling) for sampling in sampling_classes()] if section == "sampling" else []
            keys = {f"{prefix}.{field.name}" for prefix, fields in classes for field in dataclasses.fields(fields)}
            names |= {key.removeprefix(f"{section}.") for key in keys} if section == keywords.get("flat") else keys
            names |= {key for family in families for key in (family, f"{family}.kind")}
        options_by_script[script] = names | ({"init_from"} if keywords.get("starts_run") else set())
    return options_by_script


# Options of accelerate, git, npm and Python's HTTP server, and placeholders.
FOREIGN = {
    "num_processes",
    "num_machines",
    "mixed_precision",
    "dynamo_backend",
    "multi_gpu",
    "always",
    "dirty",
    "abbrev",
    "directory",
}
FOREIGN |= {"gradient_accumulation_steps", "key", "prefer_offline", "fetch_retries", "pack_destination", "option", "section.key"}


def test_every_option_named_in_a_message_exists(options: dict[str, set[str]]) -> None:
    known = FOREIGN.union(*options.values())
    for package in ("configs", "training", "stage1_vqvae", "stage2_prior", "pipelines"):
        for path in (REPOSITORY / package).rglob("*.py"):
            named = re.findall(r"(?<![\w-])--([a-z][\w.-]*\w)(?![\w{]|\.[{\"'])", path.read_text())
            assert {name.replace("-", "_") for name in named} <= known, path


@pytest.mark.parametrize("pages", ["README.md", "docs/**/*.md", "configs/**/*.yaml", "Makefile", "*/*.py"])
def test_every_option_of_a_documented_command_exists(pages: str, options: dict[str, set[str]]) -> None:
    checked = 0
    for page in REPOSITORY.glob(pages):
        text = page.read_text().replace("\\\n", " ")
        for script, rest in re.findall(
            r"(?:python|launch|torchrun)\b[^\n`]*? ((?:stage\d_\w+|pipelines)/\w+\.py)((?: [^`\n&|;(]*)?)", text
        ):
            named = {name.replace("-", "_") for name in re.findall(r"(?<!\S)--([A-Za-z][\w.-]*)", rest)}
            assert named <= options[script], f"{page}: {script}{rest}"
            checked += 1
    assert checked
