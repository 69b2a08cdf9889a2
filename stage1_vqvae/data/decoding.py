"""From an encoded image to pixels of the recipe's size and channels."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from configs.data import Data
from configs.errors import UserError
from stage1_vqvae.data.crops import CENTRE, Crop
from stage1_vqvae.data.formats import ending_of, package_for, register_for

_MODES = {1: "L", 3: "RGB"}
# What a codec that can decode to a smaller size leaves: so many times the pixels needed along each side, for the filter to choose from;
# twice in the crops of an image enlarged by a tenth. Whatever crops are asked for, so that each looks the same beside any others.
_LEFT_TO_THE_FILTER = 2.2


class UnreadableImage(UserError):
    """An image whose bytes were read, and are none, whoever asks."""


def decode_image(content: bytes | None, path: str | None, data: Data, what: str = "") -> np.ndarray:
    """An encoded image (or the file at `path`) as uint8 (H, W, C): turned upright, composed over `data.background` where it is
    transparent, converted to `data.channels`, scaled to cover height x width and cropped at the centre.

    Errors: UserError with its path, or `what` content it is, if it cannot be read; UnreadableImage if that is what it holds.
    """
    return decode_crops(content, path, data, [CENTRE], what)[0]


def decode_crops(content: bytes | None, path: str | None, data: Data, crops: Sequence[Crop], what: str = "") -> np.ndarray:
    """As `decode_image`, several crops of one image: uint8 (crops, H, W, C)."""
    if content is None and path is None:
        raise UnreadableImage(f"{what}: expected an image, found none")
    register_for(path)
    try:
        with Image.open(io.BytesIO(content) if content is not None else path or "") as opened:
            # Scaled by the codec where it can, which JPEG does as it decodes. Its sides may yet be exchanged, when it is turned upright.
            side = math.ceil(_LEFT_TO_THE_FILTER * max(data.height, data.width) / math.sqrt(data.crop_area))
            opened.draft(None, (side, side))
            image = _prepared(opened, data)
    except Exception as error:  # decoders of damaged files raise anything
        passing = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
        kind = UserError if passing else UnreadableImage
        where = path if content is None else what + (f" ({path})" if path else "")
        package = None if path is None else package_for(ending_of(path))
        reader = f"Pillow cannot read without {package}" if package else "Pillow cannot identify"
        found = f"one that {reader}" if isinstance(error, UnidentifiedImageError) else error
        raise kind(f"{where}: expected a readable image, found: {found}") from None
    return np.stack([_fit(image, data, crop) for crop in crops])


def pixels_of(image: Image.Image, data: Data) -> np.ndarray:
    """An image in memory as `decode_image` has it: uint8 (H, W, C). Errors: UserError for pixels of unknown range."""
    try:
        return _fit(_prepared(image, data), data, CENTRE)
    except ValueError as error:
        raise UserError(f"image: expected pixels of 8 or 16 bits, found {error}") from None


def _prepared(image: Image.Image, data: Data) -> Image.Image:
    return _converted(_composed(ImageOps.exif_transpose(image), data.background), _MODES[data.channels])


def _composed(image: Image.Image, background: str) -> Image.Image:
    """An image over a background, if parts of it are transparent: what such pixels hide is arbitrary, and no part of the picture."""
    if not image.has_transparency_data or image.mode.startswith("I"):  # 16 bits have at most one transparent shade
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255)), image)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to 8 bits of grey or colour. Errors: ValueError for pixels of unknown range."""
    if image.mode.startswith("I;16"):
        # Pillow would clip 16 bits at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, whose range is unknown; store 8 or 16 bits")
    return image.convert(mode)


def _fit(image: Image.Image, data: Data, crop: Crop) -> np.ndarray:
    image = image.resize((data.width, data.height), Image.Resampling.LANCZOS, crop.box(image.size, data.height, data.width))
    return np.asarray(image, np.uint8).reshape(data.height, data.width, data.channels)


def fit_grey(image: np.ndarray, data: Data, crops: Sequence[Crop]) -> np.ndarray:
    """Crops of a grey image, uint8 (H, W), at the recipe's size and channels: uint8 (crops, data.height, data.width, data.channels)."""
    picture = Image.fromarray(image).convert(_MODES[data.channels])
    return np.stack([_fit(picture, data, crop) for crop in crops])
