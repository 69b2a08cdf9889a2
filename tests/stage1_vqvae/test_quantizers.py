"""One suite of properties for every quantizer, and each one's own rule against an independent reference."""

from __future__ import annotations

import copy

import pytest
import torch

from stage1_vqvae.quantizers.contract import Quantizer
from stage1_vqvae.quantizers.initialisation import kmeans
from stage1_vqvae.quantizers.restart import candidate_places, candidates_here
from stage1_vqvae.quantizers.vector import GradientVectorQuantizer, MovingAverageVectorQuantizer, VectorQuantizer

KINDS = [GradientVectorQuantizer, MovingAverageVectorQuantizer]
K, D, BETA, DECAY = 32, 8, 0.25, 0.9

pytestmark = pytest.mark.parametrize("kind", KINDS)


def make(kind: type[VectorQuantizer], **settings: float) -> VectorQuantizer:
    torch.manual_seed(1)
    return kind(K, D, **{"commitment": BETA, "decay": DECAY, "restart_below": 0.05, **settings})


@pytest.mark.parametrize("spatial", [(), (5,), (3, 4), (2, 3, 2)])
def test_codes_vectors_and_lookup_agree(kind: type[VectorQuantizer], spatial: tuple[int, ...]) -> None:
    quantizer = make(kind).eval()
    z = torch.randn(6, D, *spatial)
    found = quantizer(z)
    (codes,) = found.codes
    assert codes.shape == (6, *spatial)
    assert codes.dtype == torch.int64
    assert found.z_q.shape == z.shape
    assert torch.equal(found.z_q, quantizer.lookup(found.codes))
    # The nearest code, recomputed by definition.
    distances = (z.movedim(1, -1)[..., None, :] - quantizer.codebook).square().sum(-1)
    assert torch.equal(codes, distances.argmin(-1))


def test_training_keeps_the_value_exact(kind: type[VectorQuantizer]) -> None:
    quantizer = make(kind).train()
    found = quantizer(1e4 * torch.randn(4, D, 3, 3, requires_grad=True))
    assert torch.equal(found.z_q, quantizer.lookup(found.codes))


