"""The code store: a folder with a manifest and shards of a fixed number of images.

    codes/train/manifest.json
    codes/train/codes-00000-of-00011.safetensors    level0 (rows, variants, h, w), the smallest unsigned dtype; condition (rows, ...)

Rows are in data-set order, exactly one per sample; the second axis holds the variants of the augmentation, the first of which is the image
itself. Stage 2 reads grids, numbers of codes and the condition from the manifest alone. Writing takes the memory of one shard, reading that
of the requested rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.data import Augmentation
from configs.errors import UserError, brief
from configs.parts import ConditionPart, as_dict
from configs.run_dir import read_summed_json, write_bytes, write_summed_json
from configs.schema import condition_from
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.conditions.contract import Condition
from stage2_prior.conditions.none import NoCondition
from training.progress import progress_bar

_FORMAT = 1
MANIFEST = "manifest.json"
"""Name of the file that describes a split's shards."""
_MADE_BY = "tokenizer_sha256"
_EXTRACT_AGAIN = "extract the codes again"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of a split's codes."""

    split: str
    rows: int
    """Number of images."""
    grids: list[tuple[int, int]]
    """(h, w) per level, coarse to fine."""
    num_codes: list[int]
    """K, the number of codes, per level."""
    digits: list[list[int]] = field(default_factory=list)
    """Sizes of the digits of a code, per level, least significant first; empty: unknown, in stores of versions before this field."""
    condition: Condition
    """Condition that is stored with the codes, such as the classes and their names."""
    augmentation: Augmentation
    """Augmentation whose variants the second axis holds."""
    variants: int
    """Number of stored variants per image."""
    image_shape: tuple[int, int, int]
    """Channels, height and width of the images."""
    tokenizer_sha256: str
    """The sha256 of the tokenizer file that made the codes."""
    rows_per_shard: int
    """Images per shard; the last one may have fewer."""
    sha256: list[str]
    """The sha256 of each shard; empty until all are written."""
    format: int = _FORMAT

    def condition_of_prior(self, chosen: ConditionPart) -> Condition:
        """Return the condition of a prior of these codes that a recipe chooses: the stored one, or none.

        Errors: UserError if the codes are stored with another one.
        """
        assert isinstance(chosen, Condition)
        if isinstance(chosen, NoCondition):
            return chosen
        if not chosen.accepts(self.condition):
            way = "extract the codes again, with --overwrite and the same options"
            raise UserError(f"condition: expected {self.condition}, with which the codes are stored, or none, found {chosen}; {way}")
        return self.condition

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """Return the rows of a shard."""
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.rows))

    def shard_name(self, shard: int) -> str:
        """Return the name of a shard's file."""
        return f"codes-{shard:05d}-of-{self.num_shards:05d}.safetensors"


def smallest_dtype(num_codes: int) -> np.dtype:
    """Return the smallest unsigned integer type that holds 0..num_codes-1."""
    return np.min_scalar_type(num_codes - 1)


