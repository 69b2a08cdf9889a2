"""A table of unusual files, each with the expected picture or error."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.data import Data
from configs.errors import UserError
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, VALIDATION

HEIGHT, WIDTH = 8, 12
RED, WHITE, GREY = (255, 0, 0), (255, 255, 255), (128, 128, 128)


def half_red() -> Image.Image:
    """Left half red, right half white."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), WHITE)
    picture.paste(RED, (0, 0, WIDTH // 2, HEIGHT))
    return picture


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def truncated_jpeg() -> bytes:
    content = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    return content[: len(content) // 2]


def sixteen_bits() -> bytes:
    return encoded(Image.fromarray(np.full((HEIGHT, WIDTH), 128 * 257, np.uint16)), "PNG")


def cmyk() -> bytes:
    return encoded(half_red().convert("CMYK"), "JPEG", quality=95, subsampling=0)


def transparent_gif() -> bytes:
    picture = half_red().quantize(4)
    return encoded(picture, "GIF", transparency=picture.getpixel((WIDTH - 1, 0)))


def rotated_by_exif() -> bytes:
    """Return a JPEG stored rotated, with its orientation in EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to display
    return encoded(half_red().rotate(90, expand=True), "JPEG", exif=exif, quality=95, subsampling=0)


def chunk(kind: bytes, body: bytes, flipped: int = 0) -> bytes:
    """A chunk of a PNG, with some bits of its checksum flipped."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ flipped)


def rotated() -> Image.Image:
    return half_red().rotate(90, expand=True)


def png_with(*chunks: bytes, picture: Image.Image | None = None) -> bytes:
    """Return a PNG, stored rotated unless `picture` is given, with metadata chunks."""
    content = encoded(picture or rotated(), "PNG")
    return content[:33] + b"".join(chunks) + content[33:]


def jpeg_with(marker: int, body: bytes) -> bytes:
    content = rotated_by_exif()
    return content[:2] + bytes((255, marker)) + struct.pack(">H", len(body) + 2) + body + content[2:]


def exif(*more: bytes) -> bytes:
    """EXIF of an orientation, 6, and of further entries."""
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 1 + len(more)) + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + b"".join(more) + bytes(4)


def odd_exif() -> bytes:
    """Return a JPEG whose EXIF has the resolution as text beside the orientation."""
    content = encoded(rotated(), "JPEG", quality=95, subsampling=0)
    body = b"Exif\0\0" + exif(struct.pack("<HHI4s", 0x11B, 2, 4, b"72\0\0"))
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + content[2:]


def pgm(maxval: int) -> bytes:
    """Return a grey PGM at half of its largest value."""
    dtype = ">u2" if maxval > 255 else "u1"
    return f"P5 {WIDTH} {HEIGHT} {maxval}\n".encode() + np.full((HEIGHT, WIDTH), round(maxval * 0.502), dtype).tobytes()


def tiff(bits: int, white_is_zero: bool, content: bytes) -> bytes:
    """Return an uncompressed grey TIFF with few tags."""
    size, rows = {256: WIDTH, 257: HEIGHT, 258: bits}, {273: 8, 277: 1, 278: HEIGHT, 279: len(content)}
    tags = {**size, 259: 1, 262: int(not white_is_zero), **rows}
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + ifd


def wide() -> bytes:
    """Return a very wide red image with `half_red` in the middle."""
    picture = Image.new("RGB", (20_000, HEIGHT), RED)
    picture.paste(half_red(), ((20_000 - WIDTH) // 2, 0))
    return encoded(picture, "PNG")


def one_pixel() -> bytes:
    return encoded(Image.new("RGB", (1, 1), GREY), "PNG")


def animated() -> bytes:
    return encoded(half_red(), "GIF", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT), GREY)])


LONG_TEXT = b"parameters\0\0" + zlib.compress(b"a" * 3_000_000)
UPRIGHT: tuple[tuple[int, int, int], tuple[int, int, int]] = (RED, WHITE)
TABLE: dict[str, tuple[str, Callable[[], bytes], object]] = {
    # case: file name, content, decoded colours of the left and the right half, or parts of the error
    "16-bit grey": ("a.png", sixteen_bits, (GREY, GREY)),
    "CMYK": ("a.jpg", cmyk, UPRIGHT),
    "palette with transparency": ("a.gif", transparent_gif, UPRIGHT),
    "turned by EXIF": ("a.jpg", rotated_by_exif, UPRIGHT),
    "turned by EXIF with an odd tag": ("a.jpg", odd_exif, UPRIGHT),
    "turned, beside a broken segment": ("a.jpg", lambda: jpeg_with(0xE2, b"ICC_PROFILE\0"), UPRIGHT),
    "turned, beside long text": ("a.png", lambda: png_with(chunk(b"eXIf", exif()), chunk(b"zTXt", LONG_TEXT)), UPRIGHT),
    "turned, beside a wrong checksum": ("a.png", lambda: png_with(chunk(b"eXIf", exif()), chunk(b"tEXt", b"a\0b", 1)), UPRIGHT),
    "broken EXIF": ("a.png", lambda: png_with(chunk(b"eXIf", b"MM"), picture=half_red()), UPRIGHT),
    "a broken colour profile": ("a.png", lambda: png_with(chunk(b"iCCP", b"x"), picture=half_red()), UPRIGHT),
    "16-bit PGM": ("a.pgm", lambda: pgm(65535), (GREY, GREY)),
    "10-bit PGM": ("a.pgm", lambda: pgm(1023), (GREY, GREY)),
    "12-bit TIFF": ("a.tif", lambda: tiff(12, False, bytes((0x80, 0x18, 0x01)) * (WIDTH * HEIGHT // 2)), (GREY, GREY)),
    "16-bit TIFF whose white is 0": ("a.tif", lambda: tiff(16, True, bytes((0xFF, 0x1F)) * WIDTH * HEIGHT), ((224,) * 3, (224,) * 3)),
    "floating point": ("a.tif", lambda: encoded(Image.new("F", (WIDTH, HEIGHT), 0.5), "TIFF"), ["from 0.5 to 0.5", "--data.white"]),
    "an animation's first picture": ("a.gif", animated, UPRIGHT),
    "one pixel": ("a.png", one_pixel, (GREY, GREY)),
    "20,000 pixels wide": ("a.png", wide, UPRIGHT),
    "a JPEG named PNG": ("a.png", cmyk, UPRIGHT),
    "a truncated JPEG": ("a.jpg", truncated_jpeg, ["a.jpg: expected a readable image", "truncated"]),
    "an empty file": ("a.png", bytes, ["a.png: expected a readable image", "found: one that Pillow cannot identify"]),
    "text": ("a.png", lambda: b"hello", ["a.png: expected a readable image", "found: one that Pillow cannot identify"]),
    "400 million pixels": (
        "a.png",
        lambda: encoded(Image.new("1", (20_000, 20_000)), "PNG"),
        ["a.png: expected a readable image", "400000000 pixels"],
    ),
    "a name that is not UTF-8": (os.fsdecode(b"\xff.png"), one_pixel, ["\\xff.png", "expected a name in UTF-8"]),
    "a folder's name that is not UTF-8": (os.fsdecode(b"\xff/a.png"), one_pixel, ["\\xff", "expected a name in UTF-8"]),
    "a hidden file": (".a.png", lambda: b"hello", None),
}


def load(folder: Path, cache: Path) -> np.ndarray:
    """Load all pictures of a folder, in random order."""
    splits = load_images(Data(path=str(folder), cache=str(cache), height=HEIGHT, width=WIDTH, validation_share=0.5)).splits
    return np.concatenate([splits[TRAIN].pixels[:].numpy(), splits[VALIDATION].pixels[:].numpy()]).astype(int)


@pytest.mark.parametrize("case", TABLE)
def test_each_file_is_decoded_or_refused(case: str, tmp_path: Path) -> None:
    name, content, outcome = TABLE[case]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (WIDTH, HEIGHT), (0, 0, number)).save(folder / f"{number}.png")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content())
    if isinstance(outcome, list):
        with pytest.raises(UserError) as error:
            load(folder, tmp_path / "cache")
        assert all(words in str(error.value) for words in outcome), error.value
        assert "\n" not in str(error.value)
        return
    pictures = load(folder, tmp_path / "cache")
    bright = [picture for picture in pictures if picture.max() > 1]
    assert len(pictures) == 2 + len(bright)
    if outcome is None:
        assert not bright
        return
    (picture,) = bright
    assert isinstance(outcome, tuple)
    for half, colour in zip((picture[:, : WIDTH // 2 - 1], picture[:, WIDTH // 2 + 1 :]), outcome, strict=True):
        assert np.abs(half.mean((0, 1)) - colour).max() < 12  # JPEG is lossy


@pytest.mark.parametrize("link", ["to itself", "to nothing", "to its folder"])
def test_links_are_followed_counted_as_broken_or_refused(link: str, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (WIDTH, HEIGHT), (0, 0, number)).save(folder / f"{number}.png")
    os.symlink(folder / "0.png", folder / "4.png")
    target = {"to itself": folder / "a.png", "to nothing": folder / "b.png", "to its folder": folder}[link]
    os.symlink(target, folder / ("sub" if target == folder else "a.png"))
    if target == folder:
        with pytest.raises(UserError, match=r"sub: expected a folder, found a link to one"):
            load(folder, tmp_path / "cache")
    else:
        assert len(load(folder, tmp_path / "cache")) == 5


def test_a_split_can_be_a_link(tmp_path: Path) -> None:
    """`datasets` follows the link; changed images behind it are noticed."""
    for name in ("train", "elsewhere"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (WIDTH, HEIGHT), (0, 0, number)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "train").rename(tmp_path / "pictures/train")
    os.symlink(tmp_path / "elsewhere", tmp_path / "pictures/validation")
    assert load(tmp_path / "pictures", tmp_path / "cache").max() == 2
    Image.new("RGB", (WIDTH, HEIGHT), RED).save(tmp_path / "elsewhere/1.png")
    assert load(tmp_path / "pictures", tmp_path / "cache").max() == 255


def test_an_unreadable_folder_is_refused(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its images would be missing silently."""
    real = os.scandir

    def refuse_down(path: object) -> object:
        if str(path).endswith("down"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", refuse_down)
    with pytest.raises(UserError, match=r"down: expected a folder that can be read, found: Permission denied"):
        load(pictures, tmp_path)
