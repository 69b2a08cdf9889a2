"""The command `sample.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from configs.errors import run_entry
from configs.run_dir import RunDir
from pipelines import Generator
from pipelines.sample import main
from stage1_vqvae.data.pixels import to_uint8
from stage1_vqvae.model import load_tokenizer
from stage2_prior.priors.prior_file import load_finished
from stage2_prior.priors.transformer import Transformer
from stage2_prior.train import main as train_prior
from tests.stage2_prior.test_train import change_bytes


def sampled(run: Path, *arguments: object) -> Path:
    before = set((run / "samples").glob("*")) if (run / "samples").exists() else set()
    main(["--run", str(run), *map(str, arguments)])
    (new,) = set((run / "samples").glob("*")) - before
    return new


def test_sampling_writes_the_documented_files(run_copy: Path) -> None:
    folder = sampled(run_copy, "--n", 10, "--npz")
    assert {path.name for path in folder.iterdir()} == {"grid.png", "images", "codes.safetensors", "samples.json", "samples.npz"}
    pictures = np.load(folder / "samples.npz")["arr_0"]
    assert pictures.shape == (10, 8, 12, 3)
    assert pictures.dtype == np.uint8
    for number in range(10):
        with Image.open(folder / "images" / f"{number:05d}.png") as image:
            assert np.array_equal(np.asarray(image), pictures[number])
    codes = load_file(folder / "codes.safetensors")
    tokenizer = load_tokenizer(RunDir(run_copy))
    assert np.array_equal(to_uint8(tokenizer.decode((codes["level0"],))).numpy(), pictures)
    details = json.loads((folder / "samples.json").read_text())
    assert details["labels"] == codes["condition"].tolist() == [0, 1] * 5
    assert details["prior"] == "transformer"


def test_a_second_call_writes_into_a_new_folder(run_copy: Path) -> None:
    first = sampled(run_copy, "--n", 2)
    content = (first / "grid.png").read_bytes()
    second = sampled(run_copy, "--n", 2, "--seed", 1)
    assert (first.name, second.name) == ("000", "001")
    assert (first / "grid.png").read_bytes() == content


_DELAYED = ["--guidance", "9", "--guidance-schedule", "power_cosine", "--guidance-power", "2", "--guidance-interval", "[0.3,1]"]


@pytest.mark.parametrize("arguments", [[], ["--guidance", "2.5", "--top-p", "0.9"], _DELAYED, ["--prior", "uniform"]])
def test_codes_are_equal_at_any_batch_size(run_copy: Path, arguments: list[str]) -> None:
    folders = [sampled(run_copy, "--n", 64, "--npz", "--batch-size", size, *arguments) for size in (64, 1, 7)]
    codes = [load_file(folder / "codes.safetensors")["level0"] for folder in folders]
    pictures = [np.load(folder / "samples.npz")["arr_0"].astype(int) for folder in folders]
    for other in (1, 2):
        assert torch.equal(codes[0], codes[other])
        assert np.abs(pictures[0] - pictures[other]).max() <= 1


@pytest.mark.parametrize(("precision", "dtype"), [("float64", torch.float64), ("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_prior_draws_in_the_chosen_precision(
    run_copy: Path, precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float64 makes a sample independent of its batch: rounding changes logits by 1e-14 instead of 1e-6."""
    dtypes: list[torch.dtype] = []
    step = Transformer.step

    def recorded(self: Transformer, *arguments: object) -> torch.Tensor:
        logits = step(self, *arguments)  # type: ignore[arg-type]
        dtypes.append(logits.dtype)
        return logits

    monkeypatch.setattr(Transformer, "step", recorded)
    sampled(run_copy, "--n", 2, "--precision", precision)
    assert set(dtypes) == {dtype}


def test_more_samples_begin_with_those_of_fewer(run_copy: Path) -> None:
    few, many = (load_file(sampled(run_copy, "--n", n) / "codes.safetensors")["level0"] for n in (3, 20))
    assert torch.equal(few, many[:3])


def test_labels_are_given_by_name_or_number(run_copy: Path) -> None:
    by_name, by_number = (sampled(run_copy, "--n", 4, "--label", label) for label in ("down", "1"))
    assert json.loads((by_name / "samples.json").read_text())["labels"] == [1, 1, 1, 1]
    assert (by_name / "grid.png").read_bytes() == (by_number / "grid.png").read_bytes()


