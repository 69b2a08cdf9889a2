"""Residual quantization at growing grids: grids, sums, what learns from what, recipes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from configs.errors import UserError
from configs.parts import part_from
from configs.recipe_file import load_recipe
from stage1_vqvae.quantizers.composed import ResidualQuantizer
from stage1_vqvae.quantizers.gradients import straight_through
from stage1_vqvae.quantizers.multiscale import MultiscalePart, MultiscaleQuantizer
from tests.stage1_vqvae.quantizers.quantizer_kinds import KINDS, D

# Every quantizer that can be the inner one.
INNER = [kind for kind in KINDS if kind != "multiscale"]


def build(inner: str = "ema", scales: tuple[int, ...] = (1, 2, 3), smooth: bool = True) -> MultiscaleQuantizer:
    small = {"num_codes": 16} if KINDS[inner]["kind"] != "fsq" else {}
    torch.manual_seed(1)
    part = part_from("tokenizer.quantizer", {"kind": "multiscale", "scales": list(scales), "quantizer": {**small, **KINDS[inner]}})
    quantizer = part.build(D)
    assert isinstance(quantizer, MultiscaleQuantizer)
    if smooth:
        for parameter in quantizer.smoothers.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return quantizer


def area_means(z: Tensor, height: int, width: int) -> Tensor:
    """Average z (B, D, H, W) over the pixels that each cell of a coarser grid overlaps."""
    rows, columns = (
        [(cell * full // coarse, -(-(cell + 1) * full // coarse)) for cell in range(coarse)]
        for full, coarse in zip(z.shape[2:], (height, width), strict=True)
    )
    cells = [z[:, :, top:bottom, left:right].mean((2, 3)) for top, bottom in rows for left, right in columns]
    return torch.stack(cells, -1).unflatten(-1, (height, width))


@pytest.mark.parametrize(("scales", "grid", "expected"), [
    ((), (7, 7), [(1, 1), (2, 2), (4, 4), (7, 7)]),
    ((), (16, 16), [(1, 1), (2, 2), (4, 4), (8, 8), (16, 16)]),
    ((), (2, 3), [(1, 1), (2, 2), (2, 3)]),
    ((1, 2, 3, 4, 6, 8), (8, 8), [(1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 8)]),
    ((2, 5, 8), (8, 4), [(2, 1), (5, 3), (8, 4)]),
    ((), (1, 1), [(1, 1)]),
])  # fmt: skip
def test_grids_grow_to_the_full_one(scales: tuple[int, ...], grid: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    part = MultiscalePart(scales=list(scales), quantizer={"num_codes": 4}).for_grid(*grid)
    quantizer = part.build(D)
    assert quantizer.level_grids(*grid) == expected
    assert quantizer.num_codes == (4,) * len(expected)
    output = quantizer(torch.randn(2, D, *grid))
    assert [tuple(level.shape[1:]) for level in output.codes] == expected


@pytest.mark.parametrize("inner", INNER)
def test_each_scale_quantizes_the_averaged_residual_of_those_before(inner: str) -> None:
    """Step by step, with the residual taken from `lookup` of the scales so far; and `lookup` gives the quantized vectors exactly."""
    quantizer = build(inner).eval()
    z = torch.randn(3, D, 4, 6)
    output = quantizer(z)
    assert torch.equal(output.z_q, quantizer.lookup(output.codes))
    levels = len(quantizer.inner.num_codes)
    latents = quantizer.down(z.movedim(1, -1)).movedim(-1, 1)
    total = torch.zeros_like(latents)
    for scale, grid in enumerate([(2, 2), (3, 4), (4, 6)]):
        rows = area_means(latents - total, *grid).movedim(1, -1).reshape(-1, quantizer.inner.dim)
        codes = output.codes[scale * levels : (scale + 1) * levels]
        part = quantizer.inner.quantize(rows)
        for found, expected in zip(codes, part.codes, strict=True):
            assert float((found.flatten() == expected).double().mean()) > 0.95  # but for ties of nearly equal distances
        vectors = quantizer.inner.lookup_rows(tuple(level.flatten() for level in codes)).view(3, *grid, -1).movedim(-1, 1)
        full = torch.nn.functional.interpolate(vectors, (4, 6), mode="bicubic")
        convolution = quantizer.smoothers[scale]
        total = total + full / 2 + torch.nn.functional.conv2d(full, convolution.weight, convolution.bias, padding=1) / 2
    assert torch.allclose(output.z_q, quantizer.up(total.movedim(1, -1)).movedim(-1, 1), atol=1e-5)


def test_on_one_grid_it_is_residual_quantization_with_a_shared_codebook() -> None:
    """Before the convolutions learn: of a single position all scales have one code. Codes, losses, latents and what the codebook learns."""
    quantizer = build("ema", smooth=False)
    residual = ResidualQuantizer([quantizer.inner], 3, straight_through)
    z = torch.randn(20, D, 1, 1)
    ours, theirs = quantizer(z), residual(z)
    assert all(torch.equal(a, b) for a, b in zip(ours.codes, theirs.codes, strict=True))
    assert torch.equal(ours.z_q, theirs.z_q)
    assert torch.allclose(ours.losses["commitment"], theirs.losses["commitment"])
    assert ours.statistics.keys() == theirs.statistics.keys()
    assert all(torch.allclose(ours.statistics[name], value, atol=1e-5) for name, value in theirs.statistics.items())
    assert torch.allclose(ours.latents[0], theirs.latents[0], atol=1e-6)
    state, learned = copy.deepcopy(quantizer.inner.state_dict()), []
    for each, output in ((quantizer, ours), (residual, theirs)):
        quantizer.inner.load_state_dict(state)
        each.update_(output.statistics)
        learned.append(copy.deepcopy(quantizer.inner.state_dict()))
    assert all(torch.allclose(value, learned[1][name], atol=1e-6) for name, value in learned[0].items())
    assert not torch.equal(learned[0]["codebook.weight"], state["codebook.weight"])


@pytest.mark.parametrize("inner", ["gradient", "gradient_cosine_projected", "fsq", "lfq"])
def test_terms_reach_what_they_should(inner: str) -> None:
    """Reconstruction: encoder and projections. Smoothing: the convolutions. All terms together: everything but the search."""
    quantizer = build(inner)
    z = torch.randn(4, D, 3, 3, requires_grad=True)
    names = [name for name, _ in quantizer.named_parameters()]

    def reached(loss: Tensor) -> set[str]:
        gradients = torch.autograd.grad(loss, [z, *quantizer.parameters()], allow_unused=True, retain_graph=True)
        return {name for name, slope in zip(["z", *names], gradients, strict=True) if slope is not None and bool((slope != 0).any())}

    output = quantizer(z)
    projections = {name for name in names if name.startswith(("up.", "down."))}
    assert reached((output.z_q * torch.randn(4, D, 3, 3)).sum()) == {"z"} | projections
    smoothers = {name for name in names if name.startswith("smoothers.")}
    assert reached(output.losses["smoothing"]) == smoothers
    assert reached(output.z_q.square().sum() + sum(output.losses.values())) == {"z", *names}


def test_the_smoothing_loss_is_the_error_of_all_partial_sums() -> None:
    quantizer = build().eval()
    z = torch.randn(3, D, 3, 3)
    output = quantizer(z)
    vectors = [quantizer.inner.lookup_rows((codes.flatten(),)).view(*codes.shape, D) for codes in output.codes]
    parts = torch.stack([quantizer._on_full_grid(level, scale, (3, 3)) for scale, level in enumerate(vectors)])
    assert torch.allclose(output.losses["smoothing"], (parts.cumsum(0) - z).square().mean((1, 2, 3, 4)).sum(), rtol=1e-5)


@pytest.mark.parametrize(("section", "message"), [
    ({"scales": [1, 2]}, r"tokenizer\.quantizer\.scales: expected the last one 3, the longer side of the grid of 2 x 3, found \[1, 2\]"),
    ({"scales": [2, 2, 3]}, r"tokenizer\.quantizer\.scales: expected growing numbers from 1 on, found \[2, 2, 3\]"),
    ({"quantizer": {"kind": "multiscale"}}, r"tokenizer\.quantizer\.quantizer: expected a quantizer of single grids, found multiscale"),
    ({"quantizer": {"num_codes": 1}}, r"tokenizer\.quantizer\.quantizer: .*num_codes: expected at least 2, found 1"),
    ({"quantizer": {"codes": 1}}, r"tokenizer\.quantizer\.quantizer: .*'codes'"),
    ({"quantizer": {"kind": "vq"}}, r"tokenizer\.quantizer\.quantizer: .*expected one of ema, .*, found vq"),
])  # fmt: skip
def test_impossible_settings_are_refused(section: dict[str, object], message: str, tmp_path: Path) -> None:
    content = {"data": {"height": 8, "width": 12}, "tokenizer": {"quantizer": {"kind": "multiscale", **section}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / "recipe.yaml")
