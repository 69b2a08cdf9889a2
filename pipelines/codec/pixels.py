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
from typing import NamedTuple

import numpy as np
import torch
from constriction import stream
from torch import Tensor

from configs.errors import UserError
from pipelines.codec.coder import OFFSETS, clearest, out_of_step
from stage1_vqvae.model import VQVAE
from stage1_vqvae.objectives.contract import Turn
from stage1_vqvae.quantizers.contract import Codes
from stage1_vqvae.training.batching import batches
from stage1_vqvae.training.progress import progress_bar

MARGIN = 1e-12
"""How near a probability may lie to a rounding boundary: ninety times what batch size and threads were found to change
(docs/likelihoods.md).
"""

_STEPS = 2**20  # of a probability
# Probabilities of a batch's turn: 128 MiB.
_PROBABILITIES_AT_ONCE = 2**24
# Values that share an offset: fewer would store more offsets, more leave none that keeps clear of all of them.
_SHARING = 2**13


class CodedPixels(NamedTuple):
    """Pixels of some images as bytes, with all that decoding needs besides the tokenizer and the codes."""

    payload: bytes
    batch: int
    """Images that take turns channel by channel; the last batch may have fewer."""
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
            values = likelihood.values_of(pixels[part])
            turns = (
                (scaled, values[:, turn.channel, turn.rows, turn.columns].flatten())
                for turn, scaled in _turns(tokenizer, codes, part, values, batch)
            )
            for scaled, symbols in _stretches(turns):
                offset, distance = clearest([scaled]) if bool(scaled.isfinite().all()) else (0, math.nan)
                if not distance / _STEPS >= MARGIN:
                    wanted = f"expected probabilities of which a rounding keeps {MARGIN:g} clear"
                    raise UserError(f"the tokenizer: {wanted}, found {distance / _STEPS:g}")
                coder.encode(symbols.numpy().astype(np.int32), family, _weights(scaled, offset))
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
            offset, left = 0, 0  # of this stretch: its offset, and values to come
            for turn, scaled in _turns(tokenizer, codes, part, values, at_once or coded.batch):
                symbols = torch.zeros(len(scaled), dtype=torch.int64)
                done = 0
                while done < len(symbols):
                    if left == 0:
                        offset, left = next(offsets), _SHARING
                    piece = slice(done, min(done + left, len(symbols)))
                    try:
                        symbols[piece] = torch.from_numpy(decoder.decode(family, _weights(scaled[piece], offset)))
                    except AssertionError:  # constriction's word for bytes that no encoder can have made of these weights
                        raise out_of_step("pixels") from None
                    done, left = piece.stop, left - (piece.stop - done)
                target = values[:, turn.channel, turn.rows, turn.columns]
                target.copy_(symbols.view_as(target))
            pixels[part] = likelihood.pixels(values)
            bar.update(len(values))
    if _crc(pixels) != coded.crc or not decoder.maybe_exhausted():
        raise out_of_step("pixels")
    return pixels


def batch_of_pixels(tokenizer: VQVAE, wanted: int) -> int:
    """Images a batch: as many as wanted, or as memory allows."""
    likelihood = tokenizer.likelihood()
    rows, columns, _ = likelihood.turns()[0]
    pixels = (rows.stop - rows.start) * (columns.stop - columns.start)
    return max(1, min(wanted, _PROBABILITIES_AT_ONCE // (pixels * likelihood.num_values)))


def num_offsets(images: int, batch: int, image_shape: tuple[int, int, int]) -> int:
    """How many offsets images (height, width, channels) have in batches of that size."""
    return sum(-(-(part.stop - part.start) * math.prod(image_shape) // _SHARING) for part in batches(images, batch))


def _turns(tokenizer: VQVAE, codes: Codes, part: slice, values: Tensor, at_once: int) -> Iterator[tuple[Turn, Tensor]]:
    """Each turn of some images and the probabilities (N, V) of its values in steps, given those before it, which whoever decodes fills
    into `values` in between.
    """
    assert not tokenizer.training
    device = next(tokenizer.parameters()).device
    assert next(tokenizer.parameters()).dtype == torch.float64
    likelihood, pieces = tokenizer.likelihood(), batches(len(values), at_once)
    mine = [level[part].to(device) for level in codes]
    outputs = [tokenizer.outputs(tuple(level[piece] for level in mine)) for piece in pieces]
    for turn in likelihood.turns():
        found = [
            likelihood.probabilities(output, values[piece].to(device), turn).flatten(0, 2).cpu()
            for output, piece in zip(outputs, pieces, strict=True)
        ]
        yield turn, torch.cat(found) * _STEPS


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
