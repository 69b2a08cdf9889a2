"""Grids of pictures."""

from __future__ import annotations

import pytest
import torch
from torchvision.utils import make_grid

from stage1_vqvae.pictures import image_grid, reconstruction_grid


@pytest.mark.parametrize(("count", "columns", "channels"), [(7, 3, 3), (6, 3, 1), (2, 5, 3)])
def test_image_grid_equals_torchvisions(count: int, columns: int, channels: int) -> None:
    pictures = torch.randint(256, (count, 4, 6, channels), dtype=torch.uint8)
    expected = make_grid(pictures.movedim(-1, 1), nrow=columns, padding=2, pad_value=255)
    assert torch.equal(image_grid(pictures, columns), expected.movedim(0, -1)[..., :channels])


@pytest.mark.parametrize(("count", "columns"), [(5, 3), (6, 3), (2, 16), (1, 1)])
def test_each_original_is_above_its_reconstruction(count: int, columns: int) -> None:
    originals = torch.arange(1, count + 1, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 4, 6, 1)
    grid = reconstruction_grid(originals, originals + 100, columns)[..., 0]
    shown = min(columns, count)
    centres = grid[4::6, 5::8]  # pictures of 4 x 6, two white pixels between them
    assert centres.shape == (2 * -(-count // shown), shown)
    for number in range(count):
        row, column = 2 * (number // shown), number % shown
        assert centres[row, column] == number + 1
        assert centres[row + 1, column] == number + 101
