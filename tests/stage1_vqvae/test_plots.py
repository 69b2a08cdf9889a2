"""Grids: every picture where it belongs."""

from __future__ import annotations

import pytest
import torch

from stage1_vqvae.plots import reconstruction_grid


@pytest.mark.parametrize(("count", "columns"), [(5, 3), (6, 3), (2, 16), (1, 1)])
def test_each_original_is_over_its_reconstruction(count: int, columns: int) -> None:
    originals = torch.arange(1, count + 1, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 4, 6, 1)
    grid = reconstruction_grid(originals, originals + 100, columns)[..., 0]
    shown = min(columns, count)
    centres = grid[4::6, 5::8]  # pictures of 4 x 6, two white pixels between them
    assert centres.shape == (2 * -(-count // shown), shown)
    for number in range(count):
        row, column = 2 * (number // shown), number % shown
        assert centres[row, column] == number + 1
        assert centres[row + 1, column] == number + 101
