"""Images that a pipeline takes: files, folders and splits; their labels, codes and reconstructions."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.data import Data
from configs.errors import UserError
from configs.parts import default_part
from configs.recipe_file import load_recipe
from configs.run_dir import RunDir
from pipelines.conditioning import image_condition, sample_condition
from pipelines.encoding import encode_and_decode
from pipelines.inputs.images import Images, chosen_images
from pipelines.inputs.pictures import picture_mask
from stage1_vqvae.data import encoded, files
from stage1_vqvae.data.files import load_files
from stage1_vqvae.data.pixels import to_model, to_uint8
from stage1_vqvae.data.sources import evenly_spaced, load_images
from stage1_vqvae.data.splits import TEST, TRAIN, VALIDATION
from stage1_vqvae.model import load_tokenizer
from stage2_prior.codes.store import CodeStore
from stage2_prior.conditions.classes import Classes
from stage2_prior.conditions.none import NoCondition
from stage2_prior.priors.prior_file import PriorHeader
from tests.conftest import write_pictures

DATA = Data(height=8, width=12)


def picture(path: Path, value: int, size: tuple[int, int] = (12, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)
    return path


def options(images: list[Path] | None = None, split: str | None = None) -> Namespace:
    return Namespace(images=None if images is None else [str(path) for path in images], split=split)


def header(names: list[str] | None, supports_unconditional: bool = True) -> PriorHeader:
    return PriorHeader(
        config=default_part("prior"),
        grids=[(2, 3)],
        num_codes=[16],
        condition=NoCondition() if names is None else Classes(names=names),
        supports_unconditional=supports_unconditional,
        tokenizer_sha256="",
        steps=1,
        bits_per_token=1.0,
    )


def images(labels: list[str] | None, count: int = 3) -> Images:
    return Images(torch.zeros(count, 8, 12, 3, dtype=torch.uint8), [f"{number}.png" for number in range(count)], labels)


def test_images_come_in_the_order_of_arguments_and_by_name_within_folders(tmp_path: Path) -> None:
    """One value of red per image identifies it."""
    inside = [picture(tmp_path / "folder" / name, value) for name, value in (("a.png", 30), ("b.JPG", 40), ("c/d.bmp", 50))]
    single = picture(tmp_path / "z.webp", 20)
    loaded = load_files([str(single), str(tmp_path / "folder")], DATA)
    assert loaded.paths == [str(path) for path in (single, *inside)]
    assert loaded.pixels.shape == (4, 8, 12, 3)
    assert loaded.pixels.dtype == torch.uint8
    red = loaded.pixels[..., 0].double().mean((1, 2))
    assert (red - torch.tensor([20.0, 30, 40, 50])).abs().max() < 4  # JPEG and WebP are lossy
    assert loaded.labels is None  # one image has no label


def test_a_folder_decodes_to_the_pixels_of_training(pictures: Path) -> None:
    """`datasets` lists, decodes and labels the same files independently."""
    source = load_images(Data(path=str(pictures), height=8, width=12), hold_out=False)
    loaded = load_files([str(pictures)], DATA)
    assert torch.equal(loaded.pixels, source.splits[TRAIN].pixels)
    assert source.label_names is not None
    assert source.splits[TRAIN].labels is not None
    assert loaded.labels == [source.label_names[label] for label in source.splits[TRAIN].labels.tolist()]


def test_labels_are_the_names_of_class_folders_at_any_depth(tmp_path: Path, pictures: Path) -> None:
    """As in training, also below the folder of a split."""
    shutil.copytree(pictures / "down", tmp_path / "train" / "down")
    assert set(load_files([str(tmp_path)], DATA).labels or ()) == {"down"}
    assert load_files([str(tmp_path / "train" / "down")], DATA).labels is None
    picture(tmp_path / "test" / "down" / "images" / "a.png", 10)
    picture(tmp_path / "test" / "up" / "images" / "a.png", 10)
    assert load_files([str(tmp_path / "test")], DATA).labels == ["down", "up"]


def test_other_sizes_are_scaled_to_cover_and_cropped(tmp_path: Path) -> None:
    """An image twice too high keeps its middle."""
    stripes = np.zeros((32, 24, 3), np.uint8)
    stripes[8:24] = 200
    Image.fromarray(stripes).save(tmp_path / "high.png")
    loaded = load_files([str(tmp_path)], DATA).pixels
    assert (loaded[0, 1:-1].double() - 200).abs().max() <= 8  # apart from ringing at the edges


def test_hidden_and_foreign_files_of_a_folder_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = picture(tmp_path / "a.png", 10)
    picture(tmp_path / ".cache" / "a.png", 20)
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves beside a file")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "scan.pdf").write_bytes(b"%PDF-1.4")  # Pillow writes them, but reads none
    for folder in ("__MACOSX", "lost+found", "@eaDir/a.png", "$RECYCLE.BIN"):
        picture(tmp_path / folder / "b.png", 30)
    assert load_files([str(tmp_path)], DATA).paths == [str(image)]
    assert "left out: 1 .txt, 1 .pdf" in capsys.readouterr().out.replace("1 .pdf, 1 .txt", "1 .txt, 1 .pdf")


def test_a_folder_is_listed_as_in_training(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Links are followed, subfolders belong to their class, and an image beside class folders removes all labels, with a message."""
    (tmp_path / "data").mkdir()
    os.symlink(pictures / "down", tmp_path / "data" / "down")
    picture(tmp_path / "data" / "up" / "a.png", 10)
    picture(tmp_path / "data" / "up" / "inside" / "b.png", 20)
    assert load_files([str(tmp_path / "data")], DATA).labels == ["down"] * 24 + ["up"] * 2
    assert capsys.readouterr().out == ""
    picture(tmp_path / "data" / "c.png", 30)
    assert load_files([str(tmp_path / "data")], DATA).labels is None
    assert "data: its images have no labels, since some lie beside the folders of classes; one is" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf8_can_be_printed(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 10)
    os.rename(path, os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"))
    (name,) = load_files([str(tmp_path)], DATA).paths
    assert name.encode().endswith(b"caf\\udce9.png")


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("missing", ["nowhere.png", "found nothing"]),
        ("empty", ["empty", "no image in it"]),
        ("text", ["text.png", "readable image"]),
        ("npz", ["array.npz", "readable image"]),
    ],
)
def test_paths_that_are_no_image_get_one_line(kind: str, parts: list[str], tmp_path: Path) -> None:
    good = picture(tmp_path / "good.png", 10)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    np.savez(tmp_path / "array.npz", np.zeros((2, 8, 12, 3), np.uint8))
    path = {"missing": "nowhere.png", "empty": "empty", "text": "text.png", "npz": "array.npz"}[kind]
    with pytest.raises(UserError) as error:
        load_files([str(good), str(tmp_path / path)], DATA)
    assert all(part in str(error.value) for part in [str(tmp_path), *parts]), error.value


