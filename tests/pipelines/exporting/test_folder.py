"""Figures about a folder of graphs, compared with torch on the same weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pipelines import Generator
from pipelines.exporting.folder import COMPARED, drift, encoder_disagreement, exact_generator, excess_bits
from stage1_vqvae.data.pixels import to_model
from stage1_vqvae.model import VQVAE


@pytest.fixture(scope="module")
def generator(exported: Path) -> Generator:
    """Generator of the exported run."""
    return Generator.from_pretrained(exported / "run", device="cpu", precision="float32")


@pytest.fixture(scope="module")
def exact(generator: Generator) -> Generator:
    """A run whose prior has noise added to its weights."""
    noisy = exact_generator(generator)
    assert noisy.prior is not None
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in noisy.prior.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return noisy


@pytest.fixture(scope="module")
def folder(exported: Path) -> Path:
    return exported / "graphs"


def test_bits_lost_are_the_divergence(exact: Generator, generator: Generator, folder: Path) -> None:
    """The mean over drawn codes is that over all codes at each position, within its standard error."""
    assert exact.prior is not None
    assert generator.prior is not None
    drawn = exact.draw(3000, seed=7, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, guidance=1.0)
    with torch.no_grad():
        exact_log_p, graph_log_p = (
            prior.logits(drawn.codes, drawn.condition)[0].double().log_softmax(-1) for prior in (exact.prior, generator.prior)
        )
    divergence = float((exact_log_p.exp() * (exact_log_p - graph_log_p)).sum(-1).mean()) / math.log(2)
    bits, excess, error = excess_bits(exact, folder)
    assert divergence > 20 * error
    assert abs(excess - divergence) < 5 * error
    entropy = float(-(exact_log_p.exp() * exact_log_p).sum(-1).mean()) / math.log(2)
    assert bits == pytest.approx(entropy, rel=0.1)  # over other draws; nats would be a third less


def test_drift_counts_changed_codes_and_images(exact: Generator, generator: Generator, folder: Path) -> None:
    result = drift(exact, folder)
    count = result.codes // 6
    expected, other = exact.draw(count), generator.draw(count)
    differ = int((expected.codes[0] != other.codes[0]).sum())
    assert COMPARED <= result.codes < COMPARED + 6
    assert abs(result.changed_codes - differ) <= 0.002 * result.codes  # a draw within float32's rounding
    assert result.images == count
    other_images = int((expected.codes[0] != other.codes[0]).flatten(1).any(1).sum())
    assert abs(result.changed_images - other_images) <= 0.002 * count
    assert result.max_difference <= 1  # the decoder has no noise
    assert 0 <= result.mean_difference < 0.01


def test_codes_of_another_encoder_are_counted(generator: Generator, folder: Path) -> None:
    exact = exact_generator(generator)
    assert encoder_disagreement(exact, folder) <= 0.002  # a vector between two codes, within float32's rounding
    images, tokenizer = exact.sample(-(-COMPARED // 6), output="tensor"), exact.tokenizer
    torch.manual_seed(1)
    other = VQVAE(tokenizer.config, 8, 12, 3).eval().requires_grad_(False)
    differ = (tokenizer.encode(to_model(images))[0] != other.encode(to_model(images))[0]).double().mean()
    tokenizer.encode = other.encode  # type: ignore[method-assign]
    assert differ > 0.5
    assert encoder_disagreement(exact, folder) == pytest.approx(float(differ), abs=0.002)
