"""Data sets of rows: those that `datasets` opens, of the Hub, of Parquet, WebDataset and Arrow files; and tables beside images."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

# Where it is needed: it takes a second to import, and most commands read codes, or pixels that have their own decoder.
if TYPE_CHECKING:
    import datasets

# What a column of labels is called where its type does not tell, in any case: the last is WebDataset's.
_LABEL_NAMES = ("label", "labels", "class", "cls")
# What values of a type can be compared with, by the beginning of the type's name. A column of the type null has no value at all.
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
# The last bytes of whole files.
_ENDS = {".arrow": b"\xff\xff\xff\xff\0\0\0\0", ".parquet": b"PAR1"}


class _Column:
    """A data set's column of images, as `EncodedImages`."""

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
    """A split of a data set, as rows with columns."""

    @property
    def features(self) -> Mapping[str, Any]:
        """What each column holds."""

    @property
    def column_names(self) -> Sequence[str]:
        """Their names."""

    def __len__(self) -> int: ...

    def values(self, column: str) -> list[Any]:
        """A column of numbers or text."""

    def images(self, column: str) -> EncodedImages:
        """A column of images."""

    def fingerprint(self) -> str:
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

    def files(self) -> Sequence[Path]:
        """Those that the rows lie in."""
        return [Path(file["filename"]) for file in self._rows.cache_files] if self._files is None else self._files

    def fingerprint(self) -> str:
        return f"{len(self)} {files_fingerprint(self.files())}"


def open_hub(data: Data, wanted: set[str]) -> OpenedSource:
    """Open a data set of the Hub.

    Errors: UserError for one that cannot be loaded, or whose columns leave open which is meant.
    """
    assert data.name is not None
    if has_magic(data.name):  # `datasets` would take it for a folder of this machine, and for a pattern
        raise UserError(f"data.name {data.name}: expected a data set of the Hub, USER/NAME, found a folder's name; use --data.path")
    what = f"data.name {data.name} (a local copy can be given with --data.path)"
    builder = _hub_builder(data.name, {"name": data.config, "revision": data.revision})
    found = _streams(builder, what, data) if data.stream else _mapped(_copied(builder, what))
    return _ours(found, data, wanted)


def is_saved_dataset(path: Path) -> bool:
    """Whether `save_to_disk` wrote that folder: of several splits, or of one."""
    return (path / "dataset_dict.json").exists() or all((path / name).exists() for name in ("state.json", "dataset_info.json"))


def open_saved(path: Path, data: Data, wanted: set[str]) -> OpenedSource:
    """Open what `save_to_disk` wrote. Errors: as `open_hub`."""
    import datasets

    with _failing_as(f"data.path {path}, which `save_to_disk` wrote", sorted(path.glob("**/data-*.arrow"))):
        source = datasets.load_from_disk(str(path))
        found = _mapped({"train": source} if isinstance(source, datasets.Dataset) else source)
        for file in chain.from_iterable(rows.files() for rows in found.values()):
            check_complete(file)
    return _ours(found, data, wanted)


def _ours(found: Mapping[str, Table], data: Data, wanted: set[str]) -> OpenedSource:
    """The data set of splits that go by the source's names."""
    names = map_splits(data, found)
    splits, label_names = _found({split: found[name] for name, split in names.items()}, data, wanted)
    return OpenedSource(splits, label_names, {split: str(name) for name, split in names.items()})


def open_files(
    kind: str, files: Mapping[str, Sequence[Path]], path: Path, data: Data, wanted: set[str]
) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """Splits and label names of files on this machine.

    Args:
        kind: what `datasets` calls them: parquet, webdataset.
        files: of each of our splits.
        path: that the user named.
        data: the recipe's.
        wanted: names of splits.
    Errors: as `open_hub`.
    """
    what, builder = f"data.path {path}", _files_builder(kind, files)
    if data.stream:
        return _found(_streams(builder, what, data, files), data, wanted)
    return _found(_mapped(_copied(builder, what, list(chain(*files.values()))), files), data, wanted)


def open_listings(listings: Mapping[str, Listing], data: Data) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """All splits, and label names, of tables beside images. Errors: as `open_hub`."""
    for listing in listings.values():
        listing.sort_by_path(_image_column(listing, data))
    return _found(listings, data, set(listings))


