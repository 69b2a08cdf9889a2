"""Priors that draw codes digit by digit: likelihoods, steps, draws, memory, and the commands from training to files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.run_dir import read_json
from pipelines.codec.coder import code_batch_size, decode, encode
from pipelines.compress import main as compress
from pipelines.export_onnx import main as export_onnx
from pipelines.generator import Generator
from pipelines.playground.edits import Place, candidates, most_likely_codes
from pipelines.sample import main as sample
from stage1_vqvae.train import main as train_tokenizer
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.codes.store import MANIFEST
from stage2_prior.conditions.none import NoCondition
from stage2_prior.draw import StepwiseSampling, draw, guidance_scales, guided, uniforms, warp
from stage2_prior.extract_codes import main as extract_codes
from stage2_prior.priors.contract import Keep
from stage2_prior.priors.digit_transformer import DigitTransformer
from stage2_prior.priors.stepwise import FixedBatch, StepwisePrior
from stage2_prior.priors.transformer import TransformerPart
from stage2_prior.sampler import Sampler
from stage2_prior.train import main as train_prior
from tests.stage2_prior.priors import test_priors as common
from tests.stage2_prior.priors.prior_kinds import build, random_codes
from tests.stage2_prior.simulated_graphs import SimulatedCuda, simulated_cuda

__all__ = ["simulated_cuda"]

# Drawn as digits of 4 and 3 values; and a level of codes drawn at once above one of three digits.
LAYOUTS = {
    "one level": SequenceLayout([(2, 3)], [12], [(2, 2, 3)]),
    "top and bottom": SequenceLayout([(1, 2), (2, 4)], [4, 18], [(2, 2), (3, 2, 3)]),
    "residual": SequenceLayout([(2, 2)] * 2, [6, 6], [(3, 2)] * 2),
}
CASES = [("digits", layout) for layout in LAYOUTS.values()] + [("levelwise of digits", LAYOUTS["residual"])]
cases = pytest.mark.parametrize(("kind", "layout"), CASES, ids=[*LAYOUTS, "levelwise"])


def draw_logits(prior: StepwisePrior, codes: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> list[torch.Tensor]:
    """Return the logits (B, size) of each draw, in order, from one pass over known codes."""
    logits, ordered = iter(prior.logits(codes, labels)), []
    for sizes in prior.draw_layout.draw_sizes:
        digits = [next(logits) for _ in sizes]
        ordered += [digit[:, index] for index in range(digits[0].shape[1]) for digit in digits]
    return ordered


@cases
def test_sequences_of_digits_are_those_of_the_codes(kind: str, layout: SequenceLayout) -> None:
    draws = build(kind, layout).draw_layout
    codes = random_codes(layout, 5)
    sequences = draws.flat(codes)
    assert sequences.shape == (5, draws.length)
    assert all(torch.equal(*levels) for levels in zip(draws.grids_of(sequences), codes, strict=True))
    assert (sequences < torch.tensor(draws.sizes)).all()
    masks = tuple(torch.rand(grid) < 0.5 for grid in layout.grids)
    changed = draws.flat(tuple(torch.where(mask, grid, k - 1 - grid) for mask, grid, k in zip(masks, codes, layout.num_codes, strict=True)))
    assert torch.equal(changed[:, draws.flat_mask(masks)], sequences[:, draws.flat_mask(masks)])
    assert int(draws.flat_mask(masks).sum()) == sum(int(m.sum()) * len(d) for m, d in zip(masks, draws.draw_sizes, strict=True))


def test_neighbouring_digits_are_joined_up_to_a_size() -> None:
    for digits, most, expected in (
        ((2,) * 18, 64, (64, 64, 64)),
        ((8, 8, 8), 64, (64, 8)),
        ((8, 5, 5, 5), 40, (40, 25)),
        ((9, 2), 4, (9, 2)),
    ):
        layout = SequenceLayout([(1, 1)], [torch.tensor(digits).prod().item()], [digits])
        assert layout.grouped(most).digits == [expected]


@pytest.mark.parametrize("kind", ["digits", "levelwise of digits"])
def test_likelihoods_are_of_one_distribution(kind: str) -> None:
    """Over all grids of two positions exp(-nats) sums to 1; nats are those of the logits over whole codes; the loss is their mean."""
    layout = SequenceLayout([(1, 1)] * 2, [12, 6], [(2, 2, 3), (3, 2)])
    prior = build(kind, layout).double()
    grids = layout.grids_of(torch.cartesian_prod(torch.arange(12), torch.arange(6)))
    labels = torch.full((72,), 1)
    nats = prior.nats(grids, labels)
    assert nats.shape == (72, 2)
    assert (-nats).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert prior(grids, labels).item() == pytest.approx(nats.mean().item(), abs=1e-12)
    for level, (grid, k) in enumerate(zip(grids, layout.num_codes, strict=True)):
        logits = prior.code_logits(grids, labels, level, 0)
        assert logits.shape == (72, k)
        assert torch.allclose(logits.log_softmax(-1).gather(1, grid[:, 0])[:, 0], -nats[:, level], atol=1e-12)


@cases
def test_steps_give_the_logits_of_the_full_pass(kind: str, layout: SequenceLayout) -> None:
    """Eager steps, steps after a prefill up to each code, and steps of static shapes whose rows share their codes."""
    prior = build(kind, layout).double()
    draws, codes, labels = prior.draw_layout, random_codes(layout, 3), torch.tensor([0, 4, 2, 5, 5, 5])
    twice, sequences = tuple(level.repeat(2, 1, 1) for level in codes), draws.flat(codes)
    full, cache = draw_logits(prior, twice, labels), prior.new_cache(6)
    batch = FixedBatch(sequences, labels, torch.zeros(1, dtype=torch.int64))
    steps = prior.fixed_steps(batch)
    assert steps is not None
    with torch.no_grad():
        for position, expected in enumerate(full):
            before = sequences[:, position - 1].repeat(2) if position else None
            assert torch.allclose(prior.step(before, labels, cache), expected, atol=1e-11)
            steps.prepare(position)
            assert torch.allclose(steps.logits(steps.phase(position)), expected, atol=1e-11)
            batch.position.add_(1)
        first_of_code = layout.grids_of(torch.arange(layout.length)[None])
        starts = [int((draws.flat_mask(tuple(grid[0] < code for grid in first_of_code))).sum()) for code in range(1, layout.length)]
        for start, stop in ((0, stop) for stop in starts):
            cache = prior.new_cache(6)
            prior.prefill(sequences.repeat(2, 1), start, stop, labels, cache)
            assert torch.allclose(prior.step(sequences[:, stop - 1].repeat(2), labels, cache), full[stop], atol=1e-11)


@cases
def test_all_options_together_equal_full_passes(kind: str, layout: SequenceLayout, simulated_cuda: SimulatedCuda) -> None:
    """Guidance on a schedule, temperature, top-k, top-p, min-p and kept codes, digit by digit without a cache; also by CUDA graphs."""
    prior = build(kind, layout).double()
    settings: dict[str, Any] = {"guidance": 2.5, "guidance_schedule": "cosine", "temperature": 0.8, "top_k": 3, "top_p": 0.9, "min_p": 0.05}
    config, codes, labels, none = StepwiseSampling(**settings), random_codes(layout, 4), torch.tensor([0, 1, 2, 4]), torch.full((4,), 5)
    positions, draws = torch.arange(layout.length)[None], prior.draw_layout
    masks = layout.grids_of((positions < 2) | (positions % 4 == 3))
    uniform, sequences = uniforms(3, torch.arange(4), prior.num_noise), draws.flat(codes)
    completed = prior.sample(labels, uniform, config, Keep(codes, masks))
    for position, scale in enumerate(guidance_scales(config, draws.length)):
        if not draws.flat_mask(masks)[position]:
            grids = draws.grids_of(sequences)
            logits = guided(draw_logits(prior, grids, labels)[position], draw_logits(prior, grids, none)[position], scale)
            sequences[:, position] = draw(warp(logits, config), uniform[:, position])
    assert torch.equal(draws.flat(completed), sequences)
    sampler = Sampler(prior, graphs=True)
    for _ in range(3):
        drawn = sampler(labels, uniform, config, Keep(codes, masks))
        assert all(torch.equal(*levels) for levels in zip(drawn, completed, strict=True))
    assert simulated_cuda.graphs


def test_samples_follow_the_priors_own_probabilities() -> None:
    """Frequencies of all 6^2 grids in 8,000 samples against exp(-nats); 35 degrees of freedom, 99.9 % point 66.6."""
    layout = SequenceLayout([(1, 2)], [6], [(3, 2)])
    prior = build("digits", layout, num_classes=0)
    for parameter in prior.parameters():
        parameter.data *= 0.5
    (codes,) = prior.sample(None, uniforms(0, torch.arange(8_000), prior.num_noise), StepwiseSampling())
    all_grids = torch.cartesian_prod(torch.arange(6), torch.arange(6))[:, None]
    expected = 8_000 * (-prior.nats((all_grids,), None)).sum(1).exp()
    assert expected.min() > 5
    counts = torch.bincount(codes[:, 0, 0] * 6 + codes[:, 0, 1], minlength=36)
    assert ((counts - expected).square() / expected).sum() < 66.6


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_sample_is_the_same_whatever_it_is_batched_with(guidance: float) -> None:
    prior = build("digits", LAYOUTS["top and bottom"]).double()
    uniform, labels = uniforms(0, torch.arange(5), prior.num_noise), torch.arange(5)
    together = prior.sample(labels, uniform, StepwiseSampling(guidance=guidance))
    for row in range(5):
        alone = prior.sample(labels[row : row + 1], uniform[row : row + 1], StepwiseSampling(guidance=guidance))
        assert all(torch.equal(level[row : row + 1], expected) for level, expected in zip(together, alone, strict=True))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    common.test_gradient_checkpointing_changes_no_gradient("digits", LAYOUTS["top and bottom"])


@cases
def test_every_parameter_gets_a_gradient(kind: str, layout: SequenceLayout) -> None:
    prior = build(kind, layout).train()
    prior(random_codes(layout, 6), torch.arange(6)).backward()
    assert not [name for name, parameter in prior.named_parameters() if parameter.grad is None]


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_memory_does_not_grow_with_the_number_of_codes() -> None:
    """The largest tensor of a training step and of a batch of samples is the same for 2^12 and 2^18 codes."""
    largest, parameters = [], []
    for bits in (12, 18):
        layout = SequenceLayout([(4, 4)], [2**bits], [(2,) * bits])
        prior = build("digits", layout, digit_classes=64).train()
        with LargestTensor() as training:
            prior(random_codes(layout, 16), torch.arange(16) % 5).backward()
        with LargestTensor() as sampling:
            prior.eval().sample(torch.arange(4), uniforms(0, torch.arange(4), prior.num_noise), StepwiseSampling())
        largest.append((training.elements, sampling.elements))
        parameters.append(sum(parameter.numel() for parameter in prior.parameters()))
    assert largest[0] == largest[1]
    assert parameters[1] < 1.3 * parameters[0] < 2**18


def test_codes_with_near_vectors_begin_with_near_embeddings() -> None:
    """Vectors that are sums over digits: the embeddings of the codes have their distances, and so have a digit's rows of the head."""
    layout = SequenceLayout([(1, 2), (2, 4)], [40, 60], [(8, 5), (6, 10)])
    part = TransformerPart(layers=1, width=64, heads=1, head="digits", digit_classes=16)
    prior, plain = part.build(layout, NoCondition()), part.build(layout, NoCondition())
    assert isinstance(prior, DigitTransformer)
    assert isinstance(plain, DigitTransformer)
    digit_vectors = [[torch.randn(size, 8) * scale for size in sizes] for sizes, scale in zip(layout.digits, (0.01, 100), strict=True)]
    vectors = [(last[:, None] + first).flatten(0, 1) for first, last in digit_vectors]
    prior.initialise_from(vectors)
    assert prior.token.weight.std().item() == pytest.approx(plain.token.weight.std().item(), rel=0.1)
    for level, offset in enumerate(layout.offsets):
        tokens = torch.arange(offset, offset + layout.num_codes[level])
        rows = [head.head.weight.split(head.sizes)[1] for head in (prior.digits[level], plain.digits[level])]
        for pairs in ((vectors[level], prior.token(tokens), plain.token(tokens)), (digit_vectors[level][1], *rows)):
            distances = torch.stack([torch.pdist(points) for points in pairs])
            _, with_vectors, without = torch.corrcoef(distances)[0].tolist()
            assert with_vectors > 0.6
            assert abs(without) < 0.4


