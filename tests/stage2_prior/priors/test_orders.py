"""Corrupted context, orders of a transformer, completion of any mask, drawing in rounds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from configs.parts import part_from
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.draw import draw, guidance_scales, guided, round_stops, uniforms, warp
from stage2_prior.priors.contract import Keep
from stage2_prior.priors.levelwise import build_level
from stage2_prior.priors.stepwise import FixedBatch, StepwisePrior
from stage2_prior.priors.transformer import Transformer, TransformerSampling
from stage2_prior.sampler import Sampler
from tests.stage2_prior.priors.prior_kinds import LAYOUTS, build, classes, random_codes

TWO = LAYOUTS["top and bottom"]
layouts = pytest.mark.parametrize("layout", [LAYOUTS["one level"], TWO], ids=["one level", "top and bottom"])


def any_order(layout: SequenceLayout, **settings: Any) -> Transformer:
    prior = build("transformer", layout, order="any", **settings).double()
    assert isinstance(prior, Transformer)
    return prior


def position_logits(prior: Transformer, codes: Codes, labels: Tensor | None, order: Tensor) -> list[Tensor]:
    """Return the logits (B, K) of each position under an order."""
    return [row for level in prior.logits(codes, labels, order=order) for row in level.unbind(1)]


def all_codes(layout: SequenceLayout) -> Codes:
    sizes = [layout.num_codes[layout.level_of(position)] for position in range(layout.length)]
    return layout.grids_of(torch.cartesian_prod(*map(torch.arange, sizes)))


# --- corrupted context


def test_the_share_of_random_codes_falls_to_none_and_codes_stay_in_their_codebook() -> None:
    layout, batch = SequenceLayout([(8, 8), (8, 8)], [1, 1000]), 400
    prior, codes = build("transformer", layout, corruption=0.8), tuple(torch.zeros(batch, 8, 8, dtype=torch.int64) for _ in range(2))
    draws = torch.rand(batch, prior.num_draws)
    for progress, limit in ((0.0, 0.8), (0.3, 0.48), (0.75, 0.0), (0.9, 0.0)):
        first, second = prior.corrupted(codes, draws, torch.tensor(progress))
        assert not first.any()
        shares = second.bool().double().mean((1, 2))
        assert shares.mean().item() == pytest.approx(limit / 2, abs=0.03)
        assert shares.max().item() == pytest.approx(limit, abs=0.12)
        assert second[second > 0].double().mean().item() == pytest.approx(500, abs=15) if limit else not second.any()


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn"])
def test_targets_are_the_codes_themselves(kind: str) -> None:
    prior = build(kind, TWO, corruption=1.0).train()
    codes, draws, progress = random_codes(TWO, 5), torch.rand(5, prior.num_draws), torch.tensor(0.1)
    context = prior.corrupted(codes, draws, progress)
    assert not torch.equal(TWO.flat(context), TWO.flat(codes))
    nats = [
        -level.log_softmax(-1).gather(-1, grid.flatten(1)[..., None])
        for level, grid in zip(prior.logits(context, None), codes, strict=True)
    ]
    assert prior(codes, None, None, draws, progress).item() == pytest.approx(torch.cat(nats, 1).mean().item(), rel=1e-5)
    assert torch.equal(prior(codes, None, None, draws, torch.tensor(0.8)), build(kind, TWO).train()(codes, None))


def test_levels_above_are_given_as_they_are() -> None:
    """In a prior of a single level, and in one of all levels that has one for each."""
    levels = [{"kind": "transformer", "layers": 1, "width": 16, "heads": 2, "corruption": 1.0, "dropout": 0.0} for _ in range(2)]
    codes, progress = random_codes(TWO, 5), torch.tensor(0.0)
    parts = [build_level(part_from("prior", config), TWO, level, classes(0)) for level, config in enumerate(levels)]
    draws = [torch.rand(5, part.num_draws) for part in parts]
    top, bottom = parts[1].corrupted(codes, draws[1], progress)
    assert top is codes[0]
    assert not torch.equal(bottom, codes[1])
    joined = part_from("prior", {"kind": "levelwise", "levels": levels}).build(TWO, classes(0))
    for part, trained in zip(parts, joined.parts, strict=True):
        trained.load_state_dict(part.state_dict())
    losses = [part(codes[: level + 1], None, None, draws[level], progress) for level, part in enumerate(parts)]
    expected = sum(loss * length for loss, length in zip(losses, TWO.lengths, strict=True)) / TWO.length
    assert torch.allclose(joined(codes, None, None, torch.cat(draws, 1), progress), expected)
    with pytest.raises(ValueError, match=r"prior\.corruption: expected 0 beside prior\.levels"):
        part_from("prior", {"kind": "levelwise", "levels": levels, "corruption": 0.5})


# --- orders


@pytest.mark.parametrize(("order", "shares"), [("annealed", {0.0: 1, 0.5: 1, 0.625: 0.5, 0.75: 0, 1.0: 0}), ("any", {0.0: 1, 1.0: 1})])
def test_orders_are_permutations_within_levels_of_a_falling_share_of_rows(order: str, shares: dict[float, float]) -> None:
    layout = SequenceLayout([(2, 3), (4, 6)], [5, 7])
    prior, raster = build("transformer", layout, order=order), torch.arange(layout.length)
    assert isinstance(prior, Transformer)
    draws = torch.rand(500, prior.num_draws)
    for progress, share in shares.items():
        orders = prior._training_order(draws, torch.tensor(progress))
        assert torch.equal(orders.sort(1).values, raster.expand(500, -1))
        assert ((orders < 6) == (raster < 6)).all()
        assert (orders != raster).any(1).double().mean().item() == pytest.approx(share, abs=0.07)
        if share == 1:
            assert len(orders.unique(dim=0)) == 500


@layouts
def test_each_position_depends_on_exactly_those_before_it_in_the_order(layout: SequenceLayout) -> None:
    prior, codes, labels = any_order(layout), random_codes(layout, 1), torch.tensor([2])
    order = layout.order_by(torch.rand(1, layout.length))
    place = order[0].argsort()
    base = position_logits(prior, codes, labels, order)
    for changed in range(layout.length):
        sequences = layout.flat(codes).clone()
        sequences[0, changed] = (sequences[0, changed] + 1) % layout.num_codes[layout.level_of(changed)]
        others = position_logits(prior, layout.grids_of(sequences), labels, order)
        assert [not torch.equal(a, b) for a, b in zip(base, others, strict=True)] == (place > place[changed]).tolist()


def test_probabilities_sum_to_one_in_every_order() -> None:
    layout = SequenceLayout([(1, 2), (1, 2)], [2, 3])
    prior, codes = any_order(layout), all_codes(layout)
    labels, sums = torch.ones(len(codes[0]), dtype=torch.int64), []
    for top, bottom in itertools.product([[0, 1], [1, 0]], [[2, 3], [3, 2]]):
        orders = torch.tensor([*top, *bottom]).expand(len(labels), -1)
        logits = position_logits(prior, codes, labels, orders)
        rows = [row.log_softmax(-1).gather(1, layout.flat(codes)[:, [position]]) for position, row in enumerate(logits)]
        sums.append(torch.cat(rows, 1).sum(1).exp())
        assert sums[-1].sum().item() == pytest.approx(1, abs=1e-10)
    assert torch.allclose((-prior.nats(codes, labels)).sum(1).exp(), sums[0])
    assert not torch.allclose(sums[0], sums[1], rtol=1e-3)


@pytest.mark.parametrize("order", ["annealed", "any"])
@layouts
def test_cached_steps_in_raster_order_give_the_logits_of_the_full_pass(order: str, layout: SequenceLayout) -> None:
    """One by one, after known codes at once, and with static shapes."""
    prior, codes, labels = build("transformer", layout, order=order).double(), random_codes(layout, 3), torch.tensor([0, 5, 2])
    full, sequences = torch.cat([level.flatten(1) for level in prior.logits(codes, labels)], 1), layout.flat(codes)

    def before(position: int) -> Tensor | None:
        return sequences[:, position - 1] if position else None

    with torch.no_grad():
        cache, batch = prior.new_cache(3), FixedBatch(sequences, labels, torch.zeros(1, dtype=torch.int64))
        fixed, eager = prior.fixed_steps(batch), []
        assert fixed is not None
        for position in range(layout.length):
            eager.append(prior.step(before(position), labels, cache))
            fixed.prepare(position)
            assert torch.allclose(fixed.logits(fixed.phase(position)), eager[-1], atol=1e-11)
            batch.position.add_(1)
        assert torch.allclose(torch.cat(eager, 1), full, atol=1e-11)
        cache = prior.new_cache(3)
        prior.prefill(sequences, 0, 3, labels, cache)
        assert torch.allclose(prior.step(before(3), labels, cache), eager[3], atol=1e-11)
    raster = torch.arange(layout.length).expand(3, -1)
    explicit = torch.cat([level.flatten(1) for level in prior.logits(codes, labels, order=raster)], 1)  # type: ignore[call-arg]
    assert torch.allclose(explicit, full, atol=1e-11)


@pytest.mark.parametrize("order", ["annealed", "any"])
def test_every_parameter_gets_a_gradient(order: str) -> None:
    for layout in LAYOUTS.values():
        prior = build("transformer", layout, order=order).train()
        prior(random_codes(layout, 6), torch.arange(6), None, torch.rand(6, prior.num_draws), torch.tensor(0.6)).backward()
        assert not [name for name, parameter in prior.named_parameters() if parameter.grad is None]


def test_features_of_the_levels_above_are_those_of_the_predicted_position() -> None:
    """In a prior of a single level: a code that is drawn first depends on nothing else."""
    config = {"kind": "transformer", "layers": 2, "width": 16, "heads": 2}
    prior = build_level(part_from("prior", {**config, "order": "annealed"}), TWO, 1, classes(0)).double().eval()
    assert isinstance(prior, Transformer)
    assert prior.above is not None
    codes, positions = random_codes(TWO, 1), torch.arange(8)
    features = prior.above(codes[:1], prior.rotary.table).flatten(1, 2)[0]
    inputs = prior.start + prior.label(torch.tensor(0)) + prior._target_embeddings() + features
    for first in range(8):
        x = inputs[[first]][None]
        for block in prior.blocks:
            x = block(x, prior.rotary.table[:1])
        order = torch.cat([positions[[first]], positions[positions != first]])[None]
        (logits,) = prior.logits(codes, None, order=order)
        assert torch.allclose(logits[:, first], prior.head_logits(x, 0)[:, 0], atol=1e-12)
    with pytest.raises(ValueError, match=r"prior\.order: expected raster or annealed for a prior of a single level, found any"):
        build_level(part_from("prior", {**config, "order": "any"}), TWO, 0, classes(0))


# --- completion and rounds


def test_rounds_grow_and_as_many_as_codes_are_one_by_one() -> None:
    for count in range(1, 70):
        assert round_stops(count, count) == round_stops(count, 1000) == list(range(count + 1))
        for rounds in range(1, count):
            sizes = [stop - start for start, stop in itertools.pairwise(round_stops(count, rounds))]
            assert (len(sizes), sum(sizes)) == (rounds, count)
            assert min(sizes) >= 1
            assert all(later >= earlier - 1 for earlier, later in itertools.pairwise(sizes))
    assert round_stops(64, 8) == [0, 2, 5, 11, 19, 29, 40, 52, 64]
    assert round_stops(0, 8) == [0]


def test_completions_follow_the_probabilities_given_all_kept_codes() -> None:
    """Frequencies of the missing codes in 8,000 completions against p(missing | kept), by enumeration of all codes under an order that
    begins with the kept ones; 3 degrees of freedom, 99.9 % point 16.3.
    """
    layout = SequenceLayout([(1, 4)], [2])
    prior, codes = any_order(layout, num_classes=0), all_codes(layout)
    kept, order = torch.tensor([False, True, False, True]), torch.tensor([1, 3, 0, 2])
    logits = position_logits(prior, codes, None, order.expand(16, -1))
    rows = [row.log_softmax(-1).gather(1, layout.flat(codes)[:, [position]]) for position, row in enumerate(logits)]
    joint = torch.cat(rows, 1).sum(1).exp()
    matches = (layout.flat(codes)[:, kept] == torch.tensor([1, 0])).all(1)
    expected = 8_000 * joint[matches] / joint[matches].sum()
    assert expected.min() > 5
    keep = Keep((torch.tensor([[[0, 1, 0, 0]]]).expand(8_000, -1, -1),), (kept[None],))
    completed = layout.flat(prior.sample(None, uniforms(0, torch.arange(8_000), prior.num_noise), TransformerSampling(), keep))
    assert (completed[:, kept] == torch.tensor([1, 0])).all()
    counts = torch.bincount(completed[:, 0] * 2 + completed[:, 2], minlength=4)
    assert ((counts - expected).square() / expected).sum() < 16.3


def drawn_by_full_passes(prior: Transformer, labels: Tensor, noise: Tensor, settings: TransformerSampling, keep: Keep | None) -> Tensor:
    """Draw sequences (B, T) without a cache: in each round, each code by a pass in which it follows all that are known."""
    layout, none = prior.layout, torch.full((1,), 5)
    sequences = torch.zeros(len(noise), layout.length, dtype=torch.int64) if keep is None else layout.flat(keep.codes).clone()
    kept = [False] * layout.length if keep is None else layout.flat(keep.masks)[0].tolist()
    parts = [range(layout.first_position(level), layout.first_position(level + 1)) for level in range(len(layout.grids))]
    stops = [round_stops(len(part) - sum(kept[part.start : part.stop]), settings.rounds or len(part)) for part in parts]
    scales = guidance_scales(settings, sum(len(level_stops) - 1 for level_stops in stops))
    for row in range(len(noise)):
        known: list[int] = []
        keys, level_scales = noise[row, layout.length :].tolist(), iter(scales)
        for part, level_stops in zip(parts, stops, strict=True):
            known += [position for position in part if kept[position]]
            missing = [position for position in part if not kept[position]]
            order = sorted(missing, key=keys.__getitem__) if settings.rounds else missing
            for start, stop in itertools.pairwise(level_stops):
                codes, scale, drawn = layout.grids_of(sequences[[row]]), next(level_scales), []
                for position in order[start:stop]:
                    others = [other for other in range(layout.length) if other not in known and other != position]
                    one_order = torch.tensor([[*known, position, *others]])
                    logits = (position_logits(prior, codes, label, one_order)[position] for label in (labels[[row]], none))
                    drawn.append(draw(warp(guided(*logits, scale), settings), noise[row, [position]]))
                sequences[row, order[start:stop]] = torch.cat(drawn)
                known += order[start:stop]
    return sequences


@pytest.mark.parametrize("rounds", [0, 1, 3, 8])
@pytest.mark.parametrize("kept", [False, True])
def test_rounds_and_completions_equal_full_passes(rounds: int, kept: bool) -> None:
    """With guidance on a schedule, temperature, limits and two levels; 8 rounds draw one by one."""
    prior, labels = any_order(TWO), torch.tensor([0, 3])
    settings = TransformerSampling(rounds=rounds, guidance=2.5, guidance_schedule="cosine", temperature=0.8, top_p=0.9)
    keep = Keep(random_codes(TWO, 2), TWO.grids_of(torch.tensor([[0, 1, 0, 0, 1, 0, 0, 1, 0, 1]]).bool())) if kept else None
    noise = uniforms(1, torch.arange(2), prior.num_noise)
    codes = TWO.flat(prior.sample(labels, noise, settings, keep))
    if keep is not None:
        masks = TWO.flat(keep.masks)[0]
        assert torch.equal(codes[:, masks], TWO.flat(keep.codes)[:, masks])
    if rounds or kept:
        assert torch.equal(codes, drawn_by_full_passes(prior, labels, noise, settings, keep))
    else:  # raster order, as a prior that knows no other
        assert torch.equal(codes, TWO.flat(StepwisePrior.sample(prior, labels, noise, settings)))


@pytest.mark.parametrize("kept", [False, True])
def test_a_sample_in_rounds_is_the_same_whatever_it_is_batched_with(kept: bool) -> None:
    """By CUDA graphs too: these draw one by one, so the prior itself draws."""
    prior, numbers, labels = any_order(TWO), torch.arange(12), torch.arange(12) % 5
    settings = TransformerSampling(rounds=3, guidance=1.5)
    codes, masks = random_codes(TWO, 12), TWO.grids_of(torch.arange(TWO.length)[None] % 3 == 1)

    def drawn(rows: Tensor) -> Tensor:
        keep = Keep(tuple(level[rows] for level in codes), masks) if kept else None
        return TWO.flat(Sampler(prior, graphs=True)(labels[rows], uniforms(7, rows, prior.num_noise), settings, keep))

    together = drawn(numbers)
    assert torch.equal(torch.cat([drawn(rows) for rows in numbers.split(5)]), together)
    assert not torch.equal(together[:, :2], TWO.flat(prior.sample(labels, uniforms(8, numbers, prior.num_noise), settings))[:, :2])


@pytest.mark.parametrize("order", ["raster", "annealed"])
def test_rounds_need_a_prior_of_any_order(order: str) -> None:
    prior = build("transformer", TWO, order=order)
    with pytest.raises(UserError, match=rf"rounds: expected 0 for a prior trained with prior\.order {order}, found 4"):
        Sampler(prior, graphs=True)(None, uniforms(0, torch.arange(1), TWO.length), TransformerSampling(rounds=4))
