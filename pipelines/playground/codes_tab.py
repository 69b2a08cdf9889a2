"""The tab that shows a picture's codes and their bits, and replaces single codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr
from torch import Tensor

from configs.errors import UserError
from pipelines.playground.edits import Candidate, Place, candidates, most_likely_codes, nearest_codes, replaced
from pipelines.playground.fields import Fields, bind
from pipelines.playground.maps import code_at, code_map
from stage1_vqvae.pictures import to_pil
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.priors.stepwise import StepwisePrior

_OFFERED = 8  # alternatives of each kind


class EditState(NamedTuple):
    """State of a picture whose codes are replaced one by one."""

    original: Codes
    """(1, h, w) per level."""
    codes: Codes
    earlier: tuple[Codes, ...] = ()
    """The codes before each change, oldest first."""
    place: Place | None = None
    """Position of the selected code."""
    nearest: tuple[int, ...] = ()
    """Alternatives to the selected code: the nearest codes."""
    most_likely: tuple[int, ...] = ()
    """Alternatives to the selected code: the most likely codes."""


class CodesTab:
    """Content of the tab."""

    def __init__(self, fields: Fields) -> None:
        self._fields, self._generator = fields, fields.generator
        levels = len(self._generator.tokenizer.grids)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                self.picture = fields.picture("Picture")
                draw = fields.draw_button("Draw one")
                label = fields.image_label()
                level = gr.Radio([(f"{number + 1}", number) for number in range(levels)], value=0, label="Level", visible=levels > 1)
                rebuilt = gr.Image(label="From its codes", format="png", height=280, buttons=["download"], elem_classes=fields.classes)
                with gr.Row():
                    undo, over = gr.Button("Undo", size="sm", min_width=100), gr.Button("Start over", size="sm", min_width=100)
            with gr.Column(scale=2, min_width=320):
                in_turn = isinstance(self._generator.prior, StepwisePrior)
                bright = "; brighter codes cost more bits" if in_turn else ""
                gr.Markdown(f"The picture's codes{bright}. Click one.")
                code_image = gr.Image(alt_text="codes", show_label=False, format="png", buttons=[])
                status = gr.Markdown()
                nearest = fields.gallery("Replace it by one of its nearest codes")
                most_likely = fields.gallery("Replace it by one of the most likely codes, given those before it", visible=in_turn)
        state = gr.State(None)
        inputs, outputs = [state, label, level], [state, rebuilt, code_image, status, nearest, most_likely]

        def click(state: EditState | None, label: int | None, level: int, event: gr.SelectData) -> Any:
            x, y = event.index
            place = Place(level, *code_at(x, y, self._generator.image_shape, self._generator.tokenizer.grids[level]))
            return self._show(_require_picture(state)._replace(place=place), label, level)

        def take_nearest(state: EditState | None, label: int | None, level: int, event: gr.SelectData) -> Any:
            return self._take(_require_picture(state), label, level, _require_picture(state).nearest, event.index)

        def take_most_likely(state: EditState | None, label: int | None, level: int, event: gr.SelectData) -> Any:
            return self._take(_require_picture(state), label, level, _require_picture(state).most_likely, event.index)

        self.picture.on_input(self._look, [self.picture.image, label, level], outputs)
        fields.draw_into([self.picture], draw)
        for choice in (label, level):
            bind(choice.change, self._look_again, inputs, outputs)
        for event, action in (
            (code_image.select, click),
            (nearest.select, take_nearest),
            (most_likely.select, take_most_likely),
            (undo.click, self._undo),
            (over.click, self._start_over),
        ):
            bind(event, action, inputs, outputs)

    def _look(self, path: str | None, label: int | None, level: int) -> Any:
        pixels = self._fields.pixels_or_warning(path)
        codes = None if pixels is None else self._generator.encode(pixels)
        return self._show(None if codes is None else EditState(codes, codes), label, level)

    def _look_again(self, state: EditState | None, label: int | None, level: int) -> Any:
        return self._show(None if state is None else state._replace(place=None), label, level)

    def _take(self, state: EditState, label: int | None, level: int, offered: Sequence[int], number: int) -> Any:
        assert state.place is not None
        changed = replaced(state.codes, state.place, offered[number])
        return self._show(state._replace(codes=changed, earlier=(*state.earlier, state.codes)), label, level)

    def _undo(self, state: EditState | None, label: int | None, level: int) -> Any:
        state = _require_picture(state)
        if not state.earlier:
            raise UserError("undo: expected a code that was replaced, found none")
        return self._show(state._replace(codes=state.earlier[-1], earlier=state.earlier[:-1]), label, level)

    def _start_over(self, state: EditState | None, label: int | None, level: int) -> Any:
        state = _require_picture(state)
        return self._show(EditState(state.original, state.original), label, level)

    def _show(self, state: EditState | None, label: int | None, level: int) -> Any:
        """Compute all outputs of the tab; None: without a picture."""
        if state is None:
            return None, None, None, "", [], []
        generator, codes = self._generator, state.codes
        place = state.place if state.place is not None and state.place.level == level else None
        state = state._replace(place=place)
        label_or_none = self._fields.label(label)
        in_turn = isinstance(generator.prior, StepwisePrior)
        bits = generator.surprisals(codes, label_or_none) if in_turn else None
        picture = generator.decode(codes, output="tensor")[0]
        near, likely = [], []
        if place is not None:
            near = nearest_codes(generator.tokenizer, level, place.of(codes), _OFFERED)
            likely = most_likely_codes(generator, codes, label_or_none, place, _OFFERED) if in_turn else []
            state = state._replace(nearest=tuple(near), most_likely=tuple(likely))
        mark = None if place is None else (place.row, place.column)
        level_bits = None if bits is None else bits[level][0]
        code_picture = code_map(picture, codes[level][0], level_bits, generator.tokenizer.quantizer.num_codes[level], mark)
        offers_by_code = [] if place is None else candidates(generator, codes, label_or_none, place, [*near, *likely])
        captioned = [(to_pil(each.picture), _caption(each)) for each in offers_by_code]
        offers = captioned[: len(near)], captioned[len(near) :]
        return state, to_pil(picture), code_picture, _status_line(state, bits), *offers


def _require_picture(state: EditState | None) -> EditState:
    if state is None:
        raise UserError("picture: expected one, found none; upload one, or draw one")
    return state


def _status_line(state: EditState, bits: tuple[Tensor, ...] | None) -> str:
    """Describe the picture and the selected code in one line."""
    parts = [] if bits is None else [f"All codes cost **{sum(float(level.sum()) for level in bits):.1f} bits**."]
    if state.earlier:
        parts.append(f"Replaced: {len(state.earlier)}.")
    if state.place is not None:
        level, row, column = state.place
        cost = "" if bits is None else f", {bits[level][0, row, column]:.1f} bits"
        parts.append(f"Row {row + 1}, column {column + 1}: **code {state.place.of(state.codes)}**{cost}.")
    return " ".join(parts)


def _caption(offer: Candidate) -> str:
    return f"{offer.code}" if offer.bits is None else f"{offer.code}: {offer.bits:.1f} bits, all {offer.total:.0f}"
