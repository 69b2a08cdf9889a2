"""Recipe parts of quantizers with learned codebooks: `ema`, `gradient`, `simvq`.

One codebook per depth and group: residual over depths, product over groups, projected where the widths differ.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from typing_extensions import override

from configs.errors import require
from configs.parts import QuantizerPart
from stage1_vqvae.quantizers.codebook import Codebook, GradientCodebook, LinearCodebook, Metric, MovingAverageCodebook
from stage1_vqvae.quantizers.composed import ProductQuantizer, ProjectedQuantizer, ResidualQuantizer
from stage1_vqvae.quantizers.contract import RowQuantizer
from stage1_vqvae.quantizers.gradients import ESTIMATORS
from stage1_vqvae.quantizers.vector import VectorQuantizer


@dataclass(frozen=True, kw_only=True)
class _LearnedPart(QuantizerPart):
    """Fields of all quantizers with learned codebooks."""

    num_codes: int = 512
    """Codes per codebook, K."""
    codebook_dim: int = 0
    """Channels of the codebook's vectors, with a learned linear map from and to the latents' channels; 0 = those of the latents, without
    maps."""
    depth: int = 1
    """Residual quantization: codes per position, each of the residual of those before (Lee et al. 2022); 1 = off."""
    shared_codebook: bool = False
    """Whether all depths share one codebook."""
    groups: int = 1
    """Product quantization: groups of channels, each with its own codebook (Jegou et al. 2011); 1 = off."""
    metric: Metric = "euclidean"
    """Distance between latents and codes; `cosine` scales both to unit length, best with a `codebook_dim` of 8 to 32 (Yu et al.
    2021)."""
    gradient_estimator: Literal["straight_through", "rotation"] = "straight_through"
    """How the decoder's gradient passes the quantizer: unchanged, or by the rotation that takes the latent to its code (Fifty et
    al. 2024)."""
    commitment: float = 0.25
    """Beta, the weight of the commitment loss, which pulls latents to their codes."""
    entropy_weight: float = 0.0
    """Weight of the entropy term, for confident assignments and evenly used codes; 0 = none."""
    entropy_temperature: float = 1.0
    """Temperature of the entropy term's soft assignments, in squared units of the latents."""

    def __post_init__(self) -> None:
        where = "tokenizer.quantizer"
        require(self.num_codes >= 2, f"{where}.num_codes", "at least 2", self.num_codes)
        for name in ("depth", "groups"):
            require(getattr(self, name) >= 1, f"{where}.{name}", "at least 1", getattr(self, name))
        for name in ("codebook_dim", "commitment", "entropy_weight"):
            require(getattr(self, name) >= 0, f"{where}.{name}", "at least 0", getattr(self, name))
        require(self.depth == 1 or self.metric == "euclidean", f"{where}.metric", f"euclidean at depth {self.depth}", self.metric)
        require(self.depth > 1 or not self.shared_codebook, f"{where}.shared_codebook", "false at depth 1", self.shared_codebook)
        require(self.entropy_temperature > 0, f"{where}.entropy_temperature", "above 0", self.entropy_temperature)

    @override
    def check(self, dim: int) -> None:
        width = self.codebook_dim or dim
        wanted = f"a divisor of the {width} channels (see tokenizer.quantizer.codebook_dim)"
        require(width % self.groups == 0, "tokenizer.quantizer.groups", wanted, self.groups)
        wide = self.metric == "euclidean" or width // self.groups > 1
        require(wide, "tokenizer.quantizer.metric", "euclidean in one channel, where angles are two", self.metric)

    @property
    @override
    def needs_whole_batch(self) -> bool:
        return self.entropy_weight > 0

    @override
    def build(self, dim: int) -> RowQuantizer:
        width = self.codebook_dim or dim
        groups = [self._residual(width // self.groups) for _ in range(self.groups)]
        inner = groups[0] if self.groups == 1 else ProductQuantizer(groups)
        return inner if self.codebook_dim == 0 else ProjectedQuantizer(dim, inner)

    def _residual(self, width: int) -> RowQuantizer:
        stages = [self._level(width) for _ in range(1 if self.shared_codebook else self.depth)]
        return stages[0] if self.depth == 1 else ResidualQuantizer(stages, self.depth, ESTIMATORS[self.gradient_estimator])

    def _level(self, width: int) -> RowQuantizer:
        return VectorQuantizer(
            self._codebook(width),
            commitment=self.commitment,
            estimator=ESTIMATORS[self.gradient_estimator],
            entropy_weight=self.entropy_weight,
            entropy_temperature=self.entropy_temperature,
        )

    @abstractmethod
    def _codebook(self, width: int) -> Codebook:
        """A codebook of vectors of `width` channels."""


@dataclass(frozen=True, kw_only=True)
class _PlacedPart(_LearnedPart):
    """Fields of quantizers whose codes can be set one by one."""

    initialisation: Literal["kmeans", "random"] = "kmeans"
    """Initial codes: k-means of the first batches' latents, or normal draws."""
    decay: float = 0.95
    """Decay per step of the moving average of each code's use; under `ema`, of its vector too."""
    restart_below: float = 0.05
    """Share of the mean use below which a code restarts on a latent of the batch (Dhariwal et al. 2020); 0 = never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.decay < 1, "tokenizer.quantizer.decay", "0 <= decay < 1", self.decay)
        require(0 <= self.restart_below < 1, "tokenizer.quantizer.restart_below", "0 <= share < 1", self.restart_below)

    @property
    @override
    def starts_by_kmeans(self) -> bool:
        return self.initialisation == "kmeans"

    @property
    @override
    def advice_on_collapse(self) -> str:
        if self.restart_below == 0:
            return "let dead codes restart: set tokenizer.quantizer.restart_below 0.05"
        if self.initialisation == "random":
            return "set tokenizer.quantizer.initialisation kmeans"
        return "lower stage1.restart_interval or stage1.lr, or look for codes in fewer dimensions by tokenizer.quantizer.codebook_dim"


@dataclass(frozen=True, kw_only=True)
class EMAPart(_PlacedPart):
    """Codes are moving averages of the latents that choose them (van den Oord et al. 2017, appendix A.1)."""

    @property
    @override
    def advice_on_collapse(self) -> str:
        if self.restart_below > 0 and self.starts_by_kmeans and self.decay > 0.95:
            return "set tokenizer.quantizer.decay 0.95, so that the codes keep up with the encoder"
        return super().advice_on_collapse

    def _codebook(self, width: int) -> Codebook:
        return MovingAverageCodebook(self.num_codes, width, self.decay, self.restart_below, self.metric)


@dataclass(frozen=True, kw_only=True)
class GradientPart(_PlacedPart):
    """Codes follow the codebook loss (van den Oord et al. 2017, equation 3)."""

    def _codebook(self, width: int) -> Codebook:
        return GradientCodebook(self.num_codes, width, self.decay, self.restart_below, self.metric)


@dataclass(frozen=True, kw_only=True)
class SimVQPart(_LearnedPart):
    """One learned linear map over a frozen codebook (Zhu et al. 2024)."""

    @property
    @override
    def advice_on_collapse(self) -> str:
        if self.entropy_weight == 0:
            return "set tokenizer.quantizer.entropy_weight 0.01"
        return f"raise tokenizer.quantizer.entropy_weight, for instance to {2 * self.entropy_weight}"

    def _codebook(self, width: int) -> Codebook:
        # Its codes cannot restart, so the decay of their use has no effect.
        return LinearCodebook(self.num_codes, width, decay=0.95, restart_below=0.0, metric=self.metric)
