"""The folder of an exported run: graphs, model.json, and comparisons with the run's own samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.errors import UserError
from configs.parts import as_class
from pipelines.conditioning import need_classes
from pipelines.exporting.graphs import export_prior, export_tokenizer
from pipelines.generator import Generator
from stage2_prior.draw import StepwiseSampling, guidance_weights
from stage2_prior.priors.stepwise import StepwisePrior

COMPARED = 10_000
"""Smallest number of codes drawn for a comparison."""


def need_packages() -> None:
    """Check that the packages of the extra `onnx` are installed. Errors: UserError for one that is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401, torch's exporter needs it
    except ModuleNotFoundError as error:
        raise UserError(f"expected the package {error.name}, found none; pip install -e '.[onnx]'") from None


def exportable_prior(generator: Generator) -> StepwisePrior:
    """Return the generator's prior. Errors: UserError for one that the graphs and their sampler cannot represent."""
    prior, header = generator.stepwise_prior("export"), generator.header
    assert header is not None
    need_classes(header, "export")
    if prior.guidance_free is not None:
        raise UserError("prior.guidance_free: expected a prior trained without it to export, found one trained with it")
    if prior.draw_layout is not prior.layout:
        raise UserError("prior: expected one with prior.head table to export, found one with digits")
    if not prior.draws_in_raster_order(StepwiseSampling(), None):
        raise UserError(f"prior: expected one that draws codes one by one to export, found {header.config.kind}, which draws many at once")
    return prior


def export_graphs(generator: Generator, folder: Path) -> dict[str, Any]:
    """Write encoder.onnx, decoder.onnx and prior.onnx of a generator with a prior, on the CPU.

    Returns the content of model.json; the sampler reads all of it except the fingerprints.
    """
    prior, header = exportable_prior(generator), generator.header
    assert header is not None
    export_tokenizer(generator.tokenizer, folder)
    cache = export_prior(prior, folder)
    sampling = _sampling(generator)
    return {
        "image_shape": generator.image_shape,
        "grids": header.grids,
        "num_codes": header.num_codes,
        "label_names": list(header.condition.class_names) or None,
        "supports_unconditional": header.supports_unconditional,
        "cache": cache,
        "dtype": generator.sampling.precision,
        "sampling": {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p", "guidance")},
        "guidance_weights": guidance_weights(sampling, prior.layout.length),
        "tokenizer_sha256": generator.tokenizer_sha256,
        "prior_sha256": generator.origin["prior_sha256"],
    }


def _num_samples(exact: Generator) -> int:
    """Compute the number of samples for a comparison, at least two, so that the mean has a standard error."""
    return max(2, -(-COMPARED // sum(h * w for h, w in exact.tokenizer.grids)))


class Drift(NamedTuple):
    """Differences of a folder's samples from torch's in float64, with the recipe's settings and the same seed."""

    codes: int
    """Number of codes drawn."""
    changed_codes: int
    """Number of codes that differ from torch's; one different draw changes the codes after it."""
    images: int
    changed_images: int
    """Number of images with a code that differs from torch's."""
    max_difference: int
    """Largest difference between pixels decoded from the same codes, of 255."""
    mean_difference: float
    """Mean difference between them."""


def exact_generator(generator: Generator) -> Generator:
    """Load the same run and prior for sampling in float64."""
    exact = Generator.from_pretrained(generator.run.path, prior=generator.prior_name, device="cpu", precision="float64")
    exact.sampling = _sampling(exact)
    return exact


def _sampling(generator: Generator) -> StepwiseSampling:
    """Return the recipe's settings as exports draw: one code after another, and without guidance from a prior without condition dropout."""
    settings = as_class(generator.sampling, StepwiseSampling)
    guided = generator.header is not None and generator.header.supports_unconditional
    return settings if guided else dataclasses.replace(settings, guidance=1.0)


def drift(exact: Generator, folder: Path) -> Drift:
    """Compare a folder's samples with those of the exact generator over at least 10,000 codes."""
    from pipelines.exporting.sampler import Sampler

    count, sampler = _num_samples(exact), Sampler(folder)
    expected, (codes, _) = exact.draw(count, progress=True), sampler.sample(count)
    differ = [(level.numpy() != other).reshape(count, -1) for level, other in zip(expected.codes, codes, strict=True)]
    changed_codes = np.concatenate(differ, 1)
    pixels = np.abs(sampler.decode([level.numpy() for level in expected.codes]).astype(int) - expected.pixels.numpy())
    changed_images = int(changed_codes.any(1).sum())
    return Drift(changed_codes.size, int(changed_codes.sum()), count, changed_images, int(pixels.max()), float(pixels.mean()))


def encoder_disagreement(exact: Generator, folder: Path) -> float:
    """Compute the share of codes in which a folder's encoder differs from torch's, over at least 10,000 codes of drawn images."""
    import onnxruntime

    images = exact.sample(_num_samples(exact), output="tensor")
    inputs = images.movedim(3, 1).numpy().astype(np.float32) / np.float32(127.5) - 1
    session = onnxruntime.InferenceSession(folder / "encoder.onnx")
    batches = [session.run(None, {"images": inputs[start : start + 64]}) for start in range(0, len(inputs), 64)]
    levels = zip(exact.encode(images), map(np.concatenate, zip(*batches, strict=True)), strict=True)
    return float(np.concatenate([(level.numpy() != onnx_codes).ravel() for level, onnx_codes in levels]).mean())


class Excess(NamedTuple):
    """Additional bits per code under the folder's prior, for codes drawn from the exact prior."""

    bits: float
    """Bits per code under the exact prior."""
    excess: float
    """Additional bits per code under the folder's prior."""
    error: float
    """Standard error of `excess`."""


def excess_bits(exact: Generator, folder: Path) -> Excess:
    """Estimate the Kullback-Leibler divergence per code of the folder's prior from the exact one, without data.

    It is the mean of log2 p_exact - log2 p_folder over at least 10,000 codes drawn from the exact prior, at temperature 1, without filters
    and guidance, with labels taking turns.
    """
    from pipelines.exporting.sampler import Sampler

    tokens = sum(h * w for h, w in exact.tokenizer.grids)
    count, sampler = _num_samples(exact), Sampler(folder)
    samples = exact.draw(count, progress=True, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, guidance=1.0)
    labels = np.zeros(count, np.int64) if samples.condition is None else samples.condition.numpy()
    exact_bits = _bits_per_sequence(exact.surprisals(samples.codes, None if samples.condition is None else labels.tolist()))
    codes = np.concatenate([level.flatten(1).numpy() for level in samples.codes], 1)
    bits = np.zeros(count)
    for start in range(0, count, 64):
        rows = slice(start, start + 64)
        for position, logits in enumerate(sampler.logits(labels[rows], codes[rows])):
            logits = logits.astype(np.float64) - logits.max(1, keepdims=True)
            code_logits = np.take_along_axis(logits, codes[rows, position, None], 1)[:, 0]
            bits[rows] += (np.log(np.exp(logits).sum(1)) - code_logits) / math.log(2)
    excess = (bits - exact_bits) / tokens
    return Excess(float(exact_bits.mean()) / tokens, float(excess.mean()), float(excess.std(ddof=1) / math.sqrt(count)))


def _bits_per_sequence(levels: Sequence[Any]) -> np.ndarray:
    return np.asarray(sum(level.flatten(1).sum(1).numpy() for level in levels))
