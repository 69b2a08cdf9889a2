"""Exchange of codes with other tools: NumPy arrays, or a data set that `datasets.load_from_disk` opens; one folder per split.

    FOLDER/train/level0.npy        (rows, variants, h, w), the smallest unsigned dtype; level1.npy and so on of a hierarchy
    FOLDER/train/labels.npy        (rows,), of classes; condition.npy (rows, ...) of another condition
    FOLDER/train/manifest.json     the store's own

A data set has the same as columns `level0` .. and `label`.
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
from training.progress import progress_bar

FORMS = ("npy", "datasets")


class Rows(Protocol):
    """An array of rows, some of which are read at a time."""

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
    manifest: Manifest | None
    """Manifest of the store that the codes were exported from; None: they come from elsewhere."""


def export(stores: Mapping[str, CodeStore], folder: Path, form: str) -> None:
    """Write each split of codes to a folder of its name, in the memory of one shard."""
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
    """Return the name of the exported condition: labels, or `condition` for other kinds than classes."""
    return f"label{plural}" if manifest.condition.class_names else "condition"


def _export_dataset(store: CodeStore, folder: Path) -> None:
    import datasets

    manifest = store.manifest
    features: dict[str, Any] = {}
    for level, (grid, number) in enumerate(zip(manifest.grids, manifest.num_codes, strict=True)):
        features[f"level{level}"] = datasets.Array3D((manifest.variants, *grid), str(smallest_dtype(number)))
    names = list(manifest.condition.class_names)
    if store.condition is not None:
        # Without classes, its rows are vectors of numbers.
        stored = datasets.Value(str(store.condition.numpy().dtype))
        features[_condition_name(manifest)] = datasets.ClassLabel(names=names) if names else datasets.List(stored)

    cache = folder / ".cache"
    # The folder, not the store: `datasets` hashes all arguments.
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
        labels = _array(folder / "labels.npy") if (folder / "labels.npy").exists() else None
        names = None
    else:
        levels, labels, names = _read_dataset(folder)
    if not levels:
        raise UserError(f"{folder}: expected codes of level 0 ({'level0.npy' if form == 'npy' else 'a column level0'}), found none")
    if manifest is not None:
        names = list(manifest.condition.class_names) or None
    return ExternalCodes(levels, labels, names, manifest)


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


def _read_dataset(folder: Path) -> tuple[list[Rows], np.ndarray | None, list[str] | None]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # of any kind
        raise UserError(f"{folder}: expected a data set that `save_to_disk` wrote, found: {error}") from None
    for file in rows.cache_files:
        check_complete(Path(file["filename"]))
    levels: list[Rows] = []
    while f"level{len(levels)}" in rows.column_names:
        levels.append(_Column(rows, f"level{len(levels)}"))
    if "label" not in rows.column_names:
        return levels, None, None
    return levels, np.asarray(rows["label"][:]), getattr(rows.features["label"], "names", None)


def import_split(external: ExternalCodes, labels: Tensor | None, folder: Path, where: Path, template: Manifest) -> Manifest:
    """Write a split's codes as a store, shard by shard.

    Args:
        external: each level of shape (rows, [variants,] h, w), or with the positions of a grid as one axis in raster order.
        labels: (rows,) class numbers of the manifest's condition; None: unlabelled.
        folder: of the store; exists.
        where: source of the codes, for messages.
        template: the manifest, with placeholders for the numbers of images and variants.
    Returns: the manifest.
    Errors: UserError for codes or labels that do not fit the template.
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
        raise UserError(f"{where}: expected as many variants of all levels, found {sorted(variants)}")
    (count,) = variants
    if count > 1 and (external.manifest is None or external.manifest.variants != count):
        raise UserError(f"{where}: expected one variant an image where no {MANIFEST} says what they are, found {count}")
    augmentation = external.manifest.augmentation if external.manifest is not None and count > 1 else "none"
    if labels is not None and len(labels) != rows:
        raise UserError(f"{where}: expected {rows} labels, as many as images, found {len(labels)}")
    manifest = dataclasses.replace(template, rows=rows, variants=count, augmentation=augmentation)
    with progress_bar(rows, f"read {template.split}", "img", within=True) as bar:
        for shard in range(manifest.num_shards):
            part = manifest.shard_rows(shard)
            codes = [
                _checked(array[part.start : part.stop], number, f"codes of level {level}", where).reshape(len(part), count, *grid)
                for level, (array, grid, number) in enumerate(zip(external.levels, manifest.grids, manifest.num_codes, strict=True))
            ]
            write_shard(folder, manifest, shard, codes, None if labels is None else labels[part.start : part.stop])
            bar.update(len(part))
    write_manifest(folder, manifest)
    return manifest


def read_classes(splits: Mapping[str, ExternalCodes], where: Path) -> tuple[list[str] | None, dict[str, Tensor]]:
    """Return the names of the classes, and each labelled split's class numbers (rows,).

    Names are those that the splits have, or else the label values that occur in any of them. A test split may be unlabelled.

    Errors: UserError for labels that are no whole numbers, different names, or labels of only one of training and validation.
    """
    labelled = {name: split.labels for name, split in splits.items() if split.labels is not None}
    if (TRAIN in labelled) != (VALIDATION in labelled) or (labelled and TRAIN not in labelled):
        raise UserError(f"{where}: expected labels of training and validation images, or of none, found them of {', '.join(labelled)}")
    for name, labels in labelled.items():
        if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1 or labels.size == 0 or int(labels.min()) < 0:
            found = f"{list(labels.shape)} of {labels.dtype}" + (", some below 0" if labels.dtype.kind == "i" and labels.size else "")
            raise UserError(f"{where / name}: expected labels that are whole numbers from 0 on, one an image, found {found}")
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


def _checked(values: np.ndarray, number: int, what: str, where: Path) -> Tensor:
    """Convert codes or labels to int64. Errors: UserError for values outside 0..number-1."""
    if not np.issubdtype(values.dtype, np.integer) or int(values.min()) < 0 or int(values.max()) >= number:
        bad = f"some of {values.dtype}" if values.dtype.kind not in "iuf" else f"{values.min()} to {values.max()} of {values.dtype}"
        raise UserError(f"{where}: expected {what}, whole numbers from 0 to {number - 1}, found {bad}")
    return torch.from_numpy(values.astype(np.int64))


def _variants(shape: tuple[int, ...], grid: tuple[int, int], rows: int, where: Path, level: int) -> int:
    """Return the number of variants in an array of codes. Errors: UserError for a shape that does not fit."""
    height, width = grid
    inner = next((shape[1 : len(shape) - len(end)] for end in ((height, width), (height * width,)) if shape[-len(end) :] == end), None)
    if len(shape) < 2 or shape[0] != rows or rows == 0 or inner is None or len(inner) > 1:
        expected = f"an array ({rows or 'rows'}, [variants,] {height}, {width}) of level {level}, or with {height * width} as its last axis"
        raise UserError(f"{where}: expected {expected}, found {shape}")
    return math.prod(inner)
