"""Properties that every quantizer must have."""

from __future__ import annotations

import copy
import math

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


def test_lookup_of_codes_gives_the_quantized_vectors(kind: str) -> None:
    quantizer = build(kind).eval()
    for spatial in ((3, 4),) if kind == "multiscale" else ((), (5,), (3, 4), (2, 3, 2)):
        z = latents(6, D, *spatial)
        output = quantizer(z)
        grids = quantizer.level_grids(3, 4) if spatial == (3, 4) else [spatial] * len(quantizer.num_codes)
        for codes, grid, k in zip(output.codes, grids, quantizer.num_codes, strict=True):
            assert codes.shape == (6, *grid)
            assert codes.dtype == torch.int64
            assert int(codes.min()) >= 0
            assert int(codes.max()) < k
        assert output.z_q.shape == z.shape
        assert torch.equal(output.z_q, quantizer.lookup(output.codes))


def test_vectors_of_levels_add_up(kind: str) -> None:
    """The vector of all levels' codes, here on grids of one position, is the sum of the levels' vectors plus a constant."""
    quantizer = build(kind).eval()
    vectors = quantizer.code_vectors()
    assert [tuple(codebook.shape) for codebook in vectors] == [(k, D) for k in quantizer.num_codes]
    assert all(torch.allclose(codebook.mean(0), torch.zeros(D), atol=1e-5) for codebook in vectors)
    codes = [torch.randint(k, (20,)) for k in quantizer.num_codes]
    looked_up = quantizer.lookup(tuple(code.view(20, 1, 1) for code in codes)).flatten(1)
    rest = looked_up - sum(codebook[code] for codebook, code in zip(vectors, codes, strict=True))
    assert torch.allclose(rest, rest[:1].expand_as(rest), atol=1e-4)


def test_height_and_width_are_not_swapped(kind: str) -> None:
    """Transposing latents transposes codes and vectors."""
    quantizer = build(kind).eval()
    z = latents(2, D, 3, 4)
    output, transposed = quantizer(z), quantizer(z.transpose(2, 3))
    assert all(torch.equal(a.transpose(1, 2), b) for a, b in zip(output.codes, transposed.codes, strict=True))
    assert torch.allclose(output.z_q.transpose(2, 3), transposed.z_q, atol=1e-6)


def test_straight_through_keeps_the_value_exact(kind: str) -> None:
    quantizer = build(kind).train()
    output = quantizer((1e4 * latents(4, D, 3, 3)).requires_grad_())
    assert torch.equal(output.z_q, quantizer.lookup(output.codes))


@pytest.mark.parametrize("training", [True, False])
def test_forward_changes_nothing(kind: str, training: bool) -> None:
    quantizer = build(kind).train(training)
    before = copy.deepcopy(quantizer.state_dict())
    output = quantizer(latents(4, D, 3, 3).requires_grad_())
    (output.z_q.sum() + sum(output.losses.values())).backward()
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def gradient_of_term(quantizer: Quantizer, term: str) -> tuple[Tensor | None, set[str]]:
    """Return the gradient of a loss term for z, and the names of the parameters it reaches."""
    quantizer.zero_grad()
    z = latents(4, D, 3, 3).requires_grad_()
    output = quantizer(z)
    loss = (output.z_q * latents(4, D, 3, 3, seed=5)).sum() if term == "reconstruction" else output.losses[term]
    loss.backward()
    assert z.grad is None or bool((z.grad != 0).any())
    return z.grad, {name for name, value in quantizer.named_parameters() if value.grad is not None and bool((value.grad != 0).any())}


