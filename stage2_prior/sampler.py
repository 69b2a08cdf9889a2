"""Sampling batch after batch from one prior; from a stepwise one on a GPU, by CUDA graphs: one launch per position, with guidance and draw.

The codes are those of `prior.sample`, up to rounding; where graphs cannot be captured, `prior.sample` itself draws them.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from configs.errors import say
from configs.parts import Sampling
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.draw import StepwiseSampling, check_finite, draw_position, guidance_scales
from stage2_prior.priors.contract import Keep, Prior
from stage2_prior.priors.cuda_graphs import CaptureError, Graphs
from stage2_prior.priors.stepwise import FixedBatch, StepwisePrior, drawn_positions
from training.kernels import Kernel
from training.precision import full_precision, ieee_float32

Model = TypeVar("Model", bound=Prior)


def _load_draw() -> Callable[..., Any]:
    from stage2_prior.draw_kernel import draw_code

    return draw_code


_DRAW = Kernel("drawing", _load_draw)


def default_precision(device: torch.device) -> Literal["float64", "float32", "bfloat16"]:
    """Default sampling precision: float64 on a CPU; on a GPU bfloat16 where supported, otherwise float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "float64" if device.type == "cpu" else "float32"


def in_bfloat16(prior: Model) -> Model:
    """Copy a prior with bfloat16 parameters, for sampling. Rotary angles (buffers) stay float32."""
    prior = copy.deepcopy(prior)
    for parameter in prior.parameters():
        parameter.data = parameter.data.bfloat16()
    return prior


class Sampler:
    """Draws batches from a prior with fixed weights; from a stepwise one on a GPU with one CUDA graph launch per position.

    Graphs are specific to batch size, temperature, top_k, top_p, min_p and guidance on or off; only the latest set is kept. Another size
    is captured again instead of padded: below float64, codes depend on the batch size, and must not depend on earlier batches.
    """

    def __init__(self, prior: Prior, graphs: bool | None = None) -> None:
        """`prior`: in eval mode. `graphs`: whether to use CUDA graphs; None: if the prior is on a CUDA device."""
        self.prior = prior
        self._graphs = isinstance(prior, StepwisePrior) and (prior.device.type == "cuda" if graphs is None else graphs)
        self._key: Hashable = None
        self._steps: _GraphedSteps | None = None
        # One batch at a time: graphs read and write shared buffers.
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, condition: Tensor | None, noise: Tensor, settings: Sampling, keep: Keep | None = None) -> Codes:
        """Draw one batch; arguments, result and errors as in `Prior.sample`."""
        # Weights in float32 were asked for, and a graph keeps the arithmetic it was captured in.
        with ieee_float32(self.prior.device):
            with self._lock:
                try:
                    if self._replays(settings, keep):
                        return self._steps_for(condition, len(noise), settings).draw(condition, noise, settings, keep)
                except CaptureError as error:
                    self._graphs, self._steps = False, None
                    say(f"warning: sampling without CUDA graphs ({error})")
            return self.prior.sample(condition, noise, settings, keep)

    def _replays(self, settings: Sampling, keep: Keep | None) -> bool:
        """Whether this batch is drawn by graphs, each of which draws one position."""
        return self._graphs and isinstance(self.prior, StepwisePrior) and self.prior.draws_in_raster_order(settings, keep)

    def _steps_for(self, condition: Tensor | None, batch: int, settings: Sampling) -> _GraphedSteps:
        """Reuse the graphs of the last batch if its settings match, otherwise build new ones."""
        assert isinstance(self.prior, StepwisePrior)
        assert isinstance(settings, StepwiseSampling)
        guided = self.prior.needs_two_rows(condition, settings)
        key = batch, guided, settings.temperature, settings.top_k, settings.top_p, settings.min_p
        if self._steps is None or key != self._key:
            self._steps = None  # free their memory before new ones are allocated
            self._steps, self._key = _GraphedSteps(self.prior, batch, guided, settings), key
        return self._steps


