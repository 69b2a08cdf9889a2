"""A transformer that draws whole levels: what each sees, its likelihood, its draws, and the commands with multiscale codes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from configs.parts import part_from
from configs.run_dir import RunDir, read_json
from pipelines import Generator
from pipelines.anomalies import main as anomalies
from pipelines.complete import main as complete
from pipelines.compress import main as compress
from pipelines.decompress import main as decompress
from pipelines.export_onnx import main as export_onnx
from pipelines.playground.edits import code_patches
from pipelines.sample import main as sample
from stage1_vqvae.data.pixels import to_model, to_uint8
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.train import main as train_tokenizer
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.codes.store import read_manifest
from stage2_prior.conditions.none import NoCondition
from stage2_prior.draw import StepwiseSampling, uniforms
from stage2_prior.extract_codes import main as extract_codes
from stage2_prior.priors.contract import Keep
from stage2_prior.priors.levelwise import build_level
from stage2_prior.priors.next_scale import NextScale
from stage2_prior.priors.stepwise import StepwisePrior
from stage2_prior.sampler import Sampler
from stage2_prior.train import main as train_prior
from tests.stage2_prior import test_sampler
from tests.stage2_prior.priors import test_priors as common
from tests.stage2_prior.priors.prior_kinds import LAYOUTS, build, classes, random_codes

KIND = "next_scale"
SEVERAL = {name: layout for name, layout in LAYOUTS.items() if len(layout.grids) > 1}
SEVERAL["scales"] = SequenceLayout([(1, 1), (2, 2), (2, 3)], [4, 5, 6])
layouts = pytest.mark.parametrize("layout", SEVERAL.values(), ids=SEVERAL)


def same(codes: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(*levels) for levels in zip(codes, others, strict=True))


@layouts
def test_each_position_depends_on_exactly_the_codes_of_coarser_levels(layout: SequenceLayout) -> None:
    prior = build(KIND, layout).double()
    codes, labels = random_codes(layout, 1), torch.tensor([2])
    base = common.position_logits(prior, codes, labels)
    for changed in range(layout.length):
        sequences, level = layout.flat(codes).clone(), layout.level_of(changed)
        sequences[0, changed] = (sequences[0, changed] + 1) % layout.num_codes[level]
        logits = common.position_logits(prior, layout.grids_of(sequences), labels)
        moved = [not torch.equal(*pair) for pair in zip(base, logits, strict=True)]
        assert moved == [layout.level_of(position) > level for position in range(layout.length)]


@pytest.mark.parametrize("grids", [[(1, 1), (1, 3)], [(1, 2), (1, 2)], [(1, 1), (1, 1), (2, 1)]])
def test_probabilities_sum_to_one_over_all_codes(grids: list[tuple[int, int]]) -> None:
    layout = SequenceLayout(grids, [3, 2, 4][: len(grids)])
    prior = build(KIND, layout).double()
    all_grids = layout.grids_of(torch.cartesian_prod(*(torch.arange(size) for size in layout.sizes)))
    nats = prior.nats(all_grids, torch.full((len(all_grids[0]),), 1))
    assert (-nats).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-10)


def test_inputs_are_the_start_and_then_the_interpolated_sum_of_coarser_levels() -> None:
    """By hand, and through one block, level after level: what the last of them sees needs no mask."""
    layout = SEVERAL["scales"]
    prior = build(KIND, layout, layers=1).double()
    assert isinstance(prior, NextScale)
    codes, labels = random_codes(layout, 2), torch.tensor([0, 3])
    inputs = []
    for level, (height, width) in enumerate(layout.grids):
        x = torch.zeros(2, len(prior.start), height, width, dtype=torch.float64) + (prior.start[:, None, None] if level == 0 else 0)
        for token, grid in zip(prior.tokens, codes[:level], strict=False):
            x = x + F.interpolate(token.weight[grid].movedim(-1, 1), (height, width), mode="bilinear", align_corners=False)
        first = layout.first_position(level)
        places = prior.coordinates[first : first + height * width]
        embedded = prior.level.weight[places[:, 0]] + prior.row.weight[places[:, 1]] + prior.column.weight[places[:, 2]]
        inputs.append(x.flatten(2).mT + embedded + prior.label.weight[labels][:, None])  # type: ignore[union-attr]
    (block,), found = prior.blocks, prior.logits(codes, labels)
    for level in range(3):
        stop = layout.first_position(level) + layout.lengths[level]
        features = block(torch.cat(inputs, 1)[:, :stop], prior.rotary.table[:stop], causal=False)[:, stop - layout.lengths[level] :]
        assert torch.allclose(found[level], prior.head_logits(features, level), atol=1e-12)


@layouts
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_pass_per_level_draws_the_codes_of_steps_through_all_positions(guidance: float, layout: SequenceLayout) -> None:
    """Also with kept codes, and by the sampler, in place of graphs of one position."""
    prior = build(KIND, layout).double()
    labels, noise = torch.arange(5), uniforms(3, torch.arange(5), layout.length)
    settings = StepwiseSampling(guidance=guidance, guidance_schedule="linear", temperature=0.9, top_p=0.95)
    masks = layout.grids_of(torch.arange(layout.length)[None] % 3 == 1)
    for keep in (None, Keep(random_codes(layout, 5), masks)):
        expected = StepwisePrior.sample(prior, labels, noise, settings, keep)
        assert same(prior.sample(labels, noise, settings, keep), expected)
        assert same(Sampler(prior, graphs=True)(labels, noise, settings, keep), expected)


def test_large_batches_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = SEVERAL["scales"]
    prior, labels, noise = build(KIND, layout).double(), torch.arange(5), uniforms(0, torch.arange(5), layout.length)
    expected = prior.sample(labels, noise, StepwiseSampling(guidance=2.0))
    monkeypatch.setattr("stage2_prior.priors.next_scale.LOGITS_PER_DRAW", 40)
    monkeypatch.setattr("stage2_prior.priors.next_scale.PREFILL_POSITIONS", 8)
    assert same(prior.sample(labels, noise, StepwiseSampling(guidance=2.0)), expected)


def test_an_image_takes_a_pass_per_level_and_none_after_the_last_drawn_code(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = SEVERAL["scales"]
    prior, noise, passes = build(KIND, layout), uniforms(0, torch.arange(2), layout.length), []
    assert isinstance(prior, NextScale)
    counted = prior._pass_level
    monkeypatch.setattr(prior, "_pass_level", lambda level, *rest: passes.append(level) or counted(level, *rest))
    prior.sample(None, noise, StepwiseSampling())
    assert passes == [0, 1, 2]
    codes = random_codes(layout, 2)
    prior.sample(None, noise, StepwiseSampling(), Keep(codes, layout.grids_of(torch.arange(layout.length)[None] > 2)))
    assert passes[3:] == [0, 1]


@layouts
def test_properties_of_every_prior(layout: SequenceLayout) -> None:
    common.test_cached_steps_give_the_logits_of_the_full_pass(KIND, layout, True)
    common.test_gradient_checkpointing_changes_no_gradient(KIND, layout)
    common.test_a_sample_is_the_same_whatever_it_is_batched_with(KIND, layout, 2.0)
    common.test_kept_codes_stay_and_the_others_follow_from_them(KIND, layout)
    common.test_all_options_together_equal_full_passes(KIND, layout)
    test_sampler.test_bfloat16_is_the_prior_in_fewer_bits(KIND, layout)
    common.test_variants_change_the_logits_and_variant_0_is_the_default(KIND, layout)
    prior = build(KIND, layout, head_gain=True, corruption=1.0).train()
    prior(random_codes(layout, 6), torch.arange(6), None, torch.rand(6, prior.num_draws), torch.tensor(0.1)).backward()
    assert not [name for name, parameter in prior.named_parameters() if parameter.grad is None]


def test_samples_follow_the_priors_own_probabilities() -> None:
    common.test_samples_follow_the_priors_own_probabilities(KIND)


def test_corruption_replaces_codes_that_are_looked_back_at_but_no_target() -> None:
    layout = SEVERAL["scales"]
    prior, codes = build(KIND, layout, corruption=1.0), random_codes(layout, 3)
    draws, progress = torch.rand(3, prior.num_draws), torch.tensor(0.0)
    draws[:, 0] = 1
    context = prior.corrupted(codes, draws, progress)
    assert not same(context, codes)
    pairs = zip(prior.logits(context, None), codes, strict=True)
    nats = [F.cross_entropy(logits.mT, level.flatten(1), reduction="none") for logits, level in pairs]
    torch.testing.assert_close(prior(codes, None, None, draws, progress), torch.cat(nats, 1).mean())


def test_codes_of_near_vectors_begin_with_near_rows() -> None:
    torch.manual_seed(0)
    layout = SEVERAL["scales"]
    prior = part_from("prior", {"kind": KIND, "layers": 1, "width": 256, "heads": 2}).build(layout, NoCondition())
    vectors = [torch.randn(k, 3) for k in layout.num_codes]
    for level in vectors:
        level[1] = level[0]
    prior.initialise_from(vectors)
    rows = [*(token.weight.detach() for token in prior.tokens), *prior.head.weight.detach().split(layout.num_codes)]
    assert all(float(F.cosine_similarity(weight[0], weight[1], dim=0)) > 0.5 for weight in rows)
    assert all(weight.std().item() == pytest.approx(0.02, rel=0.2) for weight in rows)


def test_a_single_level_is_refused() -> None:
    config, layout = part_from("prior", {"kind": KIND}), SEVERAL["scales"]
    with pytest.raises(ValueError, match=r"prior\.kind: expected .*several.*multiscale.*hierarchical\), found next_scale"):
        config.build(LAYOUTS["one level"], NoCondition())
    with pytest.raises(ValueError, match="given the levels above, found next_scale"):
        build_level(config, layout, 1, classes(2))


# --- commands

SMALL = ["--prior.kind", KIND, "--prior.layers", "2", "--prior.width", "16", "--prior.heads", "2"]
TOKENIZER = ["--tokenizer.quantizer", "multiscale", "--tokenizer.quantizer.quantizer", "{kind: ema, num_codes: 16}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """A run with multiscale codes of 1 x 1, 2 x 2 and 2 x 3, and this prior of them. Commands only add to it."""
    run = tmp_path_factory.mktemp("scales") / "run"
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(run), *TOKENIZER, "--stage1.steps", "20"])
    extract_codes(["--run", str(run)])
    train_prior(["--run", str(run), *SMALL, "--prior.corruption", "1", "--prior.head_gain", "true"])
    return run


def test_codes_and_bits_have_a_level_per_scale(run: Path) -> None:
    manifest = read_manifest(run / "codes" / "validation")
    assert (manifest.grids, manifest.num_codes) == ([(1, 1), (2, 2), (2, 3)], [16] * 3)
    likelihood = read_json(run / "priors" / KIND / "likelihood.json")
    assert len(likelihood["levels"]) == 3
    assert 0 < likelihood["validation"] < 8
    generator = Generator.from_pretrained(run, device="cpu")
    assert [tuple(code_patches(generator, level, [1, 2]).shape[1:3]) for level in range(3)] == [(8, 12), (4, 6), (4, 4)]


def test_training_resumes_bit_for_bit(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    folder = copy / "priors" / KIND
    expected = (folder / "prior.safetensors").read_bytes()
    (folder / "prior.safetensors").unlink()
    max((folder / "checkpoints").iterdir()).unlink()
    train_prior(["--run", str(copy), "--prior.kind", KIND, "--resume"])
    assert (folder / "prior.safetensors").read_bytes() == expected


def test_samples_are_drawn_and_images_restored_and_completed(run: Path, pictures: Path, tmp_path: Path) -> None:
    samples = []
    for batch_size in ("4", "1"):
        sample(["--run", str(run), "--n", "4", "--guidance", "2", "--batch-size", batch_size])
        samples.append((max((run / "samples").iterdir()) / "codes.safetensors").read_bytes())
    assert samples[0] == samples[1]
    compress(["--run", str(run), "--images", str(pictures), "--output", str(tmp_path / "images.vqc")])
    decompress(["--run", str(run), "--file", str(tmp_path / "images.vqc"), "--output", str(tmp_path / "back")])
    paths, tokenizer = sorted(pictures.rglob("*.png")), load_tokenizer(RunDir(run))
    pixels, back = (
        torch.from_numpy(np.stack([np.asarray(Image.open(root / path.relative_to(pictures))) for path in paths]))
        for root in (pictures, tmp_path / "back")
    )
    reconstructed = to_uint8(tokenizer.decode(tokenizer.encode(to_model(pixels))))
    assert int((back.int() - reconstructed.int()).abs().max()) <= 1
    complete(["--run", str(run), "--n", "2", "--continuations", "2", "--prefix-rows", "1"])
    assert read_json(max((run / "completions").iterdir()) / "completions.json")["rows"] == 2
    anomalies(["--run", str(run)])


def test_what_it_cannot_do_is_refused(run: Path, finished_run: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    assert "found next_scale, which draws many at once" in one_line_error(export_onnx, "--run", run, "--output", tmp_path / "onnx")
    single = Path(shutil.copytree(finished_run, tmp_path / "single"))
    assert "tokenizer.quantizer multiscale" in one_line_error(train_prior, "--run", single, "--name", "other", *SMALL)
    assert "given the levels above" in one_line_error(train_prior, "--run", run, "--name", "other", "--level", "2", *SMALL)
