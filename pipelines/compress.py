"""Compress images: their codes, entropy-coded under the prior, in one file.

    python pipelines/compress.py --images photos/ --output photos.vqc
    python pipelines/compress.py
    python pipelines/compress.py --split test --prior pixelcnn

Lossy: what comes back (pipelines/decompress.py) is the tokenizer's reconstruction of each image, at the recipe's size. Without
--images, the validation split; without --output, a new folder compressed/NNN in the run. The file needs this run's tokenizer
and prior to be read. It is decoded once before it is written. Labels, where the prior knows them, are stored and save bits.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.cli import TRAIN_PRIOR, Command, parse
from configs.errors import UserError, run_entry
from configs.run_dir import program, typed, write_bytes
from pipelines.codec.code_file import SUFFIX, CodeFile, Sizes, pack, run_fingerprint, unpack
from pipelines.codec.coder import Encoding, batch_images, decode, encode
from pipelines.images.inputs import chosen_images, encode_and_decode, image_options, known_labels_for, unique_names
from stage1_vqvae.metrics import psnr, squared_errors
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.quantizers.contract import Codes
from stage1_vqvae.training.processes import start
from stage1_vqvae.training.weights_file import fingerprint
from stage2_prior.priors.contract import AutoregressivePrior
from stage2_prior.priors.prior_file import UNIFORM, finished_prior, load_prior


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command = parse(__doc__, ("compute",), argv, options=_options)
    run, options = command.run, command.options
    if options.batch_size < 1:
        raise UserError(f"--batch-size: expected at least 1, found {options.batch_size}")
    output = None if options.output is None else _free(Path(options.output).expanduser())
    if options.prior == UNIFORM:
        raise UserError(f"--prior: expected a trained one, found {UNIFORM}, under which codes cost what their indices do")
    command.need_tokenizer()
    accelerator = start(command.recipe.compute)
    if accelerator.num_processes > 1:
        raise UserError(f"expected one process, found {accelerator.num_processes}: codes are coded one after another")
    tokenizer = load_tokenizer(run, accelerator.device)
    path = finished_prior(run, options.prior, command.next(TRAIN_PRIOR))
    prior, header = load_prior(path, fingerprint(run.tokenizer), accelerator.device)
    prior.double()
    images = chosen_images(options, command.recipe.data, progress=True)
    labels = known_labels_for(options.label, images, header)

    codes, reconstructions = encode_and_decode(tokenizer, images.pixels, options.batch_size, progress=True)
    encoding = encode(prior, codes, labels, batch_images(prior.layout, options.batch_size), progress=True)
    height, width, channels = images.pixels.shape[1:]
    content = CodeFile(
        fingerprint=run_fingerprint(run.tokenizer, path),
        prior=path.parent.name,
        image_shape=(height, width, channels),
        coded=encoding.coded,
        labels=labels,
        # Rows of a split are known by their number.
        names=None if images.below is None else unique_names(images.below),
    )
    data, sizes = pack(content)
    verify(data, content, prior, codes)

    with run.numbered("compressed", output is None) as folder:
        output = output or (folder or run.path) / f"images{SUFFIX}"
        write_bytes(output, data)
        run.record(program(), command.arguments, {"file": str(output), "prior": content.prior, "batch_size": encoding.coded.batch})
    report(command, output, encoding, sizes, images.pixels, reconstructions)
    accelerator.end_training()


def _options(parser: Any) -> None:
    image_options(parser)
    parser.add_argument("--output", type=str | None, help="the file to write; must not exist (default: compressed/NNN in the run)")
    parser.add_argument("--prior", type=str | None, help="name of a prior of the run (default: the last finished)")
    parser.add_argument("--label", type=str | None, help="label of all images, by name or number (default: their own, where known)")
    parser.add_argument("--batch_size", type=int, default=64, help="images at once, while encoding and decoding")


def _free(path: Path) -> Path:
    if path.exists():
        raise UserError(f"--output {path}: expected a file that does not exist yet, found {'a folder' if path.is_dir() else 'one'}")
    return path


def verify(data: bytes, content: CodeFile, prior: AutoregressivePrior, codes: Codes) -> None:
    """Read and decode the file's bytes, in smaller steps than they were encoded in, so that not all arithmetic is the same.

    Errors: UserError if anything differs.
    """
    found = unpack(data, "the new file")
    again = decode(prior, found.coded, found.labels, at_once=-(-found.coded.batch // 2), progress=True)
    same = all(torch.equal(*level) for level in zip(again, codes, strict=True))
    labels_same = (found.labels is None) == (content.labels is None)
    if found.labels is not None and content.labels is not None:
        labels_same = torch.equal(found.labels, content.labels)
    if not (same and labels_same and found._replace(labels=None) == content._replace(labels=None)):
        raise UserError("expected the new file to decode to what was encoded, found something else; nothing was written")


def report(command: Command, output: Path, encoding: Encoding, sizes: Sizes, pixels: Tensor, reconstructions: Tensor) -> None:
    """Print the file's size, what its parts take and how good the images are."""
    images, raw, whole = len(pixels), pixels.numel(), sum(sizes)
    quality = f"PSNR {psnr(float(squared_errors(reconstructions, pixels).mean())):.2f} dB"
    print(f"wrote {images} images to {command.run.show(output)}: {whole} bytes, {raw / whole:.1f} : 1 of raw pixels, {quality}")
    print(f"bytes: header {sizes.header}, labels {sizes.labels}, names {sizes.names}, payload {sizes.payload}")
    ratio = f"{raw / max(1, sizes.payload):.1f} : 1"
    print(f"payload: {8 * sizes.payload / images:.1f} bits an image, {ratio}; the tokenizer and prior that it takes are not counted")
    own = encoding.bits / 8
    above = f", the payload {sizes.payload / own - 1:.2%} above" if own else ""
    print(f"the prior's own -log2 p: {own:.1f} bytes{above}; logits kept {encoding.clearance:.1g} clear of rounding boundaries")
    print(f"next: {command.next(typed('pipelines/decompress.py') + f' --file {shlex.quote(command.run.show(output))}')}")


if __name__ == "__main__":
    run_entry(main)
