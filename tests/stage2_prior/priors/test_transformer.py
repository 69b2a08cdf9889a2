"""Transformer: embeddings, levels, sizes of the literature."""

from __future__ import annotations

import pytest
import torch

from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.none import NoCondition
from stage2_prior.priors.blocks import SwiGLU
from stage2_prior.priors.prior_file import build_prior
from stage2_prior.priors.stepwise import FixedBatch
from stage2_prior.priors.transformer import Transformer, TransformerPart
from tests.stage2_prior.priors.prior_kinds import LAYOUTS, build, classes, manifest, random_codes


def test_start_labels_and_tokens_share_no_embedding() -> None:
    prior = build("transformer", LAYOUTS["top and bottom"])
    assert isinstance(prior, Transformer)
    assert prior.token.weight.shape == (4 + 6, 32)
    assert prior.label.weight.shape == (6, 32)
    pointers = {prior.start.data_ptr(), prior.token.weight.data_ptr(), prior.label.weight.data_ptr()}
    assert len(pointers) == 3


def test_positions_differ_by_level_row_and_column() -> None:
    """With all codes alike, no two positions of a hierarchy have the same embedding, and a coarse code lies amid its finer ones."""
    prior = build("transformer", LAYOUTS["top and bottom"])
    assert isinstance(prior, Transformer)
    embedded = prior.position_embeddings()
    assert len(embedded.unique(dim=0)) == prior.layout.length
    assert prior.layout.centres()[:2].tolist() == [[0.5, 0.5], [0.5, 2.5]]  # one row of two, over two rows of four
    assert prior.layout.centres()[2:4].tolist() == [[0, 0], [0, 1]]


def test_the_hand_written_gradient_of_the_mlp_equals_finite_differences() -> None:
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(SwiGLU(16).double(), torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(("preset", "millions"), [("B", 111), ("L", 343)])
def test_presets_have_the_sizes_of_the_literature(preset: str, millions: int) -> None:
    """LlamaGen's B and L (Sun et al. 2024, table 1): 16,384 codes, 1,000 labels, 16 x 16 positions."""
    with torch.device("meta"):
        prior = build_prior(TransformerPart(preset=preset), classes(1000), manifest(SequenceLayout([(16, 16)], [16_384])))  # type: ignore[arg-type]
    assert sum(parameter.numel() for parameter in prior.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@torch.no_grad()
def test_a_head_gain_acts_alike_in_full_passes_steps_static_steps_and_prefill() -> None:
    layout = LAYOUTS["top and bottom"]
    prior, plain = (build("transformer", layout, head_gain=gain).double() for gain in (True, False))
    codes, labels = random_codes(layout, 3), torch.arange(3)
    gains = {name: gain for name, gain in prior.named_parameters() if name.endswith("gain")}
    assert {name: gain.shape for name, gain in gains.items()} == {f"blocks.{layer}.attention.gain": (4,) for layer in range(3)}
    expected = [logits for level in prior.logits(codes, labels) for logits in level.unbind(1)]
    batch = FixedBatch(layout.flat(codes), labels, torch.zeros(1, dtype=torch.int64))
    steps, cache, sequences = prior.fixed_steps(batch), prior.new_cache(3), layout.flat(codes)
    assert steps is not None
    for position, logits in enumerate(expected):
        steps.prepare(position)
        batch.position.fill_(position)
        prefilled = prior.new_cache(3)
        if position > 0:
            prior.prefill(sequences, 0, position, labels, prefilled)
        before = sequences[:, position - 1] if position else None
        for found in (prior.step(before, labels, cache), prior.step(before, labels, prefilled), steps.logits(steps.phase(position))):
            torch.testing.assert_close(found, logits)
    plain.load_state_dict({name: weight for name, weight in prior.state_dict().items() if name not in gains})
    for gained, without in zip(prior.logits(codes, labels), plain.logits(codes, labels), strict=True):
        assert not torch.allclose(gained, without, atol=1e-3)
    for gain in gains.values():
        gain.fill_(1)
    for gained, without in zip(prior.logits(codes, labels), plain.logits(codes, labels), strict=True):
        assert torch.equal(gained, without)


def test_codes_with_near_vectors_begin_with_near_embeddings() -> None:
    """Per level, at the scale of the default initialisation, which shows no such correlation."""
    layout = SequenceLayout([(1, 2), (2, 4)], [40, 60])
    plain = TransformerPart(layers=1, width=64, heads=1).build(layout, NoCondition()).state_dict()
    prior = TransformerPart(layers=1, width=64, heads=1).build(layout, NoCondition())
    vectors = [torch.randn(k, 8) * scale for k, scale in zip(layout.num_codes, (0.01, 100), strict=True)]
    prior.initialise_from(vectors)
    for name in ("token.weight", "head.weight"):
        initialised = prior.state_dict()[name]
        assert initialised.std().item() == pytest.approx(plain[name].std().item(), rel=0.1)
        for embeddings, default, level_vectors in zip(
            *(weight.split(layout.num_codes) for weight in (initialised, plain[name])), vectors, strict=True
        ):
            distances = torch.stack([torch.pdist(rows) for rows in (level_vectors, embeddings, default)])
            _, with_vectors, without = torch.corrcoef(distances)[0].tolist()
            assert with_vectors > 0.7
            assert abs(without) < 0.2
