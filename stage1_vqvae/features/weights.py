"""Weights of third-party networks: only tensors are read, never executable content."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from configs.errors import UserError, brief
from training.weights_file import check_finite_weights


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read weights from a safetensors file, or from torch's format with `weights_only`.

    Errors: UserError for another file, or weights that are not finite.
    """
    expected = f"{path}: expected weights (safetensors, or torch's format with named tensors alone)"
    try:
        is_safetensors = path.suffix == ".safetensors"
        content = safetensors.torch.load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors each have their own
        raise UserError(f"{expected}, found: {brief(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        raise UserError(f"{expected}, found a {type(content).__name__}")
    check_finite_weights(content, f"{path}: ")
    return dict(content)
