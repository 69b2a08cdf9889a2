"""Transparency, 16-bit ranges and the background colour."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from configs.data import Data
from stage1_vqvae.data.decoding import decode_image
from stage1_vqvae.data.sources import load_images

SIZE = (6, 4)


def write_transparent(mode: str, path: Path) -> None:
    """Write an image: left half opaque blue (or grey 41), right half fully transparent over random colours."""
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
def test_colours_of_transparent_pixels_never_show(mode: str, background: str, colour: tuple[int, int, int], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    write_transparent(mode, path)
    pixels = decode_image(None, str(path), Data(height=SIZE[1], width=SIZE[0], background=background))
    assert (pixels[:, 3:] == colour).all()
    assert (pixels[:, :3] == ((41, 41, 41) if mode == "LA" else (0, 0, 255))).all()


def test_transparency_is_blended_before_scaling_and_grey_conversion(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGBA", SIZE, (200, 100, 0, 51)).save(path)
    mixed = [0.2 * value + 0.8 * 255 for value in (200, 100, 0)]
    colour = decode_image(None, str(path), Data(height=2, width=3))
    assert np.allclose(colour, mixed, atol=1)
    grey = decode_image(None, str(path), Data(height=2, width=3, channels=1))
    assert np.allclose(grey, 0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2], atol=1)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_the_white_level_of_16_bit_images_can_be_set(ending: str, tmp_path: Path) -> None:
    values = np.linspace(0, 4095, 24).astype(np.uint16).reshape(SIZE[1], SIZE[0])
    path = tmp_path / f"a.{ending}"
    Image.fromarray(values).save(path)

    def decoded(white: float | None, channels: Literal[1, 3] = 1) -> np.ndarray:
        return decode_image(None, str(path), Data(height=SIZE[1], width=SIZE[0], channels=channels, white=white))

    assert np.array_equal(decoded(None)[..., 0], values >> 8)
    assert np.array_equal(decoded(4095)[..., 0], values >> 4)
    assert np.array_equal(decoded(4095, 3), np.repeat(values[..., None] >> 4, 3, 2))
    assert np.array_equal(decoded(1023)[..., 0], np.minimum(values >> 2, 255))
    Image.fromarray(values.astype(np.float32) / 4095).save(path.with_suffix(".tif"))
    floats = decode_image(None, str(path.with_suffix(".tif")), Data(height=SIZE[1], width=SIZE[0], channels=1, white=1.0))
    assert np.array_equal(floats[..., 0], np.round(values / 4095 * 255))


@pytest.mark.parametrize(
    ("highest", "white", "message"),
    [
        (60000, None, None),
        (3900, None, "values up to 3,900, where 65,535 is white, in 8 images of more than 8 bits: they are dark; --data.white 4095"),
        (3900, 4095, None),
        (3900, 1023, "values up to 3,900, where 1,023 is white, in 8 images of more than 8 bits: all above are white too"),
    ],
)
def test_a_mostly_unused_range_is_reported(
    highest: int, white: float | None, message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(8):
        Image.fromarray(np.full((4, 6), highest - number, np.uint16)).save(tmp_path / f"{number}.png")
    load_images(Data(path=str(tmp_path), height=4, width=6, white=white, decode="each_time"), hold_out=False)
    printed = capsys.readouterr().out
    assert message in printed if message else "more than 8 bits" not in printed


def test_a_background_that_is_not_a_colour_is_refused(tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    from stage1_vqvae.train import main

    line = one_line_error(main, "--run", tmp_path / "new", "--data.background", "windy")
    assert "data.background: expected a colour" in line
    assert "windy" in line
