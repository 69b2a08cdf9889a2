"""A run without torch: graphs compared with torch, and the numpy sampler with the package's."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from configs.run_dir import read_json, read_yaml, write_yaml
from pipelines import Generator
from pipelines.export_onnx import main
from pipelines.exporting import sampler as exported
from pipelines.exporting.graphs import export_tokenizer
from stage2_prior import draw
from stage2_prior.train import main as train_prior
from tests.conftest import check_names_no_place
from tests.pipelines.exported_page import other_prior, other_tokenizer
from tests.stage1_vqvae.quantizers.quantizer_kinds import KINDS
from tests.stage2_prior.priors.prior_kinds import random_codes


@pytest.fixture(scope="module")
def graphs(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Generator]:
    """Graphs of a transformer in float64, and the generator; the tokenizer's graphs were traced before."""
    run = shutil.copytree(exported / "run", tmp_path_factory.mktemp("exported") / "run")
    recipe = read_yaml(run / "recipe.yaml")
    recipe["sampling"] |= {"guidance_schedule": "power_cosine", "guidance_power": 0.8, "guidance_interval": [0.2, 0.8]}
    write_yaml(run / "recipe.yaml", recipe)
    folder = run.parent / "onnx"

    def take(_: object, into: Path) -> None:
        for name in ("encoder", "decoder"):
            shutil.copy(exported / "graphs" / f"{name}.onnx", into)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipelines.exporting.folder.export_tokenizer", take)
        main(["--run", str(run), "--output", str(folder), "--precision", "float64"])
    return folder, Generator.from_pretrained(run, device="cpu")


def session(path: Path) -> Callable[..., list[np.ndarray]]:
    inference = onnxruntime.InferenceSession(path)
    return lambda **inputs: inference.run(None, inputs)


def test_codes_and_images_equal_torchs_at_any_batch_size(graphs: tuple[Path, Generator]) -> None:
    folder, generator = graphs
    check_names_no_place(folder)
    images = torch.rand(5, 3, 8, 12) * 2 - 1
    codes = generator.tokenizer.encode(images)
    assert np.array_equal(session(folder / "encoder.onnx")(images=images.numpy())[0], codes[0].numpy())
    (pixels,) = session(folder / "decoder.onnx")(level0=codes[0][:1].numpy())
    assert np.abs(pixels - generator.tokenizer.decode((codes[0][:1],)).numpy()).max() < 1e-4


@pytest.mark.parametrize("kind", ["multiscale", "residual_shared"])
def test_other_quantizers_can_be_exported(kind: str, exported_other: Path, tmp_path: Path) -> None:
    """Multiscale ones of FSQ, which rounds."""
    fields = {"quantizer": KINDS["fsq"]} if kind == "multiscale" else {}
    model, folder = other_tokenizer(kind, **fields), exported_other if kind == "residual_shared" else tmp_path
    images = torch.rand(5, 3, 8, 12) * 2 - 1
    codes = model.encode(images)
    if folder == tmp_path:
        export_tokenizer(model, folder)
    exported_codes = session(folder / "encoder.onnx")(images=images.numpy())
    assert all(np.array_equal(level.numpy(), other) for level, other in zip(codes, exported_codes, strict=True))
    inputs = {f"level{number}": level.numpy() for number, level in enumerate(codes)}
    assert np.abs(session(folder / "decoder.onnx")(**inputs)[0] - model.decode(codes).numpy()).max() < 1e-4


def test_a_step_of_another_prior_takes_the_earlier_codes(exported_other: Path) -> None:
    prior = other_prior()
    layout, labels = prior.layout, torch.tensor([0, 5, 2])
    codes = random_codes(layout, 3)
    assert read_json(exported_other / "other.json")["cache"] is None
    step, flat = session(exported_other / "prior.onnx"), layout.flat(codes).numpy()
    expected = [logits for level in prior.logits(codes, labels) for logits in level.unbind(1)]
    for position, logits in enumerate(expected):
        earlier = np.where(np.arange(layout.length) < position, flat, 0)
        level = layout.level_of(position)
        (all_logits,) = step(codes=earlier, labels=labels.numpy(), position=np.array([position]))
        level_logits = all_logits[:, sum(layout.num_codes[:level]) : sum(layout.num_codes[: level + 1])]
        assert np.abs(level_logits - logits.numpy()).max() < 1e-4


