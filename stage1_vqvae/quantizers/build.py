"""From a recipe's tokenizer section to its quantizer."""

from __future__ import annotations

from configs.schema import Tokenizer
from stage1_vqvae.quantizers.codebook import Codebook, GradientCodebook, LinearCodebook, MovingAverageCodebook
from stage1_vqvae.quantizers.composed import ProductQuantizer, ProjectedQuantizer, ResidualQuantizer
from stage1_vqvae.quantizers.contract import Quantizer
from stage1_vqvae.quantizers.gradients import ESTIMATORS
from stage1_vqvae.quantizers.scalar import FiniteScalarQuantizer, LookupFreeQuantizer
from stage1_vqvae.quantizers.vector import VectorQuantizer

_RULES: dict[str, type[Codebook]] = {"ema": MovingAverageCodebook, "gradient": GradientCodebook, "simvq": LinearCodebook}


def build_quantizer(config: Tokenizer) -> Quantizer:
    """Codebooks, one a level and group; residual over depths; product over groups; projected if the widths differ."""
    inner: Quantizer
    if config.quantizer == "fsq":
        inner = FiniteScalarQuantizer(config.fsq_levels)
    elif config.quantizer == "lfq":
        inner = LookupFreeQuantizer(
            config.num_codes,
            commitment=config.commitment,
            entropy_weight=config.entropy_weight,
            entropy_temperature=config.entropy_temperature,
        )
    else:
        width = config.codebook_dim or config.code_dim
        groups = [_residual(config, width // config.groups) for _ in range(config.groups)]
        inner = groups[0] if config.groups == 1 else ProductQuantizer(groups)
    return inner if inner.dim == config.code_dim and config.codebook_dim == 0 else ProjectedQuantizer(config.code_dim, inner)


def _residual(config: Tokenizer, width: int) -> Quantizer:
    stages = [_leaf(config, width) for _ in range(1 if config.shared_codebook else config.depth)]
    return stages[0] if config.depth == 1 else ResidualQuantizer(stages, config.depth, ESTIMATORS[config.gradient_estimator])


def _leaf(config: Tokenizer, width: int) -> Quantizer:
    return VectorQuantizer(
        _RULES[config.quantizer](config.num_codes, width, config.ema_decay, config.restart_below, config.metric),
        commitment=config.commitment,
        estimator=ESTIMATORS[config.gradient_estimator],
        entropy_weight=config.entropy_weight,
        entropy_temperature=config.entropy_temperature,
    )
