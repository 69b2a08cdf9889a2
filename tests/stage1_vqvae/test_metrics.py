"""Metrics on known cases and against independent implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from stage1_vqvae.metrics import index_bits, perplexity, psnr, psnr_per_image, raw_bits, squared_errors, ssim_per_image, usage


def test_errors_and_psnr_scale_8_bit_pixels_to_unit_range() -> None:
    originals = torch.randint(0, 256, (5, 8, 12, 3), dtype=torch.uint8)
    pictures = torch.randint(0, 256, (5, 8, 12, 3), dtype=torch.uint8)
    mse = torch.stack([((a.double() / 255 - b.double() / 255) ** 2).mean() for a, b in zip(pictures, originals, strict=True)])
    assert torch.allclose(squared_errors(pictures, originals), mse)
    assert psnr(mse.mean().item()) == pytest.approx(10 * math.log10(1 / mse.mean().item()))
    black, white = torch.zeros(1, 8, 8, 1, dtype=torch.uint8), torch.full((1, 8, 8, 1), 255, dtype=torch.uint8)
    assert squared_errors(black, white).item() == 1
    assert psnr(1.0) == 0
    assert psnr(0.0) == 100


def test_usage_and_perplexity_of_known_counts() -> None:
    assert usage(torch.tensor([3, 0, 1, 0])) == 0.5
    assert perplexity(torch.tensor([5, 5, 5, 5])) == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0, 0])) == pytest.approx(1)
    assert perplexity(torch.tensor([1, 3])) == pytest.approx(2 ** (0.25 * 2 + 0.75 * math.log2(4 / 3)))
    assert perplexity(torch.zeros(4)) == pytest.approx(1)


def test_bits_of_known_grids() -> None:
    assert raw_bits(32, 32, 3) == 24_576
    assert index_bits([(4, 4)], [1024]) == 160
    assert raw_bits(32, 32, 3) / index_bits([(4, 4)], [1024]) == pytest.approx(153.6)
    assert index_bits([(2, 3), (4, 6)], [8, 16]) == 6 * 3 + 24 * 4


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_per_image_equal_scikit_image(channels: int) -> None:
    draws = torch.Generator().manual_seed(0)
    originals = torch.randint(256, (4, 14, 23, channels), dtype=torch.uint8, generator=draws)
    strength = torch.tensor([0.0, 0.1, 0.5, 1.0]).view(4, 1, 1, 1)
    pictures = (originals * (1 - strength) + torch.randint(256, originals.shape, generator=draws) * strength).to(torch.uint8)
    psnrs, ssims = psnr_per_image(squared_errors(pictures, originals)), ssim_per_image(pictures, originals)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": -1, "data_range": 255}
    for picture, original, psnr_value, ssim_value in zip(pictures.numpy(), originals.numpy(), psnrs, ssims, strict=True):
        if not np.array_equal(picture, original):
            assert psnr_value == pytest.approx(peak_signal_noise_ratio(original, picture), rel=1e-4)
        assert ssim_value == pytest.approx(structural_similarity(original, picture, **settings), rel=1e-4)
    assert psnrs[0] == 100
    assert ssims[0] == pytest.approx(1)


def test_ssim_is_nan_below_its_window_size() -> None:
    assert ssim_per_image(torch.zeros(2, 10, 30, 1, dtype=torch.uint8), torch.zeros(2, 10, 30, 1, dtype=torch.uint8)).isnan().all()
