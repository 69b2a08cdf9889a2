"""Data sets of rows: from the Hub, from Parquet, WebDataset and Arrow files by `datasets`, and from tables beside images."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from glob import has_magic
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from configs.data import Data
from configs.errors import UserError, listed, say
from stage1_vqvae.data.cache import files_fingerprint
from stage1_vqvae.data.encoded import EncodedImage, EncodedImages, EncodedSplit, parse_encoded_image
from stage1_vqvae.data.listings import Listing
from stage1_vqvae.data.names import NO_LABELS, check_labels, map_splits, normalised
from stage1_vqvae.data.splits import TEST, TRAIN, VALIDATION, OpenedSource, SourceSplit
from stage1_vqvae.data.streams import Stream
from training.watch import at_work

# `datasets` is imported inside functions: that takes a second, and most commands read codes or files of images.
if TYPE_CHECKING:
    import datasets

# Names of columns of labels whose type does not show it, in any case; the last is WebDataset's.
_LABEL_NAMES = ("label", "labels", "class", "cls")
# Kind of labels per beginning of a type's name; only labels of one kind can be compared. A column of the type null has no values.
_LABEL_KINDS = {
    "int": "numbers",
    "uint": "numbers",
    "float": "numbers",
    "string": "text",
    "large_string": "text",
    "bool": "booleans",
    "null": "",
}
_BYTES = ("binary", "large_binary")
# The last bytes of complete files.
_ENDS = {".arrow": b"\xff\xff\xff\xff\0\0\0\0", ".parquet": b"PAR1"}


class _Column:
    """Column of images of a `datasets.Dataset`, as `EncodedImages`."""

    file_lengths = None

    def __init__(self, rows: datasets.Dataset, column: str) -> None:
        import datasets

        rows = rows.select_columns([column])
        is_image = isinstance(rows.features[column], datasets.Image)
        self._rows, self._column = rows.cast_column(column, datasets.Image(decode=False)) if is_image else rows, column

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: list[int]) -> list[EncodedImage]:
        return [parse_encoded_image(record) for record in self._rows[rows][self._column]]


class Table(Protocol):
    """Split of a data set as rows with columns."""

    @property
    def features(self) -> Mapping[str, Any]:
        """Type of each column, as of `datasets`."""

    @property
    def column_names(self) -> Sequence[str]:
        """Names of the columns."""

    def __len__(self) -> int: ...

    def values(self, column: str) -> list[Any]:
        """Return a column of numbers or text."""

    def images(self, column: str) -> EncodedImages:
        """Return a column of images."""

    def fingerprint(self) -> str:
        """Return a text that changes whenever the files of the rows change."""


class _Mapped:
    """Split in Arrow files that `datasets` maps into memory, as `Table`."""

    def __init__(self, rows: datasets.Dataset, files: Sequence[Path] | None = None) -> None:
        """`files`: the files that the rows were loaded from; None: those in the cache of `datasets`."""
        self._rows, self._files = rows, files
        self.features, self.column_names = rows.features, rows.column_names

    def __len__(self) -> int:
        return len(self._rows)

    def values(self, column: str) -> list[Any]:
        return list(self._rows[column][:])

    def images(self, column: str) -> EncodedImages:
        return _Column(self._rows, column)

    def files(self) -> Sequence[Path]:
        """Return the files of the rows."""
        return [Path(file["filename"]) for file in self._rows.cache_files] if self._files is None else self._files

    def fingerprint(self) -> str:
        return f"{len(self)} {files_fingerprint(self.files())}"


def open_hub(data: Data, names: set[str]) -> OpenedSource:
    """Open a data set of the Hub.

    Errors: UserError for one that cannot be loaded, or whose columns are ambiguous.
    """
    assert data.name is not None
    if has_magic(data.name):  # `datasets` would read it as a pattern of local folders
        raise UserError(f"data.name {data.name}: expected a data set of the Hub, USER/NAME, found a folder's name; use --data.path")
    what = f"data.name {data.name} (a local copy can be given with --data.path)"
    builder = _hub_builder(data.name, {"name": data.config, "revision": data.revision})
    source = _open_streams(builder, what, data) if data.stream else _map(_copy(builder, what))
    return _with_split_names(source, data, names)


def is_saved_dataset(path: Path) -> bool:
    """Return whether `save_to_disk` wrote that folder, of one split or several."""
    return (path / "dataset_dict.json").exists() or all((path / name).exists() for name in ("state.json", "dataset_info.json"))


def open_saved(path: Path, data: Data, names: set[str]) -> OpenedSource:
    """Open what `save_to_disk` wrote. Errors: as `open_hub`."""
    import datasets

    with _one_line_errors(f"data.path {path}, which `save_to_disk` wrote", sorted(path.glob("**/data-*.arrow"))):
        loaded = datasets.load_from_disk(str(path))
        source = _map({"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded)
        for file in chain.from_iterable(rows.files() for rows in source.values()):
            check_complete(file)
    return _with_split_names(source, data, names)


def _with_split_names(source: Mapping[str, Table], data: Data, names: set[str]) -> OpenedSource:
    """Open splits that have the source's names."""
    ours = map_splits(data, source)
    splits, label_names = _build_splits({split: source[name] for name, split in ours.items()}, data, names)
    return OpenedSource(splits, label_names, {split: str(name) for name, split in ours.items()})


