"""Entropy coding of pixels under p(x | z), for lossless files. Independent of files and runs.

As in coder.py, a decoder must reproduce the encoder's numbers bit for bit, and the encoder makes sure that it can. Here the numbers are
probabilities of a pixel's values in float64: each is rounded down to a multiple of 2^-20 after adding an offset, which some thousand pixels
share and which keeps all of them away from rounding boundaries. Adding one more multiple to each value, so that none is impossible, costs
less than 256 parts of 2^20: 0.0004 bits per channel of a pixel.

The stream goes batch by batch, and in a batch turn by turn of the likelihood (objectives/contract.py): channel by channel or, where pixels
depend on their neighbours, pixel by pixel, each for all images of the batch.
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
from pipelines.codec.coder import OFFSETS, clearest, decoding_error
from stage1_vqvae.model import VQVAE
from stage1_vqvae.objectives.contract import Index
from stage1_vqvae.quantizers.contract import Codes
from training.batching import batches
from training.progress import progress_bar

MARGIN = 1e-12
"""Smallest distance of a probability from a rounding boundary: ninety times the largest change measured between batch sizes and numbers of
threads (docs/likelihoods.md).
"""

_STEPS = 2**20  # of a probability
# Most probabilities of a batch's turn, or outputs of the decoder for a batch: 128 MiB.
_NUMBERS_AT_ONCE = 2**24
# Values per offset: fewer need more offsets; for more, no offset avoids all boundaries.
_SHARING = 2**13


class CodedPixels(NamedTuple):
    """Coded pixels of some images, with everything that decoding needs besides the tokenizer and the codes."""

    payload: bytes
    batch: int
    """Images per batch, whose values follow one another in each turn; the last batch may have fewer."""
    offsets: list[int]
    """Rounding offset of each stretch of 2^13 values in units of 2^-36; the last stretch of a batch may be shorter."""
    crc: int
    """CRC-32 of the pixels."""


@torch.no_grad()
def encode_pixels(tokenizer: VQVAE, codes: Codes, pixels: Tensor, batch: int, progress: bool = False) -> tuple[CodedPixels, float]:
    """Encode pixels given their codes. Returns them and the smallest distance of a probability from a rounding boundary.

    Args:
        tokenizer: in eval mode and float64, its objective a likelihood.
        codes: int64 (N, h, w) per level.
        pixels: uint8 (N, H, W, C).
        batch: images per batch.
        progress: show a bar.
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
                    expected = f"expected probabilities at least {MARGIN:g} from rounding boundaries"
                    raise UserError(f"the tokenizer: {expected}, found {distance / _STEPS:g}")
                coder.encode(symbols.numpy().astype(np.int32), family, _weights(scaled, offset))
                offsets.append(offset)
                clearance = min(clearance, distance / _STEPS)
    payload = coder.get_compressed().astype("<u4").tobytes()
    return CodedPixels(payload, batch, offsets, _crc(pixels)), clearance


@torch.no_grad()
def decode_pixels(tokenizer: VQVAE, codes: Codes, coded: CodedPixels, at_once: int | None = None, progress: bool = False) -> Tensor:
    """Decode pixels, uint8 (N, H, W, C).

    Args:
        tokenizer, codes: those of `encode_pixels`.
        coded: its result.
        at_once: images per pass of the decoder; None: a batch. Does not change the pixels.
    Errors: UserError if they are not those that were encoded.
    """
    if coded.batch != (most := pixel_batch_size(tokenizer, coded.batch)):
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
        raise decoding_error("pixels")
    return pixels


class _Values:
    """Reader of a payload's values, turn by turn."""

    def __init__(self, coded: CodedPixels) -> None:
        self._decoder = stream.queue.RangeDecoder(np.frombuffer(coded.payload, "<u4").astype(np.uint32))
        self._offsets = iter(coded.offsets)
        self._offset = self._left = 0  # of the current stretch: offset, and number of values left

    def next(self, scaled: Tensor) -> Tensor:
        """Decode a turn's values (N,) from their probabilities (N, V) in steps."""
        parts, family = [], stream.model.Categorical(perfect=False)
        while len(scaled):
            if self._left == 0:
                self._offset, self._left = next(self._offsets), _SHARING
            piece, scaled = scaled[: self._left], scaled[self._left :]
            try:
                parts.append(torch.from_numpy(self._decoder.decode(family, _weights(piece, self._offset))))
            except AssertionError:  # raised by constriction for bytes that no encoder can have made from these weights
                raise decoding_error("pixels") from None
            self._left -= len(piece)
        return torch.cat(parts).long()

    def end_stretch(self) -> None:
        """End the last stretch of a batch."""
        self._left = 0

    def exhausted(self) -> bool:
        """Whether only the coder's final words are left."""
        return bool(self._decoder.maybe_exhausted())


def pixel_batch_size(tokenizer: VQVAE, requested: int) -> int:
    """Choose the images per batch: the requested number, or fewer if memory demands it."""
    likelihood, (_, height, width) = tokenizer.likelihood(), tokenizer.image_shape
    numbers = max(likelihood.pixels_per_turn * likelihood.num_values, likelihood.output_channels * height * width)
    return max(1, min(requested, _NUMBERS_AT_ONCE // numbers))


def num_offsets(images: int, batch: int, image_shape: tuple[int, int, int]) -> int:
    """Compute the number of offsets of images (height, width, channels) in batches of this size."""
    full, rest = divmod(images, batch)
    return sum(times * -(-size * math.prod(image_shape) // _SHARING) for times, size in ((full, batch), (1, rest)))


def _turns(tokenizer: VQVAE, codes: Codes, part: slice, values: Tensor, at_once: int, bar: Any) -> Iterator[tuple[Index, Tensor]]:
    """Yield probabilities (N, V) like `PixelLikelihood.sequential_probabilities`, for `at_once` images per pass of the network.

    Args:
        values: values of the pixels on the tokenizer's device, read turn by turn.
        bar: progress bar over images, which each turn advances by its share.
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
    """Regroup rows (N, V), (N,) into stretches of 2^13, of which the last may be shorter."""
    pending: list[tuple[Tensor, Tensor]] = []
    count = 0
    for rows in turns:
        pending.append(rows)
        count += len(rows[0])
        if count >= _SHARING:
            scaled, symbols = (torch.cat(tensors) for tensors in zip(*pending, strict=True))
            complete = count - count % _SHARING
            for stretch in batches(complete, _SHARING):
                yield scaled[stretch], symbols[stretch]
            pending, count = [(scaled[complete:], symbols[complete:])], count - complete
    if count:
        scaled, symbols = (torch.cat(tensors) for tensors in zip(*pending, strict=True))
        yield scaled, symbols


def _weights(scaled: Tensor, offset: int) -> np.ndarray:
    """Round probabilities (N, V) in steps to the coder's weights: whole numbers from 1, as float64."""
    return (scaled + offset / OFFSETS).floor().add_(1).numpy()


def _crc(pixels: Tensor) -> int:
    return zlib.crc32(pixels.contiguous().numpy().tobytes())
