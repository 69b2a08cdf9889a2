"""Weights of networks that others have trained: tensors alone are read, whatever else is in a file."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from configs.errors import UserError, brief
from training.weights_file import check_finite_weights


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights in a safetensors file, or in one of torch, of which only tensors are read.

    Errors: UserError for another file, or weights that are not finite.
    """
    wanted = f"{path}: expected weights (safetensors, or torch's format with named tensors alone)"
    try:
        is_safetensors = path.suffix == ".safetensors"
        found = safetensors.torch.load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: pickle's own, zip's, safetensors'
        raise UserError(f"{wanted}, found: {brief(error)}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()):
        raise UserError(f"{wanted}, found a {type(found).__name__}")
    check_finite_weights(found, f"{path}: ")
    return dict(found)
