"""Likelihoods through the whole pipeline: the bound on bits per dimension, and lossless files."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from configs.recipe_file import load_recipe
from configs.run_dir import RunDir, read_json
from pipelines.codec import pixels as codec
from pipelines.codec.code_file import pack, unpack
from pipelines.codec.pixels import MARGIN, decode_pixels, encode_pixels
from pipelines.compress import main as compress_main
from pipelines.decompress import main as decompress_main
from pipelines.evaluate import main as evaluate_main
from pipelines.sample import main as sample_main
from pipelines.summary import main as summary_main
from stage1_vqvae.data.pixels import to_model
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import VALIDATION
from stage1_vqvae.model import VQVAE, load_tokenizer
from stage1_vqvae.train import main as train_tokenizer
from stage2_prior.codes.store import CodeStore
from stage2_prior.extract_codes import main as extract_codes
from stage2_prior.priors.prior_file import load_prior
from stage2_prior.train import main as train_prior
from training.weights_file import fingerprint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """A finished run whose objective is a mixture of logistics with pixels in context. Only numbered folders are added to it."""
    run = tmp_path_factory.mktemp("likelihood") / "run"
    objective = ["--tokenizer.objective.kind", "logistic", "--tokenizer.objective.context", "8"]
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(run), *objective])
    extract_codes(["--run", str(run)])
    train_prior(["--run", str(run)])
    return run


@pytest.fixture(scope="module", params=["pixels alone", "pixels in context"])
def exact(request: pytest.FixtureRequest, run: Path) -> VQVAE:
    tokenizer = load_tokenizer(RunDir(run)).double()
    if request.param == "pixels alone":
        tokenizer.likelihood().context = None
    return tokenizer


@pytest.fixture(scope="module")
def validation(run: Path) -> torch.Tensor:
    return load_images(load_recipe(run / "recipe.yaml").data).splits[VALIDATION].pixels


def independent_bits(run: Path, pixels: torch.Tensor, with_class: bool) -> dict[str, np.ndarray]:
    """Return -log2 p of each image per prior, computed in float64 from the run's files."""
    tokenizer = load_tokenizer(RunDir(run))
    codes = tokenizer.encode(to_model(pixels))
    tokenizer.double()
    output = tokenizer.decoder(tokenizer.quantizer.lookup(codes))
    values = pixels.long().movedim(-1, 1)
    pixel_bits = torch.zeros(len(pixels), dtype=torch.float64)
    for index, p in tokenizer.likelihood().sequential_probabilities(output, values):
        pixel_bits -= p.gather(-1, values[index][..., None]).log2().flatten(1).sum(1)
    store = CodeStore(run / "codes" / "train")
    counts = store.counts()[0] + 1.0
    prior, _ = load_prior(run / "priors/transformer/prior.safetensors", fingerprint(run / "tokenizer.safetensors"))
    labels = CodeStore(run / "codes" / VALIDATION).condition if with_class else None
    logits = prior.double().logits(codes, labels)[0]
    chosen = logits.log_softmax(-1).gather(-1, codes[0].flatten(1)[..., None])[..., 0]
    return {
        "uniform": (pixel_bits + 6 * 4).numpy(),
        "unigram": (pixel_bits - torch.from_numpy(np.log2(counts / counts.sum()))[codes[0]].flatten(1).sum(1)).numpy(),
        "learned": (pixel_bits - chosen.sum(1) / math.log(2)).detach().numpy(),
    }


