"""Decoded images on disk, mapped into memory: decoded once, found again by every later command, shared by all processes of a machine."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from configs.errors import UserError, say

_FORMAT = 1
_PATIENCE = 0.2  # seconds between two looks for what another process decodes


def default_folder() -> Path:
    """Where decoded images are kept if the recipe does not say: below `$XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "two-stage-image-generator" / "images"


def files_identity(files: Iterable[Path]) -> str:
    """What changes when a file is added, taken away, or written: the sha256 of all paths, sizes and times."""
    found = hashlib.sha256()
    for path in files:
        status = path.stat()
        found.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return found.hexdigest()


def cached(
    folder: Path,
    identity: dict[str, Any],
    shape: tuple[int, ...],
    decode: Callable[[], Iterable[np.ndarray]],
    what: str,
) -> Tensor:
    """Images as a uint8 tensor of that shape, mapped from a file that is written first if it is not there.

    One process of the machine decodes; the others wait for it.

    Args:
        folder: the cache.
        identity: all that decides what the pixels are.
        shape: (N, H, W, C).
        decode: their parts, in order.
        what: they are, for messages.
    Errors: UserError if the disk has no room for them; OSError with the file's name.
    """
    versions = {"format": _FORMAT, "pillow": metadata.version("pillow"), "datasets": metadata.version("datasets")}
    key = hashlib.sha256(json.dumps({**versions, **identity, "shape": shape}, sort_keys=True).encode()).hexdigest()[:32]
    path, size = folder / f"{key}.pixels", math.prod(shape)

    def there() -> bool:
        return path.exists() and path.stat().st_size == size

    first = os.environ.get("LOCAL_RANK", "0") == "0"
    while not (first or there()):
        time.sleep(_PATIENCE)  # for the process that shows its progress; a launcher ends all if that one fails
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{key}.lock"):  # of another command
        if not there():
            _write(path, size, decode(), what)
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).view(shape)


def _write(path: Path, size: int, parts: Iterable[np.ndarray], what: str) -> None:
    free = shutil.disk_usage(path.parent).free
    if size > free:
        wanted = f"room for {_amount(size)} of decoded images of {what}"
        raise UserError(f"data.cache {path.parent}: expected {wanted}, found {_amount(free)} free; name another folder with --data.cache")
    say(f"{what}: keeping decoded images in {path.parent}, {_amount(size)}")
    unfinished = path.with_suffix(".unfinished")
    try:
        with open(unfinished, "wb") as file:
            for part in parts:
                file.write(part.tobytes())
        assert unfinished.stat().st_size == size
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
