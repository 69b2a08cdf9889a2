"""Codes taken into one's own hands: exchanged, mixed, looked at one by one."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from pipelines.drawing import Label
from pipelines.generator import Generator
from stage1_vqvae.model import VQVAE
from stage1_vqvae.quantizers.contract import Codes, Levels
from stage1_vqvae.quantizers.search import nearest_codes as nearest_vectors


class Place(NamedTuple):
    """Where a code stands in an image."""

    level: int
    row: int
    column: int

    def of(self, codes: Codes) -> int:
        """The code that stands there in the first of some images."""
        return int(codes[self.level][0, self.row, self.column])


class Candidate(NamedTuple):
    """A code that might stand in a place, and the image (H, W, C) with it there."""

    code: int
    picture: Tensor
    bits: float | None
    """What it would cost there, given the codes before it; None: there is no prior."""
    total: float | None
    """What all codes of the image would cost."""


def exchanged(codes: Codes, place: Place, code: int) -> Codes:
    """The codes of an image, (1, h, w) a level, with another one in a place."""
    changed = tuple(level.clone() for level in codes)
    changed[place.level][0, place.row, place.column] = code
    return changed


@cache
def _code_vectors(quantizer: Levels) -> tuple[Tensor, ...]:
    return tuple(vectors.cpu() for vectors in quantizer.code_vectors())


def nearest_codes(tokenizer: VQVAE, level: int, code: int, count: int) -> list[int]:
    """The codes of a level whose vectors are nearest to a code's, which is not among them, nearest first."""
    vectors = _code_vectors(tokenizer.quantizer)[level]
    distances = (vectors - vectors[code]).square().sum(1)
    distances[code] = math.inf
    return distances.topk(min(count, len(vectors) - 1), largest=False).indices.tolist()


@torch.no_grad()
def likeliest_codes(generator: Generator, codes: Codes, label: Label | None, place: Place, count: int) -> list[int]:
    """The codes that the prior finds likeliest in a place of an image (1, h, w) a level, given those before it, likeliest first."""
    prior, labels = generator.exact_prior, generator.labels_given(label, 1)
    logits = prior(tuple(level.to(prior.device) for level in codes), None if labels is None else labels.to(prior.device))[place.level]
    logits_here = logits[0, place.row * codes[place.level].shape[2] + place.column]
    return logits_here.topk(min(count, len(logits_here))).indices.tolist()


def candidates(generator: Generator, codes: Codes, label: Label | None, place: Place, alternatives: list[int]) -> list[Candidate]:
    """What an image's codes (1, h, w) a level would be with each of the codes found in a place."""
    if not alternatives:
        return []
    changed = tuple(torch.cat(level) for level in zip(*(exchanged(codes, place, code) for code in alternatives), strict=True))
    pictures = generator.decode(changed, output="tensor")
    if generator.prior is None:
        return [Candidate(code, picture, None, None) for code, picture in zip(alternatives, pictures, strict=True)]
    bits = generator.surprisals(changed, label)
    bits_here = bits[place.level][:, place.row, place.column].tolist()
    totals = sum(level.flatten(1).sum(1) for level in bits)
    assert isinstance(totals, Tensor)
    return [Candidate(*each) for each in zip(alternatives, pictures, bits_here, totals.tolist(), strict=True)]


@torch.no_grad()
def walk(tokenizer: VQVAE, first: Codes, last: Codes, count: int) -> Codes:
    """Codes (count, h, w) a level on the way from one image's to another's, (1, h, w) a level both, which are its ends.

    Between them, where they differ, those nearest to what lies on the straight line from the one's vectors to the other's; of several
    levels of a grid the nearest of the first, then of the second to what is left, and so on.
    """
    share = torch.linspace(0, 1, count)[:, None, None, None]
    levels_codes, level = [], 0
    for quantizer in tokenizer.quantizers:
        # What codes add beside those of other levels: unlike the quantizer itself, it knows of no projection that is not undone.
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


def code_patches(generator: Generator, level: int, numbers: list[int]) -> Tensor:
    """What codes of a level look like: each decoded at the centre of plain ones, and cut out of that: uint8 (N, h', w', C).

    Plain is the code of its level whose vector is nearest to the mean of all.
    """
    tokenizer = generator.tokenizer
    rows, columns = tokenizer.grids[level]
    plain = [vectors.square().sum(1).argmin() for vectors in _code_vectors(tokenizer.quantizer)]
    grids = [code.repeat(len(numbers), *grid) for code, grid in zip(plain, tokenizer.grids, strict=True)]
    grids[level][:, rows // 2, columns // 2] = torch.tensor(numbers)
    pictures = generator.decode(tuple(grids), output="tensor")
    cells = rearrange(pictures, "n (r h) (c w) channel -> n r c h w channel", r=rows, c=columns)
    return cells[:, rows // 2, columns // 2]
