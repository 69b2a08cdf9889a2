"""The recipe and commands of the tiny chain, the same on a pretended device and on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import TINY

_INTERVALS = ("log_interval", "validation_interval", "checkpoint_interval")
_ADVERSARY = {"kind": "patch", "layers": 1, "channels": 4, "penalty": "r1", "start": 0.0, "ramp": 0.0}
SETTINGS: dict[str, Any] = {
    **TINY,
    "stage1": {**TINY["stage1"], "steps": 12, **dict.fromkeys(_INTERVALS, 6), "adversarial": _ADVERSARY},
    "stage2": {**TINY["stage2"], "steps": 6, **dict.fromkeys(_INTERVALS, 3)},
    # Layer dropout depends on the rank.
    "prior": {**TINY["prior"], "dropout": 0.0},
}

# After the first step.
_STOPPED = ("--stop_after", "0.00001")
_EXACT = ("--compute.mixed_precision", "no")


def write_recipe(path: Path, pictures: Path) -> Path:
    """Write the recipe for a folder of pictures."""
    path.write_text(yaml.safe_dump({**SETTINGS, "data": {**SETTINGS["data"], "path": str(pictures)}}))
    return path


def commands(recipe: Path, run: Path, processes: int = 1) -> dict[str, list[str]]:
    """Return module and arguments of each command by name; with several processes, without those that run in one only."""
    run_option = ["--run", str(run)]
    commands_by_name = {
        "train": ["stage1_vqvae.train", "--config", str(recipe), *run_option, *_STOPPED],
        "resume": ["stage1_vqvae.train", *run_option, "--resume"],
        "extract": ["stage2_prior.extract_codes", *run_option],
        "prior": ["stage2_prior.train", *run_option, *_STOPPED],
        "resume prior": ["stage2_prior.train", *run_option, "--resume"],
        "sample": ["pipelines.sample", *run_option, "--n", "5", "--precision", "float64"],
        "sample as the device does": ["pipelines.sample", *run_option, "--n", "2"],
        "evaluate": ["pipelines.evaluate", *run_option, "--n", "8", "--features", "classifier"],
        "compress": ["pipelines.compress", *run_option, "--output", str(run.with_suffix(".vqc"))],
    }
    if processes > 1:
        del commands_by_name["compress"]
    return {name: [*words, *_EXACT] for name, words in commands_by_name.items()}


def run_command(module: str, *words: str) -> None:
    """Run a command in this process. Errors: those of the command."""
    main: Callable[[list[str]], None] = importlib.import_module(module).main
    with suppress(SystemExit) if _STOPPED[0] in words else nullcontext():
        main(list(words))


@contextmanager
def fast_settings() -> Iterator[None]:
    """Skip what takes most of the time: plots are not drawn, and the feature network is hardly trained."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
        patched.setattr("stage1_vqvae.features.classifier._STEPS", 4)
        yield
