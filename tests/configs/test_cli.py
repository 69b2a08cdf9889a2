"""Recipes and command lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from configs.cli import SECTIONS, differences, load_recipe, parse, recipe_dict
from configs.errors import UserError
from configs.run_dir import REPOSITORY, RunDir
from configs.schema import Recipe, Stage1

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


def stage1(argv: list[str]) -> None:
    parse("doc", tuple(SECTIONS), argv, starts_run=True, options=lambda parser: parser.add_argument("--resume", action="store_true"))


def resolved(*argv: str, **kwargs: object) -> Recipe:
    return parse("doc", tuple(SECTIONS), list(argv), starts_run=True, **kwargs).recipe  # type: ignore[arg-type]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse_and_build(path: Path) -> None:
    from stage1_vqvae.model import VQVAE

    recipe = load_recipe(path)
    model = VQVAE(recipe.tokenizer, recipe.data.height, recipe.data.width, recipe.data.channels)
    assert all(h >= 1 and w >= 1 for h, w in model.grids)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_name_only_what_differs(path: Path) -> None:
    default = recipe_dict(Recipe())
    for section, values in yaml.safe_load(path.read_text()).items():
        same = [key for key, value in values.items() if section != "data" and value == default[section][key]]
        assert not same, f"{section}.{same} is the default"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_state_command_hardware_time_and_figures(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    for word in ("accelerate launch stage1_vqvae/train.py", "hardware:", "minutes:", "expected:"):
        assert word in header, word


def test_every_field_says_what_it_is() -> None:
    """A docstring under each field is what --help prints."""
    source = (REPOSITORY / "configs" / "schema.py").read_text().splitlines()
    for section in SECTIONS.values():
        for field in dataclasses.fields(section):
            lines = [number for number, line in enumerate(source) if line.startswith(f"    {field.name}: ")]
            assert lines, field.name
            assert all(source[number + 1].strip().startswith('"""') for number in lines), field.name


def test_overrides_win_over_the_recipe_in_any_order(tiny_recipe: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "new")
    before = resolved("--stage1.lr", "5e-4", "--config", str(tiny_recipe), "--run", run)
    after = resolved("--config", str(tiny_recipe), "--run", run, "--stage1.lr=5e-4")
    assert before == after
    assert before.stage1.lr == 5e-4
    assert differences(before, load_recipe(tiny_recipe)) == ["stage1.lr: 0.0005, not 0.003"]


def test_hyphens_are_underscores(tmp_path: Path) -> None:
    assert resolved("--stage1.batch-size", "32", "--run", str(tmp_path / "new")).stage1.batch_size == 32


def test_recipe_survives_writing_and_reading(tmp_path: Path) -> None:
    recipe = resolved("--stage1.lr", "1e-5", "--data.path", "/some/where", "--run", str(tmp_path / "new"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_dict(recipe)))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_print_recipe_prints_it_and_runs_nothing(tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert all(f"--{name}.{field.name}" in text for name, section in SECTIONS.items() for field in dataclasses.fields(section))
    digits = load_recipe(REPOSITORY / "configs" / "digits.yaml")
    assert f"default: {digits.stage1.steps}" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--stage1.lr", "-1"], ["stage1.lr", "above 0", "-1"]),
        (["--stage1.lr", "fast"], ["stage1.lr", "float", "fast"]),
        (["--tokenizer.quantizer", "magic"], ["tokenizer.quantizer", "'ema', 'gradient'", "magic"]),
        (["--tokenizer.quantizer", "fsq", "--tokenizer.num_codes", "500"], ["tokenizer.fsq_levels", "num_codes 500", "512"]),
        (["--tokenizer.quantizer", "fsq", "--tokenizer.fsq_levels", "[1,512]"], ["tokenizer.fsq_levels", "2 to 256", "[1, 512]"]),
        (["--tokenizer.quantizer", "fsq", "--tokenizer.depth", "2"], ["tokenizer.depth", "1 under fsq", "2"]),
        (["--tokenizer.quantizer", "lfq"], ["tokenizer.entropy_weight", "above 0 under lfq"]),
        (
            ["--tokenizer.quantizer", "lfq", "--tokenizer.entropy_weight", "0.1", "--tokenizer.num_codes", "500"],
            ["tokenizer.num_codes", "power of two", "500"],
        ),
        (["--tokenizer.groups", "3"], ["tokenizer.groups", "divisor of the 16 channels", "3"]),
        (["--tokenizer.groups", "16", "--tokenizer.metric", "cosine"], ["tokenizer.metric", "one channel"]),
        (["--tokenizer.depth", "2", "--tokenizer.metric", "cosine"], ["tokenizer.metric", "euclidean at depth 2", "cosine"]),
        (["--tokenizer.shared_codebook", "true"], ["tokenizer.shared_codebook", "false at depth 1"]),
        (["--tokenizer.entropy_weight", "0.1", "--stage1.accumulation", "2"], ["stage1.accumulation", "whole batch", "2"]),
        (["--tokenizer.num_codes", "1"], ["tokenizer.num_codes", "at least 2", "1"]),
        (["--tokenizer.downsampling", "3"], ["tokenizer.downsampling", "power of two", "3"]),
        (["--tokenizer.downsampling", "8"], ["tokenizer.downsampling 8", "divisor of data.height", "28"]),
        (["--stage1.learning_rate", "1"], ["--stage1.learning_rate"]),
        (["--stage1.batch_size", "7", "--stage1.accumulation", "2"], ["stage1.batch_size", "multiple of accumulation 2", "7"]),
        (["--prior.heads", "5"], ["prior.width", "multiple of 4 x 5 heads"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "expected a recipe"]),
        (["--run", str(REPOSITORY / "tests")], ["tests", "expected a run"]),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], parts: list[str], tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    where = [] if "--run" in arguments else ["--run", tmp_path / "new"]
    line = one_line_error(stage1, *arguments, *where)
    assert all(part in line for part in parts), line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("stage1: {learning_rate: 1}", ["stage1.learning_rate", "unknown"]),
        ("stage3: {lr: 1}", ["stage3", "unknown"]),
        ("{data: {path: x}, stage1: {lr: fast}}", ["stage1.lr", "float", "fast"]),
        ("{data: {path: x}, stage1: {lr: 0}}", ["stage1.lr", "above 0"]),
        ("stage1: 3", ["sections"]),
        ("a: [", ["YAML"]),
    ],
)
def test_bad_recipes_are_named(content: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert all(part in str(error.value) for part in [str(path), *parts]), error.value


def test_wrong_values_are_refused_by_the_section_itself() -> None:
    with pytest.raises(ValueError, match=r"stage1\.steps: expected at least 1, found 0"):
        Stage1(steps=0)


def test_later_commands_take_the_runs_recipe_and_their_own_sections_only(finished_run: Path, one_line_error: Callable[..., str]) -> None:
    def extract(argv: list[str]) -> Recipe:
        return parse("doc", ("extraction", "compute"), argv).recipe

    recipe = extract(["--run", str(finished_run), "--extraction.batch_size", "5"])
    assert differences(recipe, load_recipe(finished_run / "recipe.yaml")) == ["extraction.batch_size: 5, not 7"]
    assert "--stage1.lr" in one_line_error(extract, "--run", finished_run, "--stage1.lr", "1")


def test_config_selects_the_recipes_run_and_the_run_last_touched_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("configs.run_dir.REPOSITORY", tmp_path)
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