def test_each_loss_term_reaches_the_right_parameters(kind: str) -> None:
    """Reconstruction: encoder and projections. Commitment: encoder and what projects to the codebook. Codebook term: the
    codebook only. Entropy: encoder and codebook (LFQ: the encoder). Smoothing: the convolutions only.
    """
    quantizer = build(kind)
    parameters = {name for name, _ in quantizer.named_parameters()}
    up, down = {name for name in parameters if name.startswith("up.")}, {name for name in parameters if name.startswith("down.")}
    smoothers = {name for name in parameters if name.startswith("smoothers.")}
    codebooks = parameters - up - down - smoothers
    terms = set(quantizer(latents(4, D, 3, 3)).losses)
    expected = {"reconstruction": (True, up | down)}
    if not isinstance(_inner(quantizer), FiniteScalarQuantizer):
        expected["commitment"] = (True, down)
    if codebooks:
        expected["codebook"] = (False, codebooks)
    if smoothers:
        expected["smoothing"] = (False, smoothers)
    if "entropy" in terms:
        expected["entropy"] = (True, down | codebooks)
    assert terms == set(expected) - {"reconstruction"}
    for term, (to_encoder, to_parameters) in expected.items():
        gradient, names = gradient_of_term(quantizer, term)
        assert (gradient is not None) == to_encoder, term
        assert names == to_parameters, term


def _inner(quantizer: Quantizer) -> Quantizer:
    return quantizer.inner if isinstance(quantizer, ProjectedQuantizer) else quantizer


def reference_rotation(z: Tensor, q: Tensor, gradient: Tensor) -> Tensor:
    """Compute (|q| / |z|) R' gradient (Fifty et al. 2024), with R built explicitly as a plane rotation per position."""
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


def test_the_reconstruction_gradient_equals_the_estimators(kind: str) -> None:
    """Straight through: unchanged at any depth, up to linear maps and FSQ's slope. Rotation trick: rotated and scaled by the
    matrix of the paper's equation.
    """
    quantizer = build(kind)
    gradient, _ = gradient_of_term(quantizer, "reconstruction")
    assert gradient is not None
    weight = latents(4, D, 3, 3, seed=5)
    expected = weight
    if "rotation" in kind:
        z = latents(4, D, 3, 3)
        expected = reference_rotation(z, quantizer(z).z_q, weight)
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
    expected, first, second = (quantizer(part).statistics for part in (z, z[:2], z[2:]))
    both = sum_by_name([first, second])
    assert set(expected) == set(both)
    assert all(torch.allclose(expected[name], both[name]) for name in expected)
    counts = level_counts(expected)
    assert [len(level) for level in counts] == list(quantizer.num_codes)
    for level, codes in zip(counts, quantizer(z).codes, strict=True):
        assert torch.equal(level.long(), torch.bincount(codes.flatten(), minlength=len(level)))


def test_an_empty_batch_works(kind: str) -> None:
    quantizer = build(kind)
    output = quantizer(torch.empty(0, D, 3, 3, requires_grad=True))
    assert output.z_q.shape == (0, D, 3, 3)
    assert all(loss.item() == 0 for loss in output.losses.values())
    quantizer.update_(output.statistics)
    assert all(bool(torch.isfinite(value).all()) for value in quantizer.state_dict().values())


def test_autocast_leaves_search_and_values_in_float32(kind: str) -> None:
    quantizer = build(kind)
    z = latents(4, D, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(z)
        vectors = quantizer.lookup(output.codes)
    plain = quantizer(z)
    assert output.z_q.dtype == vectors.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(output.codes, plain.codes, strict=True))
    assert torch.equal(vectors, plain.z_q)
    assert quantizer(z.bfloat16()).z_q.dtype == torch.float32


def test_latents_are_one_tensor_per_codebook(kind: str) -> None:
    """One tensor per codebook, as wide as its vectors and ordered by image, so that slices of a batch have slices of it."""
    quantizer = build(kind)
    z = latents(4, D, 3, 2)
    output = quantizer(z)
    codebooks = quantizer.codebooks()
    positions = [0] * len(codebooks)
    for level, (height, width) in enumerate(quantizer.level_grids(3, 2) if codebooks else []):
        positions[quantizer.codebook_of(level)] += height * width
    parts = zip(output.latents, quantizer(z[:1]).latents, quantizer(z[1:]).latents, strict=True)
    for codebook, count, (rows, first, second) in zip(codebooks, positions, parts, strict=True):
        assert rows.shape == (4 * count, codebook.dim)
        assert not rows.requires_grad
        assert torch.allclose(rows, torch.cat([first, second]), atol=1e-6)


