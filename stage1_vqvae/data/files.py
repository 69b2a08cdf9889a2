"""Images from files and folders that a user names."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs.data import Data
from configs.errors import UserError, say
from stage1_vqvae.data.decoding import decode_image
from stage1_vqvae.data.folders import files_below, left_out, outermost, shared_tail
from stage1_vqvae.data.formats import ending_of, image_endings
from stage1_vqvae.data.names import normalised
from stage1_vqvae.training.progress import progress_bar


class ImageFiles(NamedTuple):
    """Images read from files that the user named."""

    pixels: Tensor
    """uint8 (N, H, W, C)."""
    paths: list[str]
    below: list[str]
    """The path of each below the folder that was named, with `/` and without ending; of a file that was named, its name."""
    labels: list[str] | None
    """The class of each: the folder that it lies in, below the one that was named, or the outermost of those that hold images; None
    unless all lie in one.
    """


def load_files(paths: Sequence[str], data: Data, progress: bool = False) -> ImageFiles:
    """Decode image files, and those in folders (of any depth, by name; as `files_below` lists them), to `data`'s size.

    Errors: UserError for a path that is nothing, holds no image, or cannot be read as one.
    """
    found: list[tuple[Path, Path, str | None]] = []
    for named in paths:
        path = Path(named).expanduser()
        if not path.is_dir():
            if not path.is_file():
                raise UserError(f"{path}: expected an image or a folder of images, found nothing")
            found.append((path, path.parent, None))
            continue
        tree = files_below(path)
        endings = image_endings(tree.endings())
        images = {folder: kept for folder, names in tree.files.items() if (kept := [name for name in names if ending_of(name) in endings])}
        omitted = left_out(tree, lambda name, endings=endings: ending_of(name) in endings)  # type: ignore[misc]
        if not images:
            told = f": {omitted}" if omitted else ""
            raise UserError(f"{path}: expected an image or a folder of images, found no image in it{told}")
        if omitted:
            say(f"{path}: {sum(map(len, images.values())):,} images; left out: {omitted}")
        if () in images and len(images) > 1:
            say(f"{path}: its images have no labels, since some lie beside the folders; one is {images[()][0]}")
        classes = {folder: outermost(folder, images) for folder in images if folder}
        shared = shared_tail(set(classes.values()))
        labels = {folder: normalised(classes[folder][-1 - shared]) if len(classes.get(folder, ())) > shared else None for folder in images}
        files = sorted((Path(tree.path(folder, name)), labels[folder]) for folder, names in images.items() for name in names)
        found += [(file, path, label) for file, label in files]
    pixels = np.empty((len(found), data.height, data.width, data.channels), np.uint8)

    def decode(number: int) -> None:
        pixels[number] = decode_image(None, str(found[number][0]), data)

    with ThreadPoolExecutor() as pool, progress_bar(len(found), "decode", "img", shown=progress) as bar:
        for _ in pool.map(decode, range(len(found))):
            bar.update()
    known = [label for _, _, label in found if label is not None]
    # A name that is not UTF-8 could not be printed, or written into a table.
    names = [str(path).encode(errors="backslashreplace").decode() for path, _, _ in found]
    below = [path.relative_to(root).with_suffix("").as_posix() for path, root, _ in found]
    return ImageFiles(torch.from_numpy(pixels), names, below, known if len(known) == len(found) else None)
