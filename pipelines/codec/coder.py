"""Codes to bytes and back: the prior's probabilities drive a range coder. Knows priors and codes; nothing of files, runs, images.

A decoder must arrive at the encoder's probabilities bit for bit, or it reads nonsense from there on. But logits depend on the
order in which a kernel adds, and so on batch size and threads, in their last bits. Rounding them does not cure that: a
logit beside a boundary still falls to either side. So the encoder sees to it that none lies there:

1. Both sides ask the prior for one position after another (`step`), in float64.
2. Logits are rounded to multiples of 2^-10, after an offset has been added to all of a batch. Of 2^16 offsets, from 0 on in
   steps of 2^-26, the encoder takes the one that keeps the batch's logits furthest from every boundary, and stores it. None is
   then nearer than `MARGIN`, a hundred times what batch size and threads were found to change (docs/compression.md): a
   decoder whose logits agree to within that margin, which is what these cannot break, decodes exactly.
3. From there on all is exact: integers n = (row's maximum - logit) look up floor(2^32 exp(-n / 1024)) in a table made by
   correctly rounded decimal arithmetic; sums of these weights are exact in float64, and constriction's range coder makes
   of equal weights equal intervals, none of them empty.

Rounding and coder cost about 0.01 % (step 2^-10 in a logit) and at most two words of 4 bytes at the end.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterable
from decimal import ROUND_FLOOR, Context, Decimal
from typing import NamedTuple

import numpy as np
import torch
from constriction import stream
from torch import Tensor
from torch.nn import functional as F

from configs.errors import UserError
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.priors.stepwise import StepwisePrior
from training.batching import batches
from training.progress import progress_bar

MARGIN = 1e-11
"""How near a logit may lie to a rounding boundary."""

OFFSETS = 2**16
"""How many offsets of a rounding there are to choose from, in one step of it."""

MOST_IMAGES = 2**8
"""Images of a batch at most, whatever its codes: a file pays 2 bytes for each batch that it announces."""

_STEPS = 2**10  # of a logit, in one nat
_WEIGHT_BITS = 32
# From here on float64 logits are too coarse for the margin.
_LARGEST_LOGIT = 2.0**14
# Of one batch, kept while it is coded: 128 MiB. More would also leave no offset that keeps clear of all of them.
_LOGITS_AT_ONCE = 2**24
_LOOK_AHEAD = 64  # bits of the range coder's state


class Coded(NamedTuple):
    """Codes of some images as bytes, with all that decoding needs besides the prior and the labels."""

    payload: bytes
    images: int
    batch: int
    """Images that share an offset and take turns position by position; the last batch may have fewer."""
    offsets: list[int]
    """The rounding offset of each batch, in units of 2^-26."""
    codes_crc: int
    """CRC-32 of the codes, so that a decoder that fell out of step does not pass for one that did not."""


class Encoding(NamedTuple):
    """The result of `encode`."""

    coded: Coded
    bits: float
    """-log2 p of all codes under the prior itself, in float64, without any rounding."""
    clearance: float
    """The smallest distance of a logit from a rounding boundary; infinite if there is nothing to code."""


def batch_images(layout: SequenceLayout, wanted: int) -> int:
    """Images a batch: as many as wanted, or as memory and offsets allow."""
    logits = sum(length * k for length, k in zip(layout.lengths, layout.num_codes, strict=True))
    return max(1, min(wanted, MOST_IMAGES, _LOGITS_AT_ONCE // logits))


@torch.no_grad()
def encode(prior: StepwisePrior, codes: Codes, labels: Tensor | None, batch: int, progress: bool = False) -> Encoding:
    """Encode the codes of images under a prior.

    Args:
        prior: in eval mode and float64.
        codes: int64 (N, h, w) a level.
        labels: (N,), or None for no label.
        batch: images a batch, from `batch_images`.
    Errors: UserError if the prior's logits cannot be coded.
    """
    sequences = prior.layout.flat(codes).cpu()
    coder, family, offsets = stream.queue.RangeEncoder(), stream.model.Categorical(perfect=False), []
    nats, clearance = 0.0, math.inf
    with progress_bar(len(sequences), "encode", "img", shown=progress) as bar:
        for part in batches(len(sequences), batch):
            of_batch = sequences[part]
            step = _steps(prior, None if labels is None else labels[part], len(of_batch), len(of_batch))
            logits = [step(of_batch[:, position - 1] if position else None) for position in range(sequences.shape[1])]
            offset, distance = clear_offset(logits)
            if distance < MARGIN:
                raise UserError(
                    f"the prior: expected logits of which a rounding keeps {MARGIN:g} clear, found {distance:g}; take a smaller batch"
                )
            for position, found in enumerate(logits):
                nats += float(F.cross_entropy(found, of_batch[:, position], reduction="sum"))
                if found.shape[1] > 1:
                    coder.encode(of_batch[:, position].numpy().astype(np.int32), family, weights(found, offset))
            offsets.append(offset)
            clearance = min(clearance, distance)
            bar.update(len(of_batch))
    payload = coder.get_compressed().astype("<u4").tobytes()
    return Encoding(Coded(payload, len(sequences), batch, offsets, _crc(sequences)), nats / math.log(2), clearance)


@torch.no_grad()
def decode(prior: StepwisePrior, coded: Coded, labels: Tensor | None, at_once: int | None = None, progress: bool = False) -> Codes:
    """The codes again, int64 (N, h, w) a level, on the CPU.

    Args:
        prior, labels: as given to `encode`.
        coded: what it made.
        at_once: images in one step of the prior; None: a batch. Of no influence on the codes.
    Memory grows with the codes that were decoded, and decoding ends as soon as they are more than the payload can hold.

    Errors: UserError if they are not those that were encoded.
    """
    layout = prior.layout
    most = batch_images(layout, MOST_IMAGES)
    if coded.batch > most:
        raise UserError(f"decoding: expected batches of at most {most} images of this prior's codes, found {coded.batch}")
    sizes = [layout.num_codes[layout.level_of(position)] for position in range(layout.length)]
    decoder, family = (
        stream.queue.RangeDecoder(np.frombuffer(coded.payload, "<u4").astype(np.uint32)),
        stream.model.Categorical(perfect=False),
    )
    decoded, bits = [torch.zeros(0, layout.length, dtype=torch.int64)], 0.0
    with progress_bar(coded.images, "decode", "img", shown=progress) as bar:
        for part, offset in zip(batches(coded.images, coded.batch), coded.offsets, strict=True):
            of_batch = torch.zeros(part.stop - part.start, layout.length, dtype=torch.int64)
            step = _steps(prior, None if labels is None else labels[part], len(of_batch), at_once or len(of_batch))
            for position, k in enumerate(sizes):
                logits = step(of_batch[:, position - 1] if position else None)
                if k > 1:
                    try:
                        found = decoder.decode(family, chances := weights(logits, offset))
                    except AssertionError:  # constriction's word for bytes that no encoder can have made of these weights
                        raise decoding_error("codes") from None
                    of_batch[:, position] = torch.from_numpy(found)
                    bits += _least_bits(chances, found)
            # Behind its end a payload reads as zeros, for ever.
            if bits > 8 * len(coded.payload) + _LOOK_AHEAD:
                raise decoding_error("codes")
            decoded.append(of_batch)
            bar.update(len(of_batch))
    sequences = torch.cat(decoded)
    if _crc(sequences) != coded.codes_crc or not decoder.maybe_exhausted():
        raise decoding_error("codes")
    return layout.grids_of(sequences)


def _steps(prior: StepwisePrior, labels: Tensor | None, images: int, at_once: int) -> Callable[[Tensor | None], Tensor]:
    """`prior.step` of one batch on the CPU: from the codes (B,) of the position before to the next position's logits (B, K)."""
    assert not prior.training
    assert next(prior.parameters()).dtype == torch.float64
    parts = batches(images, at_once)
    caches = [prior.new_cache(part.stop - part.start) for part in parts]
    if labels is not None:
        labels = labels.to(prior.device)

    def step(before: Tensor | None) -> Tensor:
        if before is not None:
            before = before.to(prior.device)
        return torch.cat(
            [
                prior.step(None if before is None else before[part], None if labels is None else labels[part], cache)
                for part, cache in zip(parts, caches, strict=True)
            ]
        ).cpu()

    return step