@pytest.mark.parametrize("training", [True, False])
def test_forward_changes_nothing(kind: type[VectorQuantizer], training: bool) -> None:
    quantizer = make(kind).train(training)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(torch.randn(4, D, 3, 3, requires_grad=True)).z_q.sum().backward()
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_gradients_reach_whom_they_should(kind: type[VectorQuantizer]) -> None:
    """Reconstruction: the encoder, straight through. Commitment: the encoder. Codebook term: the codebook."""
    quantizer = make(kind)

    def reached(term: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        z = torch.randn(4, D, 3, 3, requires_grad=True)
        quantizer.zero_grad()
        found = quantizer(z)
        (found.z_q * weight if term == "reconstruction" else found.losses[term]).sum().backward()
        return z.grad, quantizer.codebook.grad

    weight = torch.randn(4, D, 3, 3)
    to_encoder, to_codebook = reached("reconstruction")
    assert to_encoder is not None
    assert torch.equal(to_encoder, weight)
    assert to_codebook is None
    to_encoder, to_codebook = reached("commitment")
    assert to_encoder is not None
    assert bool((to_encoder != 0).any())
    assert to_codebook is None
    if kind is GradientVectorQuantizer:
        to_encoder, to_codebook = reached("codebook")
        assert to_encoder is None
        assert to_codebook is not None
        assert bool((to_codebook != 0).any())
    else:
        assert not list(quantizer.parameters())


def test_losses_are_the_papers_and_beta_is_on_the_encoders_term(kind: type[VectorQuantizer]) -> None:
    quantizer = make(kind)
    z = torch.randn(4, D, 3, 3)
    found = quantizer(z)
    square = (z - quantizer.lookup(found.codes)).square().mean()
    assert torch.allclose(found.losses["commitment"], BETA * square)
    if kind is GradientVectorQuantizer:
        assert torch.allclose(found.losses["codebook"], square)
    else:
        assert set(found.losses) == {"commitment"}


def test_statistics_of_two_passes_add_up(kind: type[VectorQuantizer]) -> None:
    quantizer = make(kind).double()
    z = torch.randn(6, D, 3, 3, dtype=torch.float64)
    whole, first, second = (quantizer(part).statistics for part in (z, z[:2], z[2:]))
    assert all(torch.allclose(whole[name], first[name] + second[name]) for name in whole)
    assert int(whole["counts"].sum()) == 6 * 9


def test_an_empty_batch_works(kind: type[VectorQuantizer]) -> None:
    quantizer = make(kind)
    found = quantizer(torch.empty(0, D, 3, 3, requires_grad=True))
    assert found.z_q.shape == (0, D, 3, 3)
    assert all(loss.item() == 0 for loss in found.losses.values())
    quantizer.update_(found.statistics)
    assert bool(torch.isfinite(quantizer.codebook).all())


def test_a_wrong_width_is_refused(kind: type[VectorQuantizer]) -> None:
    with pytest.raises(ValueError, match=rf"expected \(B, {D}, \.\.\.\), found \(2, 3, 4\)"):
        make(kind)(torch.randn(2, 3, 4))


def test_autocast_leaves_search_and_values_in_float32(kind: type[VectorQuantizer]) -> None:
    quantizer = make(kind)
    z = torch.randn(4, D, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantizer(z)
    assert found.z_q.dtype == torch.float32
    assert torch.equal(found.codes[0], quantizer(z).codes[0])


def test_use_is_a_moving_average(kind: type[VectorQuantizer]) -> None:
    quantizer = make(kind)
    statistics = quantizer(torch.randn(4, D, 3, 3)).statistics
    quantizer.update_(statistics)
    assert torch.allclose(quantizer.cluster_size, DECAY * torch.ones(K) + (1 - DECAY) * statistics["counts"])


def test_moving_average_codebook_against_a_one_hot_reference(kind: type[VectorQuantizer]) -> None:
    """Two steps of appendix A.1 of the paper, by one-hot matrices in numpy's way; by gradient, nothing moves."""
    quantizer = make(kind)
    size, total, codebook = torch.ones(K).double(), quantizer.codebook.detach().double().clone(), quantizer.codebook.detach().clone()
    for seed in range(2):
        z = torch.randn(50, D, generator=torch.Generator().manual_seed(seed))
        quantizer.update_(quantizer(z).statistics)
        one_hot = torch.eye(K).double()[torch.cdist(z, codebook).argmin(1)]
        size = DECAY * size + (1 - DECAY) * one_hot.sum(0)
        total = DECAY * total + (1 - DECAY) * one_hot.T @ z.double()
        smoothed = (size + 1e-5) / (size.sum() + K * 1e-5) * size.sum()
        codebook = (total / smoothed[:, None]).float() if kind is MovingAverageVectorQuantizer else codebook
        assert torch.allclose(quantizer.codebook, codebook, atol=1e-6)


def test_dead_codes_restart_on_latents_and_live_ones_stay(kind: type[VectorQuantizer]) -> None:
    quantizer = make(kind)
    quantizer.cluster_size.fill_(10.0)
    quantizer.cluster_size[[3, 7]] = 0.01
    before = quantizer.codebook.detach().clone()
    z = torch.randn(2, D, 4, 5)
    candidates = candidates_here(z, candidate_places(K, 40, seed=0, step=0), 0)
    dead = quantizer.dead_codes()
    assert torch.nonzero(dead)[:, 0].tolist() == [3, 7]
    quantizer.place_(dead, candidates, quantizer.cluster_size.mean().expand(K))
    assert torch.equal(quantizer.codebook[~dead], before[~dead])
    latents = z.movedim(1, -1).reshape(-1, D)
    assert all(bool((latents == code).all(1).any()) for code in quantizer.codebook[dead])
    assert not bool(quantizer.dead_codes().any())
    # A moving average goes on from there, instead of pulling the code back.
    placed = quantizer.codebook.detach().clone()
    quantizer.update_({"counts": torch.zeros(K), "sums": torch.zeros(K, D)})
    assert torch.allclose(quantizer.codebook[dead], placed[dead], atol=1e-4)


def test_no_restart_when_switched_off(kind: type[VectorQuantizer]) -> None:
    quantizer = make(kind, restart_below=0.0)
    quantizer.cluster_size.zero_()
    assert not bool(quantizer.dead_codes().any())


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_restart_candidates_are_the_same_however_the_batch_is_shared_out(kind: type[VectorQuantizer], parts: int) -> None:
    z = torch.randn(8, D, 3, 2)
    places = candidate_places(K, 48, seed=5, step=9)
    assert len(set(places.tolist())) == K
    shares = z.chunk(parts)
    found = sum(candidates_here(share, places, number * len(share) * 6) for number, share in enumerate(shares))
    assert torch.equal(found, z.movedim(1, -1).reshape(-1, D)[places])


def test_kmeans_finds_separate_clusters(kind: type[VectorQuantizer]) -> None:
    centres = 100 * torch.randn(K, D)
    vectors = centres.repeat_interleave(40, 0) + torch.randn(40 * K, D)
    centroids, counts = kmeans(vectors[torch.randperm(len(vectors))], K, torch.Generator().manual_seed(0))
    assert int(counts.sum()) == len(vectors)
    # Most clusters are found (Lloyd's rounds from random starts do not promise all), each at its mean.
    near = torch.cdist(centres, centroids).min(1).values < 2
    assert int(near.sum()) >= 0.6 * K
    inertia = torch.cdist(vectors, centroids).min(1).values.square().mean()
    random = vectors[torch.randperm(len(vectors))[:K]]
    assert inertia < torch.cdist(vectors, random).min(1).values.square().mean()


def test_kmeans_with_fewer_vectors_than_codes(kind: type[VectorQuantizer]) -> None:
    centroids, counts = kmeans(torch.randn(5, D), K, torch.Generator().manual_seed(0))
    assert centroids.shape == (K, D)
    assert int(counts.sum()) == 5
    assert bool(torch.isfinite(centroids).all())


def test_it_is_a_quantizer(kind: type[VectorQuantizer]) -> None:
    assert isinstance(make(kind), Quantizer)
    assert make(kind).num_codes == (K,)
