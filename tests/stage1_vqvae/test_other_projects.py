"""Import and export of other projects' tokenizers: equal results both ways, and refusal of files that do not fit."""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.data import Data
from configs.errors import UserError
from configs.parts import part_from
from configs.recipe_file import load_recipe
from configs.run_dir import REPOSITORY, RunDir
from configs.schema import Tokenizer
from pipelines.reconstruct import main as reconstruct
from pipelines.report import main as report
from pipelines.sample import main as sample
from pipelines.summary import main as summary
from stage1_vqvae.export_tokenizer import main as export_tokenizer
from stage1_vqvae.export_tokenizer import to_diffusers
from stage1_vqvae.import_tokenizer import build_tokenizer
from stage1_vqvae.import_tokenizer import main as import_tokenizer
from stage1_vqvae.model import VQVAE, load_tokenizer
from stage1_vqvae.networks.vqgan import VQGANPart
from stage1_vqvae.networks.vqgan_names import SPELLINGS
from stage1_vqvae.train import main as train_tokenizer
from stage2_prior.extract_codes import main as extract_codes
from stage2_prior.train import main as train_prior


class UnknownClass:
    """A class that the importing side does not have."""


REFERENCES = Path(__file__).parents[1] / "data"


def reference(project: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load weights, and input, latents, codes and reconstruction computed by the project's code."""
    tensors = load_file(REFERENCES / f"{project}_small.safetensors")
    weights = {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}
    return weights, {name: value for name, value in tensors.items() if not name.startswith("weights.")}


def diffusers_reference(height: int, width: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the same with a random `diffusers.VQModel`: three sizes, two blocks, attention in the middle only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from its imports
        from diffusers import VQModel
    torch.manual_seed(0)
    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        latent_channels=16,
        num_vq_embeddings=48,
        vq_embed_dim=6,
        norm_num_groups=32,
    ).eval()
    images = torch.randn(2, 3, height, width).clamp(-1, 1)
    with torch.no_grad():
        latents = model.encode(images).latents
        # Codes in the range of the latents, and far enough apart that rounding does not matter.
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        model.quantize.embedding.weight.copy_(mean + std * torch.randn(48, 6))
        codes = model.quantize(latents)[2][2].view(2, *latents.shape[2:])
        reconstruction = model.decode(latents).sample
    return dict(model.state_dict()), {"input": images, "latents": latents, "codes": codes, "reconstruction": reconstruction}


def imported(project: str, weights: dict[str, Tensor], size: tuple[int, int], recipe: Path, folder: Path) -> VQVAE:
    save_file(weights, folder / "theirs.safetensors")
    height, width = size
    options = ["--config", str(recipe), "--data.height", str(height), "--data.width", str(width), "--run", str(folder / "run")]
    import_tokenizer(["--from", project, str(folder / "theirs.safetensors"), *options])
    return load_tokenizer(RunDir(folder / "run"))


@pytest.mark.parametrize("project", ["llamagen", "taming", "diffusers", "diffusers, not square"])
def test_imported_tokenizers_reproduce_the_projects_results(project: str, tiny_recipe: Path, tmp_path: Path) -> None:
    name, _, shape = project.partition(", ")
    weights, expected = diffusers_reference(16, 24 if shape else 16) if name == "diffusers" else reference(project)
    tokenizer = imported(name, weights, (expected["input"].shape[2], expected["input"].shape[3]), tiny_recipe, tmp_path)
    with torch.no_grad():
        assert torch.allclose(tokenizer.latents(expected["input"]), expected["latents"], atol=1e-5)
        codes = tokenizer.encode(expected["input"])
        assert torch.equal(codes[0], expected["codes"].long())
        assert len(codes[0].unique()) > 8
        assert torch.allclose(tokenizer.decode(codes), expected["reconstruction"], atol=1e-5)


# From the papers and configurations of the public checkpoints.
PUBLIC = {
    "llamagen vq_ds16_c2i": ([1, 1, 2, 2, 4], [16], 16_384, 8),
    "llamagen vq_ds8_c2i": ([1, 2, 2, 4], [8], 16_384, 8),
    "taming vqgan_imagenet_f16_1024": ([1, 1, 2, 2, 4], [16], 1024, 256),
    "taming vqgan_imagenet_f16_16384": ([1, 1, 2, 2, 4], [16], 16_384, 256),
}


@pytest.mark.parametrize("file", PUBLIC)
def test_settings_of_public_checkpoints_are_inferred_from_shapes(file: str) -> None:
    shapes = json.loads((REFERENCES / "state_dicts.json").read_text())[file]
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
        tokenizer, unused = build_tokenizer(weights, SPELLINGS[file.split()[0]], load_recipe(REPOSITORY / "configs" / "imagefolder.yaml"))
    network, quantizer = tokenizer.config.network, tokenizer.quantizer
    assert isinstance(network, VQGANPart)
    assert (network.multipliers, network.attention, *quantizer.num_codes, tokenizer.config.code_dim) == PUBLIC[file]
    assert (network.hidden_channels, network.residual_blocks, network.latent_channels) == (128, 2, 256)
    assert set(unused) <= {"quantize.codebook_used"}


def test_a_run_from_a_torch_checkpoint_works_in_all_commands(tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the other entries of public files: losses, callbacks keyed by class, arguments, numpy numbers."""
    weights, _ = reference("taming")
    losses = {"loss.discriminator.weight": torch.full((1,), torch.nan), "loss.logvar": torch.zeros(1)}
    content = {"epoch": 3, "state_dict": {**weights, **losses}}
    other_entries = {
        "callbacks": {UnknownClass: {"best": np.float64(0.5)}},
        "args": argparse.Namespace(lr=1.0),
        "optimizer_states": [UnknownClass()],
    }
    torch.save({**content, **other_entries}, tmp_path / "last.ckpt")
    run = str(tmp_path / "run")
    import_tokenizer(["--from", "taming", str(tmp_path / "last.ckpt"), "--config", str(tiny_recipe), "--run", run])
    printed = capsys.readouterr().out
    for name in ("epoch", "callbacks", "args", "optimizer_states", "loss.*"):
        assert printed.count(f"ignored: {name}\n") == 1
    extract_codes(["--run", run])
    train_prior(["--run", run])
    sample(["--run", run, "--n", "2"])
    imported_bytes = RunDir(Path(run)).tokenizer.read_bytes()
    for options in ([], ["--resume"], ["--resume", "--stage1.steps", "3"]):
        train_tokenizer(["--run", run, *options])
        assert "imported, so stage 1 has nothing to train" in capsys.readouterr().out
    assert RunDir(Path(run)).tokenizer.read_bytes() == imported_bytes
    reconstruct(["--run", run])
    summary(["--run", run])
    report(["--run", run])
    recipe = load_recipe(RunDir(Path(run)).recipe)
    network = dataclasses.asdict(recipe.tokenizer.network)
    assert (network["multipliers"], network["attention"], network["residual_blocks"], network["hidden_channels"]) == ([1, 2], [2], 1, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("decoder.up.1.block.0.norm2.bias"), "expected a weight decoder.up.1.block.0.norm2.bias, found none"),
        (lambda weights: weights.update({"decoder.conv_out.bias": torch.zeros(4)}), "decoder.conv_out.bias of shape (3,), found (4,)"),
        (lambda weights: weights.pop("quantize.embedding.weight"), "expected a weight quantize.embedding.weight, found none"),
        (lambda weights: weights.pop("encoder.conv_in.weight"), "expected a weight encoder.conv_in.weight, found none"),
        (lambda weights: weights["quant_conv.bias"].fill_(torch.nan), "expected finite weights, found NaN in quant_conv.bias"),
        (lambda weights: weights["quantize.embedding.weight"][3, 0].fill_(-torch.inf), "found infinity in quantize.embedding.weight"),
        (lambda weights: weights.update({"encoder.conv_in.weight": torch.zeros(32, 4, 3, 3)}), "of 1 or 3 channels, found them for 4"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_leave_no_run(
    change: Callable[[dict[str, Tensor]], object], message: str, tiny_recipe: Path, tmp_path: Path, one_line_error: Callable[..., str]
) -> None:
    weights, _ = reference("taming")
    change(weights)
    save_file(weights, tmp_path / "theirs.safetensors")
    options = ["--config", tiny_recipe, "--run", tmp_path / "run"]
    line = one_line_error(import_tokenizer, "--from", "taming", tmp_path / "theirs.safetensors", *options)
    assert message in line
    assert "theirs.safetensors" in line
    assert not (tmp_path / "run").exists()


def test_files_that_are_not_weights_are_refused(tiny_recipe: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    options = ["--config", tiny_recipe, "--run", tmp_path / "run"]
    weights, _ = reference("llamagen")
    save_file(weights, tmp_path / "llamagen.safetensors")
    torch.save(weights, tmp_path / "whole.pt")
    contents = {"empty": b"", "text": b"no weights", "words": b"hello world\n", "cut.pt": (tmp_path / "whole.pt").read_bytes()[:-5000]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert "found something else" in one_line_error(import_tokenizer, "--from", "taming", tmp_path / name, *options)
    for project, file, message in (
        ("taming", "missing", "found none"),
        ("taming", ".", "expected a file of weights, found a folder"),
        ("diffusers", ".", "or a folder with diffusion_pytorch_model.safetensors, found a folder"),
        ("taming", "llamagen.safetensors", "expected a weight encoder.down.0.block.0.conv1.weight, found none"),
        ("nobody", "text", "expected one of llamagen, taming, diffusers, found nobody"),
    ):
        assert message in one_line_error(import_tokenizer, "--from", project, tmp_path / file, *options)
    grey = ["--data.channels", "1"]
    line = one_line_error(import_tokenizer, "--from", "llamagen", tmp_path / "llamagen.safetensors", *options, *grey)
    assert "found them for 3" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ([], (3, 256, 256)),
        (["--data.height", "16"], (3, 16, 16)),
        (["--config", "partial.yaml"], (3, 8, 12)),
        (["--config", "partial.yaml", "--data.width=6", "--data.height", "10"], (3, 10, 6)),
    ],
)
def test_missing_image_settings_are_inferred_from_the_weights(
    options: list[str], shape: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default recipe, of grey digits, does not apply."""
    weights, _ = reference("taming")
    save_file(weights, tmp_path / "theirs.safetensors")
    (tmp_path / "partial.yaml").write_text("{data: {height: 8, width: 12}, stage2: {steps: 7}}")
    monkeypatch.chdir(tmp_path)
    settings: list[Data] = []

    def stop(data: Data, *_: object, **__: object) -> None:
        settings.append(data)
        raise UserError("far enough")

    monkeypatch.setattr("stage1_vqvae.import_tokenizer.load_images", stop)
    with pytest.raises(UserError, match="far enough"):
        import_tokenizer(["--from", "taming", "theirs.safetensors", "--run", "./run", "--data.path", ".", *options])
    (data,) = settings
    assert (data.channels, data.height, data.width) == shape
    assert "--data.channels 3" in capsys.readouterr().out
    assert data.name is None
    assert not (tmp_path / "run").exists()


def test_importing_without_a_run_name_is_refused(tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    assert "--run: expected a name for the new run" in one_line_error(import_tokenizer, "--from", "taming", tmp_path / "file")


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_exported_tokenizers_reproduce_in_diffusers_and_back(metric: str, tiny_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    network = {"kind": "vqgan", "hidden_channels": 32, "residual_blocks": 1, "latent_channels": 8}
    network |= {"multipliers": "[1, 2, 1]", "attention": "[2]"}
    options = [f"--tokenizer.network.{name}={value}" for name, value in network.items()]
    options += ["--tokenizer.quantizer.metric", metric, "--stage1.steps", "3"]
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(run), *options])
    export_tokenizer(["--run", str(run), "--to", "diffusers", "--output", str(tmp_path / "theirs")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from its imports
        from diffusers import VQModel

        theirs = VQModel.from_pretrained(tmp_path / "theirs").eval()
    ours, images = load_tokenizer(RunDir(run)), torch.rand(4, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        codes = ours.encode(images)
        latents = theirs.encode(images).latents
        their_codes = theirs.quantize(latents)[2][2].view(4, 2, 3)
        assert torch.equal(their_codes, codes[0])
        assert len(their_codes.unique()) > 2
        assert torch.allclose(theirs.decode(latents).sample, ours.decode(codes), atol=1e-5)
    back = tmp_path / "back"
    import_tokenizer(["--from", "diffusers", str(tmp_path / "theirs"), "--config", str(tiny_recipe), "--run", str(back)])
    assert torch.equal(load_tokenizer(RunDir(back)).encode(images)[0], codes[0])


def test_invalid_exports_are_refused(run_copy: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    options = ["--run", run_copy, "--output", tmp_path / "theirs"]
    assert "expected vqgan" in one_line_error(export_tokenizer, *options)
    assert "expected diffusers" in one_line_error(export_tokenizer, *options, "--to", "nobody")
    assert not (tmp_path / "theirs").exists()
    assert "expected a folder that does not exist yet" in one_line_error(export_tokenizer, "--run", run_copy, "--output", run_copy)


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("objective", {"kind": "bce"}, "expected mse, where the decoder outputs the image itself, found bce"),
        ("quantizer", {"kind": "ema", "depth": 2}, "neither residual nor in groups nor projected, found ema of 2 levels"),
        ("quantizer", {"kind": "fsq", "levels": [3, 3]}, "expected one learned codebook"),
    ],
)
def test_parts_that_diffusers_lacks_are_refused(part: str, fields: dict[str, Any], message: str) -> None:
    network = VQGANPart(hidden_channels=32, multipliers=[1], attention=[], residual_blocks=1, latent_channels=4)
    chosen: Any = {part: part_from(f"tokenizer.{part}", fields)}
    with pytest.raises(UserError, match=message):
        to_diffusers(VQVAE(Tokenizer(code_dim=2, network=network, **chosen), 8, 12, 3))


def test_config_json_beside_the_weights_is_read(tiny_recipe: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    """A different number of groups would not show in the shapes."""
    weights, _ = reference("llamagen")
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"norm_num_groups": 16, "act_fn": "silu"}')
    line = one_line_error(import_tokenizer, "--from", "diffusers", tmp_path, "--config", tiny_recipe, "--run", tmp_path / "run")
    assert "config.json: expected norm_num_groups 32, found 16" in line


def test_old_weight_names_of_diffusers_are_accepted(tiny_recipe: Path, tmp_path: Path) -> None:
    weights, expected = diffusers_reference(8, 12)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in old_names.items():
        weights = {name.replace(f".{new}.", f".{old}."): value for name, value in weights.items()}
    assert any(".query." in name for name in weights)
    tokenizer = imported("diffusers", weights, (8, 12), tiny_recipe, tmp_path)
    assert torch.equal(tokenizer.encode(expected["input"])[0], expected["codes"].long())


def test_image_sizes_are_checked_against_the_imported_network(
    tiny_recipe: Path, tmp_path: Path, one_line_error: Callable[..., str]
) -> None:
    """Height 10: the recipe's own network, of downsampling 4, would refuse it; the imported one, of 2, does not."""
    weights, _ = reference("taming")
    assert imported("taming", weights, (10, 12), tiny_recipe, tmp_path).grids == [(5, 6)]
    size = ["--data.height", "11", "--config", tiny_recipe, "--run", tmp_path / "other"]
    assert "data.height" in one_line_error(import_tokenizer, "--from", "taming", tmp_path / "theirs.safetensors", *size)
