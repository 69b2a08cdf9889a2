"""Run the chain on pretended devices: train, resume, extract, train the prior, resume, sample, evaluate and compress.

    python tests/pretended/run.py cuda 1 tests.pretended.chain RECIPE RUN RESULT [COMMAND ...]

Writes RESULT.RANK.json: the device waits of each command and of ordinary training steps.
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

from configs.data import Augmentation
from configs.recipe_file import load_recipe
from configs.schema import Stage1, Stage2
from tests.launched.commands import staying_joined
from tests.launched.plots import leave_blank
from tests.pretended import apple
from tests.pretended.device import DeviceLog, Pretended
from tests.pretended.tiny import commands, fast_settings, run_command

Waits = dict[str, int]
"""Number of device waits by kind and line."""


class Steps:
    """Device waits of ordinary training steps, each up to the start of the next."""

    def __init__(self, log: DeviceLog, config: Stage1 | Stage2) -> None:
        self.waits: dict[int, Waits] = {}
        self._log, self._config = log, config
        self._step: int | None = None

    def watched(self, take_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a `take_step`, whose last argument is the step number."""

        def watched(*args: Any) -> Any:
            self.close()
            self._step, self._before = args[-1], self._log.waits.copy()
            return take_step(*args)

        return watched

    def close(self) -> None:
        """End the current step."""
        if self._step is not None and self._is_ordinary(self._step + 1):
            self.waits[self._step] = _as_json(self._log.waits - self._before)
        self._step = None

    def _is_ordinary(self, done: int) -> bool:
        """Whether nothing is logged, validated, saved or restarted after `done` steps."""
        config = self._config
        intervals = [config.log_interval, config.validation_interval, config.checkpoint_interval]
        if isinstance(config, Stage1):
            intervals.append(config.restart_interval)
        return done < config.steps and all(done % interval for interval in intervals)


def run_logged(module: str, *words: str) -> dict[str, Any]:
    """Run a command and return its time, launches and waits. Errors: those of the command."""
    program, start = importlib.import_module(module), time.monotonic()
    take_step = getattr(program, "take_step", None)
    with Pretended() as log:
        if take_step is None or "--resume" not in words:
            run_command(module, *words)
            steps = {}
        else:
            recipe = load_recipe(Path(words[words.index("--run") + 1]) / "recipe.yaml")
            recorder = Steps(log, recipe.stage1 if module.startswith("stage1") else recipe.stage2)
            program.take_step = recorder.watched(take_step)  # type: ignore[attr-defined]
            try:
                run_command(module, *words)
            finally:
                program.take_step = take_step  # type: ignore[attr-defined]
            recorder.close()
            steps = recorder.waits
    return {"seconds": time.monotonic() - start, "launches": log.launches, "waits": _as_json(log.waits), "steps": steps}


def waits_for_images(recipe: Path) -> dict[str, Waits]:
    """Return the waits of loading one micro-step's images, per augmentation."""
    from dataclasses import replace

    from stage1_vqvae.data.loader import Loader
    from stage1_vqvae.data.sources import load_images
    from stage1_vqvae.data.splits import TRAIN
    from training.processes import start

    settings, waits = load_recipe(recipe), {}
    for augmentation in get_args(Augmentation):
        if not augmentation.endswith("crops"):  # those take larger images
            with Pretended() as log:
                accelerator = start(settings.compute)
                training = load_images(settings.data, (TRAIN,), progress=False).splits[TRAIN]
                loader = Loader(training, settings.data, replace(settings.stage1, augmentation=augmentation), accelerator)
                loader.images(0, 0)
            waits[augmentation] = _as_json(log.waits)
    return waits


def _as_json(waits: Any) -> Waits:
    return {f"{place.kind}, {place.line}": count for place, count in waits.most_common()}


def _forget_accelerate() -> None:
    """Reset Accelerate, so that each command selects its device as in a new process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()


def main(arguments: list[str]) -> None:
    recipe, run, result, *names = arguments
    leave_blank()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    results: dict[str, Any] = {}
    with fast_settings(), staying_joined() if processes > 1 else nullcontext():
        for name, words in commands(Path(recipe), Path(run), processes).items():
            if not names or name in names:
                print(f"--- {name}", file=sys.stderr, flush=True)
                results[name] = run_logged(*words)
                if processes == 1:
                    _forget_accelerate()
        if processes == 1:
            results["images"] = waits_for_images(Path(recipe))
    if torch.accelerator.current_accelerator() == torch.device("mps"):
        apple.check()
    path = Path(result).with_suffix(f".{os.environ.get('RANK', '0')}.json")
    path.write_text(json.dumps(results, indent=1))
