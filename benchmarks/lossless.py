"""Lossless files of a run against PNG, WebP and JPEG XL: bytes per image, and seconds.

    python benchmarks/lossless.py runs/digits_logistic runs/cifar10_logistic --images 1000
    pip install -e '.[bench]'     (for JPEG XL)

Ours is `pipelines/compress.py --lossless`: codes under the prior, class-conditional if it is, then pixels under p(x | z), and PNG where
that is smaller. Others: one file per image, and one mosaic of all images without gaps. PNG is optimised, WebP at method 6, JPEG XL at
effort 9. The run's weights are not counted. Every image is decoded and compared.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from configs.cli import TRAIN_PRIOR
from configs.errors import UserError, run_entry
from configs.recipe_file import load_recipe
from configs.run_dir import RunDir
from pipelines.codec.code_file import insert_stored, pack, run_fingerprint
from pipelines.codec.coder import decode
from pipelines.codec.image_coder import encode_images
from pipelines.codec.pixels import decode_pixels
from pipelines.conditioning import image_condition
from pipelines.inputs.images import Images, chosen_images
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.pictures import square_columns
from stage2_prior.priors.prior_file import finished_prior, load_finished
from stage2_prior.priors.stepwise import stepwise
from training.weights_file import fingerprint

_FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {"optimize": True},
    "WebP": {"lossless": True, "quality": 100, "method": 6},
    "JXL": {"lossless": True, "effort": 9},
}
_BATCH = 64


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Call a function; returns its result and seconds."""
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def ours(run: RunDir, images: Images, prior_name: str | None) -> list[str]:
    """Format rows of our file, its parts and the bound."""
    tokenizer = load_tokenizer(run)
    path = finished_prior(run, prior_name, TRAIN_PRIOR)
    loaded, header, _ = load_finished(run, prior_name, TRAIN_PRIOR)
    prior = stepwise(loaded, "compress", header.config.kind)
    prior.double()
    pixels, labels = images.pixels, image_condition(header, None, images)
    source = run_fingerprint(fingerprint(run.tokenizer), fingerprint(path)), path.parent.name

    def decompress() -> Tensor:
        assert content.lossless is not None
        codes = decode(prior, content.coded, content.labels)
        decoded_pixels = decode_pixels(copy.deepcopy(tokenizer).double(), codes, content.lossless.pixels, progress=True)
        return insert_stored(decoded_pixels, content.lossless.stored)

    encoded, encoding = timed(lambda: encode_images(tokenizer, prior, pixels, labels, None, source, _BATCH, lossless=True, progress=True))
    content = encoded.content
    decoded, decoding = timed(decompress)
    assert torch.equal(decoded, pixels)
    data, sizes = pack(content)
    count, stored = len(pixels), len(pixels) - len(encoded.bound)
    print(
        f"{run.path.name}: bound of those coded {float(encoded.bound.mean()) / 8:.1f} bytes per image, "
        f"{float(encoded.bound.sum()) / (count - stored) / pixels[0].numel():.4f} bits per dimension; "
        f"codes {sizes.payload / count:.1f}, pixels {sizes.pixels / count:.1f}, labels {sizes.labels / count:.2f}, header {sizes.header}; "
        f"{stored} stored as PNG"
    )
    return row(f"{run.path.name}, {path.parent.name}", len(data), pixels, encoding, decoding)


def row(name: str, size: int, pixels: Tensor, encoding: float, decoding: float) -> list[str]:
    """Format a row of the table."""
    return [name, f"{size / len(pixels):.1f}", f"{8 * size / pixels.numel():.4f}", f"{encoding:.1f}", f"{decoding:.1f}"]


def encode_image(picture: np.ndarray, kind: str) -> bytes:
    """Encode an image, uint8 (H, W, C), in that format."""
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, kind, **_FORMATS[kind])
    return buffer.getvalue()


def decode_image(data: bytes, like: np.ndarray) -> np.ndarray:
    """Decode the image."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("L" if like.shape[-1] == 1 else "RGB")).reshape(like.shape)


def rows_for_format(kind: str, pixels: Tensor) -> list[list[str]]:
    """Format rows of another format: one file per image, and one mosaic."""
    rows = []
    count, height, width, channels = pixels.shape
    columns = square_columns(count)
    padded = np.pad(pixels.numpy(), ((0, -count % columns), (0, 0), (0, 0), (0, 0)))
    mosaic = padded.reshape(-1, columns, height, width, channels).swapaxes(1, 2).reshape(-1, columns * width, channels)
    for name, pictures in (("files", list(pixels.numpy())), ("mosaic", [mosaic])):
        files, encoding = timed(lambda pictures=pictures: [encode_image(picture, kind) for picture in pictures])
        decoded, decoding = timed(
            lambda files=files, pictures=pictures: [decode_image(*pair) for pair in zip(files, pictures, strict=True)]
        )
        assert all(np.array_equal(*pair) for pair in zip(decoded, pictures, strict=True))
        rows.append(row(f"{kind}, {name}", sum(map(len, files)), pixels, encoding, decoding))
    return rows


def main() -> None:
    """Run the benchmark and print one table per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="runs whose objective is a likelihood, with a prior; names or paths")
    parser.add_argument("--images", type=int, default=1000, help="number of images, evenly spaced; at most all")
    parser.add_argument("--split", help="split of the images (default: validation)")
    parser.add_argument("--prior", help="name of the prior in each run (default: the last finished)")
    options = parser.parse_args()
    if options.images < 1:
        raise UserError(f"--images: expected at least 1, found {options.images}")
    if importlib.util.find_spec("pillow_jxl") is None:
        print("JPEG XL is left out: pip install -e '.[bench]'")
        del _FORMATS["JXL"]
    else:
        importlib.import_module("pillow_jxl")
    for run in map(RunDir.named, options.runs):
        split = argparse.Namespace(images=None, split=options.split)
        images = chosen_images(split, load_recipe(run.recipe).data, progress=True, count=options.images)
        rows = [ours(run, images, options.prior)]
        for kind in _FORMATS:
            rows += rows_for_format(kind, images.pixels)
        print("\n| | bytes per image | bits per dimension | encode s | decode s |\n| --- | --- | --- | --- | --- |")
        print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))


if __name__ == "__main__":
    run_entry(main)
