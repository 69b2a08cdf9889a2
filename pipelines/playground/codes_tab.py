"""A picture's codes: what they cost, and what becomes of the picture if one is exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr
from torch import Tensor

from configs.errors import UserError
from pipelines.playground.edits import Candidate, Place, candidates, exchanged, likeliest_codes, nearest_codes
from pipelines.playground.fields import Fields, on
from pipelines.playground.maps import code_at, code_map
from stage1_vqvae.pictures import to_pil
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.priors.stepwise import StepwisePrior

_OFFERED = 8  # codes of a kind


class Desk(NamedTuple):
    """A picture that is being changed code by code."""

    original: Codes
    """(1, h, w) a level."""
    codes: Codes
    earlier: tuple[Codes, ...] = ()
    """The codes before each change, the last one last."""
    place: Place | None = None
    """That of the code that was clicked."""
    nearest: tuple[int, ...] = ()
    """Codes that are offered for it."""
    likeliest: tuple[int, ...] = ()


class CodesTab:
    """The tab's content."""

    def __init__(self, fields: Fields) -> None:
        self._fields, self._generator = fields, fields.generator
        levels = len(self._generator.tokenizer.grids)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                self.picture = fields.picture("Picture")
                draw = fields.drawing_button("Draw one")
                label = fields.label_of_given()
                level = gr.Radio([(f"{number + 1}", number) for number in range(levels)], value=0, label="Level", visible=levels > 1)
                shown = gr.Image(label="From its codes", format="png", height=280, buttons=["download"], elem_classes=fields.classes)
                with gr.Row():
                    undo, over = gr.Button("Undo", size="sm", min_width=100), gr.Button("Start over", size="sm", min_width=100)
            with gr.Column(scale=2, min_width=320):
                in_turn = isinstance(self._generator.prior, StepwisePrior)
                bright = ", the brighter the more bits they cost" if in_turn else ""
                gr.Markdown(f"Its codes{bright}: click one.")
                of_codes = gr.Image(alt_text="codes", show_label=False, format="png", buttons=[])
                said = gr.Markdown()
                nearest = fields.gallery("Exchange it for one of the codes nearest to it")
                likeliest = fields.gallery("Or for one of those likeliest after the codes before it", visible=in_turn)
        desk = gr.State(None)
        given, outputs = [desk, label, level], [desk, shown, of_codes, said, nearest, likeliest]

        def click(desk: Desk | None, label: int | None, level: int, event: gr.SelectData) -> Any:
            x, y = event.index
            place = Place(level, *code_at(x, y, self._generator.image_shape, self._generator.tokenizer.grids[level]))
            return self._show(_some(desk)._replace(place=place), label, level)

        def take_nearest(desk: Desk | None, label: int | None, level: int, event: gr.SelectData) -> Any:
            return self._take(_some(desk), label, level, _some(desk).nearest, event.index)

        def take_likeliest(desk: Desk | None, label: int | None, level: int, event: gr.SelectData) -> Any:
            return self._take(_some(desk), label, level, _some(desk).likeliest, event.index)

        self.picture.whenever_given(self._look, [self.picture.image, label, level], outputs)
        fields.draw_into([self.picture], draw)
        for choice in (label, level):
            on(choice.change, self._look_again, given, outputs)
        for event, action in (
            (of_codes.select, click),
            (nearest.select, take_nearest),
            (likeliest.select, take_likeliest),
            (undo.click, self._undo),
            (over.click, self._start_over),
        ):
            on(event, action, given, outputs)

    def _look(self, path: str | None, label: int | None, level: int) -> Any:
        pixels = self._fields.pixels_if_any(path)
        codes = None if pixels is None else self._generator.encode(pixels)
        return self._show(None if codes is None else Desk(codes, codes), label, level)

    def _look_again(self, desk: Desk | None, label: int | None, level: int) -> Any:
        return self._show(None if desk is None else desk._replace(place=None), label, level)

    def _take(self, desk: Desk, label: int | None, level: int, offered: Sequence[int], number: int) -> Any:
        assert desk.place is not None
        changed = exchanged(desk.codes, desk.place, offered[number])
        return self._show(desk._replace(codes=changed, earlier=(*desk.earlier, desk.codes)), label, level)

    def _undo(self, desk: Desk | None, label: int | None, level: int) -> Any:
        desk = _some(desk)
        if not desk.earlier:
            raise UserError("undo: expected a code that was exchanged, found none")
        return self._show(desk._replace(codes=desk.earlier[-1], earlier=desk.earlier[:-1]), label, level)

    def _start_over(self, desk: Desk | None, label: int | None, level: int) -> Any:
        desk = _some(desk)
        return self._show(Desk(desk.original, desk.original), label, level)

    def _show(self, desk: Desk | None, label: int | None, level: int) -> Any:
        """All that the tab shows of a picture's codes; None: of no picture."""
        if desk is None:
            return None, None, None, "", [], []
        generator, codes = self._generator, desk.codes
        place = desk.place if desk.place is not None and desk.place.level == level else None
        desk = desk._replace(place=place)
        asked = self._fields.label(label)
        in_turn = isinstance(generator.prior, StepwisePrior)
        bits = generator.surprisals(codes, asked) if in_turn else None
        picture = generator.decode(codes, output="tensor")[0]
        near, likely = [], []
        if place is not None:
            near = nearest_codes(generator.tokenizer, level, place.of(codes), _OFFERED)
            likely = likeliest_codes(generator, codes, asked, place, _OFFERED) if in_turn else []
            desk = desk._replace(nearest=tuple(near), likeliest=tuple(likely))
        mark = None if place is None else (place.row, place.column)
        of_level = None if bits is None else bits[level][0]
        drawn = code_map(picture, codes[level][0], of_level, generator.tokenizer.quantizer.num_codes[level], mark)
        offered = [] if place is None else candidates(generator, codes, asked, place, [*near, *likely])
        captioned = [(to_pil(each.picture), _caption(each)) for each in offered]
        offers = captioned[: len(near)], captioned[len(near) :]
        return desk, to_pil(picture), drawn, _said(desk, bits), *offers


def _some(desk: Desk | None) -> Desk:
    if desk is None:
        raise UserError("picture: expected one, found none; upload one, or draw one")
    return desk


def _said(desk: Desk, bits: tuple[Tensor, ...] | None) -> str:
    """A line on the picture, and on the code that was clicked."""
    said = [] if bits is None else [f"All its codes cost **{sum(float(level.sum()) for level in bits):.1f} bits**."]
    if desk.earlier:
        said.append(f"Exchanged: {len(desk.earlier)}.")
    if desk.place is not None:
        level, row, column = desk.place
        cost = "" if bits is None else f", {bits[level][0, row, column]:.1f} bits"
        said.append(f"Row {row + 1}, column {column + 1}: **code {desk.place.of(desk.codes)}**{cost}.")
    return " ".join(said)


def _caption(offer: Candidate) -> str:
    return f"{offer.code}" if offer.bits is None else f"{offer.code}: {offer.bits:.1f} bits, all {offer.total:.0f}"