@pytest.mark.parametrize(("device", "precision"), [("cpu", "float64"), ("cuda:0", "bfloat16")])
def test_the_default_precision_depends_on_the_device(
    run_copy: Path, device: str, precision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Default precision per device, with the weights on the CPU; likelihoods and coding keep full-precision weights."""
    for name, load in (("load_finished", load_finished), ("load_tokenizer", load_tokenizer)):
        monkeypatch.setattr(f"pipelines.generator.{name}", lambda *arguments, load=load: load(*arguments[:-1]))
    monkeypatch.setattr("pipelines.generator.default_precision", lambda device: {"cpu": "float64", "cuda": "bfloat16"}[device.type])
    exact = Generator.from_pretrained(run_copy, device="cpu").exact_prior("test").state_dict()
    generator = Generator.from_pretrained(run_copy, device=device)
    assert generator.origin["sampling"]["precision"] == precision
    generator.sample(2)
    assert ("bfloat16" in capsys.readouterr().out) == (precision == "bfloat16")
    assert next(generator._sampler.prior.parameters()).dtype == getattr(torch, precision)
    assert not generator._sampler.prior.training
    assert all(torch.equal(tensor, exact[name]) for name, tensor in generator.exact_prior("test").state_dict().items())


def test_the_uniform_prior_needs_no_trained_one(run_copy: Path) -> None:
    shutil.rmtree(run_copy / "priors")
    folder = sampled(run_copy, "--n", 4, "--prior", "uniform")
    assert json.loads((folder / "samples.json").read_text())["bits_per_token"] == 4


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--n", "0"], ["--n", "at least 1", "0"]),
        (["--label", "2"], ["label", "0 to 1", "2"]),
        (["--label", "-1"], ["label", "-1"]),
        (["--label", "sideways"], ["label", "across, down", "sideways"]),
        (["--prior", "best"], ["--prior best", "transformer, uniform"]),
        (["--prior", "uniform", "--label", "1"], ["label", "no labels"]),
        (["--temperature", "-1"], ["temperature", "at least 0"]),
        (["--top-p", "0"], ["top_p", "above 0"]),
        (["--top-k", "-1"], ["top_k", "at least 0"]),
        (["--min-p", "1.5"], ["min_p", "0 to 1"]),
        (["--guidance", "nan"], ["guidance", "nan"]),
        (["--guidance-power", "0"], ["guidance_power", "above 0", "0"]),
        (["--guidance-interval", "[0.8,0.2]"], ["guidance_interval", "two shares from 0 to 1", "[0.8, 0.2]"]),
        (["--guidance-interval", "[0.5]"], ["guidance_interval", "two shares from 0 to 1", "[0.5]"]),
        (["--guidance-interval", "0.5"], ["guidance", "0.5"]),
        (["--n", "many"], ["n: expected", "int", "many"]),
        (["--stage2.lr", "1"], ["--stage2.lr"]),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    run_copy: Path, arguments: list[str], parts: list[str], one_line_error: Callable[..., str]
) -> None:
    line = one_line_error(main, "--run", run_copy, *arguments)
    assert all(part in line for part in parts), line
    assert not (run_copy / "samples").exists()


def test_guidance_needs_a_prior_trained_with_label_dropout(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    train_prior(["--run", str(run_copy), "--name", "sure", "--stage2.condition_dropout", "0", "--stage2.steps", "2"])
    assert "condition_dropout 0" in one_line_error(main, "--run", run_copy, "--guidance", "2")
    assert sampled(run_copy, "--n", 2).exists()


def test_errors_name_the_command_to_run_first(tmp_path: Path, run_copy: Path, one_line_error: Callable[..., str]) -> None:
    assert "accelerate launch stage1_vqvae/train.py" in one_line_error(main, "--run", tmp_path / "nothing")
    shutil.rmtree(run_copy / "priors")
    assert "accelerate launch stage2_prior/train.py" in one_line_error(main, "--run", run_copy)


def test_a_prior_of_another_tokenizer_is_refused(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    change_bytes(run_copy / "tokenizer.safetensors")
    assert "expected a prior over codes of the run's tokenizer" in one_line_error(main, "--run", run_copy)


def test_an_output_folder_that_cannot_be_written_is_named(
    run_copy: Path, one_line_error: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_copy / "samples").write_text("in the way")
    assert "samples" in one_line_error(main, "--run", run_copy, "--n", "1")


def test_a_failure_leaves_no_half_written_samples(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "grid.png")

    monkeypatch.setattr("pipelines.sample.write", full)
    with pytest.raises(OSError, match="No space"):
        main(["--run", str(run_copy), "--n", "2"])
    assert not (run_copy / "samples").exists()


def test_written_samples_remain_if_the_pipe_is_closed(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example in `sample.py | head -1`."""

    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("pipelines.sample.print", closed, raising=False)
    with pytest.raises(BrokenPipeError):
        main(["--run", str(run_copy), "--n", "2"])
    assert (run_copy / "samples" / "000" / "samples.json").exists()


def test_ctrl_c_leaves_nothing_half_written(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.generator.draw_images", interrupted)
    with pytest.raises(SystemExit) as stop:
        run_entry(lambda: main(["--run", str(run_copy), "--n", "2"]))
    assert stop.value.code == 130
    assert not (run_copy / "samples").exists()


def test_a_copied_run_still_samples(finished_run: Path, run_copy: Path) -> None:
    shutil.move(run_copy / "recipe.yaml", run_copy / "kept.yaml")
    recipe = (run_copy / "kept.yaml").read_text()
    (run_copy / "recipe.yaml").write_text(recipe.replace("path:", "path: /not/on/this/machine #"))
    assert sampled(run_copy, "--n", 2).exists()
