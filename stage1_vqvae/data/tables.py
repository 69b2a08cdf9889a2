"""Data sets that `datasets` opens: of the Hub, of parquet, WebDataset and Arrow files, of folders with metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.data import Data
from configs.errors import UserError
from stage1_vqvae.data.cache import files_identity
from stage1_vqvae.data.encoded import EncodedImage, EncodedSplit
from stage1_vqvae.data.names import NO_LABELS, check_labels, our_splits
from stage1_vqvae.data.splits import TRAIN, VALIDATION, SourceSplit

# Where it is needed: it takes a second to import, and most commands read codes, or pixels that have their own decoder.
if TYPE_CHECKING:
    import datasets

# What a column of labels is called where its type does not tell: the last is WebDataset's.
_LABEL_NAMES = ("label", "labels", "class", "cls")


class _Column:
    """A data set's column of images, as `EncodedImages`."""

    def __init__(self, rows: datasets.Dataset, column: str) -> None:
        import datasets

        self._rows, self._column = rows.cast_column(column, datasets.Image(decode=False)).select_columns([column]), column

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: list[int]) -> list[EncodedImage]:
        found = self._rows[rows][self._column]
        return [EncodedImage(None, None) if record is None else EncodedImage(record["bytes"], record["path"]) for record in found]


def of_the_hub(data: Data, wanted: set[str]) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """Splits and label names of a data set of the Hub.

    Errors: UserError for one that cannot be loaded, or whose columns leave open which is meant.
    """
    assert data.name is not None
    what = f"data.name {data.name} (a local copy can be given with --data.path)"
    return _found(_open(data.name, what, name=data.config, revision=data.revision), data, wanted)


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote that folder: of several splits, or of one."""
    return (path / "dataset_dict.json").exists() or all((path / name).exists() for name in ("state.json", "dataset_info.json"))


def of_disk(path: Path, data: Data, wanted: set[str]) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """Splits and label names of what `save_to_disk` wrote. Errors: as `of_the_hub`."""
    import datasets

    try:
        source = datasets.load_from_disk(str(path))
    except Exception as error:  # of many kinds
        raise UserError(f"data.path {path}: expected a data set that `save_to_disk` wrote, found: {error}") from None
    return _found({"train": source} if isinstance(source, datasets.Dataset) else source, data, wanted)


def of_files(
    kind: str,
    files: Mapping[str, Sequence[Path]],
    path: Path,
    data: Data,
    wanted: set[str],
    metadata: Mapping[str, Sequence[Path]] | None = None,
) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """Splits and label names of files on this machine.

    Args:
        kind: what `datasets` calls them: parquet, webdataset, imagefolder.
        files: of each of our splits.
        path: that the user named.
        data: the recipe's.
        wanted: names of splits.
        metadata: tables of each split, which name those of its files that count.
    Errors: as `of_the_hub`.
    """
    named = {split: [str(file) for file in found] for split, found in (metadata or files).items()}
    return _found(_open(kind, f"data.path {path}", data_files=named), data, wanted, files, by_path=metadata is not None)


def _by_path(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """The rows in the order of their images' paths."""
    paths = [image.path or "" for image in _Column(rows, column)[list(range(len(rows)))]]
    return rows.select(sorted(range(len(rows)), key=paths.__getitem__))


def _open(source: str, what: str, **arguments: Any) -> datasets.DatasetDict:
    """`datasets.load_dataset`, its failures as one line that begins with `what`."""
    import datasets

    try:
        return datasets.load_dataset(source, **arguments)
    except Exception as error:  # of many kinds: no connection, no such repository, no such builder, broken files
        cause = str(error.__cause__ or error) or type(error).__name__
        raise UserError(f"{what}: expected a data set that can be loaded, found: {cause}") from None


