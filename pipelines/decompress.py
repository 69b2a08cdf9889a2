"""Decompress a file that pipelines/compress.py wrote into one PNG per image.

    python pipelines/decompress.py --file photos.vqc
    python pipelines/decompress.py --file photos.vqc --output photos/

Needs the run that compressed the file, with the same tokenizer and prior. PNGs are named like the images, in the same folders, or by the
row numbers of the split. Without --output, they are written to a new folder decompressed/NNN in the run.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from configs.cli import parse
from configs.errors import UserError, run_entry
from configs.run_dir import program
from pipelines.codec.code_file import check_made_by, run_fingerprint, unpack
from pipelines.generator import load_generator
from stage1_vqvae.pictures import save_png
from training.batching import batches
from training.processes import finish, start
from training.progress import progress_bar
from training.weights_file import fingerprint


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
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
    prior = run.prior(content.prior) / "prior.safetensors"
    if not prior.exists():
        raise UserError(f"{file}: expected a file of run {run}, found one of a prior {content.prior} that it does not have")
    check_made_by(content, (run_fingerprint(fingerprint(run.tokenizer), fingerprint(prior)), content.prior), str(run), str(file))
    generator = load_generator(command, accelerator, content.prior)
    codes, exact = generator.decompressed(content, str(file), progress=True)

    count = content.images
    names = content.names or [f"{row:0{max(5, len(str(count)))}d}" for row in range(count)]
    with run.numbered("decompressed", output is None) as numbered, _filled(numbered, output, names) as folder:
        with progress_bar(count, "write", "img") as bar:
            for part in batches(count, content.coded.batch):
                batch_codes = tuple(level[part] for level in codes)
                pictures = generator.decode(batch_codes, output="tensor") if exact is None else exact[part]
                for name, picture in zip(names[part], pictures, strict=True):
                    save_png(folder / f"{name}.png", picture)
                bar.update(len(pictures))
        run.record(program(), command.arguments, {"file": str(file), "prior": content.prior})
    print(f"wrote {count} images to {run.show(folder)}" + (", all pixels exact" if exact is not None else ""))
    finish(accelerator)


def _options(parser: Any) -> None:
    parser.add_argument("--file", type=str, help="file that compress.py wrote")
    parser.add_argument("--output", type=str, help="folder to write, new or empty (default: decompressed/NNN in the run)")


def read(file: Path) -> bytes:
    """Read the file's bytes. Errors: UserError if there is no such file."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"--file {file}: expected a file that pipelines/compress.py wrote, found none ({error.strerror})") from None


def _empty(path: Path) -> Path:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--output {path}: expected a folder that is new or empty, found {'files in it' if path.is_dir() else 'a file'}")
    return path


@contextmanager
def _filled(numbered: Path | None, output: Path | None, names: list[str]) -> Iterator[Path]:
    """Yield the folder to fill: the numbered folder of the run or the user's output folder.

    If the block fails, the named images and their folders are deleted from the output folder.
    """
    if numbered is not None:
        yield numbered
        return
    assert output is not None
    is_new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    try:
        yield output
    except BaseException:
        files = [output / f"{name}.png" for name in names]
        for path in files:
            path.unlink(missing_ok=True)
        folders = {folder for path in files for folder in path.parents if folder.is_relative_to(output)} - (
            {output} if not is_new else set()
        )
        for folder in sorted(folders, reverse=True):  # inner folders first
            with suppress(OSError):  # never created, or with other files in it
                folder.rmdir()
        raise


if __name__ == "__main__":
    run_entry(main)
