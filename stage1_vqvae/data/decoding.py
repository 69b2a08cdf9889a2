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
# A codec that can decode to a smaller size keeps at least so many times the pixels needed along each side, for the resampling filter; that
# is twice as many in the crops of an image enlarged by a tenth. It does not depend on the crops, so that each looks the same beside others.
_DRAFT_FACTOR = 2.2
_TWELVE_BITS, _SIXTEEN_BITS = 4095, 65535
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
# TIFF's tag for the meaning of values, and its value for files in which 0 is white.
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpose that turns an image upright, per EXIF orientation."""


warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata that it cannot parse, and about large images


class UnreadableImage(UserError):
    """Bytes that were read but are not an image; trying again would not help."""


def decode_image(content: bytes | None, path: str | None, data: Data, name: str = "") -> np.ndarray:
    """Decode an image (`content`, or the file at `path`) to uint8 (H, W, C): turned upright, composed over `data.background` where it is
    transparent, converted to `data.channels`, cropped as `data.transform` says and scaled to height x width.

    Errors: UserError with its path, or its `name`, if it cannot be read; UnreadableImage if its content is at fault.
    """
    return decode_crops(content, path, data, [None], name)[0]


def decode_crops(content: bytes | None, path: str | None, data: Data, crops: Sequence[Crop | None], name: str = "") -> np.ndarray:
    """Decode several crops of one image (None: the transform's) as `decode_image` does: uint8 (crops, H, W, C)."""
    # Turning it upright may exchange its sides.
    side = math.ceil(_DRAFT_FACTOR * max(data.height, data.width) / math.sqrt(data.transform.smallest_area))
    image = read_image(content, path, name, side)
    try:
        image = _convert(image, data)
    except ValueError as error:
        raise UnreadableImage(f"{_where(content, path, name)}: expected a readable image, found: {error}") from None
    return np.stack([_fit(image, data, crop) for crop in crops])


def read_image(content: bytes | None, path: str | None, name: str = "", side: int | None = None) -> Image.Image:
    """Decode an image (`content`, or the file at `path`) in the mode that it is stored in, turned upright.

    Of its metadata only the orientation is read; broken metadata is no error.

    Args:
        content: the encoded image.
        path: path or name of its file.
        name: name of the image in messages.
        side: JPEG's decoder may scale it down to no less than so many pixels per side.
    Errors: UserError, as `decode_image`.
    """
    if content is None and path is None:
        raise UnreadableImage(f"{name}: expected an image, found none")
    register_for(path)
    try:
        try:
            return _open(io.BytesIO(content) if content is not None else path or "", side)
        except Exception as error:  # Pillow raises anything for what it cannot parse
            if isinstance(error, OSError | MemoryError | Image.DecompressionBombError) and not isinstance(error, UnidentifiedImageError):
                raise
            return _without_metadata(content, path, side, error)
    except Exception as error:
        temporary = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
        kind = UserError if temporary else UnreadableImage
        package = None if path is None else package_for(ending_of(path))
        reader = f"Pillow cannot read without {package}" if package else "Pillow cannot identify"
        reason = f"one that {reader}" if isinstance(error, UnidentifiedImageError) else error
        advice = "; scale it down first" if isinstance(error, Image.DecompressionBombError) else ""
        raise kind(f"{_where(content, path, name)}: expected a readable image, found: {reason}{advice}") from None


def _where(content: bytes | None, path: str | None, name: str) -> str:
    return str(path) if content is None else name + (f" ({path})" if path else "")


def _open(source: io.BytesIO | str, side: int | None) -> Image.Image:
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
        return _turn_upright(image, opened)


def _turn_upright(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Turn an image as the EXIF orientation of the `opened` file says, if it can be read."""
    try:
        orientation = opened.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises anything for what it cannot parse
        orientation = None
    turn = _TRANSPOSES.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _without_metadata(content: bytes | None, path: str | None, side: int | None, error: Exception) -> Image.Image:
    """Decode a PNG or JPEG without its metadata, which cannot be read. Errors: `error`, if its pixels cannot be read either."""
    if content is None:
        with open(path or "", "rb") as file:
            known = file.read(len(_PNG)).startswith((_PNG, _JPEG))
        content = Path(path or "").read_bytes() if known else b""
    parts = _png_parts(content) if content.startswith(_PNG) else _jpeg_parts(content) if content.startswith(_JPEG) else None
    if parts is None:
        raise error
    try:
        return _open(io.BytesIO(b"".join(parts)), side)
    except Exception:
        raise error from None


def _png_parts(content: bytes) -> Iterator[bytes]:
    """Yield the parts of a PNG that decide its pixels: critical chunks, transparency and orientation."""
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
    """Yield the parts of a JPEG that decide its pixels: all but comments and application segments other than EXIF's and Adobe's."""
    yield _JPEG
    position = len(_JPEG)
    while content[position : position + 1] == b"\xff" and (marker := content[position + 1 : position + 2]) not in (b"\xda", b""):
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4])
        segment = content[position:end]
        needed = segment[4:10] == b"Exif\0\0" or (segment[4:9] == b"Adobe" and len(segment) >= 16)
        if needed or not (b"\xe0" <= marker <= b"\xef" or marker == b"\xfe"):
            yield segment
        position = end
    yield content[position:]


def largest_value(content: bytes | None, path: str | None) -> tuple[float, bool] | None:
    """Return the largest value in an image of more than 8 bits and whether it is grey; None for other images and unreadable ones."""
    try:
        with Image.open(io.BytesIO(content) if content is not None else path or "") as opened:
            grey = opened.mode in ("I", "F") or opened.mode.startswith("I;16")
            raw = str(opened.tile[0].args) if opened.tile else ""
            if "I;12" in raw or not (grey or ";16" in raw):
                return None
            values = np.nan_to_num(np.asarray(opened if grey else opened.convert("RGB")))
    except Exception:  # decoding it will say why
        return None
    return (float(values.max()), True) if grey else (257.0 * int(values.max()), False)


def image_to_pixels(image: Image.Image, data: Data) -> np.ndarray:
    """Convert an image in memory as `decode_image` does: uint8 (H, W, C). Errors: UserError for pixels of unknown range."""
    try:
        return _fit(_convert(_turn_upright(image, image), data), data)
    except ValueError as error:
        raise UserError(f"image: expected pixels of 8 or 16 bits, found {error}") from None


def _convert(image: Image.Image, data: Data) -> Image.Image:
    return to_eight_bits(_compose(image, data.background), _MODES[data.channels], data.white)


def _compose(image: Image.Image, background: str) -> Image.Image:
    """Compose a transparent image over a background: the colours of transparent pixels are arbitrary."""
    if not image.has_transparency_data or image.mode.startswith("I"):  # 16 bits have at most one transparent shade
        return image
    image = to_rgba(image)
    return Image.alpha_composite(Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255)), image)


def to_rgba(image: Image.Image) -> Image.Image:
    """Convert an image of any 8-bit mode to RGBA."""
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def to_eight_bits(image: Image.Image, mode: str, white: float | None = None) -> Image.Image:
    """Convert an image to 8 bits of grey or colour.

    Grey images of more bits are scaled so that `white` (None: 65,535 in 16 bits) becomes 255.

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
    """Scale values from 0 to 65,535 to 8 bits."""
    return Image.fromarray(_eight_bits(white)[values])


@functools.cache
def _eight_bits(white: int) -> np.ndarray:
    """Return the table from 65,536 values to 8 bits; values above `white` are white."""
    return np.minimum(np.arange(_SIXTEEN_BITS + 1) * 256 // (white + 1), 255).astype(np.uint8)


def _fit(image: Image.Image, data: Data, crop: Crop | None = None) -> np.ndarray:
    box = (crop or data.transform.crop()).box(image.size, data.height, data.width)
    image = image.resize((data.width, data.height), Image.Resampling.LANCZOS, box)
    return np.asarray(image, np.uint8).reshape(data.height, data.width, data.channels)


def fit_grey(image: np.ndarray, data: Data, crops: Sequence[Crop | None]) -> np.ndarray:
    """Scale crops of a grey image, uint8 (H, W), to the recipe's size: uint8 (crops, data.height, data.width, data.channels)."""
    converted = Image.fromarray(image).convert(_MODES[data.channels])
    return np.stack([_fit(converted, data, crop) for crop in crops])
