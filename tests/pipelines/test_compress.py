"""The commands `compress.py` and `decompress.py`, and their file format."""

from __future__ import annotations

import errno
import os
import re
import shutil
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from configs.run_dir import RunDir
from pipelines import compress, decompress
from pipelines.codec import coder as codec
from pipelines.codec import image_coder
from pipelines.codec.code_file import CodeFile, Lossless, pack, unpack
from pipelines.codec.coder import Coded
from pipelines.codec.pixels import CodedPixels
from pipelines.compress import main as compress_main
from pipelines.decompress import main as decompress_main
from pipelines.inputs.images import unique_names
from stage1_vqvae.data.pixels import to_model, to_uint8
from stage1_vqvae.data.splits import VALIDATION
from stage1_vqvae.model import load_tokenizer
from stage2_prior.codes.store import CodeStore
from stage2_prior.priors.prior_file import load_prior
from stage2_prior.train import main as train_prior
from training.weights_file import fingerprint

CODED = Coded(b"12345678", 3, 2, [7, 65_535], 0xDEADBEEF)
CONTENT = CodeFile(bytes(range(16)), "transformer", (8, 12, 3), CODED, torch.tensor([1, 0, 300]), ["a", "b", "c-2"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images in folders that are no labels of the run; three names differ only in case and number."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for number, name in enumerate(("one/other.png", "one/same.png", "two/SAME.png", "two/same-2.png", "two/ä b.png")):
        (folder / name).parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (8, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def compressed(run_copy: Path, folder: Path, tmp_path: Path) -> Path:
    compress_main(["--run", str(run_copy), "--images", str(folder), "--output", str(tmp_path / "five.vqc")])
    return tmp_path / "five.vqc"


def pictures_in(folder: Path, names: list[str]) -> np.ndarray:
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {f"{name}.png" for name in names}
    return np.stack([np.asarray(Image.open(folder / f"{name}.png")) for name in names])


def test_a_folder_decompresses_to_its_reconstructions_by_name(run_copy: Path, folder: Path, compressed: Path, tmp_path: Path) -> None:
    decompress_main(["--run", str(run_copy), "--file", str(compressed), "--output", str(tmp_path / "back")])
    originals = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))]))
    tokenizer = load_tokenizer(RunDir(run_copy))
    expected = to_uint8(tokenizer.decode(tokenizer.encode(to_model(originals)))).numpy()
    pictures = pictures_in(tmp_path / "back", ["one/other", "one/same", "two/SAME", "two/same-2", "two/ä b"])
    assert np.abs(pictures.astype(int) - expected).max() <= 1
    assert unpack(compressed.read_bytes(), "").labels is None


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_split_is_coded_with_its_labels_at_the_priors_bits(run_copy: Path, batch_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Compared with the codes and labels that stage 2 stores."""
    compress_main(["--run", str(run_copy), "--batch-size", str(batch_size)])
    printed = capsys.readouterr().out
    data = (run_copy / "compressed" / "000" / "images.vqc").read_bytes()
    content = unpack(data, "")
    store = CodeStore(run_copy / "codes" / VALIDATION)
    assert content.labels is not None
    assert store.condition is not None
    assert content.labels.tolist() == store.condition.tolist()
    assert (content.names, content.image_shape, content.coded.batch) == (None, (8, 12, 3), batch_size)
    path = run_copy / "priors" / "transformer" / "prior.safetensors"
    prior, _ = load_prior(path, fingerprint(run_copy / "tokenizer.safetensors"))
    codes = store.codes(torch.arange(len(store)))
    prior_bytes = float(prior.double().nats(codes, store.condition).sum() / np.log(2) / 8)
    assert len(content.coded.payload) <= 1.01 * prior_bytes + 4
    assert float(re.search(r"-log2 p under the prior: ([\d.]+) bytes", printed)[1]) == pytest.approx(prior_bytes, abs=0.06)  # type: ignore[index]
    header, labels, names, payload = map(int, re.search(r"header (\d+), labels (\d+), names (\d+), payload (\d+)", printed).groups())  # type: ignore[union-attr]
    assert (header + labels + names + payload, names, payload) == (len(data), 0, len(content.coded.payload))

    for number in ("000", "001"):
        decompress_main(["--run", str(run_copy), "--file", str(run_copy / "compressed" / "000" / "images.vqc")])
        expected = to_uint8(load_tokenizer(RunDir(run_copy)).decode(codes)).numpy()
        pictures = pictures_in(run_copy / "decompressed" / number, [f"{row:05d}" for row in range(len(store))])
        assert np.abs(pictures.astype(int) - expected).max() <= 1


def test_unknown_labels_are_left_out_or_required(
    run_copy: Path, folder: Path, compressed: Path, pictures: Path, tmp_path: Path, one_line_error: Callable[..., str]
) -> None:
    """A prior that supports no labels omits them with a message; one label for all is accepted; other priors require one."""
    compress_main(["--run", str(run_copy), "--images", str(folder), "--output", str(tmp_path / "down.vqc"), "--label", "down"])
    labels = unpack((tmp_path / "down.vqc").read_bytes(), "").labels
    assert labels is not None
    assert labels.tolist() == [1] * 5
    compress_main(["--run", str(run_copy), "--images", str(pictures), "--output", str(tmp_path / "known.vqc")])
    known = unpack((tmp_path / "known.vqc").read_bytes(), "").labels
    assert known is not None
    assert known.tolist() == [0] * 24 + [1] * 24
    train_prior(["--run", str(run_copy), "--name", "sure", "--stage2.condition_dropout", "0", "--stage2.steps", "2"])
    assert "label: " in one_line_error(compress_main, "--run", run_copy, "--images", folder)
    assert not (run_copy / "compressed").exists()


def test_every_prior_of_a_run_decodes_its_files(run_copy: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    arguments = ["--prior.kind", "pixelcnn", "--prior.layers", "2", "--prior.width", "16", "--stage2.steps", "2"]
    train_prior(["--run", str(run_copy), *arguments])
    for prior in ("transformer", "pixelcnn"):
        file = tmp_path / f"{prior}.vqc"
        compress_main(["--run", str(run_copy), "--prior", prior, "--output", str(file)])
        decompress_main(["--run", str(run_copy), "--file", str(file), "--output", str(tmp_path / prior)])
    shutil.rmtree(run_copy / "priors" / "pixelcnn")
    assert "pixelcnn" in one_line_error(decompress_main, "--run", run_copy, "--file", tmp_path / "pixelcnn.vqc")


@pytest.mark.parametrize("part", ["tokenizer", "prior"])
def test_another_runs_file_is_refused(run_copy: Path, compressed: Path, part: str, one_line_error: Callable[..., str]) -> None:
    """One different weight of the tokenizer or the prior makes it another run."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = run_copy / ("tokenizer.safetensors" if part == "tokenizer" else "priors/transformer/prior.safetensors")
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path, metadata)
    line = one_line_error(decompress_main, "--run", run_copy, "--file", compressed)
    assert all(word in line for word in ("five.vqc", "fingerprint", "another run")), line
    assert not (run_copy / "decompressed").exists()


