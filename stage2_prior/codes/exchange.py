"""Exchange of codes with other tools: NumPy arrays, or a data set that `datasets.load_from_disk` opens; one folder per split.

    FOLDER/train/level0.npy        (rows, variants, h, w), the smallest unsigned dtype; level1.npy and so on of a hierarchy
    FOLDER/train/labels.npy        (rows,), of classes; condition.npy (rows, ...) of another condition
    FOLDER/train/manifest.json     the store's manifest

A data set has the same content in the columns `level0` .. and `label` or `condition`.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from stage1_vqvae.data.names import composed_names, normalised
from stage1_vqvae.data.splits import TRAIN, VALIDATION
from stage1_vqvae.data.tables import check_complete
from stage2_prior.codes.store import MANIFEST, CodeStore, Manifest, read_manifest, smallest_dtype, write_manifest, write_shard
from stage2_prior.conditions.classes import Classes
from stage2_prior.conditions.contract import Condition
from stage2_prior.conditions.none import NoCondition
from training.progress import progress_bar

FORMS = ("npy", "datasets")


class Rows(Protocol):
    """An array whose rows are read slice by slice."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, ...)."""

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


class ExternalCodes(NamedTuple):
    """A split's codes in another tool's form."""

    levels: list[Rows]
    labels: np.ndarray | None
    """(rows,), unchecked."""
    label_names: list[str] | None
    """Names of the classes; None: unknown."""
    condition: np.ndarray | None
    """(rows, ...) of a condition other than classes, unchecked."""
    manifest: Manifest | None
    """Manifest of the store that the codes were exported from; None: they come from elsewhere."""


def export(stores: Mapping[str, CodeStore], folder: Path, form: str) -> None:
    """Write each split of codes to a folder of its name. Takes the memory of one shard."""
    for name, store in stores.items():
        (folder / name).mkdir(parents=True)
        _export_npy(store, folder / name) if form == "npy" else _export_dataset(store, folder / name)
        shutil.copyfile(store.folder / MANIFEST, folder / name / MANIFEST)


def _export_npy(store: CodeStore, folder: Path) -> None:
    manifest = store.manifest
    for level, (grid, number) in enumerate(zip(manifest.grids, manifest.num_codes, strict=True)):
        shape, dtype = (manifest.rows, manifest.variants, *grid), smallest_dtype(number)
        array = np.lib.format.open_memmap(folder / f"level{level}.npy", "w+", dtype, shape)
        with progress_bar(len(store), f"write {manifest.split}", "img", within=True) as bar:
            for shard in range(manifest.num_shards):
                rows = manifest.shard_rows(shard)
                array[rows.start : rows.stop] = store.shard(shard)[level]
                bar.update(len(rows))
        array.flush()
    if store.condition is not None:
        np.save(folder / f"{_condition_name(manifest, 's')}.npy", store.condition.numpy())


def _condition_name(manifest: Manifest, plural: str = "") -> str:
    """Return the name of the exported condition: `label` for classes, `condition` for other kinds."""
    return f"label{plural}" if manifest.condition.class_names else "condition"


def _export_dataset(store: CodeStore, folder: Path) -> None:
    import datasets

    manifest = store.manifest
    features: dict[str, Any] = {}
    for level, (grid, number) in enumerate(zip(manifest.grids, manifest.num_codes, strict=True)):
        features[f"level{level}"] = datasets.Array3D((manifest.variants, *grid), str(smallest_dtype(number)))
    names = list(manifest.condition.class_names)
    if store.condition is not None:
        stored: Any = datasets.ClassLabel(names=names) if names else datasets.Value(str(store.condition.numpy().dtype))
        for _ in manifest.condition.shape:
            stored = datasets.List(stored)
        features[_condition_name(manifest)] = stored

    cache = folder / ".cache"
    # Pass the folder instead of the store, because `datasets` hashes all arguments.
    rows = datasets.Dataset.from_generator(_rows, datasets.Features(features), str(cache), gen_kwargs={"folder": str(store.folder)})
    rows.save_to_disk(str(folder))
    shutil.rmtree(cache)


def _rows(folder: str) -> Iterator[dict[str, Any]]:
    store = CodeStore(Path(folder))
    for shard in range(store.manifest.num_shards):
        levels, first = store.shard(shard), store.manifest.shard_rows(shard).start
        for row in range(len(levels[0])):
            stored = {} if store.condition is None else {_condition_name(store.manifest): store.condition[first + row].tolist()}
            yield {f"level{level}": codes[row] for level, codes in enumerate(levels)} | stored