def test_codes_of_2_to_the_18_are_coded_exactly() -> None:
    """In batches of images where a table's logits would allow none: 256 positions of 2^18 logits are 64 times the limit."""
    layout = SequenceLayout([(2, 2)], [2**18], [(2,) * 18])
    prior = build("digits", layout, digit_classes=64).double().requires_grad_(False)
    codes, labels = random_codes(layout, 5), torch.arange(5)
    encoding = encode(prior, codes, labels, code_batch_size(prior.draw_layout, 4))
    assert encoding.coded.batch == 4
    assert torch.equal(decode(prior, encoding.coded, labels, at_once=1)[0], codes[0])
    assert encoding.bits == pytest.approx(prior.nats(codes, labels).sum().item() / torch.tensor(2.0).log().item(), rel=1e-5)


@pytest.fixture(
    scope="module", params=[("fsq", ["--tokenizer.quantizer.levels", "[3,2,4]"]), ("lfq", ["--tokenizer.quantizer.num_codes", "32"])]
)
def digits_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """A run whose prior draws digits of at most 6 (FSQ) or 4 (LFQ) values."""
    kind, options = request.param
    run = tmp_path_factory.mktemp("runs") / kind
    chosen = ["--tokenizer.quantizer", kind, *options, "--stage1.steps", "4", "--stage1.batch_size", "8"]
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(run), *chosen])
    extract_codes(["--run", str(run)])
    train_prior(["--run", str(run), "--prior.head", "digits", "--prior.digit_classes", "6"])
    return run


