"""The likelihood report of a prior: as JSON, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure

from configs.markdown import escaped, markdown_table
from configs.run_dir import write_json, write_text
from stage1_vqvae.metrics import index_bits, raw_bits
from stage1_vqvae.plots import save_figure
from stage2_prior.codes.store import CodeStore
from stage2_prior.likelihood.bits import mean_over_tokens, measure, turning_point, uniform_bits, unigram_bits
from stage2_prior.priors.contract import Prior
from training.randomness import generator


def likelihood_report(
    accelerator: Accelerator,
    prior: Prior,
    training: CodeStore,
    validation: CodeStore,
    batch_size: int,
    validations: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Compute the content of likelihood.json: bits per token of the levels that the prior models, unless a name says otherwise.

    The training figure is over a fixed random subset of as many images as validation has.

    Args:
        batch_size: images per batch on each process.
        validations: records of validation in metrics.jsonl, for the step at which overfitting began.
    """
    manifest, levels = validation.manifest, prior.levels
    grids, num_codes = manifest.grids[levels], manifest.num_codes[levels]
    subset = torch.randperm(len(training), generator=generator(0, "likelihood of training images"))[: len(validation)]
    on_training = measure(accelerator, prior, training, subset.sort().values, batch_size)
    on_validation = measure(accelerator, prior, validation, torch.arange(len(validation)), batch_size)
    uniform, unigram = uniform_bits(num_codes), unigram_bits(training, validation)[levels]
    references = {"unigram": mean_over_tokens(unigram, grids), "uniform": mean_over_tokens(uniform, grids)}
    channels, height, width = manifest.image_shape
    raw = raw_bits(height, width, channels)
    coded = on_validation.mean * prior.layout.length
    positions = on_validation.positions.split(prior.layout.lengths)
    return {
        "exact": prior.exact,
        "images": {"train": on_training.images, "validation": on_validation.images},
        "train": on_training.mean,
        "validation": on_validation.mean,
        **references,
        "saved_percent": {name: 100 * (1 - on_validation.mean / reference) for name, reference in references.items()},
        "bits_per_image": {"raw": raw, "indices": index_bits(grids, num_codes), "prior": coded},
        # Codes only. evaluate.py adds the pixels given the codes, if the objective is a likelihood.
        "codes_bits_per_dim": coded / (channels * height * width),
        "levels": [
            {"grid": grid, "num_codes": k, "uniform": flat, "unigram": frequent, "validation": float(bits.mean())}
            for grid, k, flat, frequent, bits in zip(grids, num_codes, uniform, unigram, positions, strict=True)
        ],
        "positions": [bits.view(grid).tolist() for grid, bits in zip(grids, positions, strict=True)],
        "labels": on_validation.classes,
        "validation_turned_at_step": turned_at(validations),
    }


def turned_at(validations: Sequence[dict[str, Any]]) -> int | None:
    """Return the step of the validation after which the prior overfits; None: it does not."""
    if not validations:
        return None
    index = turning_point(*([record[key] for record in validations] for key in ("bits_per_token", "train_bits_per_token")))
    return None if index is None else validations[index]["step"]


def write_report(folder: Path, name: str, report: dict[str, Any]) -> None:
    """Write likelihood.json, likelihood.md and likelihood.png into the prior's folder."""
    write_json(folder / "likelihood.json", report)
    write_text(folder / "likelihood.md", markdown(name, report))
    picture(folder / "likelihood.png", report)


def markdown(name: str, report: dict[str, Any]) -> str:
    """Render the report as Markdown tables."""
    saved, images, per_image = report["saved_percent"], report["images"], report["bits_per_image"]
    at_most = "" if report["exact"] else "at most "
    rows = [
        ["uniform (log2 K)", f"{report['uniform']:.3f}", f"{saved['uniform']:.1f} %"],
        ["unigram (training frequencies)", f"{report['unigram']:.3f}", f"{saved['unigram']:.1f} %"],
        [f"prior, {images['validation']} validation images", f"{at_most}{report['validation']:.3f}", ""],
        [f"prior, {images['train']} training images", f"{at_most}{report['train']:.3f}", ""],
    ]
    lines = [
        f"# Likelihood of prior {escaped(name)}",
        "",
        *([] if report["exact"] else ["The prior's figures are upper bounds of its bits per token.", ""]),
        *markdown_table(["bits per token", "", "saved by the prior"], rows),
        "",
        f"An image: {per_image['raw']} bits raw, {per_image['indices']:.0f} as indices, {at_most}{per_image['prior']:.0f} under the prior; "
        f"the codes are {report['codes_bits_per_dim']:.4f} bits per dimension (codes only, without the pixels given the codes).",
        "",
    ]
    turned = report["validation_turned_at_step"]
    lines += (
        [f"Validation turned after step {turned}: from then on the prior memorised its training images.", ""] if turned is not None else []
    )
    figures = ("uniform", "unigram", "validation")
    levels = [
        [str(number), " x ".join(map(str, level["grid"])), str(level["num_codes"]), *(f"{level[key]:.3f}" for key in figures)]
        for number, level in enumerate(report["levels"], 1)
    ]
    lines += markdown_table(["level", "grid", "K", "uniform", "unigram", "prior"], levels)
    if report["labels"]:
        lines += ["", *markdown_table(["label", "bits per token"], [[label, f"{value:.3f}"] for label, value in report["labels"].items()])]
    return "\n".join([*lines, ""])


def picture(path: Path, report: dict[str, Any]) -> None:
    """Save a heat map of the bits of each position per level, on one scale, and a bar per label."""
    panels = len(report["positions"]) + bool(report["labels"])
    figure = Figure(figsize=(4.4 * panels, 3.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    flat = [value for grid in report["positions"] for row in grid for value in row]
    for number, (panel, grid) in enumerate(zip(axes[: len(report["positions"])], report["positions"], strict=True)):
        shown = panel.imshow(grid, vmin=min(flat), vmax=max(flat), cmap="magma")
        panel.set(title=f"level {number + 1}: bits of each position", xlabel="column", ylabel="row")
    figure.colorbar(shown, ax=list(axes[: len(report["positions"])]))
    if report["labels"]:
        names, values = zip(*report["labels"].items(), strict=True)
        axes[-1].barh(range(len(names)), values)
        axes[-1].axvline(report["validation"], linestyle=":", color="grey")
        axes[-1].invert_yaxis()
        axes[-1].set(title="bits per token, by label", xlabel=f"dotted: all, {report['validation']:.3f}")
        if len(names) <= 30:
            axes[-1].set_yticks(range(len(names)), names)
    save_figure(path, figure)
