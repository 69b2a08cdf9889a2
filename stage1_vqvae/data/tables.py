"""Data sets that `datasets` opens: of the Hub, of parquet, WebDataset and Arrow files, of folders with metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from configs.data import Data
from configs.errors import UserError
from stage1_vqvae.data.cache import files_identity
from stage1_vqvae.data.encoded import EncodedImage, EncodedImages, EncodedSplit
from stage1_vqvae.data.names import NO_LABELS, check_labels, our_splits
from stage1_vqvae.data.splits import TRAIN, VALIDATION, SourceSplit
from stage1_vqvae.data.streams import Stream
from stage1_vqvae.training.watch import at_work

# Where it is needed: it takes a second to import, and most commands read codes, or pixels that have their own decoder.
if TYPE_CHECKING:
    import datasets

# What a column of labels is called where its type does not tell: the last is WebDataset's.
_LABEL_NAMES = ("label", "labels", "class", "cls")


class _Column:
    """A data set's column of images, as `EncodedImages`."""

    file_lengths = None

    def __init__(self, rows: datasets.Dataset, column: str) -> None:
        import datasets

        self._rows, self._column = rows.cast_column(column, datasets.Image(decode=False)).select_columns([column]), column

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: list[int]) -> list[EncodedImage]:
        found = self._rows[rows][self._column]
        return [EncodedImage(None, None) if record is None else EncodedImage(record["bytes"], record["path"]) for record in found]


class Table(Protocol):
    """A split of a data set, as rows with columns."""

    @property
    def features(self) -> Mapping[str, Any]:
        """What each column holds."""

    @property
    def column_names(self) -> Sequence[str]:
        """Their names."""

    def __len__(self) -> int: ...

    def values(self, column: str) -> list[Any]:
        """A column of whole numbers or text."""

    def images(self, column: str) -> EncodedImages:
        """A column of images."""

    def identity(self) -> str:
        """What is another if the files that the rows lie in are."""


class _Mapped:
    """A split whose rows `datasets` has in files of its own, mapped into memory, as `Table`."""

    def __init__(self, rows: datasets.Dataset, files: Sequence[Path] | None = None) -> None:
        """`files`: from which the rows were loaded; None: from those that `datasets` has fetched."""
        self._rows, self._files = rows, files
        self.features, self.column_names = rows.features, rows.column_names

    def __len__(self) -> int:
        return len(self._rows)

    def values(self, column: str) -> list[Any]:
        return list(self._rows[column][:])

    def images(self, column: str) -> EncodedImages:
        return _Column(self._rows, column)

    def identity(self) -> str:
        files = [Path(file["filename"]) for file in self._rows.cache_files] if self._files is None else self._files
        return f"{len(self)} {files_identity(files)}"

    def by_path(self, column: str) -> _Mapped:
        """The rows in the order of their images' paths: several tables of metadata are read in the order of a Python set."""
        paths = [image.path or "" for image in self.images(column)[list(range(len(self)))]]
        return _Mapped(self._rows.select(sorted(range(len(paths)), key=paths.__getitem__)), self._files)