def test_any_changed_byte_is_detected(compressed: Path) -> None:
    """One bit of every byte changed, every shorter length, one more byte."""
    data = compressed.read_bytes()
    unpack(data, "")
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(UserError, match="here: expected"):
            unpack(bytes(damaged), "here")
    for length in range(len(data)):
        with pytest.raises(UserError, match="here: expected"):
            unpack(data[:length], "here")
    with pytest.raises(UserError, match="here: expected"):
        unpack(data + b"\0", "here")


def resealed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda data: b"\x89PNG" + data[4:], ["another kind"]),
        (lambda data: data[:8] + b"\4\0" + data[10:], ["version 1", "found 4"]),
        (lambda data: data[:-1], ["truncated"]),
        (lambda data: b"", ["another kind"]),
    ],
)
def test_damaged_files_get_one_line(
    run_copy: Path, compressed: Path, change: Callable[[bytes], bytes], parts: list[str], one_line_error: Callable[..., str]
) -> None:
    compressed.write_bytes(change(compressed.read_bytes()))
    line = one_line_error(decompress_main, "--run", run_copy, "--file", compressed)
    assert all(part in line for part in ["five.vqc", *parts]), line
    assert not (run_copy / "decompressed").exists()


def test_a_changed_payload_under_a_right_checksum_is_refused(
    run_copy: Path, compressed: Path, tmp_path: Path, one_line_error: Callable[..., str]
) -> None:
    """Another machine's arithmetic might read it so; the checksum of the codes detects it."""
    content = unpack(compressed.read_bytes(), "")
    payload = bytes([content.coded.payload[0] ^ 1]) + content.coded.payload[1:]
    compressed.write_bytes(pack(content._replace(coded=content.coded._replace(payload=payload)))[0])
    line = one_line_error(decompress_main, "--run", run_copy, "--file", compressed, "--output", tmp_path / "back")
    assert "arithmetic" in line
    assert not (tmp_path / "back").exists()


