"""The file of compressed images: the coder's payload, the run's fingerprint, labels and names.

All numbers are little-endian. Sections follow one another without gaps, with the lengths in the header.

| bytes | content |
| --- | --- |
| 8 | magic: 89 "VQC" 0D 0A 1A 0A, which reveals a transfer as text, like PNG's |
| 2 | version of this layout, 1 |
| 16 | fingerprint of the run: the first 16 bytes of the sha256 of the sha256s of tokenizer and prior |
| 3 x 2 | height, width, channels of the images |
| 4, 4 | images with codes; images per batch, at most 256 |
| 4 | CRC-32 of the codes |
| 2, 4, 4, 8, 8 | bytes of the prior's name, the labels, the names, the payload, the pixels |
| 2 per batch | the batch's rounding offset (coder.py) |
| | the prior's name, UTF-8 |
| | labels, one per image with codes, in the prior's numbering, in the smallest unsigned integers, deflated; empty: no labels |
| | names, with `/` after each folder, separated by NUL, deflated; empty: no names |
| | payload |
| | pixels; empty: the file is lossy, and all images have codes |
| 4 | CRC-32 of everything before it |

A reader checks every count against the file's length: a batch of at most 256 images takes 2 bytes of offsets, deflated sections inflate to
at most 4 bytes per label and 4,096 per name, and a PNG's size is checked before its pixels are decoded. So the header of a file of n bytes
declares at most 128 n images, and memory grows with decoded images, not with declared ones (coder.py).

Pixels of a lossless file:

| bytes | content |
| --- | --- |
| 4, 4, 4 | images per batch of pixels; CRC-32 of the coded pixels; images stored as PNG |
| 8, 4 | bytes of their payload, and number of its rounding offsets (pixels.py) |
| 2 each | the offsets |
| | payload |
| 4, 4 each | per image stored as PNG: its number among all images, and the length of its PNG |
| | the PNGs without the eight bytes that all PNGs start with |
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from configs.errors import UserError
from pipelines.codec.coder import MOST_IMAGES, Coded
from pipelines.codec.pixels import CodedPixels, num_offsets
from pipelines.inputs.images import unique_names

SUFFIX = ".vqc"
_MAGIC = b"\x89VQC\r\n\x1a\n"
_VERSION = 1
_BEGINNING = struct.Struct("<8sH")
_HEADER = struct.Struct("<16s3HIIIHIIQQ")
_PIXELS = struct.Struct("<IIIQI")
_STORED = struct.Struct("<II")
_PNG = b"\x89PNG\r\n\x1a\n"
_CHECKSUM = struct.Struct("<I")
_LABEL_BYTES, _NAME_BYTES = 4, 4096  # at most; the second is the longest path that Linux takes


class Lossless(NamedTuple):
    """Additional content of a lossless file."""

    pixels: CodedPixels
    """Pixels of the images with codes."""
    stored: dict[int, bytes]
    """PNG files of images that are smaller as PNG, by their number among all images."""


class CodeFile(NamedTuple):
    """The content of a file of compressed images."""

    fingerprint: bytes
    """The run's fingerprint, from `run_fingerprint`."""
    prior: str
    """The prior's name in the run."""
    image_shape: tuple[int, int, int]
    """Height, width and channels of the images."""
    coded: Coded
    labels: Tensor | None
    """(N,) int64, in the prior's numbering; None: no label."""
    names: list[str] | None
    """Paths of the images below their folder, with `/` and without ending, from `unique_names`; None: unnamed images."""
    lossless: Lossless | None = None
    """Coded pixels; None: the file is lossy."""

    @property
    def images(self) -> int:
        """Number of images: those with codes and those stored as PNG."""
        return self.coded.images + (0 if self.lossless is None else len(self.lossless.stored))


class Sizes(NamedTuple):
    """Bytes of each part of a file."""

    header: int
    """Fixed header, offsets, the prior's name, checksum."""
    labels: int
    names: int
    payload: int
    pixels: int
    """Payload and offsets of the pixels, and PNGs, in a lossless file."""


def check_made_by(content: CodeFile, made_by: tuple[bytes, str], run: str, where: str) -> None:
    """Check a file's fingerprint. Errors: UserError if the file is not from the tokenizer and prior of `run`."""
    fingerprint, prior = made_by
    if content.fingerprint != fingerprint:
        expected = f"expected the fingerprint of run {run} with its prior {prior}, {fingerprint.hex()[:12]}"
        raise UserError(f"{where}: {expected}, found {content.fingerprint.hex()[:12]}: another run's, or one that was trained again since")


