"""Validation of stage 1: metrics and codebook health over a split, pictures, and the stage's results."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError
from configs.run_dir import RunDir, write_json
from stage1_vqvae.data.loader import read_rows
from stage1_vqvae.data.pixels import to_model, to_uint8
from stage1_vqvae.data.splits import ImageSplit
from stage1_vqvae.metrics import index_bits, perplexity, psnr, raw_bits, squared_errors, usage
from stage1_vqvae.model import VQVAE, save_tokenizer
from stage1_vqvae.monitoring.health import Health, checksum, collapse_warning, examine
from stage1_vqvae.pictures import grid_scale, image_grid, reconstruction_grid, save_png
from stage1_vqvae.plots import codebook_picture, training_graph
from stage1_vqvae.quantizers.contract import level_counts
from training.batching import batches
from training.devices import float64_device
from training.metrics_log import read_metrics
from training.prefetch import read_to
from training.processes import summed
from training.progress import progress_bar

_SHOWN_IMAGES = 32


@dataclass(frozen=True)
class ValidationResult:
    """Result of a validation pass."""

    metrics: dict[str, float]
    """mse (on 8-bit pixels as [0, 1]), loss (without entropy terms, which exist in training alone), the objective's loss terms by name,
    psnr, usage, perplexity.
    """
    counts: list[Tensor]
    """Number of times that each code was chosen, (K,) per level."""


@torch.no_grad()
def validate(accelerator: Accelerator, tokenizer: VQVAE, validation: ImageSplit, batch_size: int) -> ValidationResult:
    """Measure a split, each image once, divided over the ranks; `batch_size`: images at once per rank."""
    tokenizer.eval()
    mine = torch.arange(len(validation))[accelerator.process_index :: accelerator.num_processes]  # empty with fewer images than ranks
    zero = torch.zeros((), device=accelerator.device)
    names = tokenizer.objective.loss_names
    totals = {"mse": zero.to(float64_device(accelerator.device)), "loss": zero, **dict.fromkeys(names, zero)}
    totals |= {f"counts/{level}": zero.expand(k) for level, k in enumerate(tokenizer.quantizer.num_codes)}
    with progress_bar(len(mine), "validate", "img", within=True) as bar:
        slices = batches(len(mine), batch_size)
        for (pixels,) in read_to(accelerator.device, lambda rows: (read_rows(validation.pixels, mine[rows]),), slices):
            output = tokenizer(to_model(pixels))
            found = {"mse": squared_errors(to_uint8(output.reconstruction), pixels).sum()}
            found["loss"] = torch.stack(list(output.losses.values())).sum() * len(pixels)
            found |= {name: output.losses[name] * len(pixels) for name in names}
            found |= {f"counts/{level}": counts for level, counts in enumerate(level_counts(output.statistics))}
            totals = {name: total + found[name] for name, total in totals.items()}
            bar.update(len(pixels))
    totals = summed(accelerator, totals)
    counts = [totals.pop(f"counts/{level}") for level in range(len(tokenizer.quantizer.num_codes))]
    means = {name: float(total) / len(validation) for name, total in totals.items()}
    return ValidationResult({**means, "psnr": psnr(means["mse"]), "usage": usage(*counts), "perplexity": perplexity(*counts)}, counts)


def check_equal_codebooks(accelerator: Accelerator, tokenizer: VQVAE, step: int) -> None:
    """Errors: UserError if the ranks' quantizers are not equal bit for bit."""
    mine = torch.tensor([checksum(tokenizer.quantizer)], device=accelerator.device)
    checksums = accelerator.gather(mine).tolist()
    if len(set(checksums)) > 1:
        found = ", ".join(f"{value:x}" for value in checksums)
        raise UserError(f"step {step}: expected equal codebooks on all processes, found checksums {found}")


