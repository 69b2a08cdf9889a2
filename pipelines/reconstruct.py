"""Reconstruct images: encode them, decode their codes, and measure the error of each image.

    python pipelines/reconstruct.py
    python pipelines/reconstruct.py --split test --n 200
    python pipelines/reconstruct.py --images photo.png FOLDER

Takes the validation split unless --split or --images names others. Writes a new folder reconstructions/NNN into the run:
reconstructions.png (the worst images with their reconstructions, then the best), images/ (each reconstruction as a PNG) and
reconstructions.csv with one row per image, worst first: MSE and PSNR of 8-bit pixels, SSIM (empty below 11 pixels per side), bits of its
codes as indices and, if the run has a finished prior, under that prior.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import math
from typing import Any

import torch
from torch import Tensor

from configs.cli import TRAIN_PRIOR, Command, parse
from configs.errors import UserError, run_entry
from configs.run_dir import program
from pipelines.conditioning import image_condition, label_option
from pipelines.encoding import encode_and_decode
from pipelines.inputs.images import chosen_images, image_options
from pipelines.scoring.panels import Panel, file_names, panels_picture, short, write_table
from pipelines.scoring.surprisals import BATCH_SIZE, surprisals
from stage1_vqvae.metrics import index_bits, psnr, psnr_per_image, squared_errors, ssim_per_image
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.pictures import save_png
from stage2_prior.priors.prior_file import UNIFORM, learned_name, load_finished
from training.batching import batches
from training.processes import finish, start
from training.progress import progress_bar

# Largest number of pairs in reconstructions.png, of the worst and of the best.
_SHOWN = 32


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    command = parse(__doc__, ("compute",), argv, reads_images=True, options=_options)
    options = command.options
    if options.n is not None and options.n < 1:
        raise UserError(f"--n: expected at least 1 image, found {options.n}")
    command.need_tokenizer()
    accelerator = start(command.recipe.compute)
    finish(accelerator)  # the work takes one process
    if accelerator.is_main_process:
        _reconstruct(command, accelerator.device)


def _options(parser: Any) -> None:
    image_options(parser)
    parser.add_argument("--n", type=int | None, help="number of images, evenly spaced (default: all)")
    parser.add_argument("--prior", type=str, help=f"prior for the bits (default: the last finished, if any), or `{UNIFORM}`")
    label_option(parser, "all images", "their own, if they have any")


def _reconstruct(command: Command, device: torch.device) -> None:
    run, options = command.run, command.options
    tokenizer = load_tokenizer(run, device)
    learned = learned_name(run, options.prior)
    scorer = None if learned is None else load_finished(run, learned, command.next(TRAIN_PRIOR), device)
    header = None if scorer is None else scorer.header
    columns = () if header is None else header.condition.columns
    images = chosen_images(options, command.recipe.data, progress=True, run=command.run, count=options.n, columns=columns)
    condition = image_condition(header, options.label, images, lenient=True)

    with run.numbered("reconstructions") as folder:
        assert folder is not None
        codes, pictures = encode_and_decode(tokenizer, images.pixels, BATCH_SIZE, progress=True)
        scores = quality(pictures, images.pixels, progress=True)
        scores["bits_as_indices"] = torch.full((len(pictures),), index_bits(tokenizer.grids, tokenizer.quantizer.num_codes))
        bits = None if scorer is None else surprisals(scorer.prior, codes, condition, "bits under the prior", progress=True).sum(1)
        scores["bits_under_prior"] = torch.full((len(pictures),), torch.nan) if bits is None else bits
        order = scores["mse"].argsort(descending=True, stable=True).tolist()
        files = file_names(images.names)
        shown_labels = images.labels or [""] * len(pictures)
        rows = [
            {
                "name": images.names[row],
                "label": shown_labels[row],
                **{name: values[row].item() for name, values in scores.items()},
                "file": f"images/{files[row]}",
            }
            for row in order
        ]
        for row in order:
            save_png(folder / "images" / files[row], pictures[row])
        panels_picture(folder / "reconstructions.png", pairs(images.pixels[order], pictures[order], rows))
        write_table(folder / "reconstructions.csv", rows)
        run.record(program(), command.arguments, {"prior": UNIFORM if scorer is None else scorer.name, "images": len(rows)})
    error = float(scores["mse"].mean())
    coded = f"{rows[0]['bits_as_indices']:.0f} bits as indices"
    if scorer is not None and bits is not None:
        coded += f", {'' if scorer.prior.exact else 'at most '}{float(bits.mean()):.0f} under the prior {scorer.name}"
    print(f"mean of {len(rows)} images: MSE {error:.5f} (PSNR {psnr(error):.2f} dB), SSIM {float(scores['ssim'].mean()):.3f}, {coded}")
    print("worst: " + ", ".join(f"{row['name']} ({row['psnr']:.1f} dB)" for row in rows[:3]))
    print(f"wrote {run.show(folder / 'reconstructions.csv')}; look at {run.show(folder / 'reconstructions.png')}")


def quality(pictures: Tensor, originals: Tensor, progress: bool = False) -> dict[str, Tensor]:
    """Compute mse, psnr (dB) and ssim per image, (N,), float64, of uint8 (N, H, W, C). SSIM is NaN below 11 pixels per side."""
    parts = []
    with progress_bar(len(pictures), "compare", "img", shown=progress) as bar:
        for part in batches(len(pictures), BATCH_SIZE):
            mse = squared_errors(pictures[part], originals[part])
            parts.append(torch.stack([mse, psnr_per_image(mse), ssim_per_image(pictures[part], originals[part])]))
            bar.update(part.stop - part.start)
    return dict(zip(("mse", "psnr", "ssim"), torch.cat(parts, 1), strict=True))


def pairs(originals: Tensor, pictures: Tensor, rows: list[dict[str, Any]]) -> list[tuple[str, list[Panel]]]:
    """Build the panels of the worst and the best images, none twice, with their reconstructions; both uint8 (N, H, W, C), worst first."""
    count = len(rows)
    chosen = {
        "worst: original, reconstruction": range(min(_SHOWN, (count + 1) // 2)),
        "best: original, reconstruction": range(count - 1, count - 1 - min(_SHOWN, count // 2), -1),
    }
    return [
        (title, [Panel(torch.stack([originals[row], pictures[row]]), _caption(rows[row])) for row in numbers])
        for title, numbers in chosen.items()
        if numbers
    ]


def _caption(row: dict[str, Any]) -> str:
    ssim = "" if math.isnan(row["ssim"]) else f", SSIM {row['ssim']:.2f}"
    return f"{short(row['name'])}\n{row['psnr']:.1f} dB{ssim}"


if __name__ == "__main__":
    run_entry(main)
