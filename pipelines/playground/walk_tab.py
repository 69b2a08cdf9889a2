"""The tab that interpolates between the codes of two pictures."""

from __future__ import annotations

import gradio as gr
from PIL import Image

from pipelines.playground.edits import walk
from pipelines.playground.fields import Fields, PictureInput, bind

_MOST = 24  # pictures


def walk_tab(fields: Fields) -> tuple[PictureInput, PictureInput]:
    """Build the tab. Returns its two upload fields."""
    generator = fields.generator
    with gr.Row():
        first, last = fields.picture("From"), fields.picture("To")
    fields.draw_into([first, last], fields.draw_button("Draw two"))
    number = gr.Slider(3, _MOST, 12, step=1, label="Pictures, including both ends")
    button = gr.Button("Walk", variant="primary")
    gallery = fields.gallery("Interpolation: at each step the codes nearest to a mixture of both", columns=6, preview=True)

    def go(start: str | None, end: str | None, n: int) -> list[tuple[Image.Image, str]]:
        start_codes, end_codes = (generator.encode(fields.pixels(path)) for path in (start, end))
        pictures = generator.decode(walk(generator.tokenizer, start_codes, end_codes, n))
        return [(picture, f"{step / (n - 1):.0%}") for step, picture in enumerate(pictures)]

    bind(button.click, go, [first.image, last.image, number], [gallery])
    return first, last
