"""The uniform prior: every code of a level equally likely, whatever the condition. It has no weights and no file."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from configs.parts import Sampling
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.none import NoCondition
from stage2_prior.priors.contract import Keep, Prior


class UniformPrior(Prior):
    """Codes of independent uniform draws."""

    exact = True

    def __init__(self, layout: SequenceLayout) -> None:
        super().__init__(layout, NoCondition())
        sizes = zip(layout.lengths, layout.num_codes, strict=True)
        self.sizes = torch.cat([torch.full((length,), k) for length, k in sizes])  # (T,), on the CPU as all its tensors

    @property
    @override
    def device(self) -> torch.device:
        return self.sizes.device

    @override
    def forward(
        self,
        codes: Codes,
        condition: Tensor | None,
        variants: Tensor | None = None,
        draws: Tensor | None = None,
        progress: Tensor | None = None,
    ) -> Tensor:
        return self.nats(codes, condition).mean()

    @override
    def sample(self, condition: Tensor | None, noise: Tensor, settings: Sampling, keep: Keep | None = None) -> Codes:
        codes = self.layout.grids_of((noise * self.sizes).long())
        return codes if keep is None else tuple(map(torch.where, keep.masks, keep.codes, codes))

    @override
    def nats(self, codes: Codes, condition: Tensor | None) -> Tensor:
        return self.sizes.double().log().expand(len(codes[0]), -1)
