"""A run as ONNX graphs of any batch size: encoder, decoder, and one step of the prior.

encoder.onnx   images, float32 (B, C, H, W) in [-1, 1], to codes: int64 (B, h, w) a level
decoder.onnx   codes to images
prior.onnx     of a transformer: tokens (B,) int64, codes counted through all levels, at position 0 any; labels (B,) int64;
               position (1,) int64; keys and values (B, layers, heads, T, head width), at first zeros. To logits (B, all levels' codes),
               keys and values for the next position.
               Of any other prior: codes (B, T) int64 so far, which are its cache, the rest any; labels; position. To logits.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_vqvae.model import VQVAE
from stage2_prior.priors.attention import KeyValueCache
from stage2_prior.priors.stepwise import StepwisePrior
from stage2_prior.priors.transformer import Transformer, TransformerCache

# Batches that graphs are traced with: of 1 a batch's axis would be taken for a fixed one.
_TRACED = 2


class Method(nn.Module):
    """A method of a module, as the module that graphs are traced of."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, given: Any) -> Any:
        """What the method makes of what it is given."""
        return getattr(self.module, self.name)(given)


class CachedStep(nn.Module):
    """One step of a transformer over all levels, its cache among what goes in and comes out."""

    def __init__(self, prior: Transformer) -> None:
        super().__init__()
        self.prior = prior
        self.register_buffer("positions", prior.position_embeddings())

    positions: Tensor

    def forward(self, tokens: Tensor, labels: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the module's docstring."""
        prior, layers = self.prior, []
        for of_layer in zip(keys.unbind(1), values.unbind(1), strict=True):
            cache = KeyValueCache.__new__(KeyValueCache)
            cache.keys, cache.values = (tensor.clone() for tensor in of_layer)
            layers.append(cache)
        whole = TransformerCache(layers, self.positions, None)
        x = prior.embed_step(torch.where(position == 0, prior.start, prior.token(tokens)), labels, whole, position)
        logits = F.linear(prior.norm(prior.features(x, whole, position)), prior.head.weight)
        return logits, torch.stack([cache.keys for cache in layers], 1), torch.stack([cache.values for cache in layers], 1)


class WholeStep(nn.Module):
    """The logits of one position by a prior that computes those of all: whatever the prior, the codes so far are its cache."""

    def __init__(self, prior: StepwisePrior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, codes: Tensor, labels: Tensor, position: Tensor) -> Tensor:
        """See the module's docstring; of the levels that the position is not of, the logits are those of some other position."""
        found, start = [], 0
        for logits in self.prior.logits(self.prior.layout.grids_of(codes), labels):
            index = (position - start).clamp(0, logits.shape[1] - 1)
            found.append(logits.index_select(1, index)[:, 0])
            start += logits.shape[1]
        return torch.cat(found, -1)


def export_tokenizer(tokenizer: VQVAE, folder: Path) -> None:
    """Write encoder.onnx and decoder.onnx of a tokenizer in eval mode, on the CPU."""
    codes = tuple(torch.zeros(_TRACED, *grid, dtype=torch.int64) for grid in tokenizer.grids)
    names = [f"level{level}" for level in range(len(codes))]
    _export(Method(tokenizer, "encode"), (torch.zeros(_TRACED, *tokenizer.image_shape),), ["images"], names, folder / "encoder.onnx")
    _export(Method(tokenizer, "decode"), (codes,), names, ["images"], folder / "decoder.onnx")


def export_prior(prior: StepwisePrior, folder: Path) -> list[int] | None:
    """Write prior.onnx of a prior in eval mode, on the CPU, in its own precision.

    Returns the shape of its keys and values for one sequence; None: it has none.
    """
    labels, position = torch.zeros(_TRACED, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    if isinstance(prior, Transformer):
        shape = [len(prior.blocks), *prior.blocks[0].attention.new_cache(1, prior.layout.length).keys.shape[1:]]
        cache = torch.zeros(_TRACED, *shape, dtype=prior.start.dtype)
        given = (torch.zeros(_TRACED, dtype=torch.int64), labels, position, cache, cache.clone())
        names = ["tokens", "labels", "position", "keys", "values"]
        _export(CachedStep(prior), given, names, ["logits", "next_keys", "next_values"], folder / "prior.onnx")
        return shape
    codes = torch.zeros(_TRACED, prior.layout.length, dtype=torch.int64)
    _export(WholeStep(prior), (codes, labels, position), ["codes", "labels", "position"], ["logits"], folder / "prior.onnx")
    return None


@torch.no_grad()
def _export(module: nn.Module, given: tuple[Any, ...], inputs: Sequence[str], outputs: Sequence[str], path: Path) -> None:
    # torch 2.9 cannot show that 1 works as well, which it does.
    batch = torch.export.Dim("batch", min=_TRACED)

    def dynamic(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(dynamic, argument))
        return {0: batch} if len(argument) == _TRACED else None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names of axes, of the exporter's own calls
        program = torch.onnx.export(
            module.eval(),
            given,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple(map(dynamic, given)),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    _strip(program.model)
    program.save(path)


def _strip(model: Any) -> None:
    """Remove what the exporter notes of each node: where in which file of this machine it was traced."""
    for graph in (model.graph, *model.functions.values()):
        nodes = list(graph.all_nodes())
        for noted in (model, graph, *graph.inputs, *nodes, *(value for node in nodes for value in node.outputs)):
            noted.metadata_props.clear()
            noted.doc_string = None
