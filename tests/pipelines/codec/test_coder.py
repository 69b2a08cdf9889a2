"""The codec: exact, near the prior's bits, and independent of the last bits of floating-point arithmetic."""

from __future__ import annotations

import math
from functools import partial, partialmethod
from typing import Any

import numpy as np
import pytest
import torch
from constriction import stream

from configs.errors import UserError
from configs.parts import part_from
from configs.schema import Tokenizer
from pipelines.codec.coder import MARGIN, clear_offset, code_batch_size, decode, encode, weights
from pipelines.codec.pixels import decode_pixels, encode_pixels
from stage1_vqvae.model import VQVAE
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.priors.stepwise import Logits, StepwisePrior
from tests.stage2_prior.priors.prior_kinds import KINDS, LAYOUTS, build, random_codes
from training.devices import float64_copy

_STEP = 2.0**-10
_LONELY = SequenceLayout([(1, 2), (2, 2), (1, 3)], [1, 6, 300])


def exact_prior(kind: str, layout: SequenceLayout) -> StepwisePrior:
    return build(kind, layout).double()


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), _LONELY], ids=[*LAYOUTS, "a level of one code"])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_decode_at_any_batch_size(kind: str, layout: SequenceLayout) -> None:
    prior, codes = exact_prior(kind, layout), random_codes(layout, 11)
    labels = torch.arange(11) % 6  # 5: none
    for batch in (4, 64):
        encoding = encode(prior, codes, labels, batch)
        assert (encoding.coded.images, len(encoding.coded.offsets)) == (11, -(-11 // batch))
        for at_once in (None, 1, 3):
            decoded = decode(prior, encoding.coded, labels, at_once)
            assert all(torch.equal(*level) for level in zip(decoded, codes, strict=True))


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn"])
def test_the_number_of_threads_does_not_matter(kind: str, threads: int) -> None:
    """Encoded with the test's number of threads, decoded with 1 and 2."""
    prior = exact_prior(kind, LAYOUTS["top and bottom"])
    codes = random_codes(prior.layout, 40)
    coded = encode(prior, codes, None, 16).coded
    for others in (1, 2):
        torch.set_num_threads(others)
        assert all(torch.equal(*level) for level in zip(decode(prior, coded, None, 7), codes, strict=True))


# Functions that compute tables; another machine's library may round their results otherwise.
_INEXACT = ("cos", "sin", "exp", "pow", "__rpow__", "__pow__", "atanh", "tanh")


def use_another_library(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> None:
    """Make these functions return the next larger number of that precision."""

    def nudged(function: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
        result: torch.Tensor = function(*arguments, **keywords)
        return torch.nextafter(result, torch.full_like(result, torch.inf)) if result.dtype == dtype else result

    for name in _INEXACT:
        monkeypatch.setattr(torch.Tensor, name, partialmethod(partial(nudged, getattr(torch.Tensor, name))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["transformer", "pixelcnn, attention", "levelwise", "next_scale"])
def test_codes_decode_with_another_machines_cosines(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of positions are computed where a prior is loaded; in float32 they may differ by a rounding."""
    layout = LAYOUTS["top and bottom"]
    prior, codes = exact_prior(kind, layout), random_codes(layout, 11)
    coded, logits = encode(prior, codes, None, 11).coded, torch.cat([level.flatten() for level in prior.logits(codes, None)]).detach()
    use_another_library(monkeypatch, dtype)
    for loaded in (exact_prior(kind, layout), float64_copy(build(kind, layout))):
        assert all(torch.equal(*level) for level in zip(decode(loaded, coded, None), codes, strict=True))
        assert float((torch.cat([level.flatten() for level in loaded.logits(codes, None)]).detach() - logits).abs().max()) < MARGIN


@pytest.mark.parametrize("quantizer", ["ema", "fsq", "lfq"])
def test_pixels_decode_with_another_machines_cosines(quantizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tokenizer that embeds positions, and the code table of any quantizer."""
    parts = {
        "network": part_from("tokenizer.network", {"kind": "vit", "downsampling": 2, "layers": 1, "width": 16, "heads": 2}),
        "quantizer": part_from("tokenizer.quantizer", {"kind": quantizer, **({} if quantizer == "fsq" else {"num_codes": 16})}),
        "objective": part_from("tokenizer.objective", {"kind": "logistic"}),
    }
    tokenizer = VQVAE(Tokenizer(code_dim=4, **parts), 4, 6, 1).eval()
    codes = (torch.randint(tokenizer.quantizer.num_codes[0], (3, 2, 3)),)
    pixels = torch.randint(256, (3, 4, 6, 1), dtype=torch.uint8)
    coded, _ = encode_pixels(float64_copy(tokenizer), codes, pixels, 3)
    use_another_library(monkeypatch)
    assert torch.equal(decode_pixels(float64_copy(tokenizer), codes, coded), pixels)


class Disturbed(StepwisePrior):
    """A prior whose logits are off by up to `by`, like another machine's arithmetic."""

    def __init__(self, prior: StepwisePrior, by: float) -> None:
        super().__init__(prior.layout, prior.condition)
        self.prior, self.by = prior, by
        self.generator = torch.Generator().manual_seed(0)

    def logits(self, codes: Codes, labels: torch.Tensor | None, variants: torch.Tensor | None = None) -> Logits:
        return self.prior.logits(codes, labels)

    def new_cache(self, batch: int) -> object:
        return self.prior.new_cache(batch)

    def step(self, code: torch.Tensor | None, labels: torch.Tensor | None, cache: object) -> torch.Tensor:
        logits = self.prior.step(code, labels, cache)
        return logits + self.by * (2 * torch.rand(logits.shape, generator=self.generator, dtype=torch.float64) - 1)


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn"])
def test_different_arithmetic_decodes_within_the_clearance_and_is_detected_beyond(kind: str) -> None:
    prior = exact_prior(kind, _LONELY)
    codes = random_codes(_LONELY, 50)
    encoding = encode(prior, codes, None, 20)
    assert encoding.clearance >= MARGIN
    for by in (MARGIN, 0.99 * encoding.clearance):
        decoded = decode(Disturbed(prior, by).eval(), encoding.coded, None)
        assert all(torch.equal(*level) for level in zip(decoded, codes, strict=True))
    with pytest.raises(UserError, match="arithmetic"):
        decode(Disturbed(prior, 1e-2).eval(), encoding.coded, None)


def test_the_offset_keeps_logits_away_from_rounding_boundaries() -> None:
    """Logits exactly halfway between multiples of 2^-10: without an offset, the last bit decides."""
    logits = torch.arange(12, dtype=torch.float64).view(3, 4) * _STEP + _STEP / 2
    # Some go up, some down: a common shift would not change probabilities.
    nudge = 1e-13 * torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert (weights(logits + nudge, 0) != weights(logits - nudge, 0)).any()
    offset, clearance = clear_offset([logits])
    assert clearance >= 0.49 * _STEP / 2**16
    assert (weights(logits + nudge, offset) == weights(logits - nudge, offset)).all()


def test_the_clearance_is_the_distance_to_the_nearest_boundary() -> None:
    """Compared with every logit's distance from every boundary at that offset; no other offset is better."""
    logits = [torch.randn(7, 30, dtype=torch.float64) * 5, torch.randn(7, 1, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)]

    def distance(offset: int) -> float:
        shifted = torch.cat([x.flatten() for x in (logits[0], logits[2])]).numpy() / _STEP + offset / 2**16
        fraction = shifted - np.floor(shifted)
        return float(np.abs(fraction - 0.5).min()) * _STEP

    offset, clearance = clear_offset(logits)
    # At most half a step between offsets: a larger distance would be nearer to another offset.
    assert clearance == pytest.approx(min(distance(offset), _STEP / 2**17), rel=1e-6)
    distances = [distance(other) for other in range(0, 2**16, 97)]
    assert max(min(other, _STEP / 2**17) for other in distances) <= clearance * (1 + 1e-6)
    assert min(distances) < MARGIN * 1000  # some offsets are worse


def test_logits_without_a_clear_offset_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = torch.arange(2**16, dtype=torch.float64).view(1, -1) * _STEP / 2**16
    assert clear_offset([everywhere])[1] < MARGIN
    prior = exact_prior("transformer", LAYOUTS["one row"])
    monkeypatch.setattr(prior, "step", lambda code, labels, cache: everywhere.expand(2, -1))
    with pytest.raises(UserError, match="smaller batch"):
        encode(prior, random_codes(prior.layout, 2), None, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e5])
def test_non_finite_or_huge_logits_are_refused(bad: float) -> None:
    with pytest.raises(UserError, match="finite"):
        clear_offset([torch.tensor([[0.0, bad]], dtype=torch.float64)])


@pytest.mark.parametrize("offset", [0, 1, 40_000, 65_535])
def test_weights_are_the_softmax_of_the_logits(offset: int) -> None:
    """Up to rounding: half a step of 2^-10 on either side of the quotient."""
    logits = torch.rand(50, 200, dtype=torch.float64) * 8  # so that weights have at least 20 bits
    integers = weights(logits, offset)
    assert (integers == np.floor(integers)).all()
    assert (integers.max(1) == 2**32).all()
    ratio = torch.from_numpy(integers / integers.sum(1, keepdims=True)) / logits.softmax(1)
    assert float(ratio.log().abs().max()) <= _STEP * 1.01


def test_the_table_equals_the_exponential_to_the_last_integer() -> None:
    """Compared with the platform's exp, which may err in the last of 53 bits, of which 32 count."""
    below = np.arange(23_000)
    integers = weights(torch.from_numpy(np.stack([np.zeros(23_000), -below * _STEP], 1)), 0)[:, 1]
    expected = np.exp(-below / 1024) * 2**32
    assert np.abs(integers - np.floor(expected)).max() <= 1
    assert (integers == np.floor(expected)).mean() > 0.999
    assert (np.diff(integers) <= 0).all()
    assert integers[-1] == 0


def test_codes_of_zero_weight_can_be_coded() -> None:
    """A hundred nats below the others costs at most the coder's 24 bits of precision and its final words."""
    row = weights(torch.tensor([[0.0, -100.0, 1.0]], dtype=torch.float64), 0)
    assert row[0, 1] == 0
    family = stream.model.Categorical(perfect=False)
    coder = stream.queue.RangeEncoder()
    coder.encode(np.array([1], np.int32), family, row)
    assert coder.num_bits() <= 64
    assert stream.queue.RangeDecoder(coder.get_compressed()).decode(family, row).tolist() == [1]


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn"])
@pytest.mark.parametrize("layout", ["one level", "top and bottom", "residual"])
@pytest.mark.parametrize("images", [1, 1000])
def test_the_payload_is_the_priors_likelihood_within_a_percent_and_four_bytes(kind: str, layout: str, images: int) -> None:
    """Codes are drawn from the prior's logits; its -log2 p comes from one full pass in float64, with torch's softmax."""
    prior = exact_prior(kind, LAYOUTS[layout])
    labels = torch.arange(images) % 5
    with torch.no_grad():
        cache, drawn = prior.new_cache(images), []
        for _ in range(prior.layout.length):
            logits = prior.step(drawn[-1] if drawn else None, labels, cache)
            drawn.append(torch.multinomial(logits.softmax(1), 1)[:, 0])
        codes = prior.layout.grids_of(torch.stack(drawn, 1))
        prior_bits = float(prior.nats(codes, labels).sum()) / math.log(2)
    encoding = encode(prior, codes, labels, code_batch_size(prior.layout, 64))
    assert encoding.bits == pytest.approx(prior_bits, rel=1e-9)
    assert len(encoding.coded.payload) <= 1.01 * prior_bits / 8 + 4
    assert len(encoding.coded.payload) >= 0.999 * prior_bits / 8 - 4  # fewer bytes would point to an error
    assert all(torch.equal(*level) for level in zip(decode(prior, encoding.coded, labels), codes, strict=True))


def test_no_images_give_an_empty_payload() -> None:
    prior = exact_prior("transformer", LAYOUTS["top and bottom"])
    encoding = encode(prior, random_codes(prior.layout, 0), None, 8)
    assert (encoding.coded.payload, encoding.coded.offsets, encoding.bits) == (b"", [], 0)
    assert [tuple(level.shape) for level in decode(prior, encoding.coded, None)] == [(0, 1, 2), (0, 2, 4)]


def test_decoding_with_another_distribution_is_detected() -> None:
    """A wrong label is another distribution, detected by the codes' checksum or the coder."""
    prior = exact_prior("transformer", LAYOUTS["one level"])
    codes = random_codes(prior.layout, 30)
    coded = encode(prior, codes, torch.zeros(30, dtype=torch.int64), 8).coded
    with pytest.raises(UserError, match="arithmetic"):
        decode(prior, coded, torch.ones(30, dtype=torch.int64))


def test_batches_are_limited_by_memory() -> None:
    large = SequenceLayout([(64, 64)], [65_536])
    assert code_batch_size(large, 64) == 1
    assert code_batch_size(LAYOUTS["one level"], 64) == 64
    middle = SequenceLayout([(32, 32)], [1024])
    assert code_batch_size(middle, 64) == 16
