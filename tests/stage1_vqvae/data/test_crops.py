"""Crop boxes, and JPEG decoding at a reduced size."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from PIL import Image, ImageOps

from configs.data import Data
from stage1_vqvae.data.crops import Crop
from stage1_vqvae.data.decoding import decode_crops, decode_image
from stage1_vqvae.data.transforms.random_crop import RandomCropPart
from stage1_vqvae.data.variants import VARIANTS

FIVE_CROPS = VARIANTS["five_crops"].crops


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def coordinates(width: int, height: int) -> Image.Image:
    """A picture whose red is the x of a pixel's centre and whose green is its y, in 255ths of the sides."""
    across, down = ((np.arange(side) + 0.5) / side * 255 for side in (width, height))
    pixels = np.stack(np.broadcast_arrays(across[None], down[:, None], 0), -1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def visible_box(pixels: np.ndarray) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the visible box of `coordinates`, as shares of its sides."""
    height, width = pixels.shape[:2]
    across, down = pixels[..., 0].mean(0) / 255, pixels[..., 1].mean(1) / 255
    half_across, half_down = (across[-1] - across[0]) / (width - 1) / 2, (down[-1] - down[0]) / (height - 1) / 2
    return across[0] - half_across, down[0] - half_down, across[-1] + half_across, down[-1] + half_down


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (64, 64), (90, 60)])
@pytest.mark.parametrize("crop", [Crop(), Crop(0.5, 0.0, 1.0), Crop(0.25, 1.0, 0.3), *FIVE_CROPS[1:]])
def test_decoded_crop_covers_its_box(crop: Crop, size: tuple[int, int]) -> None:
    data = Data(height=20, width=30)
    (pixels,) = decode_crops(encoded(coordinates(*size)), "", data, [crop])
    largest = min(size[0] / 30, size[1] / 20)
    width, height = 30 * largest * crop.area**0.5, 20 * largest * crop.area**0.5
    left, top = (size[0] - width) * crop.across, (size[1] - height) * crop.down
    expected = np.array([left / size[0], top / size[1], (left + width) / size[0], (top + height) / size[1]])
    assert np.abs(np.array(visible_box(pixels.astype(float))) - expected).max() < 0.02


def test_the_center_crop_equals_pillows_fit() -> None:
    picture = Image.effect_noise((97, 61), 80).convert("RGB")
    fitted = ImageOps.fit(picture, (24, 16), Image.Resampling.LANCZOS)
    pixels = decode_image(encoded(picture), "", Data(height=16, width=24)).astype(int)
    assert np.abs(pixels - np.asarray(fitted).astype(int)).max() <= 1


def test_five_crops_are_the_centre_and_the_enlarged_corners() -> None:
    smooth = Image.effect_noise((6, 6), 90).convert("RGB").resize((40, 40), Image.Resampling.BICUBIC)
    crops = decode_crops(encoded(smooth), "", Data(height=20, width=20), FIVE_CROPS).astype(int)
    corners = reference.five_crop(smooth.resize((22, 22), Image.Resampling.LANCZOS), [20, 20])[:4]
    assert np.abs(crops[0] - np.asarray(smooth.resize((20, 20), Image.Resampling.LANCZOS)).astype(int)).max() <= 1
    for one, other in zip(crops[1:], corners, strict=True):
        assert np.abs(one - np.asarray(other).astype(int)).mean() < 2


def test_random_crops_cover_their_range_and_stay_inside() -> None:
    draws = torch.rand((2000, 3), generator=torch.Generator().manual_seed(0))
    crops = [RandomCropPart(min_area=0.3).crop(draw) for draw in draws.tolist()]
    areas = np.array([crop.area for crop in crops])
    assert areas.min() >= 0.3
    assert areas.max() <= 1
    assert abs(areas.mean() - 0.65) < 0.02
    for crop in crops:
        left, top, right, bottom = crop.box((50, 40), 8, 12)
        assert 0 <= left < right <= 50
        assert 0 <= top < bottom <= 40
        assert (right - left) / (bottom - top) == pytest.approx(1.5)
    assert {RandomCropPart().crop(draw).area for draw in draws.tolist()} == {1.0}
    assert RandomCropPart(min_area=0.3).crop() == Crop()


@pytest.mark.parametrize("side", [64, 256, 300, 1024])
def test_the_first_crop_does_not_depend_on_the_others(side: int) -> None:
    """At every reduction of the JPEG decoder."""
    picture = Image.effect_noise((side // 4, side // 4), 60).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    content, data = encoded(picture, "JPEG", quality=90), Data(height=64, width=64)
    assert np.array_equal(decode_crops(content, None, data, FIVE_CROPS)[0], decode_image(content, None, data))


@pytest.mark.parametrize("rotated", [False, True])
def test_reduced_jpeg_decoding_matches_full_decoding(rotated: bool) -> None:
    """Same box, and equal up to invisible differences."""
    noise = Image.effect_noise((40, 30), 60).convert("RGB").resize((1600, 1200), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if rotated:
        exif[0x0112] = 6
    content, data = encoded(noise, "JPEG", quality=90, exif=exif), Data(height=48, width=64)
    crops = [Crop(), Crop(0.5, 0.9, 0.2)]
    decoded = decode_crops(content, "", data, crops).astype(float)
    full_size = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert full_size.size == ((1200, 1600) if rotated else (1600, 1200))
    for one, crop in zip(decoded, crops, strict=True):
        expected = np.asarray(full_size.resize((64, 48), Image.Resampling.LANCZOS, crop.box(full_size.size, 48, 64))).astype(float)
        assert np.abs(one - expected).mean() < 1
        assert np.abs(one - expected).max() < 12
