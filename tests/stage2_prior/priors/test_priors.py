"""Properties of every prior: order, likelihoods, caches, labels, draws."""

from __future__ import annotations

import gc
import itertools
import math

import pytest
import torch

from configs.errors import UserError
from configs.parts import part_from
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.draw import StepwiseSampling, draw, guidance_scales, guided, uniforms, warp
from stage2_prior.priors.contract import Keep, VariantEmbedding
from stage2_prior.priors.prior_file import build_prior
from stage2_prior.priors.stepwise import StepwisePrior
from tests.stage2_prior.priors.prior_kinds import KINDS, LAYOUTS, build, classes, manifest, random_codes

pytestmark = pytest.mark.parametrize("kind", KINDS)
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def position_logits(prior: StepwisePrior, codes: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> list[torch.Tensor]:
    """Return the logits (B, K) of each position."""
    return [row for level in prior.logits(codes, labels) for row in level.unbind(1)]


@layouts
def test_each_position_depends_on_exactly_the_earlier_positions(kind: str, layout: SequenceLayout) -> None:
    """Another code at position j moves the logits of exactly the positions after j: no blind spot, nothing from the future."""
    prior = build(kind, layout, layers=4).double()
    codes, labels = random_codes(layout, 1), torch.tensor([2])
    base = position_logits(prior, codes, labels)
    for changed in range(layout.length):
        sequences = layout.flat(codes).clone()
        sequences[0, changed] = (sequences[0, changed] + 1) % layout.num_codes[layout.level_of(changed)]
        moved = [not torch.equal(a, b) for a, b in zip(base, position_logits(prior, layout.grids_of(sequences), labels), strict=True)]
        assert moved == [position > changed for position in range(layout.length)]


@pytest.mark.parametrize("sizes", [(3,), (3, 2), (2, 3)])
def test_probabilities_sum_to_one_over_all_codes(kind: str, sizes: tuple[int, ...]) -> None:
    """The chain of conditionals is one distribution: the sum of exp(-nats) over all possible grids is 1."""
    layout = SequenceLayout([(1, 2)] * len(sizes) if len(sizes) > 1 else [(2, 2)], sizes)
    prior = build(kind, layout).double()
    ranges = [torch.arange(layout.num_codes[layout.level_of(position)]) for position in range(layout.length)]
    all_grids = layout.grids_of(torch.cartesian_prod(*ranges))
    nats = prior.nats(all_grids, torch.full((len(all_grids[0]),), 1))
    assert nats.shape == (len(all_grids[0]), layout.length)
    assert (-nats).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-9)


@layouts
@pytest.mark.parametrize("labelled", [True, False])
def test_cached_steps_give_the_logits_of_the_full_pass(kind: str, layout: SequenceLayout, labelled: bool) -> None:
    prior = build(kind, layout)
    codes, labels = random_codes(layout, 6), torch.arange(6) if labelled else None
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-11)):
        prior.to(dtype)
        full = position_logits(prior, codes, labels)
        cache, sequences = prior.new_cache(6), layout.flat(codes)
        for position in range(layout.length):
            step = prior.step(None if position == 0 else sequences[:, position - 1], labels, cache)
            assert step.dtype == dtype
            assert torch.allclose(step, full[position], atol=tolerance, rtol=tolerance)


def test_labels_change_the_logits_of_every_position_and_none_is_the_null_label(kind: str) -> None:
    layout = LAYOUTS["top and bottom"]
    prior = build(kind, layout)
    codes = tuple(level[:1].expand(6, -1, -1) for level in random_codes(layout, 6))
    for logits in position_logits(prior, codes, torch.arange(6)):
        assert all(not torch.allclose(logits[a], logits[b], atol=1e-4) for a, b in itertools.combinations(range(6), 2))
    for unlabelled, null_labelled in zip(prior.logits(codes, None), prior.logits(codes, torch.full((6,), 5)), strict=True):
        assert torch.equal(unlabelled, null_labelled)


def test_dropout_is_off_in_eval(kind: str) -> None:
    prior = build(kind, LAYOUTS["one level"], dropout=0.5)
    codes = random_codes(prior.layout, 2)
    assert torch.equal(prior.logits(codes, None)[0], prior.logits(codes, None)[0])
    prior.train()
    assert not torch.equal(prior.logits(codes, None)[0], prior.logits(codes, None)[0])