@pytest.mark.parametrize("has_splits", [True, False])
def test_splits_are_those_of_training(has_splits: bool, tmp_path: Path) -> None:
    """Also if the folder has a validation split, in which case the training split is complete."""
    for number, name in enumerate(("train", "validation", "test") if has_splits else ("train",)):
        write_pictures(tmp_path / name, 8 + number)
    data = Data(path=str(tmp_path), height=8, width=12, validation_share=0.25)
    splits = load_images(data).splits
    assert len(splits[TRAIN]) == (16 if has_splits else 12)
    for name in splits:
        chosen = chosen_images(options(split=name), data, progress=False)
        assert torch.equal(chosen.pixels, splits[name].pixels)
        assert chosen.names == [f"{name}/{row}" for row in range(len(splits[name]))]
        assert splits[name].labels is not None
        assert chosen.labels == [("across", "down")[label] for label in splits[name].labels.tolist()]
    assert torch.equal(chosen_images(options(), data, progress=False).pixels, splits[VALIDATION].pixels)


def test_wrong_splits_get_one_line(pictures: Path) -> None:
    data = Data(path=str(pictures), height=8, width=12)
    with pytest.raises(UserError, match="--split: expected train, validation or test, found dev"):
        chosen_images(options(split="dev"), data, progress=False)
    with pytest.raises(UserError, match=r"--split test: .* no such split"):
        chosen_images(options(split=TEST), data, progress=False)
    with pytest.raises(UserError, match="--images: expected no --split"):
        chosen_images(options([pictures], split=TEST), data, progress=False)


@pytest.mark.parametrize(("count", "rows"), [(1, [0]), (3, [0, 3, 6]), (9, list(range(9))), (20, list(range(9)))])
def test_spread_takes_images_at_equal_distances(count: int, rows: list[int]) -> None:
    assert evenly_spaced(9, count).tolist() == rows


