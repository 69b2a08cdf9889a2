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
from configs.errors import UserError
from stage1_vqvae.data.decoding import decode_image
from stage1_vqvae.data.folders import is_image
from stage1_vqvae.data.sources import spread
from stage1_vqvae.training.progress import progress_bar


class ImageFiles(NamedTuple):
    """Images read from files that the user named."""

    pixels: Tensor
    """uint8 (N, H, W, C)."""
    paths: list[str]
    below: list[str]
    """The path of each below the folder that was named, with `/` and without ending; of a file that was named, its name."""
    labels: list[str] | None
    """The folder in which each lies, below the one that was named; None unless all lie in one."""


def load_files(paths: Sequence[str], data: Data, progress: bool = False, count: int | None = None) -> ImageFiles:
    """Decode image files, and those in folders (of any depth, by name, hidden ones aside), to `data`'s size; `count`: only so many of them,
    spread evenly.

    Errors: UserError for a path that is nothing, holds no image, or cannot be read as one.
    """
    found: list[tuple[Path, Path, str | None]] = []
    for named in paths:
        path = Path(named).expanduser()
        if path.is_file():
            found.append((path, path.parent, None))
            continue
        files = sorted(file for file in path.rglob("*") if is_image(file) and file.is_file())
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not files:
            raise UserError(f"{path}: expected an image or a folder of images, found {'no image in it' if path.is_dir() else 'nothing'}")
        found += [(file, path, file.parent.name if file.parent != path else None) for file in files]
    all_labelled = all(label is not None for _, _, label in found)
    found = found if count is None else [found[row] for row in spread(len(found), count)]
    pixels = np.empty((len(found), data.height, data.width, data.channels), np.uint8)

    def decode(number: int) -> None:
        pixels[number] = decode_image(None, str(found[number][0]), data)

    with ThreadPoolExecutor() as pool, progress_bar(len(found), "decode", "img", shown=progress) as bar:
        for _ in pool.map(decode, range(len(found))):
            bar.update()
    labels = [label for _, _, label in found if label is not None]
    # A name that is not UTF-8 could not be printed, or written into a table.
    names = [str(path).encode(errors="backslashreplace").decode() for path, _, _ in found]
    below = [path.relative_to(root).with_suffix("").as_posix() for path, root, _ in found]
    return ImageFiles(torch.from_numpy(pixels), names, below, labels if all_labelled else None)
