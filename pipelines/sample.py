"""Sample images: draw codes from the prior, decode them.

    python pipelines/sample.py --n 64
    python pipelines/sample.py --n 64 --label 7 --temperature 0.9 --top-p 0.95
    python pipelines/sample.py --n 64 --prior uniform
    python pipelines/sample.py --n 1000 --npz

Writes a new folder samples/NNN into the run: grid.png, one PNG per image, the codes, samples.json. Labels take turns unless --label
names one. Sample i of a seed has the same codes for any number of processes and, on a CPU, any --batch-size; with another --batch-size
single pixels may differ by one of 256 levels.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from torch import Tensor

from configs.cli import SUMMARY, parse
from configs.errors import UserError, run_entry
from configs.parts import as_dict
from configs.run_dir import program, replacing, write_bytes, write_json
from pipelines.conditioning import label_option
from pipelines.generator import load_generator
from stage1_vqvae.pictures import grid_scale, image_grid, save_png, square_columns
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.likelihood.bits import mean_over_tokens, uniform_bits
from stage2_prior.priors.prior_file import UNIFORM, drawn_prior
from training.processes import SMALLER_BATCHES, finish, start

# Largest number of pictures in grid.png.
_SHOWN = 256


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    command = parse(__doc__, ("sampling", "compute"), argv, flat="sampling", drawn_prior=drawn_prior, options=_options)
    run, config, options = command.run, command.recipe.sampling, command.options
    if options.n < 1:
        raise UserError(f"--n: expected at least 1 image, found {options.n}")
    command.need_tokenizer()
    accelerator = start(command.recipe.compute, oom_hint=SMALLER_BATCHES)
    generator = load_generator(command, accelerator, options.prior)
    header, tokenizer = generator.header, generator.tokenizer

    # Create the folder first, so that an unwritable one is an error before the draws.
    with run.numbered("samples", accelerator.is_main_process) as folder:
        codes, pictures, condition = generator.draw(options.n, options.label, options.seed, progress=True, folder=folder)
        if folder is not None:
            run.record(program(), command.arguments, dataclasses.asdict(config))
            uniform = mean_over_tokens(uniform_bits(tokenizer.quantizer.num_codes), tokenizer.grids)
            details = {
                "n": options.n,
                "seed": options.seed,
                **generator.origin,
                "labels": None if condition is None else condition.tolist(),
                "condition": None if header is None else as_dict(header.condition),
                "tokenizer_sha256": generator.tokenizer_sha256,
                "bits_per_token": header.bits_per_token if header is not None else uniform,
            }
            write(folder, codes, pictures, condition, generator.label_names, details, options.npz)
    if folder is not None:
        at_most = "" if generator.prior is None or generator.prior.exact else "at most "
        kind = f"{generator.prior_name} prior, {at_most}{details['bits_per_token']:.3f} bits per token"
        print(f"wrote {options.n} images ({kind}) to {run.show(folder)}; look at {run.show(folder / 'grid.png')}")
        print(f"next: {command.next(SUMMARY)}")
    finish(accelerator)


def _options(parser: Any) -> None:
    parser.add_argument("--n", type=int, default=64, help="images to sample")
    parser.add_argument("--seed", type=int, default=0, help="seed; sample i of a seed always has the same codes")
    label_option(parser, "all samples", "labels take turns")
    parser.add_argument("--prior", type=str, help=f"name of a prior of the run (default: the last finished), or `{UNIFORM}`")
    parser.add_argument("--npz", action="store_true", help="also write samples.npz: uint8 arr_0 of (N, H, W, C)")


def write(
    folder: Path,
    codes: Codes,
    pictures: Tensor,
    condition: Tensor | None,
    names: Sequence[str],
    details: dict[str, Any],
    npz: bool,
) -> None:
    """Write samples into their folder. `names`: names of the classes, if there are any."""
    # Classes take turns: with a column per class, each column shows one.
    columns = len(names) if names and len(names) <= 16 else square_columns(min(len(pictures), _SHOWN))
    save_png(folder / "grid.png", image_grid(pictures[:_SHOWN], min(columns, len(pictures))), grid_scale(pictures.shape[1]))
    digits = max(5, len(str(len(pictures))))
    for number, picture in enumerate(pictures):
        save_png(folder / "images" / f"{number:0{digits}d}.png", picture)
    tensors = {f"level{level}": grid.contiguous() for level, grid in enumerate(codes)}
    write_bytes(folder / "codes.safetensors", safetensors.torch.save(tensors | ({} if condition is None else {"condition": condition})))
    if npz:
        with replacing(folder / "samples.npz") as file:  # streamed: 50,000 images of 256x256 are 10 GB
            np.savez(file, pictures.numpy())
    write_json(folder / "samples.json", details)


if __name__ == "__main__":
    run_entry(main)
