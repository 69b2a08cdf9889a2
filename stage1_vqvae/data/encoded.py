"""Encoded images, the usual case: decoded once into a file that all processes of a machine map into their memory, or whenever they are
asked for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from configs.data import Data, pixel_settings
from configs.errors import UserError, say
from stage1_vqvae.data.cache import are_cached, cache_folder, cached_images, cached_json, cached_unreadable
from stage1_vqvae.data.crops import Crop
from stage1_vqvae.data.decoding import UnreadableImage, decode_crops, decode_image, largest_value
from stage1_vqvae.data.splits import TRAIN, CroppablePixels, ReadableImages, SourceSplit
from training.processes import share_of_cores
from training.progress import progress_bar

_DECODED_AT_ONCE = 1024
_LOOKED_AT = 16
"""Images by which the range of values is known, where they have more than 8 bits."""
_SIXTEEN_BITS = 65535
_FAR = 3.9
"""Values that many times smaller than white use two bits less than there are, as those of 14-bit sensors in files of 16 bits."""


class EncodedImage(NamedTuple):
    """An image as its source has it."""

    content: bytes | None
    """None: in the file at `path`."""
    path: str | None


class EncodedImages(Protocol):
    """Encoded images, of which some are read at a time."""

    @property
    def file_lengths(self) -> np.ndarray | None:
        """Images of each file, (F,), where files are read from end to end; None: any can be read at any time."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: list[int], /) -> list[EncodedImage]: ...


def parse_encoded_image(record: Any) -> EncodedImage:
    """What a column holds of an image: a struct of bytes and perhaps a path, bytes alone or as a list of numbers, or None."""
    if isinstance(record, dict):
        return EncodedImage(record.get("bytes"), record.get("path"))
    return EncodedImage(None if record is None else bytes(record), None)


class FilePaths:
    """Image files, as `EncodedImages`."""

    file_lengths = None

    def __init__(self, paths: Sequence[str | None]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, rows: list[int]) -> list[EncodedImage]:
        return [EncodedImage(None, self._paths[row]) for row in rows]


def num_decoding_threads(data: Data) -> int:
    """How many threads of this process decode."""
    return share_of_cores() if data.workers is None else data.workers


class EncodedPixels(CroppablePixels):
    """Of rows of encoded images, decoded in threads."""

    def __init__(self, images: EncodedImages, rows: np.ndarray, data: Data, what: str) -> None:
        super().__init__(len(rows), data)
        self._images, self._rows, self._data, self._what = images, rows, data, what
        threads = num_decoding_threads(data)
        self._pool = ThreadPoolExecutor(threads) if threads > 0 else None
        self.file_lengths: np.ndarray | None = None
        """As that of `EncodedImages`, of those that are here."""
        if (lengths := images.file_lengths) is not None:
            self.file_lengths = np.bincount(np.searchsorted(np.cumsum(lengths), rows, side="right"), minlength=len(lengths))

    @override
    def cropped(self, rows: Tensor, crops: Sequence[Sequence[Crop | None]]) -> Tensor:
        found = np.empty((len(rows), len(crops[0]) if crops else 1, *self.shape[1:]), np.uint8)
        wanted = self._rows[rows.numpy()].tolist()

        def decode(place: int, image: EncodedImage) -> None:
            found[place] = decode_crops(image.content, image.path, self._data, crops[place], f"{self._what}: image {wanted[place]}")

        for _ in (map if self._pool is None else self._pool.map)(decode, range(len(wanted)), self._images[wanted]):
            pass
        return torch.from_numpy(found)