def test_kmeans_places_every_codebook_and_lowers_the_error(kind: str) -> None:
    quantizer = build(kind)
    batches = [3 + latents(16, D, 3, 3, seed=seed) for seed in range(4)]
    codebooks = [codebook for codebook in quantizer.codebooks() if codebook.placeable]
    if not codebooks:
        assert isinstance(_inner(quantizer), (FiniteScalarQuantizer, LookupFreeQuantizer)) or kind.startswith("simvq")
        return

    def error() -> float:
        outputs = [quantizer(z) for z in batches]
        return sum(float(output.losses["commitment"].detach()) for output in outputs)

    before = error()
    place_by_kmeans_(quantizer, batches, len(batches), 0, gather=lambda rows: rows, agree=lambda tensor: tensor)
    assert error() < 0.5 * before
    counts = [level.sum() for level in level_counts(sum_by_name([quantizer(z).statistics for z in batches]))]
    for codebook in codebooks:
        # Mean use per batch, over the levels that share the codebook.
        assert float(codebook.cluster_size.sum()) == pytest.approx(float(sum(counts)) / len(codebooks) / len(batches), rel=1e-5)


def test_dead_codes_restart_on_latents_and_live_codes_stay(kind: str) -> None:
    quantizer = build(kind)
    optimizer = torch.optim.AdamW(list(quantizer.parameters()) or [torch.nn.Parameter(torch.zeros(1))])
    z = latents(6, D, 4, 5)
    output = quantizer(z)
    pairs = [pair for pair in zip(quantizer.codebooks(), output.latents, strict=True) if pair[0].placeable]
    codebooks = [codebook for codebook, _ in pairs]
    for codebook in codebooks:
        codebook.cluster_size.fill_(10.0)
        codebook.cluster_size[[3, 7]] = 0.01
    before = [codebook.vectors().detach().clone() for codebook in codebooks]
    restart = Restart(quantizer, seed=0, step=0, batch_size=6)
    candidates = restart.candidates(output.latents, first_image=0, images=6)
    assert int(restart.apply_(candidates, optimizer)) == 2 * len(codebooks)
    for (codebook, vectors), earlier in zip(pairs, before, strict=True):
        current = codebook.vectors().detach()
        live = [code for code in range(codebook.num_codes) if code not in (3, 7)]
        assert torch.equal(current[live], earlier[live])
        assert all(bool(((vectors - current[code]).abs() < 1e-6).all(1).any()) for code in (3, 7))
        assert not bool(codebook.dead_codes().any())
        # Learning continues from there, instead of moving the code back.
        codebook.update_(torch.zeros(codebook.num_codes), torch.zeros_like(current))
        assert torch.allclose(codebook.vectors()[[3, 7]], current[[3, 7]], atol=1e-4)


def test_restart_candidates_do_not_depend_on_how_a_batch_is_split(kind: str) -> None:
    quantizer = build(kind)
    z = latents(6, D, 3, 2)
    restart = Restart(quantizer, seed=5, step=9, batch_size=6)
    expected = restart.candidates(quantizer(z).latents, 0, 6)
    for parts in (2, 3, 6):
        size = 6 // parts
        partial = [restart.candidates(quantizer(part).latents, n * size, size) for n, part in enumerate(z.chunk(parts))]
        total = sum_by_name(partial)
        assert set(total) == set(expected)
        assert all(torch.allclose(expected[name], total[name], atol=1e-6) for name in expected)


