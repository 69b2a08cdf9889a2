"""Decompress what pipelines/compress.py wrote: a PNG an image.

    python pipelines/decompress.py --file photos.vqc
    python pipelines/decompress.py --file photos.vqc --output photos/

Needs the run that compressed it, with the same tokenizer and prior. PNGs have the images' names, in the
folders they were in, or the rows of the split. Without
--output, a new folder decompressed/NNN in the run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from configs.cli import parse
from configs.errors import UserError, run_entry
from configs.run_dir import RunDir, program
from pipelines.codec.code_file import CodeFile, run_fingerprint, unpack, with_stored
from pipelines.codec.coder import decode
from pipelines.codec.pixels import decode_pixels
from stage1_vqvae.data.pixels import to_uint8
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.pictures import save_png
from stage1_vqvae.training.batching import batches
from stage1_vqvae.training.processes import finish, start
from stage1_vqvae.training.progress import progress_bar
from stage1_vqvae.training.weights_file import fingerprint
from stage2_prior.priors.prior_file import load_prior


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command = parse(__doc__, ("compute",), argv, options=_options)
    run, options = command.run, command.options
    if options.file is None:
        raise UserError("--file: expected the file to decompress, found none")
    file = Path(options.file).expanduser()
    output = None if options.output is None else _empty(Path(options.output).expanduser())
    command.need_tokenizer()
    accelerator = start(command.recipe.compute)
    if accelerator.num_processes > 1:
        raise UserError(f"expected one process, found {accelerator.num_processes}: codes are decoded one after another")
    content = unpack(read(file), str(file))
    prior, _ = load_prior(prior_of(content, run, file), fingerprint(run.tokenizer), accelerator.device)
    tokenizer = load_tokenizer(run, accelerator.device)
    channels, height, width = tokenizer.image_shape
    known = content.labels is None or len(content.labels) == 0 or int(content.labels.max()) <= prior.num_classes
    if content.image_shape != (height, width, channels) or not known:
        raise UserError(f"{file}: expected images and labels of run {run}, found a header that contradicts its fingerprint")
    codes = decode(prior.double(), content.coded, content.labels, progress=True)
    exact = None
    if content.lossless is not None:
        pixels = decode_pixels(copy.deepcopy(tokenizer).double(), codes, content.lossless.pixels, progress=True)
        exact = with_stored(pixels, content.lossless.stored)

    count = content.images
    names = content.names or [f"{row:0{max(5, len(str(count)))}d}" for row in range(count)]
    with run.numbered("decompressed", output is None) as numbered, _filled(numbered, output, names) as folder:
        with progress_bar(count, "write", "img") as bar:
            for part in batches(count, content.coded.batch):
                if exact is not None:
                    pictures = exact[part]
                else:
                    pictures = to_uint8(tokenizer.decode(tuple(level[part].to(accelerator.device) for level in codes))).cpu()
                for name, picture in zip(names[part], pictures, strict=True):
                    save_png(folder / f"{name}.png", picture)
                bar.update(len(pictures))
        run.record(program(), command.arguments, {"file": str(file), "prior": content.prior})
    print(f"wrote {count} images to {run.show(folder)}" + (", every pixel as it was" if exact is not None else ""))
    finish(accelerator)


def _options(parser: Any) -> None:
    parser.add_argument("--file", type=str | None, help="what compress.py wrote")
    parser.add_argument("--output", type=str | None, help="a folder, new or empty (default: decompressed/NNN in the run)")


def read(file: Path) -> bytes:
    """Read the file's bytes. Errors: UserError if there is no such file."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"--file {file}: expected a file that pipelines/compress.py wrote, found none ({error.strerror})") from None


def prior_of(content: CodeFile, run: RunDir, file: Path) -> Path:
    """The prior that coded the file. Errors: UserError if it is not this run's, or the tokenizer is not."""
    path = run.prior(content.prior) / "prior.safetensors"
    if not path.exists():
        raise UserError(f"{file}: expected a file of run {run}, found one of a prior {content.prior} that it does not have")
    expected = run_fingerprint(run.tokenizer, path)
    if content.fingerprint != expected:
        wanted = f"expected the fingerprint of run {run} with its prior {content.prior}, {expected.hex()[:12]}"
        raise UserError(f"{file}: {wanted}, found {content.fingerprint.hex()[:12]}: another run's, or one trained anew since")
    return path


def _empty(path: Path) -> Path:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--output {path}: expected a folder that is new or empty, found {'files in it' if path.is_dir() else 'a file'}")
    return path


@contextmanager
def _filled(numbered: Path | None, output: Path | None, names: list[str]) -> Iterator[Path]:
    """The folder to fill: the run's, or the user's, from which the images of those names, and the folders they lie in, vanish if
    the block fails.
    """
    if numbered is not None:
        yield numbered
        return
    assert output is not None
    made = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    try:
        yield output
    except BaseException:
        files = [output / f"{name}.png" for name in names]
        for path in files:
            path.unlink(missing_ok=True)
        folders = {folder for path in files for folder in path.parents if folder.is_relative_to(output)} - ({output} if not made else set())
        for folder in sorted(folders, reverse=True):  # those inside before what they lie in
            with suppress(OSError):  # never made, or somebody else's files in it
                folder.rmdir()
        raise


if __name__ == "__main__":
    run_entry(main)
