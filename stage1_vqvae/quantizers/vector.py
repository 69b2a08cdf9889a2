"""Vector quantization against one learned codebook: by gradient, or by moving averages."""

from __future__ import annotations

from abc import abstractmethod

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_vqvae.quantizers.contract import Codes, Quantized, Quantizer
from stage1_vqvae.quantizers.initialisation import assigned
from stage1_vqvae.quantizers.search import nearest_codes

# Laplace smoothing of the counts that divide the moving sums (Sonnet's VectorQuantizerEMA).
_SMOOTHING = 1e-5


class VectorQuantizer(Quantizer):
    """What both kinds share: search, straight-through vectors, commitment, and a moving average of each code's use.

    A code is dead when its moving count falls below `restart_below` times the mean count.
    """

    codebook: Tensor
    cluster_size: Tensor

    def __init__(self, num_codes: int, code_dim: int, commitment: float, decay: float, restart_below: float) -> None:
        super().__init__()
        self.num_codes = (num_codes,)
        self.commitment, self.decay, self.restart_below = commitment, decay, restart_below
        # Before k-means places them: unit variance, as a normalised latent would have.
        self._add_codebook(torch.randn(num_codes, code_dim))
        self.register_buffer("cluster_size", torch.ones(num_codes))

    @abstractmethod
    def _add_codebook(self, codebook: Tensor) -> None:
        """Register `codebook` as a parameter or a buffer, with what else its learning keeps."""

    def forward(self, z: Tensor) -> Quantized:
        """See the contract. Losses: `commitment` and, by gradient, `codebook`; means over vectors and channels."""
        if z.ndim < 2 or z.shape[1] != self.codebook.shape[1]:
            raise ValueError(f"z: expected (B, {self.codebook.shape[1]}, ...), found {tuple(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            vectors = rearrange(z.detach(), "b d ... -> (b ...) d")
            flat_codes = nearest_codes(vectors, self.codebook)
            codes = flat_codes.view(z.shape[0], *z.shape[2:])
            vectors_q = self.lookup((codes,))
            counts, sums = assigned(vectors, flat_codes, self.num_codes[0])
            losses = {"commitment": self.commitment * _mean_square(z - vectors_q.detach())}
            losses |= self._codebook_loss(z.detach(), vectors_q)
            # q + (z - z) and not z + (q - z): the value stays q's to the last bit.
            z_q = vectors_q.detach() + (z - z.detach())
        return Quantized(z_q, (codes,), losses, {"counts": counts, "sums": sums})

    @abstractmethod
    def _codebook_loss(self, z: Tensor, z_q: Tensor) -> dict[str, Tensor]:
        """The losses that teach the codebook, from z without gradient and its codes' vectors."""

    def lookup(self, codes: Codes) -> Tensor:
        """See the contract."""
        return F.embedding(codes[0], self.codebook).movedim(-1, 1)

    @torch.no_grad()
    def update_(self, statistics: dict[str, Tensor]) -> None:
        """Advance the moving count of each code's use."""
        self.cluster_size.lerp_(statistics["counts"].to(self.cluster_size), 1 - self.decay)

    def dead_codes(self) -> Tensor:
        """Mask (K,) of the codes to restart."""
        return self.cluster_size < self.restart_below * self.cluster_size.mean()

    @torch.no_grad()
    def place_(self, where: Tensor, vectors: Tensor, counts: Tensor) -> None:
        """Put the codes of the mask `where` (K,) at the rows of `vectors` (K, D), as if each had been chosen
        `counts` (K,) times a step.
        """
        self.codebook[where] = vectors[where].to(self.codebook)
        self.cluster_size[where] = counts[where].to(self.cluster_size)


class GradientVectorQuantizer(VectorQuantizer):
    """The paper's quantizer: the codebook follows the loss |sg(z) - e|^2.

    Van den Oord et al. 2017, "Neural Discrete Representation Learning", equation 3: the codebook term reaches the
    codes alone, beta |z - sg(e)|^2 reaches the encoder alone.
    """

    def _add_codebook(self, codebook: Tensor) -> None:
        self.codebook = nn.Parameter(codebook)

    def _codebook_loss(self, z: Tensor, z_q: Tensor) -> dict[str, Tensor]:
        return {"codebook": _mean_square(z_q - z)}


class MovingAverageVectorQuantizer(VectorQuantizer):
    """A code is the moving average of the latents that choose it.

    Van den Oord et al. 2017, appendix A.1: N <- g N + (1 - g) n, m <- g m + (1 - g) sum(z), e = m / N. The smoothing
    of N enters e only and is never written back.
    """

    moving_sum: Tensor

    def _add_codebook(self, codebook: Tensor) -> None:
        self.register_buffer("codebook", codebook)
        self.register_buffer("moving_sum", codebook.clone())

    def _codebook_loss(self, z: Tensor, z_q: Tensor) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def update_(self, statistics: dict[str, Tensor]) -> None:
        """Advance the moving count and sum of each code, and with them the codebook."""
        super().update_(statistics)
        self.moving_sum.lerp_(statistics["sums"].to(self.moving_sum), 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + _SMOOTHING) / (total + len(self.cluster_size) * _SMOOTHING) * total
        self.codebook.copy_(self.moving_sum / smoothed[:, None])

    @torch.no_grad()
    def place_(self, where: Tensor, vectors: Tensor, counts: Tensor) -> None:
        """Also start the moving sums there."""
        super().place_(where, vectors, counts)
        self.moving_sum[where] = self.codebook[where] * self.cluster_size[where, None]


def _mean_square(difference: Tensor) -> Tensor:
    """The mean square, 0 for an empty batch."""
    return difference.square().sum() / max(1, difference.numel())
