"""The tokenizer and prior behind an output, and whether the run still holds them; recipes and commands without paths."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from configs.run_dir import COMMANDS, RunDir
from configs.schema import Recipe
from training.weights_file import fingerprint

_ROUNDING_ONLY = ("batch_size", "precision")


def model_fingerprints(run: RunDir, prior: str | None) -> dict[str, Any]:
    """Return name and sha256 of the run's current prior and tokenizer, with the keys of the outputs' JSON. The sha256 of the uniform prior,
    which has no file, is None.
    """
    file = None if prior is None else run.prior(prior) / "prior.safetensors"
    sha256 = fingerprint(file) if file is not None and file.exists() else None
    return {"prior": prior, "prior_sha256": sha256, "tokenizer_sha256": fingerprint(run.tokenizer)}


def significant(settings: dict[str, Any]) -> dict[str, Any]:
    """Remove the settings that change an output by rounding only."""
    return {key: value for key, value in settings.items() if key not in _ROUNDING_ONLY}


def contains(actual: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Return whether a dictionary has all expected entries."""
    return all(key in actual and actual[key] == value for key, value in expected.items())


def outputs(run: RunDir, kind: str, file: str) -> list[Path]:
    """List the finished outputs of a pipeline, `kind`/NNN/`file`, oldest first."""
    paths = [path for path in (run.path / kind).glob(f"*/{file}") if path.parent.name.isdigit()]
    return sorted(paths, key=lambda path: int(path.parent.name))


def base_name(path: str) -> str:
    """Return the name of a file or folder without its path, so that it may be published."""
    return Path(os.path.expanduser(path)).resolve().name


def describe_weights(path: str | None) -> str | None:
    """Describe a file of weights by its name and the beginning of its sha256; None for no file."""
    if path is None:
        return None
    file = Path(os.path.expanduser(path))
    return f"{base_name(path)}, sha256 {fingerprint(file)[:16]}" if file.is_file() else base_name(path)


def publishable_recipe(recipe: Recipe) -> Recipe:
    """Remove the settings of one machine from a recipe: paths, and settings of reading and computing."""
    # A name that `datasets` opens may be a local folder.
    name = recipe.data.name if recipe.data.name is None or not _is_local(recipe.data.name) else base_name(recipe.data.name)
    data = dataclasses.replace(recipe.data, name=name, path=None, cache=None, workers=None)

    def without_weights(part: Any) -> Any:
        return dataclasses.replace(part, weights=None) if hasattr(part, "weights") else part

    init_from = recipe.stage1.init_from
    terms = {name: without_weights(getattr(recipe.stage1, name)) for name in ("perceptual", "adversarial")}
    stage1 = dataclasses.replace(recipe.stage1, init_from=None if init_from is None else base_name(init_from), **terms)
    evaluation = dataclasses.replace(recipe.evaluation, weights=None)
    return dataclasses.replace(recipe, data=data, stage1=stage1, evaluation=evaluation, compute=type(recipe.compute)())


def publishable_argument(argument: str) -> str:
    """Shorten a local path in an argument of a command to `./NAME`, or a script's path to its path in the repository."""
    option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    script = next((script for script in COMMANDS if value.endswith(f"/{script}")), None)
    return f"{option}{equals}{script or (f'./{base_name(value)}' if _is_local(value) else value)}"


def _is_local(text: str) -> bool:
    drive = text[1:3] in (":\\", ":/")
    return os.path.isabs(text) or drive or text.startswith(("~", "\\")) or ".." in re.split(r"[/\\]", text)
