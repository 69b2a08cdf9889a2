"""Entropy coding of codes: a range coder driven by the prior's probabilities. Independent of files, runs and images.

A decoder must reproduce the encoder's probabilities bit for bit, or everything after the first difference is garbage. But the last bits of
logits depend on the order of additions in a kernel, and so on batch size and threads. Rounding alone does not help, since a logit near a
rounding boundary may still fall on either side. So the encoder makes sure that no logit is near a boundary:

1. Both sides compute one position after another (`step`), in float64.
2. Logits are rounded to multiples of 2^-10 after an offset is added to all logits of a batch. Of 2^16 offsets, multiples of 2^-26, the
   encoder chooses the one that keeps the batch's logits furthest from every boundary, and stores it. The smallest distance must be at
   least `MARGIN`, a hundred times the largest change measured between batch sizes and numbers of threads (docs/compression.md): a decoder
   whose logits agree to within that margin decodes exactly.
3. Everything after that is exact: the integers n = (row's maximum - logit) index a table of floor(2^32 exp(-n / 1024)), computed by
   correctly rounded decimal arithmetic; sums of these weights are exact in float64, and constriction's range coder maps equal weights to
   equal intervals, none of them empty.

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
"""Smallest distance of a logit from a rounding boundary."""

OFFSETS = 2**16
"""Number of rounding offsets to choose from, within one rounding step."""

MOST_IMAGES = 2**8
"""Largest number of images per batch: a file takes 2 bytes per batch that its header declares."""

_STEPS = 2**10  # rounding steps of a logit per nat
_WEIGHT_BITS = 32
# Larger float64 logits are too coarse for the margin.
_LARGEST_LOGIT = 2.0**14
# Most logits of a batch, stored while it is coded: 128 MiB. For more, no offset avoids all boundaries.
_LOGITS_AT_ONCE = 2**24
_LOOK_AHEAD = 64  # bits of the range coder's state


class Coded(NamedTuple):
    """Coded codes of some images, with everything that decoding needs besides the prior and the labels."""

    payload: bytes
    images: int
    batch: int
    """Images per batch, which share an offset and whose codes follow one another at each position; the last batch may have fewer."""
    offsets: list[int]
    """Rounding offset of each batch, in units of 2^-26."""
    codes_crc: int
    """CRC-32 of the codes, to detect a decoder that got out of step."""


class Encoding(NamedTuple):
    """The result of `encode`."""

    coded: Coded
    bits: float
    """-log2 p of all codes under the prior, in float64, without rounding."""
    clearance: float
    """Smallest distance of a logit from a rounding boundary; infinite if there is nothing to code."""


def code_batch_size(layout: SequenceLayout, requested: int) -> int:
    """Choose the images per batch of a prior with this `draw_layout`: the requested number, or fewer if memory and offsets demand it."""
    return max(1, min(requested, MOST_IMAGES, _LOGITS_AT_ONCE // sum(layout.sizes)))


@torch.no_grad()
def encode(prior: StepwisePrior, codes: Codes, labels: Tensor | None, batch: int, progress: bool = False) -> Encoding:
    """Encode the codes of images under a prior.

    Args:
        prior: in eval mode and float64.
        codes: int64 (N, h, w) per level.
        labels: (N,), or None for no label.
        batch: images per batch, from `code_batch_size`.
        progress: show a bar.
    Errors: UserError if the prior's logits cannot be coded.
    """
    sequences = prior.draw_layout.flat(codes).cpu()
    coder, family, offsets = stream.queue.RangeEncoder(), stream.model.Categorical(perfect=False), []
    nats, clearance = 0.0, math.inf
    with progress_bar(len(sequences), "encode", "img", shown=progress) as bar:
        for part in batches(len(sequences), batch):
            rows = sequences[part]
            step = _step_function(prior, None if labels is None else labels[part], len(rows), len(rows))
            logits = [step(rows[:, position - 1] if position else None) for position in range(sequences.shape[1])]
            offset, distance = clear_offset(logits)
            if distance < MARGIN:
                expected = f"expected logits at least {MARGIN:g} from rounding boundaries"
                raise UserError(f"the prior: {expected}, found {distance:g}; take a smaller batch")
            for position, position_logits in enumerate(logits):
                nats += float(F.cross_entropy(position_logits, rows[:, position], reduction="sum"))
                if position_logits.shape[1] > 1:
                    coder.encode(rows[:, position].numpy().astype(np.int32), family, weights(position_logits, offset))
            offsets.append(offset)
            clearance = min(clearance, distance)
            bar.update(len(rows))
    payload = coder.get_compressed().astype("<u4").tobytes()
    return Encoding(Coded(payload, len(sequences), batch, offsets, _crc(sequences)), nats / math.log(2), clearance)


@torch.no_grad()
def decode(prior: StepwisePrior, coded: Coded, labels: Tensor | None, at_once: int | None = None, progress: bool = False) -> Codes:
    """Decode codes, int64 (N, h, w) per level, on the CPU.

    Memory grows with the decoded codes, and decoding ends as soon as these are more than the payload can hold.

    Args:
        prior, labels: those of `encode`.
        coded: its result.
        at_once: images per step of the prior; None: a batch. Does not change the codes.
        progress: show a bar.
    Errors: UserError if they are not those that were encoded.
    """
    layout = prior.draw_layout
    most = code_batch_size(layout, MOST_IMAGES)
    if coded.batch > most:
        raise UserError(f"decoding: expected batches of at most {most} images of this prior's codes, found {coded.batch}")
    decoder, family = (
        stream.queue.RangeDecoder(np.frombuffer(coded.payload, "<u4").astype(np.uint32)),
        stream.model.Categorical(perfect=False),
    )
    decoded, bits = [torch.zeros(0, layout.length, dtype=torch.int64)], 0.0
    with progress_bar(coded.images, "decode", "img", shown=progress) as bar:
        for part, offset in zip(batches(coded.images, coded.batch), coded.offsets, strict=True):
            rows = torch.zeros(part.stop - part.start, layout.length, dtype=torch.int64)
            step = _step_function(prior, None if labels is None else labels[part], len(rows), at_once or len(rows))
            for position, k in enumerate(layout.sizes):
                logits = step(rows[:, position - 1] if position else None)
                if k > 1:
                    try:
                        position_codes = decoder.decode(family, position_weights := weights(logits, offset))
                    except AssertionError:  # raised by constriction for bytes that no encoder can have made from these weights
                        raise decoding_error("codes") from None
                    rows[:, position] = torch.from_numpy(position_codes)
                    bits += _least_bits(position_weights, position_codes)
            # Beyond its end, a payload reads as zeros forever.
            if bits > 8 * len(coded.payload) + _LOOK_AHEAD:
                raise decoding_error("codes")
            decoded.append(rows)
            bar.update(len(rows))
    sequences = torch.cat(decoded)
    if _crc(sequences) != coded.codes_crc or not decoder.maybe_exhausted():
        raise decoding_error("codes")
    return layout.grids_of(sequences)


def _step_function(prior: StepwisePrior, labels: Tensor | None, images: int, at_once: int) -> Callable[[Tensor | None], Tensor]:
    """Return a function from the codes (B,) of the previous position of a batch to the logits (B, K) of the next, on the CPU."""
    assert not prior.training
    assert next(prior.parameters()).dtype == torch.float64
    parts = batches(images, at_once)
    caches = [prior.new_cache(part.stop - part.start) for part in parts]
    if labels is not None:
        labels = labels.to(prior.device)

    def step(previous: Tensor | None) -> Tensor:
        if previous is not None:
            previous = previous.to(prior.device)
        return torch.cat(
            [
                prior.step(None if previous is None else previous[part], None if labels is None else labels[part], cache)
                for part, cache in zip(parts, caches, strict=True)
            ]
        ).cpu()

    return step


def clear_offset(logits: list[Tensor]) -> tuple[int, float]:
    """Return the rounding offset, in units of 2^-26, that keeps logits (B, K) furthest from every boundary, and the smallest distance then.

    Positions with a single code are ignored.

    Errors: UserError for logits that are not finite, or too large.
    """
    relevant = [x for x in logits if x.shape[1] > 1]
    if not all(bool((x.abs() < _LARGEST_LOGIT).all()) for x in relevant):
        raise UserError(f"the prior: expected finite logits below {_LARGEST_LOGIT:g}, to code with, found some that are not")
    # Boundaries are at half steps.
    offset, distance = clearest(x * _STEPS + 0.5 for x in relevant)
    return offset, distance / _STEPS


def clearest(numbers: Iterable[Tensor]) -> tuple[int, float]:
    """Return which of 2^16 offsets, in units of 2^-16, keeps all numbers furthest from integers when added, and the smallest distance then;
    infinite without numbers.

    Each number limits only the offset that brings it nearest to an integer, so a single pass computes the distances of all offsets.
    """
    nearest = torch.full((OFFSETS,), 0.5, dtype=torch.float64)  # in units of 2^-16; a number further away limits another offset
    empty = True
    for x in numbers:
        empty = False
        # Offset that would make each number an integer, modulo 1.
        missing = -x.flatten().remainder(1) * OFFSETS
        offset = missing.round()
        nearest.scatter_reduce_(0, offset.long().remainder(OFFSETS), (missing - offset).abs(), "amin")
    best = int(nearest.argmax())
    return (0, math.inf) if empty else (best, float(nearest[best]) / OFFSETS)


def weights(logits: Tensor, offset: int) -> np.ndarray:
    """Convert logits (B, K) to the coder's weights: integers as float64 (B, K), the largest in each row 2^32."""
    steps = (logits * _STEPS + (offset / OFFSETS + 0.5)).floor().long()
    below = steps.amax(1, keepdim=True) - steps
    table = _table()
    return table[below.clamp(max=len(table) - 1).numpy()]


