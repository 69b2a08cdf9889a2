"""The stage 1 command: files, logs, messages and refusals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from configs.errors import UserError
from configs.recipe_file import load_recipe
from configs.run_dir import RunDir, read_json
from pipelines.sample import main as sample
from pipelines.summary import main as summary
from stage1_vqvae.data.pixels import to_model
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, VALIDATION, ImageSource, ImageSplit
from stage1_vqvae.doctor import main as doctor
from stage1_vqvae.metrics import usage
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.monitoring.health import checksum
from stage1_vqvae.monitoring.validation import check_equal_codebooks
from stage1_vqvae.train import main, train
from stage2_prior.codes.store import CodeStore
from stage2_prior.extract_codes import main as extract_codes
from stage2_prior.train import main as train_prior
from tests.stage1_vqvae.quantizers.quantizer_kinds import KINDS, D
from tests.stage1_vqvae.test_train_with_terms import ADVERSARY
from training.metrics_log import read_metrics
from training.processes import start
from training.stopping import GracefulStop


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def test_the_files_of_a_finished_run(finished_run: Path) -> None:
    names = files(finished_run)
    assert {"recipe.yaml", "history.jsonl", "tokenizer.safetensors", "stage1/metrics.jsonl", "stage1/report.json"} <= names
    assert {"stage1/training.png", "stage1/codebook.png", "stage1/reconstructions/step-000000060.png"} <= names
    assert not [name for name in names if ".tmp-" in name]
    report = read_json(finished_run / "stage1" / "report.json")
    assert report["bits_per_image"] == {"raw": 8 * 12 * 3 * 8, "indices": 6 * 4}
    assert set(report["validation"]) == {"mse", "psnr", "loss", "reconstruction", "usage", "perplexity"}


def test_the_metrics_log(finished_run: Path) -> None:
    records = read_metrics(finished_run / "stage1" / "metrics.jsonl")
    train = [record for record in records if record["split"] == "train"]
    assert [record["step"] for record in train] == [10, 20, 30, 40, 50, 60]
    for record in train:
        assert {"reconstruction", "commitment", "loss", "psnr", "usage", "perplexity", "lr"} <= set(record)
        assert {"images_per_second", "loading_share"} <= set(record)
        assert record["loss"] == pytest.approx(record["reconstruction"] + record["commitment"], rel=1e-5)
        assert 0 <= record["loading_share"] < 1
    assert [record["step"] for record in records if record["split"] == "validation"] == [30, 60]


def test_the_reconstruction_picture_starts_with_an_original(finished_run: Path) -> None:
    scale = 8  # each picture is enlarged to about 64 pixels
    with Image.open(finished_run / "stage1" / "reconstructions" / "step-000000060.png") as grid:
        assert grid.size[1] == (2 * (8 + 2) + 2) * scale  # 12 validation images: one row of originals, one row of reconstructions
        tile = grid.crop((2 * scale, 2 * scale, 14 * scale, 10 * scale)).resize((12, 8), Image.Resampling.NEAREST)
    first = load_images(load_recipe(finished_run / "recipe.yaml").data).splits[VALIDATION].pixels[:][0]
    assert np.array_equal(np.asarray(tile), first.numpy())


def test_validation_metrics_equal_those_of_the_saved_tokenizer(finished_run: Path) -> None:
    """Recomputed image by image."""
    tokenizer = load_tokenizer(RunDir(finished_run))
    split = load_images(load_recipe(finished_run / "recipe.yaml").data).splits[VALIDATION]
    errors, used = [], set()
    for pixels in split.pixels[:]:
        output = tokenizer(to_model(pixels[None]))
        picture = ((output.reconstruction.clamp(-1, 1) + 1) / 2 * 255).round() / 255
        errors.append((picture - pixels.permute(2, 0, 1) / 255).square().mean().item())
        used |= set(output.codes[0].flatten().tolist())
    report = read_json(finished_run / "stage1" / "report.json")["validation"]
    assert report["mse"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert report["usage"] == pytest.approx(len(used) / 16)


def test_the_tokenizer_does_not_depend_on_how_images_are_read(
    finished_run: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.prefetch._worth_prefetching", lambda _: True)  # as on a GPU
    main(["--config", str(tiny_recipe), "--run", str(tmp_path / "run"), "--data.decode", "each_time", "--data.workers", "2"])
    assert (tmp_path / "run/tokenizer.safetensors").read_bytes() == (finished_run / "tokenizer.safetensors").read_bytes()


def test_random_crops_need_decoding_each_time(tiny_recipe: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    settings = ["--config", str(tiny_recipe), "--run", str(tmp_path / "run"), "--stage1.steps", "4", "--data.transform", "random_crop"]
    line = one_line_error(main, *settings, "--data.transform.min_area", "0.5")
    assert "data.decode: expected each_time with data.transform random_crop and stage1.augmentation horizontal_flip" in line
    main([*settings, "--data.transform.min_area", "0.5", "--data.decode", "each_time"])
    assert (tmp_path / "run/tokenizer.safetensors").exists()


def test_an_indivisible_batch_size_is_refused(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line_error: Callable[..., str]
) -> None:
    monkeypatch.setattr("stage1_vqvae.train.start", lambda *_: SimpleNamespace(num_processes=2, is_main_process=True))
    line = one_line_error(main, "--config", tiny_recipe, "--run", tmp_path / "run", "--stage1.batch_size", "9")
    assert "stage1.batch_size: expected a multiple of 2" in line
    assert not (tmp_path / "run").exists()


def test_accumulation_does_not_change_the_result(tiny_recipe: Path, tmp_path: Path) -> None:
    """Without layer dropout, one step in four micro-batches equals one step, up to rounding."""
    for name, accumulation in (("one", 1), ("four", 4)):
        settings = ["--config", str(tiny_recipe), "--run", str(tmp_path / name), "--stage1.steps", "1", *ADVERSARY]
        main([*settings, "--stage1.adversarial.start", "0", "--stage1.accumulation", str(accumulation)])
    states = [torch.load(tmp_path / name / "stage1/checkpoints/step-000000001.pt", weights_only=True) for name in ("one", "four")]
    one, four = ({**state["model"], **state["adversarial"]["model"]} for state in states)
    assert bool((one["norms"] > 0).all())
    for name in one:
        assert torch.allclose(one[name], four[name], atol=1e-5), name


def test_tensorboard_can_be_enabled(tiny_recipe: Path, tmp_path: Path) -> None:
    main(["--config", str(tiny_recipe), "--run", str(tmp_path / "new"), "--stage1.steps", "2", "--compute.tracker", "tensorboard"])
    assert list((tmp_path / "new" / "stage1" / "tensorboard").rglob("events.out.tfevents.*"))
    assert read_metrics(tmp_path / "new" / "stage1" / "metrics.jsonl")


def test_the_history_has_command_lines_and_resolved_settings(finished_run: Path, tiny_recipe: Path) -> None:
    entries = [json.loads(line) for line in (finished_run / "history.jsonl").read_text().splitlines()]
    assert entries[0]["arguments"][:2] == ["--config", str(tiny_recipe)]
    assert entries[0]["resolved"]["stage1"]["steps"] == 60


def test_the_averaged_weights_are_saved(finished_run: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    state = torch.load(finished_run / "stage1/checkpoints/step-000000060.pt", weights_only=True)
    written = load_file(finished_run / "tokenizer.safetensors")
    assert all(torch.equal(written[name], value) for name, value in state["average"]["model"].items())
    assert not torch.equal(written["encoder.0.weight"], state["model"]["encoder.0.weight"])
    for number, none in enumerate((["--stage1.weight_average", "0"], ["--stage1.weight_average_share", "0.25"])):  # a horizon of one step
        run = tmp_path / str(number)
        main(["--config", str(tiny_recipe), "--run", str(run), "--stage1.steps", "4", *none])
        state = torch.load(run / "stage1/checkpoints/step-000000004.pt", weights_only=True)
        written = load_file(run / "tokenizer.safetensors")
        assert all(torch.equal(written[name], value) for name, value in state["model"].items())


def test_a_collapse_is_reported_in_training_and_by_the_doctor(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    settings = ["--tokenizer.quantizer.initialisation", "random", "--tokenizer.quantizer.restart_below", "0", "--stage1.lr", "1e-2"]
    main(["--config", str(tiny_recipe), "--run", run, "--stage1.steps", "60", *settings])
    records = [record for record in read_metrics(tmp_path / "run/stage1/metrics.jsonl") if record["split"] == "train"]
    assert [record["step"] for record in records if "warning" in record] == [40, 50, 60]
    assert "tokenizer.quantizer.restart_below" in records[-1]["warning"]
    assert "step 40: the codebook is collapsing" in capsys.readouterr().out
    doctor(["--run", run])
    printed = capsys.readouterr().out
    assert "usage" in printed
    assert "perplexity" in printed
    assert "warning: the codebook is collapsing" in printed


def test_the_doctor_prints_the_last_validation(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor(["--run", str(finished_run)])
    printed = capsys.readouterr().out
    report = read_json(finished_run / "stage1/report.json")["validation"]
    assert f"usage        {report['usage']:.1%}" in printed
    assert f"perplexity   {report['perplexity']:.1f}" in printed
    run_checksum = checksum(load_tokenizer(RunDir(finished_run)).quantizer)
    assert f"after step 60 (checksum {run_checksum:016x})" in printed


def test_the_doctor_needs_a_validation(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    (run_copy / "stage1/codebook.json").unlink()
    assert "stage 1 has not been validated yet" in one_line_error(doctor, "--run", run_copy)


def test_validation_images_do_not_affect_training(tiny_recipe: Path, tmp_path: Path) -> None:
    """Neither by initialisation nor by statistics: two runs with different validation images end with the same tokenizer."""
    recipe = load_recipe(tiny_recipe)
    recipe = dataclasses.replace(recipe, stage1=dataclasses.replace(recipe.stage1, steps=8, validation_interval=3))
    splits = load_images(recipe.data).splits
    files = []
    original = splits[VALIDATION].pixels
    for name, pixels in (("own", original), ("other", 255 - original[:5])):
        run = RunDir(tmp_path / name)
        images = ImageSource({TRAIN: splits[TRAIN], VALIDATION: ImageSplit(pixels, None)}, None)
        accelerator = start(recipe.compute)
        train(accelerator, run, recipe, images, resume=False, stop=GracefulStop(accelerator))
        files.append(run.tokenizer.read_bytes())
    assert files[0] == files[1]


class TwoProcesses:
    """A fake accelerator whose second rank has another codebook."""

    device = torch.device("cpu")

    @staticmethod
    def gather(local: torch.Tensor) -> torch.Tensor:
        return torch.cat([local, local + 1])


def test_unequal_codebooks_stop_the_run(finished_run: Path) -> None:
    tokenizer = load_tokenizer(RunDir(finished_run))
    with pytest.raises(UserError, match="step 7: expected equal codebooks on all processes, found checksums"):
        check_equal_codebooks(TwoProcesses(), tokenizer, 7)  # type: ignore[arg-type]


def test_many_levels_in_all_commands(tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = "product_residual_projected"
    run = RunDir(tmp_path / "run")
    options = [f"--tokenizer.code_dim={D}", *(f"--tokenizer.quantizer.{key}={value}" for key, value in KINDS[kind].items())]
    main(["--config", str(tiny_recipe), "--run", str(run.path), "--stage1.steps", "4", *options])
    extract_codes(["--run", str(run.path)])
    store, tokenizer = CodeStore(run.codes / TRAIN), load_tokenizer(run)
    shares = usage(*map(torch.from_numpy, store.counts()))
    assert f"usage {shares:.1%}" in capsys.readouterr().out
    pixels = load_images(load_recipe(run.recipe).data).splits[TRAIN].pixels
    encoded = tokenizer.encode(to_model(pixels))
    assert len(encoded) == len(tokenizer.quantizer.num_codes) > 1
    assert all(torch.equal(stored, expected) for stored, expected in zip(store.codes(torch.arange(len(pixels))), encoded, strict=True))
    train_prior(["--run", str(run.path), "--stage2.steps", "2"])
    sample(["--run", str(run.path), "--n", "20", "--temperature", "3"])
    drawn = load_file(run.samples / "000/codes.safetensors")
    for level, k in enumerate(tokenizer.quantizer.num_codes):
        assert int(drawn[f"level{level}"].min()) >= 0
        assert int(drawn[f"level{level}"].max()) < k
    summary(["--run", str(run.path)])
    doctor(["--run", str(run.path)])
    assert f"level {len(encoded)} of {len(encoded)}: K = 16" in capsys.readouterr().out


def test_compiling_without_a_compiler_is_refused(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line_error: Callable[..., str]
) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')\n\nmore")

    monkeypatch.setattr(torch, "compile", no_compiler)
    line = one_line_error(main, "--config", tiny_recipe, "--run", tmp_path / "run", "--compute.compile", "true")
    assert "compute.compile: expected a C++ compiler" in line
    assert "No working C++ compiler found" in line
    assert not (tmp_path / "run").exists()
