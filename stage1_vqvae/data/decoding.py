"""From an encoded image to pixels of the recipe's size and channels."""

from __future__ import annotations

import functools
import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageColor, UnidentifiedImageError

from configs.data import Data
from configs.errors import UserError
from stage1_vqvae.data.crops import Crop
from stage1_vqvae.data.formats import ending_of, package_for, register_for

_MODES = {1: "L", 3: "RGB"}
# What a codec that can decode to a smaller size leaves: so many times the pixels needed along each side, for the filter to choose from;
# twice in the crops of an image enlarged by a tenth. Whatever crops are asked for, so that each looks the same beside any others.
_LEFT_TO_THE_FILTER = 2.2
_TWELVE_BITS, _SIXTEEN_BITS = 4095, 65535
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
# TIFF's tag of what values stand for, and the value by which 0 is white.
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by EXIF's orientation."""


warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata that it cannot parse, and about pictures that are merely large


class UnreadableImage(UserError):
    """An image whose bytes were read, and are none, whoever asks."""


def decode_image(content: bytes | None, path: str | None, data: Data, what: str = "") -> np.ndarray:
    """An encoded image (or the file at `path`) as uint8 (H, W, C): turned upright, composed over `data.background` where it is
    transparent, converted to `data.channels`, scaled to cover height x width and cropped at the centre.

    Errors: UserError with its path, or `what` content it is, if it cannot be read; UnreadableImage if that is what it holds.
    """
    return decode_crops(content, path, data, [None], what)[0]


def decode_crops(content: bytes | None, path: str | None, data: Data, crops: Sequence[Crop | None], what: str = "") -> np.ndarray:
    """Decode several crops of one image (None: the transform's) as `decode_image` does: uint8 (crops, H, W, C)."""
    # Its sides may yet be exchanged, when it is turned upright.
    side = math.ceil(_LEFT_TO_THE_FILTER * max(data.height, data.width) / math.sqrt(data.transform.smallest_area))
    image = read_image(content, path, what, side)
    try:
        image = _prepared(image, data)
    except ValueError as error:
        raise UnreadableImage(f"{_where(content, path, what)}: expected a readable image, found: {error}") from None
    return np.stack([_fit(image, data, crop) for crop in crops])


def read_image(content: bytes | None, path: str | None, what: str = "", side: int | None = None) -> Image.Image:
    """An encoded image (or the file at `path`), turned upright, in the mode it is stored in. Of what else the file holds only the
    orientation is read; if that fails, it is no failure.

    Args:
        content: the encoded image.
        path: its file, or its name.
        what: it is, for messages.
        side: JPEG's decoder may scale it to at least so many pixels a side.
    Errors: UserError, as `decode_image`.
    """
    if content is None and path is None:
        raise UnreadableImage(f"{what}: expected an image, found none")
    register_for(path)
    try:
        try:
            return _opened(io.BytesIO(content) if content is not None else path or "", side)
        except Exception as error:  # Pillow raises anything for what it cannot parse
            if isinstance(error, OSError | MemoryError | Image.DecompressionBombError) and not isinstance(error, UnidentifiedImageError):
                raise
            return _without_metadata(content, path, side, error)
    except Exception as error:
        passing = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
        kind = UserError if passing else UnreadableImage
        package = None if path is None else package_for(ending_of(path))
        reader = f"Pillow cannot read without {package}" if package else "Pillow cannot identify"
        found = f"one that {reader}" if isinstance(error, UnidentifiedImageError) else error
        advice = "; scale it down first" if isinstance(error, Image.DecompressionBombError) else ""
        raise kind(f"{_where(content, path, what)}: expected a readable image, found: {found}{advice}") from None


def _where(content: bytes | None, path: str | None, what: str) -> str:
    return str(path) if content is None else what + (f" ({path})" if path else "")


def _opened(source: io.BytesIO | str, side: int | None) -> Image.Image:
    with Image.open(source) as opened:
        if side is not None:
            opened.draft(None, (side, side))
        tile: Any = opened.tile[0].args if opened.tile else ()
        inverted = opened.format == "TIFF" and opened.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO  # type: ignore[attr-defined]
        opened.load()
        image: Image.Image = opened
        if opened.format == "PPM" and opened.mode == "I":  # to whose 16 bits Pillow scales what the file calls white
            values = np.asarray(opened).astype(np.uint16)
            image = Image.fromarray(values) if tile == "I;16B" or tile[-1:] == (_SIXTEEN_BITS,) else _scaled(values, _SIXTEEN_BITS)
        elif image.mode.startswith("I;16"):
            if tile[:1] == ("I;12",):
                image = _scaled(np.asarray(image), _TWELVE_BITS)
            elif inverted:  # Pillow does so for 8 bits
                image = Image.fromarray(_SIXTEEN_BITS - np.asarray(image).astype(np.uint16))
        return _upright(image, opened)


