"""Heat maps: bits of an image's codes as colours over the picture."""

from __future__ import annotations

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from torch import Tensor

from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.likelihood.bits import uniform_bits

# Weight of the colour in a heat map's pixel; the rest is the grey picture.
_OPACITY = 0.6


def heat_maps(bits: Tensor, layout: SequenceLayout) -> Tensor:
    """Sum bits per position (N, T) to bits per cell of the finest grid, (N, h, w), with the same total.

    The bits of a coarser level's code are divided evenly among the cells that it spans.
    """
    high, wide = (max(sides) for sides in zip(*layout.grids, strict=True))
    heat = bits.new_zeros(len(bits), high, wide)
    for level in layout.grids_of(bits):
        rows, columns = (torch.arange(fine) * coarse // fine for fine, coarse in zip((high, wide), level.shape[1:], strict=True))
        share = rows.bincount()[rows][:, None] * columns.bincount()[columns]
        heat += level[:, rows][:, :, columns] / share
    return heat


def colour_scale(layout: SequenceLayout) -> ScalarMappable:
    """Return the colour scale of bits per cell of the finest grid, up to twice the bits under the uniform prior, which few exceed."""
    uniform = [torch.full((1, length), cost) for length, cost in zip(layout.lengths, uniform_bits(layout.num_codes), strict=True)]
    return ScalarMappable(Normalize(0, 2 * float(heat_maps(torch.cat(uniform, 1), layout).max())), "inferno")


def overlaid(picture: Tensor, heat: Tensor, colours: ScalarMappable) -> Tensor:
    """Blend a grey picture, uint8 (H, W, C), with its heat (h, w) in colours: uint8 (H, W, 3)."""
    rows, columns = (torch.arange(side) * cells // side for side, cells in zip(picture.shape[:2], heat.shape, strict=True))
    colour = torch.from_numpy(colours.to_rgba(heat.numpy())[..., :3])[rows][:, columns]
    grey = picture.double().mean(-1, keepdim=True)
    return (_OPACITY * 255 * colour + (1 - _OPACITY) * grey).round().to(torch.uint8)
