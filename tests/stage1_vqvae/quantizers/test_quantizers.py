"""One suite of properties for every quantizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from stage1_vqvae.quantizers.codebook import GradientCodebook, LinearCodebook, MovingAverageCodebook
from stage1_vqvae.quantizers.composed import ProductQuantizer, ProjectedQuantizer, ResidualQuantizer
from stage1_vqvae.quantizers.contract import Quantizer, level_counts, sum_by_name
from stage1_vqvae.quantizers.initialisation import place_by_kmeans_
from stage1_vqvae.quantizers.restart import Restart
from stage1_vqvae.quantizers.scalar import FiniteScalarQuantizer, LookupFreeQuantizer
from stage1_vqvae.quantizers.vector import VectorQuantizer
from tests.stage1_vqvae.quantizers.quantizer_kinds import KINDS, D, build

pytestmark = pytest.mark.parametrize("kind", KINDS)


def latents(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_codes_and_vectors_agree_by_lookup(kind: str) -> None:
    quantizer = build(kind).eval()
    for spatial in ((), (5,), (3, 4), (2, 3, 2)):
        z = latents(6, D, *spatial)
        found = quantizer(z)
        assert len(found.codes) == len(quantizer.num_codes)
        for codes, k in zip(found.codes, quantizer.num_codes, strict=True):
            assert codes.shape == (6, *spatial)
            assert codes.dtype == torch.int64
            assert int(codes.min()) >= 0
            assert int(codes.max()) < k
        assert found.z_q.shape == z.shape
        assert torch.equal(found.z_q, quantizer.lookup(found.codes))


def test_each_levels_vectors_are_its_share_of_the_whole(kind: str) -> None:
    """The vector of all levels' codes is the sum of theirs, but for a constant."""
    quantizer = build(kind).eval()
    vectors = quantizer.code_vectors()
    assert [tuple(found.shape) for found in vectors] == [(k, D) for k in quantizer.num_codes]
    assert all(torch.allclose(found.mean(0), torch.zeros(D), atol=1e-5) for found in vectors)
    codes = [torch.randint(k, (20,)) for k in quantizer.num_codes]
    rest = quantizer.lookup(tuple(codes)) - sum(found[chosen] for found, chosen in zip(vectors, codes, strict=True))
    assert torch.allclose(rest, rest[:1].expand_as(rest), atol=1e-4)


def test_height_and_width_are_not_swapped(kind: str) -> None:
    """Each position is quantized by itself: a position moved moves its code and vector."""
    quantizer = build(kind).eval()
    z = latents(2, D, 3, 4)
    found, turned = quantizer(z), quantizer(z.transpose(2, 3))
    assert all(torch.equal(a.transpose(1, 2), b) for a, b in zip(found.codes, turned.codes, strict=True))
    assert torch.allclose(found.z_q.transpose(2, 3), turned.z_q, atol=1e-6)


def test_training_keeps_the_value_exact(kind: str) -> None:
    quantizer = build(kind).train()
    found = quantizer((1e4 * latents(4, D, 3, 3)).requires_grad_())
    assert torch.equal(found.z_q, quantizer.lookup(found.codes))


@pytest.mark.parametrize("training", [True, False])
def test_forward_changes_nothing(kind: str, training: bool) -> None:
    quantizer = build(kind).train(training)
    before = copy.deepcopy(quantizer.state_dict())
    found = quantizer(latents(4, D, 3, 3).requires_grad_())
    (found.z_q.sum() + sum(found.losses.values())).backward()
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def reached(quantizer: Quantizer, term: str) -> tuple[Tensor | None, set[str]]:
    """The gradient of a term at z, and the names of the parameters it reaches."""
    quantizer.zero_grad()
    z = latents(4, D, 3, 3).requires_grad_()
    found = quantizer(z)
    loss = (found.z_q * latents(4, D, 3, 3, seed=5)).sum() if term == "reconstruction" else found.losses[term]
    loss.backward()
    assert z.grad is None or bool((z.grad != 0).any())
    return z.grad, {name for name, value in quantizer.named_parameters() if value.grad is not None and bool((value.grad != 0).any())}


