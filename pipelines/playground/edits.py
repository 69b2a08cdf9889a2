"""Edits of codes: replacing and interpolating them, and decoding them one by one."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.conditioning import requested_condition
from pipelines.generator import Generator
from stage1_vqvae.model import VQVAE
from stage1_vqvae.quantizers.contract import Codes, Levels
from stage1_vqvae.quantizers.multiscale import MultiscaleQuantizer
from stage1_vqvae.quantizers.search import nearest_codes as nearest_vectors
from stage2_prior.conditions.contract import Label
from stage2_prior.priors.stepwise import StepwisePrior


class Place(NamedTuple):
    """Position of a code in an image."""

    level: int
    row: int
    column: int

    def of(self, codes: Codes) -> int:
        """Return the code at this position in the first image."""
        return int(codes[self.level][0, self.row, self.column])


class Candidate(NamedTuple):
    """An alternative code at a position, and the image (H, W, C) with it."""

    code: int
    picture: Tensor
    bits: float | None
    """Bits of the code there, given those before it; None without a prior."""
    total: float | None
    """Bits of all codes of the image."""


def replaced(codes: Codes, place: Place, code: int) -> Codes:
    """Replace one code of an image, (1, h, w) per level."""
    changed = tuple(level.clone() for level in codes)
    changed[place.level][0, place.row, place.column] = code
    return changed


@cache
def _code_vectors(quantizer: Levels) -> tuple[Tensor, ...]:
    return tuple(vectors.cpu() for vectors in quantizer.code_vectors())


def nearest_codes(tokenizer: VQVAE, level: int, code: int, count: int) -> list[int]:
    """List the other codes of a level by the distance of their vectors from a code's, nearest first."""
    vectors = _code_vectors(tokenizer.quantizer)[level]
    distances = (vectors - vectors[code]).square().sum(1)
    distances[code] = math.inf
    return distances.topk(min(count, len(vectors) - 1), largest=False).indices.tolist()


@torch.no_grad()
def most_likely_codes(generator: Generator, codes: Codes, label: Label | None, place: Place, count: int) -> list[int]:
    """List the most likely codes at a position of an image, (1, h, w) per level, given those before it, in descending order."""
    prior, condition = generator.exact_prior("most likely codes"), requested_condition(generator.header, label, 1)
    condition = None if condition is None else condition.to(prior.device)
    index = place.row * codes[place.level].shape[2] + place.column
    logits_here = prior.code_logits(tuple(level.to(prior.device) for level in codes), condition, place.level, index)[0]
    return logits_here.topk(min(count, len(logits_here))).indices.tolist()


def candidates(generator: Generator, codes: Codes, label: Label | None, place: Place, alternatives: list[int]) -> list[Candidate]:
    """Compute the image of codes (1, h, w) per level, and its bits, with each alternative at a position."""
    if not alternatives:
        return []
    changed = tuple(torch.cat(level) for level in zip(*(replaced(codes, place, code) for code in alternatives), strict=True))
    pictures = generator.decode(changed, output="tensor")
    if not isinstance(generator.prior, StepwisePrior):
        return [Candidate(code, picture, None, None) for code, picture in zip(alternatives, pictures, strict=True)]
    bits = generator.surprisals(changed, label)
    bits_here = bits[place.level][:, place.row, place.column].tolist()
    totals = sum(level.flatten(1).sum(1) for level in bits)
    assert isinstance(totals, Tensor)
    return [Candidate(*each) for each in zip(alternatives, pictures, bits_here, totals.tolist(), strict=True)]


@torch.no_grad()
def walk(tokenizer: VQVAE, first: Codes, last: Codes, count: int) -> Codes:
    """Interpolate between the codes of two images, (1, h, w) per level: codes (count, h, w) per level, including both ends.

    Where they differ, each step takes the codes nearest to the linear interpolation of their vectors: with several levels of a grid, the
    nearest code of the first level, then the code of the second level nearest to the residual, and so on. Multiscale codes, each of which
    reaches all pixels, are those of the interpolated sums; an end keeps its own.
    """
    share = torch.linspace(0, 1, count)[:, None, None, None]
    levels_codes, level = [], 0
    for quantizer in tokenizer.quantizers:
        if isinstance(quantizer, MultiscaleQuantizer):
            chosen = slice(level, level + len(quantizer.num_codes))
            levels_codes += _multiscale_walk(quantizer, first[chosen], last[chosen], share)
            level = chosen.stop
            continue
        # Vectors of the levels, which add up, in the space before projections.
        codebooks = [vectors.cpu() for vectors in quantizer.code_vectors()]
        levels = range(level, level + len(codebooks))
        start, end = (
            torch.stack([vectors[codes[number][0]] for vectors, number in zip(codebooks, levels, strict=True)]).sum(0)
            for codes in (first, last)
        )
        residual = torch.lerp(start, end, share)
        same = torch.stack([first[number] == last[number] for number in levels]).all(0)
        at_an_end = torch.zeros(count, 1, 1, dtype=torch.bool).index_fill(0, torch.tensor([0, count - 1]), True)
        for vectors, number in zip(codebooks, levels, strict=True):
            nearest = nearest_vectors(residual.flatten(0, 2), vectors).view(residual.shape[:3])
            endpoint = torch.where(share[..., 0] < 0.5, first[number], last[number])
            nearest = torch.where(same | at_an_end, endpoint, nearest)
            levels_codes.append(nearest)
            residual = residual - vectors[nearest]
        level = levels.stop
    return tuple(levels_codes)


def _multiscale_walk(quantizer: MultiscaleQuantizer, first: Codes, last: Codes, share: Tensor) -> list[Tensor]:
    """`walk` for all levels of one multiscale quantizer; `share` (count, 1, 1, 1) from 0 to 1."""
    device = next(quantizer.parameters()).device
    start, end = (quantizer.lookup(tuple(level.to(device) for level in codes)) for codes in (first, last))
    between = quantizer(torch.lerp(start, end, share[1:-1].to(device))).codes
    return [torch.cat([level, middle.cpu(), other]) for level, middle, other in zip(first, between, last, strict=True)]


def code_patches(generator: Generator, level: int, numbers: list[int]) -> Tensor:
    """Decode codes of a level one by one, each in the centre of plain codes, and crop its patch: uint8 (N, h', w', C).

    The plain code of a level is the one with the shortest vector.
    """
    tokenizer = generator.tokenizer
    rows, columns = tokenizer.grids[level]
    plain = [vectors.square().sum(1).argmin() for vectors in _code_vectors(tokenizer.quantizer)]
    grids = [code.repeat(len(numbers), *grid) for code, grid in zip(plain, tokenizer.grids, strict=True)]
    grids[level][:, rows // 2, columns // 2] = torch.tensor(numbers)
    pictures = generator.decode(tuple(grids), output="tensor")
    height, width = pictures.shape[1] // rows, pictures.shape[2] // columns
    top, left = rows // 2 * pictures.shape[1] // rows, columns // 2 * pictures.shape[2] // columns
    return pictures[:, top : top + height, left : left + width]
