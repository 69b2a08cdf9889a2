"""Learning rules, k-means and restarts against independent references."""

from __future__ import annotations

import copy

import pytest
import torch

from stage1_vqvae.quantizers.codebook import Codebook, GradientCodebook, LinearCodebook, MovingAverageCodebook
from stage1_vqvae.quantizers.contract import level_counts, sum_by_name
from stage1_vqvae.quantizers.initialisation import kmeans
from stage1_vqvae.quantizers.restart import Restart, candidate_rows
from tests.stage1_vqvae.quantizers.quantizer_kinds import KINDS, D, build
from training.optimizer import adamw, forget_rows_

K, DECAY, BETA = 16, 0.9, 0.25
RULES = [MovingAverageCodebook, GradientCodebook, LinearCodebook]


@pytest.mark.parametrize("rule", RULES)
def test_cluster_size_is_a_moving_average(rule: type[Codebook]) -> None:
    codebook = rule(K, D, DECAY, 0.05)
    counts = torch.arange(K).float()
    codebook.update_(counts, torch.zeros(K, D))
    assert torch.allclose(codebook.cluster_size, DECAY * torch.ones(K) + (1 - DECAY) * counts)


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_updates_equal_a_one_hot_reference(kind: str) -> None:
    """Two steps of appendix A.1 of the paper, by one-hot matrices; a gradient codebook does not move."""
    quantizer = build(kind)
    (codebook,) = quantizer.codebooks()
    size, vectors = torch.ones(K).double(), codebook.vectors().detach().clone()
    total = vectors.double()
    for seed in range(2):
        z = torch.randn(50, D, generator=torch.Generator().manual_seed(seed))
        quantizer.update_(quantizer(z).statistics)
        one_hot = torch.eye(K).double()[torch.cdist(z, vectors).argmin(1)]
        size = DECAY * size + (1 - DECAY) * one_hot.sum(0)
        total = DECAY * total + (1 - DECAY) * one_hot.T @ z.double()
        smoothed = (size + 1e-5) / (size.sum() + K * 1e-5) * size.sum()
        chosen = one_hot.sum(0)[:, None] > 0
        vectors = torch.where(chosen, total / smoothed[:, None], vectors.double()).float() if kind == "ema" else vectors
        assert torch.allclose(codebook.vectors(), vectors, atol=1e-6)


def test_unused_codes_do_not_move() -> None:
    codebook = MovingAverageCodebook(4, D, DECAY, 0.05)
    before = codebook.vectors().clone()
    counts, sums = torch.tensor([5.0, 5.0, 5.0, 0.0]), torch.randn(4, D) * torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None]
    for _ in range(3000):
        codebook.update_(counts, sums)
    assert torch.equal(codebook.vectors()[3], before[3])
    # Once chosen, it moves there at once: the old average has decayed.
    codebook.update_(torch.ones(4), torch.ones(4, D))
    assert torch.allclose(codebook.vectors()[3], torch.ones(D), atol=1e-2)


@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("kind", [kind for kind, fields in KINDS.items() if fields["kind"] == "ema"])
def test_non_finite_latents_move_no_code(kind: str, broken: float) -> None:
    """In one of two micro-steps: codes it chose stay, others learn as without it."""
    quantizer, without = build(kind), build(kind)
    z = torch.randn(2, 50, D)
    sound = [quantizer(part).statistics for part in z]
    z[1, 7, 2] = broken
    overflowed = [sound[0], quantizer(z[1]).statistics]
    before = [copy.deepcopy(codebook.state_dict()) for codebook in without.codebooks()]
    quantizer.update_(sum_by_name(overflowed))
    without.update_(sum_by_name(sound))
    for codebook, reference, start in zip(quantizer.codebooks(), without.codebooks(), before, strict=True):
        state, expected = codebook.state_dict(), reference.state_dict()
        assert all(bool(value.isfinite().all()) for value in state.values())
        stays = torch.isclose(state["moving_sum"], start["moving_sum"]).all(1)
        assert int(stays.sum()) < K
        assert torch.equal(state["weight"][stays], start["weight"][stays])
        assert torch.equal(state["cluster_size"][stays], start["cluster_size"][stays])
        if kind in ("ema", "ema_rotation", "ema_cosine_projected"):  # elsewhere later depths see other remainders
            same = torch.isclose(state["moving_sum"], expected["moving_sum"]).all(1)
            assert int((~same).sum()) <= 2  # the code the latent chose, and the one it would have chosen