def read_external(folder: Path, form: str) -> ExternalCodes:
    """Read a split's codes. Errors: UserError for missing files."""
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of a split's codes, found none")
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if form == "npy":
        levels: list[Rows] = []
        while (folder / f"level{len(levels)}.npy").exists():
            levels.append(_array(folder / f"level{len(levels)}.npy"))
        labels, condition = (_array(path) if (path := folder / f"{name}.npy").exists() else None for name in ("labels", "condition"))
        names = None
    else:
        levels, labels, names, condition = _read_dataset(folder)
    if not levels:
        raise UserError(f"{folder}: expected codes of level 0 ({'level0.npy' if form == 'npy' else 'a column level0'}), found none")
    if manifest is not None:
        names = list(manifest.condition.class_names) or None
    return ExternalCodes(levels, labels, names, condition, manifest)


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:  # truncated, empty, or pickled objects
        raise UserError(f"{path}: expected an array of numbers, found: {error}") from None


class _Column:
    """A column of a data set, as `Rows`."""

    def __init__(self, rows: Any, column: str) -> None:
        self._rows, self._column = rows.select_columns([column]).with_format("numpy"), column
        self.shape = (len(rows), *self[slice(0, 1)].shape[1:])

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.asarray(self._rows[rows][self._column])


def _read_dataset(folder: Path) -> tuple[list[Rows], np.ndarray | None, list[str] | None, np.ndarray | None]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # `datasets` raises many kinds
        raise UserError(f"{folder}: expected a data set that `save_to_disk` wrote, found: {error}") from None
    for file in rows.cache_files:
        check_complete(Path(file["filename"]))
    levels: list[Rows] = []
    while f"level{len(levels)}" in rows.column_names:
        levels.append(_Column(rows, f"level{len(levels)}"))
    labels, condition = (np.asarray(rows[name][:]) if name in rows.column_names else None for name in ("label", "condition"))
    return levels, labels, None if labels is None else getattr(rows.features["label"], "names", None), condition


def import_split(external: ExternalCodes, condition: Tensor | None, folder: Path, where: Path, template: Manifest) -> Manifest:
    """Write a split's codes as a store, shard by shard.

    Args:
        external: levels of shape (rows, [variants,] h, w), or with the positions of a grid as one axis in raster order.
        condition: (rows, ...) of the template's condition; None: the split has none.
        folder: existing folder of the store.
        where: source of the codes, for messages.
        template: the manifest, with placeholders for the numbers of images and variants.
    Returns: the manifest.
    Errors: UserError for codes or a condition that do not fit the template.
    """
    if len(external.levels) != len(template.grids):
        raise UserError(f"{where}: expected codes of {len(template.grids)} levels, the tokenizer's, found {len(external.levels)}")
    if external.manifest is not None and external.manifest.tokenizer_sha256 != template.tokenizer_sha256:
        ours, theirs = template.tokenizer_sha256[:12], external.manifest.tokenizer_sha256[:12]
        raise UserError(f"{where / MANIFEST}: expected codes of the run's tokenizer {ours}, found those of {theirs}")
    rows = (*external.levels[0].shape, 0)[0]
    numbered = enumerate(zip(external.levels, template.grids, strict=True))
    variants = {_variants(level.shape, grid, rows, where, number) for number, (level, grid) in numbered}
    if len(variants) > 1:
        raise UserError(f"{where}: expected as many variants for all levels, found {sorted(variants)}")
    (count,) = variants
    if count > 1 and (external.manifest is None or external.manifest.variants != count):
        raise UserError(f"{where}: expected one variant per image where no {MANIFEST} says what they are, found {count}")
    augmentation = external.manifest.augmentation if external.manifest is not None and count > 1 else "none"
    if condition is not None and len(condition) != rows:
        what = "labels" if template.condition.class_names else "rows of the condition"
        raise UserError(f"{where}: expected {rows} {what}, as many as images, found {len(condition)}")
    manifest = dataclasses.replace(template, rows=rows, variants=count, augmentation=augmentation)
    with progress_bar(rows, f"read {template.split}", "img", within=True) as bar:
        for shard in range(manifest.num_shards):
            part = manifest.shard_rows(shard)
            codes = [
                _checked(array[part.start : part.stop], number, f"codes of level {level}", where).reshape(len(part), count, *grid)
                for level, (array, grid, number) in enumerate(zip(external.levels, manifest.grids, manifest.num_codes, strict=True))
            ]
            write_shard(folder, manifest, shard, codes, None if condition is None else condition[part.start : part.stop])
            bar.update(len(part))
    write_manifest(folder, manifest)
    return manifest