def test_untrained_priors_are_near_uniform(kind: str) -> None:
    torch.manual_seed(0)
    config = part_from("prior", {"layers": 6, "width": 64, "heads": 4, **KINDS[kind]})
    layout = SequenceLayout([(4, 4)], [512])
    prior = build_prior(config, classes(10), manifest(layout)).eval()
    nats = prior.nats(random_codes(layout, 32), torch.arange(32) % 10).mean().item()
    assert nats == pytest.approx(math.log(512), rel=0.02)


@layouts
def test_gradient_checkpointing_changes_no_gradient(kind: str, layout: SequenceLayout) -> None:
    """With dropout too: the recomputation of a layer draws the same mask."""
    codes, labels = random_codes(layout, 3), torch.tensor([0, 4, 5])
    gradients = []
    for checkpointing in (False, True):
        prior = build(kind, layout, dropout=0.2).train()
        prior.checkpointing = checkpointing
        torch.manual_seed(1)
        prior(codes, labels).backward()
        gradients.append([parameter.grad for parameter in prior.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        assert checkpointed is not None
        assert torch.equal(plain, checkpointed)


def test_checkpointing_saves_memory_for_the_backward_pass(kind: str) -> None:
    """Counts the bytes that autograd saves."""

    def saved(checkpointing: bool) -> int:
        prior = build(kind, LAYOUTS["one level"], layers=6).train()
        prior.checkpointing = checkpointing
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size() * (not isinstance(tensor, torch.nn.Parameter))
            return tensor

        codes = random_codes(prior.layout, 16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            prior(codes, None)
        return total

    assert saved(True) < saved(False) / 2


def test_mixed_precision_on_tiny_tensors(kind: str) -> None:
    prior = build(kind, LAYOUTS["one level"])
    codes, labels = random_codes(prior.layout, 2), torch.tensor([0, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = prior.nats(codes, labels)
    assert half.dtype == torch.float32
    assert torch.allclose(half, prior.nats(codes, labels), atol=0.3, rtol=0.1)


def test_samples_follow_the_priors_own_probabilities(kind: str) -> None:
    """Frequencies of all 2^4 grids of two levels in 8,000 samples against exp(-nats); 15 degrees of freedom, 99.9 % point 37.7."""
    layout = SequenceLayout([(1, 2), (1, 2)], [2, 2])
    prior = build(kind, layout, num_classes=0)
    for parameter in prior.parameters():
        parameter.data *= 0.5
    codes = prior.sample(None, uniforms(0, torch.arange(8_000), 4), StepwiseSampling())
    index = (layout.flat(codes) * torch.tensor([8, 4, 2, 1])).sum(1)
    all_grids = layout.grids_of(torch.tensor(list(itertools.product([0, 1], repeat=4))))
    expected = 8_000 * (-prior.nats(all_grids, None)).sum(1).exp()
    assert expected.min() > 5
    statistic = ((torch.bincount(index, minlength=16) - expected).square() / expected).sum()
    assert statistic < 37.7


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@layouts
def test_a_sample_is_the_same_whatever_it_is_batched_with(kind: str, layout: SequenceLayout, guidance: float) -> None:
    prior = build(kind, layout).double()
    numbers, labels = torch.arange(12), torch.arange(12) % 5
    config = StepwiseSampling(guidance=guidance, top_p=0.95)
    together = prior.sample(labels, uniforms(7, numbers, layout.length), config)
    for size in (1, 5):
        parts = [prior.sample(labels[part], uniforms(7, part, layout.length), config) for part in numbers.split(size)]
        assert all(torch.equal(torch.cat(level), expected) for level, expected in zip(zip(*parts, strict=True), together, strict=True))
    other = prior.sample(labels, uniforms(8, numbers, layout.length), config)
    assert not torch.equal(other[0], together[0])


@pytest.fixture
def _only_new_objects_are_tracked() -> None:
    """Exclude existing objects from garbage collection: after compilations there are millions."""
    gc.collect()
    gc.freeze()


@pytest.mark.usefixtures("_only_new_objects_are_tracked")
def test_batches_leak_no_tensors(kind: str) -> None:
    """As many tensors are alive after the fourth batch as after the first."""
    prior = build(kind, LAYOUTS["top and bottom"])

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(tracked), torch.Tensor) for tracked in gc.get_objects())

    counts = []
    for batch in range(4):
        codes = prior.sample(torch.arange(3), uniforms(batch, torch.arange(3), prior.layout.length), StepwiseSampling(guidance=2.0))
        counts.append(alive())
    assert counts[0] > 0
    assert len(codes) == 2
    assert counts[3] == counts[0]


@layouts
def test_kept_codes_stay_and_the_others_follow_from_them(kind: str, layout: SequenceLayout) -> None:
    """Greedy completion: each drawn code is the most probable after the codes before it, by the full pass."""
    prior = build(kind, layout).double()
    codes, labels = random_codes(layout, 4), torch.tensor([0, 1, 4, 5])
    masks = layout.grids_of(torch.arange(layout.length)[None] % 3 != 1)
    completed = prior.sample(labels, uniforms(0, torch.arange(4), layout.length), StepwiseSampling(temperature=0), Keep(codes, masks))
    most_probable = torch.stack([row.argmax(-1) for row in position_logits(prior, completed, labels)], 1)
    mask = layout.flat(masks)[0]
    assert 0 < int(mask.sum()) < layout.length - 1
    assert torch.equal(layout.flat(completed)[:, mask], layout.flat(codes)[:, mask])
    assert torch.equal(layout.flat(completed)[:, ~mask], most_probable[:, ~mask])


@layouts
def test_all_options_together_equal_full_passes(kind: str, layout: SequenceLayout) -> None:
    """Guidance on a schedule, temperature, top-k, top-p, min-p and kept codes, position by position without a cache."""
    prior = build(kind, layout).double()
    settings = {"guidance": 2.5, "guidance_schedule": "cosine", "temperature": 0.8, "top_k": 4, "top_p": 0.9, "min_p": 0.05}
    config = StepwiseSampling(**settings)  # type: ignore[arg-type]
    codes, labels, none = random_codes(layout, 4), torch.tensor([0, 1, 2, 4]), torch.full((4,), 5)
    masks = layout.grids_of(torch.arange(layout.length)[None] % 4 == 1)
    uniform = uniforms(3, torch.arange(4), layout.length)
    completed = layout.flat(prior.sample(labels, uniform, config, Keep(codes, masks)))
    sequences = layout.flat(codes)
    for position, scale in enumerate(guidance_scales(config, layout.length)):
        if not layout.flat(masks)[0, position]:
            grids = layout.grids_of(sequences)
            logits = guided(position_logits(prior, grids, labels)[position], position_logits(prior, grids, none)[position], scale)
            sequences[:, position] = draw(warp(logits, config), uniform[:, position])
        assert torch.equal(completed[:, position], sequences[:, position])


def test_non_finite_logits_are_refused(kind: str) -> None:
    prior = build(kind, LAYOUTS["one level"])
    with pytest.raises(UserError, match="finite"):
        prior.sample(torch.tensor([0]), uniforms(0, torch.arange(1), 12), StepwiseSampling(guidance=1e308))


def test_keeping_every_code_returns_the_codes(kind: str) -> None:
    layout = LAYOUTS["top and bottom"]
    codes = random_codes(layout, 3)
    masks = tuple(torch.ones(grid, dtype=torch.bool) for grid in layout.grids)
    completed = build(kind, layout).sample(None, uniforms(0, torch.arange(3), layout.length), StepwiseSampling(), Keep(codes, masks))
    assert all(torch.equal(a, b) for a, b in zip(completed, codes, strict=True))


def test_every_parameter_gets_a_gradient(kind: str) -> None:
    """With labels dropped for some images; DDP would wait for a parameter without a gradient."""
    for layout in LAYOUTS.values():
        prior = build(kind, layout).train()
        prior(random_codes(layout, 6), torch.arange(6)).backward()
        assert not [name for name, parameter in prior.named_parameters() if parameter.grad is None]


@layouts
def test_variants_change_the_logits_and_variant_0_is_the_default(kind: str, layout: SequenceLayout) -> None:
    """Non-leaking augmentation: sampling and likelihoods assume variant 0, whose embedding stays zero in training."""
    prior = build(kind, layout, num_variants=3).train()
    codes, labels = random_codes(layout, 4), torch.arange(4)
    default, original, shifted = (prior.logits(codes, labels, variants) for variants in (None, torch.zeros(4).long(), torch.full((4,), 2)))
    assert all(torch.equal(a, b) for a, b in zip(default, original, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(original, shifted, strict=True))
    torch.cat([level.flatten() for level in prior.logits(codes, labels, torch.arange(4) % 3)]).square().sum().backward()
    gradients = [module.weight.grad for module in prior.modules() if isinstance(module, VariantEmbedding)]
    assert gradients
    assert all(gradient is not None and not gradient[0].any() and gradient[1:].any() for gradient in gradients)