def test_the_bound_is_the_sum_of_its_parts(
    run: Path, validation: torch.Tensor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage1_vqvae.features.classifier._MIN_STEPS", 1)  # the classifier need not be good here
    evaluate_main(["--run", str(run), "--features", "classifier", "--n", "8"])
    bound = read_json(run / "evaluations/000/evaluation.json")["bound"]
    assert (bound["n"], bound["dimensions"], bound["prior"]) == (len(validation), 8 * 12 * 3, "transformer")
    bits = bound["bits_per_dimension"]
    for with_class in (False, True):
        expected = independent_bits(run, validation, with_class)
        for name in ("uniform", "unigram"):
            assert bits[name]["mean"] == pytest.approx(expected[name].mean() / 288, rel=1e-9)
        learned = "learned, given the class" if with_class else "learned"
        assert bits[learned]["mean"] == pytest.approx(expected["learned"].mean() / 288, rel=1e-9)
    assert all(values["low"] <= values["mean"] <= values["high"] for values in bits.values())
    assert bits["uniform"]["mean"] - bits["pixels"]["mean"] == pytest.approx(6 * 4 / 288)
    printed = capsys.readouterr().out
    assert "Bound on bits per dimension of the validation images" in printed
    assert "| prior transformer, given the class |" in printed
    summary_main(["--run", str(run)])
    assert f"at most {bits['learned']['mean']:.4f}" in capsys.readouterr().out


def test_decoding_draws_pixels_or_returns_the_mean(exact: VQVAE, validation: torch.Tensor) -> None:
    codes = load_codes(exact, validation)
    mean = exact.decode(codes)
    uniform = torch.rand(*mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = exact.decode(codes, sample=True, uniform=uniform)
    assert torch.equal(drawn, exact.decode(codes, sample=True, uniform=uniform))
    assert not torch.equal(drawn, exact.decode(codes, sample=True))
    values = (drawn + 1) * 127.5
    assert torch.allclose(values, values.round(), atol=1e-6)
    assert 0 < float((drawn - mean).abs().mean()) < 0.5


def load_codes(tokenizer: VQVAE, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return tokenizer.encode(to_model(pixels).double())


def test_pixels_decode_at_any_batch_size_and_number_of_threads(
    exact: VQVAE, validation: torch.Tensor, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "_SHARING", 100)  # offsets that change within and between batches
    images = validation[:3]
    codes = load_codes(exact, images)
    coded, clearance = encode_pixels(exact, codes, images, batch=2)
    assert clearance >= MARGIN
    assert len(coded.offsets) == 6 + 3  # 576 values, and 288
    for at_once, others in ((None, 3 - threads), (1, 2)):
        torch.set_num_threads(others)
        assert torch.equal(decode_pixels(exact, codes, coded, at_once), images)


def test_different_arithmetic_decodes_within_the_clearance_and_is_detected_beyond(
    exact: VQVAE, validation: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = load_codes(exact, validation)
    coded, clearance = encode_pixels(exact, codes, validation, 64)
    likelihood = exact.likelihood()
    original = likelihood.channel_probabilities

    def disturbed(by: float) -> Callable[..., torch.Tensor]:
        generator = torch.Generator().manual_seed(0)

        def channel_probabilities(*arguments: Any) -> torch.Tensor:
            probabilities = original(*arguments)
            return probabilities + by * (2 * torch.rand(probabilities.shape, generator=generator, dtype=torch.float64) - 1)

        return channel_probabilities

    monkeypatch.setattr(likelihood, "channel_probabilities", disturbed(0.99 * clearance))
    assert torch.equal(decode_pixels(exact, codes, coded), validation)
    monkeypatch.setattr(likelihood, "channel_probabilities", disturbed(1e-4))
    with pytest.raises(UserError, match="arithmetic"):
        decode_pixels(exact, codes, coded)


def test_the_payload_has_the_length_of_the_likelihood(exact: VQVAE, validation: torch.Tensor) -> None:
    """Within one percent and the coder's final words, with an offset per stretch of values."""
    codes = load_codes(exact, validation)
    expected = float(exact.nats(codes, validation).sum()) / math.log(2) / 8
    coded, _ = encode_pixels(exact, codes, validation, 64)
    assert expected - 8 <= len(coded.payload) <= 1.01 * expected + 8
    assert len(coded.offsets) == codec.num_offsets(len(validation), 64, (8, 12, 3))


def test_probabilities_that_cannot_be_coded_are_refused(exact: VQVAE, validation: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = load_codes(exact, validation)
    monkeypatch.setattr(codec, "MARGIN", 1e-6)
    with pytest.raises(UserError, match="expected probabilities at least"):
        encode_pixels(exact, codes, validation, 64)
    monkeypatch.undo()
    monkeypatch.setattr(
        exact.likelihood(), "channel_probabilities", lambda output, values, channel: torch.full((12, 8, 12, 256), torch.nan)
    )
    with pytest.raises(UserError, match="found nan"):
        encode_pixels(exact, codes, validation, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """Two pictures of the run, noise, and one colour, which takes fewer bytes as PNG."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "in").mkdir()
    shutil.copy(pictures / "across" / "000.png", folder / "in" / "a.png")
    shutil.copy(pictures / "down" / "001.png", folder / "b.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(folder / "noise.png")
    Image.fromarray(np.full((8, 12, 3), (250, 3, 9), np.uint8)).save(folder / "plain.png")
    return folder


def pixels_in(folder: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in folder.rglob("*.png")}


def test_every_pixel_is_restored_and_no_image_takes_more_than_its_png(run: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "all.vqc"
    compress_main(["--run", str(run), "--images", str(folder), "--lossless", "--output", str(file)])
    decompress_main(["--run", str(run), "--file", str(file), "--output", str(tmp_path / "back")])
    expected, restored = pixels_in(folder), pixels_in(tmp_path / "back")
    assert restored.keys() == expected.keys()
    assert all(np.array_equal(restored[name], expected[name]) for name in expected)
    content = unpack(file.read_bytes(), "")
    assert content.lossless is not None
    plain = sorted(expected).index("plain.png")
    assert plain in content.lossless.stored
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content.lossless.stored[plain]))), expected["plain.png"])
    _, sizes = pack(content)
    pngs = 0
    for picture in expected.values():
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "png", optimize=True)
        pngs += len(buffer.getvalue())
    # Without the header; the coders end on words of 4 bytes, and offsets and counts are the header of the pixels.
    assert sizes.payload + sizes.pixels <= pngs + 2 * 8 + 24 + 2 * len(content.lossless.pixels.offsets)


def test_a_split_is_restored_from_its_file(run: Path, validation: torch.Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    compress_main(["--run", str(run), "--lossless", "--batch-size", "5"])
    assert "lossless" in capsys.readouterr().out
    file = max((run / "compressed").iterdir()) / "images.vqc"
    decompress_main(["--run", str(run), "--file", str(file)])
    assert "all pixels exact" in capsys.readouterr().out
    restored = pixels_in(max((run / "decompressed").iterdir()))
    assert np.array_equal(np.stack([restored[name] for name in sorted(restored)]), validation.numpy())


def test_all_images_may_be_png(run: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain.vqc"
    compress_main(["--run", str(run), "--images", str(folder / "plain.png"), "--lossless", "--output", str(file)])
    content = unpack(file.read_bytes(), "")
    assert (content.coded.images, content.images) == (0, 1)
    decompress_main(["--run", str(run), "--file", str(file), "--output", str(tmp_path / "back")])
    assert np.array_equal(pixels_in(tmp_path / "back")["plain.png"], pixels_in(folder)["plain.png"])


def test_images_that_cannot_be_restored_are_refused(run: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    rng = np.random.default_rng(0)
    for name, shape in (("large", (9, 12, 3)), ("clear", (8, 12, 4))):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / f"{name}.png")
        line = one_line_error(compress_main, "--run", run, "--lossless", "--images", tmp_path / f"{name}.png", "--output", tmp_path / "x")
        assert "expected images of 12 x 8" in line
        assert name in line
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_without_a_likelihood_is_refused(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    line = one_line_error(compress_main, "--run", run_copy, "--lossless")
    assert "expected one that is a likelihood" in line
    assert "found mse" in line
    assert not (run_copy / "compressed").exists()


def test_black_and_white_images_are_restored(tmp_path: Path, tiny_recipe: Path, one_line_error: Callable[..., str]) -> None:
    """By a Bernoulli tokenizer, which refuses other images before training and before compressing."""
    bits = tmp_path / "bits"
    bits.mkdir()
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 2, (2, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1) * 255
        Image.fromarray(pixels).convert("1").save(bits / f"{number:02d}.png")
    options = ["--config", str(tiny_recipe), "--tokenizer.objective.kind", "bernoulli", "--data.channels", "1"]
    assert "black and white" in one_line_error(train_tokenizer, *options, "--run", tmp_path / "grey")
    assert not (tmp_path / "grey").exists()
    run = tmp_path / "run"
    train_tokenizer([*options, "--run", str(run), "--data.path", str(bits), "--stage1.steps", "100"])
    extract_codes(["--run", str(run)])
    train_prior(["--run", str(run)])
    sample_main(["--run", str(run), "--n", "2"])
    compress_main(["--run", str(run), "--images", str(bits), "--lossless", "--output", str(tmp_path / "bits.vqc")])
    decompress_main(["--run", str(run), "--file", str(tmp_path / "bits.vqc"), "--output", str(tmp_path / "back")])
    for name, picture in pixels_in(bits).items():
        assert np.array_equal(pixels_in(tmp_path / "back")[name] > 127, picture)


@pytest.mark.parametrize("cut", ["payload", "stored"])
def test_contradictory_lossless_files_are_refused(run: Path, folder: Path, tmp_path: Path, cut: str) -> None:
    compress_main(["--run", str(run), "--images", str(folder), "--lossless", "--output", str(tmp_path / "all.vqc")])
    content = unpack((tmp_path / "all.vqc").read_bytes(), "")
    assert content.lossless is not None
    pixels, stored = content.lossless
    wrong = (
        content.lossless._replace(pixels=pixels._replace(payload=pixels.payload[:-3]))
        if cut == "payload"
        else content.lossless._replace(stored={number + 99: png for number, png in stored.items()})
    )
    data, _ = pack(content._replace(lossless=wrong))
    with pytest.raises(UserError, match="contradicts itself"):
        unpack(data, "file")
