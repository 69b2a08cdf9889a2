"""Build plots without rendering them, which takes longer than a tiny training."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from PIL import Image

savefig = Figure.savefig
"""Matplotlib's own, which renders."""


def save_blank(self: Figure, target: Any, **_: object) -> None:
    """Write a small black picture instead of a figure."""
    Image.new("RGB", (8, 8)).save(target, "PNG")


def leave_blank() -> None:
    """Disable rendering in this process."""
    Figure.savefig = save_blank  # type: ignore[method-assign]
