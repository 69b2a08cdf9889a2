"""The tab that shows the codebook, code by code."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from pipelines.playground.edits import code_patches, nearest_codes
from pipelines.playground.fields import Fields, bind
from pipelines.playground.maps import patch_at, patch_sheet
from stage1_vqvae.pictures import to_pil

# Codes per page: each takes decoding a complete picture, so large pictures get fewer.
_MOST, _LEAST, _PIXELS = 256, 16, 2**20
_NEAREST = 11


def codebook_tab(fields: Fields) -> None:
    """Build the tab."""
    generator = fields.generator
    sizes = generator.tokenizer.quantizer.num_codes
    height, width, _ = generator.image_shape
    size = min(max(_PIXELS // (height * width), _LEAST), _MOST)
    pages = max(-(-number // size) for number in sizes)
    with gr.Row(visible=len(sizes) > 1 or pages > 1):
        level = gr.Radio([(f"{number + 1}", number) for number in range(len(sizes))], value=0, label="Level", visible=len(sizes) > 1)
        page = gr.Slider(1, max(pages, 2), 1, step=1, label=f"Page, {size} codes each", visible=pages > 1)
    button = gr.Button("Show", variant="primary")
    gr.Markdown("Each code, decoded among plain codes, in the order of their numbers. Click one.")
    sheet = gr.Image(alt_text="codebook", show_label=False, format="png", buttons=[])
    gallery = fields.gallery("The selected code and its nearest codes", columns=6)

    def numbers(level: int, page: int) -> range:
        page = min(page, -(-sizes[level] // size))  # another level's codebook may be smaller
        return range((page - 1) * size, min(page * size, sizes[level]))

    def show(level: int, page: int) -> tuple[Image.Image, Any]:
        return patch_sheet(code_patches(generator, level, list(numbers(level, page)))), []

    def click(level: int, page: int, event: gr.SelectData) -> list[tuple[Image.Image, str]]:
        codes_shown = numbers(level, page)
        x, y = event.index
        code = codes_shown[patch_at(x, y, len(codes_shown), generator.image_shape, generator.tokenizer.grids[level])]
        codes = [code, *nearest_codes(generator.tokenizer, level, code, _NEAREST)]
        return [(to_pil(patch), str(number)) for number, patch in zip(codes, code_patches(generator, level, codes), strict=True)]

    bind(button.click, show, [level, page], [sheet, gallery])
    for event in (level.change, page.release):
        bind(event, show, [level, page], [sheet, gallery])
    bind(sheet.select, click, [level, page], [gallery])
