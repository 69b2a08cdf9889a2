"""Every quantizer there is, by the recipe's own switches; all of them take z of D = 8 channels."""

from __future__ import annotations

import torch

from configs.schema import Tokenizer
from stage1_vqvae.quantizers.build import build_quantizer
from stage1_vqvae.quantizers.contract import Quantizer

D = 8
KINDS: dict[str, dict[str, object]] = {
    "ema": {"quantizer": "ema"},
    "gradient": {"quantizer": "gradient"},
    "ema_cosine_projected": {"quantizer": "ema", "metric": "cosine", "codebook_dim": 4},
    "gradient_cosine_projected": {"quantizer": "gradient", "metric": "cosine", "codebook_dim": 4},
    "ema_rotation": {"quantizer": "ema", "gradient_estimator": "rotation"},
    "gradient_entropy": {"quantizer": "gradient", "entropy_weight": 0.1},
    "simvq": {"quantizer": "simvq"},
    "simvq_entropy": {"quantizer": "simvq", "entropy_weight": 0.1, "entropy_temperature": 0.5},
    "fsq": {"quantizer": "fsq", "fsq_levels": [2, 3, 4], "num_codes": 24},
    "lfq": {"quantizer": "lfq", "entropy_weight": 0.1},
    "residual": {"quantizer": "ema", "depth": 3},
    "residual_shared": {"quantizer": "ema", "depth": 3, "shared_codebook": True},
    "residual_gradient": {"quantizer": "gradient", "depth": 2},
    "residual_rotation": {"quantizer": "ema", "depth": 2, "gradient_estimator": "rotation"},
    "product": {"quantizer": "ema", "groups": 2},
    "product_cosine": {"quantizer": "gradient", "groups": 2, "metric": "cosine"},
    "product_residual_projected": {"quantizer": "ema", "groups": 2, "depth": 2, "codebook_dim": 6},
}


def section(kind: str, **changes: object) -> Tokenizer:
    """The tokenizer section of a kind, K = 16 where the kind does not say."""
    return Tokenizer(**{"num_codes": 16, "code_dim": D, "ema_decay": 0.9, **KINDS[kind], **changes})  # type: ignore[arg-type]


def build(kind: str, **changes: object) -> Quantizer:
    """A quantizer of a kind, its weights the same every time."""
    torch.manual_seed(1)
    return build_quantizer(section(kind, **changes))