def open_files(
    kind: str, files: Mapping[str, Sequence[Path]], path: Path, data: Data, names: set[str]
) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """Open files of rows on this machine: splits and label names.

    Args:
        kind: name of the format in `datasets`: parquet, webdataset.
        files: files per split of ours.
        path: the path that the user named.
        data: the recipe's section.
        names: names of the splits to open.
    Errors: as `open_hub`.
    """
    what, builder = f"data.path {path}", _files_builder(kind, files)
    if data.stream:
        return _build_splits(_open_streams(builder, what, data, files), data, names)
    return _build_splits(_map(_copy(builder, what, list(chain(*files.values()))), files), data, names)


def open_listings(listings: Mapping[str, Listing], data: Data) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """Open tables beside images: all splits and label names. Errors: as `open_hub`."""
    for listing in listings.values():
        listing.sort_by_path(_image_column(listing, data))
    return _build_splits(listings, data, set(listings))


Builder = Callable[..., "datasets.DatasetBuilder"]
"""Builds the reader of a data set: of all columns, or of those that the argument `columns` names."""


def _files_builder(kind: str, files: Mapping[str, Sequence[Path]]) -> Builder:
    """Return a builder for files per split, whose names are not patterns as those of `datasets.load_dataset` are."""

    def build(**columns: Any) -> datasets.DatasetBuilder:
        from datasets.data_files import DataFilesDict, DataFilesList

        from stage1_vqvae.data.readers import Parquet, WebDataset

        for file in chain.from_iterable(files.values()):
            if "::" in str(file):  # to `datasets`, a file inside an archive
                raise UserError(f"{file}: expected a path without '::', which `datasets` cannot open, found one; rename it")
        listed = {split: [(str(file.absolute()), file.stat()) for file in paths] for split, paths in files.items()}
        data_files = DataFilesDict(
            {
                split: DataFilesList([name for name, _ in pairs], [(str(status.st_mtime_ns), str(status.st_size)) for _, status in pairs])
                for split, pairs in listed.items()
            }
        )
        return {"parquet": Parquet, "webdataset": WebDataset}[kind](dataset_name=kind, data_files=data_files, **columns)

    return build


