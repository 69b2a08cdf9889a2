"""Of which tokenizer and prior a pipeline's output is, whether the run still holds them, and what others may read of it: no paths."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from configs.run_dir import COMMANDS, RunDir
from configs.schema import Recipe
from training.weights_file import fingerprint

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


def base_name(path: str) -> str:
    """The name of a file or folder without its place: what may be published of it."""
    return Path(os.path.expanduser(path)).resolve().name


def described_weights(path: str | None) -> str | None:
    """A file of weights by its name and the beginning of its sha256, as an evaluation records it; None: none is named."""
    if path is None:
        return None
    file = Path(os.path.expanduser(path))
    return f"{base_name(path)}, sha256 {fingerprint(file)[:16]}" if file.is_file() else base_name(path)


def without_machine(recipe: Recipe) -> Recipe:
    """A recipe without what is true of one machine alone: paths, and how images are read there."""
    # `datasets` takes a folder of this machine for a name, too.
    name = recipe.data.name if recipe.data.name is None or not _is_local(recipe.data.name) else base_name(recipe.data.name)
    data = dataclasses.replace(recipe.data, name=name, path=None, cache=None, workers=None)

    def without_weights(part: Any) -> Any:
        return dataclasses.replace(part, weights=None) if hasattr(part, "weights") else part

    began = recipe.stage1.init_from
    terms = {name: without_weights(getattr(recipe.stage1, name)) for name in ("perceptual", "adversarial")}
    stage1 = dataclasses.replace(recipe.stage1, init_from=None if began is None else base_name(began), **terms)
    evaluation = dataclasses.replace(recipe.evaluation, weights=None)
    return dataclasses.replace(recipe, data=data, stage1=stage1, evaluation=evaluation, compute=type(recipe.compute)())


def without_places(argument: str) -> str:
    """A word of a command, its path (absolute, below a home, or by way of a folder above) as from the folder that it lies in, one of a
    script as from the checkout.
    """
    option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    script = next((script for script in COMMANDS if value.endswith(f"/{script}")), None)
    return f"{option}{equals}{script or (f'./{base_name(value)}' if _is_local(value) else value)}"


def _is_local(text: str) -> bool:
    drive = text[1:3] in (":\\", ":/")
    return os.path.isabs(text) or drive or text.startswith(("~", "\\")) or ".." in re.split(r"[/\\]", text)