def save_health(run: RunDir, tokenizer: VQVAE, counts: list[Tensor], step: int, processes: int) -> None:
    """Write codebook.json, which doctor.py prints, and codebook.png; after `check_equal_codebooks`."""
    quantizer = tokenizer.quantizer
    vectors = [codebook.vectors() for codebook in quantizer.codebooks()]
    levels = [(used, vectors[quantizer.codebook_of(level)].detach() if vectors else None) for level, used in enumerate(counts)]
    health = Health(
        step=step,
        processes=processes,
        checksum=f"{checksum(quantizer):016x}",
        levels=[examine(*level) for level in levels],
        warning=collapse_warning(counts, quantizer, tokenizer.config),
    )
    write_json(run.codebook_health, dataclasses.asdict(health))
    codebook_picture(run.stage1 / "codebook.png", levels)


@torch.no_grad()
def save_reconstructions(run: RunDir, tokenizer: VQVAE, validation: ImageSplit, step: int, device: torch.device) -> None:
    """Draw originals over reconstructions, of the same validation images each time."""
    rows = torch.arange(len(validation))[:: max(1, len(validation) // _SHOWN_IMAGES)][:_SHOWN_IMAGES]
    originals = validation.pixels[rows]
    pictures = to_uint8(tokenizer(to_model(originals.to(device))).reconstruction).cpu()
    grid = reconstruction_grid(originals, pictures, columns=16)
    save_png(run.stage1 / "reconstructions" / f"step-{step:09d}.png", grid, grid_scale(originals.shape[1]))


@torch.no_grad()
def save_grids(run: RunDir, tokenizer: VQVAE, validation: ImageSplit, device: torch.device) -> None:
    """Draw, for several grids: originals, and below them images of the coarsest grid alone, of the two coarsest, and so on."""
    count = len(tokenizer.quantizers)
    if count == 1:
        return
    rows = torch.arange(len(validation))[:: max(1, len(validation) // _SHOWN_IMAGES)][: _SHOWN_IMAGES // 2]
    originals = validation.pixels[rows]
    codes = tokenizer.encode(to_model(originals.to(device)))
    decoded = [to_uint8(tokenizer.decode_coarsest(codes, grids)).cpu() for grids in range(1, count + 1)]
    save_png(run.stage1 / "grids.png", image_grid(torch.cat([originals, *decoded]), len(originals)), grid_scale(originals.shape[1]))


def save_report(run: RunDir, tokenizer: VQVAE, steps: int, minutes: float, result: ValidationResult) -> None:
    """Write stage1/report.json, and print its main figures."""
    channels, height, width = tokenizer.image_shape
    report, num_codes = result.metrics, tokenizer.quantizer.num_codes
    bits = {"raw": raw_bits(height, width, channels), "indices": index_bits(tokenizer.grids, num_codes)}
    write_json(run.stage1 / "report.json", {"steps": steps, "minutes": minutes, "validation": report, "bits_per_image": bits})
    shown = {"mse": ".5f", "psnr": ".2f", "usage": ".1%", "perplexity": ".1f"}
    print("validation: " + ", ".join(f"{name} {report[name]:{form}}" for name, form in shown.items()))
    grids = " + ".join(f"{h}x{w} codes of {k}" for (h, w), k in zip(tokenizer.grids, num_codes, strict=True))
    print(f"an image: {bits['raw']} bits raw, {bits['indices']:.0f} as {grids}; ratio {bits['raw'] / bits['indices']:.1f}")


def write_results(run: RunDir, tokenizer: VQVAE, steps: int, minutes: float, result: ValidationResult) -> None:
    """Write report and pictures, and last the tokenizer, whose presence marks stage 1 as finished."""
    # Validation has no loss terms on images: with them, the graph shows the objective's loss alone.
    records = read_metrics(run.stage1 / "metrics.jsonl")
    terms = any("perceptual" in record or "adversarial" in record for record in records)
    names = ("reconstruction" if terms else "loss", "psnr", "usage", "perplexity")
    training_graph(run.stage1 / "training.png", records, names, {})
    save_report(run, tokenizer, steps, minutes, result)
    save_tokenizer(run.tokenizer, tokenizer, steps)
    print(f"wrote {run.show(run.tokenizer)}; pictures in {run.show(run.stage1)}: reconstructions, training.png, codebook.png")
