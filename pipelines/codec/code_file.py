"""The file of compressed images: the coder's payload, with what it takes to know the run, the labels and the names again.

All numbers little-endian. Sections follow one another without gaps, as long as the header says.

| bytes | what |
| --- | --- |
| 8 | magic: 89 "VQC" 0D 0A 1A 0A, which (as PNG's) a transfer as text would break |
| 2 | version of this layout, 2; 1 had no folders in its names |
| 16 | fingerprint of the run: sha256 over the sha256 of tokenizer and prior, cut short |
| 3 x 2 | height, width, channels of the images |
| 4, 4 | images; images a batch |
| 4 | CRC-32 of the codes |
| 2, 4, 4, 8 | bytes of the prior's name, the labels, the names, the payload |
| 2 a batch | the batch's rounding offset (coder.py) |
| | the prior's name, UTF-8 |
| | labels, one an image, in the prior's numbering, the smallest unsigned integers, deflated; nothing: no labels |
| | names, with `/` after each folder, NUL between them, deflated; nothing: no names |
| | payload |
| 4 | CRC-32 of all before it |
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from pipelines.codec.coder import Coded
from pipelines.images.inputs import unique_names
from stage1_vqvae.training.weights_file import fingerprint

SUFFIX = ".vqc"
_MAGIC = b"\x89VQC\r\n\x1a\n"
_VERSION = 2
_BEGINNING = struct.Struct("<8sH")
_HEADER = struct.Struct("<16s3HIIIHIIQ")
_CHECKSUM = struct.Struct("<I")


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
    """Paths of the images below the folder they were in, with `/` and without ending, from `unique_names`; None: they had none."""


class Sizes(NamedTuple):
    """How many bytes the parts of a file take."""

    header: int
    """The fixed part, offsets, the prior's name, the checksum."""
    labels: int
    names: int
    payload: int


def run_fingerprint(tokenizer: Path, prior: Path) -> bytes:
    """What a file and a run recognise each other by: 16 bytes."""
    return hashlib.sha256(f"{fingerprint(tokenizer)} {fingerprint(prior)}".encode()).digest()[:16]


def pack(content: CodeFile) -> tuple[bytes, Sizes]:
    """The bytes of a file with that content, and what its parts take."""
    coded = content.coded
    labels = b"" if content.labels is None else _deflated_labels(content.labels)
    names = b"" if content.names is None else zlib.compress("\0".join(content.names).encode("utf-8", "surrogateescape"), 9)
    prior = content.prior.encode("utf-8", "surrogateescape")
    counts = (coded.images, coded.batch, coded.codes_crc, len(prior), len(labels), len(names), len(coded.payload))
    header = _BEGINNING.pack(_MAGIC, _VERSION) + _HEADER.pack(content.fingerprint, *content.image_shape, *counts)
    header += np.array(coded.offsets, "<u2").tobytes() + prior
    body = header + labels + names + coded.payload
    whole = body + _CHECKSUM.pack(zlib.crc32(body))
    return whole, Sizes(len(header) + _CHECKSUM.size, len(labels), len(names), len(coded.payload))


def _deflated_labels(labels: Tensor) -> bytes:
    values = labels.numpy()
    width = np.min_scalar_type(int(values.max(initial=0)))
    return zlib.compress(values.astype(width.newbyteorder("<")).tobytes(), 9)


def unpack(data: bytes, where: str) -> CodeFile:
    """What is in a file's bytes. Errors: UserError, naming `where`, for what is no such file, of another version, or damaged."""
    if data[: len(_MAGIC)] != _MAGIC:
        raise UserError(f"{where}: expected a file that pipelines/compress.py wrote, found another kind of file")
    body, checksum = data[: -_CHECKSUM.size], data[-_CHECKSUM.size :]
    if len(body) < _BEGINNING.size + _HEADER.size:
        raise UserError(f"{where}: expected compressed images, found a truncated file of {len(data)} bytes")
    _, version = _BEGINNING.unpack_from(body)
    if version not in (1, _VERSION):
        raise UserError(f"{where}: expected version {_VERSION} of the format, found {version}")
    if checksum != _CHECKSUM.pack(zlib.crc32(body)):
        raise UserError(f"{where}: expected the checksum of its {len(data)} bytes, found another; it is damaged or truncated")
    try:
        return _parsed(body)
    except (ValueError, zlib.error) as error:  # a right checksum over wrong content: somebody else's writing
        raise UserError(f"{where}: expected a file that pipelines/compress.py wrote, found one that contradicts itself ({error})") from None


def _parsed(body: bytes) -> CodeFile:
    found, height, width, channels, images, batch, codes_crc, *lengths = _HEADER.unpack_from(body, _BEGINNING.size)
    if not batch:
        raise ValueError("batches of no image")
    num_batches = -(-images // batch)
    end, sections = _BEGINNING.size + _HEADER.size, []
    for length in (2 * num_batches, *lengths):
        sections.append(body[end : end + length])
        end += length
    if end != len(body):
        raise ValueError(f"{end} bytes announced, {len(body)} there")
    offsets, prior, labels, names, payload = sections
    if b"/" in prior or prior in (b".", b".."):
        raise ValueError("a prior's name that leads elsewhere")
    if len(payload) % 4:
        raise ValueError(f"a payload of {len(payload)} bytes, not of words of 4")
    coded = Coded(payload, images, batch, np.frombuffer(offsets, "<u2").tolist(), codes_crc)
    return CodeFile(
        fingerprint=found,
        prior=prior.decode("utf-8", "surrogateescape"),
        image_shape=(height, width, channels),
        coded=coded,
        labels=_inflated_labels(labels, images) if labels else None,
        names=_checked_names(zlib.decompress(names).decode("utf-8", "surrogateescape"), images) if names else None,
    )


def _inflated_labels(deflated: bytes, images: int) -> Tensor:
    raw = zlib.decompress(deflated)
    width = len(raw) // max(1, images)
    if width * images != len(raw) or (images and width not in (1, 2, 4)):
        raise ValueError(f"{len(raw)} bytes of labels for {images} images")
    return torch.from_numpy(np.frombuffer(raw, f"<u{width or 1}").astype(np.int64))


def _is_below(name: str) -> bool:
    """Whether a name, parts joined by `/`, is a path below the folder it is put in, on this system."""
    return all(part not in ("", ".", "..") and PurePath(part).parts == (part,) and not PurePath(part).drive for part in name.split("/"))


def _checked_names(joined: str, images: int) -> list[str]:
    names = joined.split("\0") if images else []
    # They become files: none may lead out of the folder, or onto another.
    if len(names) != images or names != unique_names(names) or not all(_is_below(name) for name in names):
        raise ValueError(f"names that cannot be those of {images} files")
    return names
