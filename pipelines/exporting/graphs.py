"""Export of a run to ONNX graphs of any batch size: encoder, decoder, and one step of the prior.

encoder.onnx   from images, float32 (B, C, H, W) in [-1, 1], to codes, int64 (B, h, w) per level
decoder.onnx   from codes to images
prior.onnx     of a transformer: from tokens (B,) int64 (code + offset of its level; ignored at position 0), labels (B,) int64, position
               (1,) int64, keys and values (B, layers, heads, T, head width), initially zeros; to logits (B, codes of all levels), and keys
               and values for the next position.
               Of other priors: from codes (B, T) int64, of which those from the position on are ignored, labels and position; to logits.
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

# Batch size of the traced inputs: with 1, the exporter would take the batch axis for a constant.
_TRACED = 2


class Method(nn.Module):
    """A method of a module, wrapped as a module for tracing."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, argument: Any) -> Any:
        """Call the method."""
        return getattr(self.module, self.name)(argument)


class CachedStep(nn.Module):
    """One step of a transformer over all levels, with its cache as inputs and outputs."""

    def __init__(self, prior: Transformer) -> None:
        super().__init__()
        self.prior = prior
        self.register_buffer("positions", prior.position_embeddings())

    positions: Tensor

    def forward(self, tokens: Tensor, labels: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the outputs of prior.onnx of a transformer (see the module's docstring)."""
        prior, layers = self.prior, []
        for layer_keys, layer_values in zip(keys.unbind(1), values.unbind(1), strict=True):
            layer_cache = KeyValueCache.__new__(KeyValueCache)
            layer_cache.keys, layer_cache.values = layer_keys.clone(), layer_values.clone()
            layers.append(layer_cache)
        cache = TransformerCache(layers, self.positions, None)
        x = prior.embed_step(torch.where(position == 0, prior.start, prior.token(tokens)), labels, cache, position)
        logits = F.linear(prior.norm(prior.features(x, cache, position)), prior.head.weight)
        return logits, torch.stack([layer.keys for layer in layers], 1), torch.stack([layer.values for layer in layers], 1)


class UncachedStep(nn.Module):
    """One step of any prior without a cache: it computes the logits of all positions from the codes so far and selects one."""

    def __init__(self, prior: StepwisePrior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, codes: Tensor, labels: Tensor, position: Tensor) -> Tensor:
        """Compute the output of prior.onnx of other priors. Logits of levels that do not contain the position are of another position."""
        level_logits, start = [], 0
        for logits in self.prior.logits(self.prior.layout.grids_of(codes), labels):
            index = (position - start).clamp(0, logits.shape[1] - 1)
            level_logits.append(logits.index_select(1, index)[:, 0])
            start += logits.shape[1]
        return torch.cat(level_logits, -1)


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
        arguments = (torch.zeros(_TRACED, dtype=torch.int64), labels, position, cache, cache.clone())
        names = ["tokens", "labels", "position", "keys", "values"]
        _export(CachedStep(prior), arguments, names, ["logits", "next_keys", "next_values"], folder / "prior.onnx")
        return shape
    codes = torch.zeros(_TRACED, prior.layout.length, dtype=torch.int64)
    _export(UncachedStep(prior), (codes, labels, position), ["codes", "labels", "position"], ["logits"], folder / "prior.onnx")
    return None


@torch.no_grad()
def _export(module: nn.Module, arguments: tuple[Any, ...], inputs: Sequence[str], outputs: Sequence[str], path: Path) -> None:
    # A batch of 1 works too, but torch 2.9 cannot prove it.
    batch = torch.export.Dim("batch", min=_TRACED)

    def dynamic(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(dynamic, argument))
        return {0: batch} if len(argument) == _TRACED else None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names of axes, and about calls inside the exporter
        program = torch.onnx.export(
            module.eval(),
            arguments,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple(map(dynamic, arguments)),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    _strip(program.model)
    program.save(path)


def _strip(model: Any) -> None:
    """Remove the metadata of each node: the file and line on this machine where it was traced."""
    for graph in (model.graph, *model.functions.values()):
        nodes = list(graph.all_nodes())
        for item in (model, graph, *graph.inputs, *nodes, *(value for node in nodes for value in node.outputs)):
            item.metadata_props.clear()
            item.doc_string = None
