"""Training state: what a checkpoint keeps of a training, registered once, then saved and restored as one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from accelerate import Accelerator

from configs.errors import UserError, say
from training.checkpoint import Checkpoints, copied


class Stateful(Protocol):
    """A module, an optimizer's state, or anything else with a state dictionary."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors and plain values in nested dictionaries."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Restore a state."""


Entry = TypeVar("Entry", bound=Stateful | Mapping[str, Stateful])


class TrainState:
    """Modules, optimizers and counters of a training.

    Random state is not among them: there is none (randomness.py).
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.step = 0
        """Optimizer steps taken."""
        self._entries: dict[str, Any] = {}
        self._scaler = accelerator.scaler
        self._minutes, self._started = 0.0, time.monotonic()

    def register(self, name: str, entry: Entry) -> Entry:
        """Save and restore `entry`, a stateful object or a mapping of such, under `name`. Returns it."""
        assert name not in self._entries
        self._entries[name] = entry
        return entry

    def minutes(self) -> float:
        """Return the minutes of training so far, those before a resume included."""
        return self._minutes + (time.monotonic() - self._started) / 60

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a checkpoint keeps. Every rank must call it."""
        scaler = None if self._scaler is None else self._scaler.state_dict()
        return {"step": self.step, "minutes": self.minutes(), "scaler": scaler, **_state(self._entries)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Errors: UserError for a state that lacks a registered entry."""
        if missing := [name for name in self._entries if name not in state]:
            raise UserError(f"--resume: expected a checkpoint with the state of {missing[0]}, found none in it")
        self.step, self._minutes, self._started = state["step"], state["minutes"], time.monotonic()
        if self._scaler is not None and state["scaler"] is not None:  # the precision may change from command to command
            self._scaler.load_state_dict(state["scaler"])
        _load(self._entries, state)

    def resume(self, checkpoints: Checkpoints, steps: int, where: str) -> bool:
        """Restore the newest whole checkpoint. Returns: False if there is none.

        Args:
            checkpoints: of this training.
            steps: how many the training is to have in all.
            where: the training's folder, for messages.
        Errors: UserError as `Checkpoints.load_latest`, and for a checkpoint that is already past `steps`.
        """
        state = checkpoints.load_latest(self.state_dict())
        if state is None:
            return False
        if state["step"] > steps:
            raise UserError(f"--resume: expected steps of at least the checkpoint's {state['step']}, found {steps}")
        self.load_state_dict(state)
        say(f"{where}: going on after step {self.step}")
        return True

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore everything, bit for bit, when the block ends: for steps of a rehearsal."""
        before = copied(self.state_dict())
        yield
        self.load_state_dict(before)


def _state(entry: Any) -> Any:
    return {name: _state(inner) for name, inner in entry.items()} if isinstance(entry, Mapping) else entry.state_dict()


def _load(entry: Any, state: Any) -> None:
    if not isinstance(entry, Mapping):
        entry.load_state_dict(state)
        return
    for name, inner in entry.items():
        _load(inner, state[name])
