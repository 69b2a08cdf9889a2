"""Create a run from a tokenizer that another project trained: LlamaGen, taming-transformers, or diffusers' `VQModel`.

    python stage1_vqvae/import_tokenizer.py --from llamagen vq_ds16_c2i.pt --run photos --config configs/imagefolder.yaml --data.path DIR
    python stage1_vqvae/import_tokenizer.py --from diffusers diffusion_pytorch_model.safetensors --run photos --data.path DIR

FILE is a safetensors or torch.save file, of which only tensors are read. Sizes are inferred from the weights' shapes; other content
(discriminator, losses, raw weights if there are averaged ones) is listed and ignored. The recipe names the run's images, of any size that
the tokenizer's downsampling divides; the default is configs/imagefolder.yaml. If neither recipe nor command line states them, channels are
taken from the weights, and the size from diffusers' config.json, otherwise 256 x 256. The tokenizer is evaluated on the validation split.
Stage 1 is then finished: extract the codes, train a prior.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from configs.cli import EXTRACT_CODES, Command, parse
from configs.data import Data
from configs.errors import UserError, brief, run_entry, say
from configs.recipe_file import RECIPES, recipe_dict
from configs.run_dir import program, read_json, write_json, write_yaml
from configs.schema import Recipe, Tokenizer
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import VALIDATION
from stage1_vqvae.model import VQVAE, save_tokenizer
from stage1_vqvae.monitoring.validation import save_health, save_reconstructions, save_report, validate
from stage1_vqvae.networks.vqgan import GROUPS, Stack
from stage1_vqvae.networks.vqgan_names import CODEBOOK, SPELLINGS, Spelling, convert_weights, get_weight, infer_network, weight_names
from stage1_vqvae.quantizers.learned import GradientPart
from training.processes import start
from training.weights_file import check_finite_weights

_DEFAULT_RECIPE = RECIPES / "imagefolder.yaml"
_DEFAULT_SIZE = 256
"""Pixels per side on which the projects' public tokenizers were trained."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    argv = sys.argv[1:] if argv is None else argv
    has_recipe = any(argument.partition("=")[0] == "--config" for argument in argv)
    if not has_recipe:
        argv = [*argv, "--config", str(_DEFAULT_RECIPE)]
    sections = ("data", "extraction", "prior", "stage2", "sampling", "compute")
    command = parse(__doc__, sections, argv, starts_run=True, options=_options, check=False)
    run, recipe, project = command.run, command.recipe, getattr(command.options, "from")
    if not has_recipe and command.options.run is None:
        raise UserError("--run: expected a name for the new run (--run NAME), found none, and no recipe (--config FILE) either")
    if project not in SPELLINGS:
        raise UserError(f"--from: expected one of {', '.join(SPELLINGS)}, found {project}")
    if run.exists():
        raise UserError(f"--run {run}: expected a new run, found one")
    spelling = SPELLINGS[project]
    path = _file(Path(command.options.file).expanduser(), spelling)
    weights, ignored = read(path, spelling)
    if not has_recipe:
        say(f"no recipe (--config FILE): all settings but images and tokenizer as in configs/{_DEFAULT_RECIPE.name}")
    try:
        recipe = dataclasses.replace(recipe, data=_completed(recipe.data, _stated(command, has_recipe), weights, path, spelling))
        tokenizer, unused = build_tokenizer(weights, spelling, recipe)
        check_finite_weights({name: weight for name, weight in weights.items() if name not in unused and not name.startswith("loss.")})
        recipe = dataclasses.replace(recipe, tokenizer=tokenizer.config)
        recipe.check()
    except ValueError as error:  # a UserError, or one of `recipe.check`
        raise UserError(f"{path}: {error}") from None
    started, accelerator = time.monotonic(), start(recipe.compute, oom_hint="take fewer images at once (--extraction.batch_size N)")
    if accelerator.num_processes > 1:
        raise UserError(f"expected one process, found {accelerator.num_processes}")
    images = load_images(recipe.data, (VALIDATION,), progress=True)
    validation = images.splits[VALIDATION]
    tokenizer.to(accelerator.device)
    result = validate(accelerator, tokenizer, validation, recipe.extraction.batch_size)
    with run.lock():
        write_yaml(run.recipe, recipe_dict(recipe))
        write_json(run.data, images.record)
        run.record(program(), command.arguments, recipe_dict(recipe))
        run.stage1.mkdir(parents=True, exist_ok=True)
        save_health(run, tokenizer, result.counts, 0, 1)
        save_reconstructions(run, tokenizer, validation, 0, accelerator.device)
        save_report(run, tokenizer, 0, (time.monotonic() - started) / 60, result)
        save_tokenizer(run.tokenizer, tokenizer, steps=0)
    for name in (*ignored, *unused):
        print(f"ignored: {name}")
    print(f"wrote {run.show(run.tokenizer)}; pictures in {run.show(run.stage1)}: reconstructions, codebook.png")
    print(f"next: {command.next(EXTRACT_CODES)}")


def _options(parser: Any) -> None:
    parser.add_argument("--from", required=True, help=f"project that trained the tokenizer: {', '.join(SPELLINGS)}")
    parser.add_argument("file", help="weights of the tokenizer")


