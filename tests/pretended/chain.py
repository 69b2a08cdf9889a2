"""The chain on pretended devices: train, resume, extract, train the prior, resume, sample, evaluate, compress a tiny run's images.

    python tests/pretended/run.py cuda 1 tests.pretended.chain RECIPE RUN RESULT [COMMAND ...]

Writes what was seen into RESULT.N.json, N being the process's number: the waits of each command, and those of ordinary steps of training.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from configs.cli import load_recipe
from configs.data import Augmentation
from configs.schema import Stage1, Stage2
from tests.launched.commands import staying_joined
from tests.launched.plots import leave_blank
from tests.pretended import apple
from tests.pretended.device import Pretended, Seen
from tests.pretended.tiny import commands, in_short, run_command

Waits = dict[str, int]
"""How often the host waited, by kind and line."""


class Steps:
    """The waits of the ordinary steps of a training, each from its beginning to that of the next."""

    def __init__(self, seen: Seen, config: Stage1 | Stage2) -> None:
        self.waits: dict[int, Waits] = {}
        self._seen, self._config = seen, config
        self._step: int | None = None

    def watched(self, take_step: Callable[..., Any]) -> Callable[..., Any]:
        """A function that takes a step, the number of which is its last argument."""

        def watched(*args: Any) -> Any:
            self.close()
            self._step, self._before = args[-1], self._seen.waits.copy()
            return take_step(*args)

        return watched

    def close(self) -> None:
        """The end of the last step."""
        if self._step is not None and self._is_ordinary(self._step + 1):
            self.waits[self._step] = _shown(self._seen.waits - self._before)
        self._step = None

    def _is_ordinary(self, done: int) -> bool:
        """Whether after so many steps nothing is logged, validated or saved, and no codes restart."""
        config = self._config
        intervals = [config.log_interval, config.validation_interval, config.checkpoint_interval]
        if isinstance(config, Stage1):
            intervals.append(config.restart_interval)
        return done < config.steps and all(done % interval for interval in intervals)


def watched_command(module: str, *words: str) -> dict[str, Any]:
    """Run a command; what was seen of it. Errors: its own."""
    program, began = importlib.import_module(module), time.monotonic()
    take_step = getattr(program, "take_step", None)
    with Pretended() as seen:
        if take_step is None or "--resume" not in words:
            run_command(module, *words)
            steps = {}
        else:
            recipe = load_recipe(Path(words[words.index("--run") + 1]) / "recipe.yaml")
            watching = Steps(seen, recipe.stage1 if module.startswith("stage1") else recipe.stage2)
            program.take_step = watching.watched(take_step)  # type: ignore[attr-defined]
            try:
                run_command(module, *words)
            finally:
                program.take_step = take_step  # type: ignore[attr-defined]
            watching.close()
            steps = watching.waits
    return {"seconds": time.monotonic() - began, "launches": seen.launches, "waits": _shown(seen.waits), "steps": steps}


def waits_for_images(recipe: Path) -> dict[str, Waits]:
    """The waits of one micro-step's images, by their augmentation."""
    from dataclasses import replace

    from stage1_vqvae.data.loader import Loader
    from stage1_vqvae.data.sources import load_images
    from stage1_vqvae.data.splits import TRAIN
    from training.processes import start

    settings, found = load_recipe(recipe), {}
    for augmentation in get_args(Augmentation):
        if not augmentation.endswith("crops"):  # those take larger images
            with Pretended() as seen:
                accelerator = start(settings.compute)
                training = load_images(settings.data, (TRAIN,), progress=False).splits[TRAIN]
                loader = Loader(training, settings.data, replace(settings.stage1, augmentation=augmentation), accelerator)
                loader.images(0, 0)
            found[augmentation] = _shown(seen.waits)
    return found


def _shown(waits: Any) -> Waits:
    return {f"{place.kind}, {place.line}": count for place, count in waits.most_common()}


def _forget_accelerate() -> None:
    """As in a new process, so that each command chooses its device."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()


def main(arguments: list[str]) -> None:
    recipe, run, result, *names = arguments
    leave_blank()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    found: dict[str, Any] = {}
    with in_short(), staying_joined() if processes > 1 else nullcontext():
        for name, words in commands(Path(recipe), Path(run), processes).items():
            if not names or name in names:
                print(f"--- {name}", file=sys.stderr, flush=True)
                found[name] = watched_command(*words)
                if processes == 1:
                    _forget_accelerate()
        if processes == 1:
            found["images"] = waits_for_images(Path(recipe))
    if torch.accelerator.current_accelerator() == torch.device("mps"):
        apple.check()
    path = Path(result).with_suffix(f".{os.environ.get('RANK', '0')}.json")
    path.write_text(json.dumps(found, indent=1))
