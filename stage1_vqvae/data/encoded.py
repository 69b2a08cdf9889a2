"""Encoded images, the usual case: decoded once into a file that all processes of a machine map into memory, or each time they are read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
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
_RANGE_SAMPLES = 16
"""Images of more than 8 bits by which the range of values is judged."""
_SIXTEEN_BITS = 65535
_DARK = 3.9
"""Ratio of white to the largest value from which images are called dark: two bits unused, as by 14-bit sensors in files of 16 bits."""


class EncodedImage(NamedTuple):
    """An encoded image: its bytes, or the path of its file."""

    content: bytes | None
    """None: the file at `path` has them."""
    path: str | None
    """Path or name of the file; None: unknown."""


class EncodedImages(Protocol):
    """Sequence of encoded images, read some rows at a time."""

    @property
    def file_lengths(self) -> np.ndarray | None:
        """(F,) images per file where files are read from end to end; None: any row can be read at any time."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: list[int], /) -> list[EncodedImage]: ...


def parse_encoded_image(record: Any) -> EncodedImage:
    """Convert a value of a column of images: a struct of bytes and perhaps a path, bytes alone or as a list of numbers, or None."""
    if isinstance(record, dict):
        return EncodedImage(record.get("bytes"), record.get("path"))
    return EncodedImage(None if record is None else bytes(record), None)


class FilePaths:
    """Encoded images in files of their own."""

    file_lengths = None

    def __init__(self, paths: Sequence[str | None]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, rows: list[int]) -> list[EncodedImage]:
        return [EncodedImage(None, self._paths[row]) for row in rows]


def num_decoding_threads(data: Data) -> int:
    """Return how many threads of this process decode."""
    return share_of_cores() if data.workers is None else data.workers


class EncodedPixels(CroppablePixels):
    """Pixels of some rows of encoded images, decoded in threads each time they are read."""

    def __init__(self, images: EncodedImages, rows: np.ndarray, data: Data, what: str) -> None:
        super().__init__(len(rows), data)
        self._images, self._rows, self._data, self._what = images, rows, data, what
        threads = num_decoding_threads(data)
        self._pool = ThreadPoolExecutor(threads) if threads > 0 else None
        self.file_lengths: np.ndarray | None = None
        """`EncodedImages.file_lengths` of these rows alone."""
        if (lengths := images.file_lengths) is not None:
            self.file_lengths = np.bincount(np.searchsorted(np.cumsum(lengths), rows, side="right"), minlength=len(lengths))

    @override
    def cropped(self, rows: Tensor, crops: Sequence[Sequence[Crop | None]]) -> Tensor:
        pixels = np.empty((len(rows), len(crops[0]) if crops else 1, *self.shape[1:]), np.uint8)
        source_rows = self._rows[rows.numpy()].tolist()

        def decode(index: int, image: EncodedImage) -> None:
            pixels[index] = decode_crops(image.content, image.path, self._data, crops[index], f"{self._what}: image {source_rows[index]}")

        for _ in (map if self._pool is None else self._pool.map)(decode, range(len(source_rows)), self._images[source_rows]):
            pass
        return torch.from_numpy(pixels)