def test_the_commands_draw_and_code_digits(digits_run: Path, pictures: Path, tmp_path: Path) -> None:
    """Sampling, a compressed file that decodes, and the app's likeliest codes."""
    generator = Generator.from_pretrained(digits_run)
    prior = generator.stepwise_prior("this test")
    manifest = read_json(digits_run / "codes/train" / MANIFEST)
    expected = {"fsq": ([[3, 2, 4]], [(6, 4)]), "lfq": ([[2] * 5], [(4, 4, 2)])}
    assert (manifest["digits"], prior.draw_layout.draw_sizes) == expected[digits_run.name]
    sample(["--run", str(digits_run), "--n", "4", "--top-k", "3", "--guidance", "2", "--temperature", "0.9"])
    assert read_json(digits_run / "samples/000/samples.json")
    compress(["--run", str(digits_run), "--images", str(pictures / "down"), "--output", str(tmp_path / "images.vqc")])
    assert (tmp_path / "images.vqc").stat().st_size > 0
    codes = generator.draw(1).codes
    place, count = Place(0, 1, 2), manifest["num_codes"][0]
    ranked = most_likely_codes(generator, codes, None, place, count)
    assert sorted(ranked) == list(range(count))
    bits = [candidate.bits for candidate in candidates(generator, codes, None, place, ranked)]
    assert bits == sorted(bits)


def test_what_digits_do_not_fit_is_refused_in_one_line(digits_run: Path, one_line_error: Callable[..., str], tmp_path: Path) -> None:
    """Codes of one digit; too few values at once; an export."""
    options = ("--name", "other", "--prior.head", "digits")
    assert "prior.head: expected table" in one_line_error(train_prior, "--run", digits_run, *options)
    assert "at least 2" in one_line_error(train_prior, "--run", digits_run, *options, "--prior.digit_classes", "1")
    assert "prior.head table" in one_line_error(export_onnx, "--run", digits_run, "--output", tmp_path / "exported")
