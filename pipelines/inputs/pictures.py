"""Images and masks as Python objects: conversion to uint8 tensors and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from configs.data import Data
from configs.errors import UserError, say
from stage1_vqvae.data.decoding import decode_image, image_to_pixels, read_image, to_eight_bits, to_rgba
from stage1_vqvae.pictures import to_pil

Picture = Image.Image | np.ndarray | Tensor | str | Path
"""An image: a Pillow image, uint8 (H, W, C), or a file."""
Pictures = Picture | Sequence[Picture]
"""One image, several, or uint8 (N, H, W, C)."""
Mask = Image.Image | np.ndarray | Tensor | Path
"""Mask of the pixels (H, W) to keep: true, or white and opaque."""
Output = Literal["pil", "tensor"]
# Smallest share of nearly black or white pixels in a mask; the others may be blurred edges.
_BLACK_AND_WHITE = 0.8


def pixels_in(images: Pictures, data: Data) -> Tensor:
    """Convert images to uint8 (N, H, W, C) of a recipe's size, scaled, cropped and converted as training images are.

    Errors: UserError for anything that is no image.
    """
    if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4):
        images = [images]
    if not len(images):
        raise UserError("images: expected at least one, found none")
    return torch.stack([_pixels_of(image, data) for image in images])


def _pixels_of(image: Picture, data: Data) -> Tensor:
    if isinstance(image, str | Path):
        return torch.from_numpy(decode_image(None, str(Path(image).expanduser()), data))
    if isinstance(image, Image.Image):
        return torch.from_numpy(image_to_pixels(image, data))
    array = (
        image.cpu() if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    )  # a copy, since strides may be negative and the array read-only
    array = array[..., None] if array.dim() == 2 else array
    if array.dtype != torch.uint8 or array.dim() != 3 or array.shape[2] not in (1, 3):
        raise UserError(f"images: expected uint8 (H, W, C) of 1 or 3 channels, found {array.dtype} {tuple(array.shape)}")
    same = tuple(array.shape) == (data.height, data.width, data.channels)
    return array if same else torch.from_numpy(image_to_pixels(to_pil(array), data))


def mask_in(mask: Mask, data: Data, name: str = "mask") -> Tensor:
    """Convert a mask to booleans (H, W). `name`: name of the mask in messages.

    Errors: UserError for a mask of another size than the recipe's, or a file that cannot be read.
    """
    if isinstance(mask, Path):
        try:
            mask, name = read_image(None, str(mask)), f"{name} {mask}"
        except UserError as error:
            raise UserError(f"{name} {error}") from None
    if isinstance(mask, Image.Image):
        mask = picture_mask(mask, name)
    pixels = mask.cpu() if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))
    if tuple(pixels.shape) != (data.height, data.width):
        raise UserError(f"{name}: expected {data.width} x {data.height} pixels, found {' x '.join(map(str, reversed(pixels.shape)))}")
    if pixels.dtype == torch.bool:
        return pixels
    if pixels.dtype != torch.uint8 or (pixels.any() and int(pixels.max()) == 1):
        raise UserError(
            f"{name}: expected true and false, or uint8 from black to white (0 to 255), found {pixels.dtype} up to {pixels.max()}"
        )
    return pixels >= 128


def picture_mask(mask: Image.Image, name: str) -> Tensor:
    """Compute the mask (H, W) of a picture: its white opaque pixels; in a coloured picture with transparent parts, all opaque ones.

    Args:
        mask: the picture, in any mode.
        name: name of the mask in messages.
    Errors: UserError for black on a transparent background, which is ambiguous, and for pixels of unknown range.
    """
    try:
        grey = torch.from_numpy(np.array(to_eight_bits(mask, "L")))
    except ValueError:
        raise UserError(f"{name}: expected a black and white picture of 8 or 16 bits, found one of mode {mask.mode}") from None
    if not mask.has_transparency_data or mask.mode.startswith("I"):
        return grey >= 128
    opaque = torch.from_numpy(np.array(to_rgba(mask).getchannel("A"))) >= 128
    if bool(opaque.all()):
        return grey >= 128
    shades = grey[opaque]
    if len(shades) and float(((shades < 64) | (shades >= 192)).float().mean()) < _BLACK_AND_WHITE:
        say(f"{name}: a picture with transparent parts: those are drawn again, the others kept")
        return opaque
    if len(shades) and not bool((shades >= 128).any()):
        expected = "expected white where images are kept, and black or transparent pixels where they are drawn again"
        raise UserError(f"{name}: {expected}; found only black and transparent parts")
    return opaque & (grey >= 128)


@overload
def pictures_out(pixels: Tensor, output: Literal["pil"]) -> list[Image.Image]: ...
@overload
def pictures_out(pixels: Tensor, output: Literal["tensor"]) -> Tensor: ...
@overload
def pictures_out(pixels: Tensor, output: Output) -> list[Image.Image] | Tensor: ...
def pictures_out(pixels: Tensor, output: Output) -> list[Image.Image] | Tensor:
    """Return uint8 (N, H, W, C) unchanged or as Pillow images. Errors: UserError for another output."""
    if output not in ("pil", "tensor"):
        raise UserError(f"output: expected pil or tensor, found {output}")
    return pixels if output == "tensor" else [to_pil(picture) for picture in pixels]