class _GraphedSteps:
    """Buffers and graphs for batches of one size and one set of sampling settings."""

    def __init__(self, prior: StepwisePrior, batch: int, guided: bool, settings: StepwiseSampling) -> None:
        """Errors: CaptureError for a prior without static-shape steps."""
        device, length = prior.device, prior.draw_layout.length

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._prior, self._settings, self._guided = prior, settings, guided
        self._sequences, self._noise = zeros(batch, length, dtype=torch.int64), zeros(batch, length, dtype=torch.float64)
        self._condition = prior.null_condition(2 * batch if guided else batch)
        self._scales, self._to_draw = zeros(length, dtype=torch.float64), zeros(length, dtype=torch.int32)
        self._temperature = torch.full((1,), settings.temperature or 1.0, dtype=torch.float64, device=device)
        self._position, self._failed = zeros(1, dtype=torch.int64), zeros(batch, dtype=torch.int32)
        steps = prior.fixed_steps(FixedBatch(self._sequences, self._condition, self._position))
        if steps is None:
            raise CaptureError("this kind of prior does not support them")
        self._steps, self._graphs = steps, Graphs(device)

    def draw(self, condition: Tensor | None, noise: Tensor, settings: Sampling, keep: Keep | None) -> Codes:
        """Draw one batch of this size; see `Prior.sample`. Only guidance may differ from the settings it was built for."""
        assert not self._prior.training
        layout, batch = self._prior.draw_layout, len(self._sequences)
        self._condition.copy_(self._prior.sampling_condition(condition, batch, self._guided, settings.guidance))
        self._noise.copy_(noise[:, : layout.length])
        self._scales.copy_(torch.tensor(guidance_scales(settings, layout.length), dtype=torch.float64))
        self._to_draw.fill_(1)
        self._sequences.zero_()
        if keep is not None:
            self._to_draw.copy_(~layout.flat_mask(keep.masks))
            self._sequences.copy_(layout.flat(keep.codes))
        self._failed.zero_()
        drawn = drawn_positions(layout, keep)
        # Kept codes before the first drawn one enter at once where the prior can; between drawn ones a replay is as fast.
        first = self._steps.prefill(drawn[0]) if drawn else 0
        self._position.fill_(first)
        for position in range(first, drawn[-1] + 1 if drawn else 0):
            self._steps.prepare(position)
            phase = self._steps.phase(position)
            self._graphs.run(phase, partial(self._advance, phase))
        # The only host synchronisation of the batch.
        check_finite(not bool(self._failed.any()), settings)
        return layout.grids_of(self._sequences.clone())

    def _advance(self, phase: Hashable) -> None:
        """Draw the code at the current position and move on by one."""
        self._draw(self._steps.logits(phase))
        self._position += 1

    def _draw(self, logits: Tensor) -> None:
        """Draw the current code: one Triton kernel without top_k, top_p and min_p, PyTorch operators with them."""
        settings, position = self._settings, self._position
        untruncated = not 0 < settings.top_k < logits.shape[1] and settings.top_p == 1 and settings.min_p == 0
        if untruncated and _DRAW.usable(logits.device):
            scales = self._scales if self._guided else None
            state = scales, self._to_draw, self._temperature, settings.temperature == 0
            if _DRAW(logits, self._noise, *state, position, self._sequences, self._failed) is not None:
                return
        logits = full_precision(logits)
        scale = self._scales.index_select(0, position).to(logits.dtype) if self._guided else None
        code, finite = draw_position(logits, self._noise.index_select(1, position)[:, 0], settings, scale)
        to_draw = self._to_draw.index_select(0, position) != 0
        self._failed |= to_draw & ~finite
        code = torch.where(to_draw, code, self._sequences.index_select(1, position)[:, 0])
        self._sequences.index_copy_(1, position, code[:, None])
