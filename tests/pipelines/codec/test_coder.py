"""The codec: exact, near the prior's own bits, and in step whatever the arithmetic's last bits."""

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


def prior_of(kind: str, layout: SequenceLayout) -> StepwisePrior:
    return build(kind, layout).double()


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), _LONELY], ids=[*LAYOUTS, "a level of one code"])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_come_back_whatever_the_decoder_takes_at_once(kind: str, layout: SequenceLayout) -> None:
    prior, codes = prior_of(kind, layout), random_codes(layout, 11)
    labels = torch.arange(11) % 6  # 5: none
    for batch in (4, 64):
        encoding = encode(prior, codes, labels, batch)
        assert (encoding.coded.images, len(encoding.coded.offsets)) == (11, -(-11 // batch))
        for at_once in (None, 1, 3):
            found = decode(prior, encoding.coded, labels, at_once)
            assert all(torch.equal(*level) for level in zip(found, codes, strict=True))


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn"])
def test_threads_change_nothing(kind: str, threads: int) -> None:
    """Coded with as many threads as the test has, decoded with 1 and 2."""
    prior = prior_of(kind, LAYOUTS["top and bottom"])
    codes = random_codes(prior.layout, 40)
    coded = encode(prior, codes, None, 16).coded
    for others in (1, 2):
        torch.set_num_threads(others)
        assert all(torch.equal(*level) for level in zip(decode(prior, coded, None, 7), codes, strict=True))


# Of the functions that tables are made by, in float32: what another machine's library may give.
_IN_FLOAT32 = ("cos", "sin", "exp", "pow", "__rpow__", "__pow__", "atanh", "tanh")


def by_another_library(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> None:
    """From here on these functions give the next number upwards, in that precision."""

    def nudged(function: Any, *given: Any, **named: Any) -> torch.Tensor:
        result: torch.Tensor = function(*given, **named)
        return torch.nextafter(result, torch.full_like(result, torch.inf)) if result.dtype == dtype else result

    for name in _IN_FLOAT32:
        monkeypatch.setattr(torch.Tensor, name, partialmethod(partial(nudged, getattr(torch.Tensor, name))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["transformer", "pixelcnn, attention", "levelwise"])
def test_a_file_decodes_by_another_machines_cosines(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of positions are made where a prior is loaded; in float32 one of them may differ by a rounding."""
    layout = LAYOUTS["top and bottom"]
    prior, codes = prior_of(kind, layout), random_codes(layout, 11)
    coded, logits = encode(prior, codes, None, 11).coded, torch.cat([level.flatten() for level in prior.logits(codes, None)]).detach()
    by_another_library(monkeypatch, dtype)
    for there in (prior_of(kind, layout), float64_copy(build(kind, layout))):
        assert all(torch.equal(*level) for level in zip(decode(there, coded, None), codes, strict=True))
        assert float((torch.cat([level.flatten() for level in there.logits(codes, None)]).detach() - logits).abs().max()) < MARGIN


@pytest.mark.parametrize("quantizer", ["ema", "fsq", "lfq"])
def test_so_do_pixels(quantizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a tokenizer that knows positions, with any quantizer's table of codes."""
    chosen = {
        "network": part_from("tokenizer.network", {"kind": "vit", "downsampling": 2, "layers": 1, "width": 16, "heads": 2}),
        "quantizer": part_from("tokenizer.quantizer", {"kind": quantizer, **({} if quantizer == "fsq" else {"num_codes": 16})}),
        "objective": part_from("tokenizer.objective", {"kind": "logistic"}),
    }
    tokenizer = VQVAE(Tokenizer(code_dim=4, **chosen), 4, 6, 1).eval()
    codes = (torch.randint(tokenizer.quantizer.num_codes[0], (3, 2, 3)),)
    pixels = torch.randint(256, (3, 4, 6, 1), dtype=torch.uint8)
    coded, _ = encode_pixels(float64_copy(tokenizer), codes, pixels, 3)
    by_another_library(monkeypatch)
    assert torch.equal(decode_pixels(float64_copy(tokenizer), codes, coded), pixels)


class Disturbed(StepwisePrior):
    """A prior whose logits are off by up to `by`: a stand-in for another machine's arithmetic."""

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
def test_arithmetic_that_differs_within_the_clearance_decodes_exactly_and_beyond_it_is_noticed(kind: str) -> None:
    prior = prior_of(kind, _LONELY)
    codes = random_codes(_LONELY, 50)
    encoding = encode(prior, codes, None, 20)
    assert encoding.clearance >= MARGIN
    for by in (MARGIN, 0.99 * encoding.clearance):
        found = decode(Disturbed(prior, by).eval(), encoding.coded, None)
        assert all(torch.equal(*level) for level in zip(found, codes, strict=True))
    with pytest.raises(UserError, match="arithmetic"):
        decode(Disturbed(prior, 1e-2).eval(), encoding.coded, None)


def test_an_offset_keeps_logits_off_the_boundaries_where_none_would_flip_them() -> None:
    """Logits exactly halfway between multiples of 2^-10: the last bit decides, unless there is an offset."""
    logits = torch.arange(12, dtype=torch.float64).view(3, 4) * _STEP + _STEP / 2
    # Some go up, some down: a common shift of all would not show in probabilities.
    nudge = 1e-13 * torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert (weights(logits + nudge, 0) != weights(logits - nudge, 0)).any()
    offset, clearance = clear_offset([logits])
    assert clearance >= 0.49 * _STEP / 2**16
    assert (weights(logits + nudge, offset) == weights(logits - nudge, offset)).all()


def test_the_clearance_is_the_distance_that_it_says() -> None:
    """Against every logit's distance from every boundary, computed for that offset alone; no other offset is better."""
    logits = [torch.randn(7, 30, dtype=torch.float64) * 5, torch.randn(7, 1, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)]

    def distance(offset: int) -> float:
        shifted = torch.cat([x.flatten() for x in (logits[0], logits[2])]).numpy() / _STEP + offset / 2**16
        fraction = shifted - np.floor(shifted)
        return float(np.abs(fraction - 0.5).min()) * _STEP

    offset, clearance = clear_offset(logits)
    # Up to half a step of the offsets: who is further away has another offset nearer.
    assert clearance == pytest.approx(min(distance(offset), _STEP / 2**17), rel=1e-6)
    found = [distance(other) for other in range(0, 2**16, 97)]
    assert max(min(other, _STEP / 2**17) for other in found) <= clearance * (1 + 1e-6)
    assert min(found) < MARGIN * 1000  # there are offsets that would be worse


def test_logits_that_no_offset_keeps_clear_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = torch.arange(2**16, dtype=torch.float64).view(1, -1) * _STEP / 2**16
    assert clear_offset([everywhere])[1] < MARGIN
    prior = prior_of("transformer", LAYOUTS["one row"])
    monkeypatch.setattr(prior, "step", lambda code, labels, cache: everywhere.expand(2, -1))
    with pytest.raises(UserError, match="smaller batch"):
        encode(prior, random_codes(prior.layout, 2), None, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e5])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(UserError, match="finite"):
        clear_offset([torch.tensor([[0.0, bad]], dtype=torch.float64)])


@pytest.mark.parametrize("offset", [0, 1, 40_000, 65_535])
def test_weights_are_the_softmax_of_the_logits(offset: int) -> None:
    """To the rounding, half a step of 2^-10 on either side of the quotient."""
    logits = torch.rand(50, 200, dtype=torch.float64) * 8  # so that a weight has 20 bits and more
    found = weights(logits, offset)
    assert (found == np.floor(found)).all()
    assert (found.max(1) == 2**32).all()
    ratio = torch.from_numpy(found / found.sum(1, keepdims=True)) / logits.softmax(1)
    assert float(ratio.log().abs().max()) <= _STEP * 1.01


def test_the_table_is_the_exponential_to_the_last_integer() -> None:
    """Against the platform's exp, which may err by a unit or so in the last of 53 bits, of which 32 count."""
    below = np.arange(23_000)
    found = weights(torch.from_numpy(np.stack([np.zeros(23_000), -below * _STEP], 1)), 0)[:, 1]
    expected = np.exp(-below / 1024) * 2**32
    assert np.abs(found - np.floor(expected)).max() <= 1
    assert (found == np.floor(expected)).mean() > 0.999
    assert (np.diff(found) <= 0).all()
    assert found[-1] == 0


def test_a_code_thought_impossible_can_be_coded() -> None:
    """A hundred nats below the others: at most the coder's 24 bits of precision, and the words it ends with."""
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
def test_the_payload_is_what_the_prior_says_within_a_percent_and_four_bytes(kind: str, layout: str, images: int) -> None:
    """Codes drawn from the prior's own logits; its -log2 p by one full pass in float64, with torch's own softmax."""
    prior = prior_of(kind, LAYOUTS[layout])
    labels = torch.arange(images) % 5
    with torch.no_grad():
        cache, drawn = prior.new_cache(images), []
        for _ in range(prior.layout.length):
            logits = prior.step(drawn[-1] if drawn else None, labels, cache)
            drawn.append(torch.multinomial(logits.softmax(1), 1)[:, 0])
        codes = prior.layout.grids_of(torch.stack(drawn, 1))
        own = float(prior.nats(codes, labels).sum()) / math.log(2)
    encoding = encode(prior, codes, labels, code_batch_size(prior.layout, 64))
    assert encoding.bits == pytest.approx(own, rel=1e-9)
    assert len(encoding.coded.payload) <= 1.01 * own / 8 + 4
    assert len(encoding.coded.payload) >= 0.999 * own / 8 - 4  # less would be too good to be true
    assert all(torch.equal(*level) for level in zip(decode(prior, encoding.coded, labels), codes, strict=True))


def test_no_images_are_no_payload() -> None:
    prior = prior_of("transformer", LAYOUTS["top and bottom"])
    encoding = encode(prior, random_codes(prior.layout, 0), None, 8)
    assert (encoding.coded.payload, encoding.coded.offsets, encoding.bits) == (b"", [], 0)
    assert [tuple(level.shape) for level in decode(prior, encoding.coded, None)] == [(0, 1, 2), (0, 2, 4)]


def test_other_weights_are_noticed() -> None:
    """The wrong label is another distribution: the codes' checksum tells, or the coder itself."""
    prior = prior_of("transformer", LAYOUTS["one level"])
    codes = random_codes(prior.layout, 30)
    coded = encode(prior, codes, torch.zeros(30, dtype=torch.int64), 8).coded
    with pytest.raises(UserError, match="arithmetic"):
        decode(prior, coded, torch.ones(30, dtype=torch.int64))


def test_a_batch_fits_into_memory() -> None:
    large = SequenceLayout([(64, 64)], [65_536])
    assert code_batch_size(large, 64) == 1
    assert code_batch_size(LAYOUTS["one level"], 64) == 64
    middle = SequenceLayout([(32, 32)], [1024])
    assert code_batch_size(middle, 64) == 16
