"""Complete images: keep some rows of their codes, and let the prior draw the others, several times.

    python pipelines/complete.py --prefix-rows 4
    python pipelines/complete.py --keep-rows 0,1,2,6 --n 8 --continuations 6
    python pipelines/complete.py --prefix-rows 8 --images FOLDER --label 3

The images are spread evenly over the validation split, with their labels, or over a folder. Rows are those of the
(coarsest) grid of codes, from the top. A drawn row follows from what is above it: kept rows further down stay, but the
prior has not seen them when it draws. Writes a new folder samples/NNN into the run: completions.png with an image a row (the
image, its reconstruction, what is kept of it, its continuations), an image a continuation, completions.json.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from typing import Any

import torch
from torch import Tensor

from configs.cli import TRAIN_TOKENIZER, parse
from configs.errors import UserError, run_entry
from configs.run_dir import program, write_json
from configs.schema import Data
from pipelines.drawing import check_guidance, chosen_prior, draw_images, labels_of
from stage1_vqvae.images import VALIDATION, ImageSource, batches, load_images, to_model, to_uint8
from stage1_vqvae.model import VQVAE, load_tokenizer
from stage1_vqvae.plots import grid_scale, image_grid, save_png
from stage1_vqvae.quantizers.contract import Codes
from stage1_vqvae.training.processes import start
from stage2_prior.prior_file import PriorHeader

_GREY = 128
# Images in completions.png at most; all continuations lie beside it.
_SHOWN = 32


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command = parse(__doc__, ("sampling", "compute"), argv, flat="sampling", options=_options)
    run, config, options = command.run, command.recipe.sampling, command.options
    for name in ("n", "continuations"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: expected at least 1, found {getattr(options, name)}")
    if not run.tokenizer.exists():
        raise UserError(f"{run}: stage 1 has not finished; run first: {TRAIN_TOKENIZER} --resume --run {run}")
    accelerator = start(command.recipe.compute)
    tokenizer = load_tokenizer(run, accelerator.device)
    rows = kept_rows(options.prefix_rows, options.keep_rows, tokenizer.grids[0][0])
    chosen = chosen_prior(command, accelerator)
    source = _images(command.recipe.data, options.images, progress=accelerator.is_main_process)
    everything = torch.cat([split.pixels for split in source.splits.values()])
    count = min(options.n, len(everything))
    if count < options.n:
        accelerator.print(f"--n {options.n}: there are {count} images")
    # Sources are often sorted by label.
    which = torch.arange(count) * len(everything) // count
    pixels = everything[which]
    labels = _labels(options.label, source, which, chosen.header)
    repeated = None if labels is None else labels.repeat_interleave(options.continuations)
    check_guidance(accelerator, config, repeated, chosen.header)

    folder = run.new_samples() if accelerator.is_main_process else None
    try:
        with torch.no_grad():
            parts = [tokenizer.encode(to_model(pixels[part].to(accelerator.device))) for part in batches(len(pixels), config.batch_size)]
            reconstructions = torch.cat([to_uint8(tokenizer.decode(codes)).cpu() for codes in parts])
        given = tuple(torch.cat(level).cpu().repeat_interleave(options.continuations, 0) for level in zip(*parts, strict=True))
        _, pictures = draw_images(
            accelerator, tokenizer, chosen.prior, repeated, len(given[0]), options.seed, config, given, kept_codes(tokenizer, rows)
        )
        if folder is not None:
            run.record(program(), command.arguments, dataclasses.asdict(config))
            continuations = pictures.view(count, options.continuations, *pictures.shape[1:])
            shown = torch.cat([torch.stack([pixels, reconstructions, kept_part(reconstructions, rows)], 1), continuations], 1)
            grid = image_grid(shown[:_SHOWN].flatten(0, 1), shown.shape[1])
            save_png(folder / "completions.png", grid, grid_scale(pixels.shape[1]))
            for number, picture in enumerate(pictures):
                save_png(folder / "images" / f"{number:05d}.png", picture)
            details = {
                "n": count,
                "continuations": options.continuations,
                "kept_rows": [row for row, kept in enumerate(rows) if kept],
                "rows": len(rows),
                "seed": options.seed,
                **chosen.details,
                "labels": None if labels is None else labels.tolist(),
            }
            write_json(folder / "completions.json", details)
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder)
        raise
    if folder is not None:
        print(f"wrote {len(pictures)} continuations of {count} images; look at {run.show(folder / 'completions.png')}")
    accelerator.end_training()


def _options(parser: Any) -> None:
    parser.add_argument("--n", type=int, default=8, help="images to complete")
    parser.add_argument("--continuations", type=int, default=5, help="draws for each of them")
    parser.add_argument("--prefix_rows", type=int, help="rows of codes to keep, from the top (default: half of them)")
    parser.add_argument("--keep_rows", type=str | None, help="the rows to keep instead, from 0, for instance 0,1,2,6")
    parser.add_argument("--images", type=str | None, help="a folder of images (default: the run's validation split)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    parser.add_argument("--label", type=str | None, help="label of all images, by name or number (default: the validation split's own)")
    parser.add_argument("--prior", type=str | None, help="name of a prior of the run (default: the last finished), or `uniform`")


def kept_rows(prefix: int | None, listed: str | None, rows: int) -> list[bool]:
    """Which of the coarsest grid's rows to keep. Errors: UserError for rows there are not."""
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


def kept_codes(tokenizer: VQVAE, rows: list[bool]) -> Codes:
    """Masks (h, w) a level: a finer level keeps what lies under the coarsest one's rows."""
    coarse = torch.tensor(rows)
    return tuple(coarse[torch.arange(h) * len(rows) // h][:, None].expand(h, w) for h, w in tokenizer.grids)


def kept_part(pictures: Tensor, rows: list[bool]) -> Tensor:
    """Pictures (N, H, W, C) with grey where nothing is kept."""
    height = pictures.shape[1]
    kept = torch.tensor(rows)[torch.arange(height) * len(rows) // height]
    return pictures.where(kept[:, None, None], torch.full_like(pictures, _GREY))


def _images(data: Data, folder: str | None, progress: bool) -> ImageSource:
    """The validation split of the run's data, or all images of a folder."""
    if folder is None:
        return load_images(data, [VALIDATION], progress)
    return load_images(dataclasses.replace(data, name=None, path=folder), progress=progress, hold_out=False)


def _labels(asked: str | None, source: ImageSource, which: Tensor, header: PriorHeader | None) -> Tensor | None:
    """Of the images `which`: as asked, or its own, if the prior knows that name; images without one are drawn without.

    Errors: UserError for a label that the prior does not know, or none, where it needs one.
    """
    if asked is not None or header is None or header.label_names is None:
        return labels_of(asked, len(which), header)
    own = [split.labels for split in source.splits.values() if split.labels is not None]
    if own and source.label_names is not None:
        # By name: the numbers are those of the prior's data, in which a label more or less may have moved them.
        names = [source.label_names[label] for label in torch.cat(own)[which].tolist()]
        unknown = sorted(set(names) - set(header.label_names))
        if unknown:
            known = ", ".join(header.label_names[:10])
            raise UserError(f"--label: expected images with labels that the prior knows ({known}), or one for all, found {unknown[0]}")
        return torch.tensor([header.label_names.index(name) for name in names])
    if not header.knows_no_label:
        raise UserError("--label: expected one, for a prior trained with stage2.label_dropout 0, found none")
    return None


if __name__ == "__main__":
    run_entry(main)