class EncodedSplit(SourceSplit):
    """Split of encoded images."""

    def __init__(
        self,
        name: str,
        images: EncodedImages,
        labels: np.ndarray | None,
        fingerprint: str,
        column: Callable[[str], Sequence[Any]] | None = None,
    ) -> None:
        """`column`: reads the values of a column; None: the source has no columns."""
        self.name, self.images, self.labels, self.fingerprint, self._column = name, images, labels, fingerprint, column
        self._range_checked = False

    @override
    def __len__(self) -> int:
        return len(self.images)

    @override
    def column(self, name: str) -> Sequence[Any]:
        return super().column(name) if self._column is None else self._column(name)

    @override
    def is_kept(self, rows: np.ndarray, data: Data) -> bool:
        return data.decode == "once" and are_cached(cache_folder(data), self._cache_key(rows, data), _shape(rows, data))

    def _selection(self, rows: np.ndarray) -> dict[str, Any]:
        return {"source": self.fingerprint, "split": self.name, "rows": hashlib.sha256(rows.tobytes()).hexdigest()}

    def _cache_key(self, rows: np.ndarray, data: Data) -> dict[str, Any]:
        """Return the images, and every setting that decides their pixels and whether they can be read."""
        return {**self._selection(rows), "settings": pixel_settings(data)}

    @override
    def read(self, rows: np.ndarray | None, data: Data, progress: bool) -> ReadableImages:
        rows, what = np.arange(len(self)) if rows is None else rows, f"{data.path or data.name}, {self.name}"
        key, folder = self._cache_key(rows, data), cache_folder(data)

        def decode_all() -> Iterator[np.ndarray | str]:
            return self._decode_all(rows, data, what, progress)

        if data.decode == "each_time":
            # Which images cannot be read is known only after all have been decoded.
            skipped = cached_unreadable(folder, key, decode_all, what) if data.on_error == "skip" else {}
            images = ReadableImages(EncodedPixels(self.images, np.delete(rows, list(skipped)), data, what), skipped)
        else:
            images = cached_images(folder, key, _shape(rows, data), decode_all, what)
        _check_skipped(images.skipped.values(), len(rows), data, what)
        if self.name == TRAIN and not self._range_checked:  # validation images may be drawn from this split too
            self._say_range(rows, folder, data, what)
        return images

    def _say_range(self, rows: np.ndarray, folder: Path, data: Data, what: str) -> None:
        """Print a line if images of more than 8 bits use little of their range, or are clipped by `data.white`."""
        self._range_checked = True
        if self.images.file_lengths is None:
            largest = self._largest_values(rows[:: max(1, len(rows) // _RANGE_SAMPLES)])
        else:  # files that are read from their beginning, perhaps over a network: once for all commands
            key = {**self._selection(rows), "kept": "range"}
            largest = cached_json(folder, key, lambda: {"largest": self._largest_values(rows)})["largest"]
        if not largest:
            return
        highest, grey = max(value for value, _ in largest), all(grey for _, grey in largest)
        white = _SIXTEEN_BITS if data.white is None or not grey else data.white
        values = f"{what}: values up to {highest:,g}, where {white:,g} is white, in {len(largest)} images of more than 8 bits"
        if grey and data.white is not None and highest > white:
            say(f"{values}: all above are white too (data.white)")
        elif highest * _DARK <= white:
            fitting = 2 ** math.ceil(math.log2(highest + 1)) - 1 if highest >= 1 else highest
            way = f"--data.white {fitting:g} makes them as bright as can be" if grey else "store them with 8 bits, scaled to 255"
            say(f"{values}: they are dark; {way}")

    def _largest_values(self, rows: np.ndarray) -> list[tuple[float, bool]]:
        """Return the `largest_value` of the first images of those rows, without images of 8 bits."""
        values = [largest_value(*image) for image in self.images[rows[:_RANGE_SAMPLES].tolist()]]
        return [value for value in values if value is not None]

    def _decode_all(self, rows: np.ndarray, data: Data, what: str, progress: bool) -> Iterator[np.ndarray | str]:
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
                chunk = rows[start : start + _DECODED_AT_ONCE]
                yield from pool.map(decode, chunk.tolist(), self.images[chunk.tolist()])
                _check_skipped(skipped, len(rows), data, what)
                bar.update(len(chunk))


def _shape(rows: np.ndarray, data: Data) -> tuple[int, int, int, int]:
    return (len(rows), data.height, data.width, data.channels)


def _check_skipped(skipped: Collection[str], count: int, data: Data, what: str) -> None:
    """Errors: UserError if more of `count` images cannot be read than `data.most_skipped` allows."""
    if len(skipped) > data.most_skipped * count:
        expected = f"expected at most {data.most_skipped:.1%} of {count:,} images that cannot be read (--data.most_skipped)"
        raise UserError(f"{what}: {expected}, found {len(skipped):,}; one is {next(iter(skipped))}")
