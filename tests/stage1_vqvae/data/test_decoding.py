"""Transparent images are composed over the recipe's background; what their hidden pixels hold never shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.data import Data
from stage1_vqvae.data.decoding import decode_image

SIZE = (6, 4)


def hidden(mode: str, path: Path) -> None:
    """A file whose left half is opaque blue (or grey 41), and whose right half hides wild colours under full transparency."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 4), np.uint8)
    pixels[:, :3], pixels[:, 3:, 3] = (0, 0, 255, 255), 0
    if mode == "LA":
        grey = np.dstack([np.where(pixels[..., 3] > 0, 41, pixels[..., 0]), pixels[..., 3]]).astype(np.uint8)
        Image.fromarray(grey, "LA").save(path)
    elif mode == "P":
        palette = Image.new("P", SIZE, 1)
        palette.putpalette([0, 0, 255, 250, 10, 130])
        palette.paste(0, (0, 0, 3, SIZE[1]))
        palette.save(path, transparency=1)
    elif mode == "RGB":
        plain = Image.new("RGB", SIZE, (250, 10, 130))
        plain.paste((0, 0, 255), (0, 0, 3, SIZE[1]))
        plain.save(path, transparency=(250, 10, 130))
    else:
        Image.fromarray(pixels, "RGBA").save(path)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
@pytest.mark.parametrize(("background", "colour"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48))])
def test_hidden_pixels_never_show(mode: str, background: str, colour: tuple[int, int, int], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    hidden(mode, path)
    found = decode_image(None, str(path), Data(height=SIZE[1], width=SIZE[0], background=background))
    assert (found[:, 3:] == colour).all()
    assert (found[:, :3] == ((41, 41, 41) if mode == "LA" else (0, 0, 255))).all()


def test_half_transparent_pixels_are_mixed_before_scaling_and_before_grey(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGBA", SIZE, (200, 100, 0, 51)).save(path)
    mixed = [0.2 * value + 0.8 * 255 for value in (200, 100, 0)]
    colour = decode_image(None, str(path), Data(height=2, width=3))
    assert np.allclose(colour, mixed, atol=1)
    grey = decode_image(None, str(path), Data(height=2, width=3, channels=1))
    assert np.allclose(grey, 0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2], atol=1)


def test_a_background_that_is_no_colour_is_named(tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    from stage1_vqvae.train import main

    line = one_line_error(main, "--run", tmp_path / "new", "--data.background", "windy")
    assert "data.background: expected a colour" in line
    assert "windy" in line
