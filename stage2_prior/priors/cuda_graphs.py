"""Sampling from a transformer by CUDA graphs: one launch a position, in place of some hundreds of small ones."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.priors.contract import AutoregressivePrior, Logits
from stage2_prior.priors.transformer import Transformer


class GraphedTransformer(AutoregressivePrior):
    """A transformer whose steps are replayed; otherwise the transformer itself."""

    def __init__(self, prior: Transformer) -> None:
        super().__init__(prior.layout, prior.num_classes, prior.num_variants)
        self.prior = prior
        self._steps: GraphedSteps | None = None
        self.train(prior.training)

    @override
    def forward(self, codes: Codes, labels: Tensor | None, variants: Tensor | None = None) -> Logits:
        return self.prior(codes, labels, variants)

    def new_cache(self, batch: int, above: Codes = ()) -> GraphedSteps:
        """See the contract; of a transformer over all levels. The graphs of the last batch size are kept, so only one cache may be in
        use at a time.
        """
        if self._steps is None or self._steps.batch != batch:
            self._steps = GraphedSteps(self.prior, batch)
        self._steps.position = 0
        return self._steps

    def step(self, code: Tensor | None, labels: Tensor | None, cache: GraphedSteps) -> Tensor:
        """See the contract; the next step overwrites the logits."""
        return cache.step(code, self.labels_or_null(labels, cache.batch))


class GraphedSteps:
    """The steps of batches of one size, always on the same tensors: a graph a level."""

    def __init__(self, prior: Transformer, batch: int) -> None:
        self.batch, self.position = batch, 0
        self._prior, self._cache = prior, prior.new_cache(batch)
        self._tokens, self._labels = (torch.zeros(batch, dtype=torch.int64, device=prior.device) for _ in range(2))
        self._position = torch.zeros(1, dtype=torch.int64, device=prior.device)
        self._graphs = [self._captured(level) for level in range(len(prior.layout.grids))]

    def _captured(self, level: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of one step, and the tensor that it leaves logits in."""
        # Libraries set themselves up at their first calls, which a graph may not hold.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._prior.fixed_step(self._tokens, self._labels, self._cache, self._position, level)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._prior.fixed_step(self._tokens, self._labels, self._cache, self._position, level)
        return graph, logits

    def step(self, code: Tensor | None, labels: Tensor) -> Tensor:
        """Logits (B, K) of the next position, from the code (B,) of the one before (None at the first) and labels (B,)."""
        if code is not None:
            self._tokens.copy_(code + self._prior.layout.offset_before(self.position))
        self._labels.copy_(labels)
        self._position.fill_(self.position)
        graph, logits = self._graphs[self._prior.layout.level_of(self.position)]
        graph.replay()
        self.position += 1
        return logits
