"""Small priors of every kind over every layout of codes, for the property tests."""

from __future__ import annotations

from typing import Any

import torch

from configs.parts import part_from
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.codes.store import Manifest
from stage2_prior.conditions.classes import Classes
from stage2_prior.conditions.contract import Condition
from stage2_prior.conditions.none import NoCondition
from stage2_prior.priors.contract import VariantEmbedding
from stage2_prior.priors.next_scale import NextScale
from stage2_prior.priors.stepwise import StepwisePrior
from stage2_prior.priors.transformer import Transformer

KINDS: dict[str, dict[str, Any]] = {
    "transformer": {"kind": "transformer"},
    "pixelcnn": {"kind": "pixelcnn"},
    "pixelcnn, attention": {"kind": "pixelcnn", "attention_interval": 2},
    "pixelcnn, kernel of 5": {"kind": "pixelcnn", "kernel_size": 5},
}
# A transformer that draws digits: for layouts with digits, of at most 4 values at once.
DIGITS: dict[str, Any] = {"kind": "transformer", "head": "digits", "digit_classes": 4}
# A transformer that draws a level at once: for layouts of several levels.
NEXT_SCALE: dict[str, Any] = {"kind": "next_scale"}
LAYOUTS = {
    "one level": SequenceLayout([(3, 4)], [9]),
    "one row": SequenceLayout([(1, 5)], [6]),
    "top and bottom": SequenceLayout([(1, 2), (2, 4)], [4, 6]),
    "residual": SequenceLayout([(2, 3)] * 3, [5, 5, 5]),
    "wide": SequenceLayout([(1, 7), (2, 7)], [3, 4]),
}


def classes(number: int) -> Condition:
    """Return the condition on classes 0, 1, ...; unconditional if there are none."""
    return Classes(names=[str(label) for label in range(number)]) if number else NoCondition()


def build(kind: str, layout: SequenceLayout, num_classes: int = 5, num_variants: int = 1, **settings: Any) -> StepwisePrior:
    """Build a prior in eval mode, its weights large enough for differences to show; `levelwise` alternates transformers and PixelCNNs."""
    torch.manual_seed(0)
    sizes = {"layers": 3, "width": 32, "heads": 4, "dropout": 0.0}
    if kind.startswith("levelwise"):
        chosen = [DIGITS] if kind.endswith("digits") else list(KINDS.values())
        alternating = [{**sizes, **chosen[level % 2 % len(chosen)], **settings} for level in range(len(layout.grids))]
        config = part_from("prior", {"kind": "levelwise", "levels": alternating})
    else:
        config = part_from("prior", {**sizes, **{**KINDS, "digits": DIGITS, "next_scale": NEXT_SCALE}[kind], **settings})
    prior = config.build(layout, classes(num_classes), num_variants)
    for part in getattr(prior, "parts", [prior]):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.3 if isinstance(part, Transformer | NextScale) else 0.15)
    for module in prior.modules():
        if isinstance(module, VariantEmbedding):
            torch.nn.init.zeros_(module.weight[0])
    return prior.eval()


def random_codes(layout: SequenceLayout, batch: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randint(k, (batch, *grid)) for grid, k in zip(layout.grids, layout.num_codes, strict=True))


def manifest(layout: SequenceLayout, num_classes: int = 0) -> Manifest:
    """Return the manifest of a code store with this layout."""
    return Manifest(
        split="train",
        rows=1,
        grids=layout.grids,
        num_codes=layout.num_codes,
        condition=classes(num_classes),
        augmentation="none",
        variants=1,
        image_shape=(3, 8, 8),
        tokenizer_sha256="0" * 64,
        rows_per_shard=1,
        sha256=[],
    )
