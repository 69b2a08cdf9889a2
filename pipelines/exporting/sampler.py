"""Sample images from a run that was exported to ONNX, with numpy and onnxruntime, without torch.

    python sample.py --n 64
    python sample.py --n 8 --label 7 --seed 1 --guidance 1.5 --output pictures

Reads model.json, prior.onnx and decoder.onnx in its folder. Sample i of a seed has the same codes in any batch, equal to those of the run
itself (with the prior in float64; in float32, rounding may change one). They are decoded in float32: a pixel may differ by one of 256
levels.

    from sample import Sampler

    codes, images = Sampler(folder).sample(4, label="7", seed=1)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import operator
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

Array = np.ndarray


def uniforms(seed: int, number: int, length: int) -> Array:
    """Draw the uniforms (T,) of a sample, equal to those of a torch generator seeded from the seed and the sample's number."""
    digest = hashlib.blake2b(repr((seed, "sample", number)).encode(), digest_size=8).digest()
    derived = int.from_bytes(digest, "little") >> 1
    raw = np.random.RandomState(derived & 0xFFFFFFFF).randint(0, 2**32, 2 * length, np.uint64)  # MT19937, seeded as torch does
    return ((raw[::2] << np.uint64(32) | raw[1::2]) & np.uint64(2**53 - 1)) * 2.0**-53


def warp(logits: Array, settings: dict[str, Any]) -> Array:
    """Compute probabilities (B, K), float64, from logits (B, K) with temperature, top_k, top_p and min_p."""
    logits = logits.astype(np.float64)
    if settings["temperature"] == 0:
        return np.eye(logits.shape[1])[logits.argmax(1)]
    logits = logits / settings["temperature"]
    if 0 < settings["top_k"] < logits.shape[1]:
        least = np.sort(logits, 1)[:, -settings["top_k"], None]
        logits = np.where(logits < least, -np.inf, logits)
    most = logits.max(1, keepdims=True)
    below = logits < most + math.log(settings["min_p"]) if settings["min_p"] > 0 else np.zeros_like(logits, bool)
    probabilities = np.exp(logits - most)
    probabilities /= probabilities.sum(1, keepdims=True)
    if settings["top_p"] < 1:
        order = np.argsort(-probabilities, 1, kind="stable")
        ordered = np.take_along_axis(probabilities, order, 1)
        ordered = ordered * (ordered.cumsum(1) - ordered < settings["top_p"] - 1e-12)
        np.put_along_axis(probabilities, order, ordered, 1)
    probabilities = np.where(below, 0, probabilities)
    return probabilities / probabilities.sum(1, keepdims=True)