def test_no_code_restarts_on_a_non_finite_latent() -> None:
    quantizer = build("gradient", restart_below=0.5)
    (codebook,) = quantizer.codebooks()
    restart = Restart(quantizer, seed=0, step=0, batch_size=K)
    counts = torch.zeros(K)
    counts[0] = 1000
    for _ in range(40):
        codebook.update_(counts, None)
    assert int(codebook.dead_codes().sum()) == K - 1
    latents = torch.randn(K, D)
    latents[::2] = torch.inf
    before, optimizer = codebook.vectors().detach().clone(), adamw(quantizer, 1e-3, 0.0, 0.99)
    assert int(restart.apply_(restart.candidates((latents,), 0, K), optimizer)) in (K // 2 - 1, K // 2)
    moved = (codebook.vectors() != before).any(1)
    assert set(map(tuple, codebook.vectors()[moved].tolist())) <= set(map(tuple, latents[1::2].tolist()))


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_the_nearest_code_is_chosen(kind: str) -> None:
    quantizer = build(kind)
    z = torch.randn(6, D, 3, 4)
    distances = (z.movedim(1, -1)[..., None, :] - quantizer.codebooks()[0].vectors()).square().sum(-1)
    assert torch.equal(quantizer(z).codes[0], distances.argmin(-1))


def test_cosine_metric_takes_the_smallest_angle_and_unit_vectors() -> None:
    quantizer = build("ema_cosine_projected")
    z = torch.randn(50, D)
    output = quantizer(z)
    rows, vectors = quantizer.down(z), quantizer.codebooks()[0].vectors()
    angles = torch.nn.functional.cosine_similarity(rows[:, None], vectors[None], dim=-1)
    assert torch.equal(output.codes[0], angles.argmax(1))
    unit = vectors[output.codes[0]] / vectors[output.codes[0]].norm(dim=1, keepdim=True)
    assert torch.allclose(output.z_q, quantizer.up(unit), atol=1e-6)


def test_losses_equal_the_papers_with_beta_on_the_commitment() -> None:
    quantizer = build("gradient")
    z = torch.randn(4, D, 3, 3)
    output = quantizer(z)
    square = (z - quantizer.lookup(output.codes)).square().mean()
    assert torch.allclose(output.losses["commitment"], BETA * square)
    assert torch.allclose(output.losses["codebook"], square)


def test_simvq_learns_one_map_that_moves_every_code() -> None:
    quantizer = build("simvq")
    (codebook,) = quantizer.codebooks()
    assert {name for name, _ in codebook.named_parameters()} == {"map"}
    before = codebook.vectors().detach().clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    output = quantizer(torch.randn(1, D))  # one latent, one code
    output.losses["codebook"].backward()
    optimizer.step()
    assert bool((codebook.vectors() != before).any(1).all())


def test_fsq_rounds_each_channel_to_its_levels() -> None:
    """Every code is reachable, values lie on an even lattice from -1, and rounding goes to the nearest."""
    quantizer = build("fsq")
    inner = quantizer.inner
    corners = inner.lookup_rows((torch.arange(24),))
    assert sorted(set(corners[:, 0].tolist())) == [-1.0, 0.0]
    assert sorted(set(corners[:, 1].tolist())) == [-1.0, 0.0, 1.0]
    assert sorted(set(corners[:, 2].tolist())) == [-1.0, -0.5, 0.0, 0.5]
    assert len({tuple(corner) for corner in corners.tolist()}) == 24
    rows = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    output = inner.quantize(rows)
    for channel, size in enumerate(inner.sizes.tolist()):
        digits = output.codes[0] // inner.strides[channel] % size
        assert int(torch.bincount(digits, minlength=size).min()) >= 0.05 * len(rows)
    squashed = inner._squashed(rows) / (inner.sizes // 2)
    steps = 1 / (inner.sizes // 2)
    assert bool(((output.z_q - squashed).abs() <= 0.5 * steps + 1e-6).all())


def test_lfq_codes_are_the_signs_as_bits() -> None:
    inner = build("lfq").inner
    rows = torch.tensor([[-1.0, -2.0, -0.1, -3.0], [0.5, -1.0, -1.0, -1.0], [-1.0, 0.5, -1.0, 2.0]])
    output = inner.quantize(rows)
    assert output.codes[0].tolist() == [0, 1, 10]
    assert torch.equal(output.z_q, rows.sign())


def test_each_residual_depth_quantizes_the_remainder() -> None:
    quantizer = build("residual")
    z = torch.randn(20, D)
    output = quantizer(z)
    residual = z
    for level, codebook in enumerate(quantizer.codebooks()):
        codes = torch.cdist(residual, codebook.vectors()).argmin(1)
        assert torch.equal(output.codes[level], codes)
        assert torch.allclose(output.latents[level], residual, atol=1e-6)
        residual = residual - codebook.vectors()[codes]
    assert torch.allclose(output.z_q, z - residual, atol=1e-5)


def test_a_shared_codebook_learns_from_all_depths_at_once() -> None:
    quantizer = build("residual_shared")
    (codebook,) = quantizer.codebooks()
    z = torch.randn(20, D)
    output = quantizer(z)
    before = codebook.vectors().clone()
    assert len(output.latents[0]) == 3 * 20
    counts = sum(level_counts(output.statistics))
    quantizer.update_(output.statistics)
    assert torch.allclose(codebook.cluster_size, DECAY + (1 - DECAY) * counts)
    # Row by row, then depth by depth, as in `latents`.
    codes = torch.stack(output.codes, 1).flatten()
    sums = torch.zeros(K, D).index_add_(0, codes, output.latents[0])
    assert torch.allclose(codebook.moving_sum, DECAY * before + (1 - DECAY) * sums, atol=1e-5)


def test_product_groups_are_independent() -> None:
    quantizer = build("product")
    z = torch.randn(20, D)
    changed = z.clone()
    changed[:, : D // 2] = torch.randn(20, D // 2)
    first, second = quantizer(z), quantizer(changed)
    assert not torch.equal(first.codes[0], second.codes[0])
    assert torch.equal(first.codes[1], second.codes[1])


@pytest.mark.parametrize("rule", [MovingAverageCodebook, GradientCodebook])
def test_dead_codes_are_below_a_share_of_the_mean_use(rule: type[Codebook]) -> None:
    codebook = rule(4, D, DECAY, 0.05)
    codebook.cluster_size.copy_(torch.tensor([10.0, 0.0, 0.4, 10.0]))
    assert codebook.dead_codes().tolist() == [False, True, False, False]
    assert not bool(rule(4, D, DECAY, 0.0).dead_codes().any())


def test_codes_of_a_linear_map_cannot_be_placed() -> None:
    codebook = LinearCodebook(4, D, DECAY, 0.05)
    assert not codebook.placeable
    with pytest.raises(TypeError, match="cannot be placed"):
        codebook.place_(torch.ones(4, dtype=torch.bool), torch.zeros(4, D), torch.ones(4))


def test_placed_codes_lose_their_momentum() -> None:
    quantizer = build("gradient")
    optimizer = adamw(quantizer, 1e-3, 0.0, 0.99)
    output = quantizer(torch.randn(200, D))
    output.losses["codebook"].backward()
    optimizer.step()
    (codebook,) = quantizer.codebooks()
    dead = torch.zeros(K, dtype=torch.bool)
    dead[[1, 2]] = True
    parameter = codebook.place_(dead, torch.zeros(K, D), torch.ones(K))
    assert parameter is codebook.vectors()
    forget_rows_(optimizer, parameter, dead)
    moments = optimizer.state[parameter]["exp_avg"]
    assert not bool(moments[dead].any())
    assert bool(moments[~dead].any())


def test_restart_rows_are_distinct_and_depend_on_seed_step_and_codebook() -> None:
    positions = candidate_rows(K, 48, seed=5, step=9, codebook=0)
    assert len(set(positions.tolist())) == K
    assert int(positions.max()) < 48
    for other in ((6, 9, 0), (5, 10, 0), (5, 9, 1)):
        assert not torch.equal(positions, candidate_rows(K, 48, *other))
    assert len(candidate_rows(K, 5, 0, 0, 0)) == K


def test_kmeans_finds_separate_clusters() -> None:
    centres = 100 * torch.randn(K, D)
    vectors = centres.repeat_interleave(40, 0) + torch.randn(40 * K, D)
    centroids, counts = kmeans(vectors[torch.randperm(len(vectors))], K, torch.Generator().manual_seed(0))
    assert int(counts.sum()) == len(vectors)
    # Most clusters have a centroid at their mean (Lloyd's algorithm from random starts does not promise all).
    near = torch.cdist(centres, centroids).min(1).values < 2
    assert int(near.sum()) >= 0.6 * K
    inertia = torch.cdist(vectors, centroids).min(1).values.square().mean()
    random = vectors[torch.randperm(len(vectors))[:K]]
    assert inertia < torch.cdist(vectors, random).min(1).values.square().mean()


def test_kmeans_with_fewer_vectors_than_codes() -> None:
    centroids, counts = kmeans(torch.randn(5, D), K, torch.Generator().manual_seed(0))
    assert centroids.shape == (K, D)
    assert int(counts.sum()) == 5
    assert bool(torch.isfinite(centroids).all())


def test_latents_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 8, \.\.\.\), found \(2, 3, 4\)"):
        build("ema")(torch.randn(2, 3, 4))
