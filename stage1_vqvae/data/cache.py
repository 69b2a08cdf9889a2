"""Decoded images on disk, mapped into memory: decoded once, found again by every later command, shared by all processes of a machine."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from configs.errors import UserError, say
from configs.run_dir import read_json, write_json

_FORMAT = 1
_HEAD_START = 1.0  # second


def default_folder() -> Path:
    """Where decoded images are kept if the recipe does not say: below `$XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "two-stage-image-generator" / "images"


def files_identity(files: Iterable[Path]) -> str:
    """What changes when a file is added, taken away, or written: the sha256 of all paths, sizes and times."""
    found = hashlib.sha256()
    for path in files:
        status = path.stat()
        found.update(f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return found.hexdigest()


class CachedImages(NamedTuple):
    """Decoded images."""

    pixels: Tensor
    """uint8 (N, H, W, C), mapped from a file."""
    skipped: dict[int, str]
    """Which of those asked for are not among them, and why."""


def cached(
    folder: Path,
    identity: dict[str, Any],
    shape: tuple[int, ...],
    decode: Callable[[], Iterable[np.ndarray | str]],
    what: str,
) -> CachedImages:
    """Images from the file of the cache that has them, which is written first if it is not there.

    One process of the machine decodes; the others wait for it.

    Args:
        folder: the cache.
        identity: all that decides what the pixels are.
        shape: (N, H, W, C) of those asked for.
        decode: each of them, in order, or why it cannot be decoded.
        what: they are, for messages.
    Errors: UserError if the disk has no room for them; OSError with the file's name.
    """
    versions = {"format": _FORMAT, "pillow": metadata.version("pillow"), "datasets": metadata.version("datasets")}
    key = hashlib.sha256(json.dumps({**versions, **identity, "shape": shape}, sort_keys=True).encode()).hexdigest()[:32]
    path, size = folder / f"{key}.pixels", math.prod(shape[1:])
    noted = path.with_suffix(".json")

    def skipped() -> dict[int, str]:
        return {int(row): reason for row, reason in read_json(noted)["skipped"].items()}

    def there() -> bool:
        return noted.exists() and path.exists() and path.stat().st_size == size * (shape[0] - len(skipped()))

    if os.environ.get("LOCAL_RANK", "0") != "0" and not there():
        time.sleep(_HEAD_START)  # so that the process that shows its progress is the one that decodes
    if not there():  # what is there may be read-only
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            if not there():
                left_out = _write(path, size * shape[0], decode(), what)
                write_json(noted, {"what": what, "shape": shape, **identity, "skipped": left_out})
    left_out = skipped()
    count = shape[0] - len(left_out)
    # Read-only: a private map that could be written into would need as much memory, promised if not taken, as the file is long.
    mapped = np.memmap(path, np.uint8, "r", shape=(count, *shape[1:]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return CachedImages(torch.from_numpy(mapped), left_out)


def _write(path: Path, size: int, images: Iterable[np.ndarray | str], what: str) -> dict[int, str]:
    unfinished, skipped = path.with_suffix(".unfinished"), {}
    unfinished.unlink(missing_ok=True)  # of a command that was killed
    free = shutil.disk_usage(path.parent).free
    if size > free:
        wanted = f"room for {_amount(size)} of decoded images of {what}"
        raise UserError(f"data.cache {path.parent}: expected {wanted}, found {_amount(free)} free; make room, or name another folder")
    say(f"{what}: keeping decoded images in {path.parent}, {_amount(size)}")
    try:
        with open(unfinished, "wb") as file:
            for row, image in enumerate(images):
                if isinstance(image, str):
                    skipped[row] = image
                else:
                    file.write(image.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk, or a quota
            raise OSError(error.errno, error.strerror, str(unfinished)) from error
        raise
    return skipped


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
