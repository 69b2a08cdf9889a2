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
from stage1_vqvae.data.folders import folder_classes_at_any_depth, list_files, select_images
from stage1_vqvae.data.sources import evenly_spaced
from training.progress import progress_bar


class ImageFiles(NamedTuple):
    """Images read from files that the user named."""

    pixels: Tensor
    """uint8 (N, H, W, C)."""
    paths: list[str]
    relative_names: list[str]
    """The path of each below the folder that was named, with `/` and without ending; of a file that was named, its name."""
    labels: list[str] | None
    """The class of each: the folder that it lies in, below the one that was named, or the outermost of those that hold images; None
    unless all lie in one.
    """


def load_files(paths: Sequence[str], data: Data, progress: bool = False, count: int | None = None) -> ImageFiles:
    """Decode image files, and those in folders (of any depth, by name; as `list_files` lists them), to `data`'s size; `count`: only so
    many of them, spread evenly.

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
        tree = list_files(path)
        images, omitted = select_images(tree)
        if not images:
            others = f" among its files: {omitted}" if omitted else ""
            raise UserError(f"{path}: expected an image or a folder of images, found no image in it{others}")
        if omitted:
            say(f"{path}: {sum(map(len, images.values())):,} images; left out: {omitted}")
        labels = folder_classes_at_any_depth(images)
        unlabelled = [folder for folder in images if folder not in labels]
        if labels and unlabelled:
            example = tree.path(unlabelled[0], images[unlabelled[0]][0])
            say(f"{path}: its images have no labels, since some lie beside the folders of classes; one is {example}")
        files = sorted((Path(tree.path(folder, name)), labels.get(folder)) for folder, names in images.items() for name in names)
        found += [(file, path, label) for file, label in files]
    all_labelled = all(label is not None for _, _, label in found)
    found = found if count is None else [found[row] for row in evenly_spaced(len(found), count)]
    pixels = np.empty((len(found), data.height, data.width, data.channels), np.uint8)

    def decode(number: int) -> None:
        pixels[number] = decode_image(None, str(found[number][0]), data)

    with ThreadPoolExecutor() as pool, progress_bar(len(found), "decode", "img", shown=progress) as bar:
        for _ in pool.map(decode, range(len(found))):
            bar.update()
    known = [label for _, _, label in found if label is not None]
    # A name that is not UTF-8 could not be printed, or written into a table.
    names = [str(path).encode(errors="backslashreplace").decode() for path, _, _ in found]
    relative_names = [path.relative_to(root).with_suffix("").as_posix() for path, root, _ in found]
    return ImageFiles(torch.from_numpy(pixels), names, relative_names, known if all_labelled else None)