def clear_offset(logits: list[Tensor]) -> tuple[int, float]:
    """The rounding offset of logits (B, K), in units of 2^-26, that keeps them furthest from every boundary, and how far that is.

    Where there is but one code, its logit does not matter.

    Errors: UserError for logits that are not finite, or too large.
    """
    found = [x for x in logits if x.shape[1] > 1]
    if not all(bool((x.abs() < _LARGEST_LOGIT).all()) for x in found):
        raise UserError(f"the prior: expected finite logits below {_LARGEST_LOGIT:g}, to code with, found some that are not")
    # Boundaries lie at halves of a step.
    offset, distance = clearest(x * _STEPS + 0.5 for x in found)
    return offset, distance / _STEPS


def clearest(numbers: Iterable[Tensor]) -> tuple[int, float]:
    """Which of 2^16 offsets, in units of 2^-16, to add to all numbers so that none lies near a whole one, and how near the nearest then
    is; infinite without numbers.

    A number is dangerous to the one offset that brings it nearest to a whole one: a single pass finds all offsets' distances.
    """
    nearest = torch.full((OFFSETS,), 0.5, dtype=torch.float64)  # in 2^-16; a number further away is nearer to another offset
    empty = True
    for x in numbers:
        empty = False
        # What an offset would have to add to get there, modulo 1.
        missing = -x.flatten().remainder(1) * OFFSETS
        offset = missing.round()
        nearest.scatter_reduce_(0, offset.long().remainder(OFFSETS), (missing - offset).abs(), "amin")
    best = int(nearest.argmax())
    return (0, math.inf) if empty else (best, float(nearest[best]) / OFFSETS)


