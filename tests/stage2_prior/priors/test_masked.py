"""The masked prior: its bound by enumeration, rounds, orders, kept codes, and what refuses it."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import UserError
from configs.parts import part_from
from configs.run_dir import read_json
from pipelines.anomalies import main as anomalies
from pipelines.complete import main as complete
from pipelines.compress import main as compress
from pipelines.evaluate import main as evaluate
from pipelines.export_onnx import main as export_onnx
from pipelines.export_web import main as export_web
from pipelines.generator import Generator
from pipelines.reconstruct import main as reconstruct
from pipelines.report import main as report
from pipelines.sample import main as sample
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.draw import draw, guidance_scales, guided, round_stops, uniforms
from stage2_prior.priors.contract import Keep
from stage2_prior.priors.masked import Masked, MaskedSampling, Round, halton_order
from stage2_prior.train import main as train_prior
from tests.stage2_prior.priors.prior_kinds import LAYOUTS, classes, random_codes

TINY = {"one level": SequenceLayout([(2, 2)], [3]), "two levels": SequenceLayout([(1, 2), (1, 3)], [3, 2])}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
tiny_layouts = pytest.mark.parametrize("layout", TINY.values(), ids=TINY.keys())


def build(layout: SequenceLayout, num_variants: int = 1, dropout: float = 0.0, layers: int = 3) -> Masked:
    """Build a masked prior of five classes in eval mode, in float64, its weights large enough for differences to show."""
    torch.manual_seed(0)
    config = part_from("prior", {"kind": "masked", "layers": layers, "width": 32, "heads": 4, "dropout": dropout})
    prior: Masked = config.build(layout, classes(5), num_variants)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return prior.double().eval()


def all_grids(layout: SequenceLayout) -> torch.Tensor:
    """Return all sequences of codes, (N, T)."""
    return torch.cartesian_prod(*(torch.arange(layout.num_codes[layout.level_of(position)]) for position in range(layout.length)))


def log_probabilities(prior: Masked, sequences: torch.Tensor, known: Iterable[int], label: int | None) -> list[torch.Tensor]:
    """Return log p(code | codes at the known positions), (B, K) of each position; the other codes are replaced by zeros."""
    masked = torch.ones(sequences.shape, dtype=torch.bool)
    masked[:, list(known)] = False
    condition = None if label is None else torch.full((len(sequences),), label)
    x = prior.features(prior.layout.grids_of(sequences.masked_fill(masked, 0)), masked, condition)
    levels = [prior.head_logits(part, level) for level, part in enumerate(x.split(prior.layout.lengths, 1))]
    return [logits.log_softmax(-1) for level in levels for logits in level.unbind(1)]


def log_p(prior: Masked, sequences: torch.Tensor, groups: Iterable[Sequence[int]]) -> torch.Tensor:
    """Compute log p (B,) of codes that are drawn a group of positions at a time, each group given those before it."""
    total, known = torch.zeros(len(sequences), dtype=torch.float64), list[int]()
    for group in groups:
        rows = log_probabilities(prior, sequences, known, 1)
        total += sum(rows[position].gather(1, sequences[:, position, None])[:, 0] for position in group)
        known += group
    return total


def positions(rounds: list[Round]) -> list[list[int]]:
    return [part.positions for part in rounds]


@tiny_layouts
def test_nats_are_a_bound_of_a_mixture_over_orders(layout: SequenceLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """By enumeration, with rounds of several codes: probabilities in each order sum to 1, and their mean is at least exp(-bound)."""
    monkeypatch.setattr("stage2_prior.priors.masked._BOUND_ROUNDS", 2)
    prior, sequences = build(layout), all_grids(layout)
    nats = prior.nats(layout.grids_of(sequences), torch.ones(len(sequences)).long())
    assert nats.shape == sequences.shape
    orders = [positions(order) for order in prior.bound_orders()]
    assert all(sorted(itertools.chain(*order)) == list(range(layout.length)) for order in orders)
    assert orders[0] != orders[1]
    each = torch.stack([log_p(prior, sequences, order) for order in orders])
    assert each.exp().sum(1).tolist() == pytest.approx([1, 1], abs=1e-10)
    assert torch.allclose(nats.sum(1), -each.mean(0), atol=1e-10)
    assert bool((-nats.sum(1) <= each.exp().mean(0).log() + 1e-12).all())
    assert (-nats.sum(1)).exp().sum().item() < 1 - 1e-4


def all_orders(layout: SequenceLayout) -> list[list[list[int]]]:
    """Return all orders in which the codes of each level can be drawn one by one, coarse to fine."""
    levels = [itertools.permutations(level.tolist()) for level in torch.arange(layout.length).split(layout.lengths)]
    return [[[position] for level in order for position in level] for order in itertools.product(*levels)]


@tiny_layouts
@torch.no_grad()
def test_the_bound_is_above_the_entropy_of_the_model_of_any_order(layout: SequenceLayout) -> None:
    """Of codes drawn one by one in a random order, by enumeration: the mean of `nats` over them is no less than their entropy."""
    prior, sequences = build(layout), all_grids(layout)
    exact = torch.stack([log_p(prior, sequences, order) for order in all_orders(layout)]).exp().mean(0)
    assert exact.sum().item() == pytest.approx(1, abs=1e-10)
    nats = prior.nats(layout.grids_of(sequences), torch.ones(len(sequences)).long()).sum(1)
    assert (exact * nats).sum() >= -(exact * exact.log()).sum()


@tiny_layouts
@torch.no_grad()
def test_the_training_loss_is_the_bound_over_all_orders_in_expectation(layout: SequenceLayout) -> None:
    """Over all numbers of masked codes and all orders of the level of each position, against one by one in all orders."""
    prior, codes = build(layout), random_codes(layout, 1)
    losses = []
    for position in range(layout.length):
        level = layout.level_of(position)
        own = slice(2 + layout.first_position(level), 2 + layout.first_position(level) + layout.lengths[level])
        rows = list(itertools.product(range(layout.lengths[level]), itertools.permutations(torch.arange(layout.lengths[level]) / 10)))
        draws = torch.full((len(rows), prior.num_draws), (position + 0.5) / layout.length)
        for row, (count, order) in zip(draws, rows, strict=True):
            row[1], row[own] = (count + 0.5) / layout.lengths[level], torch.stack(order)
        repeated = tuple(grid.expand(len(rows), -1, -1) for grid in codes)
        losses.append(prior(repeated, torch.ones(len(rows)).long(), draws=draws))
    orders = all_orders(layout)
    bound = -sum(log_p(prior, layout.flat(codes), order) for order in orders) / len(orders)
    assert torch.stack(losses).mean().item() == pytest.approx(float(bound) / layout.length, abs=1e-10)


@torch.no_grad()
def test_the_loss_of_a_batch_is_the_mean_over_its_parts() -> None:
    """So that ranks and micro-steps share a batch, each with its rows' draws."""
    prior, codes, draws = build(LAYOUTS["top and bottom"]), random_codes(LAYOUTS["top and bottom"], 8), torch.rand(8, 12)
    parts = [prior(tuple(level[part] for level in codes), torch.arange(8)[part] % 5, draws=draws[part]) for part in (slice(4), slice(4, 8))]
    assert prior(codes, torch.arange(8) % 5, draws=draws).item() == pytest.approx(torch.stack(parts).mean().item(), abs=1e-12)


