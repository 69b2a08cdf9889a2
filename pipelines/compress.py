"""Compress images: their codes, entropy-coded under the prior, in one file.

    python pipelines/compress.py --images photos/ --output photos.vqc
    python pipelines/compress.py
    python pipelines/compress.py --split test --prior pixelcnn
    python pipelines/compress.py --lossless

Lossy by default: pipelines/decompress.py gives the tokenizer's reconstruction of each image, at the recipe's size. --lossless also codes
the pixels under p(x | z), which needs a tokenizer whose objective is a likelihood; an image that is smaller as PNG is stored as PNG.
Without --images, the validation split is compressed; without --output, the file is written to a new folder compressed/NNN in the run.
Decompression needs this run's tokenizer and prior. The file is verified by decoding before it is written. Labels that the prior knows are
stored and save bits.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import shlex
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.cli import TRAIN_PRIOR, Command, parse
from configs.data import Data
from configs.errors import UserError, run_entry
from configs.run_dir import program, typed, write_bytes
from pipelines.codec.code_file import SUFFIX, Sizes
from pipelines.codec.image_coder import EncodedImages
from pipelines.conditioning import image_condition, label_option
from pipelines.generator import load_generator
from pipelines.inputs.images import Images, chosen_images, image_options, unique_names
from stage1_vqvae.data.decoding import read_image
from stage1_vqvae.metrics import psnr, squared_errors
from stage2_prior.priors.prior_file import finished_prior
from training.processes import SMALLER_BATCHES, finish, start


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    command = parse(__doc__, ("compute",), argv, reads_images=True, options=_options)
    run, options = command.run, command.options
    if options.batch_size < 1:
        raise UserError(f"--batch-size: expected at least 1, found {options.batch_size}")
    output = None if options.output is None else _free(Path(options.output).expanduser())
    command.need_tokenizer()
    prior = finished_prior(run, options.prior, command.next(TRAIN_PRIOR)).parent.name
    accelerator = start(command.recipe.compute, oom_hint=SMALLER_BATCHES)
    if accelerator.num_processes > 1:
        raise UserError(f"expected one process, found {accelerator.num_processes}: codes are coded one after another")
    generator = load_generator(command, accelerator, prior)
    generator.exact_prior("compress")
    if options.lossless:
        generator.tokenizer.likelihood()
    images = chosen_images(options, command.recipe.data, progress=True, run=command.run)
    if options.lossless:
        check_exact(images, command.recipe.data)
    condition = image_condition(generator.header, options.label, images, lenient=True)

    # Images of a split are named by their row number.
    names = None if images.below is None else unique_names(images.below)
    data, sizes, encoded = generator.compressed(images.pixels, condition, names, options.batch_size, options.lossless, progress=True)

    with run.numbered("compressed", output is None) as folder:
        output = output or (folder or run.path) / f"images{SUFFIX}"
        write_bytes(output, data)
        run.record(
            program(), command.arguments, {"file": str(output), "prior": generator.prior_name, "batch_size": encoded.content.coded.batch}
        )
    (report_lossless if options.lossless else report)(command, output, sizes, images.pixels, encoded)
    print(f"next: {command.next(typed('pipelines/decompress.py') + f' --file {shlex.quote(run.show(output))}')}")
    finish(accelerator)


def _options(parser: Any) -> None:
    image_options(parser)
    parser.add_argument("--lossless", action="store_true", help="also code the pixels, so that all are restored exactly")
    parser.add_argument("--output", type=str, help="file to write; must not exist (default: compressed/NNN in the run)")
    parser.add_argument("--prior", type=str, help="name of a prior of the run (default: the last finished)")
    label_option(parser, "all images", "their own, where known")
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch of encoding and decoding")


def _free(path: Path) -> Path:
    if path.exists():
        raise UserError(f"--output {path}: expected a file that does not exist yet, found {'a folder' if path.is_dir() else 'one'}")
    return path


def check_exact(images: Images, data: Data) -> None:
    """Check that no image was scaled, converted or composed over a background when it was read. Errors: UserError if one was.

    Images of a split need no check: they are compressed at the recipe's size.
    """
    modes = ("1", "L") if data.channels == 1 else ("1", "L", "P", "RGB")
    for path in images.names if images.below is not None else ():
        image = read_image(None, path)
        if image.size != (data.width, data.height) or image.mode not in modes or image.has_transparency_data:
            expected = f"expected images of {data.width} x {data.height} in {' or '.join(modes)}, which can be restored exactly"
            raise UserError(f"--lossless {path}: {expected}, found {image.width} x {image.height} in {image.mode}")


def report(command: Command, output: Path, sizes: Sizes, pixels: Tensor, encoded: EncodedImages) -> None:
    """Print the file's size, the size of its parts and the quality of the images."""
    images, raw, total, encoding = len(pixels), pixels.numel(), sum(sizes), encoded.encoding
    quality = f"PSNR {psnr(float(squared_errors(encoded.reconstructions, pixels).mean())):.2f} dB"
    print(f"wrote {images} images to {command.run.show(output)}: {total} bytes, {raw / total:.1f} : 1 of raw pixels, {quality}")
    print(f"bytes: header {sizes.header}, labels {sizes.labels}, names {sizes.names}, payload {sizes.payload}")
    ratio = f"{raw / max(1, sizes.payload):.1f} : 1"
    print(f"payload: {8 * sizes.payload / images:.1f} bits per image, {ratio}; without the tokenizer and prior")
    prior_bytes = encoding.bits / 8
    above = f", the payload {sizes.payload / prior_bytes - 1:.2%} above" if prior_bytes else ""
    print(f"-log2 p under the prior: {prior_bytes:.1f} bytes{above}; logits at least {encoding.clearance:.1g} from rounding boundaries")


def report_lossless(command: Command, output: Path, sizes: Sizes, pixels: Tensor, encoded: EncodedImages) -> None:
    """Print a lossless file's size, the size of its parts, and the bound on the bits of the coded images."""
    images, raw, total, coded = len(pixels), pixels.numel(), sum(sizes), len(encoded.bound)
    print(f"wrote {images} images to {command.run.show(output)}, lossless: {total} bytes, {raw / total:.2f} : 1 of raw pixels")
    print(f"bytes: header {sizes.header}, labels {sizes.labels}, names {sizes.names}, codes {sizes.payload}, pixels {sizes.pixels}")
    print(f"{8 * total / raw:.4f} bits per dimension, {total / images:.1f} bytes per image; {images - coded} of them stored as PNG")
    if coded:
        bound_bits = float(encoded.bound.sum())
        per_dimension = bound_bits * images / (raw * coded)
        print(f"bound for the {coded} coded images: {bound_bits / 8:.1f} bytes, {per_dimension:.4f} bits per dimension")


if __name__ == "__main__":
    run_entry(main)
