"""Pixels to bytes and back under p(x | z): what lossless compression adds to the codes. Knows tokenizers; nothing of files or runs.

As in coder.py, a decoder must arrive at the encoder's numbers bit for bit, and the encoder sees to it that it can. Here these are
probabilities of a pixel's values, in float64: each is brought to a whole number of 2^-20, after an offset has been added to all
of some thousand pixels, which is chosen so that none lies near a whole one. One more for each value, and none is impossible.
This costs less than 256 parts of 2^20: 0.0004 bits a channel of a pixel.

The stream runs through batches of images, and there from turn to turn of the likelihood (objectives/contract.py): channel by channel,
or, where pixels depend on their neighbours, pixel by pixel, each for all images of the batch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from constriction import stream
from torch import Tensor

from configs.errors import UserError
from pipelines.codec.coder import OFFSETS, clearest, out_of_step
from stage1_vqvae.model import VQVAE
from stage1_vqvae.objectives.contract import Index
from stage1_vqvae.quantizers.contract import Codes
from training.batching import batches
from training.progress import progress_bar

MARGIN = 1e-12
"""How near a probability may lie to a rounding boundary: ninety times what batch size and threads were found to change
(docs/likelihoods.md).
"""

_STEPS = 2**20  # of a probability
# Probabilities of a batch's turn, or what the decoder puts out for the batch: 128 MiB.
_NUMBERS_AT_ONCE = 2**24
# Values that share an offset: fewer would store more offsets, more leave none that keeps clear of all of them.
_SHARING = 2**13


class CodedPixels(NamedTuple):
    """Pixels of some images as bytes, with all that decoding needs besides the tokenizer and the codes."""

    payload: bytes
    batch: int
    """Images of which one after another has its values in each turn; the last batch may have fewer."""
    offsets: list[int]
    """The rounding offset of each stretch of 2^13 values, of which a batch's last may be shorter, in units of 2^-36."""
    crc: int
    """CRC-32 of the pixels."""


@torch.no_grad()
def encode_pixels(tokenizer: VQVAE, codes: Codes, pixels: Tensor, batch: int, progress: bool = False) -> tuple[CodedPixels, float]:
    """Encode pixels given their codes; beside them, how far the nearest probability was from a rounding boundary.

    Args:
        tokenizer: in eval mode and float64, its objective a likelihood.
        codes: int64 (N, h, w) a level.
        pixels: uint8 (N, H, W, C).
        batch: images a batch.
    Errors: UserError if their probabilities cannot be coded.
    """
    coder, family, offsets, clearance = stream.queue.RangeEncoder(), stream.model.Categorical(perfect=False), [], math.inf
    likelihood = tokenizer.likelihood()
    with progress_bar(len(pixels), "encode pixels", "img", shown=progress) as bar:
        for part in batches(len(pixels), batch):
            values = likelihood.values_from_pixels(pixels[part]).to(next(tokenizer.parameters()).device)
            turns = ((scaled, values[index].flatten().cpu()) for index, scaled in _turns(tokenizer, codes, part, values, batch, bar))
            for scaled, symbols in _stretches(turns):
                offset, distance = clearest([scaled]) if bool(scaled.isfinite().all()) else (0, math.nan)
                if not distance / _STEPS >= MARGIN:
                    wanted = f"expected probabilities of which a rounding keeps {MARGIN:g} clear"
                    raise UserError(f"the tokenizer: {wanted}, found {distance / _STEPS:g}")
                coder.encode(symbols.numpy().astype(np.int32), family, _weights(scaled, offset))
                offsets.append(offset)
                clearance = min(clearance, distance / _STEPS)
    payload = coder.get_compressed().astype("<u4").tobytes()
    return CodedPixels(payload, batch, offsets, _crc(pixels)), clearance


@torch.no_grad()
def decode_pixels(tokenizer: VQVAE, codes: Codes, coded: CodedPixels, at_once: int | None = None, progress: bool = False) -> Tensor:
    """The pixels again, uint8 (N, H, W, C).

    Args:
        tokenizer, codes: as given to `encode_pixels`.
        coded: what it made.
        at_once: images in one pass of the decoder; None: a batch. Of no influence on the pixels.
    Errors: UserError if they are not those that were encoded.
    """
    if coded.batch != (most := batch_of_pixels(tokenizer, coded.batch)):
        raise UserError(f"decoding: expected pixels in batches of at most {most} images, found {coded.batch}")
    channels, height, width = tokenizer.image_shape
    device, likelihood, values_in = next(tokenizer.parameters()).device, tokenizer.likelihood(), _Values(coded)
    pixels = torch.zeros(len(codes[0]), height, width, channels, dtype=torch.uint8)
    with progress_bar(len(pixels), "decode pixels", "img", shown=progress) as bar:
        for part in batches(len(pixels), coded.batch):
            values = torch.zeros(part.stop - part.start, channels, height, width, dtype=torch.int64, device=device)
            for index, scaled in _turns(tokenizer, codes, part, values, at_once or coded.batch, bar):
                values[index] = values_in.next(scaled).view_as(values[index])
            values_in.end_stretch()
            pixels[part] = likelihood.pixels(values).cpu()
    if _crc(pixels) != coded.crc or not values_in.exhausted():
        raise out_of_step("pixels")
    return pixels


