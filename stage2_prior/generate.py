"""Drawing codes from a prior: warp the logits, draw, go on to the next position.

A sample is a function of (seed, its number, label, weights): its uniforms are drawn once, on the CPU, and turned into
codes by inverting the cumulative distribution. So it is the same whatever it is batched with.

`generate` goes from position to position; a `Sampler` does the same on a GPU by CUDA graphs, in which guidance, warp and draw are too.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from configs.errors import UserError, say
from configs.schema import Sampling
from stage1_vqvae.quantizers.contract import Codes
from stage1_vqvae.training.devices import as_float64, float64_device
from stage1_vqvae.training.kernels import Kernel
from stage1_vqvae.training.precision import full_precision
from stage1_vqvae.training.randomness import generator
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.priors.contract import AutoregressivePrior, FixedBatch
from stage2_prior.priors.cuda_graphs import CaptureError, Graphs


def _load_draw() -> Callable[..., Any]:
    from stage2_prior.draw_kernel import draw_code

    return draw_code


_DRAW = Kernel("drawing", _load_draw)


def default_precision(device: torch.device) -> Literal["float64", "float32", "bfloat16"]:
    """The precision that a prior draws in where nobody says: float64 on a CPU; on a GPU bfloat16 if it has it, otherwise float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "float64" if device.type == "cpu" else "float32"


def in_bfloat16(prior: AutoregressivePrior) -> AutoregressivePrior:
    """A copy of a prior with weights in bfloat16, to draw from. The angles of its positions stay as they are."""
    prior = copy.deepcopy(prior)
    for parameter in prior.parameters():
        parameter.data = parameter.data.bfloat16()
    return prior


def uniforms(seed: int, numbers: Tensor, length: int) -> Tensor:
    """The uniforms (B, T), float64 in [0, 1), of the samples of those numbers."""
    rows = [torch.rand(length, generator=generator(seed, "sample", number), dtype=torch.float64) for number in numbers.tolist()]
    return torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.float64)


def guided(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022) on logits: unconditional at scale 0, conditional at 1; any real scale."""
    return unconditional + scale * (conditional - unconditional)


def guidance_scales(config: Sampling, length: int) -> list[float]:
    """The guidance scale of each of `length` positions: config.guidance, or on the way to it from 1 at the first position.

    A rising scale (Chang et al. 2023, "Muse", section 2.7) leaves the first codes, which decide the rest, their variety.
    """
    way = [position / max(1, length - 1) for position in range(length)]
    if config.guidance_schedule == "constant":
        return [config.guidance] * length
    if config.guidance_schedule == "cosine":
        way = [(1 - math.cos(math.pi * share)) / 2 for share in way]
    return [1 + share * (config.guidance - 1) for share in way]


def warp(logits: Tensor, config: Sampling) -> Tensor:
    """Probabilities (B, K), float64, of logits (B, K): temperature, then what may be drawn at all.

    The three limits that follow each look at what those before have left:
    top_k keeps the k likeliest, and those equal to the k-th; top_p the fewest likeliest whose probability reaches p
    (Holtzman et al. 2020); min_p those at least that share as likely as the likeliest (Nguyen et al. 2024).
    """
    logits = as_float64(logits)
    if config.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    if config.temperature != 1:
        logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if config.min_p > 0:
        least = logits.amax(-1, keepdim=True) + math.log(config.min_p)
        below = logits < least
    probabilities = logits.softmax(-1)
    if config.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token is kept if those before it have not yet reached p: the first always is.
        # Less the sum's rounding, which is not to bring in another token where p is just reached.
        kept = ordered.cumsum(-1) - ordered < config.top_p - 1e-12
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered * kept)
    if config.min_p > 0:
        probabilities = probabilities.masked_fill(below, 0)
    return probabilities / probabilities.sum(-1, keepdim=True)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The code (B,) at which the cumulative distribution of (B, K) first exceeds the uniform (B,)."""
    cumulative = probabilities.cumsum(-1)
    # The last sum may be 1 - 1e-16; scaling the uniform by it keeps every draw on a code that has probability.
    threshold = (uniform.to(cumulative) * cumulative[..., -1])[..., None]
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0].clamp_(max=probabilities.shape[-1] - 1)


