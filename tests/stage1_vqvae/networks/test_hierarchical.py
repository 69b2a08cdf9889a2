"""Hierarchical tokenizers (VQ-VAE-2) with every quantizer and several numbers of grids."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.parts import part_from
from configs.recipe_file import load_recipe
from configs.run_dir import RunDir
from configs.schema import Tokenizer
from stage1_vqvae.model import VQVAE, load_tokenizer, save_tokenizer
from stage1_vqvae.networks.hierarchical import HierarchicalPart
from stage1_vqvae.quantizers.contract import level_counts
from stage1_vqvae.quantizers.grids import GridQuantizers
from tests.stage1_vqvae.quantizers.quantizer_kinds import KINDS, D, part
from training.weights_file import fingerprint

GRIDS = {"two": ([2], [(2, 3), (4, 6)]), "three": ([2, 2], [(1, 1), (2, 2), (4, 4)]), "far apart": ([4], [(2, 1), (8, 4)])}


def hierarchy(kind: str = "ema", grids: str = "two", channels: int = 3) -> VQVAE:
    torch.manual_seed(0)
    factors, expected = GRIDS[grids]
    network = HierarchicalPart(hidden_channels=16, residual_channels=8, downsampling=2, factors=factors)
    height, width = (2 * side for side in expected[-1])
    quantizer = part(kind, scales=[]) if kind == "multiscale" else part(kind)
    return VQVAE(Tokenizer(code_dim=D, quantizer=quantizer, network=network), height, width, channels)


def images_for(model: VQVAE, batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, *model.image_shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode_all_grids(kind: str, grids: str) -> None:
    model = hierarchy(kind, grids).eval()
    pairs = zip(model.quantizers, GRIDS[grids][1], strict=True)
    expected = [level for quantizer, grid in pairs for level in quantizer.level_grids(*grid)]
    assert model.grids == expected
    assert kind == "multiscale" or set(expected) == set(GRIDS[grids][1])
    images = images_for(model)
    output, codes = model(images), model.encode(images)
    assert [tuple(level.shape[1:]) for level in codes] == expected
    assert all(torch.equal(*pair) for pair in zip(codes, output.codes, strict=True))
    assert torch.equal(model.decode(codes), output.reconstruction)
    counts = level_counts(output.statistics)
    assert [int(count.sum()) for count in counts] == [len(images) * h * w for h, w in expected]
    assert [len(count) for count in counts] == list(model.quantizer.num_codes)
    assert [tuple(vectors.shape) for vectors in model.quantizer.code_vectors()] == [(k, D) for k in model.quantizer.num_codes]


@pytest.mark.parametrize("grids", GRIDS)
def test_each_grid_is_conditioned_on_coarser_grids_only(grids: str) -> None:
    """Changing a codebook changes the latents of finer grids only."""
    model = hierarchy(grids=grids).eval()
    images, count = images_for(model), len(GRIDS[grids][1])
    before = [model.latents(images, grid) for grid in range(count)]
    for changed in range(count):
        torch.manual_seed(changed)
        codebook = model.quantizers[changed].codebooks()[0]
        saved = {name: tensor.clone() for name, tensor in codebook.state_dict().items()}
        codebook.weight.copy_(torch.randn_like(codebook.weight))
        for grid in range(count):
            same = torch.equal(model.latents(images, grid), before[grid])
            assert same == (grid <= changed)
        codebook.load_state_dict(saved)


@pytest.mark.parametrize("grids", GRIDS)
def test_the_image_depends_on_every_grid(grids: str) -> None:
    model = hierarchy(grids=grids).eval()
    codes = model.encode(images_for(model))
    picture = model.decode(codes)
    for level in range(len(codes)):
        other = tuple((grid + 1) % 16 if number == level else grid for number, grid in enumerate(codes))
        assert not torch.allclose(model.decode(other), picture, atol=1e-4)


def test_decoding_the_coarsest_grids_ignores_finer_codes() -> None:
    """Moving codes of finer grids does not matter; decoding all grids gives the image itself."""
    model = hierarchy(grids="three").eval()
    codes = tuple(torch.randint(k, (3, *grid)) for k, grid in zip(model.quantizer.num_codes, model.grids, strict=True))
    assert torch.equal(model.decode_coarsest(codes, 3), model.decode(codes))
    moved = (codes[0], codes[1].roll(1, 2), codes[2].roll(1, 1))
    assert torch.allclose(model.decode_coarsest(moved, 1), model.decode_coarsest(codes, 1), atol=1e-5)
    assert not torch.allclose(model.decode_coarsest(moved, 2), model.decode_coarsest(codes, 2), atol=1e-4)


def test_every_weight_learns() -> None:
    """With three grids, from reconstruction and commitment alone."""
    model = hierarchy("gradient", "three").train()
    torch.stack(list(model(images_for(model)).losses.values())).sum().backward()
    assert all(parameter.grad is not None and bool((parameter.grad != 0).any()) for parameter in model.parameters())


def test_the_losses_of_all_grids_add_up() -> None:
    model = hierarchy("ema", "three").train().requires_grad_(False)
    images = images_for(model)
    expected = sum(float(quantizer(model.latents(images, grid)).losses["commitment"]) for grid, quantizer in enumerate(model.quantizers))
    assert float(model(images).losses["commitment"]) == pytest.approx(expected, rel=1e-6)


def test_each_codebook_learns_from_its_grids_latents() -> None:
    """Repeated updates on the same images lower every grid's quantization error."""
    model = hierarchy("ema", "two").train().requires_grad_(False)
    images = images_for(model, 8)

    def errors() -> list[float]:
        return [float((quantizer(z).z_q - z).square().mean()) for quantizer, z in zip(model.quantizers, latents, strict=True)]

    latents = [model.latents(images, grid) for grid in range(2)]
    before = errors()
    for _ in range(20):
        model.quantizer.update_(model(images).statistics)
    assert all(after < first for after, first in zip(errors(), before, strict=True))


@pytest.mark.parametrize("kind", ["ema", "residual", "product_residual_projected", "residual_shared"])
def test_codebook_of_each_level(kind: str) -> None:
    """A level's codebook is that of its grid's quantizer, offset by the codebooks of the coarser grids."""
    model = hierarchy(kind, "two")
    assert isinstance(model.quantizer, GridQuantizers)
    codebooks = model.quantizer.codebooks()
    expected = [
        quantizer.codebooks()[quantizer.codebook_of(level)] for quantizer in model.quantizers for level in range(len(quantizer.num_codes))
    ]
    assert all(codebooks[model.quantizer.codebook_of(level)] is codebook for level, codebook in enumerate(expected))


def test_a_saved_tokenizer_reconstructs_the_same(tmp_path: Path) -> None:
    model = hierarchy("residual", "two").eval()
    run = RunDir(tmp_path)
    save_tokenizer(run.tokenizer, model, 3)
    images = images_for(model)
    loaded = load_tokenizer(run)
    assert torch.equal(loaded(images).reconstruction, model(images).reconstruction)
    assert len(fingerprint(run.tokenizer)) == 64


def test_invalid_factors_are_refused(tmp_path: Path) -> None:
    for factors in ([], [3], [1]):
        with pytest.raises(ValueError, match="expected powers of two above 1"):
            part_from("tokenizer.network", {"kind": "hierarchical", "factors": factors})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {height: 8, width: 12}\ntokenizer: {network: {kind: hierarchical, factors: [2, 2]}}\n")
    with pytest.raises(Exception, match="16"):
        load_recipe(recipe)
