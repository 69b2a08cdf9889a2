"""Complete images: keep some of their codes and draw the others from the prior, several times.

    python pipelines/complete.py --prefix-rows 4
    python pipelines/complete.py --keep-rows 0,1,2,6 --n 8 --continuations 6
    python pipelines/complete.py --mask MASK.png --images FOLDER --label 3

The images are evenly spaced over a split, with their labels, or over the files and folders of --images. Rows are rows of the coarsest grid
of codes (with multiscale codes: of their full grid), from the top. A mask is a picture of the images' size: white pixels are kept, black or
transparent ones drawn again; in each grid, codes are kept whose patch is completely white. A code is drawn given the codes before it: kept
codes after it do not influence the draw, unless the prior is a masked one or was trained with `prior.order any`; then each is given all
kept codes of its level.
Writes a new folder completions/NNN into the run: completions.png with one row per image (image, reconstruction, kept part, continuations),
one PNG per continuation, completions.json.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.cli import parse
from configs.errors import UserError, run_entry, say
from configs.run_dir import program, write_json
from pipelines.conditioning import image_condition, label_option
from pipelines.encoding import encode_and_decode
from pipelines.generator import load_generator
from pipelines.inputs.images import chosen_images, image_options
from pipelines.inputs.pictures import mask_in
from stage1_vqvae.pictures import grid_scale, image_grid, save_png
from stage2_prior.priors.prior_file import drawn_prior
from training.processes import SMALLER_BATCHES, finish, start

_GREY = 128
# Largest number of images in completions.png.
_SHOWN = 32


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    command = parse(__doc__, ("sampling", "compute"), argv, flat="sampling", drawn_prior=drawn_prior, reads_images=True, options=_options)
    run, config, options = command.run, command.recipe.sampling, command.options
    _check_options(options)
    command.need_tokenizer()
    accelerator = start(command.recipe.compute, oom_hint=SMALLER_BATCHES)
    generator = load_generator(command, accelerator, options.prior)
    tokenizer = generator.tokenizer
    _, *size = tokenizer.image_shape
    if options.mask is not None:
        rows, mask = None, mask_in(Path(options.mask).expanduser(), command.recipe.data, "--mask")
    else:
        rows = kept_rows(options.prefix_rows, options.keep_rows, tokenizer.latent_grids[0][0])
        mask = row_mask(rows, *size)
    images = chosen_images(options, command.recipe.data, accelerator.is_main_process, command.run, options.n, generator.columns)
    pixels, count = images.pixels, len(images.pixels)
    if count < options.n:
        say(f"--n {options.n}: there are {count} images")
    condition = image_condition(generator.header, options.label, images)
    repeated = None if condition is None else condition.repeat_interleave(options.continuations, 0)

    with run.numbered("completions", accelerator.is_main_process) as folder:
        codes, reconstructions = encode_and_decode(tokenizer, pixels, config.batch_size)
        repeated_codes = tuple(level.repeat_interleave(options.continuations, 0) for level in codes)
        pictures = generator.continuations(repeated_codes, mask, repeated, options.seed, progress=True)
        if folder is not None:
            run.record(program(), command.arguments, dataclasses.asdict(config))
            shown = torch.stack([pixels, reconstructions, masked_pictures(reconstructions, mask)], 1)
            save_pictures(folder, shown, pictures.view(count, options.continuations, *pictures.shape[1:]))
            details = {
                "n": count,
                "continuations": options.continuations,
                "kept_rows": None if rows is None else [row for row, is_kept in enumerate(rows) if is_kept],
                "rows": tokenizer.latent_grids[0][0],
                "mask": options.mask,
                "seed": options.seed,
                **generator.origin,
                "labels": None if condition is None else condition.tolist(),
            }
            write_json(folder / "completions.json", details)
    if folder is not None:
        known = "all kept ones" if generator.prior is not None and generator.prior.completes_any_mask else "those before it"
        given = "" if generator.header is None else f", each code given {known}"
        print(f"wrote {len(pictures)} continuations of {count} images{given}; look at {run.show(folder / 'completions.png')}")
    finish(accelerator)


def _options(parser: Any) -> None:
    parser.add_argument("--n", type=int, default=8, help="images to complete")
    parser.add_argument("--continuations", type=int, default=5, help="draws per image")
    parser.add_argument("--prefix_rows", type=int, help="rows of codes to keep, from the top (default: half of them)")
    parser.add_argument("--keep_rows", type=str, help="instead: the rows to keep, from 0, for instance 0,1,2,6")
    parser.add_argument("--mask", type=str, help="instead: a picture of the images' size; white is kept, black or transparent drawn")
    image_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    label_option(parser, "all images", "their own, if they have any")
    parser.add_argument("--prior", type=str, help="name of a prior of the run (default: the last finished), or `uniform`")


def _check_options(options: Any) -> None:
    for name in ("n", "continuations"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: expected at least 1, found {getattr(options, name)}")
    for name in ("prefix_rows", "keep_rows"):
        if options.mask is not None and getattr(options, name) is not None:
            raise UserError(f"--mask: expected no --{name.replace('_', '-')} beside it, found {getattr(options, name)}")


def save_pictures(folder: Path, shown: Tensor, continuations: Tensor) -> None:
    """Save completions.png, one row per image, and one PNG per continuation.

    `shown`: (N, k, H, W, C) pictures before the continuations (N, n, H, W, C) in each row.
    """
    grid_rows = torch.cat([shown, continuations], 1)
    grid = image_grid(grid_rows[:_SHOWN].flatten(0, 1), grid_rows.shape[1])
    save_png(folder / "completions.png", grid, grid_scale(shown.shape[2]))
    for number, picture in enumerate(continuations.flatten(0, 1)):
        save_png(folder / "images" / f"{number:05d}.png", picture)


def kept_rows(prefix: int | None, listed: str | None, rows: int) -> list[bool]:
    """Choose the rows of the coarsest grid to keep. Errors: UserError for rows outside the grid."""
    if listed is not None:
        if prefix is not None:
            raise UserError(f"--keep-rows: expected no --prefix-rows beside it, found {prefix}")
        if not re.fullmatch(r"\d+(,\d+)*", listed) or max(map(int, listed.split(","))) >= rows:
            raise UserError(f"--keep-rows: expected rows from 0 to {rows - 1} with commas between them, found {listed}")
        return [row in set(map(int, listed.split(","))) for row in range(rows)]
    prefix = rows // 2 if prefix is None else prefix
    if not 0 <= prefix <= rows:
        raise UserError(f"--prefix-rows: expected 0 to {rows}, the rows of codes, found {prefix}")
    return [row < prefix for row in range(rows)]


def row_mask(rows: list[bool], height: int, width: int) -> Tensor:
    """Compute the mask (H, W) of the pixels in the kept rows of the coarsest grid."""
    return torch.tensor(rows)[torch.arange(height) * len(rows) // height][:, None].expand(height, width)


def masked_pictures(pictures: Tensor, mask: Tensor) -> Tensor:
    """Replace the pixels of pictures (N, H, W, C) outside a mask (H, W) by grey."""
    return pictures.where(mask[..., None], torch.full_like(pictures, _GREY))


if __name__ == "__main__":
    run_entry(main)