def run_fingerprint(tokenizer_sha256: str, prior_sha256: str) -> bytes:
    """Compute the fingerprint in a file: 16 bytes from the sha256 of tokenizer and prior."""
    return hashlib.sha256(f"{tokenizer_sha256} {prior_sha256}".encode()).digest()[:16]


def pack(content: CodeFile) -> tuple[bytes, Sizes]:
    """Serialise a file's content. Returns the bytes and the size of each part."""
    coded = content.coded
    labels = b"" if content.labels is None else _deflated_labels(content.labels)
    names = b"" if content.names is None else zlib.compress("\0".join(content.names).encode("utf-8", "surrogateescape"), 9)
    prior = content.prior.encode("utf-8", "surrogateescape")
    pixels = b"" if content.lossless is None else _packed_pixels(content.lossless)
    counts = (coded.images, coded.batch, coded.codes_crc, len(prior), len(labels), len(names), len(coded.payload), len(pixels))
    header = _BEGINNING.pack(_MAGIC, _VERSION) + _HEADER.pack(content.fingerprint, *content.image_shape, *counts)
    header += np.array(coded.offsets, "<u2").tobytes() + prior
    body = header + labels + names + coded.payload + pixels
    data = body + _CHECKSUM.pack(zlib.crc32(body))
    return data, Sizes(len(header) + _CHECKSUM.size, len(labels), len(names), len(coded.payload), len(pixels))


def _packed_pixels(lossless: Lossless) -> bytes:
    pixels, stored = lossless
    counts = _PIXELS.pack(pixels.batch, pixels.crc, len(stored), len(pixels.payload), len(pixels.offsets))
    cut = {number: png.removeprefix(_PNG) for number, png in stored.items()}
    pngs = b"".join(_STORED.pack(number, len(png)) for number, png in cut.items()) + b"".join(cut.values())
    return counts + np.array(pixels.offsets, "<u2").tobytes() + pixels.payload + pngs


def _unpacked_pixels(section: bytes) -> Lossless:
    if len(section) < _PIXELS.size:
        raise ValueError(f"{len(section)} bytes of pixels")
    batch, crc, count, length, offsets = _PIXELS.unpack_from(section)
    begin = _PIXELS.size + 2 * offsets
    end = begin + length
    pngs = end + count * _STORED.size
    if pngs > len(section) or length % 4 or not batch:
        raise ValueError(f"{len(section)} bytes of pixels, {pngs} or more declared")
    offset_values, stored = np.frombuffer(section, "<u2", offsets, _PIXELS.size).tolist(), {}
    for number, size in _STORED.iter_unpack(section[end:pngs]):
        stored[number] = _PNG + section[pngs : pngs + size]
        pngs += size
    if pngs != len(section) or len(stored) != count:
        raise ValueError(f"{len(section)} bytes of pixels, {pngs} declared")
    return Lossless(CodedPixels(section[begin:end], batch, offset_values, crc), stored)


def insert_stored(pixels: Tensor, stored: dict[int, bytes]) -> Tensor:
    """Insert the images stored as PNG among the decoded `pixels`: all images of a lossless file, uint8 (N, H, W, C)."""
    decoded = iter(pixels)
    pictures = [
        _stored_picture(stored[number], number).view(pixels.shape[1:]) if number in stored else next(decoded)
        for number in range(len(pixels) + len(stored))
    ]
    return torch.stack(pictures) if pictures else pixels


def _stored_picture(png: bytes, number: int) -> Tensor:
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as opened:
            return torch.from_numpy(np.array(opened))
    except Exception as error:  # decoders of damaged files raise anything
        raise UserError(f"decoding: expected a whole PNG of image {number}, found: {error}") from None


def _check_png(png: bytes, image_shape: tuple[int, int, int]) -> None:
    """Check by its header that a PNG has this shape. Errors: ValueError if not."""
    height, width, channels = image_shape
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as opened:
            header = opened.size, opened.mode
    except Exception as error:  # no PNG, or one of more pixels than Pillow trusts
        raise ValueError(f"an image stored as PNG that is none: {error}") from None
    if header != ((width, height), "L" if channels == 1 else "RGB"):
        raise ValueError(f"an image stored as PNG of {header[0][0]} x {header[0][1]} pixels in {header[1]}")


def _deflated_labels(labels: Tensor) -> bytes:
    values = labels.numpy()
    width = np.min_scalar_type(int(values.max(initial=0)))
    return zlib.compress(values.astype(width.newbyteorder("<")).tobytes(), 9)