def test_gradients_reach_whom_they_should(kind: str) -> None:
    """Reconstruction: encoder and projections. Commitment: encoder and what projects to the codebook. Codebook term: the
    codebook only. Entropy: encoder and codebook (LFQ: the encoder).
    """
    quantizer = build(kind)
    parameters = {name for name, _ in quantizer.named_parameters()}
    up, down = {name for name in parameters if name.startswith("up.")}, {name for name in parameters if name.startswith("down.")}
    codebooks = parameters - up - down
    terms = set(quantizer(latents(4, D, 3, 3)).losses)
    expected = {"reconstruction": (True, up | down)}
    if not isinstance(_inner(quantizer), FiniteScalarQuantizer):
        expected["commitment"] = (True, down)
    if codebooks:
        expected["codebook"] = (False, codebooks)
    if "entropy" in terms:
        expected["entropy"] = (True, down | codebooks)
    assert terms == set(expected) - {"reconstruction"}
    for term, (to_encoder, to_parameters) in expected.items():
        gradient, names = reached(quantizer, term)
        assert (gradient is not None) == to_encoder, term
        assert names == to_parameters, term


def _inner(quantizer: Quantizer) -> Quantizer:
    return quantizer.inner if isinstance(quantizer, ProjectedQuantizer) else quantizer


def rotated_back(z: Tensor, q: Tensor, gradient: Tensor) -> Tensor:
    """Fifty et al. 2024: (|q| / |z|) R' gradient, with R built whole, as a plane rotation, for every position."""
    result = torch.empty_like(z)
    for b, h, w in torch.cartesian_prod(*(torch.arange(size) for size in (z.shape[0], z.shape[2], z.shape[3]))):
        e, target = z[b, :, h, w].double(), q[b, :, h, w].double()
        first = e / e.norm()
        second = target / target.norm()
        cosine = first @ second
        across = second - cosine * first
        across = across / across.norm()
        sine = second @ across
        plane = torch.stack([first, across], 1)
        turn = torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])
        matrix = torch.eye(len(e), dtype=torch.float64) - plane @ plane.T + plane @ turn @ plane.T
        assert torch.allclose(matrix @ e * target.norm() / e.norm(), target)
        result[b, :, h, w] = (matrix.T @ gradient[b, :, h, w].double() * target.norm() / e.norm()).to(z.dtype)
    return result


def test_the_decoders_gradient_passes_once(kind: str) -> None:
    """Straight through: unchanged, whatever the depth, but for linear maps, whose product it is, and FSQ's own slope. By
    rotation: turned and scaled as z is to become its code, by the matrix of the paper's equation.
    """
    quantizer = build(kind)
    gradient, _ = reached(quantizer, "reconstruction")
    assert gradient is not None
    weight = latents(4, D, 3, 3, seed=5)
    expected = weight
    if "rotation" in kind:
        z = latents(4, D, 3, 3)
        expected = rotated_back(z, quantizer(z).z_q, weight)
    if isinstance(quantizer, ProjectedQuantizer):
        inner = quantizer.inner
        z = latents(4, D, 3, 3).requires_grad_()
        down = quantizer.down(z.movedim(1, -1))
        if isinstance(inner, FiniteScalarQuantizer):
            down = inner._squashed(down) / (inner.sizes // 2)
        elif isinstance(inner, VectorQuantizer) and inner.codebook.metric == "cosine":
            down = down / down.norm(dim=-1, keepdim=True)
        (quantizer.up(down).movedim(-1, 1) * weight).sum().backward()
        assert z.grad is not None
        expected = z.grad
    if kind == "product_cosine":
        z = latents(4, D, 3, 3).requires_grad_()
        halves = [half / half.norm(dim=1, keepdim=True) for half in z.chunk(2, 1)]
        (torch.cat(halves, 1) * weight).sum().backward()
        assert z.grad is not None
        expected = z.grad
    assert torch.allclose(gradient, expected, atol=1e-5)


def test_statistics_of_two_passes_add_up(kind: str) -> None:
    quantizer = build(kind).double()
    z = latents(6, D, 3, 3, dtype=torch.float64)
    whole, first, second = (quantizer(part).statistics for part in (z, z[:2], z[2:]))
    both = sum_by_name([first, second])
    assert set(whole) == set(both)
    assert all(torch.allclose(whole[name], both[name]) for name in whole)
    counts = level_counts(whole)
    assert [len(level) for level in counts] == list(quantizer.num_codes)
    for level, codes in zip(counts, quantizer(z).codes, strict=True):
        assert torch.equal(level.long(), torch.bincount(codes.flatten(), minlength=len(level)))


def test_an_empty_batch_works(kind: str) -> None:
    quantizer = build(kind)
    found = quantizer(torch.empty(0, D, 3, 3, requires_grad=True))
    assert found.z_q.shape == (0, D, 3, 3)
    assert all(loss.item() == 0 for loss in found.losses.values())
    quantizer.update_(found.statistics)
    assert all(bool(torch.isfinite(value).all()) for value in quantizer.state_dict().values())


def test_autocast_leaves_search_and_values_in_float32(kind: str) -> None:
    quantizer = build(kind)
    z = latents(4, D, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantizer(z)
        looked_up = quantizer.lookup(found.codes)
    plain = quantizer(z)
    assert found.z_q.dtype == looked_up.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found.codes, plain.codes, strict=True))
    assert torch.equal(looked_up, plain.z_q)
    assert quantizer(z.bfloat16()).z_q.dtype == torch.float32