def test_training_lowers_the_error_and_keeps_codes_in_use(kind: str) -> None:
    """In the training loop's order, on clustered targets, with a learned encoder and decoder."""
    quantizer = build(kind)
    torch.manual_seed(0)
    target = (latents(16, D)[torch.randint(16, (256,))] + 0.05 * latents(256, D, seed=3))[:, :, None, None]
    encoder = torch.nn.Conv2d(D, D, 1)
    decoder = torch.nn.Conv2d(D, D, 1)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters(), *quantizer.parameters()], lr=1e-2)
    errors = []
    for step in range(80):
        output = quantizer(encoder(target))
        error = (decoder(output.z_q) - target).square().mean()
        (error + sum(output.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        quantizer.update_(output.statistics)
        if step % 5 == 0 and step < 60:
            restart = Restart(quantizer, 0, step, 256)
            restart.apply_(restart.candidates(output.latents, 0, 256), optimizer)
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]
    used = [level > 0 for level in level_counts(quantizer(encoder(target)).statistics)]
    if kind in ("residual_shared", "multiscale"):  # their deeper levels use few codes of the shared codebook
        used = [torch.stack(used).any(0)]
    assert all(int(level.sum()) >= 4 for level in used)


def test_a_digit_of_a_code_decides_its_channel(kind: str) -> None:
    """Digits multiply to K in each level; of FSQ and LFQ, a channel of the code's vector is a rising function of its digit alone."""
    quantizer = build(kind)
    assert [math.prod(sizes) for sizes in quantizer.digits] == list(quantizer.num_codes)
    if kind not in ("fsq", "lfq"):
        assert all(len(sizes) == 1 for sizes in quantizer.digits)
        return
    assert isinstance(quantizer, ProjectedQuantizer)
    (sizes,), codes = quantizer.digits, torch.arange(quantizer.num_codes[0])
    vectors = quantizer.inner.lookup_rows((codes,))
    assert vectors.shape[1] == len(sizes)
    for number, size in enumerate(sizes):
        digits = codes // math.prod(sizes[:number]) % size
        (values, counts) = zip(*(vectors[digits == digit, number].unique(return_counts=True) for digit in range(size)), strict=True)
        assert all(len(count) == 1 for count in counts)
        assert sorted(values) == list(values)


def test_weights_and_buffers_survive_saving(kind: str) -> None:
    quantizer, other = build(kind), build(kind)
    with torch.no_grad():
        for value in quantizer.state_dict().values():
            value.add_(1)
    other.load_state_dict(quantizer.state_dict())
    z = latents(4, D, 3, 3)
    assert torch.equal(quantizer(z).z_q, other(z).z_q)


def test_quantizers_are_composed_as_the_recipe_says(kind: str) -> None:
    quantizer = build(kind)
    inner = _inner(quantizer)
    assert isinstance(quantizer, ProjectedQuantizer) == ("projected" in kind or kind in ("fsq", "lfq"))
    assert isinstance(inner, ProductQuantizer) == kind.startswith("product")
    assert any(isinstance(module, ResidualQuantizer) for module in quantizer.modules()) == ("residual" in kind)
    rule = {"gradient": GradientCodebook, "simvq": LinearCodebook}.get(kind.split("_")[0], MovingAverageCodebook)
    rule = GradientCodebook if kind in ("residual_gradient", "product_cosine") else rule
    assert all(isinstance(codebook, rule) for codebook in quantizer.codebooks())
    levels = {"residual": 3, "residual_shared": 3, "multiscale": 3, "product_residual_projected": 4}
    levels |= dict.fromkeys(("residual_gradient", "residual_rotation", "product", "product_cosine"), 2)
    assert len(quantizer.num_codes) == levels.get(kind, 1)
    assert len(quantizer.codebooks()) == {"fsq": 0, "lfq": 0, "residual_shared": 1, "multiscale": 1}.get(kind, levels.get(kind, 1))
