"""The chain on pretended devices: train, resume, extract, train the prior, resume, sample, evaluate, compress a tiny run's images.

    python tests/pretended/run.py cuda 1 tests.pretended.chain RECIPE RUN RESULT

Writes what was seen into RESULT, as JSON: waits and copies of each command, and those of each ordinary step of training.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from configs.cli import load_recipe
from configs.schema import Stage1, Stage2
from tests.launched.commands import staying_joined
from tests.pretended.device import Pretended, Seen

STOPPED = ("--stop_after", "0.00001")
"""After the first step."""


def commands(recipe: Path, run: Path) -> dict[str, list[str]]:
    """The commands by a name of each, as they are typed."""
    of_run = ["--run", str(run)]
    exact = ["--compute.mixed_precision", "no"]
    return {
        "train": ["stage1_vqvae.train", "--config", str(recipe), *of_run, *exact, *STOPPED],
        "resume": ["stage1_vqvae.train", *of_run, *exact, "--resume"],
        "extract": ["stage2_prior.extract_codes", *of_run, *exact],
        "prior": ["stage2_prior.train", *of_run, *exact, *STOPPED],
        "resume prior": ["stage2_prior.train", *of_run, *exact, "--resume"],
        "sample": ["pipelines.sample", *of_run, *exact, "--n", "5"],
        "sample float64": ["pipelines.sample", *of_run, *exact, "--n", "5", "--sampling.precision", "float64"],
        "evaluate": ["pipelines.evaluate", *of_run, *exact, "--n", "8"],
        "compress": ["pipelines.compress", *of_run, *exact, "--n", "6", "--output", str(run.with_suffix(".vqc"))],
    }


class Steps:
    """The waits of each step of a training: from its beginning to that of the next."""

    def __init__(self, seen: Seen, config: Stage1 | Stage2) -> None:
        self._seen, self._config = seen, config
        self.waits: dict[int, dict[str, int]] = {}
        self._step: int | None = None
        self._before: dict[Any, int] = {}

    def watched(self, take_step: Callable[..., Any]) -> Callable[..., Any]:
        """A function that takes a step, whose number is its last argument."""

        def watched(*args: Any) -> Any:
            self.close()
            self._step, self._before = args[-1], dict(self._seen.waits)
            return take_step(*args)

        return watched

    def close(self) -> None:
        """The end of the last step."""
        if self._step is not None and self._ordinary(self._step + 1):
            new = {place: count - self._before.get(place, 0) for place, count in self._seen.waits.items()}
            self.waits[self._step] = {f"{place.kind}, {place.line}": count for place, count in new.items() if count}
        self._step = None

    def _ordinary(self, done: int) -> bool:
        """Whether after a step nothing is logged, validated or saved, and no codes restarted."""
        config = self._config
        intervals = [config.log_interval, config.validation_interval, config.checkpoint_interval]
        if isinstance(config, Stage1):
            intervals.append(config.restart_interval)
        return done < config.steps and all(done % interval for interval in intervals)


def run_command(name: str, module: str, arguments: list[str]) -> dict[str, Any]:
    """A command's main function, and what was seen of it. Errors: its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        GradientState._reset_state()
    program, began = importlib.import_module(module), time.monotonic()
    with Pretended() as seen:
        steps = None
        take_step = getattr(program, "take_step", None)
        if take_step is not None and "--resume" in arguments:
            recipe = load_recipe(Path(arguments[arguments.index("--run") + 1]) / "recipe.yaml")
            steps = Steps(seen, recipe.stage1 if module.startswith("stage1") else recipe.stage2)
            program.take_step = steps.watched(take_step)  # type: ignore[attr-defined]
        try:
            with suppress(SystemExit) if STOPPED[0] in arguments else suppress():
                program.main(arguments)
        finally:
            if steps is not None:
                program.take_step = take_step  # type: ignore[attr-defined]
                steps.close()
    return {
        "seconds": time.monotonic() - began,
        "launches": seen.launches,
        "waits": {f"{place.kind}, {place.line}": count for place, count in seen.waits.most_common()},
        "steps": steps.waits if steps is not None else {},
    }


def main(arguments: list[str]) -> None:
    recipe, run, result, *names = arguments
    found = {}
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    with staying_joined() if several else suppress():
        for name, (module, *words) in commands(Path(recipe), Path(run)).items():
            if not names or name in names:
                print(f"--- {name}", file=sys.stderr, flush=True)
                found[name] = run_command(name, module, words)
    rank = int(os.environ.get("RANK", "0"))
    Path(result).with_suffix(f".{rank}.json").write_text(json.dumps({"accelerator": str(Accelerator().device), **found}, indent=1))