@torch.no_grad()
def generate(
    prior: AutoregressivePrior,
    labels: Tensor | None,
    uniform: Tensor,
    config: Sampling,
    given: Codes | None = None,
    kept: Codes | None = None,
) -> Codes:
    """Sample codes, one image a row.

    Args:
        prior: in eval mode.
        labels: (B,), or None for no label.
        uniform: (B, T) from `uniforms`.
        config: temperature, top_k, top_p, min_p, guidance.
        given: codes (B, h, w) a level to take over where `kept`, masks (h, w) a level, is true: the others are drawn, each
            given those before it.
    Returns: codes, int64 (B, h, w) a level.
    Errors: UserError if a probability is not finite.
    """
    assert not prior.training
    assert (given is None) == (kept is None)
    device, layout = prior.device, prior.layout
    uniform = uniform.to(float64_device(device))
    batch = len(uniform)
    guides = labels is not None and config.guidance != 1
    labels = None if labels is None else labels.to(device)
    if guides:
        assert labels is not None
        # Conditional and unconditional sequences run in one batch and share every code.
        labels = torch.cat([labels, torch.full_like(labels, prior.num_classes)])
    scales = guidance_scales(config, layout.length)
    cache = prior.new_cache(batch * 2 if guides else batch)
    sequences = layout.flat(given).to(device) if given is not None else torch.empty(batch, layout.length, dtype=torch.int64, device=device)
    drawn = [True] * layout.length if kept is None else (~layout.flat(kept)[0]).tolist()
    code = None
    finite = torch.ones((), dtype=torch.bool, device=uniform.device)
    for position, scale in enumerate(scales):
        logits = full_precision(prior.step(code, labels, cache))
        if drawn[position]:
            if guides:
                logits = guided(logits[:batch], logits[batch:], scale)
            probabilities = warp(logits, config)
            # A softmax with a NaN in it is NaN throughout. Looked at once, at the end: a GPU is not made to wait for it.
            finite &= probabilities[:, 0].isfinite().all()
            sequences[:, position] = draw(probabilities, uniform[:, position])
        code = sequences[:, position].repeat(2) if guides else sequences[:, position]
    _check(bool(finite), config)
    return layout.grids_of(sequences)


def _check(finite: bool, config: Sampling) -> None:
    if not finite:
        raise UserError(f"guidance, temperature: expected finite probabilities, found some that are not ({config})")


class Sampler:
    """`generate` for batch after batch of one prior, whose weights stay: on a GPU by CUDA graphs, a launch a position.

    Graphs are of one batch size and one temperature, top_k, top_p and min_p, with guidance or without; those of the last are kept. Another
    size is captured anew, not filled up to that of the graphs: in less than float64 codes depend on it, and they must not depend on what
    was drawn before.
    """

    def __init__(self, prior: AutoregressivePrior, graphs: bool | None = None) -> None:
        """`prior`: in eval mode. `graphs`: None: where it is on a CUDA device."""
        self.prior, self.layout = prior, prior.layout
        self._graphs = prior.device.type == "cuda" if graphs is None else graphs
        self._key: Hashable = None
        self._steps: _GraphedSteps | None = None
        # The tensors that graphs read and write are one batch's at a time.
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(
        self, labels: Tensor | None, uniform: Tensor, config: Sampling, given: Codes | None = None, kept: Codes | None = None
    ) -> Codes:
        """See `generate`."""
        with self._lock:
            try:
                if self._graphs:
                    return self._steps_for(labels, len(uniform), config).draw(labels, uniform, config, given, kept)
            except CaptureError as error:
                self._graphs, self._steps = False, None
                say(f"warning: sampling goes on without CUDA graphs ({error})")
        return generate(self.prior, labels, uniform, config, given, kept)

    def _steps_for(self, labels: Tensor | None, batch: int, config: Sampling) -> _GraphedSteps:
        """Those of the last batch, if they are of this kind; otherwise new ones."""
        guides = labels is not None and config.guidance != 1
        key = batch, guides, config.temperature, config.top_k, config.top_p, config.min_p
        if self._steps is None or key != self._key:
            self._steps = None  # whose memory the new ones may need
            self._steps, self._key = _GraphedSteps(self.prior, batch, guides, config), key
        return self._steps


