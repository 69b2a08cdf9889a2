"""Plots of training and of the codebook; the only module of stage 1 that imports matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from configs.run_dir import write_bytes

matplotlib.use("agg")


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    write_bytes(path, buffer.getvalue())


def training_graph(path: Path, records: Sequence[dict[str, Any]], names: Sequence[str], references: dict[str, float]) -> None:
    """Plot each metric of metrics.jsonl, training and validation, in its own panel; `references` are horizontal lines in the first."""
    figure = Figure(figsize=(4.2 * len(names), 3.2), layout="constrained")
    for panel, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        drawn = []
        for split, style in (("train", "-"), ("validation", "o-")):
            points = [(record["step"], record[name]) for record in records if record["split"] == split and name in record]
            if points:
                panel.plot(*zip(*points, strict=True), style, label=split, linewidth=1, markersize=3)
                drawn += [value for _, value in points]
        if name == names[0]:
            for label, value in references.items():
                panel.axhline(value, linestyle=":", color="grey")
                panel.annotate(label, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        if drawn and min(drawn) > 0 and max(drawn) > 20 * min(drawn):
            panel.set_yscale("log")
        panel.set(title=name, xlabel="step")
        panel.legend(fontsize=8)
    save_figure(path, figure)


def codebook_picture(path: Path, levels: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """Plot code use: per level, sorted counts and the codes on their two principal axes, coloured by use.

    `levels`: counts (K,) over the validation split and the codebook (K, d), if there is one, per level.
    """
    figure = Figure(figsize=(9.6, 3.8 * len(levels)), layout="constrained")
    for number, (panels, (counts, codebook)) in enumerate(zip(figure.subplots(len(levels), 2, squeeze=False), levels, strict=True)):
        title = f"level {number + 1}: " if len(levels) > 1 else ""
        counts = counts.cpu()
        _draw_use(panels[0], title, counts)
        if codebook is None:
            panels[1].set_axis_off()
        else:
            _draw_codes(panels[1], counts, codebook.detach().cpu().double())
    save_figure(path, figure)


def _draw_use(axes: Axes, title: str, counts: Tensor) -> None:
    used = int((counts > 0).sum())
    axes.fill_between(range(1, len(counts) + 1), counts.sort(descending=True).values, step="mid")
    axes.axhline(float(counts.mean()), linestyle=":", color="grey", label="all codes alike")
    axes.set(title=f"{title}{used} of {len(counts)} codes used", xlabel="codes, most used first", ylabel="uses in the validation split")
    axes.legend(fontsize=8)


def _draw_codes(axes: Axes, counts: Tensor, codebook: Tensor) -> None:
    centred = codebook - codebook.mean(0)
    axes_of_variance = torch.linalg.svd(centred, full_matrices=False)
    points = centred @ axes_of_variance.Vh[:2].T
    points = torch.nn.functional.pad(points, (0, 2 - points.shape[1]))
    explained = float(axes_of_variance.S[:2].square().sum() / axes_of_variance.S.square().sum().clamp(min=1e-30))
    used = counts > 0
    axes.scatter(points[~used, 0], points[~used, 1], marker="x", color="crimson", s=16, label=f"unused: {int((~used).sum())}")
    shown = axes.scatter(points[used, 0], points[used, 1], c=counts[used].log10(), s=16, cmap="viridis", label=f"used: {int(used.sum())}")
    axes.figure.colorbar(shown, ax=axes, label="log10 of uses")
    axes.set(title=f"codes on two principal axes ({explained:.0%} of variance)", xlabel="axis 1", ylabel="axis 2")
    axes.legend(fontsize=8)
