"""Images from the files and folders that a user names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from configs.data import Data
from configs.errors import UserError, say
from stage1_vqvae.data.decoding import decode_image
from stage1_vqvae.data.folders import folder_classes_at_any_depth, list_files, select_images
from stage1_vqvae.data.sources import evenly_spaced
from training.progress import progress_bar


class ImageFiles(NamedTuple):
    """Images decoded from the files and folders that a user named."""

    pixels: Tensor
    """uint8 (N, H, W, C)."""
    paths: list[str]
    relative_names: list[str]
    """Path of each image below the folder that the user named, with `/` and without ending; the name of a file that the user named."""
    labels: list[str] | None
    """Class of each image (`folder_classes_at_any_depth`); None unless every image has one."""


def load_files(
    paths: Sequence[str],
    data: Data,
    progress: bool = False,
    count: int | None = None,
    allocate: Callable[[Sequence[int]], Tensor] | None = None,
) -> ImageFiles:
    """Decode image files, and all images in folders in the order of their paths, to the recipe's size.

    Args:
        paths: image files and folders.
        data: the recipe's section.
        progress: show a bar.
        count: number of images to decode, evenly spaced; None: all.
        allocate: returns a uint8 tensor of a shape, for the pixels; None: in memory.
    Errors: UserError for a path that does not exist or has no image, or an image that cannot be read.
    """
    entries: list[tuple[Path, Path, str | None]] = []  # file, folder that its name is relative to, class
    for name in paths:
        path = Path(name).expanduser()
        if not path.is_dir():
            if not path.is_file():
                raise UserError(f"{path}: expected an image or a folder of images, found nothing")
            entries.append((path, path.parent, None))
            continue
        tree = list_files(path)
        images, others = select_images(tree)
        if not images:
            among = f" among its files: {others}" if others else ""
            raise UserError(f"{path}: expected an image or a folder of images, found no image in it{among}")
        if others:
            say(f"{path}: {sum(map(len, images.values())):,} images; left out: {others}")
        labels = folder_classes_at_any_depth(images)
        unlabelled = [folder for folder in images if folder not in labels]
        if labels and unlabelled:
            example = tree.path(unlabelled[0], images[unlabelled[0]][0])
            say(f"{path}: its images have no labels, since some lie beside the folders of classes; one is {example}")
        files = sorted((Path(tree.path(folder, name)), labels.get(folder)) for folder, names in images.items() for name in names)
        entries += [(file, path, label) for file, label in files]
    all_labelled = all(label is not None for _, _, label in entries)
    entries = entries if count is None else [entries[row] for row in evenly_spaced(len(entries), count)]
    shape = (len(entries), data.height, data.width, data.channels)
    pixels = torch.empty(shape, dtype=torch.uint8) if allocate is None else allocate(shape)

    def decode(number: int) -> None:
        pixels[number] = torch.from_numpy(decode_image(None, str(entries[number][0]), data))

    with ThreadPoolExecutor() as pool, progress_bar(len(entries), "decode", "img", shown=progress) as bar:
        for _ in pool.map(decode, range(len(entries))):
            bar.update()
    known = [label for _, _, label in entries if label is not None]
    # A name that is not UTF-8 could not be printed, or written into a table.
    names = [str(path).encode(errors="backslashreplace").decode() for path, _, _ in entries]
    relative_names = [path.relative_to(root).with_suffix("").as_posix() for path, root, _ in entries]
    return ImageFiles(pixels, names, relative_names, known if all_labelled else None)
