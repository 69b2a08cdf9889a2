"""The nearest-code search against brute force in float64."""

from __future__ import annotations

import pytest
import torch

import stage1_vqvae.quantizers.search as search
from stage1_vqvae.quantizers.search import nearest_codes

EPS = torch.finfo(torch.float32).eps


def squared_distances(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Compute distances by definition, not by the expansion that the search uses."""
    return (vectors.double()[:, None] - codebook.double()[None]).square().sum(-1)


SIZES = [(1000, 512, 64), (300, 1024, 8), (50, 100, 512), (7, 2, 1), (1, 5, 3)]


@pytest.mark.parametrize(("count", "num_codes", "width"), SIZES)
@pytest.mark.parametrize("layout", ["about the origin", "far away", "an outlier", "a far outlier", "two clusters"])
def test_the_nearest_code_is_chosen_up_to_float32_rounding(count: int, num_codes: int, width: int, layout: str) -> None:
    """Within 8 eps (|z|^2 + |e|^2) of the least distance, e the nearest code, wherever codes and latents lie."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(count, width, generator=generator)
    codebook = torch.randn(num_codes, width, generator=generator)
    if layout == "far away":
        vectors, codebook = vectors + 1000, codebook + 1000
    elif layout == "an outlier":
        codebook[0] *= 1e4
    elif layout == "a far outlier":
        codebook[0] = 1e5
    elif layout == "two clusters":
        codebook[: num_codes // 2] += 10
    distances = squared_distances(vectors, codebook)
    least, nearest = distances.min(1)
    squares = vectors.double().square().sum(1) + codebook[nearest].double().square().sum(1)
    chosen = distances.gather(1, nearest_codes(vectors, codebook)[:, None])[:, 0]
    assert bool((chosen <= least + 8 * EPS * squares).all())


@pytest.mark.parametrize("offset", [100.0, 1000.0])
def test_precision_does_not_suffer_far_from_the_origin(offset: float) -> None:
    """There the expanded distance loses its digits; centring keeps the choice right."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1000, 64, generator=generator) + offset
    codebook = torch.randn(512, 64, generator=generator) + offset
    distances = squared_distances(vectors, codebook)
    chosen = distances.gather(1, nearest_codes(vectors, codebook)[:, None])[:, 0]
    centre = codebook.double().mean(0)
    centred = (vectors.double() - centre).square().sum(1) + (codebook.double() - centre).square().sum(1).max()
    rounding = 8 * EPS * centred + 4 * EPS * abs(offset) * centred.sqrt()
    assert bool((chosen <= distances.min(1).values + rounding).all())


def test_a_codebook_vector_gets_its_own_code_for_any_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    codebook = torch.randn(100, 16)
    order = torch.randperm(100).repeat(3)
    for block_bytes in (1, 100 * 4 * 7, 2**20):
        monkeypatch.setattr(search, "cache_bytes", lambda size=block_bytes: size)
        assert torch.equal(nearest_codes(codebook[order], codebook), order)


def test_an_accelerator_takes_large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its vendor; the meta device stands for one."""
    monkeypatch.setattr(search, "cache_bytes", lambda: 2**10)
    on_cpu, elsewhere = (search.block_rows(torch.empty(64, 4, device=device)) for device in ("cpu", "meta"))
    assert on_cpu == torch.get_num_threads() * 2**10 // (4 * 64)
    assert elsewhere == 2**28 // (4 * 64)


def test_ties_go_to_the_lower_index() -> None:
    codebook = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert nearest_codes(torch.zeros(2, 2), codebook).tolist() == [0, 0]
    assert nearest_codes(torch.tensor([[-2.0, 0.0]]), codebook).tolist() == [1]


def test_an_empty_batch_gives_no_codes() -> None:
    codes = nearest_codes(torch.empty(0, 4), torch.randn(3, 4))
    assert codes.shape == (0,)
    assert codes.dtype == torch.int64


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(N, 4\), found \(5, 3\)"):
        nearest_codes(torch.randn(5, 3), torch.randn(2, 4))


def test_autocast_does_not_affect_the_search() -> None:
    """In bfloat16 (8 bits) these neighbours would be equal."""
    codebook = torch.linspace(0, 1, 512)[:, None].repeat(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = nearest_codes(codebook, codebook)
    assert torch.equal(codes, torch.arange(512))


def test_memory_stays_far_below_the_full_distance_matrix() -> None:
    """65,536 x 4,096 distances would take 1 GiB."""
    from torch.profiler import ProfilerActivity, profile

    vectors, codebook = torch.randn(65_536, 4), torch.randn(4_096, 4)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        nearest_codes(vectors, codebook)
    largest = max(event.self_cpu_memory_usage for event in profiled.events())
    assert largest <= 16 * 2**20


@pytest.mark.parametrize("num_codes", [5, 64, 100])
def test_non_finite_latents_get_an_existing_code(num_codes: int) -> None:
    """A diverging run stops with an error about its loss; the search must not fail first."""
    vectors = torch.tensor([[float("inf"), 0.0], [float("nan"), 1.0], [-float("inf"), float("inf")]])
    codes = nearest_codes(vectors, torch.randn(num_codes, 2))
    assert int(codes.min()) >= 0
    assert int(codes.max()) < num_codes
