"""The tiny run of the chain, and the commands that make it: the same on a pretended device and on the CPU."""

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
    # What a layer drops is a function of the process too.
    "prior": {**TINY["prior"], "dropout": 0.0},
}

# After the first step.
_STOPPED = ("--stop_after", "0.00001")
_EXACT = ("--compute.mixed_precision", "no")


def write_recipe(path: Path, pictures: Path) -> Path:
    """The run's recipe, of pictures in a folder."""
    path.write_text(yaml.safe_dump({**SETTINGS, "data": {**SETTINGS["data"], "path": str(pictures)}}))
    return path


def commands(recipe: Path, run: Path, processes: int = 1) -> dict[str, list[str]]:
    """The commands, by a name of each: a module, and what is typed. Those of one process alone are left out for several."""
    of_run = ["--run", str(run)]
    found = {
        "train": ["stage1_vqvae.train", "--config", str(recipe), *of_run, *_STOPPED],
        "resume": ["stage1_vqvae.train", *of_run, "--resume"],
        "extract": ["stage2_prior.extract_codes", *of_run],
        "prior": ["stage2_prior.train", *of_run, *_STOPPED],
        "resume prior": ["stage2_prior.train", *of_run, "--resume"],
        "sample": ["pipelines.sample", *of_run, "--n", "5", "--precision", "float64"],
        "sample as the device does": ["pipelines.sample", *of_run, "--n", "2"],
        "evaluate": ["pipelines.evaluate", *of_run, "--n", "8", "--features", "classifier"],
        "compress": ["pipelines.compress", *of_run, "--output", str(run.with_suffix(".vqc"))],
    }
    if processes > 1:
        del found["compress"]
    return {name: [*words, *_EXACT] for name, words in found.items()}


def run_command(module: str, *words: str) -> None:
    """Run a command in this process. Errors: its own."""
    main: Callable[[list[str]], None] = importlib.import_module(module).main
    with suppress(SystemExit) if _STOPPED[0] in words else nullcontext():
        main(list(words))


@contextmanager
def in_short() -> Iterator[None]:
    """Without what takes most of the time and is no concern here: graphs are not drawn, and the network by which images are compared is not
    good.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
        patched.setattr("stage1_vqvae.features.classifier._STEPS", 4)
        yield
