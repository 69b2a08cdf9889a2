"""Components that several tabs share: pictures in and out, labels, sampling settings."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from configs.errors import EXPLANATIONS, UserError
from pipelines.generator import Generator
from stage1_vqvae.data.decoding import decode_image
from stage2_prior.conditions.contract import Label

_SMALL = 128  # pixels per side: smaller images are shown pixelated
_NO_LABEL = -1
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def bind(event: Callable[..., Any], action: Callable[..., Any], inputs: list[Any], outputs: list[Any], computes: bool = True) -> Any:
    """Connect a handler to an event; a UserError is shown as a toast.

    Args:
        event: an event of a component, such as `button.click`.
        action: function from the inputs' values to the outputs'.
        inputs: components.
        outputs: components.
        computes: whether it runs the models, which are shared: such handlers run one at a time.
    Returns: gradio's dependency, whose `success` is an event.
    """

    @functools.wraps(action)
    def handler(*values: Any) -> Any:
        try:
            return action(*values)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except Exception as error:
            # Not a user's mistake but explained, such as exhausted memory.
            explanation = next((line for explain in EXPLANATIONS if (line := explain(error)) is not None), None)
            if explanation is None:
                raise
            raise gr.Error(explanation[0], print_exception=False) from None

    lane: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1} if computes else {}
    return event(handler, inputs, outputs, api_visibility="private", **lane)


class PictureInput:
    """An upload field for a picture, and the handler of its changes."""

    def __init__(self, label: str, classes: list[str]) -> None:
        self.image = gr.Image(label=label, format="png", sources=["upload", "clipboard"], height=280, buttons=[], elem_classes=classes)
        # Take the uploaded file itself: gradio would decode it, and report a broken one only as "Error".
        self.image.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
        self._follows: tuple[Callable[..., Any], list[Any], list[Any]] | None = None

    def on_input(self, action: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
        """Connect a handler to every upload and removal of a picture."""
        # Not `change`, which fires twice for a picture from another handler.
        for event in (self.image.upload, self.image.clear):
            bind(event, action, inputs, outputs)
        self._follows = (action, inputs, outputs)

    def fill_from(self, event: Any) -> None:
        """Also call that handler after an event that fills in a picture."""
        if self._follows is not None:
            bind(event.success, *self._follows)


class Fields:
    """Components for a generator, and functions that read their values."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        height, width, _ = generator.image_shape
        self.classes = ["pixels"] if max(height, width) <= _SMALL else []
        header = generator.header
        self.guides = header is not None and bool(header.condition.class_names) and header.supports_unconditional

    # --- pictures

    def picture(self, label: str) -> PictureInput:
        """Create an upload field; `pixels` reads it."""
        return PictureInput(label, self.classes)

    def pixels(self, path: str | None) -> Tensor:
        """Decode the uploaded picture to uint8 (1, H, W, C). Errors: UserError for no file, or one that is no picture."""
        if path is None:
            raise UserError("picture: expected one, found none; upload one, or draw one")
        name = Path(path).name
        try:
            content = Path(path).read_bytes()
            # Pillow decodes some other formats with external programs, which must not receive untrusted files.
            Image.open(io.BytesIO(content), formats=_FORMATS).close()
        except FileNotFoundError:
            raise UserError(f"{name}: expected a picture, found that it was deleted; upload it again") from None
        except (OSError, Image.DecompressionBombError) as error:
            reason = "none" if isinstance(error, UnidentifiedImageError) else error
            raise UserError(f"{name}: expected a picture ({', '.join(_FORMATS)}), found {reason}") from None
        return torch.from_numpy(decode_image(content, None, self.generator.data, name))[None]

    def pixels_or_warning(self, path: str | None) -> Tensor | None:
        """Decode the uploaded picture; None without one, or with a warning if it is no picture."""
        try:
            return None if path is None else self.pixels(path)
        except UserError as error:
            gr.Warning(str(error))
            return None

    def gallery(self, label: str, columns: int = 4, preview: bool = False, visible: bool = True) -> gr.Gallery:
        """Create a gallery; a click enlarges a picture (`preview`) or selects it."""
        return gr.Gallery(
            label=label,
            type="filepath",
            format="png",
            columns=columns,
            object_fit="contain",
            height="auto",
            allow_preview=preview,
            interactive=False,
            visible=visible,
            elem_classes=self.classes,
        )

    def draw_button(self, text: str) -> gr.Button:
        """Create a button for `draw_into`; hidden without a prior."""
        return gr.Button(text, size="sm", visible=self.generator.prior is not None)

    def draw_into(self, places: list[PictureInput], button: gr.Button) -> None:
        """Let a button put samples into upload fields."""
        names = self.generator.label_names

        def draw() -> Any:
            label = random.choice(range(len(names))) if names else None
            unguided: dict[str, Any] = {} if self.guides else {"guidance": 1.0}
            pictures = [self.generator.sample(1, label, random.randrange(2**31), **unguided)[0] for _ in places]
            return pictures if len(pictures) > 1 else pictures[0]

        event = bind(button.click, draw, [], [place.image for place in places])
        for place in places:
            place.fill_from(event)

    # --- labels

    def sample_label(self) -> gr.Dropdown:
        """Create the label choice for samples; hidden if the prior has no labels."""
        return self._label("all in turn")

    def image_label(self) -> gr.Dropdown:
        """Create the label choice for an uploaded picture."""
        header = self.generator.header
        return self._label("none" if header is None or header.supports_unconditional else None)

    def _label(self, without: str | None) -> gr.Dropdown:
        names = self.generator.label_names
        choices = ([] if without is None else [(without, _NO_LABEL)]) + [(name, number) for number, name in enumerate(names)]
        return gr.Dropdown(choices, value=choices[0][1], label="Label", visible=bool(names))

    @staticmethod
    def label(chosen: int | None) -> Label | None:
        """Convert the chosen value to a label; None for no label."""
        return None if chosen is None or chosen == _NO_LABEL else chosen

    # --- sampling settings

    def settings(self) -> list[Any]:
        """Create fields for seed, temperature, top-p and guidance with the recipe's values; `seed_and_settings` reads them."""
        sampling = self.generator.sampling
        # A prior trained without label dropout takes no guidance, whatever the recipe says.
        temperature, top_p, guidance = sampling.temperature, getattr(sampling, "top_p", 1.0), sampling.guidance if self.guides else 1.0
        about = (
            "below 1: less varied, above 1: more varied",
            "draw from the most likely codes of this total probability",
            "weight of the label; 1 = off; along the recipe's schedule",
        )
        return [
            gr.Number(0, label="Seed", precision=0),
            gr.Slider(0, max(2, temperature), temperature, step=0.01, label="Temperature", info=about[0]),
            gr.Slider(min(0.01, top_p), 1, top_p, step=0.01, label="Top-p", info=about[1], visible=hasattr(sampling, "top_p")),
            gr.Slider(min(0, guidance), max(5, guidance), guidance, step=0.01, label="Guidance", info=about[2], visible=self.guides),
        ]

    def seed_and_settings(self, values: tuple[float | None, ...]) -> tuple[int, dict[str, Any]]:
        """Read the seed and the settings by name. Errors: UserError for an empty field or a seed below 0."""
        names = ("seed", "temperature", "top_p", "guidance")
        settings: dict[str, Any] = {}
        for name, value in zip(names, values, strict=True):
            if value is None:
                raise UserError(f"{name}: expected a number, found none")
            if name == "seed" or hasattr(self.generator.sampling, name):
                settings[name] = value
        seed = int(settings.pop("seed"))
        if seed < 0:
            raise UserError(f"seed: expected a whole number of at least 0, found {seed}")
        return seed, settings