def _upright(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Turn an image as the orientation in the metadata of the `opened` file says, if that can be read."""
    try:
        orientation = opened.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises anything for what it cannot parse
        orientation = None
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _without_metadata(content: bytes | None, path: str | None, side: int | None, error: Exception) -> Image.Image:
    """A PNG or JPEG whose picture can be read though something beside it cannot. Errors: `error`, if that is not so."""
    if content is None:
        with open(path or "", "rb") as file:
            known = file.read(len(_PNG)).startswith((_PNG, _JPEG))
        content = Path(path or "").read_bytes() if known else b""
    parts = _png_parts(content) if content.startswith(_PNG) else _jpeg_parts(content) if content.startswith(_JPEG) else None
    if parts is None:
        raise error
    try:
        return _opened(io.BytesIO(b"".join(parts)), side)
    except Exception:
        raise error from None


def _png_parts(content: bytes) -> Iterator[bytes]:
    """What a PNG's picture is made of: its critical chunks, transparency and orientation."""
    yield _PNG
    position = len(_PNG)
    while position + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, position)
        end = position + 12 + length
        kind, sound = (
            content[position + 4 : position + 8],
            content[end - 4 : end] == struct.pack(">I", zlib.crc32(content[position + 4 : end - 4])),
        )
        if kind[:1].isupper() or (kind in (b"tRNS", b"eXIf") and sound):
            yield content[position:end]
        position = end


def _jpeg_parts(content: bytes) -> Iterator[bytes]:
    """What a JPEG's picture is made of: all but notes and applications' segments, of which EXIF's and Adobe's are kept."""
    yield _JPEG
    position = len(_JPEG)
    while content[position : position + 1] == b"\xff" and (marker := content[position + 1 : position + 2]) not in (b"\xda", b""):
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4])
        segment = content[position:end]
        kept = segment[4:10] == b"Exif\0\0" or (segment[4:9] == b"Adobe" and len(segment) >= 16)
        if kept or not (b"\xe0" <= marker <= b"\xef" or marker == b"\xfe"):
            yield segment
        position = end
    yield content[position:]


def largest_value(content: bytes | None, path: str | None) -> tuple[float, bool] | None:
    """The largest value in an image of more than 8 bits, and whether it is a grey one; None for others, and for what cannot be read."""
    try:
        with Image.open(io.BytesIO(content) if content is not None else path or "") as opened:
            grey = opened.mode in ("I", "F") or opened.mode.startswith("I;16")
            raw = str(opened.tile[0].args) if opened.tile else ""
            if "I;12" in raw or not (grey or ";16" in raw):
                return None
            values = np.nan_to_num(np.asarray(opened if grey else opened.convert("RGB")))
    except Exception:  # whoever decodes it says why
        return None
    return (float(values.max()), True) if grey else (257.0 * int(values.max()), False)


def image_to_pixels(image: Image.Image, data: Data) -> np.ndarray:
    """An image in memory as `decode_image` has it: uint8 (H, W, C). Errors: UserError for pixels of unknown range."""
    try:
        return _fit(_prepared(_upright(image, image), data), data)
    except ValueError as error:
        raise UserError(f"image: expected pixels of 8 or 16 bits, found {error}") from None


def _prepared(image: Image.Image, data: Data) -> Image.Image:
    return to_eight_bits(_composed(image, data.background), _MODES[data.channels], data.white)


def _composed(image: Image.Image, background: str) -> Image.Image:
    """An image over a background, if parts of it are transparent: what such pixels hide is arbitrary, and no part of the picture."""
    if not image.has_transparency_data or image.mode.startswith("I"):  # 16 bits have at most one transparent shade
        return image
    image = to_rgba(image)
    return Image.alpha_composite(Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255)), image)


def to_rgba(image: Image.Image) -> Image.Image:
    """An image of any mode of 8 bits in RGBA."""
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def to_eight_bits(image: Image.Image, mode: str, white: float | None = None) -> Image.Image:
    """Convert an image to 8 bits of grey or colour; of grey ones of more bits `white` becomes white, or 65,535 where they have 16.

    Errors: ValueError for pixels of unknown range.
    """
    if image.mode.startswith("I;16"):
        image = _scaled(np.asarray(image), _SIXTEEN_BITS if white is None else int(white))
    elif image.mode in ("I", "F"):
        low, high = image.getextrema()
        if white is None:
            raise ValueError(
                f"pixels of mode {image.mode} from {low:g} to {high:g}, none of which is known to be white (--data.white VALUE)"
            )
        image = Image.fromarray((np.clip(np.nan_to_num(np.asarray(image, np.float32)) / white, 0, 1) * 255 + 0.5).astype(np.uint8))
    return (image.convert("RGB") if image.mode == "LAB" else image).convert(mode)


def _scaled(values: np.ndarray, white: int) -> Image.Image:
    """Whole numbers from 0 to 65,535 in 8 bits."""
    return Image.fromarray(_eight_bits(white)[values])


@functools.cache
def _eight_bits(white: int) -> np.ndarray:
    """What each of 65,536 values is in 8 bits; those above `white` are white."""
    return np.minimum(np.arange(_SIXTEEN_BITS + 1) * 256 // (white + 1), 255).astype(np.uint8)


def _fit(image: Image.Image, data: Data, crop: Crop | None = None) -> np.ndarray:
    box = (crop or data.transform.crop()).box(image.size, data.height, data.width)
    image = image.resize((data.width, data.height), Image.Resampling.LANCZOS, box)
    return np.asarray(image, np.uint8).reshape(data.height, data.width, data.channels)


def fit_grey(image: np.ndarray, data: Data, crops: Sequence[Crop | None]) -> np.ndarray:
    """Crops of a grey image, uint8 (H, W), at the recipe's size and channels: uint8 (crops, data.height, data.width, data.channels)."""
    picture = Image.fromarray(image).convert(_MODES[data.channels])
    return np.stack([_fit(picture, data, crop) for crop in crops])