@layouts
def test_every_parameter_gets_a_gradient_which_checkpointing_does_not_change(layout: SequenceLayout) -> None:
    """With dropout and variants: the recomputation of a layer draws the same mask. DDP would wait for a parameter without a gradient."""
    codes, draws, gradients = random_codes(layout, 6), torch.rand(6, 2 + layout.length), []
    for checkpointing in (False, True):
        prior = build(layout, num_variants=3, dropout=0.2).train()
        prior.checkpointing = checkpointing
        torch.manual_seed(1)
        prior(codes, torch.arange(6), torch.arange(6) % 3, draws).backward()
        gradients.append([parameter.grad for parameter in prior.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        assert checkpointed is not None
        assert torch.equal(plain, checkpointed)


# --- sampling


def round_sizes(count: int, rounds: int) -> list[int]:
    return [stop - start for start, stop in itertools.pairwise(round_stops(count, rounds))]


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 9), (7, 7), (16, 16)])
def test_haltons_order_visits_every_position_once_and_spreads(grid: tuple[int, int]) -> None:
    height, width = grid
    order = halton_order(height, width)
    assert sorted(order) == list(range(height * width))
    # Points 1, 2, 3, ...: rows by 1/2, 1/4, 3/4; columns by 1/3, 2/3, 1/9.
    points = [(1 / 2, 1 / 3), (1 / 4, 2 / 3), (3 / 4, 1 / 9)]
    cells = [math.floor(row * height) * width + math.floor(column * width) for row, column in points]
    assert order[: len(set(cells))] == list(dict.fromkeys(cells))
    if grid == (16, 16):  # any eight in turn lie in at least five of the sixteen 4 x 4 blocks; in raster order, in two
        parts = [{(position // 64, position % 16 // 4) for position in order[first : first + 8]} for first in range(248)]
        assert min(map(len, parts)) >= 5


@torch.no_grad()
def test_samples_in_haltons_order_follow_their_own_probabilities() -> None:
    """Frequencies of all 2^4 grids in 3,000 samples against `log_p` in that order; 15 degrees of freedom, 99.9 % point 37.7."""
    layout = SequenceLayout([(2, 2)], [2])
    prior = build(layout)
    for parameter in prior.parameters():
        parameter.mul_(0.6)
    order, sizes = iter(halton_order(2, 2)), round_sizes(4, 3)
    assert sizes == [1, 1, 2]
    expected = 3_000 * log_p(prior, all_grids(layout), [[next(order) for _ in range(size)] for size in sizes]).exp()
    assert expected.min() > 5
    settings = MaskedSampling(order="halton", rounds=3)
    codes = prior.sample(torch.ones(3_000).long(), uniforms(0, torch.arange(3_000), prior.num_noise), settings)
    index = (layout.flat(codes) * torch.tensor([8, 4, 2, 1])).sum(1)
    statistic = ((torch.bincount(index, minlength=16) - expected).square() / expected).sum()
    assert statistic < 37.7


SETTINGS: dict[str, dict[str, Any]] = {
    "confidence": {"rounds": 3},
    "most probable first": {"rounds": 3, "choice_temperature": 0.0, "temperature": 0.7, "guidance": 2.0, "guidance_schedule": "linear"},
    "halton": {"rounds": 4, "order": "halton", "guidance": 1.5},
    "one by one": {"rounds": 100, "temperature": 0.0},
}
all_settings = pytest.mark.parametrize("settings", [MaskedSampling(**fields) for fields in SETTINGS.values()], ids=SETTINGS.keys())


@all_settings
@pytest.mark.parametrize("layout", [LAYOUTS["one row"], LAYOUTS["top and bottom"]], ids=["one row", "top and bottom"])
@torch.no_grad()
def test_samples_equal_an_image_at_a_time_written_out(layout: SequenceLayout, settings: MaskedSampling) -> None:
    """Drawn in a batch, with some codes kept; and each alone, position by position, with the finer levels masked."""
    prior, batch = build(layout), 5
    codes, labels, noise = random_codes(layout, batch), torch.arange(batch), uniforms(3, torch.arange(batch), prior.num_noise)
    masks = layout.grids_of(torch.arange(layout.length)[None] % 4 == 1)
    kept = layout.flat(masks)[0]
    drawn = layout.flat(prior.sample(labels, noise, settings, Keep(codes, masks)))
    assert torch.equal(drawn[:, kept], layout.flat(codes)[:, kept])
    sizes = [round_sizes(int((~level).sum()), settings.rounds) for level in kept.split(layout.lengths)]
    count = 2 * sum(len(level) * length for level, length in zip(sizes, layout.lengths, strict=True))
    for row in range(batch):
        numbers = iter(uniforms(0, (noise[row] * 2**53).long(), count)[0].tolist())
        scales = iter(guidance_scales(settings, sum(map(len, sizes))))
        sequence, known = layout.flat(codes)[row : row + 1].clone(), list[int]()
        for level, own in enumerate(torch.arange(layout.length).split(layout.lengths)):
            known += own[kept[own]].tolist()
            for number, size in enumerate(sizes[level], 1):
                scale, preferences, offers = next(scales), dict[int, float](), dict[int, int]()
                given, unlabelled = (log_probabilities(prior, sequence, known, label) for label in (row, None))
                to_codes, to_choices = ([next(numbers) for _ in own] for _ in range(2))
                for index, position in enumerate(own.tolist()):
                    logits = guided(given[position], unlabelled[position], scale).log_softmax(-1)
                    flat = (logits / max(settings.temperature, 1e-6)).softmax(-1)
                    offers[position] = int(draw(flat, torch.tensor([to_codes[index]], dtype=torch.float64)))
                    gumbel = settings.choice_temperature * (1 - number / len(sizes[level])) * -math.log(-math.log(to_choices[index]))
                    preferences[position] = float(logits[0, offers[position]]) + gumbel
                    if settings.order == "halton":
                        preferences[position] = -halton_order(*layout.grids[level]).index(index)
                for position in sorted(set(preferences) - set(known), key=preferences.__getitem__, reverse=True)[:size]:
                    sequence[0, position] = offers[position]
                    known.append(position)
        assert torch.equal(drawn[row : row + 1], sequence)


@torch.no_grad()
def test_a_completion_depends_on_kept_codes_behind_it_but_on_no_masked_one() -> None:
    layout = LAYOUTS["one level"]
    prior, codes = build(layout), random_codes(layout, 64)
    masks = layout.grids_of(torch.arange(layout.length)[None] >= 6)
    noise, settings = uniforms(0, torch.arange(64), 1), MaskedSampling(order="halton")
    behind, masked = layout.flat(codes), layout.flat(codes)
    behind[:, 6:], masked[:, :6] = behind[:, 6:].roll(1, 0), 0
    drawn, other_behind, other_masked = (
        layout.flat(prior.sample(None, noise, settings, Keep(layout.grids_of(kept), masks)))
        for kept in (layout.flat(codes), behind, masked)
    )
    assert not torch.equal(drawn[:, :6], other_behind[:, :6])
    assert torch.equal(drawn, other_masked)


def test_keeping_every_code_returns_the_codes() -> None:
    layout = LAYOUTS["top and bottom"]
    codes, masks = random_codes(layout, 3), tuple(torch.ones(grid, dtype=torch.bool) for grid in layout.grids)
    completed = build(layout).sample(None, uniforms(0, torch.arange(3), 1), MaskedSampling(), Keep(codes, masks))
    assert all(torch.equal(a, b) for a, b in zip(completed, codes, strict=True))


@torch.no_grad()
def test_non_finite_logits_are_refused() -> None:
    prior = build(LAYOUTS["one level"])
    prior.head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="finite"):
        prior.sample(None, uniforms(0, torch.arange(1), 1), MaskedSampling())


# --- commands

SMALL = ["--prior.kind", "masked", "--prior.layers", "2", "--prior.width", "16", "--prior.heads", "2"]


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a masked prior; each command writes folders of its own."""
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("masked") / "run"))
    train_prior(["--run", str(run), *SMALL])
    return run


def test_it_reports_a_bound_and_draws_completes_and_scores(
    run: Path, monkeypatch: pytest.MonkeyPatch, one_line_error: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("stage1_vqvae.features.classifier._MIN_STEPS", 1)
    here = ["--run", str(run)]
    likelihood = read_json(run / "priors/masked/likelihood.json")
    assert likelihood["exact"] is False
    assert likelihood["validation"] < likelihood["uniform"]
    assert "at most" in (run / "priors/masked/likelihood.md").read_text()
    drawn = []
    halton, limits = ["--order", "halton", "--rounds", "2"], ["--choice-temperature", "0", "--temperature", "0.5"]
    for number, options in enumerate([["--guidance", "1.5"], ["--guidance", "1.5", "--batch-size", "2"], halton, limits, ["--seed", "1"]]):
        sample([*here, "--n", "5", *options])
        drawn.append(load_file(run / f"samples/{number:03d}/codes.safetensors")["level0"])
    assert "at most" in capsys.readouterr().out
    assert torch.equal(drawn[0], drawn[1])
    assert not any(torch.equal(drawn[0], other) for other in drawn[2:])
    settings = read_json(run / "samples/002/samples.json")["sampling"]
    assert (settings["order"], settings["rounds"]) == ("halton", 2)
    complete([*here, "--n", "2", "--continuations", "2", "--keep-rows", "1"])
    reconstruct(here)
    evaluate([*here, "--features", "classifier", "--n", "8"])
    assert "at most" in (run / "evaluations/000/evaluation.md").read_text()
    report(here)
    assert "rounds 2" in (run / "report.html").read_text()
    for option, found in (("--rounds", "0"), ("--order", "random"), ("--choice-temperature", "-1"), ("--top-k", "3")):
        assert option.strip("-").replace("-", "_") in one_line_error(sample, *here, option, found)
    generator = Generator.from_pretrained(run, device="cpu")
    assert len(generator.sample(3, order="halton", rounds=1)) == 3
    with pytest.raises(UserError, match="order: expected confidence or halton, found raster"):
        generator.sample(1, order="raster")


@pytest.mark.parametrize(
    ("command", "main", "options"),
    [
        ("compress", compress, []),
        ("anomalies", anomalies, []),
        ("export", export_onnx, ["--output", "{run}/export"]),
        ("export", export_web, ["--output", "{run}/export"]),
        ("surprisals", lambda arguments: Generator.from_pretrained(arguments[1], device="cpu").log_prob([]), []),
    ],
)
def test_commands_that_need_codes_in_turn_refuse_it(
    command: str, main: Callable[[list[str]], None], options: list[str], run: Path, one_line_error: Callable[..., str]
) -> None:
    line = one_line_error(main, "--run", run, *(option.format(run=run) for option in options))
    assert f"{command}: expected a prior that draws codes in turn, found masked" in line
    assert not (run / "export").exists()


def test_it_is_no_prior_of_a_single_level(run: Path, one_line_error: Callable[..., str]) -> None:
    line = one_line_error(train_prior, "--run", run, "--level", "1", "--prior.kind", "masked")
    assert "prior.kind: expected one that draws codes in turn, for a prior per level, found masked" in line