def write_shard(folder: Path, manifest: Manifest, shard: int, codes: Sequence[Tensor], condition: Tensor | None) -> None:
    """Write one shard, atomically: the codes (rows, variants, h, w) per level and the condition (rows, ...) of its rows."""
    tensors = {}
    for level, (grid, number) in enumerate(zip(codes, manifest.num_codes, strict=True)):
        assert len(grid) == len(manifest.shard_rows(shard)), (len(grid), shard)
        assert grid.numel() == 0 or 0 <= int(grid.min()) <= int(grid.max()) < number
        tensors[f"level{level}"] = grid.cpu().numpy().astype(smallest_dtype(number))
    if condition is not None:
        tensors["condition"] = condition.numpy().astype(manifest.condition.disk_dtype)
    write_bytes(folder / manifest.shard_name(shard), safetensors.numpy.save(tensors, {_MADE_BY: manifest.tokenizer_sha256}))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of complete shards, with the sha256 of each; codes without a manifest are not read."""
    sums = [_sha256(folder / manifest.shard_name(shard)) for shard in range(manifest.num_shards)]
    write_summed_json(folder / MANIFEST, as_dict(dataclasses.replace(manifest, sha256=sums)))


def open_shard(folder: Path, manifest: Manifest, shard: int) -> dict[str, np.ndarray]:
    """Open the arrays of a shard, mapped into memory.

    Errors: UserError if it is missing, truncated, another tokenizer's, or does not fit the manifest.
    """
    path, rows = folder / manifest.shard_name(shard), len(manifest.shard_rows(shard))
    expected = {
        f"level{level}": f"{smallest_dtype(number)} {(rows, manifest.variants, *grid)}"
        for level, (grid, number) in enumerate(zip(manifest.grids, manifest.num_codes, strict=True))
    }
    if not isinstance(manifest.condition, NoCondition):
        expected["condition"] = f"{manifest.condition.disk_dtype} {(rows, *manifest.condition.shape)}"
    try:
        with safe_open(path, "pt") as file:
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118, it is no dict
            made_by = (file.metadata() or {}).get(_MADE_BY, "")
    except FileNotFoundError:
        raise UserError(f"{path}: expected a file of codes, found nothing; {_EXTRACT_AGAIN}, with --overwrite") from None
    except (SafetensorError, TypeError) as error:  # a TypeError for a dtype that numpy does not have
        raise UserError(
            f"{path}: expected a file of codes, found a truncated or foreign one ({brief(error)}); {_EXTRACT_AGAIN}, with --overwrite"
        ) from None
    shapes = {name: f"{array.dtype} {array.shape}" for name, array in arrays.items()}
    if shapes != expected or made_by != manifest.tokenizer_sha256:
        described = f"{expected} of tokenizer {manifest.tokenizer_sha256[:12]}, found {shapes} of tokenizer {made_by[:12]}"
        raise UserError(f"{path}: expected {described}; {_EXTRACT_AGAIN}, with --overwrite")
    return arrays


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CodeStore:
    """A split's codes, mapped into memory: only pages that are read take memory, once for all processes of a machine."""

    def __init__(self, folder: Path, tokenizer_sha256: str | None = None) -> None:
        """Open a split's codes.

        Args:
            folder: the split's folder.
            tokenizer_sha256: refuse codes of another tokenizer.
        Errors: UserError for a file that is missing, truncated, or does not fit the manifest.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        made_by = self.manifest.tokenizer_sha256
        if tokenizer_sha256 is not None and made_by != tokenizer_sha256:
            expected = f"expected codes of the run's tokenizer {tokenizer_sha256[:12]}"
            raise UserError(f"{folder}: {expected}, found codes of {made_by[:12]}; extract them again")
        opened = [open_shard(folder, self.manifest, shard) for shard in range(self.manifest.num_shards)]
        self._shards = [[content[f"level{level}"] for level in range(len(self.manifest.grids))] for content in opened]
        stored = [torch.from_numpy(content["condition"]) for content in opened if "condition" in content]
        self.condition = torch.cat(stored).to(self.manifest.condition.null(0).dtype) if stored else None
        """(rows, ...), encoded by the manifest's condition; None: the codes have none."""

    def __len__(self) -> int:
        return self.manifest.rows

    def translated(self, condition: Condition) -> Tensor | None:
        """Convert the stored condition to rows (rows, ...) of a prior's condition, which may have other classes.

        Returns: None if the two cannot be compared. `condition.known` marks the rows that have a counterpart.
        """
        return None if self.condition is None else condition.translate(self.condition, self.manifest.condition)

    def condition_for(self, condition: Condition) -> Tensor | None:
        """Convert the stored condition to rows (rows, ...) of a prior's condition; None for an unconditional prior.

        Errors: UserError for rows without a counterpart.
        """
        if isinstance(condition, NoCondition):
            return None
        rows = self.translated(condition)
        if rows is None or not bool(condition.known(rows).all()):
            unknown = self.manifest.condition.describe() if rows is None or self.condition is None else self._first_unknown(condition, rows)
            expected = f"expected codes of a condition that the prior knows ({condition.describe()})"
            raise UserError(f"{self.folder}: {expected}, found {unknown}; train another prior on them with --name NAME")
        return rows

    def _first_unknown(self, condition: Condition, rows: Tensor) -> str:
        assert self.condition is not None
        return self.manifest.condition.show(self.condition[~condition.known(rows)][0])

    def codes(self, rows: Tensor, variants: Tensor | None = None) -> Codes:
        """Read the codes of rows, each in its variant (default: the image itself): int64 (B, h, w) per level.

        Errors: UserError for a code outside the codebook.
        """
        shards, within = np.divmod(rows.numpy(), self.manifest.rows_per_shard)
        chosen = np.zeros(len(rows), np.int64) if variants is None else variants.numpy()
        levels = [np.empty((len(rows), *grid), np.int64) for grid in self.manifest.grids]
        for index, (shard, row, variant) in enumerate(zip(shards.tolist(), within.tolist(), chosen.tolist(), strict=True)):
            for level, codes in enumerate(self._shards[shard]):
                levels[level][index] = codes[row, variant]
        for level, (level_codes, number) in enumerate(zip(levels, self.manifest.num_codes, strict=True)):
            self._check_below(number, level_codes, level)
        return tuple(map(torch.from_numpy, levels))

    def shard(self, number: int) -> list[np.ndarray]:
        """Return the codes (rows, variants, h, w) per level of one shard, in their dtype on disk; read-only."""
        return self._shards[number]

    def counts(self) -> list[np.ndarray]:
        """Count the occurrences of each code over all rows and variants, (K,) per level.

        Errors: UserError for a code outside the codebook.
        """
        counted = [np.zeros(number, np.int64) for number in self.manifest.num_codes]
        with progress_bar(len(self), f"count codes of {self.manifest.split}", "img", within=True) as bar:
            for levels in self._shards:
                for level, (codes, number) in enumerate(zip(levels, self.manifest.num_codes, strict=True)):
                    self._check_below(number, codes, level)
                    counted[level] += np.bincount(codes.ravel(), minlength=number)
                bar.update(len(levels[0]))
        return counted

    def verify(self) -> None:
        """Read all shards and check their sha256 and codes. Errors: UserError for the first damaged one."""
        if len(self.manifest.sha256) != self.manifest.num_shards:
            sums = f"{self.manifest.num_shards} sums, one a file"
            raise UserError(f"{self.folder / MANIFEST}: expected {sums}, found {len(self.manifest.sha256)}; {_EXTRACT_AGAIN}")
        with progress_bar(len(self.manifest.sha256), f"verify {self.manifest.split}", "file", within=True) as bar:
            for shard, sha256 in enumerate(self.manifest.sha256):
                path = self.folder / self.manifest.shard_name(shard)
                actual = _sha256(path)
                if actual != sha256:
                    raise UserError(f"{path}: expected sha256 {sha256[:12]}, as it was written, found {actual[:12]}; {_EXTRACT_AGAIN}")
                bar.update()
        self.counts()

    def _check_below(self, number: int, codes: np.ndarray, level: int) -> None:
        if codes.size and codes.max() >= number:
            raise UserError(f"{self.folder}: expected codes of level {level} below {number}, found {codes.max()}; {_EXTRACT_AGAIN}")


