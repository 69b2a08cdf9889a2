"""Vector quantization: each latent is replaced by the nearest vector of a codebook."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from stage1_vqvae.quantizers.codebook import Codebook, mean_squared_error
from stage1_vqvae.quantizers.contract import Codes, Quantized, RowQuantizer, Statistics, count_codes
from stage1_vqvae.quantizers.entropy import entropy_loss
from stage1_vqvae.quantizers.gradients import Estimator
from stage1_vqvae.quantizers.search import nearest_codes


class VectorQuantizer(RowQuantizer):
    """One codebook of any learning rule, with a metric, a gradient estimator and an optional entropy term.

    Van den Oord et al. 2017, "Neural Discrete Representation Learning", section 3 and equation 3. Under the cosine metric the unit
    vectors are compared, averaged and decoded (Yu et al. 2021, "Vector-quantized Image Modeling with Improved VQGAN", section 3.2).
    """

    def __init__(
        self,
        codebook: Codebook,
        *,
        commitment: float,
        estimator: Estimator,
        entropy_weight: float,
        entropy_temperature: float,
    ) -> None:
        super().__init__()
        self.codebook = codebook
        self.dim, self.num_codes = codebook.dim, (codebook.num_codes,)
        self.commitment, self.estimator = commitment, estimator
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature

    def quantize(self, rows: Tensor) -> Quantized:
        """See the contract. Losses: `commitment`, `codebook` if it learns by gradient, `entropy`; means over vectors (and channels)."""
        rows, vectors = self.codebook.apply_metric(rows), self.codebook.vectors()
        latents = rows.detach()
        codes = nearest_codes(latents, vectors)
        vectors_q = F.embedding(codes, vectors)
        losses = {"commitment": self.commitment * mean_squared_error(rows, vectors_q.detach()), **self.codebook.loss(latents, vectors_q)}
        if self.training and self.entropy_weight > 0:
            losses["entropy"] = self.entropy_weight * entropy_loss(rows, vectors, self.entropy_temperature)
        statistics = {"counts": count_codes(codes, len(vectors))}
        if self.training and self.codebook.needs_sums:
            statistics["sums"] = torch.zeros_like(vectors).detach_().index_add_(0, codes, latents)
        return Quantized(self.estimator(rows, vectors_q.detach()), (codes,), losses, statistics, (latents,))

    @override
    def lookup_rows(self, codes: Codes) -> Tensor:
        return F.embedding(codes[0], self.codebook.vectors())

    @override
    def update_(self, statistics: Statistics) -> None:
        self.codebook.update_(statistics["counts"], statistics.get("sums"))
