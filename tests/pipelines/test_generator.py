"""`Generator`: the results of the command line, for images and labels of any type."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from configs.run_dir import REPOSITORY
from pipelines import Generator
from pipelines.complete import main as complete
from pipelines.decompress import main as decompress
from pipelines.sample import main as sample
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import VALIDATION


@pytest.fixture(scope="module")
def generator(finished_run: Path) -> Generator:
    return Generator.from_pretrained(finished_run, device="cpu")


@pytest.fixture(scope="module")
def real(generator: Generator) -> torch.Tensor:
    """Validation images, uint8 (12, 8, 12, 3)."""
    return load_images(generator.data).splits[VALIDATION].pixels[:]


def pictures_in(folder: Path) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(folder.glob("images/*.png"))])


def test_samples_equal_those_of_the_command_line(generator: Generator, run_copy: Path) -> None:
    settings = ["--temperature", "0.9", "--guidance", "2.0", "--seed", "3"]
    sample(["--run", str(run_copy), "--n", "6", *settings])
    pictures = generator.sample(6, seed=3, temperature=0.9, guidance=2.0)
    assert all(isinstance(picture, Image.Image) and picture.size == (12, 8) for picture in pictures)
    pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures])
    assert torch.equal(pixels, pictures_in(run_copy / "samples/000"))
    assert torch.equal(generator.sample(2, seed=3, output="tensor", temperature=0.9, guidance=2.0), pixels[:2])
    assert generator.sampling.temperature == 1.0  # settings of a call apply to that call only


def test_labels_are_names_or_numbers_for_all_or_for_each(generator: Generator) -> None:
    assert generator.label_names == ["across", "down"]
    assert generator.draw(3).condition.tolist() == [0, 1, 0]  # type: ignore[union-attr]
    by_name, by_number = (generator.sample(4, label=label, output="tensor") for label in ("down", 1))
    assert torch.equal(by_name, by_number)
    each = generator.sample(4, label=["across", 1, 1, "across"], output="tensor")
    assert torch.equal(generator.sample(4, label=torch.tensor([0, 1, 1, 0]), output="tensor"), each)  # type: ignore[call-overload]
    assert torch.equal(generator.sample(4, label=np.int64(1), output="tensor"), by_name)  # type: ignore[call-overload]
    assert torch.equal(each[1:3], by_name[1:3])
    assert torch.equal(each[[0, 3]], generator.sample(4, label=0, output="tensor")[[0, 3]])


def test_images_may_be_of_any_type(generator: Generator, real: torch.Tensor, tmp_path: Path) -> None:
    pictures = [Image.fromarray(image.numpy()) for image in real[:3]]
    pictures[0].save(tmp_path / "0.png")
    codes = generator.encode(real[:3])
    for other in (pictures, real[:3].numpy(), list(real[:3]), [tmp_path / "0.png", pictures[1], real[2].numpy()]):
        assert all(torch.equal(*levels) for levels in zip(generator.encode(other), codes, strict=True))
    one = generator.encode(str(tmp_path / "0.png"))
    assert torch.equal(one[0], codes[0][:1])
    # Other sizes and modes, as in files.
    large = Image.new("RGBA", (50, 70), (10, 200, 30, 120))
    large.save(tmp_path / "large.png")
    assert torch.equal(generator.pixels(large), generator.pixels(tmp_path / "large.png"))
    assert torch.equal(generator.pixels(np.array(large.convert("L"))), generator.pixels(large.convert("L")))
    assert torch.equal(generator.pixels(np.asarray(pictures[0])[:, ::-1]), real[:1].flip(2))


def test_decoding_equals_the_tokenizers(generator: Generator, real: torch.Tensor) -> None:
    codes = generator.encode(real)
    decoded = generator.decode(codes, output="tensor")
    expected = (generator.tokenizer.decode(codes).clamp(-1, 1).movedim(1, -1) + 1) * 127.5
    assert (decoded - expected).abs().max() <= 0.5 + 1e-3
    assert np.array_equal(np.array(generator.decode(codes)[5]), decoded[5].numpy())
    assert generator.decode(tuple(level[:0] for level in codes)) == []


def test_a_path_is_a_folder_and_a_bare_name_a_run(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_copy.parent)
    named = Path("runs") / run_copy.name
    monkeypatch.setattr("configs.run_dir.runs_folder", lambda: named.parent)
    assert Generator.from_pretrained(Path(run_copy.name), device="cpu").run.path == Path(run_copy.name)
    with pytest.raises(UserError, match="expected a run, found none"):
        Generator.from_pretrained(run_copy.name)


def test_the_origin_describes_the_loaded_prior(run_copy: Path, real: torch.Tensor) -> None:
    generator = Generator.from_pretrained(run_copy, device="cpu", precision="float32")
    before, path = generator.origin, run_copy / "priors/transformer/prior.safetensors"
    data = generator.compress(real)
    path.write_bytes(b"another")
    assert generator.origin == before
    assert torch.equal(generator.decompress(data, output="tensor"), generator.decode(generator.encode(real), output="tensor"))
    assert generator.log_prob(torch.zeros(1, 8, 12, 3, dtype=torch.uint8)).dtype == torch.float64
    assert generator.prior is not None
    assert next(generator.prior.parameters()).dtype == torch.float32


def test_completions_equal_those_of_the_command_line_and_keep_unmasked_codes(
    generator: Generator, real: torch.Tensor, run_copy: Path, tmp_path: Path
) -> None:
    keep = torch.zeros(8, 12, dtype=torch.bool)
    keep[:4] = True
    Image.fromarray(real[0].numpy()).save(tmp_path / "0.png")
    complete(["--run", str(run_copy), "--images", str(tmp_path / "0.png"), "--n", "1", "--continuations", "3", "--label", "down"])
    completions = generator.complete([real[0]] * 3, keep, "down", output="tensor")
    assert torch.equal(completions, pictures_in(run_copy / "completions/000"))
    white = Image.fromarray(keep.numpy().astype(np.uint8) * 255)
    assert torch.equal(generator.complete([real[0]] * 3, white, "down", output="tensor"), completions)
    all_kept = generator.complete(real[:2], torch.ones(8, 12, dtype=torch.bool), output="tensor")
    assert torch.equal(all_kept, generator.decode(generator.encode(real[:2]), output="tensor"))


def test_bits_equal_the_priors_and_the_compressed_size(generator: Generator, real: torch.Tensor, run_copy: Path, tmp_path: Path) -> None:
    codes, labels = generator.encode(real), ["down"] * len(real)
    bits = generator.surprisals(codes, "down")
    assert [tuple(level.shape) for level in bits] == [(12, 2, 3)]
    assert generator.prior is not None
    expected = -generator.prior.nats(codes, torch.ones(12, dtype=torch.int64))
    assert torch.allclose(bits[0].flatten(1) * -math.log(2), expected)
    assert torch.allclose(generator.log_prob(real, labels), expected.sum(1))
    data = generator.compress(real, "down")
    overhead = len(generator.compress(real[:1], "down")) - float(generator.surprisals(real[:1], "down")[0].sum()) / 8
    assert len(data) - float(bits[0].sum()) / 8 == pytest.approx(overhead, abs=8)
    assert torch.equal(generator.decompress(data, output="tensor"), generator.decode(codes, output="tensor"))
    (tmp_path / "images.vqc").write_bytes(data)
    decompress(["--run", str(run_copy), "--file", str(tmp_path / "images.vqc"), "--output", str(tmp_path / "back/images")])
    assert torch.equal(pictures_in(tmp_path / "back"), generator.decode(codes, output="tensor"))


def test_methods_print_nothing_by_default(generator: Generator, real: torch.Tensor, capfd: pytest.CaptureFixture[str]) -> None:
    """Nor do they show a progress bar, except by option."""
    codes = generator.encode(real)
    generator.decode(codes)
    generator.sample(2)
    generator.complete(real[:2], torch.arange(8)[:, None].expand(8, 12) < 4)
    generator.surprisals(codes)
    generator.decompress(generator.compress(real))
    assert capfd.readouterr() == ("", "")
    generator.draw(2, progress=True)
    assert "sample" in capfd.readouterr().err


def test_without_a_prior_codes_can_be_encoded_and_decoded(run_copy: Path, real: torch.Tensor) -> None:
    (run_copy / "priors/transformer/prior.safetensors").unlink()
    generator = Generator.from_pretrained(run_copy, device="cpu")
    assert generator.label_names == []
    assert len(generator.decode(generator.encode(real))) == 12
    for call in (generator.sample, lambda: generator.log_prob(real), lambda: generator.compress(real)):
        with pytest.raises(UserError, match="it has no finished prior"):
            call()
    uniform = Generator.from_pretrained(run_copy, prior="uniform", device="cpu")
    assert len(uniform.sample(3)) == 3
    with pytest.raises(UserError, match="surprisals: expected a prior that draws codes in turn, found uniform"):
        uniform.log_prob(real)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda generator, real: generator.sample(0), "n: expected at least 1 image, found 0"),
        (lambda generator, real: generator.sample(2, seed=1.5), "seed: expected a whole number, found 1.5"),  # type: ignore[arg-type]
        (lambda generator, real: generator.sample(2, label="left"), r"label: expected 0 to 1 or a name \(across, down\), found left"),
        (lambda generator, real: generator.sample(2, label=[0, 1, 1]), "label: expected one, or 2, found 3"),
        (lambda generator, real: generator.sample(2, temperature=-1), "temperature: expected at least 0, found -1"),
        (lambda generator, real: generator.sample(2, heat=1), "heat: expected one of batch_size, .*, found no such setting"),
        (lambda generator, real: generator.sample(2, guidance_schedule="square"), "guidance_schedule: expected one of constant, linear"),
        (
            lambda generator, real: generator.complete(real, np.ones((8, 12))),
            "mask: expected .*found torch.float64",
        ),
        (lambda generator, real: generator.complete(real, np.ones((8, 12), np.uint8)), "mask: expected .*, found torch.uint8 up to 1"),
        (lambda generator, real: generator.sample(2, output="jpeg"), "output: expected pil or tensor, found jpeg"),
        (lambda generator, real: generator.encode([]), "images: expected at least one, found none"),
        (lambda generator, real: generator.encode(real / 255), r"images: expected uint8 \(H, W, C\) .* found torch.float32"),
        (lambda generator, real: generator.encode("nowhere.png"), "nowhere.png: expected a readable image"),
        (
            lambda generator, real: generator.decode((torch.zeros(1, 3, 2).long(),)),
            r"codes: expected \(N, h, w\) .*, found \[\(1, 3, 2\)\]",
        ),
        (lambda generator, real: generator.decode((torch.full((1, 2, 3), 16),)), "codes: expected int64 from 0 to 15 at level 1"),
        (lambda generator, real: generator.complete(real, torch.ones(3, 4)), "mask: expected 12 x 8 pixels, found 4 x 3"),
        (lambda generator, real: generator.decompress(b"no file"), "data: expected a file that pipelines/compress.py wrote"),
        (lambda generator, real: generator.compress(real, lossless=True), "tokenizer.objective: expected one that is a likelihood"),
        (lambda generator, real: Generator.from_pretrained("no-such-run"), "no-such-run: expected a run, found none"),
        (lambda generator, real: Generator.from_pretrained(generator.run.path, prior="best"), "--prior best: expected one of transformer"),
    ],
)
def test_errors_name_the_expected_values(ask: Any, message: str, generator: Generator, real: torch.Tensor) -> None:
    with pytest.raises(UserError, match=message):
        ask(generator, real)


def test_importing_the_package_does_not_import_torch() -> None:
    program = "import pipelines, sys; print('torch' in sys.modules, hasattr(pipelines, 'Generator'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.split() == ["False", "True", "True"]
