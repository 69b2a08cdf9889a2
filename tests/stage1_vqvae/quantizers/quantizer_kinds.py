"""Settings of every kind of quantizer, for z of D = 8 channels."""

from __future__ import annotations

import torch

from configs.parts import QuantizerPart, part_from
from stage1_vqvae.quantizers.contract import Quantizer

D = 8
KINDS: dict[str, dict[str, object]] = {
    "ema": {"kind": "ema"},
    "gradient": {"kind": "gradient"},
    "ema_cosine_projected": {"kind": "ema", "metric": "cosine", "codebook_dim": 4},
    "gradient_cosine_projected": {"kind": "gradient", "metric": "cosine", "codebook_dim": 4},
    "ema_rotation": {"kind": "ema", "gradient_estimator": "rotation"},
    "gradient_entropy": {"kind": "gradient", "entropy_weight": 0.1},
    "simvq": {"kind": "simvq"},
    "simvq_entropy": {"kind": "simvq", "entropy_weight": 0.1, "entropy_temperature": 0.5},
    "fsq": {"kind": "fsq", "levels": [2, 3, 4]},
    "lfq": {"kind": "lfq", "entropy_weight": 0.1},
    "residual": {"kind": "ema", "depth": 3},
    "residual_shared": {"kind": "ema", "depth": 3, "shared_codebook": True},
    "residual_gradient": {"kind": "gradient", "depth": 2},
    "residual_rotation": {"kind": "ema", "depth": 2, "gradient_estimator": "rotation"},
    "product": {"kind": "ema", "groups": 2},
    "product_cosine": {"kind": "gradient", "groups": 2, "metric": "cosine"},
    "product_residual_projected": {"kind": "ema", "groups": 2, "depth": 2, "codebook_dim": 6},
    "multiscale": {"kind": "multiscale", "scales": [1, 2, 3], "quantizer": {"kind": "ema", "num_codes": 16, "decay": 0.9}},
}


def part(kind: str, **changes: object) -> QuantizerPart:
    """Return the recipe section of a kind, with K = 16 and decay 0.9 unless the kind sets them."""
    chosen = KINDS[kind]
    decay = {"decay": 0.9} if chosen["kind"] in ("ema", "gradient") else {}
    small = {} if chosen["kind"] in ("fsq", "multiscale") else {"num_codes": 16, **decay}
    return part_from("tokenizer.quantizer", {**small, **chosen, **changes})


def build(kind: str, **changes: object) -> Quantizer:
    """Build a quantizer with reproducible weights."""
    torch.manual_seed(1)
    return part(kind, **changes).build(D)