def read_manifest(folder: Path) -> Manifest:
    """Read a split's manifest. Errors: UserError for a missing or damaged one, or another format."""
    path = folder / MANIFEST
    content = read_summed_json(path)
    fields = {field.name for field in dataclasses.fields(Manifest)}
    if set(content) | {"digits"} != fields or content["format"] != _FORMAT or not _well_formed(content):
        raise UserError(f"{path}: expected a manifest of format {_FORMAT}, found something else; {_EXTRACT_AGAIN}, with --overwrite")
    content["grids"] = [tuple(grid) for grid in content["grids"]]
    content["image_shape"] = tuple(content["image_shape"])
    try:
        condition = condition_from(content["condition"])
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected a condition of the codes, found another thing ({error}); {_EXTRACT_AGAIN}") from None
    assert isinstance(condition, Condition)
    return Manifest(**{**content, "condition": condition})


def _well_formed(content: dict[str, Any]) -> bool:
    """Return whether a manifest's sizes are consistent positive integers; checked before anything is allocated by them."""
    try:
        digits = content.get("digits", [])
        sides = [side for h, w in content["grids"] for side in (h, w)]
        sizes = [
            *sides,
            *content["num_codes"],
            *(size for level in digits for size in level),
            *content["image_shape"],
            content["variants"],
            content["rows_per_shard"],
            content["rows"] + 1,
        ]
        lengths_fit = len(content["grids"]) == len(content["num_codes"]) > 0 and len(content["image_shape"]) == 3
        digits_fit = not digits or [math.prod(level) for level in digits] == content["num_codes"]
    except (TypeError, ValueError):
        return False
    return lengths_fit and digits_fit and all(type(size) is int and 0 < size < 2**48 for size in sizes)
