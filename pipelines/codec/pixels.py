"""Pixels to bytes and back under p(x | z): what lossless compression adds to the codes. Knows tokenizers; nothing of files or runs.

As in coder.py, a decoder must arrive at the encoder's numbers bit for bit, and the encoder sees to it that it can. Here these are
probabilities of a pixel's values, in float64: each is brought to a whole number of 2^-20, after an offset has been added to all
of some thousand pixels, which is chosen so that none lies near a whole one. One more for each value, and none is impossible.
This costs less than 256 parts of 2^20: 0.0004 bits a channel of a pixel.

The stream runs through batches of images, channel by channel, in raster order.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from constriction import stream
from torch import Tensor

from configs.errors import UserError
from pipelines.codec.coder import OFFSETS, clearest, out_of_step
from stage1_vqvae.model import VQVAE
from stage1_vqvae.quantizers.contract import Codes
from stage1_vqvae.training.batching import batches
from stage1_vqvae.training.progress import progress_bar

MARGIN = 1e-12
"""How near a probability may lie to a rounding boundary: ninety times what batch size and threads were found to change
(docs/likelihoods.md).
"""

_STEPS = 2**20  # of a probability
# Probabilities of a batch's channel: 128 MiB.
_PROBABILITIES_AT_ONCE = 2**24
# Channels of pixels that share an offset: fewer would store more offsets, more leave none that keeps clear of all of them.
_SHARING = 2**13


class CodedPixels(NamedTuple):
    """Pixels of some images as bytes, with all that decoding needs besides the tokenizer and the codes."""

    payload: bytes
    batch: int
    """Images that take turns channel by channel; the last batch may have fewer."""
    offsets: list[int]
    """The rounding offset of each stretch of 2^13 channels of pixels, in units of 2^-36."""
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
            values = likelihood.values_of(pixels[part])
            for channel, probabilities in _channels(tokenizer, codes, part, values, batch):
                symbols = values[:, channel].flatten().numpy().astype(np.int32)
                for stretch in batches(len(symbols), _SHARING):
                    scaled = probabilities[stretch] * _STEPS
                    offset, distance = clearest([scaled]) if bool(scaled.isfinite().all()) else (0, math.nan)
                    if not distance / _STEPS >= MARGIN:
                        wanted = f"expected probabilities of which a rounding keeps {MARGIN:g} clear"
                        raise UserError(f"the tokenizer: {wanted}, found {distance / _STEPS:g}")
                    coder.encode(symbols[stretch], family, _weights(scaled, offset))
                    offsets.append(offset)
                    clearance = min(clearance, distance / _STEPS)
            bar.update(len(values))
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
    channels, height, width = tokenizer.image_shape
    likelihood, family, offsets = tokenizer.likelihood(), stream.model.Categorical(perfect=False), iter(coded.offsets)
    decoder = stream.queue.RangeDecoder(np.frombuffer(coded.payload, "<u4").astype(np.uint32))
    pixels = torch.zeros(len(codes[0]), height, width, channels, dtype=torch.uint8)
    with progress_bar(len(pixels), "decode pixels", "img", shown=progress) as bar:
        for part in batches(len(pixels), coded.batch):
            values = torch.zeros(part.stop - part.start, channels, height, width, dtype=torch.int64)
            for channel, probabilities in _channels(tokenizer, codes, part, values, at_once or coded.batch):
                symbols = torch.zeros(len(probabilities), dtype=torch.int64)
                for stretch in batches(len(symbols), _SHARING):
                    weights = _weights(probabilities[stretch] * _STEPS, next(offsets))
                    try:
                        symbols[stretch] = torch.from_numpy(decoder.decode(family, weights))
                    except AssertionError:  # constriction's word for bytes that no encoder can have made of these weights
                        raise out_of_step("pixels") from None
                values[:, channel] = symbols.view(-1, height, width)
            pixels[part] = likelihood.pixels(values)
            bar.update(len(values))
    if _crc(pixels) != coded.crc or not decoder.maybe_exhausted():
        raise out_of_step("pixels")
    return pixels


def batch_of_pixels(tokenizer: VQVAE, wanted: int) -> int:
    """Images a batch: as many as wanted, or as memory allows."""
    _, height, width = tokenizer.image_shape
    return max(1, min(wanted, _PROBABILITIES_AT_ONCE // (height * width * tokenizer.likelihood().num_values)))


def num_offsets(images: int, batch: int, image_shape: tuple[int, int, int]) -> int:
    """How many offsets images (channels, height, width) have in batches of that size."""
    channels, height, width = image_shape
    return sum(channels * -(-(part.stop - part.start) * height * width // _SHARING) for part in batches(images, batch))


def _channels(tokenizer: VQVAE, codes: Codes, part: slice, values: Tensor, at_once: int) -> Iterator[tuple[int, Tensor]]:
    """Each channel of some images and the probabilities (B H W, V) of its values given those before it, which whoever decodes fills
    into `values` in between.
    """
    assert not tokenizer.training
    device = next(tokenizer.parameters()).device
    assert next(tokenizer.parameters()).dtype == torch.float64
    likelihood, pieces = tokenizer.likelihood(), batches(len(values), at_once)
    mine = [level[part].to(device) for level in codes]
    outputs = [tokenizer.outputs(tuple(level[piece] for level in mine)) for piece in pieces]
    for channel in range(values.shape[1]):
        found = [
            likelihood.probabilities(output, values[piece].to(device), channel).flatten(0, 2).cpu()
            for output, piece in zip(outputs, pieces, strict=True)
        ]
        yield channel, torch.cat(found)


def _weights(scaled: Tensor, offset: int) -> np.ndarray:
    """Probabilities (N, V) in steps to what the coder takes for them: whole numbers from 1 on, as float64."""
    return (scaled + offset / OFFSETS).floor().add_(1).numpy()


def _crc(pixels: Tensor) -> int:
    return zlib.crc32(pixels.contiguous().numpy().tobytes())
