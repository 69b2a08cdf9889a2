"""What is said of a folder of graphs against what torch makes of the same weights."""

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
    """What the graphs are of."""
    return Generator.from_pretrained(exported / "run", device="cpu", precision="float32")


@pytest.fixture(scope="module")
def exact(generator: Generator) -> Generator:
    """The same run with noise on its prior's weights: from here, the graphs are of a worse prior."""
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
    """The mean over codes that were drawn is that over all codes there are, at each position, but for its error."""
    assert exact.prior is not None
    assert generator.prior is not None
    drawn = exact.draw(3000, seed=7, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, guidance=1.0)
    with torch.no_grad():
        own, other = (prior.logits(drawn.codes, drawn.condition)[0].double().log_softmax(-1) for prior in (exact.prior, generator.prior))
    divergence = float((own.exp() * (own - other)).sum(-1).mean()) / math.log(2)
    bits, found, error = excess_bits(exact, folder)
    assert divergence > 20 * error
    assert abs(found - divergence) < 5 * error
    entropy = float(-(own.exp() * own).sum(-1).mean()) / math.log(2)
    assert bits == pytest.approx(entropy, rel=0.1)  # over other draws; nats would be a third less


def test_drift_counts_what_differs(exact: Generator, generator: Generator, folder: Path) -> None:
    found = drift(exact, folder)
    count = found.codes // 6
    expected, other = exact.draw(count), generator.draw(count)
    differ = int((expected.codes[0] != other.codes[0]).sum())
    assert COMPARED <= found.codes < COMPARED + 6
    assert abs(found.changed_codes - differ) <= 0.002 * found.codes  # a draw within float32's rounding
    assert found.images == count
    other_images = int((expected.codes[0] != other.codes[0]).flatten(1).any(1).sum())
    assert abs(found.changed_images - other_images) <= 0.002 * count
    assert found.max_difference <= 1  # the decoder has no noise
    assert 0 <= found.mean_difference < 0.01


def test_codes_of_another_encoder_are_counted(generator: Generator, folder: Path) -> None:
    exact = exact_generator(generator)
    assert encoder_disagreement(exact, folder) <= 0.002  # a vector that is as near to two codes, within float32's rounding
    images, own = exact.sample(-(-COMPARED // 6), output="tensor"), exact.tokenizer
    torch.manual_seed(1)
    other = VQVAE(own.config, 8, 12, 3).eval().requires_grad_(False)
    differ = (own.encode(to_model(images))[0] != other.encode(to_model(images))[0]).double().mean()
    own.encode = other.encode  # type: ignore[method-assign]
    assert differ > 0.5
    assert encoder_disagreement(exact, folder) == pytest.approx(float(differ), abs=0.002)
