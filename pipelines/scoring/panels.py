"""Results of scored images: a CSV table and a picture of captioned panels."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from torch import Tensor

from configs.run_dir import write_text
from pipelines.inputs.images import unique_names
from stage1_vqvae.pictures import grid_scale, image_grid
from stage1_vqvae.plots import save_figure


def file_names(names: Sequence[str]) -> list[str]:
    """Return one PNG's name per image: its stem, with a number if several images share it."""
    return [f"{name}.png" for name in unique_names([Path(name).stem for name in names])]


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with equal keys as CSV, atomically; None and NaN become empty fields."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if value is None or value != value else value for key, value in row.items()})
    write_text(path, buffer.getvalue())


class Panel(NamedTuple):
    """Pictures side by side under a caption."""

    pictures: Tensor
    """Pictures side by side, uint8 (k, H, W, C)."""
    caption: str
    """Caption of two lines."""


# Sizes in `panels_picture`, in pixels at save_figure's 110 per inch.
_INCH = 110
_WIDTH, _GAP, _CAPTION, _TITLE, _BAR = 1200, 14, 26, 34, 60
_NARROWEST = 120  # room for a caption of some 24 letters


def panels_picture(
    path: Path, blocks: Sequence[tuple[str, Sequence[Panel]]], colours: ScalarMappable | None = None, unit: str = ""
) -> None:
    """Draw blocks of panels of one size, each under its title, and below them the colour bar of `colours` in `unit`.

    Panels are placed explicitly, because matplotlib's layout would shrink small pictures.
    """
    scale = grid_scale(blocks[0][1][0].pictures.shape[1])
    strips = [[_side_by_side(panel.pictures, scale) for panel in panels] for _, panels in blocks]
    high, wide = strips[0][0].shape[:2]
    cell_width, cell_height = max(wide, _NARROWEST) + _GAP, high + _CAPTION + _GAP
    columns = max(1, min(_WIDTH // cell_width, max(len(panels) for _, panels in blocks)))
    width = columns * cell_width
    height = sum(_TITLE + -(-len(panels) // columns) * cell_height for _, panels in blocks) + (_BAR if colours is not None else 0)
    figure = Figure(figsize=(width / _INCH, height / _INCH))
    top = 0
    for (title, panels), pictures in zip(blocks, strips, strict=True):
        figure.text(0, 1 - (top + _TITLE / 2) / height, title, fontsize=9, fontweight="bold", va="center")
        top += _TITLE
        for number, (panel, picture) in enumerate(zip(panels, pictures, strict=True)):
            x, y = number % columns * cell_width, top + number // columns * cell_height
            below = 1 - (y + _CAPTION - 4) / height
            # A file's name may hold dollar signs, between which matplotlib would see a formula.
            figure.text(x / width, below, panel.caption, fontsize=6.5, va="bottom", linespacing=1.1, parse_math=False)
            axes = figure.add_axes((x / width, 1 - (y + _CAPTION + high) / height, wide / width, high / height))
            axes.imshow(picture.numpy(), interpolation="nearest")
            axes.set_axis_off()
        top += -(-len(panels) // columns) * cell_height
    if colours is not None:
        bar = figure.add_axes((0, 1 - (top + 24) / height, min(360, width) / width, 12 / height))
        figure.colorbar(colours, cax=bar, orientation="horizontal", extend="max").set_label(unit, fontsize=8)
        bar.tick_params(labelsize=7)
    save_figure(path, figure)


def short(name: str, length: int = 24) -> str:
    """Shorten a name for a caption to the end of its last part."""
    return name if len(name) <= length else Path(name).name[-length:]


def _side_by_side(pictures: Tensor, scale: int) -> Tensor:
    grid = image_grid(pictures, len(pictures)).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return grid.expand(-1, -1, 3)