@pytest.mark.parametrize("split", [TRAIN, VALIDATION, "files"])
def test_few_images_are_decoded_without_the_others(split: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They equal rows of the full split in names, labels and pixels; nothing else is decoded, and nothing at all if the split is cached."""
    decoded: list[str | None] = []
    for module, name in ((files, "decode_image"), (encoded, "decode_crops"), (encoded, "decode_image")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments, plain=plain: decoded.append(arguments[1]) or plain(*arguments))
    selection = options([pictures]) if split == "files" else options(split=split)
    data = Data(path=str(pictures), height=8, width=12, cache=str(tmp_path / "cache"), validation_share=0.25)
    few = chosen_images(selection, data, progress=False, count=5)
    assert len(decoded) == 5
    assert not (tmp_path / "cache").exists()
    full = chosen_images(selection, data, progress=False)
    rows = evenly_spaced(len(full.pixels), 5).tolist()
    assert torch.equal(few.pixels, full.pixels[rows])
    assert few.labels is not None
    assert full.labels is not None
    assert (few.names, few.labels) == ([full.names[row] for row in rows], [full.labels[row] for row in rows])
    decoded.clear()
    again = chosen_images(selection, data, progress=False, count=5)
    assert torch.equal(again.pixels, few.pixels)
    assert again._replace(pixels=few.pixels) == few
    assert len(decoded) == (5 if split == "files" else 0)


def test_unreadable_images_among_few_are_left_out(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "images")
    (tmp_path / "images" / "down" / "000.png").write_bytes(b"none")
    data = Data(path=str(tmp_path / "images"), height=8, width=12, cache=str(tmp_path / "cache"), on_error="skip", validation_share=0.25)
    chosen = chosen_images(options(split=TRAIN), data, progress=False, count=36)
    assert len(chosen.pixels) == len(chosen.names) == len(chosen.labels or ()) == 35
    with pytest.raises(UserError, match=r"000\.png.*expected a readable image"):
        chosen_images(options(split=TRAIN), dataclasses.replace(data, on_error="raise"), progress=False, count=36)


def test_codes_equal_the_stores_and_pictures_their_decoding(finished_run: Path) -> None:
    run = RunDir(finished_run)
    tokenizer, store = load_tokenizer(run), CodeStore(finished_run / "codes" / VALIDATION)
    pixels = load_images(load_recipe(run.recipe).data).splits[VALIDATION].pixels
    codes, decoded = encode_and_decode(tokenizer, pixels, batch_size=5)
    (expected,) = store.codes(torch.arange(len(store)))
    assert torch.equal(codes[0], expected)
    one_batch = to_uint8(tokenizer.decode(tokenizer.encode(to_model(pixels))))
    assert (decoded.int() - one_batch.int()).abs().max() <= 1
    assert decoded.shape == pixels.shape


def test_labels_are_matched_by_name_to_the_priors_numbers() -> None:
    known = header(["across", "down", "up"])
    assert (labels := image_condition(known, None, images(["up", "across", "up"]))) is not None
    assert labels.tolist() == [2, 0, 2]
    assert (one_label := image_condition(known, "down", images(["up", "across", "up"]))) is not None
    assert one_label.tolist() == [1, 1, 1]
    assert image_condition(known, None, images(None)) is None
    assert image_condition(header(None), None, images(["up"] * 3)) is None
    assert image_condition(None, None, images(["up"] * 3)) is None


def test_labels_are_read_as_names_in_any_unicode_form_before_numbers() -> None:
    known = header(["2", "cafe\u0301", "~"])
    for label, number in (("2", 0), (2, 2), ("caf\u00e9", 1), ("cafe\u0301", 1), ("~", 2), ("1", 1)):
        assert sample_condition(known, label, 1).tolist() == [number]  # type: ignore[union-attr]
    assert image_condition(known, None, images(["caf\u00e9"] * 3)).tolist() == [1, 1, 1]  # type: ignore[union-attr]


def test_unknown_or_missing_labels_get_one_line() -> None:
    with pytest.raises(UserError, match=r"label: .*across, down.* found left"):
        image_condition(header(["across", "down"]), None, images(["down", "left", "down"]))
    with pytest.raises(UserError, match=r"label: expected one, .* found none"):
        image_condition(header(["across", "down"], supports_unconditional=False), None, images(None))
    with pytest.raises(UserError, match="label 3: expected none"):
        image_condition(header(None), "3", images(None))


LEFT = np.repeat(np.asarray([[255, 255, 0, 0]], np.uint8), 2, 0)
WHITE, BLACK = np.full_like(LEFT, 255), np.zeros_like(LEFT)


def to_rgba(grey: np.ndarray, alpha: np.ndarray, mode: str) -> Image.Image:
    return Image.fromarray(np.dstack([grey, grey, grey, alpha])).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_parts_of_a_mask_are_drawn_again(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    left = torch.from_numpy(LEFT >= 128)
    for grey, alpha in ((LEFT, WHITE), (WHITE, LEFT), (LEFT, LEFT)):
        assert torch.equal(picture_mask(to_rgba(grey, alpha, mode), "--mask"), left)
    assert not capsys.readouterr().out
    assert torch.equal(picture_mask(to_rgba(np.full_like(LEFT, 100), LEFT, mode), "--mask"), left)
    assert "--mask: a picture with transparent parts: those are drawn again, the others kept" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--mask: expected white where .*; found only black and transparent parts"):
        picture_mask(to_rgba(BLACK, LEFT, mode), "--mask")


def test_masks_may_be_of_any_depth() -> None:
    for mask in (Image.fromarray(LEFT), Image.fromarray(LEFT).convert("1"), Image.fromarray(LEFT.astype(np.uint16) * 257)):
        assert torch.equal(picture_mask(mask, "--mask"), torch.from_numpy(LEFT >= 128))
    with pytest.raises(UserError, match="--mask: expected a black and white picture of 8 or 16 bits, found one of mode F"):
        picture_mask(Image.fromarray(LEFT.astype(np.float32)), "--mask")
