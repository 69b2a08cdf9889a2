"""Of which tokenizer and prior a pipeline's output is, and whether the run still holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.run_dir import RunDir
from stage1_vqvae.training.weights_file import fingerprint

_OF_ROUNDING = ("batch_size", "precision")


def identity(run: RunDir, prior: str | None) -> dict[str, Any]:
    """Name and sha256 of the run's prior and tokenizer as they are now, under the keys that outputs' JSON has; the prior's sha256 is None
    where there is no file of it (the uniform prior).
    """
    file = None if prior is None else run.prior(prior) / "prior.safetensors"
    sha256 = fingerprint(file) if file is not None and file.exists() else None
    return {"prior": prior, "prior_sha256": sha256, "tokenizer_sha256": fingerprint(run.tokenizer)}


def seen(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that change an output by rounding alone."""
    return {key: value for key, value in settings.items() if key not in _OF_ROUNDING}


def agrees(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether all that is wanted was found."""
    return all(key in found and found[key] == value for key, value in wanted.items())


def outputs(run: RunDir, kind: str, file: str) -> list[Path]:
    """The finished outputs of a pipeline, `kind`/NNN/`file`, oldest first."""
    found = [path for path in (run.path / kind).glob(f"*/{file}") if path.parent.name.isdigit()]
    return sorted(found, key=lambda path: int(path.parent.name))
