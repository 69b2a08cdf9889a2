"""Find unusual images: bits per code under the prior, as a heat map over each picture and a ranked list.

    python pipelines/anomalies.py --images FOLDER
    python pipelines/anomalies.py --images FOLDER --label 7
    python pipelines/anomalies.py --split test --prior pixelcnn

An image's score is the bits of its codes, -log2 p, each given those before it and the image's label, if the prior knows it. A second
column has the percentage of validation images with fewer bits. Images of another kind can have few bits, above all simple ones (Nalisnick
et al. 2019, "Do deep generative models know what they don't know?"; Serra et al. 2020, "Input complexity and out-of-distribution
detection"). Content that codes cannot represent raises a second score: the reconstruction's squared error, relative to the validation
split's mean.

Writes a new folder anomalies/NNN into the run: anomalies.csv (one row per image, most bits first), anomalies.png (images,
reconstructions and heat maps of the images with most bits, largest errors and fewest bits) and maps/ (each image's heat map). In
captions, "> 99.0 %" means more bits than 99 % of the validation images, "error x 4.1" 4.1 times their mean error.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from configs.cli import EXTRACT_CODES, TRAIN_PRIOR, Command, parse
from configs.errors import UserError, run_entry, say
from configs.run_dir import program, read_json
from pipelines.conditioning import image_condition, label_option
from pipelines.encoding import encode_and_decode
from pipelines.inputs.images import Images, chosen_images, image_options
from pipelines.scoring.heat_maps import colour_scale, heat_maps, overlaid
from pipelines.scoring.panels import Panel, file_names, panels_picture, short, write_table
from pipelines.scoring.surprisals import BATCH_SIZE, surprisals
from stage1_vqvae.data.splits import VALIDATION
from stage1_vqvae.metrics import squared_errors
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.pictures import save_png
from stage2_prior.codes.store import CodeStore
from stage2_prior.priors.prior_file import LoadedPrior, load_finished
from stage2_prior.priors.stepwise import stepwise
from training.batching import batches
from training.processes import finish, start
from training.weights_file import fingerprint

# Tolerance in bits: an image's total may differ this much between batches, and must not count as below itself.
_ROUNDING = 1e-3


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    command = parse(__doc__, ("compute",), argv, reads_images=True, options=_options)
    if command.options.top < 1:
        raise UserError(f"--top: expected at least 1 image, found {command.options.top}")
    command.need_tokenizer()
    accelerator = start(command.recipe.compute)
    finish(accelerator)  # the work takes one process
    if accelerator.is_main_process:
        _find_anomalies(command, accelerator.device)


def _options(parser: Any) -> None:
    image_options(parser)
    parser.add_argument("--top", type=int, default=16, help="images with most bits in anomalies.png, and half as many of each other kind")
    parser.add_argument("--prior", type=str, help="name of a prior of the run (default: the last finished)")
    label_option(parser, "all images", "their own, if they have any")


def _find_anomalies(command: Command, device: torch.device) -> None:
    run, options = command.run, command.options
    scorer = load_finished(run, options.prior, command.next(TRAIN_PRIOR), device)
    stepwise(scorer.prior, "anomalies", scorer.header.config.kind)  # bits of a code given those before it
    tokenizer = load_tokenizer(run, device)
    images = chosen_images(options, command.recipe.data, progress=True, run=command.run, columns=scorer.header.condition.columns)
    condition = image_condition(scorer.header, options.label, images, lenient=True)
    reference_bits = validation_bits(command, scorer, conditional=condition is not None)
    if reference_bits is None:
        print(f"no comparison with the validation images: there are no codes of any that the prior knows; {command.next(EXTRACT_CODES)}")

    with run.numbered("anomalies") as folder:
        assert folder is not None
        codes, pictures = encode_and_decode(tokenizer, images.pixels, BATCH_SIZE, progress=True)
        bits = surprisals(scorer.prior, codes, condition, "bits", progress=True)
        errors = torch.cat([squared_errors(pictures[part], images.pixels[part]) for part in batches(len(pictures), BATCH_SIZE)])
        files = file_names(images.names)
        order = bits.sum(1).argsort(descending=True, stable=True).tolist()
        mean_error = read_json(run.stage1 / "report.json")["validation"]["mse"]
        rows = table_rows(images, files, bits, errors, reference_bits, mean_error, order)
        layout = scorer.prior.layout
        heat, colours = heat_maps(bits, layout), colour_scale(layout)
        for row in order:
            save_png(folder / "maps" / files[row], overlaid(images.pixels[row], heat[row], colours))

        def panel(position: int) -> Panel:
            row = order[position]
            three = images.pixels[row], pictures[row], overlaid(images.pixels[row], heat[row], colours)
            return Panel(torch.stack([picture.expand(-1, -1, 3) for picture in three]), caption(rows[position]))

        blocks = [
            (title, [panel(position) for position in positions]) for title, positions in panel_positions(errors[order], options.top).items()
        ]
        patch = " x ".join(str(side // cells) for side, cells in zip(images.pixels.shape[1:3], heat.shape[1:], strict=True))
        panels_picture(folder / "anomalies.png", blocks, colours, f"bits of each patch of {patch} pixels")
        write_table(folder / "anomalies.csv", rows)
        run.record(program(), command.arguments, {"prior": scorer.name, "images": len(rows)})
    for title, first_rows in (("most bits", rows[:3]), ("largest errors", sorted(rows, key=lambda row: -row["mse"])[:3])):
        print(f"{title}:", "; ".join(caption(row).replace("\n", ": ") for row in first_rows))
    where = f"{run.show(folder / 'anomalies.csv')}; look at {run.show(folder / 'anomalies.png')}"
    print(f"ranked {len(rows)} images by their bits under the prior {scorer.name}: {where}")


def table_rows(
    images: Images,
    files: Sequence[str],
    bits: Tensor,
    errors: Tensor,
    reference_bits: Tensor | None,
    mean_error: float,
    order: Sequence[int],
) -> list[dict[str, Any]]:
    """Build the rows of anomalies.csv, in the given order of images.

    Args:
        images: the N scored images.
        files: names of their heat maps.
        bits: (N, T) bits of their codes.
        errors: (N,) squared errors of their reconstructions.
        reference_bits: (M,) bits of the validation images; None: unknown.
        mean_error: mean squared error of the validation images.
        order: rows of the images.
    """
    totals = bits.sum(1)
    percent = torch.full_like(totals, torch.nan) if reference_bits is None else percent_below(totals, reference_bits)
    return [
        {
            "rank": rank,
            "name": images.names[row],
            "label": "" if images.labels is None else images.labels[row],
            "bits": totals[row].item(),
            "bits_per_token": totals[row].item() / bits.shape[1],
            "percent_of_validation_below": percent[row].item(),
            "mse": errors[row].item(),
            "mse_over_validation_mean": errors[row].item() / mean_error,
            "file": f"maps/{files[row]}",
        }
        for rank, row in enumerate(order, 1)
    ]


def validation_bits(command: Command, scorer: LoadedPrior, conditional: bool) -> Tensor | None:
    """Compute the bits (N,) of the validation images, with or without condition; None without codes, or if all classes are unknown."""
    folder = command.run.codes / VALIDATION
    if not folder.is_dir():
        return None
    store = CodeStore(folder, fingerprint(command.run.tokenizer))
    condition, rows = None, torch.arange(len(store))
    if conditional:
        stored = store.translated(scorer.header.condition)
        rows = rows[:0] if stored is None else torch.nonzero(scorer.header.condition.known(stored))[:, 0]
        condition = None if stored is None else stored[rows]
        if len(rows) < len(store):
            say(f"compared with {len(rows):,} of {len(store):,} validation images: the prior does not know the labels of the others")
    return surprisals(scorer.prior, store.codes(rows), condition, "bits of validation", progress=True).sum(1) if len(rows) else None


def percent_below(values: Tensor, reference: Tensor) -> Tensor:
    """Compute for each of the values (N,) the percentage of reference values (M,) below it, (N,)."""
    return 100 * torch.searchsorted(reference.sort().values, values - _ROUNDING).double() / len(reference)


def panel_positions(errors: Tensor, top: int) -> dict[str, list[int]]:
    """Choose the images under each title, none twice. `errors`: (N,) errors of all images, in descending order of bits."""
    most, half = list(range(len(errors)))[:top], (top + 1) // 2
    rest = range(len(most), len(errors))
    largest = sorted(rest, key=lambda position: -errors[position].item())[:half]
    fewest = [position for position in reversed(rest) if position not in largest][:half]
    titles = {"most bits": most, "largest errors of the others": largest, "fewest bits": fewest}
    return {f"{title}: image, reconstruction, bits": positions for title, positions in titles.items() if positions}


def caption(row: dict[str, Any]) -> str:
    """Return a caption: an image's name and, on a second line, its scores."""
    percent = row["percent_of_validation_below"]
    compared = "" if math.isnan(percent) else f" (> {percent:.1f} %)"
    return f"{short(row['name'])}\n{row['bits']:.0f} bits{compared}, error x {row['mse_over_validation_mean']:.1f}"


if __name__ == "__main__":
    run_entry(main)