def _stated(command: Command, has_recipe: bool) -> set[str]:
    """List the keys of section `data` that the user's recipe or command line sets."""
    keys = [argument.partition("=")[0].removeprefix("--data.") for argument in command.arguments if argument.startswith("--data.")]
    if has_recipe:
        recipe = Path(command.options.config)
        content = yaml.safe_load((recipe if recipe.exists() else RECIPES / recipe.name).read_text(encoding="utf-8")) or {}
        keys += content.get("data", {})
    return set(keys)


def _completed(data: Data, stated: set[str], weights: Mapping[str, Tensor], path: Path, spelling: Spelling) -> Data:
    """Fill in what section `data` does not state: the weights' channels, and the size in the config beside them or the default."""
    values: dict[str, Any] = {"channels": get_weight(weights, "encoder.conv_in.weight").shape[1]}
    settings = path.with_name("config.json")
    size = read_json(settings).get("sample_size") if path.name == spelling.file and settings.is_file() else None
    default = size if isinstance(size, int) and size > 0 else _DEFAULT_SIZE
    values["height"] = data.width if "width" in stated else default
    values["width"] = data.height if "height" in stated else default
    values = {key: value for key, value in values.items() if key not in stated}
    if values:
        say(f"not stated, so taken from the weights or by default: {' '.join(f'--data.{key} {value}' for key, value in values.items())}")
    return dataclasses.replace(data, **values)


def _file(path: Path, spelling: Spelling) -> Path:
    """Return the path of the weights from its path or its folder. Errors: UserError if there are none, or for an unsupported config."""
    if path.is_dir():
        if spelling.file is None or not (path / spelling.file).is_file():
            expected = "a file of weights" if spelling.file is None else f"a file of weights, or a folder with {spelling.file}"
            raise UserError(f"{path}: expected {expected}, found a folder")
        path = path / spelling.file
    config = path.with_name("config.json")
    if path.name == spelling.file and config.is_file():
        settings = read_json(config)
        for key, supported in (("norm_num_groups", GROUPS), ("act_fn", "silu"), ("norm_type", "group")):
            if settings.get(key, supported) != supported:
                raise UserError(f"{config}: expected {key} {supported}, found {settings[key]}")
    return path


def read(path: Path, spelling: Spelling) -> tuple[dict[str, Tensor], list[str]]:
    """Read the weights of a file, and the names of its other entries. Errors: UserError if there are no weights."""
    try:
        content: Any = safetensors.torch.load_file(path)
    except OSError as error:
        raise UserError(f"{path}: expected a file of weights, found none ({error.strerror or error})") from None
    except SafetensorError:
        content = _unpickled(path)
    ignored: list[str] = []
    container = next((key for key in spelling.containers if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)), None)
    if container is not None:
        ignored, content = [str(key) for key in content if key != container], content[container]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: expected names and weights, found {type(content).__name__}")
    return {spelling.current_name(name): value for name, value in content.items() if isinstance(value, Tensor)}, ignored


class _Inert:
    """Placeholder for pickled objects of unknown classes beside the weights (callbacks, arguments): accepts anything, does nothing."""

    def __new__(cls, *_: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _unpickled(path: Path) -> Any:
    """Read a file of torch.save, creating only tensors and plain Python objects. Errors: UserError for other files."""
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling arbitrary bytes can raise anything
        raise UserError(f"{path}: expected safetensors or torch's weights, found something else ({brief(error)})") from None


def build_tokenizer(weights: Mapping[str, Tensor], spelling: Spelling, recipe: Recipe) -> tuple[VQVAE, list[str]]:
    """Build the tokenizer from the weights for the recipe's images; also return the names of unused weights, those of losses as one.

    Errors: UserError, naming the first weight that is missing or of the wrong shape.
    """
    part, codebook, data = infer_network(spelling, weights), get_weight(weights, CODEBOOK), recipe.data
    quantizer = GradientPart(num_codes=codebook.shape[0], metric="cosine" if spelling.unit_length else "euclidean")
    config = Tokenizer(code_dim=codebook.shape[1], quantizer=quantizer, network=part)
    channels = get_weight(weights, "encoder.conv_in.weight").shape[1]
    if channels not in (1, 3):
        raise UserError(f"expected weights for grey or colour images, of 1 or 3 channels, found them for {channels}")
    if channels != data.channels:
        raise UserError(f"expected weights for images of {data.channels} channels (data.channels), found them for {channels}")
    tokenizer = VQVAE(config, data.height, data.width, channels)
    assert isinstance(tokenizer.encoder, Stack)
    assert isinstance(tokenizer.decoder, Stack)
    names = {**weight_names(spelling, part, tokenizer.encoder, tokenizer.decoder), "quantizer.codebook.weight": [CODEBOOK]}
    initial = tokenizer.state_dict()
    tokenizer.load_state_dict({**initial, **convert_weights(weights, names, initial)})
    used = {name for pieces in names.values() for name in pieces}
    return tokenizer, sorted({name.split(".")[0] + ".*" if name.startswith("loss.") else name for name in weights if name not in used})


if __name__ == "__main__":
    run_entry(main)
