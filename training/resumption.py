"""A check whether a training command has anything to do, and may: nothing finished or started is ever overwritten."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse.typing import PositiveFloat

from configs.errors import UserError, say
from configs.recipe_file import flattened, recipe_dict
from configs.schema import Recipe
from training.batching import next_accumulation
from training.stopping import STOPPED_IN_TIME


@dataclass(frozen=True, kw_only=True)
class Stage:
    """State of a stage on disk, and its name in messages."""

    where: str
    """Folder of the stage, for messages."""
    name: str
    """Name of the stage in messages, for instance `stage 1`."""
    section: str
    """Section of the recipe that has its steps."""
    elsewhere: str
    """Advice on training another one instead, for instance `another with --run NAME`."""
    recipe: Recipe
    """Recipe that the stage was started with."""
    started: bool
    """Whether there is a checkpoint or a result."""
    has_checkpoint: bool
    """Whether there is a checkpoint."""
    finished_after: int | None
    """Training steps of the finished weights, 0 for imported ones; None: there are none."""


def nothing_to_do(stage: Stage, recipe: Recipe, resume: bool, may_change: Sequence[str]) -> bool:
    """Return whether the stage is finished under this recipe, and say so.

    A stage is resumed with the recipe that it was started with, except for `may_change`: sections or dotted keys, its steps among them.
    Errors: UserError if training would overwrite or mix results.
    """
    done = stage.finished_after
    if not stage.started and done is None:
        budget = getattr(recipe, stage.section).minutes > 0  # which determines steps and warm-up again
        sections = [key for key in may_change if "." not in key]
        replaced = differences(
            recipe, stage.recipe, [*sections, *(f"{stage.section}.{key}" for key in ("steps", "warmup_steps") if budget)]
        )
        if replaced:
            more = f" and {len(replaced) - 3} more" if len(replaced) > 3 else ""
            say(f"{stage.where}: its recipe, by which nothing has been trained yet, is replaced: {'; '.join(replaced[:3])}{more}")
        return False
    changed = differences(recipe, stage.recipe, may_change)
    if changed:
        raise UserError(f"{stage.where}: its recipe is fixed, but asked for was {changed[0]}; train {stage.elsewhere}")
    if done == 0:
        say(f"{stage.where}: its weights were imported, so {stage.name} has nothing to train; train {stage.elsewhere}")
        return True
    steps = getattr(recipe, stage.section).steps
    if done is None:
        if not resume:
            raise UserError(f"{stage.where}: {stage.name} has begun and is not finished; go on with --resume, or train {stage.elsewhere}")
        return False
    longer = f"train it longer with --resume and --{stage.section}.steps above {done}, or {stage.elsewhere}"
    if steps == done:
        say(f"{stage.where}: {stage.name} is already finished; {longer}")
        return True
    if steps < done or not resume:
        raise UserError(f"{stage.where}: {stage.name} is finished after {done} steps, but asked for were {steps}; {longer}")
    if not stage.has_checkpoint:
        raise UserError(f"{stage.where}: expected a checkpoint to go on from after {done} steps, found none; train {stage.elsewhere}")
    return False


def differences(recipe: Recipe, other: Recipe, ignored: Sequence[str] = ()) -> list[str]:
    """Return the keys in which two recipes differ, as `section.key: A, not B`; `ignored`: sections and dotted keys to skip."""
    ours, theirs = flattened(recipe_dict(recipe)), flattened(recipe_dict(other))
    lines = []
    for key, value in ours.items():
        # Fields that only one of two kinds has are skipped: the line of the kind itself tells it.
        if key in theirs and value != theirs[key] and key not in ignored and key.partition(".")[0] not in ignored:
            lines.append(f"{key}: {value}, not {theirs[key]}")
    return lines


def memory_advice(ways: Sequence[str], elsewhere: str) -> str:
    """Return out-of-memory advice: options that leave the result as it is; if there are none, another training."""
    if not ways:
        return f"a smaller batch_size or model takes less; train {elsewhere}"
    return f"go on with --resume and {', or '.join(ways)}: with the same result"


def accumulation_advice(section: str, batch_size: int, accumulation: int) -> list[str]:
    """Return the option for more micro-batches per step, given the launched processes; empty if a micro-batch is one image already."""
    parts = next_accumulation(batch_size, accumulation, int(os.environ.get("WORLD_SIZE", "1")))
    return [] if parts is None else [f"--{section}.accumulation {parts}, which takes a step in {parts} parts"]


def add_resume_options(parser: Any) -> None:
    """Add the options that interrupt and resume a training."""
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    stopped = f"minutes after which to finish the step, save, and end with exit code {STOPPED_IN_TIME}; --resume goes on"
    parser.add_argument("--stop_after", type=PositiveFloat | None, help=stopped)