def read_condition(splits: Mapping[str, ExternalCodes], where: Path) -> tuple[Condition, dict[str, Tensor]]:
    """Return the condition of the codes, and its rows (rows, ...) of each split that has one; a test split may have none.

    Classes need only labels. Of another condition a manifest says what its rows mean.

    Errors: UserError as `read_classes`, and for another condition without a manifest, or with rows that do not fit it.
    """
    others = {name: split for name, split in splits.items() if split.condition is not None or _has_other_condition(split.manifest)}
    if not others:
        names, labels = read_classes(splits, where)
        return NoCondition() if names is None else Classes(names=names), labels
    conditions = {}
    for name, split in others.items():
        if split.manifest is None or split.condition is None or not _has_other_condition(split.manifest):
            found = "none" if split.manifest is None else f"condition {split.manifest.condition.kind}"
            has = "no rows of a condition" if split.condition is None else f"rows of shape {split.condition.shape[1:]}"
            raise UserError(f"{where / name}: expected rows of a condition and a {MANIFEST} that names its kind, found {has} and {found}")
        condition = split.manifest.condition
        dtype, rows = condition.null(0).numpy().dtype, split.condition
        if rows.shape[1:] != condition.shape or not np.can_cast(rows.dtype, dtype, "same_kind"):
            expected = f"expected a condition {condition.kind}, rows {list(condition.shape)} of {dtype}"
            raise UserError(f"{where / name}: {expected}, found {list(rows.shape[1:])} of {rows.dtype}")
        conditions[name] = condition, torch.from_numpy(rows.astype(dtype))
    if not {TRAIN, VALIDATION} <= set(conditions) or any(condition != conditions[TRAIN][0] for condition, _ in conditions.values()):
        found = ", ".join(f"{kind.describe()} of {name}" for name, (kind, _) in conditions.items())
        raise UserError(f"{where}: expected the same condition of training and validation images, found {found}")
    return conditions[TRAIN][0], {name: rows for name, (_, rows) in conditions.items()}


def _has_other_condition(manifest: Manifest | None) -> bool:
    return manifest is not None and not isinstance(manifest.condition, NoCondition | Classes)


def read_classes(splits: Mapping[str, ExternalCodes], where: Path) -> tuple[list[str] | None, dict[str, Tensor]]:
    """Return the names of the classes, and each labelled split's class numbers (rows,).

    The names are the splits' own or, without any, the label values that occur in any split. A test split may be unlabelled.

    Errors: UserError for labels that are no whole numbers, different names, or labels of only one of training and validation.
    """
    labelled = {name: split.labels for name, split in splits.items() if split.labels is not None}
    if (TRAIN in labelled) != (VALIDATION in labelled) or (labelled and TRAIN not in labelled):
        raise UserError(f"{where}: expected labels of training and validation images, or of none, found them of {', '.join(labelled)}")
    for name, labels in labelled.items():
        if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1 or labels.size == 0 or int(labels.min()) < 0:
            actual = f"{list(labels.shape)} of {labels.dtype}" + (", some below 0" if labels.dtype.kind == "i" and labels.size else "")
            raise UserError(f"{where / name}: expected labels that are whole numbers from 0 on, one per image, found {actual}")
    named = [[*map(normalised, names)] for name in labelled if (names := splits[name].label_names) is not None]
    if any(names != named[0] for names in named):
        raise UserError(f"{where}: expected the same names of labels of all splits, found {named[0]} and others")
    if named:
        names, numbers = composed_names(named[0])
        return names, {
            name: torch.from_numpy(numbers)[_checked(labels, len(named[0]), "labels", where / name)] for name, labels in labelled.items()
        }
    if not labelled:
        return None, {}
    occurring = np.unique(np.concatenate(list(labelled.values())))
    return [str(label) for label in occurring], {
        name: torch.from_numpy(np.searchsorted(occurring, labels)) for name, labels in labelled.items()
    }


def _checked(values: np.ndarray, number: int, name: str, where: Path) -> Tensor:
    """Convert codes or labels to int64. Errors: UserError for values outside 0..number-1."""
    if not np.issubdtype(values.dtype, np.integer) or int(values.min()) < 0 or int(values.max()) >= number:
        bad = f"some of {values.dtype}" if values.dtype.kind not in "iuf" else f"{values.min()} to {values.max()} of {values.dtype}"
        raise UserError(f"{where}: expected {name}, whole numbers from 0 to {number - 1}, found {bad}")
    return torch.from_numpy(values.astype(np.int64))


def _variants(shape: tuple[int, ...], grid: tuple[int, int], rows: int, where: Path, level: int) -> int:
    """Return the number of variants in an array of codes. Errors: UserError for a shape that does not fit."""
    height, width = grid
    inner = next((shape[1 : len(shape) - len(end)] for end in ((height, width), (height * width,)) if shape[-len(end) :] == end), None)
    if len(shape) < 2 or shape[0] != rows or rows == 0 or inner is None or len(inner) > 1:
        expected = f"an array ({rows or 'rows'}, [variants,] {height}, {width}) of level {level}, or with {height * width} as its last axis"
        raise UserError(f"{where}: expected {expected}, found {shape}")
    return math.prod(inner)