def draw(probabilities: Array, uniform: Array) -> Array:
    """Draw codes (B,) from probabilities (B, K): the first code whose cumulative probability exceeds the uniform (B,)."""
    cumulative = probabilities.cumsum(1)
    return np.minimum((cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(1), probabilities.shape[1] - 1)


class Sampler:
    """Sampler of an exported folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.model: dict[str, Any] = json.loads((self.folder / "model.json").read_text(encoding="utf-8"))
        self.prior, self.decoder = (onnxruntime.InferenceSession(self.folder / f"{name}.onnx") for name in ("prior", "decoder"))
        sizes = [h * w for h, w in self.model["grids"]]
        self.levels = [level for level, size in enumerate(sizes) for _ in range(size)]
        self.offsets = np.cumsum([0, *self.model["num_codes"]])

    def labels_of(self, label: str | int | Sequence[str | int] | None, n: int) -> Array:
        """Return the label of each sample, (N,), from one label for all or one per sample; None: the classes take turns."""
        names = self.model["label_names"]
        if not names:
            if label is not None:
                raise ValueError(f"label {label}: expected none, since this prior has no labels")
            return np.zeros(n, np.int64)
        labels = [label] * n if isinstance(label, str | int) else [k % len(names) for k in range(n)] if label is None else list(label)
        composed = [unicodedata.normalize("NFC", text) if isinstance(text, str) else text for text in labels]  # like the model's names
        numbers = [names.index(text) if text in names else int(text) if str(text).isdecimal() else -1 for text in composed]
        if len(numbers) != n or not all(0 <= number < len(names) for number in numbers):
            raise ValueError(f"label: expected names ({', '.join(names[:10])}) or numbers below {len(names)}, found {label}")
        return np.array(numbers, np.int64)

    def sample(self, n: int, label: Any = None, seed: int = 0, **settings: Any) -> tuple[list[Array], Array]:
        """Draw samples: codes, int64 (N, h, w) per level, and images, uint8 (N, H, W, C). `settings` replace the model's."""
        settings, labels = self._checked({**self.model["sampling"], **settings}), self.labels_of(label, n)
        seed = operator.index(seed)  # an int, since its text is hashed
        parts = [self._batch(range(start, min(n, start + 64)), labels, seed, settings) for start in range(0, n, 64)]
        sequences = np.concatenate(parts)
        splits = np.split(sequences, np.cumsum([h * w for h, w in self.model["grids"]])[:-1], 1)
        codes = [level.reshape(n, *grid) for level, grid in zip(splits, self.model["grids"], strict=True)]
        return codes, self.decode(codes)

    def _checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Check settings. Errors: ValueError naming an invalid one."""
        holds = {
            "temperature": settings["temperature"] >= 0,
            "top_k": settings["top_k"] >= 0,
            "top_p": 0 < settings["top_p"] <= 1,
            "min_p": 0 <= settings["min_p"] <= 1,
            "guidance": abs(settings["guidance"]) < math.inf and (settings["guidance"] == 1 or self.model["supports_unconditional"]),
        }
        for name, value in settings.items():
            if not holds.get(name, False):
                raise ValueError(f"{name}: expected {'a value that can be' if name in holds else f'one of {sorted(holds)}'}, found {value}")
        return settings

    def decode(self, codes: list[Array]) -> Array:
        """Decode codes to images, uint8 (N, H, W, C)."""
        inputs = {f"level{number}": level for number, level in enumerate(codes)}
        batches = [
            self.decoder.run(None, {name: level[start : start + 64] for name, level in inputs.items()})[0]
            for start in range(0, len(codes[0]), 64)
        ]
        images = np.concatenate(batches).transpose(0, 2, 3, 1)
        return np.round((images.clip(-1, 1) + 1) * np.float32(127.5)).astype(np.uint8)

    def _batch(self, numbers: range, labels: Array, seed: int, settings: dict[str, Any]) -> Array:
        """Draw the codes (B, T) of the samples with these numbers."""
        length, batch = len(self.levels), len(numbers)
        uniform = np.stack([uniforms(seed, number, length) for number in numbers])
        rows = labels[numbers.start : numbers.stop]
        guides = bool(self.model["label_names"]) and settings["guidance"] != 1
        if guides:
            rows = np.concatenate([rows, np.full(batch, len(self.model["label_names"]))])
        codes = np.zeros((len(rows), length), np.int64)
        for position, logits in enumerate(self.logits(rows, codes)):
            if guides:
                scale = 1 + self.model["guidance_weights"][position] * (settings["guidance"] - 1)
                logits = logits[batch:] + scale * (logits[:batch] - logits[batch:])
            drawn = draw(warp(logits, settings), uniform[:, position])
            codes[:, position] = np.tile(drawn, 2) if guides else drawn
        return codes[:batch]

    def logits(self, labels: Array, codes: Array) -> Iterator[Array]:
        """Yield the logits (B, K) of each position, given labels (B,) and the codes (B, T) before it, which the caller fills in."""
        shape, dtype = self.model["cache"], self.model["dtype"]
        cache = [np.zeros((len(labels), *shape), dtype)] * 2 if shape else []
        tokens = np.zeros(len(labels), np.int64)
        for position, level in enumerate(self.levels):
            inputs = {"labels": labels, "position": np.array([position])}
            if shape:
                logits, *cache = self.prior.run(None, {**inputs, "tokens": tokens, "keys": cache[0], "values": cache[1]})
            else:
                (logits,) = self.prior.run(None, {**inputs, "codes": codes})
            yield logits[:, self.offsets[level] : self.offsets[level + 1]]
            tokens = codes[:, position] + self.offsets[level]


def main() -> None:
    """Run the command line: write PNGs and a grid of all images."""
    from PIL import Image

    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a console may lack characters of the folder's name
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("n", 64), ("seed", 0), ("top_k", None)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    for name in ("temperature", "top_p", "min_p", "guidance"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float)
    parser.add_argument("--label", help="label of all images, by name or number (default: labels take turns)")
    parser.add_argument("--output", type=lambda text: Path(text).expanduser(), default=Path("samples"), help="folder to write")
    options = vars(parser.parse_args())
    n, seed, label, output = (options.pop(name) for name in ("n", "seed", "label", "output"))
    settings = {name: value for name, value in options.items() if value is not None}
    try:
        images = Sampler(Path(__file__).parent).sample(n, label, seed, **settings)[1]
    except ValueError as error:
        parser.error(str(error))
    output.mkdir(parents=True, exist_ok=True)
    pictures = [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images]
    side, (width, height) = math.ceil(math.sqrt(n)), pictures[0].size
    grid = Image.new("RGB", (side * (width + 2), -(-n // side) * (height + 2)), "white")
    for number, picture in enumerate(pictures):
        picture.save(output / f"{number:05d}.png")
        grid.paste(picture, (number % side * (width + 2), number // side * (height + 2)))
    grid.save(output / "grid.png")
    print(f"wrote {n} images to {output}; look at {output / 'grid.png'}")


if __name__ == "__main__":
    main()
