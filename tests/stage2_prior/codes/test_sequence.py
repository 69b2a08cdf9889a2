"""Grids <-> sequences."""

from __future__ import annotations

import torch

from stage2_prior.codes.sequence import SequenceLayout

TWO_LEVELS = SequenceLayout([(2, 3), (4, 5)], [7, 11])


def test_tokens_map_back_to_grids() -> None:
    codes = tuple(torch.randint(k, (4, *grid)) for grid, k in zip(TWO_LEVELS.grids, TWO_LEVELS.num_codes, strict=True))
    tokens = TWO_LEVELS.to_tokens(codes)
    assert tokens.shape == (4, TWO_LEVELS.length) == (4, 26)
    grids = TWO_LEVELS.grids_of(tokens)
    assert all(torch.equal(grid, code + offset) for grid, code, offset in zip(grids, codes, (0, 7), strict=True))


def test_levels_share_no_token() -> None:
    lowest = tuple(torch.zeros(1, *grid, dtype=torch.int64) for grid in TWO_LEVELS.grids)
    highest = tuple(low + k - 1 for low, k in zip(lowest, TWO_LEVELS.num_codes, strict=True))
    low, high = TWO_LEVELS.to_tokens(lowest)[0], TWO_LEVELS.to_tokens(highest)[0]
    assert int(high[:6].max()) < int(low[6:].min())
    assert int(high.max()) == TWO_LEVELS.vocabulary - 1


def test_coordinates_name_the_level_row_and_column_of_each_token() -> None:
    """Raster order, rows first, in a non-square grid."""
    grid = torch.arange(6).view(1, 2, 3)
    tokens = SequenceLayout([(2, 3)], [6]).to_tokens((grid,))[0]
    for token, (level, row, column) in zip(tokens, SequenceLayout([(2, 3)], [6]).coordinates().tolist(), strict=True):
        assert level == 0
        assert int(grid[0, row, column]) == int(token)
    assert TWO_LEVELS.coordinates()[:, 0].tolist() == [0] * 6 + [1] * 20
