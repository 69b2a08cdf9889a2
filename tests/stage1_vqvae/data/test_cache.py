"""The cache of decoded images on disk."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs.data import LOCAL_KEYS, SELECTION_KEYS, Data, pixel_settings
from configs.errors import UserError
from configs.parts import FAMILIES, part_class
from stage1_vqvae.data import cache, encoded
from stage1_vqvae.data.cache import cached_images
from stage1_vqvae.data.encoded import EncodedSplit, FilePaths
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, VALIDATION, ReadableImages
from stage1_vqvae.data.transforms.random_crop import RandomCropPart


def data(path: Path, cache_folder: Path, **settings: object) -> Data:
    return Data(**{"path": str(path), "cache": str(cache_folder), "height": 8, "width": 12, "validation_share": 0.25, **settings})  # type: ignore[arg-type]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of all images that are decoded."""
    paths: list[str] = []
    real = encoded.decode_image

    def recording_decode(content: bytes | None, path: str, *more: Any) -> np.ndarray:
        paths.append(path)
        return real(content, path, *more)

    monkeypatch.setattr(encoded, "decode_image", recording_decode)
    return paths


def test_images_are_decoded_once(pictures: Path, tmp_path: Path, decoded: list[str]) -> None:
    first = load_images(data(pictures, tmp_path)).splits
    assert sorted(decoded) == sorted(map(str, pictures.rglob("*.png")))
    decoded.clear()
    again = load_images(data(pictures, tmp_path)).splits
    assert not decoded
    for name in (TRAIN, VALIDATION):
        assert torch.equal(first[name].pixels, again[name].pixels)
    load_images(data(pictures, tmp_path / "another"))
    assert len(decoded) == 48


def test_loading_validation_decodes_only_validation_images(pictures: Path, tmp_path: Path, decoded: list[str]) -> None:
    (only,) = load_images(data(pictures, tmp_path), [VALIDATION]).splits.values()
    assert len(decoded) == len(only) == 12
    assert torch.equal(only.pixels, load_images(data(pictures, tmp_path)).splits[VALIDATION].pixels)
    assert len(decoded) == 48


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: Image.new("RGB", (12, 8), "red").save(folder / "across/000.png"),
        lambda folder: (folder / "across/000.png").unlink(),
        lambda folder: (folder / "across/000.png").rename(folder / "down/000a.png"),
    ],
)
def test_changed_images_are_decoded_again(change: Callable[[Path], None], pictures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    before = load_images(data(folder, tmp_path / "cache")).splits
    change(folder)
    after, fresh = (load_images(data(folder, tmp_path / name)).splits for name in ("cache", "fresh"))
    assert all(torch.equal(after[name].pixels, fresh[name].pixels) for name in after)
    assert any(not torch.equal(after[name].pixels, before[name].pixels) for name in after)


@pytest.mark.parametrize("settings", [{"seed": 1}, {"validation_share": 0.5}])
def test_cache_depends_on_the_rows_selected(settings: dict[str, object], pictures: Path, tmp_path: Path) -> None:
    load_images(data(pictures, tmp_path / "cache"))
    after, fresh = (load_images(data(pictures, tmp_path / name, **settings)).splits for name in ("cache", "fresh"))
    assert all(torch.equal(after[name].pixels, fresh[name].pixels) for name in (TRAIN, VALIDATION))


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> EncodedSplit:
    """Images whose pixels depend on every decoding setting: half transparent, 16-bit, and a JPEG large enough for reduced decoding."""
    folder = tmp_path_factory.mktemp("varied")
    transparent = Image.new("RGBA", (24, 16), (30, 90, 200, 255))
    transparent.paste((0, 0, 0, 0), (0, 0, 12, 16))
    transparent.save(folder / "transparent.png")
    Image.fromarray(np.full((16, 24), 500, np.uint16)).save(folder / "16_bits.png")
    Image.effect_noise((400, 300), 90).convert("RGB").save(folder / "noise.jpg")
    return EncodedSplit(VALIDATION, FilePaths(sorted(map(str, folder.iterdir()))), None, "varied")


OTHER_VALUES: dict[str, Any] = {
    **dict.fromkeys(("name", "config", "revision", "path", "image_column", "label_column"), "other"),
    **dict.fromkeys(("train_split", "validation_split", "test_split"), "other"),
    **{"height": 9, "width": 13, "channels": 1, "background": "black", "white": 1000.0, "transform": RandomCropPart(min_area=0.5)},
    **{"validation_share": 0.2, "seed": 1, "on_error": "skip", "most_skipped": 0.5},
    **{"decode": "each_time", "stream": True, "workers": 0, "cache": "other"},
}
DECIDE_PIXELS = ("height", "width", "channels", "background", "white", "transform")


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Data)])
def test_every_setting_that_decides_pixels_is_in_the_cache_key(name: str, varied: EncodedSplit, tmp_path: Path) -> None:
    """Each setting is changed alone; settings that decide no pixels reuse the cached file. New settings must be added to these tables."""
    settings = Data(height=8, width=12, cache=str(tmp_path / "cache"))
    before = varied.read(None, settings, False).pixels
    changed = dataclasses.replace(settings, **{name: str(tmp_path / "other") if name == "cache" else OTHER_VALUES[name]})
    cached, fresh = (varied.read(None, dataclasses.replace(changed, decode=how), False).pixels[:] for how in ("once", "each_time"))  # type: ignore[arg-type]
    assert torch.equal(cached, fresh)
    assert (cached.shape == before.shape and torch.equal(cached, before[:])) == (name not in DECIDE_PIXELS)
    files = len(list(tmp_path.glob("cache/*.pixels")))
    assert files == (1 if name in (*LOCAL_KEYS, *SELECTION_KEYS) else 2)


