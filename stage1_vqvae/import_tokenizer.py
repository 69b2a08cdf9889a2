"""Make a run whose tokenizer is one that another project has trained: LlamaGen, taming-transformers, or diffusers' `VQModel`.

    python stage1_vqvae/import_tokenizer.py --from llamagen vq_ds16_c2i.pt --run photos --config configs/imagefolder.yaml --data.path DIR
    python stage1_vqvae/import_tokenizer.py --from diffusers diffusion_pytorch_model.safetensors --run photos --data.path DIR

FILE is safetensors, or what torch.save wrote, of which nothing but tensors is read. Sizes follow from the weights' shapes; what else is in
the file (discriminator, losses, weights beside their average) is named and left aside. The recipe says which images the run is about,
at any size that the tokenizer's downsampling divides; how well it does on their validation split is measured. Stage 1 is finished with
that: extract the codes, train a prior.
"""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from configs.cli import EXTRACT_CODES, parse, recipe_dict
from configs.errors import UserError, run_entry
from configs.run_dir import program, write_yaml
from configs.schema import Recipe, Tokenizer
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import VALIDATION
from stage1_vqvae.model import VQVAE, save_tokenizer
from stage1_vqvae.monitoring.validation import save_health, save_reconstructions, save_report, validate
from stage1_vqvae.networks.vqgan import Stack
from stage1_vqvae.networks.vqgan_names import CODEBOOK, SPELLINGS, Spelling, names_of, needed, part_of_weights, translated
from stage1_vqvae.quantizers.learned import GradientPart
from stage1_vqvae.training.processes import start


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command = parse(__doc__, ("data", "extraction", "prior", "stage2", "sampling", "compute"), argv, starts_run=True, options=_options)
    run, recipe, project = command.run, command.recipe, getattr(command.options, "from")
    if project not in SPELLINGS:
        raise UserError(f"--from: expected one of {', '.join(SPELLINGS)}, found {project}")
    if run.exists():
        raise UserError(f"--run {run}: expected a new run, found one")
    path = Path(command.options.file).expanduser()
    spelling = SPELLINGS[project]
    weights, aside = read(path, spelling)
    try:
        tokenizer, unused = tokenizer_of(weights, spelling, recipe)
    except ValueError as error:  # of sizes too
        raise UserError(f"{path}: {error}") from None
    recipe = dataclasses.replace(recipe, tokenizer=tokenizer.config)
    recipe.check()
    began, accelerator = time.monotonic(), start(recipe.compute)
    if accelerator.num_processes > 1:
        raise UserError(f"expected one process, found {accelerator.num_processes}")
    validation = load_images(recipe.data, (VALIDATION,), progress=True).splits[VALIDATION]
    tokenizer.to(accelerator.device)
    with run.lock():
        write_yaml(run.recipe, recipe_dict(recipe))
        run.record(program(), command.arguments, recipe_dict(recipe))
        run.stage1.mkdir(parents=True, exist_ok=True)
        judgement = validate(accelerator, tokenizer, validation, recipe.extraction.batch_size)
        save_health(run, tokenizer, judgement.counts, 0, 1)
        save_reconstructions(run, tokenizer, validation, 0, accelerator.device)
        save_report(run, tokenizer, 0, (time.monotonic() - began) / 60, judgement)
        save_tokenizer(run.tokenizer, tokenizer, steps=0)
    for name in (*aside, *unused):
        print(f"left aside: {name}")
    print(f"wrote {run.show(run.tokenizer)}; pictures in {run.show(run.stage1)}: reconstructions, codebook.png")
    print(f"next: {command.next(EXTRACT_CODES)}")


def _options(parser: Any) -> None:
    parser.add_argument("--from", required=True, help=f"whose tokenizer it is: {', '.join(SPELLINGS)}")
    parser.add_argument("file", help="its weights")


def read(path: Path, spelling: Spelling) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in a file, and the names of what stands beside them. Errors: UserError if there are none."""
    try:
        content: Any = safetensors.torch.load_file(path)
    except OSError as error:
        raise UserError(f"{path}: expected a file of weights, found none ({error.strerror or error})") from None
    except SafetensorError:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(
                f"{path}: expected safetensors or torch's weights, found something else ({str(error).splitlines()[0]})"
            ) from None
    aside: list[str] = []
    container = next((key for key in spelling.containers if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)), None)
    if container is not None:
        aside, content = [key for key in content if key != container], content[container]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: expected names and weights, found {type(content).__name__}")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}, aside


def tokenizer_of(weights: Mapping[str, Tensor], spelling: Spelling, recipe: Recipe) -> tuple[VQVAE, list[str]]:
    """The tokenizer that the weights are, for the recipe's images, and the names of those it has no use for, losses' as one.

    Errors: UserError, naming the first weight that is missing or of the wrong shape.
    """
    part, codebook, data = part_of_weights(spelling, weights), needed(weights, CODEBOOK), recipe.data
    quantizer = GradientPart(num_codes=codebook.shape[0], metric="cosine" if spelling.unit_length else "euclidean")
    config = Tokenizer(code_dim=codebook.shape[1], quantizer=quantizer, network=part)
    channels = needed(weights, "encoder.conv_in.weight").shape[1]
    if channels != data.channels:
        raise UserError(f"expected weights for images of {data.channels} channels (data.channels), found them for {channels}")
    tokenizer = VQVAE(config, data.height, data.width, channels)
    assert isinstance(tokenizer.encoder, Stack)
    assert isinstance(tokenizer.decoder, Stack)
    names = {**names_of(spelling, part, tokenizer.encoder, tokenizer.decoder), "quantizer.codebook.weight": [CODEBOOK]}
    own = tokenizer.state_dict()
    tokenizer.load_state_dict({**own, **translated(weights, names, own)})
    taken = {name for pieces in names.values() for name in pieces}
    return tokenizer, sorted({name.split(".")[0] + ".*" if name.startswith("loss.") else name for name in weights if name not in taken})


if __name__ == "__main__":
    run_entry(main)
