"""Run a training script's `main` in float64, with or without a launcher, and save every rank's weights and moments at each checkpoint.

torchrun ... tests/launched/ranks_dump.py FOLDER stage1_vqvae.train ARGUMENTS [NEXT ARGUMENTS ...]

Several runs may follow one another in the same processes; run number i dumps to FOLDER/i. This script is not in tests/ itself, whose
folders are named like the packages: a script's folder is first on sys.path.
"""

from __future__ import annotations

import importlib
import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from commands import commands, staying_joined  # a script's folder is first on sys.path
from torch.distributed.tensor import DTensor

from configs.errors import run_entry
from stage1_vqvae.data.pixels import to_model
from training.checkpoint import Checkpoints


def main() -> None:
    folder, module = Path(sys.argv[1]), sys.argv[2]
    runs = commands(sys.argv[3:])
    script = importlib.import_module(module)
    # Pictures take longer than the steps and are not compared.
    validation = importlib.import_module("stage1_vqvae.monitoring.validation")
    recorder = importlib.import_module("stage1_vqvae.monitoring.recorder")
    for target, function in product(
        (script, validation, recorder), ("training_graph", "save_health", "save_reconstructions", "save_grids")
    ):
        setattr(target, function, lambda *_, **__: None)
    script.write_results = lambda *_: None  # type: ignore[attr-defined]
    script.likelihood_report = lambda *_: {"validation": 0.0}  # type: ignore[attr-defined]
    # In float64, since a code flipped by rounding grows into large differences.
    torch.set_default_dtype(torch.float64)
    for target in (importlib.import_module("stage1_vqvae.data.loader"), validation):
        target.to_model = lambda pixels: to_model(pixels).double()  # type: ignore[attr-defined]
    with staying_joined():
        save = Checkpoints.save
        for number, arguments in enumerate(runs):
            (folder / str(number)).mkdir(exist_ok=True)

            def dump(self: Checkpoints, step: int, state: dict[str, Any], score: float | None = None, number: int = number) -> None:
                # Moments are linear in the gradients; weights after Adam's first step show only their signs.
                moments = {f"moment of {name}": moment["exp_avg"] for name, moment in state["optimizer"].items()}
                adversary = {f"adversary.{name}": value for name, value in state.get("adversarial", {}).get("model", {}).items()}
                averages = {f"average.{name}": value for name, value in state.get("average", {}).get("model", {}).items()}
                best = {f"best.{name}": value for name, value in state.get("best", {}).get("weights", {}).items()}
                tensors = {**state["model"], **moments, **adversary, **averages, **best}
                assert any(isinstance(tensor, DTensor) for tensor in tensors.values()) == (self._group is not None), "not sharded"
                gathered = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
                torch.save(gathered, folder / str(number) / f"{step}-of-rank-{os.environ.get('RANK', '0')}.pt")
                save(self, step, state, score)

            Checkpoints.save = dump  # type: ignore[method-assign]
            script.main(arguments)


if __name__ == "__main__":
    run_entry(main)
