"""Recipes as they were written before parts had fields of their own: the one place that knows their spelling.

Until format 2 `tokenizer` was one list of fields for all quantizers, and `prior` one for both kinds.
"""

from __future__ import annotations

from typing import Any

from configs.parts import FAMILIES

_QUANTIZER = {
    **{name: name for name in ("num_codes", "codebook_dim", "depth", "shared_codebook", "groups", "metric", "gradient_estimator")},
    **{name: name for name in ("initialisation", "commitment", "entropy_weight", "entropy_temperature", "restart_below")},
    "ema_decay": "decay",
    "fsq_levels": "levels",
}
_NETWORK = ("downsampling", "hidden_channels", "residual_blocks", "residual_channels")
SPELLINGS: dict[str, str] = {
    **{f"tokenizer.{old}": f"tokenizer.quantizer.{new}" for old, new in _QUANTIZER.items()},
    **{f"tokenizer.{name}": f"tokenizer.network.{name}" for name in _NETWORK},
    "tokenizer.reconstruction": "tokenizer.objective.kind",
}
"""Keys of then -> keys of now."""
# What meant something to some kinds only; `all` of the others' fields stood in every resolved recipe.
_OF_KIND = {
    "simvq": {"initialisation", "ema_decay", "restart_below", "fsq_levels"},
    "ema": {"fsq_levels"},
    "gradient": {"fsq_levels"},
    "fsq": set(_QUANTIZER) - {"fsq_levels"},
    "lfq": set(_QUANTIZER) - {"num_codes", "commitment", "entropy_weight", "entropy_temperature"},
}
_PIXELCNN_ONLY = ("kernel_size", "attention_interval")


def current_tokenizer(section: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer section in today's spelling; as it is, if it already was."""
    if not any(f"tokenizer.{name}" in SPELLINGS for name in section):
        return section
    kind = section.get("quantizer", "ema")
    unused = _OF_KIND.get(kind, set())
    quantizer = {new: section[old] for old, new in _QUANTIZER.items() if old in section and old not in unused}
    if kind == "lfq":
        quantizer.setdefault("entropy_temperature", 1.0)  # its default then
    found: dict[str, Any] = {name: value for name, value in section.items() if f"tokenizer.{name}" not in SPELLINGS}
    found["quantizer"] = {"kind": kind, **quantizer}
    found["network"] = {"kind": "convolutional", **{name: section[name] for name in _NETWORK if name in section}}
    found["objective"] = {"kind": section.get("reconstruction", "mse")}
    return found


def current_prior(section: dict[str, Any]) -> dict[str, Any]:
    """A prior section in today's spelling: a transformer's without the fields that a PixelCNN alone uses."""
    if section.get("kind", next(iter(FAMILIES["prior"]))) != "transformer":
        return section
    return {name: value for name, value in section.items() if name not in _PIXELCNN_ONLY}