def unpack(data: bytes, where: str) -> CodeFile:
    """Read a file's content from its bytes. Errors: UserError naming `where` for another kind of file, another version, or damage."""
    if data[: len(_MAGIC)] != _MAGIC:
        raise UserError(f"{where}: expected a file that pipelines/compress.py wrote, found another kind of file")
    body, checksum = data[: -_CHECKSUM.size], data[-_CHECKSUM.size :]
    if len(body) < _BEGINNING.size + _HEADER.size:
        raise UserError(f"{where}: expected compressed images, found a truncated file of {len(data)} bytes")
    _, version = _BEGINNING.unpack_from(body)
    if version != _VERSION:
        raise UserError(f"{where}: expected version {_VERSION} of the format, found {version}")
    if checksum != _CHECKSUM.pack(zlib.crc32(body)):
        raise UserError(f"{where}: expected the checksum of its {len(data)} bytes, found another; it is damaged or truncated")
    try:
        return _parsed(body)
    except (ValueError, struct.error, zlib.error) as error:  # a correct checksum over invalid content: not written by this code
        raise UserError(f"{where}: expected a file that pipelines/compress.py wrote, found one that contradicts itself ({error})") from None


def _parsed(body: bytes) -> CodeFile:
    fingerprint, height, width, channels, images, batch, codes_crc, *lengths = _HEADER.unpack_from(body, _BEGINNING.size)
    if not 0 < batch <= MOST_IMAGES:
        raise ValueError(f"batches of {batch} images, outside 1 to {MOST_IMAGES}")
    num_batches = -(-images // batch)
    end, sections = _BEGINNING.size + _HEADER.size, []
    for length in (2 * num_batches, *lengths):
        sections.append(body[end : end + length])
        end += length
    if end != len(body):
        raise ValueError(f"{end} bytes declared, {len(body)} in the file")
    offsets, prior, labels, names, payload, pixels = sections
    if b"/" in prior or prior in (b".", b".."):
        raise ValueError("a prior's name that is a path")
    if len(payload) % 4:
        raise ValueError(f"a payload of {len(payload)} bytes, not a multiple of 4")
    coded = Coded(payload, images, batch, np.frombuffer(offsets, "<u2").tolist(), codes_crc)
    lossless = _unpacked_pixels(pixels) if pixels else None
    count = images + (0 if lossless is None else len(lossless.stored))
    if lossless is not None:
        expected = num_offsets(images, lossless.pixels.batch, (height, width, channels))
        if len(lossless.pixels.offsets) != expected or any(number >= count for number in lossless.stored):
            raise ValueError(f"pixels that do not fit {count} images")
        for png in lossless.stored.values():
            _check_png(png, (height, width, channels))
    return CodeFile(
        fingerprint=fingerprint,
        prior=prior.decode("utf-8", "surrogateescape"),
        image_shape=(height, width, channels),
        coded=coded,
        labels=_inflated_labels(labels, images) if labels else None,
        names=_checked_names(_inflated(names, _NAME_BYTES * count).decode("utf-8", "surrogateescape"), count) if names else None,
        lossless=lossless,
    )


def _inflated(deflated: bytes, most: int) -> bytes:
    """Inflate a section to at most `most` bytes. Errors: ValueError for more, or an incomplete stream."""
    inflater = zlib.decompressobj()
    raw = inflater.decompress(deflated, most + 1)  # a limit of 0 would mean none
    if len(raw) > most or not inflater.eof or inflater.unused_data:
        raise ValueError(f"{len(deflated)} deflated bytes that are not at most {most}")
    return raw


def _inflated_labels(deflated: bytes, images: int) -> Tensor:
    raw = _inflated(deflated, _LABEL_BYTES * images)
    width = len(raw) // max(1, images)
    if width * images != len(raw) or (images and width not in (1, 2, 4)):
        raise ValueError(f"{len(raw)} bytes of labels for {images} images")
    return torch.from_numpy(np.frombuffer(raw, f"<u{width or 1}").astype(np.int64))


def _is_below(name: str) -> bool:
    """Return whether a name, parts joined by `/`, is a path inside its folder on this system."""
    return all(part not in ("", ".", "..") and PurePath(part).parts == (part,) and not PurePath(part).drive for part in name.split("/"))


def _checked_names(joined: str, images: int) -> list[str]:
    names = joined.split("\0") if images else []
    # Names become files: they must stay inside the folder and be unique.
    if len(names) != images or names != unique_names(names) or not all(_is_below(name) for name in names):
        raise ValueError(f"names that cannot be those of {images} files")
    return names
