"""Codebooks: K vectors and the rule by which they learn. How a code is chosen and what passes to the encoder is the
quantizer's (vector.py); how codes start and restart is for initialisation.py and restart.py, which call `place_`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

# Laplace smoothing of the counts that divide the moving sums (Sonnet's VectorQuantizerEMA).
_SMOOTHING = 1e-5


Metric = Literal["euclidean", "cosine"]


class Codebook(nn.Module, ABC):
    """What all rules share: a moving average of each code's use, `cluster_size`.

    A code is dead when its moving count falls below `restart_below` times the mean count.
    """

    placeable = True
    """Whether single codes can be put somewhere, by k-means and restarts."""
    needs_sums = False
    """Whether `update_` needs the sums of the latents, beside their counts."""
    cluster_size: Tensor

    def __init__(self, num_codes: int, dim: int, decay: float, restart_below: float, metric: Metric = "euclidean") -> None:
        super().__init__()
        self.num_codes, self.dim, self.metric = num_codes, dim, metric
        self.decay, self.restart_below = decay, restart_below
        self.register_buffer("cluster_size", torch.ones(num_codes))

    def apply_metric(self, vectors: Tensor) -> Tensor:
        """Vectors (N, d) as the metric compares them: at unit length under cosine."""
        return F.normalize(vectors, dim=-1) if self.metric == "cosine" else vectors

    def vectors(self) -> Tensor:
        """The codes' vectors (K, d), as latents are compared with them, with their gradient if the rule needs it."""
        return self.apply_metric(self._vectors())

    @abstractmethod
    def _vectors(self) -> Tensor:
        """The vectors (K, d) as they are kept, before the metric scales them."""

    def loss(self, rows: Tensor, vectors_q: Tensor) -> dict[str, Tensor]:
        """The loss that teaches the codebook, from latents without gradient and their codes' vectors, (N, d) both: the mean
        over vectors and channels of |sg(z) - e|^2.
        """
        return {"codebook": mean_squared_error(vectors_q, rows)}

    @torch.no_grad()
    def update_(self, counts: Tensor, sums: Tensor | None) -> None:
        """Learn from one step's counts (K,) of, and sums (K, d) over, the latents that chose each code."""
        self.cluster_size.lerp_(counts.to(self.cluster_size), 1 - self.decay)

    def dead_codes(self) -> Tensor:
        """Mask (K,) of the codes to restart."""
        return self.cluster_size < self.restart_below * self.cluster_size.mean()

    @abstractmethod
    def place_(self, where: Tensor, vectors: Tensor, counts: Tensor) -> Tensor | None:
        """Put the codes of the mask `where` (K,) at the rows of `vectors` (K, d), as if each had been chosen `counts`
        (K,) times a step; returns the parameter, if any, whose rows these are.
        """


class GradientCodebook(Codebook):
    """The codebook follows the loss |sg(z) - e|^2.

    Van den Oord et al. 2017, "Neural Discrete Representation Learning", equation 3, second term.
    """

    def __init__(self, num_codes: int, dim: int, decay: float, restart_below: float, metric: Metric = "euclidean") -> None:
        super().__init__(num_codes, dim, decay, restart_below, metric)
        # Until they are placed: unit variance, as a normalised latent would have.
        self.weight = nn.Parameter(torch.randn(num_codes, dim))

    def _vectors(self) -> Tensor:
        return self.weight

    @torch.no_grad()
    @override
    def place_(self, where: Tensor, vectors: Tensor, counts: Tensor) -> Tensor:
        _replace_rows_(self.weight, where, vectors)
        _replace_rows_(self.cluster_size, where, counts)
        return self.weight


class MovingAverageCodebook(Codebook):
    """A code is the moving average of the latents that choose it.

    Van den Oord et al. 2017, appendix A.1: N <- g N + (1 - g) n, m <- g m + (1 - g) sum(z), e = m / N. The smoothing
    of N enters e only and is never written back.
    """

    needs_sums = True
    weight: Tensor
    moving_sum: Tensor

    def __init__(self, num_codes: int, dim: int, decay: float, restart_below: float, metric: Metric = "euclidean") -> None:
        super().__init__(num_codes, dim, decay, restart_below, metric)
        self.register_buffer("weight", torch.randn(num_codes, dim))
        self.register_buffer("moving_sum", self.weight.clone())

    def _vectors(self) -> Tensor:
        return self.weight

    def loss(self, rows: Tensor, vectors_q: Tensor) -> dict[str, Tensor]:
        """No loss: this codebook learns in `update_`."""
        return {}

    @torch.no_grad()
    def update_(self, counts: Tensor, sums: Tensor | None) -> None:
        """Advance the moving count and sum of each code, and with them its vector, if it was chosen.

        m / N stays as it is where nothing was added to either; but both vanish in time, and the smoothing would then
        draw the vector to the origin. A code whose sum is not finite, as that of a latent that overflowed in fp16, stays as it is.
        """
        assert sums is not None
        finite = sums.isfinite().all(1)
        chosen = (counts > 0) & finite
        counts, sums = torch.where(finite, counts, self.cluster_size), torch.where(finite[:, None], sums, self.moving_sum)
        super().update_(counts, sums)
        self.moving_sum.lerp_(sums.to(self.moving_sum), 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + _SMOOTHING) / (total + self.num_codes * _SMOOTHING) * total
        self.weight.copy_(torch.where(chosen[:, None], self.moving_sum / smoothed[:, None], self.weight))

    @torch.no_grad()
    def place_(self, where: Tensor, vectors: Tensor, counts: Tensor) -> None:
        """See the base class; the moving sums start at the new vectors too."""
        _replace_rows_(self.weight, where, vectors)
        _replace_rows_(self.cluster_size, where, counts)
        _replace_rows_(self.moving_sum, where, self.weight * self.cluster_size[:, None])


class LinearCodebook(Codebook):
    """SimVQ: one learned linear map W over a frozen random codebook C, so that every code moves whenever one does.

    Zhu et al. 2024, "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer", equation 8:
    the vectors are C W, and the codebook loss of the paper's quantizer reaches W alone. Its codes are not placed.
    """

    placeable = False
    frozen: Tensor

    def __init__(self, num_codes: int, dim: int, decay: float, restart_below: float, metric: Metric = "euclidean") -> None:
        super().__init__(num_codes, dim, decay, restart_below, metric)
        self.register_buffer("frozen", torch.randn(num_codes, dim) / dim**0.5)
        self.map = nn.Parameter(torch.empty(dim, dim).uniform_(-(dim**-0.5), dim**-0.5))

    def _vectors(self) -> Tensor:
        return self.frozen @ self.map

    def place_(self, where: Tensor, vectors: Tensor, counts: Tensor) -> None:
        """Errors: TypeError, always: a single code of a linear map cannot be moved without all others."""
        raise TypeError("the codes of a linear map cannot be placed one by one")


def _replace_rows_(tensor: Tensor, mask: Tensor, rows: Tensor) -> None:
    """Replace the rows where the mask (K,) is true; no host synchronisation."""
    tensor.copy_(torch.where(mask.view(-1, *[1] * (tensor.dim() - 1)), rows.to(tensor), tensor))


def codebook_names(model: nn.Module) -> list[str]:
    """Names of the codebooks among a model's submodules."""
    return [name for name, module in model.named_modules() if isinstance(module, Codebook)]


def mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean of (a - b)^2 over rows and channels, 0 for an empty batch; both (N, d)."""
    difference = a - b
    return torch.linalg.vecdot(difference, difference).sum() / max(1, a.numel())
