"""Checkpoints: atomic, the last k kept, refused when they do not fit.

A checkpoint is a dictionary of state dictionaries and plain values, written by the main process alone and read with
`weights_only`, so that nothing in it is ever executed. Random state is not in it: there is none (randomness.py).
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from configs.errors import UserError
from configs.run_dir import RunDir, write_bytes

_FORMAT = 4


class Checkpoints:
    """The checkpoints of one stage, in one folder, `step-NNNNNNNNN.pt`."""

    def __init__(self, folder: Path, stage: str, keep: int, accelerator: Accelerator) -> None:
        self.folder, self.stage, self.keep = folder, stage, keep
        self._accelerator = accelerator

    def paths(self) -> list[Path]:
        """The checkpoints' files, oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps and let go of the oldest beyond `keep`; all processes wait for it.

        Errors: UserError if a weight of a `model` in it, its own or a part's, is not finite; the last good checkpoint stays.
        """
        models = [part["model"] for part in (state, *state.values()) if isinstance(part, dict) and "model" in part]
        weights = [weight for model in models for weight in model.values() if weight.is_floating_point()]
        if not all(bool(torch.isfinite(weight).all()) for weight in weights):
            raise UserError(f"step {step}: expected finite weights, found some that are not; the checkpoint before is kept")
        if self._accelerator.is_main_process:
            # Through memory, because only a plain write reports a full disk as what it is.
            buffer = io.BytesIO()
            torch.save({"format": _FORMAT, "stage": self.stage, "step": step, **state}, buffer)
            write_bytes(self.folder / f"step-{step:09d}.pt", buffer.getvalue())
            for path in self.paths()[: -self.keep]:
                path.unlink()
        self._accelerator.wait_for_everyone()

    def load_latest(self) -> dict[str, Any] | None:
        """The newest state, tensors on the CPU; None if there is none. Errors: UserError for a file that is not one."""
        paths = self.paths()
        if not paths:
            return None
        where = RunDir.show(paths[-1])
        expected = f"{where}: expected a checkpoint of {self.stage}"
        remedy = "; delete it to go on from the one before"
        try:
            state = torch.load(paths[-1], map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
            raise UserError(f"{expected}, found a truncated or foreign file ({type(error).__name__}){remedy}") from None
        if not isinstance(state, dict) or state.get("format") != _FORMAT or state.get("stage") != self.stage:
            found = f"stage {state.get('stage')}, format {state.get('format')}" if isinstance(state, dict) else type(state).__name__
            raise UserError(f"{expected}, format {_FORMAT}, found {found}{remedy}")
        return state
