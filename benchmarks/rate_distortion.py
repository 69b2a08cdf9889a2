"""Rate-distortion of a run's codec against Pillow's JPEG, WebP and AVIF, on the run's validation images.

    python benchmarks/rate_distortion.py runs/digits --output docs/rate_distortion_digits.png
    python benchmarks/rate_distortion.py runs/cifar10 runs/cifar10_4x4 --images 1000

Prints a Markdown table and plots all qualities; several runs must have the same images. Files of small images are mostly header in all
three formats, so each has two rows: one file per image, and one mosaic of all images with a single header. In the mosaic each image is
padded with its edge pixels to a multiple of 16, so that no block spans two images; padding does not count as error. The table shows the
quality nearest to ours in size (mosaic: our payload; files: our file) and the one nearest in PSNR. Colour is 4:2:0 in all three, JPEG's
Huffman tables are optimised, WebP's method is 6, AVIF's speed 4. SSIM is of about 200 of the images. The run's weights are not counted.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from PIL import Image
from torch import Tensor

from configs.cli import TRAIN_PRIOR
from configs.errors import UserError, run_entry
from configs.recipe_file import load_recipe
from configs.run_dir import RunDir
from pipelines.codec.code_file import CodeFile, pack, run_fingerprint
from pipelines.codec.coder import code_batch_size, encode
from pipelines.conditioning import image_condition
from pipelines.encoding import encode_and_decode
from pipelines.inputs.images import Images, chosen_images
from stage1_vqvae.metrics import index_bits, psnr, squared_errors, ssim_per_image
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.pictures import square_columns
from stage1_vqvae.plots import save_figure
from stage2_prior.priors.prior_file import finished_prior, load_finished
from stage2_prior.priors.stepwise import stepwise
from training.weights_file import fingerprint

_QUALITIES = (1, 5, 10, 15, 20, 30, 40, 55, 70, 85)
_SETTINGS: dict[str, dict[str, Any]] = {"JPEG": {"optimize": True}, "WebP": {"method": 6}, "AVIF": {"speed": 4, "max_threads": 1}}
_BLOCK = 16
_BATCH = 64
# It takes 15 ms per image, and there are 60 points.
_SSIM_IMAGES = 200


class Point(NamedTuple):
    """Rate and distortion of a codec at one setting."""

    codec: str
    setting: str
    size: float
    """Bytes per image."""
    mse: float
    ssim: float


def evaluate(codec: str, setting: str, size: float, decoded: Tensor, pixels: Tensor) -> Point:
    """Compute a codec's point: its size, and the error of `decoded` against `pixels`, both uint8 (N, H, W, C)."""
    subset = slice(None, None, max(1, len(pixels) // _SSIM_IMAGES))
    ssim = float(ssim_per_image(decoded[subset], pixels[subset]).mean())
    return Point(codec, setting, size, float(squared_errors(decoded, pixels).mean()), ssim)


def ours(run: RunDir, images: Images, prior_name: str | None) -> tuple[list[Point], str]:
    """Compute our points (indices, payload, file; equal distortion), and a line on the weights."""
    tokenizer = load_tokenizer(run)
    path = finished_prior(run, prior_name, TRAIN_PRIOR)
    loaded, header, _ = load_finished(run, prior_name, TRAIN_PRIOR)
    prior = stepwise(loaded, "compress", header.config.kind)
    labels = image_condition(header, None, images)
    codes, decoded = encode_and_decode(tokenizer, images.pixels, _BATCH)
    coded = encode(prior.double(), codes, labels, code_batch_size(prior.layout, _BATCH), progress=True).coded
    height, width, channels = images.pixels.shape[1:]
    source = run_fingerprint(fingerprint(run.tokenizer), fingerprint(path))
    content = CodeFile(source, path.parent.name, (height, width, channels), coded, labels, None)
    file_size, count = len(pack(content)[0]), len(images.pixels)
    sizes = {
        "code indices": index_bits(prior.layout.grids, prior.layout.num_codes) / 8,
        "file with header and labels": file_size / count,
        "payload": len(coded.payload) / count,
    }
    name = f"{run.path.name}, {path.parent.name}"
    weights = [file.stat().st_size / 1e6 for file in (run.tokenizer, path)]
    point = evaluate(name, "", 0.0, decoded, images.pixels)
    return (
        [point._replace(setting=setting, size=size) for setting, size in sizes.items()],
        f"{name}: weights, not counted: tokenizer {weights[0]:.1f} MB, prior {weights[1]:.1f} MB",
    )


def coded_by_pillow(picture: np.ndarray, kind: str, quality: int) -> tuple[int, np.ndarray]:
    """Encode an image, uint8 (H, W, C); returns its bytes and the decoded image."""
    buffer = io.BytesIO()
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    image.save(buffer, kind, quality=quality, **_SETTINGS[kind])
    size = buffer.tell()
    with Image.open(buffer) as opened:
        return size, np.asarray(opened.convert(image.mode)).reshape(picture.shape)


def files(pixels: Tensor, kind: str, quality: int) -> tuple[float, Tensor]:
    """Encode one file per image; returns bytes per image and the decoded images."""
    coded = [coded_by_pillow(picture, kind, quality) for picture in pixels.numpy()]
    return sum(size for size, _ in coded) / len(coded), torch.from_numpy(np.stack([picture for _, picture in coded]))


def mosaic(pixels: Tensor, kind: str, quality: int) -> tuple[float, Tensor]:
    """Encode all images in one mosaic; returns bytes per image and the decoded images."""
    count, height, width, channels = pixels.shape
    columns = square_columns(count)
    rows = -(-count // columns)
    down, right = -height % _BLOCK, -width % _BLOCK
    tiles = np.pad(pixels.numpy(), ((0, rows * columns - count), (0, down), (0, right), (0, 0)), mode="edge")
    grid = tiles.reshape(rows, columns, height + down, width + right, channels)
    size, decoded = coded_by_pillow(grid.swapaxes(1, 2).reshape(rows * (height + down), -1, channels), kind, quality)
    restored = decoded.reshape(rows, height + down, columns, width + right, channels).swapaxes(1, 2).reshape(tiles.shape)
    return size / count, torch.from_numpy(restored[:count, :height, :width].copy())


def size_apart(size: float, point: Point) -> float:
    """Compute a point's distance in size from `size`, in bytes per image."""
    return abs(point.size - size)


def psnr_apart(mse: float, point: Point) -> float:
    """Compute a point's distance in PSNR from that of `mse`, in dB."""
    return abs(psnr(point.mse) - psnr(mse))


def row(point: Point, pixels: int) -> str:
    """Format a point as a Markdown row."""
    cells = (f"{point.size:.1f}", f"{8 * point.size / pixels:.3f}", f"{psnr(point.mse):.2f}", f"{point.ssim:.3f}")
    return f"| {point.codec} | {point.setting} | {' | '.join(cells)} |"


def plot(path: Path, our_points: list[list[Point]], curves: list[list[Point]], pixels: int) -> None:
    """Plot PSNR and SSIM against bits per pixel."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    colours = {"JPEG": "tab:orange", "WebP": "tab:green", "AVIF": "tab:red"}
    left, right = figure.subplots(1, 2)
    values: list[tuple[Axes, str, Callable[[Point], float]]] = [
        (left, "PSNR, dB", lambda point: psnr(point.mse)),
        (right, "SSIM", lambda point: point.ssim),
    ]
    for axes, label, value in values:
        for curve in curves:
            kind, arrangement = curve[0].codec.split(", ")
            points = [(8 * point.size / pixels, value(point)) for point in curve]
            style = "o-" if arrangement == "mosaic" else "o:"
            axes.plot(*zip(*points, strict=True), style, color=colours[kind], label=curve[0].codec, markersize=3, linewidth=1)
        for number, run_points in enumerate(our_points):
            for point, marker in zip(run_points, ("x", "s", "*"), strict=True):
                position = (8 * point.size / pixels, value(point))
                colour, point_label = ("black", "tab:blue", "tab:purple")[number % 3], f"{point.codec}: {point.setting}"
                axes.plot(*position, marker, color=colour, label=point_label, markersize=9, fillstyle="none")
        axes.set(xscale="log", xlabel="bits per pixel, weights not counted", ylabel=label)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save_figure(path, figure)


def main() -> None:
    """Run the benchmark; print the table and save the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="runs with a tokenizer and a prior; names or paths")
    parser.add_argument("--images", type=int, default=1000, help="number of validation images, evenly spaced; at most all")
    parser.add_argument("--prior", help="name of the prior in each run (default: the last finished)")
    parser.add_argument("--output", type=Path, default=Path("rate_distortion.png"), help="file of the plot")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.images < 1:
        raise UserError(f"--images: expected at least 1, found {options.images}")
    split = argparse.Namespace(images=None, split=None)
    our_points, weights, images = [], [], None
    for run in map(RunDir.named, options.runs):
        run_images = chosen_images(split, load_recipe(run.recipe).data, progress=True, count=options.images)
        if images is not None and not torch.equal(images.pixels, run_images.pixels):
            raise UserError(f"{run}: expected the images of {options.runs[0]}, found others")
        images = run_images
        points, line = ours(run, images, options.prior)
        our_points.append(points)
        weights.append(line)
    assert images is not None

    pixels = images.pixels.shape[1] * images.pixels.shape[2]
    lines = [row(point, pixels) for points in our_points for point in points]
    curves = []
    for kind in _SETTINGS:
        for arrangement, code in (("files", files), ("mosaic", mosaic)):
            curve = []
            for quality in _QUALITIES:
                size, decoded = code(images.pixels, kind, quality)
                curve.append(evaluate(f"{kind}, {arrangement}", f"quality {quality}", size, decoded, images.pixels))
            curves.append(curve)
            _, whole_file, payload = our_points[0]
            our_size = whole_file.size if arrangement == "files" else payload.size
            by_size = min(curve, key=partial(size_apart, our_size))
            by_psnr = min(curve, key=partial(psnr_apart, payload.mse))
            choices = [(by_size, "nearest in size"), (by_psnr, "nearest in PSNR")]
            for point, reason in [(by_size, "nearest in size and PSNR")] if by_size == by_psnr else choices:
                lines.append(row(point._replace(setting=f"{reason}: {point.setting}"), pixels))
    print(f"{len(images.pixels)} validation images, {8 * images.pixels[0].numel() // pixels} bits per pixel raw\n")
    print("| codec | setting | bytes per image | bits per pixel | PSNR dB | SSIM |\n| --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))
    print("\n" + "\n".join(weights))
    plot(options.output, our_points, curves, pixels)


if __name__ == "__main__":
    run_entry(main)
