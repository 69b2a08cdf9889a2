"""The app's page with its tabs."""

from __future__ import annotations

import gradio as gr

from pipelines.generator import Generator
from pipelines.playground.codebook_tab import codebook_tab
from pipelines.playground.codes_tab import CodesTab
from pipelines.playground.draw_tab import draw_tab, send_button
from pipelines.playground.fields import Fields
from pipelines.playground.fill_tab import fill_tab
from pipelines.playground.walk_tab import walk_tab

CSS = """
.pixels img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain }
.grid-container { padding-top: 2.2rem !important }
@media (max-width: 520px) {
  .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; grid-gap: 0.3rem !important }
  .caption-label { white-space: normal !important; max-width: 100% !important; font-size: 0.6rem !important; padding: 0 0.2rem !important }
  .gradio-container > .main { padding: 0.6rem !important }
  .tab-container button { padding: 0 0.65rem !important }
}
"""
"""Style of the page, for `launch`."""


def build_page(generator: Generator) -> gr.Blocks:
    """Build the page of a run; without a prior, it has no tabs that draw and shows no bits."""
    tokenizer, draws = generator.tokenizer, generator.prior is not None
    grids = " + ".join(f"{height} x {width}" for height, width in tokenizer.grids)
    sizes = " or ".join(f"{number:,}" for number in dict.fromkeys(tokenizer.quantizer.num_codes))
    description = f"A picture has {grids} codes, each one of {sizes}."
    without = "" if draws else " This run has no finished prior: it can encode pictures, but not draw any."
    # Uploads are deleted after a day.
    with gr.Blocks(title=generator.run.path.name, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.Markdown(f"# {generator.run.path.name}\n{description}{without}")
        fields = Fields(generator)
        with gr.Tabs() as tabs:
            if draws:
                with gr.Tab("Draw", id="draw"):
                    draw_outputs = draw_tab(fields)
                    further = gr.Row()
            with gr.Tab("Codes", id="codes"):
                codes_input = CodesTab(fields).picture
            if draws:
                with gr.Tab("Fill", id="fill"):
                    fill_input = fill_tab(fields)
            with gr.Tab("Walk", id="walk"):
                first, last = walk_tab(fields)
            with gr.Tab("Codebook", id="codebook"):
                codebook_tab(fields)
        if draws:
            with further:
                send_button(*draw_outputs, "Show its codes", codes_input, tabs, "codes")
                send_button(*draw_outputs, "Fill a part of it", fill_input, tabs, "fill")
                send_button(*draw_outputs, "Walk from it", first, tabs, "walk")
                send_button(*draw_outputs, "Walk to it", last, tabs, "walk")
    return blocks