def test_every_field_of_a_transform_is_part_of_the_key() -> None:
    transforms = [part_class("data.transform", kind)() for kind in FAMILIES["data.transform"]]
    for part in list(transforms):
        transforms += [dataclasses.replace(part, **{field.name: getattr(part, field.name) / 2}) for field in dataclasses.fields(part)]
    keys = [pixel_settings(Data(transform=part)) for part in transforms]  # type: ignore[arg-type]
    assert all(one != other for one, other in itertools.combinations(keys, 2))


def test_unreadable_images_are_recorded_per_settings(tmp_path: Path) -> None:
    """A floating-point image cannot be read without data.white."""
    Image.fromarray(np.linspace(0, 1, 96, dtype=np.float32).reshape(8, 12)).save(tmp_path / "float.tiff")
    split = EncodedSplit(VALIDATION, FilePaths([str(tmp_path / "float.tiff")]), None, "float")
    settings = Data(height=8, width=12, cache=str(tmp_path / "cache"), decode="each_time", on_error="skip", most_skipped=0.0)
    with pytest.raises(UserError, match="none of which is known to be white"):
        split.read(None, settings, False)
    assert not split.read(None, dataclasses.replace(settings, white=1.0), False).skipped


@pytest.mark.parametrize("left", ["a part", "too little"])
def test_incomplete_cache_file_is_rewritten(left: str, pictures: Path, tmp_path: Path) -> None:
    """Left by a killed command, or truncated."""
    complete = load_images(data(pictures, tmp_path)).splits[TRAIN].pixels[:].clone()
    for path in tmp_path.glob("*.pixels"):
        content = path.read_bytes()
        path.unlink()
        (path.with_suffix(".unfinished") if left == "a part" else path).write_bytes(content[:100])
    assert torch.equal(load_images(data(pictures, tmp_path)).splits[TRAIN].pixels, complete)
    assert not list(tmp_path.glob("*.unfinished"))