def _hub_builder(name: str, arguments: Mapping[str, Any]) -> Builder:
    """Return a builder for a repository of the Hub, pinned to the commit of its first call."""
    pinned = dict(arguments)

    def build(**columns: Any) -> datasets.DatasetBuilder:
        import datasets
        from datasets.packaged_modules.webdataset import webdataset

        from stage1_vqvae.data.readers import WebDataset

        builder = datasets.load_dataset_builder(name, **pinned, **columns)
        listed = builder.config.data_files or {}
        # So that later calls do not read a newer commit.
        commit = re.search("@([0-9a-f]{40})/", str(next(iter(next(iter(listed.values()), [])), "")))
        if commit:
            pinned["revision"] = commit[1]
        if not isinstance(builder, webdataset.WebDataset):
            return builder
        same = {key: getattr(builder, key) for key in ("dataset_name", "base_path", "token", "repo_id", "storage_options", "info")}
        return WebDataset(config_name=builder.config.name, hash=f"{builder.hash}-whole", data_files=listed, **same)

    return build


def _copy(builder: Builder, what: str, files: Sequence[Path] = ()) -> datasets.DatasetDict:
    """Let `datasets` copy the splits of a data set into its cache; failures are one line that begins with `what`."""
    with _one_line_errors(what, files):
        reader = builder()
        reader.download_and_prepare()
        return reader.as_dataset()


def _map(source: Mapping[str, datasets.Dataset], files: Mapping[str, Sequence[Path]] | None = None) -> dict[str, _Mapped]:
    return {split: _Mapped(rows, None if files is None else files[split]) for split, rows in source.items()}


def _open_streams(builder: Builder, what: str, data: Data, files: Mapping[str, Sequence[Path]] | None = None) -> dict[str, Stream]:
    """Open the splits of a data set for streaming. `files`: files per split, where they are on this machine."""
    local_files = [] if files is None else list(chain(*files.values()))
    with _one_line_errors(what, local_files):
        config = builder().config
    if hasattr(config, "drop_labels"):
        raise UserError(f"{what}: expected Parquet or WebDataset files to stream, found a folder of images; leave data.stream away")
    listed = config.data_files or {}

    def opened(columns: list[str] | None = None) -> datasets.IterableDatasetDict:
        with _one_line_errors(what, local_files):
            return builder(**({} if columns is None else {"columns": columns})).as_streaming_dataset()

    def stream(name: str) -> Stream:
        split_files = listed.get(name, [])
        origin = files_fingerprint(files[name]) if files is not None else f"{split_files} {getattr(split_files, 'origin_metadata', '')}"
        title = f"{data.path or data.name}, {name}"
        return Stream(lambda columns: opened(columns)[name], list(split_files), title, data, origin, columnar=hasattr(config, "columns"))

    return {name: stream(name) for name in opened()}


@contextmanager
def _one_line_errors(what: str, files: Sequence[Path] = ()) -> Iterator[None]:
    """Turn any failure into one line that begins with `what`, or with the file that is cut short."""
    try:
        with at_work():  # it may download for hours, with progress bars of its own
            yield
    except UserError:
        raise
    except Exception as error:  # of many kinds: no connection, no such repository, no such builder, broken files
        for file in files:
            check_complete(file)
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        cause = str(error.__cause__ or error) or type(error).__name__
        raise UserError(f"{what}: expected a data set that can be loaded, found: {cause}") from None


def check_complete(file: Path) -> None:
    """Errors: UserError for an Arrow or a Parquet file without its end marker.

    Arrow reads a file that is cut between two batches as a shorter one.
    """
    if file.suffix in _ENDS:
        with open(file, "rb") as content:
            content.seek(-min(len(_ENDS[file.suffix]), file.stat().st_size), os.SEEK_END)
            if content.read() != _ENDS[file.suffix]:
                raise UserError(f"{file}: expected a whole file, found one without its end marker (cut short?)")