def test_latents_are_what_the_codes_stand_for(kind: str) -> None:
    """One tensor a codebook, as wide as its vectors, in the rows' order, so that a share of the images has a share of them."""
    quantizer = build(kind)
    z = latents(4, D, 3, 2)
    found = quantizer(z)
    codebooks = quantizer.codebooks()
    assert len(found.latents) == len(codebooks)
    for codebook, whole, first, second in zip(codebooks, found.latents, quantizer(z[:1]).latents, quantizer(z[1:]).latents, strict=True):
        assert whole.shape[1] == codebook.dim
        assert len(whole) % 24 == 0
        assert not whole.requires_grad
        assert torch.allclose(whole, torch.cat([first, second]), atol=1e-6)


def test_kmeans_places_every_codebook_and_lowers_the_error(kind: str) -> None:
    quantizer = build(kind)
    batches = [3 + latents(16, D, 3, 3, seed=seed) for seed in range(4)]
    codebooks = [codebook for codebook in quantizer.codebooks() if codebook.placeable]
    if not codebooks:
        assert isinstance(_inner(quantizer), (FiniteScalarQuantizer, LookupFreeQuantizer)) or kind.startswith("simvq")
        return

    def error() -> float:
        found = [quantizer(z) for z in batches]
        return sum(float(part.losses["commitment"].detach()) for part in found)

    before = error()
    place_by_kmeans_(quantizer, batches, len(batches), 0, gather=lambda rows: rows, agree=lambda tensor: tensor)
    assert error() < 0.5 * before
    counts = [level.sum() for level in level_counts(sum_by_name([quantizer(z).statistics for z in batches]))]
    for codebook in codebooks:
        # As often as they are chosen in a batch, over the levels that share the codebook.
        assert float(codebook.cluster_size.sum()) == pytest.approx(float(sum(counts)) / len(codebooks) / len(batches), rel=1e-5)


def test_dead_codes_restart_on_latents_and_live_ones_stay(kind: str) -> None:
    quantizer = build(kind)
    optimizer = torch.optim.AdamW(list(quantizer.parameters()) or [torch.nn.Parameter(torch.zeros(1))])
    z = latents(6, D, 4, 5)
    found = quantizer(z)
    pairs = [pair for pair in zip(quantizer.codebooks(), found.latents, strict=True) if pair[0].placeable]
    codebooks = [codebook for codebook, _ in pairs]
    for codebook in codebooks:
        codebook.cluster_size.fill_(10.0)
        codebook.cluster_size[[3, 7]] = 0.01
    before = [codebook.vectors().detach().clone() for codebook in codebooks]
    restart = Restart(quantizer, seed=0, step=0, batch_size=6)
    candidates = restart.candidates(found.latents, first_image=0, images=6)
    assert int(restart.apply_(candidates, optimizer)) == 2 * len(codebooks)
    for (codebook, vectors), former in zip(pairs, before, strict=True):
        now = codebook.vectors().detach()
        live = [code for code in range(codebook.num_codes) if code not in (3, 7)]
        assert torch.equal(now[live], former[live])
        assert all(bool(((vectors - now[code]).abs() < 1e-6).all(1).any()) for code in (3, 7))
        assert not bool(codebook.dead_codes().any())
        # What learns goes on from there, instead of pulling the code back.
        codebook.update_(torch.zeros(codebook.num_codes), torch.zeros_like(now))
        assert torch.allclose(codebook.vectors()[[3, 7]], now[[3, 7]], atol=1e-4)


