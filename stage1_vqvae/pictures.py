"""PNG files and grids of images. Without matplotlib, whose import takes a fifth of a short command's time."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from configs.run_dir import write_bytes

# White pixels between images.
_GAP = 2


def save_png(path: Path, pixels: Tensor, scale: int = 1) -> None:
    """Write uint8 (H, W, C) as a PNG, each pixel `scale` wide."""
    write_bytes(path, png(pixels, scale), durable=False)


def to_pil(pixels: Tensor) -> Image.Image:
    """Convert uint8 (H, W, C) to a Pillow image, grey for one channel."""
    array = pixels.numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def png(pixels: Tensor, scale: int = 1, optimize: bool = False) -> bytes:
    """Encode uint8 (H, W, C) as a PNG, each pixel `scale` wide."""
    image = to_pil(pixels)
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=optimize)
    return buffer.getvalue()


def image_grid(pictures: Tensor, columns: int) -> Tensor:
    """Arrange images, uint8 (N, H, W, C), in a grid with white gaps, `columns` per row: uint8 (H', W', C)."""
    # torchvision has this too, but its import would add two seconds to every command.
    columns = min(columns, len(pictures))
    cells = F.pad(pictures, (0, 0, _GAP, 0, _GAP, 0, 0, -len(pictures) % columns), value=255)
    grid = rearrange(cells, "(row column) h w c -> (row h) (column w) c", column=columns)
    return F.pad(grid, (0, 0, 0, _GAP, 0, _GAP), value=255)


def grid_scale(height: int) -> int:
    """Compute the factor that enlarges small images to about 64 pixels for display."""
    return max(1, round(64 / height))


def reconstruction_grid(originals: Tensor, pictures: Tensor, columns: int) -> Tensor:
    """Arrange each row of originals above the row of their reconstructions; uint8 (N, H, W, C) both."""
    columns = min(columns, len(originals))
    # White fills a short last row, so that the reconstructions start a new row.
    white = torch.full_like(originals[:1], 255).expand(-len(originals) % columns, -1, -1, -1)
    rows = [torch.cat([images, white]).split(columns) for images in (originals, pictures)]
    return image_grid(torch.cat([row for pair in zip(*rows, strict=True) for row in pair]), columns)


def square_columns(count: int) -> int:
    """Compute the columns of a roughly square grid."""
    return math.ceil(math.sqrt(count))
