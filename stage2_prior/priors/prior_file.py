"""The prior file: weights and a header with everything that sampling needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.errors import UserError, listed, require
from configs.parts import PriorPart, as_dict
from configs.prior_name import UNIFORM
from configs.run_dir import RunDir
from configs.schema import condition_from, prior_from
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.codes.store import Manifest
from stage2_prior.conditions.contract import Condition
from stage2_prior.conditions.guidance_free import GuidanceFree
from stage2_prior.priors.contract import GuidedPart, Prior
from stage2_prior.priors.levelwise import build_level
from training.weights_file import built_from, fingerprint, load_weights, read_header, save_weights

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class PriorHeader:
    """Header of a prior file."""

    config: PriorPart
    grids: list[tuple[int, int]]
    num_codes: list[int]
    condition: Condition
    """Condition of the prior, completed from its data set: for classes, with their names."""
    supports_unconditional: bool
    """Whether it has learned p(codes) too, which guidance needs: trained with condition dropout, or without a condition."""
    tokenizer_sha256: str
    digits: list[list[int]] = field(default_factory=list)
    """Sizes of the digits of a code, per level, as in the codes' manifest."""
    num_variants: int = 1
    """Variants of the images whose codes it was trained on; see contract.py."""
    level: int | None = None
    """The one level that it models, from 0 on, given those above; null: all of them."""
    steps: int
    """Training steps."""
    bits_per_token: float
    """Mean bits per token on the validation split."""

    @classmethod
    def of(
        cls,
        config: PriorPart,
        condition: Condition,
        manifest: Manifest,
        supports_unconditional: bool,
        steps: int,
        bits_per_token: float,
        level: int | None = None,
    ) -> PriorHeader:
        """Build the header of a prior trained on codes of this manifest."""
        return cls(
            config=config.resolved(),
            grids=manifest.grids,
            num_codes=manifest.num_codes,
            digits=manifest.digits,
            condition=condition,
            supports_unconditional=supports_unconditional,
            tokenizer_sha256=manifest.tokenizer_sha256,
            num_variants=manifest.variants,
            level=level,
            steps=steps,
            bits_per_token=bits_per_token,
        )


def build_prior(config: PriorPart, condition: Condition, manifest: Manifest, level: int | None = None) -> Prior:
    """Build a prior with fresh weights for codes of this manifest, or for one level of them given those above."""
    return _built(config, SequenceLayout(manifest.grids, manifest.num_codes, manifest.digits), level, condition, manifest.variants)


def _built(config: PriorPart, layout: SequenceLayout, level: int | None, condition: Condition, num_variants: int) -> Prior:
    if level is None and isinstance(config, GuidedPart) and config.guidance_free:
        require(condition.kind != "none", "prior.guidance_free", "false without a condition", True)
        return config.build(layout, GuidanceFree(condition), num_variants)
    if level is None:
        return config.build(layout, condition, num_variants)
    return build_level(config, layout, level, condition, num_variants)


def check_tokenizer(where: str, found: str, expected: str) -> None:
    """Errors: UserError if a prior (or its checkpoint) was trained on codes of another tokenizer, by sha256."""
    if found != expected:
        wanted = f"expected a prior over codes of the run's tokenizer {expected[:12]}"
        raise UserError(f"{where}: {wanted}, found one over codes of {found[:12]}; train another with --name NAME")


def save_prior(path: Path, weights: dict[str, Tensor], header: PriorHeader) -> None:
    """Write a prior's weights and header, atomically."""
    save_weights(path, weights, {"kind": "prior", "format": _FORMAT, **as_dict(header)})


def learned_name(run: RunDir, name: str | None) -> str | None:
    """Return the name of the learned prior that an option `--prior NAME` means, by default the last finished; None if there is none."""
    return None if name == UNIFORM else name or run.last_prior()


def finished_prior(run: RunDir, name: str | None, command: str) -> Path:
    """Return the file of the run's prior of that name; None: of the last finished one.

    Errors: UserError if there is none, naming the `command` that trains one, and for the uniform prior, which has no file.
    """
    if name == UNIFORM:
        raise UserError(f"--prior: expected a learned prior, found {UNIFORM}")
    finished = run.finished_priors()
    name = learned_name(run, name)
    if name is None:
        raise UserError(f"{run}: it has no finished prior; run first: {command}")
    if name not in finished:
        raise UserError(f"--prior {name}: expected one of {listed([*finished, UNIFORM])}, found no such finished prior in {run}")
    return run.prior(name) / "prior.safetensors"


class LoadedPrior(NamedTuple):
    """A finished prior of a run, in eval mode."""

    prior: Prior
    header: PriorHeader
    name: str


def load_finished(run: RunDir, name: str | None, command: str, device: torch.device | str = "cpu") -> LoadedPrior:
    """Load the prior of `finished_prior`. Errors: as there, and UserError if its codes are another tokenizer's."""
    path = finished_prior(run, name, command)
    return LoadedPrior(*load_prior(path, fingerprint(run.tokenizer), device), path.parent.name)


def drawn_prior(run: RunDir, name: str | None) -> PriorPart | None:
    """Return the fields of the prior that a command with the option `--prior NAME` draws from; None: not a learned one, or not finished."""
    name = learned_name(run, name)
    path = None if name is None else run.prior(name) / "prior.safetensors"
    return None if path is None or not path.exists() else prior_from(read_prior_header(path)["config"])


def read_prior_header(path: Path) -> dict[str, Any]:
    """Read the header of a prior file as JSON. Errors: UserError for another file."""
    content = read_header(path, "prior")
    _check_format(path, content)
    return content


def _check_format(path: Path, content: dict[str, Any]) -> None:
    if content.get("format") != _FORMAT:
        found = content.get("format")
        raise UserError(f"{RunDir.show(path)}: expected a prior of format {_FORMAT}, found {found}; train another with --name NAME")


def load_prior(path: Path, tokenizer_sha256: str, device: torch.device | str = "cpu") -> tuple[Prior, PriorHeader]:
    """Load a prior in eval mode and its header. Errors: UserError for another file, or codes of another tokenizer."""
    weights, content = load_weights(path, "prior")
    _check_format(path, content)
    with built_from(path, "prior"):
        fields: dict[str, Any] = {each.name: content[each.name] for each in dataclasses.fields(PriorHeader) if each.name in content}
        parts = {"config": prior_from(content["config"]), "condition": condition_from(content["condition"])}
        header = PriorHeader(**{**fields, **parts, "grids": [tuple(grid) for grid in content["grids"]]})
    check_tokenizer(RunDir.show(path), header.tokenizer_sha256, tokenizer_sha256)
    with built_from(path, "prior"):
        layout = SequenceLayout(header.grids, header.num_codes, header.digits)
        prior = _built(header.config, layout, header.level, header.condition, header.num_variants)
        prior.load_state_dict(weights)
    return prior.to(device).eval().requires_grad_(False), header