class _GraphedSteps:
    """Batches of one size and kind, drawn on the same tensors."""

    def __init__(self, prior: AutoregressivePrior, batch: int, guides: bool, config: Sampling) -> None:
        """Errors: CaptureError for a prior of which no graphs can be made."""
        device, length = prior.device, prior.layout.length

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._prior, self._config, self._guides = prior, config, guides
        self._sequences, self._uniform = zeros(batch, length, dtype=torch.int64), zeros(batch, length, dtype=torch.float64)
        self._labels = zeros(2 * batch if guides else batch, dtype=torch.int64)
        self._scales, self._drawn = zeros(length, dtype=torch.float64), zeros(length, dtype=torch.int32)
        self._temperature = torch.full((1,), config.temperature or 1.0, dtype=torch.float64, device=device)
        self._position, self._failed = zeros(1, dtype=torch.int64), zeros(batch, dtype=torch.int32)
        steps = prior.fixed_steps(FixedBatch(self._sequences, self._labels, self._position))
        if steps is None:
            raise CaptureError("this kind of prior has no steps of fixed shape")
        self._steps, self._graphs = steps, Graphs(device)

    def draw(self, labels: Tensor | None, uniform: Tensor, config: Sampling, given: Codes | None, kept: Codes | None) -> Codes:
        """See `generate`."""
        assert not self._prior.training
        assert (given is None) == (kept is None)
        layout, batch = self._prior.layout, len(self._sequences)
        self._labels.fill_(self._prior.num_classes)
        if labels is not None:
            self._labels[:batch] = labels
        self._uniform.copy_(uniform)
        self._scales.copy_(torch.tensor(guidance_scales(config, layout.length), dtype=torch.float64))
        self._drawn.fill_(1)
        self._sequences.zero_()
        if given is not None and kept is not None:
            self._drawn.copy_(~layout.flat(kept)[0])
            self._sequences.copy_(layout.flat(given))
        self._position.zero_()
        self._failed.zero_()
        for position in range(layout.length):
            self._steps.prepare(position)
            phase = self._steps.phase(position)
            self._graphs.run(phase, partial(self._advance, phase))
        # The only wait: a GPU goes through all positions by itself.
        _check(not bool(self._failed.any()), config)
        return layout.grids_of(self._sequences.clone())

    def _advance(self, phase: Hashable) -> None:
        """One position: from the codes before it to its own."""
        self._draw(self._steps.logits(phase))
        self._position += 1

    def _draw(self, logits: Tensor) -> None:
        """The code of the position: of all codes by one kernel, under limits (top_k and so on) by the plain lines."""
        config, here, batch = self._config, self._position, len(self._sequences)
        all_codes = not 0 < config.top_k < logits.shape[1] and config.top_p == 1 and config.min_p == 0
        if all_codes and _DRAW.usable(logits.device):
            scales = self._scales if self._guides else None
            settings = scales, self._drawn, self._temperature, config.temperature == 0
            if _DRAW(logits, self._uniform, *settings, here, self._sequences, self._failed) is not None:
                return
        logits = full_precision(logits)
        if self._guides:
            logits = guided(logits[:batch], logits[batch:], self._scales.index_select(0, here).to(logits.dtype))
        probabilities, drawn = warp(logits, config), self._drawn.index_select(0, here) != 0
        self._failed |= drawn & ~probabilities[:, 0].isfinite()
        code = draw(probabilities, self._uniform.index_select(1, here)[:, 0])
        code = torch.where(drawn, code, self._sequences.index_select(1, here)[:, 0])
        self._sequences.index_copy_(1, here, code[:, None])


def uniform_codes(layout: SequenceLayout, uniform: Tensor) -> Codes:
    """Codes of the uniform prior from the same uniforms (B, T): each code of a level equally likely."""
    sizes = torch.cat([torch.full((length,), k) for length, k in zip(layout.lengths, layout.num_codes, strict=True)])
    return layout.grids_of((uniform * sizes).long())