def _found(
    source: Mapping[str, datasets.Dataset],
    data: Data,
    wanted: set[str],
    files: Mapping[str, Sequence[Path]] | None = None,
    by_path: bool = False,
) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """The wanted splits of a data set, and the names of its labels, which do not depend on which are wanted.

    Args:
        source: the data set.
        data: the recipe's.
        wanted: names of splits.
        files: of each of our splits, from which it was loaded; None: from those that `datasets` has fetched.
        by_path: sort the rows by their images' paths: several tables of metadata are read in the order of a Python set.
    """
    what = str(data.path or data.name)
    ours = {split: source[name] for name, split in our_splits(data, source).items()} if files is None else dict(source)
    first = ours.get(TRAIN) or next(iter(ours.values()))
    image_column, label_column = _image_column(first, data), _label_column(first, data)
    for split, rows in ours.items():
        if image_column not in rows.column_names:
            raise UserError(f"{what}: expected a column {image_column} in {split} too, found {', '.join(rows.column_names)}")
    if by_path:
        ours = {split: _by_path(rows, image_column) for split, rows in ours.items()}
    values = {split: list(rows[label_column][:]) for split, rows in ours.items() if label_column in rows.column_names}
    names = None if label_column is None else _label_names([ours[split].features[label_column] for split in values], values, what)
    splits: dict[str, SourceSplit] = {}
    for split, rows in ours.items():
        if split not in wanted and not (split == TRAIN and VALIDATION in wanted and VALIDATION not in ours):
            continue
        if len(rows) == 0:
            raise UserError(f"{what}: expected images in split {split}, found none")
        numbers = None if names is None or split not in values else _numbers(values[split], names, rows.features[label_column])
        of_files = files[split] if files is not None else [Path(file["filename"]) for file in rows.cache_files]
        origin = f"{data.name} {data.config} {data.revision}" if data.path is None else ""
        identity = f"{origin} {image_column} {len(rows)} {files_identity(of_files)}"
        splits[split] = EncodedSplit(split, _Column(rows, image_column), check_labels(numbers, split, what), identity)
    return splits, names


def _image_column(rows: datasets.Dataset, data: Data) -> str:
    import datasets

    found = [
        name
        for name, feature in rows.features.items()
        # Parquet written without Hugging Face's metadata shows an image as what it is: a struct of bytes and path.
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))
    ]
    if data.image_column is not None:
        found = [name for name in found if name == data.image_column]
    if len(found) != 1:
        expected = f"one column of images (--data.image_column NAME), found {', '.join(found) or 'none'} of {', '.join(rows.column_names)}"
        raise UserError(f"{data.path or data.name}: expected {expected}")
    return found[0]


def _label_column(rows: datasets.Dataset, data: Data) -> str | None:
    import datasets

    if data.label_column == NO_LABELS:
        return None
    if data.label_column is not None:
        if data.label_column not in rows.column_names:
            expected = f"a column {data.label_column} (data.label_column), found {', '.join(rows.column_names)}"
            raise UserError(f"{data.path or data.name}: expected {expected}")
        return data.label_column
    found = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    found = found or [name for name in _LABEL_NAMES if _tells_classes(rows.features.get(name))]
    if len(found) > 1:
        expected = f"one column of labels (--data.label_column NAME, or {NO_LABELS})"
        raise UserError(f"{data.path or data.name}: expected {expected}, found {', '.join(found)}")
    return found[0] if found else None


def _tells_classes(feature: Any) -> bool:
    """Whether a column is of whole numbers or text."""
    import datasets

    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "string", "large_string"))


def _label_names(features: Sequence[Any], values: Mapping[str, Sequence[Any]], what: str) -> list[str] | None:
    """The names of classes; or of whole numbers and texts, all that occur, in their order."""
    import datasets

    if not isinstance(features[0], datasets.ClassLabel) and not _tells_classes(features[0]):
        raise UserError(f"{what}: expected labels that are classes, whole numbers or text (data.label_column), found {features[0]}")
    occurring = {value for of_split in values.values() for value in of_split if value not in (None, -1)}
    if not occurring:
        return None
    if isinstance(features[0], datasets.ClassLabel):
        if any(getattr(feature, "names", None) != features[0].names for feature in features):
            raise UserError(f"{what}: expected the same classes in all splits, found others")
        return list(features[0].names)
    if any(type(feature) is not type(features[0]) or feature.dtype != features[0].dtype for feature in features):
        raise UserError(f"{what}: expected labels of one kind in all splits, found {', '.join(map(str, features))}")
    return [str(value) for value in sorted(occurring)]


def _numbers(values: Sequence[Any], names: Sequence[str], feature: Any) -> np.ndarray:
    """Labels (N,) as numbers of `names`; -1 where there is none."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return np.asarray([-1 if value is None else value for value in values], np.int64)
    numbers = {name: number for number, name in enumerate(names)}
    return np.asarray([-1 if value in (None, -1) else numbers[str(value)] for value in values], np.int64)
