"""Data sets of rows: from the Hub, from Parquet, WebDataset and Arrow files by `datasets`, and from tables beside images."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from glob import has_magic
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.data import Data
from configs.errors import UserError, listed
from stage1_vqvae.data.cache import files_fingerprint
from stage1_vqvae.data.columns import Table, image_column, label_column, number_labels
from stage1_vqvae.data.encoded import EncodedImage, EncodedImages, EncodedSplit, parse_encoded_image
from stage1_vqvae.data.listings import Listing
from stage1_vqvae.data.names import check_labels, map_splits
from stage1_vqvae.data.splits import TRAIN, VALIDATION, OpenedSource, SourceSplit
from stage1_vqvae.data.streams import Stream
from training.watch import at_work

# `datasets` is imported inside functions: that takes a second, and most commands read codes or files of images.
if TYPE_CHECKING:
    import datasets
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
    data_name = f"data.name {data.name} (a local copy can be given with --data.path)"
    builder = _hub_builder(data.name, {"name": data.config, "revision": data.revision})
    source = _open_streams(builder, data_name, data) if data.stream else _map(_copy(builder, data_name))
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
    data_name, builder = f"data.path {path}", _files_builder(kind, files)
    if data.stream:
        return _build_splits(_open_streams(builder, data_name, data, files), data, names)
    return _build_splits(_map(_copy(builder, data_name, list(chain(*files.values()))), files), data, names)


def open_listings(listings: Mapping[str, Listing], data: Data) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """Open tables beside images: all splits and label names. Errors: as `open_hub`."""
    for listing in listings.values():
        listing.sort_by_path(image_column(listing, data))
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


def _copy(builder: Builder, data_name: str, files: Sequence[Path] = ()) -> datasets.DatasetDict:
    """Let `datasets` copy the splits of a data set into its cache; failures are one line that begins with `data_name`."""
    with _one_line_errors(data_name, files):
        reader = builder()
        reader.download_and_prepare()
        return reader.as_dataset()


def _map(source: Mapping[str, datasets.Dataset], files: Mapping[str, Sequence[Path]] | None = None) -> dict[str, _Mapped]:
    return {split: _Mapped(rows, None if files is None else files[split]) for split, rows in source.items()}


def _open_streams(builder: Builder, data_name: str, data: Data, files: Mapping[str, Sequence[Path]] | None = None) -> dict[str, Stream]:
    """Open the splits of a data set for streaming. `files`: files per split, where they are on this machine."""
    local_files = [] if files is None else list(chain(*files.values()))
    with _one_line_errors(data_name, local_files):
        config = builder().config
    if hasattr(config, "drop_labels"):
        raise UserError(f"{data_name}: expected Parquet or WebDataset files to stream, found a folder of images; leave data.stream away")
    listed = config.data_files or {}

    def opened(columns: list[str] | None = None) -> datasets.IterableDatasetDict:
        with _one_line_errors(data_name, local_files):
            return builder(**({} if columns is None else {"columns": columns})).as_streaming_dataset()

    def stream(name: str) -> Stream:
        split_files = listed.get(name, [])
        origin = files_fingerprint(files[name]) if files is not None else f"{split_files} {getattr(split_files, 'origin_metadata', '')}"
        title = f"{data.path or data.name}, {name}"
        return Stream(lambda columns: opened(columns)[name], list(split_files), title, data, origin, columnar=hasattr(config, "columns"))

    return {name: stream(name) for name in opened()}


@contextmanager
def _one_line_errors(data_name: str, files: Sequence[Path] = ()) -> Iterator[None]:
    """Turn any failure into one line that begins with `data_name`, or with the file that is cut short."""
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
        raise UserError(f"{data_name}: expected a data set that can be loaded, found: {cause}") from None


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
    data_name = str(data.path or data.name)
    first = source[TRAIN] if TRAIN in source else next(iter(source.values()))
    images_in, labels_in = image_column(first, data), label_column(first, data)
    for split, rows in source.items():
        if images_in not in rows.column_names:
            raise UserError(f"{data_name}: expected a column {images_in} in {split} too, found {listed(rows.column_names)}")
    label_names, numbers = None, dict[str, np.ndarray]()
    if labels_in is not None:
        labelled = {split: rows for split, rows in source.items() if labels_in in rows.column_names}
        kinds = {split: rows.features[labels_in] for split, rows in labelled.items()}
        values = {split: rows.values(labels_in) for split, rows in labelled.items()}
        label_names, numbers = number_labels(kinds, values, labels_in, data_name)
    splits: dict[str, SourceSplit] = {}
    for split, rows in source.items():
        if split not in names and not (split == TRAIN and VALIDATION in names and VALIDATION not in source):
            continue
        if len(rows) == 0:
            raise UserError(f"{data_name}: expected images in split {split}, found none")
        origin = f"{data.name} {data.config} {data.revision}" if data.path is None else ""
        # For the Hub a name stands in for the files, which depend on whether they are streamed.
        fingerprint = f"{origin} {images_in} {rows.fingerprint()}" + (f" hub:{data.name}@{data.revision}" if data.path is None else "")
        images = rows.images(images_in)
        labels = check_labels(numbers.get(split), split, data_name, lambda row, images=images: _row_name(images, row))  # type: ignore[misc]
        splits[split] = EncodedSplit(split, images, labels, fingerprint, partial(_values, rows, data_name, split))
    return splits, label_names


def _values(rows: Table, data_name: str, split: str, column: str) -> list[Any]:
    """Read a column. Errors: UserError if there is none of that name."""
    if column not in rows.column_names:
        raise UserError(f"{data_name}: expected a column {column} in {split} for the condition, found {listed(rows.column_names)}")
    return rows.values(column)


def _row_name(images: EncodedImages, row: int) -> str:
    path = images[[row]][0].path
    return f"row {row}" if path is None else f"row {row} ({path})"
