"""Checkpoints: written whole or not at all, behind the training; the last k kept and the best; checked when they are read.

A checkpoint is a dictionary of state dictionaries and plain values, written by the main process alone and read with
`weights_only`, so that nothing in it is ever executed. Random state is not in it: there is none (randomness.py). At its end stands its
sha256.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import threading
from pathlib import Path
from typing import Any, BinaryIO

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from configs.errors import UserError, say
from configs.run_dir import RunDir, read_json, replacing, write_json

_FORMAT = 5
# Which had no sum at its end.
_WITHOUT_SUM = 4
_MARK = b"\nsha256 "
_TRAILER = len(_MARK) + 64
_READ_AT_ONCE = 1 << 24  # bytes


class DamagedCheckpoint(ValueError):
    """A file that is not as it was written."""


class Checkpoints:
    """The checkpoints of one stage, in one folder, `step-NNNNNNNNN.pt`."""

    def __init__(self, folder: Path, stage: str, keep: int, accelerator: Accelerator) -> None:
        self.folder, self.stage, self.keep = folder, stage, keep
        self._accelerator = accelerator
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Nothing is being written any more when the block ends, however it ends. Errors: OSError, if nothing else went wrong."""
        if self._writing is not None:
            self._writing.join()
        if kind is None:
            self.wait()

    def paths(self) -> list[Path]:
        """The checkpoints' files, oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, step: int, state: dict[str, Any], score: float | None = None) -> None:
        """Take a copy of the state after `step` steps, to be written while the training goes on; and let go of the oldest beyond `keep`,
        but not of the best. The one before is waited for.

        Args:
            step: steps taken.
            state: state dictionaries and plain values.
            score: how good it is, less being better; None: nobody has looked.
        Errors: UserError if a weight of a `model` in it, its own or a part's, is not finite; the last good checkpoint stays. OSError of
            the write before.
        """
        models = [part["model"] for part in (state, *state.values()) if isinstance(part, dict) and "model" in part]
        for model in models:
            for name, weight in model.items():
                if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
                    raise UserError(f"step {step}: expected finite weights, found others in {name}; the checkpoint before is kept")
        if not self._accelerator.is_main_process:
            return
        self.wait()
        copy = _copied({"format": _FORMAT, "stage": self.stage, "step": step, **state})
        self._writing = threading.Thread(target=self._write, args=(step, copy, score), name="checkpoint")
        self._writing.start()

    def check(self) -> None:
        """Errors: OSError of a write that has failed by now."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Until what was saved last is on the disk. Errors: OSError if it could not be written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        self.check()

    def load_latest(self) -> dict[str, Any] | None:
        """The newest state that is whole, tensors on the CPU, the same on all processes; None if there is none. A damaged one is said and
        put aside.

        Errors: UserError for files of which none is whole, and one of something else.
        """
        name, state = self._newest() if self._accelerator.is_main_process else (None, None)
        if self._accelerator.num_processes > 1:
            found = [name]
            broadcast_object_list(found)  # others might see another file, or another damage
            name = found[0]
        return self._read(self.folder / name) if state is None and name is not None else state

    def _write(self, step: int, state: dict[str, Any], score: float | None) -> None:
        try:
            for part in self.folder.glob("step-*.tmp-*"):  # of a process that was killed while it wrote
                part.unlink()
            path = self._path(step)
            with replacing(path) as file:
                _save(state, file)
            for later in self.paths():  # of a training that went on from an earlier step since
                if later > path:
                    later.unlink()
            best = self._best()
            if score is not None and (best is None or score < best["score"]):
                best = {"step": step, "score": score}
                write_json(self.folder / "best.json", best)
            for old in self.paths()[: -self.keep]:
                if best is None or old != self._path(best["step"]):
                    old.unlink()
        except BaseException as error:
            self._failure = error

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.pt"

    def _best(self) -> dict[str, Any] | None:
        """Step and score of the best checkpoint that is still there."""
        noted = self.folder / "best.json"
        best = read_json(noted) if noted.exists() else None
        return best if best is not None and self._path(best["step"]).exists() else None

    def _newest(self) -> tuple[str | None, dict[str, Any] | None]:
        """Name and content of the newest checkpoint that is whole."""
        damaged: dict[Path, DamagedCheckpoint] = {}
        for path in reversed(self.paths()):
            try:
                state = self._read(path)
            except DamagedCheckpoint as found:
                damaged[path] = found
                continue
            for other, damage in damaged.items():
                other.rename(other.with_name(f"{other.name}.damaged"))
                say(f"{RunDir.show(other)}: {damage}; put aside as {other.name}.damaged, for the one before")
            return path.name, state
        if damaged:  # they stay: without any checkpoint training would begin anew
            where, why = next(iter(damaged.items()))
            raise UserError(
                f"{RunDir.show(where)}: {why}; none before it is whole; delete it to begin anew, or train another with --run NAME"
            )
        return None, None

    def _read(self, path: Path) -> dict[str, Any]:
        """Errors: DamagedCheckpoint; UserError for a file of something else."""
        where, expected = RunDir.show(path), f"expected a checkpoint of {self.stage}"
        summed = _check_sum(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, OSError) as error:
            if summed:  # nothing is wrong with the file
                raise
            raise DamagedCheckpoint(f"{expected}, found a truncated or foreign file ({type(error).__name__})") from error
        if not isinstance(state, dict) or state.get("stage") != self.stage or state.get("format") not in (_FORMAT, _WITHOUT_SUM):
            found = f"stage {state.get('stage')}, format {state.get('format')}" if isinstance(state, dict) else type(state).__name__
            raise UserError(f"{where}: {expected}, format {_FORMAT}, found {found}; delete it to go on from the one before")
        if state["format"] == _FORMAT and not summed:
            raise DamagedCheckpoint(f"{expected} with its sha256 at its end, found none")
        return state


class _Summing(io.RawIOBase):
    """A file that adds up what is written, and keeps what went wrong: torch says only that something did."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sum = file, hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        self.sum.update(content)
        try:
            return self._file.write(content)
        except OSError as error:
            self.failure = error
            raise


def _save(state: dict[str, Any], file: BinaryIO) -> None:
    """Write a state and its sum. Errors: OSError."""
    summing = _Summing(file)
    try:
        torch.save(state, summing)  # type: ignore[arg-type]
    except RuntimeError:
        if summing.failure is not None:
            raise summing.failure from None
        raise
    file.write(_MARK + summing.sum.hexdigest().encode())


def _check_sum(path: Path) -> bool:
    """Whether a file has its sum at its end. Errors: DamagedCheckpoint if it is another's."""
    left, found = path.stat().st_size - _TRAILER, hashlib.sha256()
    with open(path, "rb") as file:
        while left > 0:
            part = file.read(min(left, _READ_AT_ONCE))
            found.update(part)
            left -= len(part)
        trailer = file.read()
    if not trailer.startswith(_MARK):
        return False
    if trailer != _MARK + found.hexdigest().encode():
        raise DamagedCheckpoint("expected the content that was written, found another than its sha256 was of")
    return True


def _copied(state: Any) -> Any:
    """The same state on the CPU, sharing no memory with what goes on changing."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(_copied, state))
    return state
