"""Residual quantization at growing grids: the first code is of the whole image, the last ones are of its details."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from configs.errors import require
from configs.parts import QuantizerPart, as_dict, part_from
from stage1_vqvae.quantizers.codebook import mean_squared_error
from stage1_vqvae.quantizers.composed import ProjectedQuantizer, sum_in_order
from stage1_vqvae.quantizers.contract import (
    Codes,
    Quantized,
    Quantizer,
    RowQuantizer,
    Statistics,
    sum_by_name,
    with_prefixes,
    without_prefix,
)
from stage1_vqvae.quantizers.gradients import ESTIMATORS, Estimator

# Convolutions of all scales together, as in VAR.
_SMOOTHERS = 4


@dataclass(frozen=True, kw_only=True)
class MultiscalePart(QuantizerPart):
    """Residual quantization at growing grids, from one code to the full grid, all with one codebook (Tian et al. 2024, VAR)."""

    scales: list[int] = field(default_factory=list)
    """Codes along the longer side of each grid, growing, the last one that of the full grid: [1, 2, 3, 4, 6, 8]. Empty: doubled from 1
    on, up to the full grid."""
    quantizer: dict[str, Any] = field(default_factory=lambda: {"kind": "ema"})
    """The quantizer of all grids, in the form of `tokenizer.quantizer`: {kind: ema, num_codes: 1024}."""

    def __post_init__(self) -> None:
        growing = all(scale < following for scale, following in pairwise([0, *self.scales]))
        require(growing, "tokenizer.quantizer.scales", "growing numbers from 1 on", self.scales)
        kind = self.quantizer.get("kind")
        require(kind != "multiscale", "tokenizer.quantizer.quantizer", "a quantizer of single grids", kind)
        # Spelled out in the recipe, so that defaults of a later version do not change it.
        object.__setattr__(self, "quantizer", as_dict(self.inner))

    @property
    def inner(self) -> QuantizerPart:
        """The fields of the quantizer of all grids. Errors: ValueError that names the key."""
        try:
            part: QuantizerPart = part_from("tokenizer.quantizer", self.quantizer)
        except (TypeError, ValueError) as error:
            raise ValueError(f"tokenizer.quantizer.quantizer: {error}") from None
        return part

    @override
    def check(self, dim: int) -> None:
        self.inner.check(dim)

    @override
    def for_grid(self, height: int, width: int) -> MultiscalePart:
        side = max(height, width)
        if self.scales:
            last = f"the last one {side}, the longer side of the grid of {height} x {width}"
            require(self.scales[-1] == side, "tokenizer.quantizer.scales", last, self.scales)
            return self
        return replace(self, scales=[*(2**power for power in range((side - 1).bit_length())), side])

    @property
    @override
    def needs_whole_batch(self) -> bool:
        return self.inner.needs_whole_batch

    @property
    @override
    def starts_by_kmeans(self) -> bool:
        return self.inner.starts_by_kmeans

    @property
    @override
    def advice_on_collapse(self) -> str:
        return self.inner.advice_on_collapse.replace("tokenizer.quantizer.", "tokenizer.quantizer.quantizer.")

    @override
    def build(self, dim: int) -> MultiscaleQuantizer:
        """Build the quantizer; `scales` are given or filled in by `for_grid`."""
        estimator = getattr(self.inner, "gradient_estimator", "straight_through")
        return MultiscaleQuantizer(self.inner.build(dim), self.scales, ESTIMATORS[estimator])


class MultiscaleQuantizer(Quantizer):
    """Each scale quantizes the residual of the scales before on a grid of its own; a latent's vector is the sum over scales.

    Tian et al. 2024, "Visual Autoregressive Modeling", algorithms 1 and 2. The residual is averaged over each code's area; the codes'
    vectors are interpolated to the full grid and smoothed. All scales share one codebook, which learns as that of `ResidualQuantizer` with
    one stage: of the averaged residuals. The losses of all scales are added, and the gradient passes to z once.
    """

    def __init__(self, inner: RowQuantizer, scales: Sequence[int], estimator: Estimator) -> None:
        """`scales`: codes along the longer side of each grid, as shares of the last, which is the full grid."""
        super().__init__()
        self.dim, self.scales, self.estimator = inner.dim, list(scales), estimator
        # Maps to and from the codebook's width apply to z and to the sum, so that residuals are of the codebook's width.
        self.down: nn.Module = nn.Identity()
        self.up: nn.Module = nn.Identity()
        if isinstance(inner, ProjectedQuantizer):
            self.down, self.inner, self.up = inner.down, inner.inner, inner.up
        else:
            self.inner = inner
        self.num_codes = self.inner.num_codes * len(scales)
        self.smoothers = nn.ModuleList(Smoother(self.inner.dim) for _ in range(min(_SMOOTHERS, len(scales))))

    inner: RowQuantizer

    @property
    @override
    def digits(self) -> tuple[tuple[int, ...], ...]:
        return self.inner.digits * len(self.scales)

    @override
    def codebook_of(self, level: int) -> int:
        return self.inner.codebook_of(level % len(self.inner.num_codes))

    @override
    def level_grids(self, height: int, width: int) -> list[tuple[int, int]]:
        return [grid for grid in self._grids(height, width) for _ in self.inner.num_codes]

    def _grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the grid (h, w) of each scale; sides are rounded up."""
        last = self.scales[-1]
        return [(-(-height * scale // last), -(-width * scale // last)) for scale in self.scales]

    @override
    def forward(self, z: Tensor) -> Quantized:
        """See the contract; z is (B, D, h, w). Losses: the inner quantizer's, and `smoothing`, |sg(z) - partial sum|^2, which trains the
        convolutions alone.
        """
        if z.ndim != 4 or z.shape[1] != self.dim:
            raise ValueError(f"z: expected (B, {self.dim}, h, w), found {tuple(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            batch, _, height, width = z.shape
            latents = self.down(z.movedim(1, -1)).movedim(-1, 1)
            total, parts, codes, smoothing = torch.zeros_like(latents.detach()), [], [], []
            for scale, grid in enumerate(self._grids(height, width)):
                residual = F.interpolate(latents - total.detach(), grid, mode="area")
                part = self.inner.quantize(residual.movedim(1, -1).reshape(-1, self.inner.dim))
                total = total + self._on_full_grid(part.z_q.detach().view(batch, *grid, self.inner.dim), scale, (height, width))
                parts.append(part)
                codes += [level.view(batch, *grid) for level in part.codes]
                smoothing.append(mean_squared_error(total.movedim(1, -1).flatten(0, 2), latents.detach().movedim(1, -1).flatten(0, 2)))
            z_q = self.up(self.estimator(latents.movedim(1, -1), total.detach().movedim(1, -1))).movedim(-1, 1)
            losses = sum_by_name([*(part.losses for part in parts), *({"smoothing": loss} for loss in smoothing)])
            # Rows of all scales together, in the order of the images.
            by_image = [
                [vectors.view(batch, vectors.shape[0] // max(1, batch), vectors.shape[1]) for vectors in part.latents] for part in parts
            ]
            inputs = tuple(torch.cat(scales, 1).flatten(0, 1) for scales in zip(*by_image, strict=True))
            return Quantized(z_q, tuple(codes), losses, with_prefixes([part.statistics for part in parts]), inputs)

    @override
    def lookup(self, codes: Codes) -> Tensor:
        """See the contract; the last of the codes has the full grid."""
        levels, full = len(self.inner.num_codes), codes[-1].shape[1:]
        with torch.autocast(codes[0].device.type, enabled=False):
            parts = []
            for scale in range(len(self.scales)):
                own = codes[scale * levels : (scale + 1) * levels]
                vectors = self.inner.lookup_rows(tuple(level.flatten() for level in own)).view(*own[0].shape, self.inner.dim)
                parts.append(self._on_full_grid(vectors, scale, full))
            return self.up(sum_in_order(parts).movedim(1, -1)).movedim(-1, 1)

    def _on_full_grid(self, vectors: Tensor, scale: int, grid: tuple[int, ...]) -> Tensor:
        """Interpolate one scale's vectors (B, h', w', d) to the full grid, (B, d, h, w), and smooth them."""
        full = F.interpolate(vectors.movedim(-1, 1), grid, mode="bicubic")
        return self.smoothers[scale * len(self.smoothers) // len(self.scales)](full)

    @override
    @torch.no_grad()
    def code_vectors(self) -> tuple[Tensor, ...]:
        """See the base class; before they are interpolated and smoothed."""
        mapped = [self.up(vectors) for vectors in self.inner.code_vectors()]
        return tuple(vectors - vectors.mean(0) for vectors in mapped) * len(self.scales)

    @override
    def update_(self, statistics: Statistics) -> None:
        """See the contract. The codebook learns from the sum over all scales."""
        self.inner.update_(sum_by_name([without_prefix(statistics, scale) for scale in range(len(self.scales))]))


class Smoother(nn.Conv2d):
    """Half the input and half a convolution of it, initially the input: phi of Tian et al. 2024."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)
        nn.init.dirac_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Smooth (B, d, h, w); the shape stays."""
        return (x + super().forward(x)) / 2
