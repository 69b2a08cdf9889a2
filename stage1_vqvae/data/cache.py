"""Decoded images on disk, mapped into memory: decoded once, found again by every later command, shared by all processes of a machine."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from configs.data import Data
from configs.errors import UserError, say
from configs.run_dir import read_json, write_json
from stage1_vqvae.data.splits import ReadableImages
from training.weights_file import load_weights, save_weights

_FORMAT = 1
_HEAD_START = 1.0  # second
_TENSORS = "kept finding"


def cache_folder(data: Data) -> Path:
    """Where decoded images are kept: below `$XDG_CACHE_HOME`, or `~/.cache`, if the recipe does not say."""
    if data.cache is not None:
        return Path(data.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "two-stage-image-generator" / "images"


def files_fingerprint(files: Iterable[Path]) -> str:
    """Two sha256, with a blank between: of all paths, sizes and times, which changes whenever a file is written; and of names, below the
    folder that all files lie in, and sizes, which is the same for a copy of the files (`portable_fingerprint`).
    """
    paths = list(files)
    names = [path.absolute().as_posix() for path in paths]
    # What the first and the last in order have in common, all have.
    above = os.path.commonpath([os.path.dirname(name) for name in (min(names, default=""), max(names, default=""))])
    written, copied = hashlib.sha256(), hashlib.sha256()
    for path, name in zip(paths, names, strict=True):
        status = path.stat()
        written.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
        copied.update(f"{unicodedata.normalize('NFC', name[len(above) :])}\0{status.st_size}\0".encode(errors="surrogateescape"))
    return f"{written.hexdigest()} {copied.hexdigest()}"


def portable_fingerprint(fingerprint: str) -> str:
    """Return the last word of a split's fingerprint, equal for a copy of its files: a sha256, or KIND:NAME of data from elsewhere."""
    return fingerprint.rpartition(" ")[2]


def cached_images(
    folder: Path,
    key: dict[str, Any],
    shape: tuple[int, ...],
    decode: Callable[[], Iterable[np.ndarray | str]],
    what: str,
) -> ReadableImages:
    """Images from the file of the cache that has them, which is written first if it is not there.

    One process of the machine decodes; the others wait for it.

    Args:
        folder: the cache.
        key: all that decides what the pixels are.
        shape: (N, H, W, C) of those asked for.
        decode: each of them, in order, or why it cannot be decoded.
        what: they are, for messages.
    Errors: UserError if the disk has no room for them; OSError with the file's name.
    """
    path = _pixels_path(folder, key, shape)
    noted = path.with_suffix(".json")

    def make() -> None:
        skipped = _write(path, math.prod(shape), decode(), what)
        write_json(noted, {"what": what, "shape": shape, **key, "skipped": skipped})

    _by_one(path, lambda: are_cached(folder, key, shape), make)
    left_out = _skipped(noted)
    count = shape[0] - len(left_out)
    # Read-only: a private map that could be written into would need as much memory, promised if not taken, as the file is long.
    mapped = np.memmap(path, np.uint8, "r", shape=(count, *shape[1:]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return ReadableImages(torch.from_numpy(mapped), left_out)


def are_cached(folder: Path, key: dict[str, Any], shape: tuple[int, ...]) -> bool:
    """Whether `cached_images` would find them there."""
    path = _pixels_path(folder, key, shape)
    noted = path.with_suffix(".json")
    return noted.exists() and path.exists() and path.stat().st_size == math.prod(shape[1:]) * (shape[0] - len(_skipped(noted)))


def _pixels_path(folder: Path, key: dict[str, Any], shape: tuple[int, ...]) -> Path:
    return folder / f"{_key({**key, 'shape': shape})}.pixels"


def cached_unreadable(folder: Path, key: dict[str, Any], decode: Callable[[], Iterable[np.ndarray | str]], what: str) -> dict[int, str]:
    """Which images cannot be decoded, and why: as `cached_images` finds it, without keeping any of them."""

    def find() -> dict[str, Any]:
        say(f"{what}: looking for images that cannot be read, once for all commands")
        return {"what": what, "skipped": {row: image for row, image in enumerate(decode()) if isinstance(image, str)}}

    return {int(row): reason for row, reason in cached_json(folder, {**key, "kept": "reasons"}, find)["skipped"].items()}


def cached_json(folder: Path, key: dict[str, Any], find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was found out about images, from the file of the cache that has it, which one process writes first if it is not there.

    Args:
        folder: the cache.
        key: all that decides what is found.
        find: it, as JSON knows it.
    """
    path = folder / f"{_key(key)}.json"
    _by_one(path, path.exists, lambda: write_json(path, {**key, **find()}))
    return dict(read_json(path))


def cached_tensors(
    folder: Path, key: dict[str, Any], find: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `cached_json`, of tensors, and of what JSON knows beside them; not kept where nothing can be written."""
    path, found = folder / f"{_key(key)}.safetensors", list[tuple[dict[str, Tensor], dict[str, Any]]]()

    def make() -> None:
        found.append(find())
        save_weights(path, found[0][0], {"kind": _TENSORS, **key, **found[0][1]})

    try:
        _by_one(path, path.exists, make)
    except OSError as error:
        say(f"{error.filename or path}: found out anew by each command ({error.strerror})")
        return found[0] if found else find()
    return load_weights(path, _TENSORS)


def _key(key: dict[str, Any]) -> str:
    versions = {"format": _FORMAT, "pillow": metadata.version("pillow"), "datasets": metadata.version("datasets")}
    return hashlib.sha256(json.dumps({**versions, **key}, sort_keys=True).encode()).hexdigest()[:32]


def _skipped(noted: Path) -> dict[int, str]:
    return {int(row): reason for row, reason in read_json(noted)["skipped"].items()}


def _by_one(path: Path, there: Callable[[], bool], make: Callable[[], None]) -> None:
    """Have one process of the machine make what is at the path, unless it is there."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and not there():
        time.sleep(_HEAD_START)  # so that the process that shows its progress is the one that decodes
    if not there():  # what is there may be read-only
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not there():
                make()


def _write(path: Path, size: int, images: Iterable[np.ndarray | str], what: str) -> dict[int, str]:
    unfinished, skipped = path.with_suffix(".unfinished"), {}
    unfinished.unlink(missing_ok=True)  # of a command that was killed
    free = shutil.disk_usage(path.parent).free
    if size > free:
        wanted = f"room for {_amount(size)} of decoded images of {what}"
        ways = "make room, name another folder, or keep none (--data.decode each_time)"
        raise UserError(f"data.cache {path.parent}: expected {wanted}, found {_amount(free)} free; {ways}")
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
