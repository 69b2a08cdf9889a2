"""Codebooks: K vectors and the rule by which they learn.

The quantizer (vector.py) chooses codes and passes gradients to the encoder; initialisation.py and restart.py set codes by `place_`.
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
    """Base class: a moving average `cluster_size` of how often each code is chosen per step.

    A code is dead when its average falls below `restart_below` times the mean over codes.
    """

    placeable = True
    """Whether single codes can be set, by k-means and restarts."""
    needs_sums = False
    """Whether `update_` needs the sum of latents per code, beside the counts."""
    cluster_size: Tensor

    def __init__(self, num_codes: int, dim: int, decay: float, restart_below: float, metric: Metric = "euclidean") -> None:
        super().__init__()
        self.num_codes, self.dim, self.metric = num_codes, dim, metric
        self.decay, self.restart_below = decay, restart_below
        self.register_buffer("cluster_size", torch.ones(num_codes))

    def apply_metric(self, vectors: Tensor) -> Tensor:
        """Scale vectors (N, d) to unit length under the cosine metric; leave them as they are under the euclidean one."""
        return F.normalize(vectors, dim=-1) if self.metric == "cosine" else vectors

    def vectors(self) -> Tensor:
        """Compute the codes' vectors (K, d) in the metric's scale, differentiable if the rule learns by gradient."""
        return self.apply_metric(self._vectors())

    @abstractmethod
    def _vectors(self) -> Tensor:
        """Compute the vectors (K, d) before the metric scales them."""

    def loss(self, rows: Tensor, vectors_q: Tensor) -> dict[str, Tensor]:
        """Compute the codebook loss, the mean of |sg(z) - e|^2 over vectors and channels.

        Args:
            rows: latents (N, d), without gradient.
            vectors_q: their codes' vectors (N, d).
        """
        return {"codebook": mean_squared_error(vectors_q, rows)}

    @torch.no_grad()
    def update_(self, counts: Tensor, sums: Tensor | None) -> None:
        """Learn from one step: counts (K,) and sums (K, d) of the latents that chose each code."""
        self.cluster_size.lerp_(counts.to(self.cluster_size), 1 - self.decay)

    def dead_codes(self) -> Tensor:
        """Compute the mask (K,) of the codes to restart."""
        return self.cluster_size < self.restart_below * self.cluster_size.mean()

    @abstractmethod
    def place_(self, where: Tensor, vectors: Tensor, counts: Tensor) -> Tensor | None:
        """Set the codes of the mask `where` (K,) to the rows of `vectors` (K, d), with `counts` (K,) as their average use per step.

        Returns: the parameter that holds the codes, if the codebook has one.
        """


class GradientCodebook(Codebook):
    """The codebook follows the loss |sg(z) - e|^2.

    Van den Oord et al. 2017, "Neural Discrete Representation Learning", equation 3, second term.
    """

    def __init__(self, num_codes: int, dim: int, decay: float, restart_below: float, metric: Metric = "euclidean") -> None:
        super().__init__(num_codes, dim, decay, restart_below, metric)
        # Unit variance, as of normalised latents, until k-means sets the codes.
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
    """Each code is the moving average of the latents that choose it.

    Van den Oord et al. 2017, appendix A.1: N <- g N + (1 - g) n, m <- g m + (1 - g) sum(z), e = m / N. Laplace smoothing of N
    enters e alone; the stored N is not smoothed.
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
        """Return no loss: this codebook learns in `update_`."""
        return {}

    @torch.no_grad()
    def update_(self, counts: Tensor, sums: Tensor | None) -> None:
        """Advance the moving counts and sums, and the vectors of the codes that were chosen.

        The vector of a code that was not chosen stays: its m / N would too, but both decay to zero, and the smoothing would then
        pull it to the origin. A code whose sum is not finite (a latent overflowed in fp16) keeps its count, sum and vector.
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
        """See the base class. The moving sums are set to match the new vectors."""
        _replace_rows_(self.weight, where, vectors)
        _replace_rows_(self.cluster_size, where, counts)
        _replace_rows_(self.moving_sum, where, self.weight * self.cluster_size[:, None])


class LinearCodebook(Codebook):
    """SimVQ: one learned linear map W over a frozen random codebook C, so that every gradient moves all codes.

    Zhu et al. 2024, "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer", equation 8:
    the vectors are C W, and the codebook loss trains W alone. Single codes cannot be set.
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
        """Raise TypeError: a single code of a linear map cannot be moved without all others."""
        raise TypeError("the codes of a linear map cannot be placed one by one")


def _replace_rows_(tensor: Tensor, mask: Tensor, rows: Tensor) -> None:
    """Replace the rows where the mask (K,) is true, without waiting for the device."""
    tensor.copy_(torch.where(mask.view(-1, *[1] * (tensor.dim() - 1)), rows.to(tensor), tensor))


def codebook_names(model: nn.Module) -> list[str]:
    """List the names of the codebooks among a model's submodules."""
    return [name for name, module in model.named_modules() if isinstance(module, Codebook)]


def mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean of (a - b)^2 over rows and channels, 0 for an empty batch; both (N, d)."""
    difference = a - b
    return torch.linalg.vecdot(difference, difference).sum() / max(1, a.numel())
