"""A part of a picture painted over, and drawn anew."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from configs.errors import UserError
from pipelines.playground.fields import Fields, PictureInput, on
from pipelines.playground.maps import enlarged

_MOST = 16  # pictures at once
SIDE, BRUSH = 320, 26
"""Pixels of what is painted on, at least; the radius of the brush."""
_PAINT = "#ff3b30"


def fill_tab(fields: Fields) -> PictureInput:
    """The tab's content: the place of its picture."""
    generator = fields.generator
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            given = fields.picture("Picture")
            draw = fields.drawing_button("Draw one")
            label = fields.label_of_given()
            number = gr.Slider(1, _MOST, 8, step=1, label="Number")
            settings = fields.settings()
        with gr.Column(scale=2, min_width=320):
            editor = gr.ImageEditor(
                label="Paint over what is to be drawn anew",
                type="pil",
                format="png",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=BRUSH, colors=[_PAINT], color_mode="fixed"),
                canvas_size=(SIDE, SIDE),
                buttons=[],
            )
            button = gr.Button("Fill", variant="primary")
            gallery = fields.gallery("Filled", preview=True)

    def prepare(path: str | None) -> Image.Image | None:
        return None if path is None else enlarged(fields.pixels(path)[0], SIDE).convert("RGB")

    def fill(path: str | None, editor: Any, asked: int | None, n: int, *values: float | None) -> list[Image.Image]:
        pixels, (seed, settings) = fields.pixels(path), fields.seed_and_settings(values)
        paint = painted((editor or {}).get("layers", []), *generator.image_shape[:2])
        if not paint.any():
            raise UserError("paint: expected some over what is to be drawn anew, found none")
        return generator.complete(pixels.expand(n, -1, -1, -1), ~paint, fields.label(asked), seed, **settings)

    given.whenever_given(prepare, [given.image], [editor])
    fields.draw_into([given], draw)
    on(button.click, fill, [given.image, editor, label, number, *settings], [gallery])
    return given


def painted(layers: list[Image.Image], height: int, width: int) -> Tensor:
    """Which of an image's pixels (H, W) have any paint on them, of layers of any size over it."""
    found = torch.zeros(height, width, dtype=torch.bool)
    for layer in layers:
        opaque = np.asarray(layer.convert("RGBA").getchannel("A")) > 0
        rows, columns = opaque.nonzero()
        found[rows * height // opaque.shape[0], columns * width // opaque.shape[1]] = True
    return found
