"""The folder that a run is exported to: graphs, what model.json says of them, and how far what they draw is from the run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.errors import UserError
from pipelines.exporting.graphs import export_prior, export_tokenizer
from pipelines.generator import Generator

COMPARED = 10_000
"""Codes that are drawn to compare by, at least."""


def need_packages() -> None:
    """Errors: UserError for a package of the extra `onnx` that is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401, which torch needs for it
    except ModuleNotFoundError as error:
        raise UserError(f"expected the package {error.name}, found none; pip install -e '.[onnx]'") from None


def export_graphs(generator: Generator, folder: Path) -> dict[str, Any]:
    """Write encoder.onnx, decoder.onnx and prior.onnx of a generator with a prior, on the CPU.

    Returns what model.json is to say of them, of which the sampler reads all but the fingerprints.
    """
    prior, header = generator.stepwise_prior("export"), generator.header
    assert header is not None
    if header.condition.kind != "none" and not header.condition.class_names:
        raise UserError(f"prior: expected one of classes, or without a condition, to export, found {header.condition.describe()}")
    export_tokenizer(generator.tokenizer, folder)
    cache = export_prior(prior, folder)
    sampling = {**dataclasses.asdict(generator.sampling), "guidance": _guidance(generator)}
    return {
        "image_shape": generator.image_shape,
        "grids": header.grids,
        "num_codes": header.num_codes,
        "label_names": list(header.condition.class_names) or None,
        "supports_unconditional": header.supports_unconditional,
        "cache": cache,
        "dtype": generator.sampling.precision,
        "sampling": {key: value for key, value in sampling.items() if key not in ("batch_size", "precision")},
        "tokenizer_sha256": generator.tokenizer_sha256,
        "prior_sha256": generator.origin["prior_sha256"],
    }


def _count(exact: Generator) -> int:
    """Samples to compare by, so that the mean has an error."""
    return max(2, -(-COMPARED // sum(h * w for h, w in exact.tokenizer.grids)))


class Drift(NamedTuple):
    """How far a folder's samples are from torch's in float64, by the recipe's settings, from the same seed."""

    codes: int
    """Drawn."""
    others: int
    """Of these, not torch's; a draw that is another changes those after it."""
    images: int
    other_images: int
    """Of these, not torch's in any code."""
    furthest: int
    """Largest difference of pixels of the same codes, of 255."""
    mean: float
    """Mean difference of them."""


def exact_generator(generator: Generator) -> Generator:
    """The same run and prior, which draws in float64."""
    exact = Generator.from_pretrained(generator.run.path, prior=generator.prior_name, device="cpu", precision="float64")
    exact.sampling = dataclasses.replace(exact.sampling, guidance=_guidance(exact))
    return exact


def _guidance(generator: Generator) -> float:
    """The recipe's, or 1 by a prior that has not learned p(codes)."""
    return generator.sampling.guidance if generator.header is not None and generator.header.supports_unconditional else 1.0


def drift(exact: Generator, folder: Path) -> Drift:
    """How far samples of a folder are from those of the exact generator, of 10,000 codes or more that are drawn for it."""
    from pipelines.exporting.sampler import Sampler

    count, sampler = _count(exact), Sampler(folder)
    expected, (codes, _) = exact.draw(count, progress=True), sampler.sample(count)
    differ = [(level.numpy() != other).reshape(count, -1) for level, other in zip(expected.codes, codes, strict=True)]
    of_images = np.concatenate(differ, 1)
    pixels = np.abs(sampler.decode([level.numpy() for level in expected.codes]).astype(int) - expected.pixels.numpy())
    others = int(of_images.any(1).sum())
    return Drift(of_images.size, int(of_images.sum()), count, others, int(pixels.max()), float(pixels.mean()))


def other_codes(exact: Generator, folder: Path) -> float:
    """The share of codes that a folder's encoder finds otherwise than torch's, in images that are drawn, 10,000 codes or more."""
    import onnxruntime

    images = exact.sample(_count(exact), output="tensor")
    given = images.movedim(3, 1).numpy().astype(np.float32) / np.float32(127.5) - 1
    session = onnxruntime.InferenceSession(folder / "encoder.onnx")
    found = [session.run(None, {"images": given[start : start + 64]}) for start in range(0, len(given), 64)]
    levels = zip(exact.encode(images), map(np.concatenate, zip(*found, strict=True)), strict=True)
    return float(np.concatenate([(level.numpy() != other).ravel() for level, other in levels]).mean())


class Excess(NamedTuple):
    """What a folder's prior takes for codes that the exact one draws."""

    bits: float
    """That the exact one takes, a code."""
    more: float
    """Bits a code that the folder's takes more."""
    error: float
    """Standard error of these."""


def excess_bits(exact: Generator, folder: Path) -> Excess:
    """How many bits a code more the folder's prior takes than the exact one, for codes that the exact one draws.

    An estimate of the Kullback-Leibler divergence per code, for which no data is needed: the mean of log2 p_exact - log2 p_folder over
    10,000 codes or more, drawn unwarped and unguided, the labels taking turns.
    """
    from pipelines.exporting.sampler import Sampler

    tokens = sum(h * w for h, w in exact.tokenizer.grids)
    count, sampler = _count(exact), Sampler(folder)
    drawn = exact.draw(count, progress=True, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, guidance=1.0)
    labels = np.zeros(count, np.int64) if drawn.condition is None else drawn.condition.numpy()
    exactly = _of_sequences(exact.surprisals(drawn.codes, None if drawn.condition is None else labels.tolist()))
    codes = np.concatenate([level.flatten(1).numpy() for level in drawn.codes], 1)
    bits = np.zeros(count)
    for start in range(0, count, 64):
        rows = slice(start, start + 64)
        for position, logits in enumerate(sampler.logits(labels[rows], codes[rows])):
            logits = logits.astype(np.float64) - logits.max(1, keepdims=True)
            own = np.take_along_axis(logits, codes[rows, position, None], 1)[:, 0]
            bits[rows] += (np.log(np.exp(logits).sum(1)) - own) / math.log(2)
    excess = (bits - exactly) / tokens
    return Excess(float(exactly.mean()) / tokens, float(excess.mean()), float(excess.std(ddof=1) / math.sqrt(count)))


def _of_sequences(levels: Sequence[Any]) -> np.ndarray:
    return np.asarray(sum(level.flatten(1).sum(1).numpy() for level in levels))
