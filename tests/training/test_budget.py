"""Time budgets on a simulated clock, and the equality of a budgeted run and one with as many steps."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator

from configs.recipe_file import load_recipe
from configs.run_dir import REPOSITORY, RunDir, read_json
from configs.schema import Stage1, Stage2
from stage1_vqvae.train import main as train_tokenizer
from stage2_prior.extract_codes import main as extract_codes
from stage2_prior.train import main as train_prior
from training.budget import TimeLeft, fitting_steps


class Clock:
    """A clock that only advances by `work`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("minutes", "step", "validation", "interval"), [(20, 0.25, 8.0, 100), (1, 0.01, 0.0, 10), (480, 3.0, 60.0, 1000), (5, 7.0, 1.0, 50)]
)
def test_rehearsal_training_and_validation_fill_the_budget(
    minutes: float, step: float, validation: float, interval: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    rehearsed: list[int] = []

    def take_step(number: int) -> None:
        rehearsed.append(number)
        # The first two steps also select kernels.
        clock.work(step if number >= 2 else 10 * step)

    start = clock.now
    accelerator = Accelerator(cpu=True)
    clock.work(once := 2 * step)
    building = clock.now
    clock.work(setup := 3 * step)
    config = Stage1(minutes=minutes, validation_interval=interval, lr=0.5)
    config_with_steps = fitting_steps(
        accelerator, "stage 1", config, start, building, [(1.0, take_step)], lambda: clock.work(validation), passes_at_end=2
    )
    steps, rehearsal = config_with_steps.steps, clock.now - start
    assert config_with_steps == dataclasses.replace(config, steps=steps, warmup_steps=min(100, steps // 10))
    # The rehearsal takes a small part of the budget.
    assert rehearsal <= 0.05 * 60 * minutes + 25 * step + validation + once + setup
    assert rehearsed == list(range(len(rehearsed)))
    total = rehearsal + setup + steps * (step + validation / interval) + 2 * validation
    assert 60 * minutes - (step + validation / interval) < total <= 60 * minutes
    assert capsys.readouterr().out == f"stage 1: {step:.3g} s a step on this machine, so {steps:,} steps in {minutes:g} minutes\n"


def test_two_kinds_of_steps_are_weighted_by_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    kinds = [(0.25, lambda _: clock.work(0.1)), (0.75, lambda _: clock.work(0.3))]
    config = fitting_steps(Accelerator(cpu=True), "stage 1", Stage1(minutes=60), clock.now, clock.now, kinds, lambda: clock.work(0.0))
    left = 3600 - (clock.now - 1000)
    assert config.steps == pytest.approx(left / (0.25 * 0.1 + 0.75 * 0.3), abs=1)


def test_a_tiny_budget_gives_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    config = Stage2(minutes=0.01)
    kinds = [(1.0, lambda _: clock.work(5))]
    assert fitting_steps(Accelerator(cpu=True), "stage 2", config, clock.now, clock.now, kinds, lambda: clock.work(5)).steps == 1


def test_the_time_left_is_printed_once_and_only_if_it_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    left = TimeLeft("stage 2", first_step=100, steps=1100)
    lines = []
    for done in range(101, 161):
        clock.work(2)
        lines.append(left.line(done))
    assert [number + 1 for number, line in enumerate(lines) if line] == [30]
    assert str(lines[29]).startswith("stage 2: about 32 minutes left")
    assert "--stage2.minutes" in str(lines[29])
    clock.work(-120)
    short = TimeLeft("stage 1", first_step=0, steps=200)
    clock.work(61)
    assert short.line(20) is None


def test_a_budgeted_run_equals_one_with_as_many_steps(
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_line_error: Callable[..., str],
) -> None:
    # Every reading of the clock advances it by 0.1 s, however busy the machine is.
    ticks = itertools.count(step=0.1)
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))

    def train_run(name: str, first: list[str], second: list[str]) -> RunDir:
        run = ["--run", str(tmp_path / name)]
        train_tokenizer(["--config", str(tiny_recipe), *run, *first])
        extract_codes(run)
        train_prior([*run, *second])
        return RunDir(tmp_path / name)

    minutes = ["--stage1.minutes", "0.1", "--stage2.minutes", "0.05"]
    timed = train_run("timed", minutes, [])
    recipe, prior = load_recipe(timed.recipe), load_recipe(timed.prior("transformer") / "recipe.yaml")
    assert (recipe.stage1.minutes, recipe.stage2.minutes) == (0.1, 0.05)
    assert (recipe.stage1.steps, prior.stage2.steps) == tuple(
        read_json(folder / "report.json")["steps"] for folder in (timed.stage1, timed.prior("transformer"))
    )
    assert min(recipe.stage1.steps, prior.stage2.steps) > 1
    assert recipe.stage1.steps != load_recipe(tiny_recipe).stage1.steps
    counts = [
        [f"--{name}.steps={section.steps}", f"--{name}.warmup_steps={section.warmup_steps}"]
        for name, section in (("stage1", recipe.stage1), ("stage2", prior.stage2))
    ]
    counted = train_run("counted", *counts)
    assert timed.tokenizer.read_bytes() == counted.tokenizer.read_bytes()
    weights = [run.prior("transformer") / "prior.safetensors" for run in (timed, counted)]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    # Run again it is finished; another budget is refused.
    capsys.readouterr()
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(timed), *minutes, "--resume"])
    train_prior(["--run", str(timed), "--resume"])
    assert capsys.readouterr().out.count("already finished") == 2
    line = one_line_error(train_tokenizer, "--run", timed, "--stage1.minutes", "1", "--resume")
    assert "stage1.minutes: 1.0, not 0.1" in line

    # Such a run can be extended too.
    extended = recipe.stage1.steps + 4
    train_tokenizer(["--run", str(timed), "--stage1.steps", str(extended), "--resume"])
    assert read_json(timed.stage1 / "report.json")["steps"] == extended


def test_steps_on_the_command_line_override_the_recipes_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(REPOSITORY / "configs" / "imagefolder_cpu.yaml")

    def resolved(*options: str) -> tuple[float, int, float]:
        with pytest.raises(SystemExit):
            train_tokenizer(["--config", recipe, "--run", "nowhere", *options, "--print-recipe"])
        content = yaml.safe_load(capsys.readouterr().out)
        return content["stage1"]["minutes"], content["stage1"]["steps"], content["stage2"]["minutes"]

    minutes, steps, others = resolved()
    assert min(minutes, others) > 0
    assert resolved("--stage1.steps", "7") == (0, 7, others)
    assert resolved("--stage1.steps=7", "--stage1.minutes=3") == (3, 7, others)
    assert resolved("--stage2.steps", "7") == (minutes, steps, 0)
