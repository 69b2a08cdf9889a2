"""A checkpoint in one file: a dictionary of state dictionaries and plain values, with its sha256 at its end.

It is read with `weights_only`, so that nothing in it is ever executed.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch

from configs.errors import UserError
from configs.run_dir import RunDir, replacing

FORMAT = 1
_MARK = b"\nsha256 "
_TRAILER = len(_MARK) + 64
_READ_AT_ONCE = 1 << 24  # bytes


class DamagedCheckpoint(ValueError):
    """A checkpoint that differs from what was written."""


def write_file(path: Path, state: dict[str, Any]) -> None:
    """Write a state of CPU tensors and plain values with its sha256, atomically. Errors: OSError with the file's name."""
    with replacing(path) as file:
        hashing = _HashingFile(file)
        try:
            torch.save(state, hashing)  # type: ignore[arg-type]
        except RuntimeError:
            if hashing.failure is not None:
                raise hashing.failure from None
            raise
        file.write(_MARK + hashing.sum.hexdigest().encode())


def read_file(path: Path, stage: str) -> dict[str, Any]:
    """Read what `write_file` wrote for a stage. Errors: DamagedCheckpoint; UserError for another stage's checkpoint."""
    summed = _check_sum(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, OSError) as error:
        if summed:  # nothing is wrong with the file
            raise
        found = f"found a truncated or foreign file ({type(error).__name__})"
        raise DamagedCheckpoint(f"expected a checkpoint of {stage}, {found}") from error
    check_kind(path, state, stage)
    if not summed:
        raise DamagedCheckpoint(f"expected a checkpoint of {stage} with its sha256 at its end, found none")
    return state


def check_kind(path: Path, content: Any, stage: str) -> None:
    """Errors: UserError if `content` is no checkpoint of this stage and format."""
    if not isinstance(content, dict) or content.get("stage") != stage or content.get("format") != FORMAT:
        found = f"one of {content.get('stage')}, format {content.get('format')}" if isinstance(content, dict) else type(content).__name__
        wanted = f"expected a checkpoint of {stage}, format {FORMAT}"
        raise UserError(f"{RunDir.show(path)}: {wanted}, found {found}; delete it to go on from the one before")


class _HashingFile(io.RawIOBase):
    """A file that hashes what is written and keeps an OSError, which torch would replace by one without a reason."""

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


def _check_sum(path: Path) -> bool:
    """Return whether a file ends with its sha256. Errors: DamagedCheckpoint if the sum is that of other content."""
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
