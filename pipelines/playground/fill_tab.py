"""The tab that redraws the painted part of a picture."""

from __future__ import annotations

import io
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from configs.errors import UserError
from pipelines.playground.fields import Fields, PictureInput, bind
from pipelines.playground.maps import enlarged

_MOST = 16  # pictures per draw
SIDE, BRUSH = 320, 26
"""Minimum of the canvas's longer side in pixels; radius of the brush."""
_PAINT = "#ff3b30"
_LARGEST = 4096  # pixels per side of the paint
_MOST_WAITING = 32  # uploaded paintings that have not been read


def fill_tab(fields: Fields) -> PictureInput:
    """Build the tab. Returns its upload field."""
    generator = fields.generator
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = fields.picture("Picture")
            draw = fields.draw_button("Draw one")
            label = fields.image_label()
            number = gr.Slider(1, _MOST, 8, step=1, label="Number")
            settings = fields.settings()
        with gr.Column(scale=2, min_width=320):
            editor = gr.ImageEditor(
                label="Paint over the part to redraw",
                type="pil",
                format="png",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=BRUSH, colors=[_PAINT], color_mode="fixed"),
                canvas_size=(SIDE, SIDE),
                buttons=[],
            )
            _restrict_uploads(editor)
            button = gr.Button("Fill", variant="primary")
            gallery = fields.gallery("Filled", preview=True)

    def prepare(path: str | None) -> Image.Image | None:
        pixels = fields.pixels_or_warning(path)
        return None if pixels is None else enlarged(pixels[0], SIDE).convert("RGB")

    def fill(path: str | None, layer: Image.Image | None, chosen_label: int | None, n: int, *values: float | None) -> list[Image.Image]:
        pixels, (seed, settings) = fields.pixels(path), fields.seed_and_settings(values)
        paint = None if layer is None else painted(layer, *generator.image_shape[:2])
        if paint is None or not paint.any():
            raise UserError("paint: expected some over the part to redraw, found none")
        return generator.complete(pixels.expand(n, -1, -1, -1), ~paint, fields.label(chosen_label), seed, **settings)

    picture.on_input(prepare, [picture.image], [editor])
    fields.draw_into([picture], draw)
    bind(editor.clear, prepare, [picture.image], [editor])  # clear the paint, not the picture
    bind(button.click, fill, [picture.image, editor, label, number, *settings], [gallery])
    return picture


def _restrict_uploads(editor: gr.ImageEditor) -> None:
    """Accept only the first layer of a browser's painting, up to a size, because gradio accepts and decodes anything."""
    accept = editor.accept_blobs

    def accept_blobs(data: Any) -> Any:
        if str(data.data["index"]) not in ("0", "null", "None", ""):
            raise UserError("paint: expected one layer, found more")
        while len(editor.blob_storage) >= _MOST_WAITING:
            editor.blob_storage.pop(next(iter(editor.blob_storage)), None)
        return accept(data)

    def preprocess(payload: Any) -> Image.Image | None:
        stored = payload if payload is None or payload.id is None else editor.blob_storage.pop(payload.id, None)
        layer = stored.layers[0] if stored is not None and stored.layers else None
        if layer is None:
            return None
        try:
            image = Image.open(io.BytesIO(layer) if isinstance(layer, bytes) else layer.path, formats=("PNG", "WEBP"))
        except (OSError, Image.DecompressionBombError) as error:
            raise gr.Error(f"paint: expected a picture, found: {error}", print_exception=False) from None
        if max(image.size) > _LARGEST:
            found = f"{image.width} x {image.height}"
            raise gr.Error(f"paint: expected at most {_LARGEST} pixels per side, found {found}", print_exception=False)
        return image.convert("RGBA")

    accept_blobs._is_server_fn = True  # type: ignore[attr-defined]  # gradio's mark of functions that a browser may call
    editor.accept_blobs = accept_blobs
    editor.preprocess = preprocess  # type: ignore[assignment, method-assign]


def painted(layer: Image.Image, height: int, width: int) -> Tensor:
    """Compute the mask (H, W) of an image's painted pixels from a layer of any size."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    opaque = np.asarray(layer.getchannel("A")) > 0
    rows, columns = opaque.nonzero()
    mask[rows * height // opaque.shape[0], columns * width // opaque.shape[1]] = True
    return mask