def test_float64_is_refused_for_other_priors_than_transformers(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    train_prior(["--run", str(run_copy), "--name", "pixelcnn", "--prior.kind", "pixelcnn", "--stage2.steps", "2"])
    arguments = ["--run", run_copy, "--prior", "pixelcnn", "--output", run_copy / "new", "--precision", "float64"]
    assert "--precision: expected float32" in one_line_error(main, *arguments)


def test_without_torch_the_same_codes_are_drawn_for_the_same_seed(graphs: tuple[Path, Generator], tmp_path: Path) -> None:
    folder, generator = graphs
    settings = {"guidance": 2.0, "temperature": 0.9, "top_p": 0.9}
    expected = generator.draw(70, seed=3, **settings)
    codes, images = exported.Sampler(folder).sample(70, seed=np.int64(3), **settings)
    assert np.array_equal(codes[0], expected.codes[0].numpy())
    assert np.abs(images.astype(int) - expected.pixels.numpy()).max() <= 1
    assert np.array_equal(exported.Sampler(folder).sample(2, "down", 1)[0][0], generator.draw(2, "down", 1).codes[0].numpy())
    # As a user runs it: from the folder alone.
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    hidden = "import sys; sys.modules['torch'] = None; sys.argv = ['sample.py', '--n', '5', '--output', 'made']; "
    line = f"{hidden}import runpy; runpy.run_path('elsewhere/sample.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", line], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [*(f"{number:05d}.png" for number in range(5)), "grid.png"]
    assert len((elsewhere / "sample.py").read_text().splitlines()) < 200


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5, "top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3, "top_p": 0.9}, {"temperature": 0.0}]
)
def test_numpy_draws_equal_torchs(settings: dict[str, Any]) -> None:
    torch.manual_seed(1)
    logits = (torch.randn(200, 9, dtype=torch.float64) * 2).round(decimals=1)  # with ties
    config = draw.StepwiseSampling(**settings)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **settings}
    probabilities = draw.warp(logits, config)
    warped = exported.warp(logits.numpy(), options)
    assert np.allclose(warped, probabilities.numpy(), atol=1e-12)
    uniform = torch.stack([draw.uniforms(7, torch.tensor([number]), 1)[0, 0] for number in range(200)])
    assert np.array_equal(uniform.numpy(), np.stack([exported.uniforms(7, number, 1)[0] for number in range(200)]))
    assert np.array_equal(exported.draw(warped, uniform.numpy()), draw.draw(probabilities, uniform).numpy())


def test_model_json_names_labels_and_prior_and_settings_are_checked(graphs: tuple[Path, Generator]) -> None:
    folder, generator = graphs
    model = json.loads((folder / "model.json").read_text())
    assert model["label_names"] == ["across", "down"]
    assert model["prior_sha256"] == generator.origin["prior_sha256"]
    with pytest.raises(ValueError, match=r"label: expected names \(across, down\) or numbers below 2, found left"):
        exported.Sampler(folder).sample(1, "left")
    with pytest.raises(ValueError, match="label: expected"):
        exported.Sampler(folder).sample(1, [0, 1])
    for settings in ({"temperature": -1}, {"top_p": 0}, {"heat": 1}, {"guidance": math.nan}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}: expected"):
            exported.Sampler(folder).sample(1, **settings)
    unsure = exported.Sampler(folder)
    unsure.model["supports_unconditional"] = False
    with pytest.raises(ValueError, match="guidance: expected"):
        unsure.sample(1, guidance=2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: output"),
        (["--output", "{run}"], "expected a folder that does not exist yet, found one"),
        (["--output", "{run}/new", "--precision", "float16"], "--precision: expected float32 or float64, found float16"),
        (["--output", "{run}/new", "--prior", "best"], "--prior best: expected one of transformer"),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], message: str, run_copy: Path, one_line_error: Callable[..., str]) -> None:
    assert message in one_line_error(main, "--run", run_copy, *[argument.format(run=run_copy) for argument in arguments])
    assert not (run_copy / "new").exists()