def of_the_hub(data: Data, wanted: set[str]) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """Splits and label names of a data set of the Hub.

    Errors: UserError for one that cannot be loaded, or whose columns leave open which is meant.
    """
    assert data.name is not None
    what = f"data.name {data.name} (a local copy can be given with --data.path)"
    asked: dict[str, Any] = {"name": data.config, "revision": data.revision}
    found = _streams(data.name, what, data, **asked) if data.stream else _mapped(_open(data.name, what, **asked))
    return _found({split: found[name] for name, split in our_splits(data, found).items()}, data, wanted)


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote that folder: of several splits, or of one."""
    return (path / "dataset_dict.json").exists() or all((path / name).exists() for name in ("state.json", "dataset_info.json"))


def of_disk(path: Path, data: Data, wanted: set[str]) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """Splits and label names of what `save_to_disk` wrote. Errors: as `of_the_hub`."""
    import datasets

    with _failing_as(f"data.path {path}, which `save_to_disk` wrote"):
        source = datasets.load_from_disk(str(path))
    found = _mapped({"train": source} if isinstance(source, datasets.Dataset) else source)
    return _found({split: found[name] for name, split in our_splits(data, found).items()}, data, wanted)


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
    what, named = f"data.path {path}", {split: [str(file) for file in found] for split, found in (metadata or files).items()}
    if data.stream:
        return _found(_streams(kind, what, data, files, data_files=named), data, wanted)
    found = _mapped(_open(kind, what, data_files=named), files)
    if metadata is not None:
        found = {split: rows.by_path(_image_column(rows, data)) for split, rows in found.items()}
    return _found(found, data, wanted)


def _open(source: str, what: str, **arguments: Any) -> datasets.DatasetDict:
    """`datasets.load_dataset`, its failures as one line that begins with `what`."""
    import datasets

    with _failing_as(what):
        return datasets.load_dataset(source, **arguments)


def _mapped(source: Mapping[str, datasets.Dataset], files: Mapping[str, Sequence[Path]] | None = None) -> dict[str, _Mapped]:
    return {split: _Mapped(rows, None if files is None else files[split]) for split, rows in source.items()}


def _streams(source: str, what: str, data: Data, files: Mapping[str, Sequence[Path]] | None = None, **arguments: Any) -> dict[str, Stream]:
    """The splits of a data set as they are where they lie. `files`: of each split, where they are this machine's."""
    import datasets

    with _failing_as(what):
        config = datasets.load_dataset_builder(source, **arguments).config
    if hasattr(config, "drop_labels"):
        raise UserError(f"{what}: expected Parquet or WebDataset files to stream, found a folder of images; leave data.stream away")
    listed = config.data_files or {}
    # So that nothing read later is of a newer commit.
    commit = re.search("@([0-9a-f]{40})/", str(next(iter(next(iter(listed.values()), [])), "")))
    pinned = {**arguments, "revision": commit[1]} if commit and files is None else arguments

    def opened(columns: list[str] | None = None) -> datasets.IterableDatasetDict:
        only = {} if columns is None else {"columns": columns}
        with _failing_as(what):
            return datasets.load_dataset(source, streaming=True, **pinned, **only)

    def stream(name: str) -> Stream:
        own = listed.get(name, [])
        origin = files_identity(files[name]) if files is not None else f"{own} {getattr(own, 'origin_metadata', '')}"
        called = f"{data.path or data.name}, {name}"
        return Stream(lambda columns: opened(columns)[name], list(own), called, data, origin, columnar=hasattr(config, "columns"))

    return {name: stream(name) for name in opened()}


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    """Whatever goes wrong as one line that begins with `what`."""
    try:
        with at_work():  # it may fetch for hours, and shows that by bars of its own
            yield
    except UserError:
        raise
    except Exception as error:  # of many kinds: no connection, no such repository, no such builder, broken files
        cause = str(error.__cause__ or error) or type(error).__name__
        raise UserError(f"{what}: expected a data set that can be loaded, found: {cause}") from None


def _found(source: Mapping[str, Table], data: Data, wanted: set[str]) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """The wanted splits of a data set, and the names of its labels, which do not depend on which are wanted.

    Args:
        source: the data set, by our names.
        data: the recipe's.
        wanted: names of splits.
    """
    what = str(data.path or data.name)
    first = source[TRAIN] if TRAIN in source else next(iter(source.values()))
    image_column, label_column = _image_column(first, data), _label_column(first, data)
    for split, rows in source.items():
        if image_column not in rows.column_names:
            raise UserError(f"{what}: expected a column {image_column} in {split} too, found {', '.join(rows.column_names)}")
    kinds: dict[str, Any] = {}
    values: dict[str, list[Any]] = {}
    names = None
    if label_column is not None:
        kinds = {split: rows.features[label_column] for split, rows in source.items() if label_column in rows.column_names}
        values = {split: source[split].values(label_column) for split in kinds}
        names = _label_names(list(kinds.values()), values, what)
    splits: dict[str, SourceSplit] = {}
    for split, rows in source.items():
        if split not in wanted and not (split == TRAIN and VALIDATION in wanted and VALIDATION not in source):
            continue
        if len(rows) == 0:
            raise UserError(f"{what}: expected images in split {split}, found none")
        numbers = None if names is None or split not in kinds else _numbers(values[split], names, kinds[split])
        origin = f"{data.name} {data.config} {data.revision}" if data.path is None else ""
        # Which files of the Hub's hold the rows depends on whether they are streamed.
        identity = f"{origin} {image_column} {rows.identity()}" + (f" hub:{data.name}@{data.revision}" if data.path is None else "")
        splits[split] = EncodedSplit(split, rows.images(image_column), check_labels(numbers, split, what), identity)
    return splits, names


def _image_column(rows: Table, data: Data) -> str:
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


def _label_column(rows: Table, data: Data) -> str | None:
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