def test_an_unreadable_image_leaves_no_cache_file(pictures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    (folder / "down/003.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"003\.png: expected a readable image"):
        load_images(data(folder, tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_unreadable_images_can_be_skipped(pictures: Path, tmp_path: Path, decoded: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Each image keeps its label, whether it is decoded or comes from the cache."""
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    for name in ("across/003.png", "down/002.png", "down/011.png"):
        (folder / name).write_bytes(b"no picture")
    for _ in range(2):
        source = load_images(data(folder, tmp_path / "cache", on_error="skip", most_skipped=0.3))
        assert len(source.skipped) == 3
        assert "3 images left out that cannot be read; one is " in capsys.readouterr().out
        assert all("expected a readable image" in line for line in source.skipped)
        labelled = [
            (picture.numpy(), int(label))
            for split in source.splits.values()
            for picture, label in zip(split.pixels, split.labels, strict=True)
        ]
        assert len(labelled) == 45
        # Pictures of label 0 are constant down each column, those of label 1 along each row.
        assert all(bool((picture == (picture[:, :1] if label else picture[:1])).all()) for picture, label in labelled)
    assert len(decoded) == 48
    with pytest.raises(
        UserError, match=r"expected at most 1\.0% of .* images that cannot be read .*, found [12]; one is .*expected a readable"
    ):
        load_images(data(folder, tmp_path / "cache", on_error="skip"))
    with pytest.raises(UserError, match="expected a readable image"):
        load_images(data(folder, tmp_path / "cache", most_skipped=0.3))


def test_a_full_disk_is_reported_before_anything_is_written(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 9_000, 9_000))
    with pytest.raises(UserError, match=r"expected room for 0\.0 MB of decoded images of .*, found 0\.0 MB free; make room"):
        load_images(data(pictures, tmp_path))
    assert not list(tmp_path.glob("*.pixels"))


def test_concurrent_readers_decode_once(tmp_path: Path) -> None:
    decoding, results = [], []

    def decode() -> Iterator[np.ndarray]:
        decoding.append(1)
        for number in range(4):
            time.sleep(0.02)
            yield from np.full((2, 3, 4, 1), number, np.uint8)

    def read() -> None:
        results.append(cached_images(tmp_path, {"source": "x"}, (8, 3, 4, 1), decode, "x").pixels)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(decoding) == 1
    assert len(results) == 4
    assert all(torch.equal(images[:, 0, 0, 0], torch.tensor([0, 0, 1, 1, 2, 2, 3, 3], dtype=torch.uint8)) for images in results)


def test_local_rank_zero_decodes_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 shows the progress bar; another rank decodes only what rank 0 did not."""
    monkeypatch.setattr(cache, "_HEAD_START", 0.3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    decoding, results = [], []

    def images_for(name: str) -> ReadableImages:
        def decode() -> Iterator[np.ndarray]:
            decoding.append(name)
            yield np.full((2, 2, 1), 7, np.uint8)

        return cached_images(tmp_path, {"source": "x"}, (1, 2, 2, 1), decode, "x")

    second = threading.Thread(target=lambda: results.append(images_for("second")))
    second.start()
    time.sleep(0.1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    first = images_for("first")
    second.join()
    assert decoding == ["first"]
    assert torch.equal(results[0].pixels, first.pixels)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cached_images(tmp_path, {"source": "y"}, (1, 2, 2, 1), lambda: iter([np.zeros((2, 2, 1), np.uint8)]), "y").pixels.sum() == 0


def test_a_complete_cache_can_be_read_only(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_images(data(pictures, tmp_path)).splits[TRAIN].pixels[:].clone()

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(30, "Read-only file system", str(tmp_path))

    monkeypatch.setattr(cache, "FileLock", refused)
    assert torch.equal(load_images(data(pictures, tmp_path)).splits[TRAIN].pixels, before)


def test_temporary_errors_are_not_cached(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image without permission is not skipped, neither now nor later."""
    real = Image.open

    def refused(path: object) -> Image.Image:
        if str(path).endswith("across/003.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)  # type: ignore[arg-type]

    settings = data(pictures, tmp_path, on_error="skip", most_skipped=0.5)
    with monkeypatch.context() as patched:
        patched.setattr(Image, "open", refused)
        with pytest.raises(UserError, match="Permission denied"):
            load_images(settings)
    assert not load_images(settings).skipped


def test_cached_images_are_memory_mapped(tmp_path: Path) -> None:
    """Mapping 100 MB adds almost no private memory."""

    def private_memory() -> int:
        rollup = Path("/proc/self/smaps_rollup").read_text()
        return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith(("Private_Dirty", "Anonymous")))

    shape = (100, 1000, 1000, 1)
    before = private_memory()
    images = cached_images(
        tmp_path, {"source": "x"}, shape, lambda: (np.full(shape[1:], number, np.uint8) for number in range(100)), "x"
    ).pixels
    assert images[::7, 500, 500, 0].tolist() == list(range(0, 100, 7))
    assert private_memory() - before < 20_000  # kB
