"""From an encoded image to pixels of the recipe's size and channels."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageColor, ImageOps

from configs.errors import UserError
from configs.schema import Data

_MODES = {1: "L", 3: "RGB"}


class UnreadableImage(UserError):
    """An image whose bytes were read, and are none, whoever asks."""


def decode_image(content: bytes | None, path: str, data: Data) -> np.ndarray:
    """An encoded image (or the file at `path`) as uint8 (H, W, C): turned upright, composed over `data.background` where it is
    transparent, converted to `data.channels`, scaled to cover height x width and cropped at the centre.

    Errors: UserError with the path if it cannot be read; UnreadableImage if that is what it holds.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as opened:
            image = _converted(_composed(ImageOps.exif_transpose(opened), data.background), _MODES[data.channels])
    except Exception as error:  # decoders of damaged files raise anything
        passing = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
        kind = UserError if passing else UnreadableImage
        raise kind(f"{path}: expected a readable image, found: {error}") from None
    return _fit(image, data)


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


def _fit(image: Image.Image, data: Data) -> np.ndarray:
    if image.size != (data.width, data.height):
        image = ImageOps.fit(image, (data.width, data.height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.uint8).reshape(data.height, data.width, data.channels)


def fit_grey(pixels: np.ndarray, data: Data) -> np.ndarray:
    """Grey images, uint8 (N, H, W), at the recipe's size and channels: uint8 (N, data.height, data.width, data.channels)."""
    if pixels.shape[1:] == (data.height, data.width) and data.channels == 1:
        return pixels[..., None].copy()
    return np.stack([_fit(Image.fromarray(image).convert(_MODES[data.channels]), data) for image in pixels])