def _build_splits(source: Mapping[str, Table], data: Data, names: set[str]) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """Build the named splits of a data set and the names of its labels, which do not depend on `names`.

    Args:
        source: tables per split of ours.
        data: the recipe's section.
        names: names of the splits to build.
    """
    what = str(data.path or data.name)
    first = source[TRAIN] if TRAIN in source else next(iter(source.values()))
    image_column, label_column = _image_column(first, data), _label_column(first, data)
    for split, rows in source.items():
        if image_column not in rows.column_names:
            raise UserError(f"{what}: expected a column {image_column} in {split} too, found {listed(rows.column_names)}")
    label_names, numbers = None, dict[str, np.ndarray]()
    if label_column is not None:
        labelled = {split: rows for split, rows in source.items() if label_column in rows.column_names}
        kinds = {split: rows.features[label_column] for split, rows in labelled.items()}
        label_names, numbers = _numbered(kinds, {split: rows.values(label_column) for split, rows in labelled.items()}, label_column, what)
    splits: dict[str, SourceSplit] = {}
    for split, rows in source.items():
        if split not in names and not (split == TRAIN and VALIDATION in names and VALIDATION not in source):
            continue
        if len(rows) == 0:
            raise UserError(f"{what}: expected images in split {split}, found none")
        origin = f"{data.name} {data.config} {data.revision}" if data.path is None else ""
        # For the Hub a name stands in for the files, which depend on whether they are streamed.
        fingerprint = f"{origin} {image_column} {rows.fingerprint()}" + (f" hub:{data.name}@{data.revision}" if data.path is None else "")
        images = rows.images(image_column)
        labels = check_labels(numbers.get(split), split, what, lambda row, images=images: _row_name(images, row))  # type: ignore[misc]
        splits[split] = EncodedSplit(split, images, labels, fingerprint, partial(_values, rows, what, split))
    return splits, label_names


def _values(rows: Table, what: str, split: str, column: str) -> list[Any]:
    """Read a column. Errors: UserError if there is none of that name."""
    if column not in rows.column_names:
        raise UserError(f"{what}: expected a column {column} in {split} for the condition, found {listed(rows.column_names)}")
    return rows.values(column)


def _row_name(images: EncodedImages, row: int) -> str:
    path = images[[row]][0].path
    return f"row {row}" if path is None else f"row {row} ({path})"


def _image_column(rows: Table, data: Data) -> str:
    import datasets

    # In Parquet without Hugging Face's metadata an image is bytes, or a struct of bytes and a path.
    features = rows.features.items()
    columns = [
        name for name, feature in features if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)
    ]
    columns = columns or [name for name, feature in features if isinstance(feature, datasets.Value) and feature.dtype in _BYTES]
    if data.image_column is not None:
        columns = [name for name, feature in features if name == data.image_column and (name in columns or _may_be_bytes(feature))]
    if len(columns) != 1:
        expected = f"one column of images (--data.image_column NAME), found {listed(columns)} of {listed(rows.column_names)}"
        raise UserError(f"{data.path or data.name}: expected {expected}")
    return columns[0]


def _label_column(rows: Table, data: Data) -> str | None:
    import datasets

    if data.label_column == NO_LABELS:
        return None
    if data.label_column is not None:
        if data.label_column not in rows.column_names:
            expected = f"a column {data.label_column} (data.label_column), found {listed(rows.column_names)}"
            raise UserError(f"{data.path or data.name}: expected {expected}")
        return data.label_column
    found = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    called = [name for name in rows.column_names if name.lower() in _LABEL_NAMES]
    found = found or [name for name in called if _label_kind(rows.features[name]) is not None]
    if len(found) > 1:
        expected = f"one column of labels (--data.label_column NAME, or {NO_LABELS})"
        raise UserError(f"{data.path or data.name}: expected {expected}, found {listed(found)}")
    if called and not found:
        holds = f"holds no classes, whole numbers or text, but {rows.features[called[0]]}"
        say(f"{data.path or data.name}: no labels: the column {called[0]} {holds}")
    return found[0] if found else None


def _may_be_bytes(feature: Any) -> bool:
    """Return whether a column that the user names can contain encoded images."""
    import datasets

    item = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    return isinstance(item, datasets.Value) and item.dtype in (("uint8",) if item is not feature else _BYTES)


def _label_kind(feature: Any) -> str | None:
    """Return the kind of a column's labels: numbers, text, booleans; "" for a column without values; None for values of other types."""
    import datasets

    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    return next((kind for begin, kind in _LABEL_KINDS.items() if dtype.startswith(begin)), None)