def test_packed_content_is_unpacked_unchanged() -> None:
    for content in (
        CONTENT,
        CONTENT._replace(labels=None),
        CONTENT._replace(names=None),
        CONTENT._replace(coded=Coded(b"", 0, 64, [], 0), labels=torch.zeros(0, dtype=torch.int64), names=[]),
        CONTENT._replace(labels=torch.tensor([0, 0, 0]), prior="ä", names=["\udcff", "ü", "x y"]),
    ):
        data, sizes = pack(content)
        unpacked = unpack(data, "")
        assert unpacked._replace(labels=None) == content._replace(labels=None)
        assert (None if unpacked.labels is None else unpacked.labels.tolist()) == (
            None if content.labels is None else content.labels.tolist()
        )
        assert sum(sizes) == len(data)
        assert sizes.payload == len(content.coded.payload)


@pytest.mark.parametrize(
    "names",
    [
        *(["../a", "b", "c"], ["/etc/a", "b", "c"], ["a/../../b", "b", "c"], ["a/./b", "b", "c"], ["a//b", "b", "c"], ["a/", "b", "c"]),
        *(["a", "a", "b"], ["a", "A", "b"], ["a", "b"], ["", "a", "b"], ["a"] * 4, ["a", "a.png/b", "c"], ["d/a", "D/a", "b"]),
    ],
)
def test_names_that_leave_the_folder_or_collide_are_refused(names: list[str]) -> None:
    with pytest.raises(UserError, match="contradicts itself"):
        unpack(pack(CONTENT._replace(names=names))[0], "")


def test_contradictions_under_a_right_checksum_are_refused() -> None:
    data = pack(CONTENT)[0]
    for labels in (torch.tensor([1, 0]), torch.zeros(5, dtype=torch.int64)):
        with pytest.raises(UserError, match="contradicts itself"):
            unpack(pack(CONTENT._replace(labels=labels))[0], "")
    for body in (data[:-4] + b"more", data[:-5]):
        with pytest.raises(UserError, match="contradicts itself"):
            unpack(resealed(body), "")


def test_an_incomplete_payload_and_a_prior_outside_the_run_are_refused() -> None:
    for content in (CONTENT._replace(coded=CONTENT.coded._replace(payload=b"12345")), CONTENT._replace(prior="../priors/transformer")):
        with pytest.raises(UserError, match="contradicts itself"):
            unpack(pack(content)[0], "")


def test_folder_trees_are_restored(run_copy: Path, tmp_path: Path) -> None:
    """Folders of any depth, one file name in several, and folders named like files."""
    photos, back = tmp_path / "photos", tmp_path / "back"
    paths = ["x.png", "a/x.png", "a/b/x.png", "b/x.jpg", "b/y.png", "c.png/z.png", "c.png/deep/z.png"]
    for path in paths:
        (photos / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 8), "red").save(photos / path)
    compress.main(["--run", str(run_copy), "--images", str(photos), "--output", str(tmp_path / "photos.vqc")])
    decompress.main(["--run", str(run_copy), "--file", str(tmp_path / "photos.vqc"), "--output", str(back)])
    restored = {str(path.relative_to(back)) for path in back.rglob("*") if path.is_file()}
    assert restored == {str(Path(path).with_suffix(".png")) for path in paths}