def weights(logits: Tensor, offset: int) -> np.ndarray:
    """Logits (B, K) to what the coder takes for probabilities: integers as float64 (B, K), the largest of a row 2^32."""
    steps = (logits * _STEPS + (offset / OFFSETS + 0.5)).floor().long()
    below = steps.amax(1, keepdim=True) - steps
    table = _table()
    return table[below.clamp(max=len(table) - 1).numpy()]


@functools.cache
def _table() -> np.ndarray:
    """floor(2^32 exp(-n / 1024)) for n from 0 to the first that gives 0; the same on every machine, whatever its libm."""
    context = Context(prec=40, rounding=ROUND_FLOOR)
    last = math.ceil(_STEPS * _WEIGHT_BITS * math.log(2))
    exponentials = (context.exp(context.divide(Decimal(-n), Decimal(_STEPS))) for n in range(last + 1))
    return np.array([int(context.multiply(Decimal(2**_WEIGHT_BITS), value)) for value in exponentials], np.float64)


def _least_bits(chances: np.ndarray, codes: np.ndarray) -> float:
    """Bits (at least) that codes (B,) take in a payload under weights (B, K), which the coder rounds to multiples of 2^-24 of their sum."""
    chosen = np.take_along_axis(chances, codes[:, None].astype(np.int64), 1)[:, 0] / chances.sum(1)
    return float(-np.log2(chosen + 2.0**-22).sum())


def _crc(sequences: Tensor) -> int:
    return zlib.crc32(sequences.numpy().astype("<i8").tobytes())


def decoding_error(what: str) -> UserError:
    """What is said of a decoder that did not arrive at the encoder's codes or pixels."""
    return UserError(
        f"decoding: expected the {what} that were encoded, found others: this machine's arithmetic is not the one that encoded them, or "
        "the payload is another's"
    )
