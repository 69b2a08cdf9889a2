"""Whether a training command has anything to do, and whether it may: nothing finished or begun is ever overwritten."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse.typing import PositiveFloat

from configs.cli import differences
from configs.errors import UserError, say
from configs.schema import Recipe
from training.batching import next_accumulation
from training.stopping import STOPPED_IN_TIME


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What was found of a stage on disk, and how its messages name it."""

    where: str
    """The stage's folder, for messages."""
    name: str
    """How messages name the stage, for instance `stage 1`."""
    section: str
    """The recipe's section that has its steps."""
    elsewhere: str
    """How to train another one instead, for instance `a new run with --run`."""
    recipe: Recipe
    """The recipe that the stage was begun with."""
    begun: bool
    """Whether it has left a checkpoint, or a result."""
    checkpointed: bool
    """Whether it has left a checkpoint."""
    finished_after: int | None
    """Steps its finished weights were trained for, 0: elsewhere; None: there are none."""


def nothing_to_do(stage: Stage, asked: Recipe, resume: bool, may_change: Sequence[str]) -> bool:
    """Whether the stage is finished as asked for; says so.

    It can be resumed under the recipe it began with, but for `may_change`: sections or dotted keys, its steps among them.
    Errors: UserError where going on would lose or mix something.
    """
    done = stage.finished_after
    if not stage.begun and done is None:
        budget = getattr(asked, stage.section).minutes > 0  # by which steps and warm-up are found anew
        sections = [key for key in may_change if "." not in key]
        replaced = differences(asked, stage.recipe, [*sections, *(f"{stage.section}.{key}" for key in ("steps", "warmup_steps") if budget)])
        if replaced:
            more = f" and {len(replaced) - 3} more" if len(replaced) > 3 else ""
            say(f"{stage.where}: its recipe, by which nothing has been trained yet, is replaced: {'; '.join(replaced[:3])}{more}")
        return False
    changed = differences(asked, stage.recipe, may_change)
    if changed:
        raise UserError(f"{stage.where}: its recipe is fixed, but asked for was {changed[0]}; train {stage.elsewhere}")
    if done == 0:
        say(f"{stage.where}: its weights were imported, so {stage.name} has nothing to train; train {stage.elsewhere}")
        return True
    steps = getattr(asked, stage.section).steps
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
    if not stage.checkpointed:
        raise UserError(f"{stage.where}: expected a checkpoint to go on from after {done} steps, found none; train {stage.elsewhere}")
    return False


def memory_advice(ways: Sequence[str], elsewhere: str) -> str:
    """How to go on after running out of memory: options that leave the result as it is; or, if there are none, another training."""
    if not ways:
        return f"a smaller batch_size or model takes less; train {elsewhere}"
    return f"go on with --resume and {', or '.join(ways)}: with the same result"


def accumulation_advice(section: str, batch_size: int, accumulation: int) -> list[str]:
    """The option that takes a step in more parts, on as many processes as were launched; none if it has no more."""
    parts = next_accumulation(batch_size, accumulation, int(os.environ.get("WORLD_SIZE", "1")))
    return [] if parts is None else [f"--{section}.accumulation {parts}, which takes a step in {parts} parts"]


def add_resume_options(parser: Any) -> None:
    """How a training that takes long is taken in parts."""
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    stopped = f"minutes after which to finish the step, save, and end with exit code {STOPPED_IN_TIME}; --resume goes on"
    parser.add_argument("--stop_after", type=PositiveFloat | None, help=stopped)