def announced(content: CodeFile, images: int, batch: int, offsets: int = 1) -> bytes:
    """Return a file of this content whose header announces other numbers, under right checksums."""
    data = pack(content._replace(coded=content.coded._replace(images=0, batch=1, offsets=[])))[0]
    counts = struct.pack("<II", images, batch)
    return resealed(data[:32] + counts + data[40:70] + b"\0\0" * offsets + data[70:-4])


def bomb(content: CodeFile, deflated: bytes, names: bool) -> bytes:
    """Return a file of this content whose labels or names are the given deflated bytes."""
    data, sizes = pack(content)
    at = len(data) - 4 - sizes.payload - sizes.names - (0 if names else sizes.labels)
    length = struct.pack("<I", len(deflated))
    header = bytearray(data[:at])
    header[50 if names else 46 : 54 if names else 50] = length
    return resealed(bytes(header) + deflated + data[at + (sizes.names if names else sizes.labels) : -4])


@pytest.fixture(scope="module")
def zeros() -> bytes:
    """64 MB of zeros, deflated to 64 kB."""
    return zlib.compress(bytes(2**26), 9)


@pytest.mark.parametrize(
    "make",
    [
        lambda content, zeros: announced(content, 2**32 - 1, 2**32 - 1),
        lambda content, zeros: announced(content, 2**32 - 1, 1),
        lambda content, zeros: announced(content, 257, 257),
        lambda content, zeros: announced(content, 256 * 40_000, 256, 40_000),  # accepted until the first batch takes more than there is
        lambda content, zeros: bomb(content, zeros, names=True),
        lambda content, zeros: bomb(content._replace(labels=torch.zeros(5, dtype=torch.int64)), zeros, names=False),
        lambda content, zeros: pack(content._replace(lossless=Lossless(CodedPixels(b"", 1, [], 0), {0: png_header(20_000, 20_000)})))[0],
        lambda content, zeros: announced(content._replace(lossless=Lossless(CodedPixels(b"", 1, [], 0), {})), 2**24, 256, 2**16),
    ],
    ids=["images", "batches", "batch", "offsets", "names", "labels", "png", "pixels"],
)
def test_false_sizes_in_a_file_are_refused(
    make: Callable[[CodeFile, bytes], bytes], run_copy: Path, compressed: Path, zeros: bytes, one_line_error: Callable[..., str]
) -> None:
    """Quickly and in little memory, whatever a header announces or a block inflates to."""
    compressed.write_bytes(make(unpack(compressed.read_bytes(), ""), zeros))
    tracemalloc.start()
    started = time.monotonic()
    line = one_line_error(decompress_main, "--run", run_copy, "--file", compressed, "--output", run_copy / "back")
    assert time.monotonic() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    tracemalloc.stop()
    assert "expected" in line
    assert not (run_copy / "back").exists()


def png_header(width: int, height: int) -> bytes:
    """Return the first bytes of a PNG of this size."""
    chunk = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + chunk + struct.pack(">I", zlib.crc32(b"IHDR" + chunk))


