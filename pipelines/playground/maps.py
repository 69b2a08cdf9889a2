"""Clickable pictures: an image's codes in their cells, and the codebook as patches."""

from __future__ import annotations

import math

from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipelines.scoring.heat_maps import overlaid
from stage1_vqvae.pictures import image_grid, to_pil

# Map of codes, in pixels: minimum of its longer side, and the smallest cell that shows its code.
_SIDE, _WRITTEN = 448, 26
_LINE, _CHOSEN = (90, 90, 90), (0, 220, 130)
# Sheet of patches: patches per row, and the smallest size of each in pixels.
_COLUMNS, _PATCH = 16, 28
_GAP = 2  # of `image_grid`


def enlarged(picture: Tensor, side: int) -> Image.Image:
    """Enlarge a picture, uint8 (H, W, C), by a whole factor until its longer side has at least `side` pixels."""
    height, width = picture.shape[:2]
    scale = -(-side // max(height, width))
    return to_pil(picture.contiguous()).resize((width * scale, height * scale), Image.Resampling.NEAREST)


def code_map(picture: Tensor, codes: Tensor, bits: Tensor | None, num_codes: int, chosen: tuple[int, int] | None) -> Image.Image:
    """Draw a picture, uint8 (H, W, C), enlarged, with the codes (h, w) of a level in its cells and their bits (h, w) as colours.

    `chosen`: row and column of the marked cell.
    """
    if bits is None:
        shown = picture.expand(-1, -1, 3)
    else:
        # Up to twice the bits of a code under the uniform prior, which few exceed.
        shown = overlaid(picture, bits, ScalarMappable(Normalize(0, 2 * math.log2(num_codes)), "inferno"))
    image = enlarged(shown, _SIDE)
    high, wide = image.height / codes.shape[0], image.width / codes.shape[1]
    drawing, font = ImageDraw.Draw(image), ImageFont.load_default(min(high, wide) * 0.34)

    def box(row: int, column: int) -> tuple[float, float, float, float]:
        return column * wide, row * high, (column + 1) * wide - 1, (row + 1) * high - 1

    for row, line in enumerate(codes.tolist()):
        for column, code in enumerate(line):
            drawing.rectangle(box(row, column), outline=_LINE)
            if min(high, wide) >= _WRITTEN:
                centre = ((column + 0.5) * wide, (row + 0.5) * high)
                drawing.text(centre, str(code), "white", font, "mm", stroke_width=1, stroke_fill="black")
    if chosen is not None:
        drawing.rectangle(box(*chosen), outline=_CHOSEN, width=3)
    return image


def code_at(x: float, y: float, image_shape: tuple[int, int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Return row and column of the code at a pixel of a `code_map`."""
    height, width, _ = image_shape
    scale = -(-_SIDE // max(height, width))
    row, column = int(y * grid[0] / (height * scale)), int(x * grid[1] / (width * scale))
    return min(max(row, 0), grid[0] - 1), min(max(column, 0), grid[1] - 1)


def patch_sheet(patches: Tensor) -> Image.Image:
    """Arrange patches, uint8 (N, h, w, C), in rows of sixteen."""
    sheet, scale = image_grid(patches, _COLUMNS), _patch_scale(*patches.shape[1:3])
    return to_pil(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST)


def patch_at(x: float, y: float, count: int, image_shape: tuple[int, int, int], grid: tuple[int, int]) -> int:
    """Return the number of the patch, one cell of the grid, at a pixel of a `patch_sheet` of `count` patches."""
    sides = image_shape[0] // grid[0], image_shape[1] // grid[1]
    scale = _patch_scale(*sides)
    row, column = (int(max(0, at / scale - _GAP / 2)) // (side + _GAP) for at, side in zip((y, x), sides, strict=True))
    return min(row * _COLUMNS + min(column, _COLUMNS - 1), count - 1)


def _patch_scale(height: int, width: int) -> int:
    return -(-_PATCH // max(height, width))
