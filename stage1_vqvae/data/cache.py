"""Cache of decoded images on disk, mapped into memory: written once, read by every later command, shared by all processes of a machine."""

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
_TENSORS = "cached tensors"


def cache_folder(data: Data) -> Path:
    """Return the folder of decoded images: `data.cache`, or else one below `$XDG_CACHE_HOME` or `~/.cache`."""
    if data.cache is not None:
        return Path(data.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "two-stage-image-generator" / "images"


def files_fingerprint(files: Iterable[Path]) -> str:
    """Return two sha256 with a blank between.

    The first, of paths, sizes and times, changes whenever a file is written. The second, of sizes and of names below the common folder, is
    the same for a copy of the files (`portable_fingerprint`).
    """
    paths = list(files)
    names = [path.absolute().as_posix() for path in paths]
    # The common folder of the first and the last in order is that of all.
    common = os.path.commonpath([os.path.dirname(name) for name in (min(names, default=""), max(names, default=""))])
    written, copied = hashlib.sha256(), hashlib.sha256()
    for path, name in zip(paths, names, strict=True):
        status = path.stat()
        written.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
        copied.update(f"{unicodedata.normalize('NFC', name[len(common) :])}\0{status.st_size}\0".encode(errors="surrogateescape"))
    return f"{written.hexdigest()} {copied.hexdigest()}"


def portable_fingerprint(fingerprint: str) -> str:
    """Return the last word of a split's fingerprint, equal for a copy of its files: a sha256, or KIND:NAME of data from elsewhere."""
    return fingerprint.rpartition(" ")[2]


def cached_images(
    folder: Path,
    key: dict[str, Any],
    shape: tuple[int, ...],
    decode: Callable[[], Iterable[np.ndarray | str]],
    title: str,
) -> ReadableImages:
    """Map images from their file in the cache, which is written first if it is missing.

    One process of the machine decodes; the others wait for it.

    Args:
        folder: the cache.
        key: all that decides the pixels.
        shape: (N, H, W, C) of the images.
        decode: yields each image in order, or the reason why it cannot be decoded.
        title: name of the images in messages.
    Errors: UserError if the disk has no room for them; OSError with the file's name.
    """
    path = _pixels_path(folder, key, shape)
    description = path.with_suffix(".json")

    def make() -> None:
        skipped = _write(path, math.prod(shape), decode(), title)
        write_json(description, {"what": title, "shape": shape, **key, "skipped": skipped})

    _write_once(path, lambda: are_cached(folder, key, shape), make)
    skipped = _skipped(description)
    count = shape[0] - len(skipped)
    # Read-only: a private map that could be written into would need as much memory, promised if not taken, as the file is long.
    mapped = np.memmap(path, np.uint8, "r", shape=(count, *shape[1:]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return ReadableImages(torch.from_numpy(mapped), skipped)


def are_cached(folder: Path, key: dict[str, Any], shape: tuple[int, ...]) -> bool:
    """Return whether the cache has the whole file that `cached_images` maps."""
    path = _pixels_path(folder, key, shape)
    description = path.with_suffix(".json")
    if not description.exists() or not path.exists():
        return False
    return path.stat().st_size == math.prod(shape[1:]) * (shape[0] - len(_skipped(description)))


def _pixels_path(folder: Path, key: dict[str, Any], shape: tuple[int, ...]) -> Path:
    return folder / f"{_file_stem({**key, 'shape': shape})}.pixels"


def cached_unreadable(folder: Path, key: dict[str, Any], decode: Callable[[], Iterable[np.ndarray | str]], title: str) -> dict[int, str]:
    """Return the reason for each row that cannot be decoded, from the cache or by decoding all images without keeping them."""

    def compute() -> dict[str, Any]:
        say(f"{title}: looking for images that cannot be read, once for all commands")
        return {"what": title, "skipped": {row: image for row, image in enumerate(decode()) if isinstance(image, str)}}

    return {int(row): reason for row, reason in cached_json(folder, {**key, "kept": "reasons"}, compute)["skipped"].items()}


def cached_json(folder: Path, key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return values of JSON from their file in the cache, which one process computes and writes first if it is missing.

    Args:
        folder: the cache.
        key: all that decides the values.
        compute: returns them.
    """
    path = folder / f"{_file_stem(key)}.json"
    _write_once(path, path.exists, lambda: write_json(path, {**key, **compute()}))
    return dict(read_json(path))


def cached_tensors(
    folder: Path, key: dict[str, Any], compute: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and values of JSON from the cache as `cached_json` does; where nothing can be written, each command computes them."""
    path, computed = folder / f"{_file_stem(key)}.safetensors", list[tuple[dict[str, Tensor], dict[str, Any]]]()

    def make() -> None:
        computed.append(compute())
        save_weights(path, computed[0][0], {"kind": _TENSORS, **key, **computed[0][1]})

    try:
        _write_once(path, path.exists, make)
    except OSError as error:
        say(f"{error.filename or path}: computed again by each command ({error.strerror})")
        return computed[0] if computed else compute()
    return load_weights(path, _TENSORS)


def _file_stem(key: dict[str, Any]) -> str:
    versions = {"format": _FORMAT, "pillow": metadata.version("pillow"), "datasets": metadata.version("datasets")}
    return hashlib.sha256(json.dumps({**versions, **key}, sort_keys=True).encode()).hexdigest()[:32]


def _skipped(description: Path) -> dict[int, str]:
    return {int(row): reason for row, reason in read_json(description)["skipped"].items()}


def _write_once(path: Path, is_complete: Callable[[], bool], make: Callable[[], None]) -> None:
    """Let one process of the machine make the file unless it is complete."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and not is_complete():
        time.sleep(_HEAD_START)  # so that the process that shows its progress is the one that decodes
    if not is_complete():  # a complete cache may be read-only
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not is_complete():
                make()


def _write(path: Path, size: int, images: Iterable[np.ndarray | str], title: str) -> dict[int, str]:
    unfinished, skipped = path.with_suffix(".unfinished"), {}
    unfinished.unlink(missing_ok=True)  # left by a command that was killed
    free = shutil.disk_usage(path.parent).free
    if size > free:
        expected = f"expected room for {_amount(size)} of decoded images of {title}"
        ways = "make room, name another folder, or keep none (--data.decode each_time)"
        raise UserError(f"data.cache {path.parent}: {expected}, found {_amount(free)} free; {ways}")
    say(f"{title}: keeping decoded images in {path.parent}, {_amount(size)}")
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