def _label_name(value: Any) -> str | None:
    """Return a label as text, None for a missing one. Errors: ValueError for a fraction."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError
        value = int(value)
    return normalised(str(value).strip()) or None


def _numbered(
    kinds: Mapping[str, Any], values: Mapping[str, Sequence[Any]], column: str, what: str
) -> tuple[list[str] | None, dict[str, np.ndarray]]:
    """Return the names of labels, and per split the label of each row (N,) as an index of them, -1 for a missing one.

    Names are those of the column's classes, or all numbers and texts that occur, numbers in the order of their value, others of their text.

    Args:
        kinds: type of the column per split.
        values: values of the column per split.
        column: name of the column.
        what: name of the data set in messages.
    Errors: UserError for a value that is not a label, and for splits whose labels cannot be compared.
    """
    import datasets

    first = next(iter(kinds.values()))
    classes = [getattr(kind, "names", None) for kind in kinds.values()]
    name_of: dict[Any, str | None] = {None: None, -1: None}
    if isinstance(first, datasets.ClassLabel):
        if any(names != first.names for names in classes):
            raise UserError(f"{what}: expected the same classes in all splits, found others")
        name_of |= {number: _label_name(name) for number, name in enumerate(first.names)}
        names = [name for name in dict.fromkeys(name_of.values()) if name is not None]
    else:
        comparable = {split: _label_kind(kind) for split, kind in kinds.items()}
        for split, kind in comparable.items():
            if kind is None:
                expected = "labels that are classes, whole numbers or text (data.label_column)"
                raise UserError(f"{what}: expected {expected}, found {kinds[split]} in {column} of {split}")
        if len(set(comparable.values()) - {""}) > 1:
            found = ", ".join(f"{kind} in {split}" for split, kind in comparable.items() if kind)
            raise UserError(f"{what}: expected labels of one kind in all splits, found in {column} {found}")
        name_of = {}
        for split, of_split in values.items():
            for value in set(of_split):
                try:
                    name_of[value] = _label_name(value)
                except ValueError:
                    expected = f"whole numbers or text in {column} (--data.label_column NAME, or {NO_LABELS})"
                    raise UserError(f"{what}: expected {expected}, found {value} in row {of_split.index(value)} of {split}") from None
        _set_minus_one(name_of, values, column, what)
        names = _in_order({name for name in name_of.values() if name is not None})
    number_of = {name: number for number, name in enumerate(names)}
    numbers = {value: -1 if name is None else number_of[name] for value, name in name_of.items()}
    result = {}
    for split, of_split in values.items():
        try:
            result[split] = np.fromiter((numbers[value] for value in of_split), np.int64, len(of_split))
        except KeyError as error:
            raise UserError(f"{what}: expected numbers of {len(names)} classes in {column} of {split}, found {error}") from None
    if not any((found >= 0).any() for found in result.values()):
        say(f"{what}: no labels: the column {column} has none")
        return None, {}
    return names, result


def _set_minus_one(name_of: dict[Any, str | None], values: Mapping[str, Sequence[Any]], column: str, what: str) -> None:
    """Decide whether -1 is a class or a missing label where the column lists no classes: missing if only the test split has it."""
    unlabelled = [value for value, name in name_of.items() if name == "-1"]
    if not unlabelled:
        return
    if not any(value in of_split for value in unlabelled for split, of_split in values.items() if split != TEST):
        name_of |= dict.fromkeys(unlabelled)
        say(f"{what}: -1 in {column} of {TEST} is taken for a missing label, since no other split has it")
    elif len(set(name_of.values()) - {None}) > 2:
        say(f"{what}: -1 in {column} is taken for a class like the others; --data.label_column {NO_LABELS} leaves all labels away")


def _in_order(names: set[str]) -> list[str]:
    """Sort names by value if all are whole numbers, or else by text."""
    return sorted(names, key=int if all(re.fullmatch("0|-?[1-9][0-9]*", name) for name in names) else None)