def test_a_failure_leaves_no_folder_behind(run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos" / "a" / "b").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (12, 8), "red").save(tmp_path / "photos" / "a" / "b" / f"{number}.png")
    compress.main(["--run", str(run_copy), "--images", str(tmp_path / "photos"), "--output", str(tmp_path / "photos.vqc")])
    written: list[Path] = []

    def full(path: Path, pixels: torch.Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        written.append(path)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(decompress, "save_png", full)
    (tmp_path / "back").mkdir()
    with pytest.raises(OSError, match="No space"):
        decompress.main(["--run", str(run_copy), "--file", str(tmp_path / "photos.vqc"), "--output", str(tmp_path / "back")])
    assert list((tmp_path / "back").iterdir()) == []


def test_names_become_unique() -> None:
    unique = unique_names(["a", "b", "a", "A", "a-2", "a"])
    assert len({name.casefold() for name in unique}) == 6
    assert unique_names(unique) == unique
    long = unique_names(["y" * 250, "y" * 250, "\u5b57" * 100])
    assert unique_names(long) == long
    assert len(set(long)) == 3
    assert all(len(os.fsencode(f"{name}.png")) < 250 for name in long)
    assert unique[:3] == ["a", "b", "a-2"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--prior", "uniform"], ["--prior", "uniform"]),
        (["--prior", "best"], ["--prior best", "transformer"]),
        (["--batch-size", "0"], ["--batch-size", "at least 1"]),
        (["--images", "nowhere"], ["nowhere"]),
        (["--split", "middle"], ["--split", "middle"]),
        (["--label", "sideways"], ["label: ", "sideways"]),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    run_copy: Path, tmp_path: Path, arguments: list[str], parts: list[str], one_line_error: Callable[..., str]
) -> None:
    line = one_line_error(compress_main, "--run", run_copy, "--output", tmp_path / "new.vqc", *arguments)
    assert all(part in line for part in parts), line
    assert not (tmp_path / "new.vqc").exists()
    assert not (run_copy / "compressed").exists()


def test_existing_files_are_not_overwritten(run_copy: Path, compressed: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    before = compressed.read_bytes()
    assert "five.vqc" in one_line_error(compress_main, "--run", run_copy, "--output", compressed)
    assert "a folder" in one_line_error(compress_main, "--run", run_copy, "--output", tmp_path)
    assert compressed.read_bytes() == before
    (tmp_path / "back").mkdir()
    decompress_main(["--run", str(run_copy), "--file", str(compressed), "--output", str(tmp_path / "back")])
    assert "back" in one_line_error(decompress_main, "--run", run_copy, "--file", compressed, "--output", tmp_path / "back")
    assert "a file" in one_line_error(decompress_main, "--run", run_copy, "--file", compressed, "--output", compressed)
    assert "--file" in one_line_error(decompress_main, "--run", run_copy)
    assert "nowhere.vqc" in one_line_error(decompress_main, "--run", run_copy, "--file", tmp_path / "nowhere.vqc")


def test_a_file_that_does_not_decode_is_not_written(
    run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line_error: Callable[..., str]
) -> None:
    """Decoding uses other weights than the encoder, as if the arithmetic had changed."""
    weights, calls = codec.weights, 0

    def drifting(logits: torch.Tensor, offset: int) -> np.ndarray:
        nonlocal calls
        calls += 1
        table = weights(logits, offset)
        return table if calls <= 6 else table[:, ::-1].copy()  # a batch of 2 x 3 codes encoded, then decoding

    monkeypatch.setattr(codec, "weights", drifting)
    assert "arithmetic" in one_line_error(compress_main, "--run", run_copy, "--output", tmp_path / "new.vqc")
    assert calls > 6
    monkeypatch.setattr(codec, "weights", weights)
    monkeypatch.setattr(image_coder, "decode", lambda prior, coded, labels, **options: (torch.zeros(coded.images, 2, 3).long(),))
    assert "nothing was written" in one_line_error(compress_main, "--run", run_copy)
    assert not (tmp_path / "new.vqc").exists()
    assert not (run_copy / "compressed").exists()


def test_another_number_of_threads_decodes_the_same(run_copy: Path, compressed: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    pictures = []
    for threads in (1, 2):
        output = tmp_path / str(threads)
        arguments = ["--run", str(run_copy), "--file", str(compressed), "--output", str(output)]
        decompress_main([*arguments, "--compute.threads", str(threads)])
        assert torch.get_num_threads() == threads
        pictures.append(pictures_in(output, ["one/other", "one/same", "two/SAME", "two/same-2", "two/ä b"]))
    torch.set_num_threads(before)
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 1


@pytest.mark.parametrize("script", [compress, decompress])
def test_several_processes_are_refused(
    run_copy: Path, compressed: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, one_line_error: Callable[..., str]
) -> None:
    monkeypatch.setattr(script, "start", lambda *_, **__: SimpleNamespace(num_processes=2, device=torch.device("cpu")))
    arguments = ["--file", compressed] if script is decompress else []
    assert "expected one process, found 2" in one_line_error(script.main, "--run", run_copy, *arguments)
    assert not (run_copy / "compressed").exists()
    assert not (run_copy / "decompressed").exists()