Builder = Callable[..., "datasets.DatasetBuilder"]
"""Makes what reads a data set: all of its columns, or those that the argument `columns` names."""


def _files_builder(kind: str, files: Mapping[str, Sequence[Path]]) -> Builder:
    """Of files by split. Their names are no patterns, as `datasets.load_dataset` would take them."""

    def build(**columns: Any) -> datasets.DatasetBuilder:
        from datasets.data_files import DataFilesDict, DataFilesList

        from stage1_vqvae.data.readers import Parquet, WebDataset

        for file in chain.from_iterable(files.values()):
            if "::" in str(file):  # to `datasets`, a file inside an archive
                raise UserError(f"{file}: expected a path without '::', which `datasets` cannot open, found one; rename it")
        listed = {split: [(str(file.absolute()), file.stat()) for file in found] for split, found in files.items()}
        data_files = DataFilesDict(
            {
                split: DataFilesList([name for name, _ in found], [(str(status.st_mtime_ns), str(status.st_size)) for _, status in found])
                for split, found in listed.items()
            }
        )
        return {"parquet": Parquet, "webdataset": WebDataset}[kind](dataset_name=kind, data_files=data_files, **columns)

    return build


def _hub_builder(name: str, arguments: Mapping[str, Any]) -> Builder:
    """Of a repository of the Hub, at one commit from the first time on."""
    pinned = dict(arguments)

    def build(**columns: Any) -> datasets.DatasetBuilder:
        import datasets
        from datasets.packaged_modules.webdataset import webdataset

        from stage1_vqvae.data.readers import WebDataset

        found = datasets.load_dataset_builder(name, **pinned, **columns)
        listed = found.config.data_files or {}
        # So that nothing read later is of a newer commit.
        commit = re.search("@([0-9a-f]{40})/", str(next(iter(next(iter(listed.values()), [])), "")))
        if commit:
            pinned["revision"] = commit[1]
        if not isinstance(found, webdataset.WebDataset):
            return found
        same = {key: getattr(found, key) for key in ("dataset_name", "base_path", "token", "repo_id", "storage_options", "info")}
        return WebDataset(config_name=found.config.name, hash=f"{found.hash}-whole", data_files=listed, **same)

    return build


def _copied(builder: Builder, what: str, files: Sequence[Path] = ()) -> datasets.DatasetDict:
    """The splits of a data set, of which `datasets` makes a copy; failures are one line that begins with `what`."""
    with _failing_as(what, files):
        reader = builder()
        reader.download_and_prepare()
        return reader.as_dataset()


def _mapped(source: Mapping[str, datasets.Dataset], files: Mapping[str, Sequence[Path]] | None = None) -> dict[str, _Mapped]:
    return {split: _Mapped(rows, None if files is None else files[split]) for split, rows in source.items()}


def _streams(builder: Builder, what: str, data: Data, files: Mapping[str, Sequence[Path]] | None = None) -> dict[str, Stream]:
    """The splits of a data set as they are where they lie. `files`: of each split, where they are this machine's."""
    every = [] if files is None else list(chain(*files.values()))
    with _failing_as(what, every):
        config = builder().config
    if hasattr(config, "drop_labels"):
        raise UserError(f"{what}: expected Parquet or WebDataset files to stream, found a folder of images; leave data.stream away")
    listed = config.data_files or {}

    def opened(columns: list[str] | None = None) -> datasets.IterableDatasetDict:
        with _failing_as(what, every):
            return builder(**({} if columns is None else {"columns": columns})).as_streaming_dataset()

    def stream(name: str) -> Stream:
        own = listed.get(name, [])
        origin = files_fingerprint(files[name]) if files is not None else f"{own} {getattr(own, 'origin_metadata', '')}"
        called = f"{data.path or data.name}, {name}"
        return Stream(lambda columns: opened(columns)[name], list(own), called, data, origin, columnar=hasattr(config, "columns"))

    return {name: stream(name) for name in opened()}