class EncodedSplit(SourceSplit):
    """Of encoded images."""

    def __init__(self, name: str, images: EncodedImages, labels: np.ndarray | None, fingerprint: str) -> None:
        self.name, self.images, self.labels, self.fingerprint = name, images, labels, fingerprint
        self._range_known = False

    @override
    def __len__(self) -> int:
        return len(self.images)

    @override
    def is_kept(self, rows: np.ndarray, data: Data) -> bool:
        return data.decode == "once" and are_cached(cache_folder(data), self._cache_key(rows, data), _shape(rows, data))

    def _selection(self, rows: np.ndarray) -> dict[str, Any]:
        return {"source": self.fingerprint, "split": self.name, "rows": hashlib.sha256(rows.tobytes()).hexdigest()}

    def _cache_key(self, rows: np.ndarray, data: Data) -> dict[str, Any]:
        """The images, and every setting that decides their pixels and whether they can be read."""
        return {**self._selection(rows), "settings": pixel_settings(data)}

    @override
    def read(self, rows: np.ndarray | None, data: Data, progress: bool) -> ReadableImages:
        wanted, what = np.arange(len(self)) if rows is None else rows, f"{data.path or data.name}, {self.name}"
        key, folder = self._cache_key(wanted, data), cache_folder(data)

        def each() -> Iterator[np.ndarray | str]:
            return self._each(wanted, data, what, progress)

        if data.decode == "each_time":
            # Which of them cannot be read is known only once all have been.
            skipped = cached_unreadable(folder, key, each, what) if data.on_error == "skip" else {}
            found = ReadableImages(EncodedPixels(self.images, np.delete(wanted, list(skipped)), data, what), skipped)
        else:
            found = cached_images(folder, key, _shape(wanted, data), each, what)
        _check_skipped(found.skipped.values(), len(wanted), data, what)
        if self.name == TRAIN and not self._range_known:  # of which validation images may be drawn as well
            self._say_range(wanted, folder, data, what)
        return found

    def _say_range(self, rows: np.ndarray, folder: Path, data: Data, what: str) -> None:
        """Say it if images of more than 8 bits are far from using their range, or are cut off by `data.white`."""
        self._range_known = True
        if self.images.file_lengths is None:
            found = self._brightest(rows[:: max(1, len(rows) // _LOOKED_AT)])
        else:  # files that are read from their beginning, perhaps over a network: once for all commands
            key = {**self._selection(rows), "kept": "range"}
            found = cached_json(folder, key, lambda: {"brightest": self._brightest(rows)})["brightest"]
        if not found:
            return
        highest, grey = max(value for value, _ in found), all(grey for _, grey in found)
        white = _SIXTEEN_BITS if data.white is None or not grey else data.white
        seen = f"{what}: values up to {highest:,g}, where {white:,g} is white, in {len(found)} images of more than 8 bits"
        if grey and data.white is not None and highest > white:
            say(f"{seen}: all above are white too (data.white)")
        elif highest * _FAR <= white:
            fitting = 2 ** math.ceil(math.log2(highest + 1)) - 1 if highest >= 1 else highest
            way = f"--data.white {fitting:g} makes them as bright as can be" if grey else "store them with 8 bits, scaled to 255"
            say(f"{seen}: they are dark; {way}")

    def _brightest(self, rows: np.ndarray) -> list[tuple[float, bool]]:
        """What `largest_value` says of the first of those rows, without images of 8 bits."""
        found = [largest_value(*image) for image in self.images[rows[:_LOOKED_AT].tolist()]]
        return [value for value in found if value is not None]

    def _each(self, rows: np.ndarray, data: Data, what: str, progress: bool) -> Iterator[np.ndarray | str]:
        skipped: list[str] = []

        def decode(row: int, image: EncodedImage) -> np.ndarray | str:
            try:
                return decode_image(image.content, image.path, data, f"{what}: image {row}")
            except UnreadableImage as error:
                if data.on_error == "raise":
                    raise
                skipped.append(str(error))
                return str(error)

        threads = ThreadPoolExecutor(max(1, num_decoding_threads(data)))
        with threads as pool, progress_bar(len(rows), f"decode {self.name}", "img", shown=progress) as bar:
            for start in range(0, len(rows), _DECODED_AT_ONCE):
                part = rows[start : start + _DECODED_AT_ONCE]
                yield from pool.map(decode, part.tolist(), self.images[part.tolist()])
                _check_skipped(skipped, len(rows), data, what)
                bar.update(len(part))


def _shape(rows: np.ndarray, data: Data) -> tuple[int, int, int, int]:
    return (len(rows), data.height, data.width, data.channels)


def _check_skipped(skipped: Collection[str], count: int, data: Data, what: str) -> None:
    """Errors: UserError if more of `count` images cannot be read than the recipe says."""
    if len(skipped) > data.most_skipped * count:
        expected = f"expected at most {data.most_skipped:.1%} of {count:,} images that cannot be read (--data.most_skipped)"
        raise UserError(f"{what}: {expected}, found {len(skipped):,}; one is {next(iter(skipped))}")
