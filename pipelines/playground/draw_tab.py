"""The tab that draws samples."""

from __future__ import annotations

import shlex
from typing import Any

import gradio as gr

from configs.errors import UserError
from configs.run_dir import typed
from pipelines.playground.fields import Fields, PictureInput, bind

MOST = 64
"""Largest number of pictures per draw, since everyone with access to the page can draw."""


def draw_tab(fields: Fields) -> tuple[gr.Gallery, gr.State]:
    """Build the tab. Returns its gallery and the number of the selected picture."""
    generator = fields.generator
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            label = fields.sample_label()
            number = gr.Slider(1, MOST, 16, step=1, label="Number")
            settings = fields.settings()
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=2, min_width=320):
            gallery, chosen = fields.gallery("Samples: select one to use it in another tab"), gr.State(None)
            line = gr.Textbox(label="The same on the command line", interactive=False, buttons=["copy"])

    def draw(chosen_label: int | None, n: int, *values: float | None) -> tuple[Any, str, None]:
        seed, settings = fields.seed_and_settings(values)
        pictures = generator.sample(n, fields.label(chosen_label), seed, **settings)
        options: dict[str, Any] = {"run": generator.run, "prior": generator.prior_name, "n": n, "seed": seed}
        if fields.label(chosen_label) is not None:
            name = generator.label_names[int(fields.label(chosen_label) or 0)]
            options["label"] = chosen_label if name == "null" else name  # the command line reads `null` as none
        options |= {key: value for key, value in settings.items() if value != getattr(generator.sampling, key)}
        words = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        # Clear the selection.
        return gr.Gallery(pictures, selected_index=None), f"{typed('pipelines/sample.py')} {shlex.join(words)}", None

    def choose(event: gr.SelectData) -> int:
        return int(event.index)

    bind(button.click, draw, [label, number, *settings], [gallery, line, chosen])
    bind(gallery.select, choose, [], [chosen], computes=False)
    return gallery, chosen


def send_button(gallery: gr.Gallery, chosen: gr.State, text: str, place: PictureInput, tabs: gr.Tabs, tab: str) -> None:
    """Create a button that puts the selected picture into another tab and opens it."""
    button = gr.Button(text, size="sm", min_width=120)

    def send(pictures: list[tuple[str, str | None]] | None, number: int | None) -> tuple[str, Any]:
        if not pictures or number is None or number >= len(pictures):
            raise UserError("picture: expected a selected sample, found none")
        # Pass the file itself: gradio would write a copy over it while a browser reads it.
        return pictures[number][0], gr.Tabs(selected=tab)

    place.fill_from(bind(button.click, send, [gallery, chosen], [place.image, tabs], computes=False))