@contextmanager
def _failing_as(what: str, files: Sequence[Path] = ()) -> Iterator[None]:
    """Whatever goes wrong as one line that begins with `what`, or with that of the files which is cut short."""
    try:
        with at_work():  # it may fetch for hours, and shows that by bars of its own
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
    """Errors: UserError for an Arrow or a Parquet file without its end.

    Arrow takes a file that is cut between two batches for a shorter one.
    """
    if file.suffix in _ENDS:
        with open(file, "rb") as content:
            content.seek(-min(len(_ENDS[file.suffix]), file.stat().st_size), os.SEEK_END)
            if content.read() != _ENDS[file.suffix]:
                raise UserError(f"{file}: expected a whole file, found one without its end marker (cut short?)")


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
            raise UserError(f"{what}: expected a column {image_column} in {split} too, found {listed(rows.column_names)}")
    names, numbers = None, dict[str, np.ndarray]()
    if label_column is not None:
        labelled = {split: rows for split, rows in source.items() if label_column in rows.column_names}
        kinds = {split: rows.features[label_column] for split, rows in labelled.items()}
        names, numbers = _numbered(kinds, {split: rows.values(label_column) for split, rows in labelled.items()}, label_column, what)
    splits: dict[str, SourceSplit] = {}
    for split, rows in source.items():
        if split not in wanted and not (split == TRAIN and VALIDATION in wanted and VALIDATION not in source):
            continue
        if len(rows) == 0:
            raise UserError(f"{what}: expected images in split {split}, found none")
        origin = f"{data.name} {data.config} {data.revision}" if data.path is None else ""
        # Which files of the Hub's hold the rows depends on whether they are streamed.
        fingerprint = f"{origin} {image_column} {rows.fingerprint()}" + (f" hub:{data.name}@{data.revision}" if data.path is None else "")
        images = rows.images(image_column)
        labels = check_labels(numbers.get(split), split, what, lambda row, images=images: _row_name(images, row))  # type: ignore[misc]
        splits[split] = EncodedSplit(split, images, labels, fingerprint)
    return splits, names


def _row_name(images: EncodedImages, row: int) -> str:
    path = images[[row]][0].path
    return f"row {row}" if path is None else f"row {row} ({path})"


def _image_column(rows: Table, data: Data) -> str:
    import datasets

    # Parquet written without Hugging Face's metadata shows an image as what it is: bytes, or a struct of them and of a path.
    features = rows.features.items()
    found = [
        name for name, feature in features if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)
    ]
    found = found or [name for name, feature in features if isinstance(feature, datasets.Value) and feature.dtype in _BYTES]
    if data.image_column is not None:
        found = [name for name, feature in features if name == data.image_column and (name in found or _may_be_bytes(feature))]
    if len(found) != 1:
        expected = f"one column of images (--data.image_column NAME), found {listed(found)} of {listed(rows.column_names)}"
        raise UserError(f"{data.path or data.name}: expected {expected}")
    return found[0]


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
    """Whether a column that the user names can be one of encoded images."""
    import datasets

    item = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    return isinstance(item, datasets.Value) and item.dtype in (("uint8",) if item is not feature else _BYTES)


def _label_kind(feature: Any) -> str | None:
    """What a column's labels can be compared with: numbers, text, booleans; "": it has none; None: its values are no labels."""
    import datasets

    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    return next((kind for begin, kind in _LABEL_KINDS.items() if dtype.startswith(begin)), None)


def _label_name(value: Any) -> str | None:
    """A label as text; None where there is none. Errors: ValueError for a fraction."""
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
    """The names of labels, and of each split their numbers (N,), -1 for a missing one.

    Names are those of the classes; or of all numbers and texts that occur, in their order, numbers by value.

    Args:
        kinds: the column's feature in each split.
        values: its values there.
        column: its name.
        what: the data set is, for messages.
    Errors: UserError for what is no label, and for splits whose labels cannot be compared.
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
    """Decide what -1 is where no list of classes tells: a class, unless the test split alone has it, as contests publish theirs."""
    unlabelled = [value for value, name in name_of.items() if name == "-1"]
    if not unlabelled:
        return
    if not any(value in of_split for value in unlabelled for split, of_split in values.items() if split != TEST):
        name_of |= dict.fromkeys(unlabelled)
        say(f"{what}: -1 in {column} of {TEST} is taken for a missing label, since no other split has it")
    elif len(set(name_of.values()) - {None}) > 2:
        say(f"{what}: -1 in {column} is taken for a class like the others; --data.label_column {NO_LABELS} leaves all labels away")


def _in_order(names: set[str]) -> list[str]:
    """Names by their value, if all are whole numbers, or else by their text."""
    return sorted(names, key=int if all(re.fullmatch("0|-?[1-9][0-9]*", name) for name in names) else None)
