"""Edits of codes in the app, compared with direct calls of the models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from configs.parts import part_from
from configs.schema import Tokenizer
from pipelines import Generator
from pipelines.playground.edits import Place, candidates, code_patches, most_likely_codes, nearest_codes, replaced, walk
from pipelines.playground.maps import code_at, code_map, patch_at, patch_sheet
from stage1_vqvae.model import VQVAE
from stage1_vqvae.train import main as train_tokenizer
from stage2_prior.extract_codes import main as extract_codes
from stage2_prior.train import main as train_prior
from tests.stage1_vqvae.quantizers.quantizer_kinds import D, part


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Generator:
    """Generator of a run with two grids, of 2 x 3 and 4 x 6 codes."""
    run = tmp_path_factory.mktemp("edits") / "run"
    hierarchy = ["--tokenizer.network.kind", "hierarchical", "--tokenizer.network.downsampling", "2"]
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(run), *hierarchy, "--stage1.steps", "20"])
    extract_codes(["--run", str(run)])
    train_prior(["--run", str(run)])
    return Generator.from_pretrained(run, device="cpu")


def test_candidates_are_the_image_with_one_code_replaced(generator: Generator) -> None:
    codes, place = generator.draw(1, "down", seed=2).codes, Place(1, 3, 4)
    results = candidates(generator, codes, "down", place, [5, 0, 11])
    for candidate, code in zip(results, [5, 0, 11], strict=True):
        changed = replaced(codes, place, code)
        assert candidate.code == place.of(changed) == code
        assert sum(int((one != other).sum()) for one, other in zip(changed, codes, strict=True)) <= 1
        assert torch.equal(candidate.picture, generator.decode(changed, output="tensor")[0])
        bits = generator.surprisals(changed, "down")
        assert candidate.bits == pytest.approx(float(bits[1][0, 3, 4]))
        assert candidate.total == pytest.approx(sum(float(level.sum()) for level in bits))


@pytest.mark.parametrize("place", [Place(0, 0, 0), Place(0, 1, 2), Place(1, 2, 5)])
def test_the_most_probable_codes_cost_the_fewest_bits(generator: Generator, place: Place) -> None:
    codes = generator.draw(1, "across", seed=1).codes
    bits = {each.code: each.bits for each in candidates(generator, codes, "across", place, list(range(16)))}
    assert most_likely_codes(generator, codes, "across", place, 6) == sorted(bits, key=lambda code: bits[code] or 0.0)[:6]


def test_nearest_codes_are_nearest_in_their_vectors(generator: Generator) -> None:
    part = generator.tokenizer.quantizers[1]
    vectors = part.lookup((torch.arange(16)[None],))[0].T
    distances = torch.cdist(vectors[[7]], vectors)[0]
    order = [code for code in distances.argsort().tolist() if code != 7]
    assert nearest_codes(generator.tokenizer, 1, 7, 5) == order[:5]
    assert sorted(nearest_codes(generator.tokenizer, 1, 7, 99)) == sorted(order)


def test_a_walk_has_the_given_ends_and_the_nearest_codes_between(generator: Generator) -> None:
    tokenizer = generator.tokenizer
    first, last = (generator.draw(1, label, seed=3).codes for label in ("across", "down"))
    path = walk(tokenizer, first, last, 5)
    assert [tuple(level.shape) for level in path] == [(5, 2, 3), (5, 4, 6)]
    for level, (start, end) in enumerate(zip(first, last, strict=True)):
        assert torch.equal(path[level][0], start[0])
        assert torch.equal(path[level][-1], end[0])
        vectors = tokenizer.quantizers[level].lookup((torch.arange(16)[None],))[0].T
        middle = (vectors[start[0]] + vectors[end[0]]) / 2
        distances = torch.cdist(middle.flatten(0, 1), vectors)
        chosen = distances.gather(1, path[level][2].flatten()[:, None])[:, 0]
        assert torch.allclose(chosen, distances.min(1).values, atol=1e-5)
    constant = walk(tokenizer, first, first, 4)
    assert all(torch.equal(level, start.expand_as(level)) for level, start in zip(constant, first, strict=True))


@pytest.mark.parametrize("kind", ["fsq", "lfq", "simvq", "ema_cosine_projected", "residual", "product_residual_projected"])
def test_a_walk_is_constant_where_both_ends_agree_and_between_them_elsewhere(kind: str) -> None:
    """With any projection between codebook and latents."""
    torch.manual_seed(0)
    small = {"hidden_channels": 16, "residual_channels": 8, "residual_blocks": 1}
    config = Tokenizer(code_dim=D, quantizer=part(kind), network=part_from("tokenizer.network", small))
    tokenizer = VQVAE(config, 8, 12, 3).eval().requires_grad_(False)
    first, last = (tuple(torch.randint(size, (1, 2, 3)) for size in tokenizer.quantizer.num_codes) for _ in range(2))
    for start, end in zip(first, last, strict=True):
        end[0, 0] = start[0, 0]
    path = walk(tokenizer, first, last, 41)
    assert all(torch.equal(level[:, 0], start[:, 0].expand(41, -1)) for level, start in zip(path, first, strict=True))
    lookup = tokenizer.quantizers[0].lookup  # type: ignore[operator]
    # In batches of one shape: a projection of 41 grids may round otherwise than that of a single grid.
    starts, ends = (lookup(tuple(level.expand(41, -1, -1) for level in codes)) for codes in (first, last))
    start, end, between = starts[0], ends[-1], lookup(path)
    assert torch.equal(between[0], start)
    assert torch.equal(between[-1], end)
    # No further from the middle than the nearer end, which might have been chosen.
    middle = (start + end) / 2
    reached = (between[20] - middle).square().sum(0)
    assert (reached <= torch.minimum((start - middle).square().sum(0), (end - middle).square().sum(0)) * 1.5 + 1e-5).all()


def test_a_walk_of_multiscale_codes_has_the_given_ends_and_the_codes_of_interpolated_latents_between() -> None:
    torch.manual_seed(0)
    small = {"hidden_channels": 16, "residual_channels": 8, "residual_blocks": 1}
    config = Tokenizer(code_dim=D, quantizer=part("multiscale"), network=part_from("tokenizer.network", small))
    tokenizer = VQVAE(config, 8, 12, 3).eval().requires_grad_(False)
    first, last = (tokenizer.encode(torch.rand(1, 3, 8, 12) * 2 - 1) for _ in range(2))
    path = walk(tokenizer, first, last, 5)
    assert all(torch.equal(torch.cat([start, end]), level[[0, 4]]) for level, start, end in zip(path, first, last, strict=True))
    (quantizer,) = tokenizer.quantizers
    middle = quantizer((quantizer.lookup(first) + quantizer.lookup(last)) / 2)
    assert torch.allclose(quantizer.lookup(path)[2:3], middle.z_q, atol=1e-5)


def test_a_patch_has_the_size_of_its_codes_cell(generator: Generator) -> None:
    coarse, fine = (code_patches(generator, level, list(range(16))) for level in (0, 1))
    assert coarse.shape == (16, 4, 4, 3)
    assert fine.shape == (16, 2, 2, 3)
    assert torch.equal(code_patches(generator, 1, [9, 4]), fine[[9, 4]])
    assert len(fine.flatten(1).unique(dim=0)) > 1


def test_clicks_select_the_code_or_patch_under_the_pointer(generator: Generator) -> None:
    """Each cell's middle maps back to the cell, and points outside the picture to its border."""
    shape, grid = generator.image_shape, generator.tokenizer.grids[1]
    codes = torch.arange(24).view(grid)
    picture = torch.zeros(shape, dtype=torch.uint8)
    plain = np.asarray(code_map(picture, codes, None, 24, None))
    for row in range(grid[0]):
        for column in range(grid[1]):
            image = np.asarray(code_map(picture, codes, torch.rand(grid), 24, (row, column)))
            assert image.shape == plain.shape
            marked = (image == (0, 220, 130)).all(2).nonzero()
            y, x = (float(pixels.min() + pixels.max()) / 2 for pixels in marked)
            assert code_at(x, y, shape, grid) == (row, column)
    assert code_at(10_000, 10_000, shape, grid) == (3, 5)
    assert code_at(-5, -5, shape, grid) == (0, 0)

    patches = torch.zeros(37, 2, 2, 3, dtype=torch.uint8)
    for number in (0, 15, 16, 36):
        patches[:] = 0
        patches[number] = 77
        y, x = ((np.asarray(patch_sheet(patches)) == 77).all(2).nonzero()[axis].mean() for axis in (0, 1))
        assert patch_at(x, y, 37, shape, grid) == number
    assert patch_at(10_000, 10_000, 37, shape, grid) == 36
