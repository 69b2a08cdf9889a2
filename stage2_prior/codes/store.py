"""Codes on disk, both ways: a folder with a manifest and a few safetensors files.

    codes/train/manifest.json
    codes/train/codes-00000-of-00002.safetensors    level0 (rows, variants, h, w), the smallest unsigned dtype; labels (rows,)

Rows are in data-set order, exactly one a sample; the second axis holds its augmentation's variants, the first of which
is the image itself. Stage 2 learns grids, code numbers and labels from the manifest and from nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError
from torch import Tensor

from configs.errors import UserError
from configs.run_dir import read_json, write_bytes, write_json
from configs.schema import Augmentation
from stage1_vqvae.quantizers.contract import Codes

_FORMAT = 1
_ROWS_PER_FILE = 2**16
_MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a split: all there is to know of its codes but the codes."""

    split: str
    rows: int
    """Number of images."""
    grids: list[tuple[int, int]]
    """(h, w) of each level, coarse to fine."""
    num_codes: list[int]
    """K, the number of codes, of each level."""
    label_names: list[str] | None
    """Null: the images have no labels."""
    augmentation: Augmentation
    """What the variant axis enumerates."""
    variants: int
    """How many variants of each image are stored."""
    image_shape: tuple[int, int, int]
    """Channels, height and width of the images."""
    tokenizer_sha256: str
    """The sha256 of the tokenizer file that made the codes."""
    format: int = _FORMAT


def _file_names(rows: int) -> list[str]:
    count = max(1, -(-rows // _ROWS_PER_FILE))
    return [f"codes-{number:05d}-of-{count:05d}.safetensors" for number in range(count)]


def smallest_dtype(num_codes: int) -> np.dtype:
    """The smallest unsigned integer that holds 0..num_codes-1."""
    return np.min_scalar_type(num_codes - 1)


class CodeWriter:
    """Takes rows in order and writes a file whenever one is full; `close` checks the count and adds the manifest."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._names = _file_names(manifest.rows)
        self._pending: list[dict[str, np.ndarray]] = []
        self._pending_rows = self._written_files = self._rows = 0

    def add(self, codes: Sequence[Tensor], labels: Tensor | None) -> None:
        """Append rows: codes (rows, variants, h, w) a level, labels (rows,)."""
        tensors = {}
        for level, (grid, number) in enumerate(zip(codes, self._manifest.num_codes, strict=True)):
            assert grid.numel() == 0 or 0 <= int(grid.min()) <= int(grid.max()) < number
            tensors[f"level{level}"] = grid.cpu().numpy().astype(smallest_dtype(number))
        if labels is not None:
            tensors["labels"] = labels.numpy().astype(smallest_dtype(len(self._manifest.label_names or ())))
        self._pending.append(tensors)
        self._pending_rows += len(codes[0])
        while self._pending_rows >= _ROWS_PER_FILE:
            self._write(_ROWS_PER_FILE)

    def _write(self, rows: int) -> None:
        joined = {name: np.concatenate([part[name] for part in self._pending]) for name in self._pending[0]}
        self._pending = [{name: array[rows:] for name, array in joined.items()}]
        content = {name: np.ascontiguousarray(array[:rows]) for name, array in joined.items()}
        write_bytes(self._folder / self._names[self._written_files], safetensors.numpy.save(content))
        self._written_files += 1
        self._rows += rows
        self._pending_rows -= rows

    def close(self) -> None:
        """Write what is left, then the manifest."""
        if self._pending_rows:
            self._write(self._pending_rows)
        assert self._rows == self._manifest.rows, (self._rows, self._manifest.rows)
        write_json(self._folder / _MANIFEST, dataclasses.asdict(self._manifest))


class CodeStore:
    """A split's codes, in memory, in the dtype they have on disk."""

    def __init__(self, folder: Path, tokenizer_sha256: str | None = None) -> None:
        """Read a split's codes into memory.

        Args:
            folder: the split's.
            tokenizer_sha256: refuse codes of another tokenizer.
        Errors: UserError for what is missing, truncated, or does not fit the manifest.
        """
        self.manifest = read_manifest(folder)
        found = self.manifest.tokenizer_sha256
        if tokenizer_sha256 is not None and found != tokenizer_sha256:
            raise UserError(
                f"{folder}: expected codes of the run's tokenizer {tokenizer_sha256[:12]}, found codes of {found[:12]}; extract them anew"
            )
        parts = [self._read(folder / name) for name in _file_names(self.manifest.rows)]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        levels = range(len(self.manifest.grids))
        self.levels = [joined[f"level{level}"] for level in levels]
        self.labels = torch.from_numpy(joined["labels"].astype(np.int64)) if "labels" in joined else None
        for level, (grid, codes) in enumerate(zip(self.manifest.grids, self.levels, strict=True)):
            expected = (self.manifest.rows, self.manifest.variants, *grid)
            if codes.shape != expected or (codes.size and codes.max() >= self.manifest.num_codes[level]):
                raise UserError(f"{folder}: expected codes {expected} below {self.manifest.num_codes[level]}, found {codes.shape}")

    @staticmethod
    def _read(path: Path) -> dict[str, np.ndarray]:
        try:
            return safetensors.numpy.load_file(path)
        except FileNotFoundError:
            raise UserError(f"{path}: expected a file of codes, found nothing; extract the codes anew, with --overwrite") from None
        except SafetensorError as error:
            raise UserError(
                f"{path}: expected a file of codes, found a truncated or foreign one ({error}); extract the codes anew, with --overwrite"
            ) from None

    def __len__(self) -> int:
        return self.manifest.rows

    def codes(self, rows: Tensor, variants: Tensor | None = None) -> Codes:
        """Codes of those rows, each in its variant (default: the image itself): int64 (B, h, w) a level."""
        chosen = np.zeros(len(rows), np.int64) if variants is None else variants.numpy()
        return tuple(torch.from_numpy(level[rows.numpy(), chosen].astype(np.int64)) for level in self.levels)

    def counts(self) -> list[np.ndarray]:
        """How often each code of a level occurs over all rows and variants, (K,) a level."""
        return [np.bincount(level.ravel(), minlength=k) for level, k in zip(self.levels, self.manifest.num_codes, strict=True)]


def read_manifest(folder: Path) -> Manifest:
    """A split's manifest. Errors: UserError if there is none, or one of another format."""
    path = folder / _MANIFEST
    content = read_json(path)
    fields = {field.name for field in dataclasses.fields(Manifest)}
    if not isinstance(content, dict) or set(content) != fields or content["format"] != _FORMAT:
        raise UserError(f"{path}: expected a manifest of format {_FORMAT}, found something else; extract the codes anew, with --overwrite")
    content["grids"] = [tuple(grid) for grid in content["grids"]]
    content["image_shape"] = tuple(content["image_shape"])
    return Manifest(**content)