def test_restart_candidates_are_the_same_however_the_batch_is_shared_out(kind: str) -> None:
    quantizer = build(kind)
    z = latents(6, D, 3, 2)
    restart = Restart(quantizer, seed=5, step=9, batch_size=6)
    whole = restart.candidates(quantizer(z).latents, 0, 6)
    for parts in (2, 3, 6):
        size = 6 // parts
        shares = [restart.candidates(quantizer(share).latents, n * size, size) for n, share in enumerate(z.chunk(parts))]
        both = sum_by_name(shares)
        assert set(both) == set(whole)
        assert all(torch.allclose(whole[name], both[name], atol=1e-6) for name in whole)


def test_training_lowers_the_error_and_keeps_codes_in_use(kind: str) -> None:
    """The loop's own order of things, on clustered latents: z is learned too, from a reconstruction of a target."""
    quantizer = build(kind)
    torch.manual_seed(0)
    target = (latents(16, D)[torch.randint(16, (256,))] + 0.05 * latents(256, D, seed=3))[:, :, None]
    encoder = torch.nn.Conv1d(D, D, 1)
    decoder = torch.nn.Conv1d(D, D, 1)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters(), *quantizer.parameters()], lr=1e-2)
    errors = []
    for step in range(80):
        found = quantizer(encoder(target))
        error = (decoder(found.z_q) - target).square().mean()
        (error + sum(found.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        quantizer.update_(found.statistics)
        if step % 5 == 0 and step < 60:
            restart = Restart(quantizer, 0, step, 256)
            restart.apply_(restart.candidates(found.latents, 0, 256), optimizer)
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]
    used = [level > 0 for level in level_counts(quantizer(encoder(target)).statistics)]
    if kind == "residual_shared":  # its deeper levels have few of the one codebook's codes to choose from
        used = [torch.stack(used).any(0)]
    assert all(int(level.sum()) >= 4 for level in used)


def test_weights_and_buffers_survive_saving(kind: str) -> None:
    quantizer, other = build(kind), build(kind)
    with torch.no_grad():
        for value in quantizer.state_dict().values():
            value.add_(1)
    other.load_state_dict(quantizer.state_dict())
    z = latents(4, D, 3, 3)
    assert torch.equal(quantizer(z).z_q, other(z).z_q)


def test_it_is_made_of_the_parts_its_recipe_names(kind: str) -> None:
    quantizer = build(kind)
    inner = _inner(quantizer)
    assert isinstance(quantizer, ProjectedQuantizer) == ("projected" in kind or kind in ("fsq", "lfq"))
    assert isinstance(inner, ProductQuantizer) == kind.startswith("product")
    assert any(isinstance(module, ResidualQuantizer) for module in quantizer.modules()) == ("residual" in kind)
    rule = {"gradient": GradientCodebook, "simvq": LinearCodebook}.get(kind.split("_")[0], MovingAverageCodebook)
    rule = GradientCodebook if kind in ("residual_gradient", "product_cosine") else rule
    assert all(isinstance(codebook, rule) for codebook in quantizer.codebooks())
    levels = {"residual": 3, "residual_shared": 3, "product_residual_projected": 4}
    levels |= dict.fromkeys(("residual_gradient", "residual_rotation", "product", "product_cosine"), 2)
    assert len(quantizer.num_codes) == levels.get(kind, 1)
    assert len(quantizer.codebooks()) == {"fsq": 0, "lfq": 0, "residual_shared": 1}.get(kind, levels.get(kind, 1))