class _Values:
    """The values in a payload, one turn's after another's."""

    def __init__(self, coded: CodedPixels) -> None:
        self._decoder = stream.queue.RangeDecoder(np.frombuffer(coded.payload, "<u4").astype(np.uint32))
        self._offsets = iter(coded.offsets)
        self._offset = self._left = 0  # of the present stretch: its offset, and how many values are to come

    def next(self, scaled: Tensor) -> Tensor:
        """A turn's values (N,), given their probabilities (N, V) in steps."""
        found, family = [], stream.model.Categorical(perfect=False)
        while len(scaled):
            if self._left == 0:
                self._offset, self._left = next(self._offsets), _SHARING
            piece, scaled = scaled[: self._left], scaled[self._left :]
            try:
                found.append(torch.from_numpy(self._decoder.decode(family, _weights(piece, self._offset))))
            except AssertionError:  # constriction's word for bytes that no encoder can have made of these weights
                raise out_of_step("pixels") from None
            self._left -= len(piece)
        return torch.cat(found).long()

    def end_stretch(self) -> None:
        """A batch ends, and with it its last stretch."""
        self._left = 0

    def exhausted(self) -> bool:
        """Whether no more than the coder's last words are left."""
        return bool(self._decoder.maybe_exhausted())


def batch_of_pixels(tokenizer: VQVAE, wanted: int) -> int:
    """Images a batch: as many as wanted, or as memory allows."""
    likelihood, (_, height, width) = tokenizer.likelihood(), tokenizer.image_shape
    numbers = max(likelihood.pixels_per_turn * likelihood.num_values, likelihood.output_channels * height * width)
    return max(1, min(wanted, _NUMBERS_AT_ONCE // numbers))


def num_offsets(images: int, batch: int, image_shape: tuple[int, int, int]) -> int:
    """How many offsets images (height, width, channels) have in batches of that size."""
    whole, rest = divmod(images, batch)
    return sum(times * -(-size * math.prod(image_shape) // _SHARING) for times, size in ((whole, batch), (1, rest)))


def _turns(tokenizer: VQVAE, codes: Codes, part: slice, values: Tensor, at_once: int, bar: Any) -> Iterator[tuple[Index, Tensor]]:
    """Yield probabilities (N, V) as `PixelLikelihood.sequential_probabilities`, for `at_once` images per pass of the network.

    Args:
        values: on the tokenizer's device.
        bar: of the images; each turn moves it by its share.
    """
    assert not tokenizer.training
    device = next(tokenizer.parameters()).device
    assert next(tokenizer.parameters()).dtype == torch.float64
    passes = []
    for piece in batches(len(values), at_once):
        output = tokenizer.outputs(tuple(level[part][piece].to(device) for level in codes))
        passes.append(tokenizer.likelihood().sequential_probabilities(output, values[piece]))
    count = math.prod(tokenizer.image_shape) // tokenizer.likelihood().pixels_per_turn
    for number, turns in enumerate(zip(*passes, strict=True)):
        index = turns[0][0]
        yield index, torch.cat([probabilities.flatten(0, 2).cpu() for _, probabilities in turns]) * _STEPS
        bar.update(len(values) * (number + 1) // count - len(values) * number // count)


def _stretches(turns: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same rows (N, V), (N,) in stretches of 2^13, of which the last may be shorter."""
    kept: list[tuple[Tensor, Tensor]] = []
    count = 0
    for rows in turns:
        kept.append(rows)
        count += len(rows[0])
        if count >= _SHARING:
            scaled, symbols = (torch.cat(tensors) for tensors in zip(*kept, strict=True))
            whole = count - count % _SHARING
            for stretch in batches(whole, _SHARING):
                yield scaled[stretch], symbols[stretch]
            kept, count = [(scaled[whole:], symbols[whole:])], count - whole
    if count:
        scaled, symbols = (torch.cat(tensors) for tensors in zip(*kept, strict=True))
        yield scaled, symbols


def _weights(scaled: Tensor, offset: int) -> np.ndarray:
    """Probabilities (N, V) in steps to what the coder takes for them: whole numbers from 1 on, as float64."""
    return (scaled + offset / OFFSETS).floor().add_(1).numpy()


def _crc(pixels: Tensor) -> int:
    return zlib.crc32(pixels.contiguous().numpy().tobytes())