@functools.cache
def _table() -> np.ndarray:
    """Compute floor(2^32 exp(-n / 1024)) for n from 0 to the first zero; the same on every machine, whatever its libm."""
    context = Context(prec=40, rounding=ROUND_FLOOR)
    last = math.ceil(_STEPS * _WEIGHT_BITS * math.log(2))
    exponentials = (context.exp(context.divide(Decimal(-n), Decimal(_STEPS))) for n in range(last + 1))
    return np.array([int(context.multiply(Decimal(2**_WEIGHT_BITS), value)) for value in exponentials], np.float64)


def _least_bits(code_weights: np.ndarray, codes: np.ndarray) -> float:
    """Compute a lower bound on the bits of codes (B,) under weights (B, K), which the coder rounds to multiples of 2^-24 of their sum."""
    probabilities = np.take_along_axis(code_weights, codes[:, None].astype(np.int64), 1)[:, 0] / code_weights.sum(1)
    return float(-np.log2(probabilities + 2.0**-22).sum())


def _crc(sequences: Tensor) -> int:
    return zlib.crc32(sequences.numpy().astype("<i8").tobytes())


def decoding_error(content: str) -> UserError:
    """Return the error of a decoder that did not reproduce the encoder's `content`: codes or pixels."""
    return UserError(
        f"decoding: expected the {content} that were encoded, found others: this machine's arithmetic differs from the encoder's, or the "
        "payload is another file's"
    )
