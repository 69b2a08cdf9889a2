"""The transformer's own: embeddings, levels, steps of fixed shape, sizes of the literature."""

from __future__ import annotations

import pytest
import torch

from configs.schema import Sampling
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.generate import generate, uniforms
from stage2_prior.priors.cuda_graphs import GraphedSteps, GraphedTransformer
from stage2_prior.priors.prior_file import build_prior
from stage2_prior.priors.transformer import SwiGLU, Transformer, TransformerPart
from tests.stage2_prior.priors.prior_kinds import LAYOUTS, build, manifest, random_codes


def test_start_labels_and_tokens_share_no_embedding() -> None:
    prior = build("transformer", LAYOUTS["top and bottom"])
    assert isinstance(prior, Transformer)
    assert prior.token.weight.shape == (4 + 6, 32)
    assert prior.label.weight.shape == (6, 32)
    pointers = {prior.start.data_ptr(), prior.token.weight.data_ptr(), prior.label.weight.data_ptr()}
    assert len(pointers) == 3


def test_a_position_knows_its_level_row_and_column() -> None:
    """With all codes alike, no two positions of a hierarchy have the same embedding, and a coarse code lies amid its finer ones."""
    prior = build("transformer", LAYOUTS["top and bottom"])
    assert isinstance(prior, Transformer)
    embedded = prior._embedded_positions()
    assert len(embedded.unique(dim=0)) == prior.layout.length
    assert prior.layout.centres()[:2].tolist() == [[0.5, 0.5], [0.5, 2.5]]  # one row of two, over two rows of four
    assert prior.layout.centres()[2:4].tolist() == [[0, 0], [0, 1]]


def test_the_mlps_gradient_written_by_hand_is_that_of_small_differences() -> None:
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(SwiGLU(16).double(), torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_steps_of_fixed_shape_are_the_steps(layout: SequenceLayout) -> None:
    """What a CUDA graph replays: the position as a tensor, attention over the whole cache under a mask."""
    prior = build("transformer", layout).double()
    assert isinstance(prior, Transformer)
    codes, labels = random_codes(layout, 5), torch.arange(5)
    cache, fixed, positions = prior.new_cache(5), prior.new_cache(5), layout.flat(codes)
    tokens = layout.to_tokens(codes)
    for position in range(layout.length):
        step = prior.step(None if position == 0 else positions[:, position - 1], labels, cache)
        before = tokens[:, position - 1] if position else torch.zeros(5, dtype=torch.int64)
        same = prior.fixed_step(before, labels, fixed, torch.tensor([position]), layout.level_of(position))
        assert torch.allclose(step, same, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_replayed_steps_draw_the_same_codes(layout: SequenceLayout, guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the capture itself, which needs a GPU: in place of a graph, the step that it would hold."""

    class Replayed:
        def __init__(self, steps: GraphedSteps, level: int) -> None:
            self.steps, self.level = steps, level
            self.logits = torch.empty(steps.batch, layout.num_codes[level], dtype=torch.float64)

        def replay(self) -> None:
            held = self.steps
            self.logits.copy_(held._prior.fixed_step(held._tokens, held._labels, held._cache, held._position, self.level))

    def captured(steps: GraphedSteps, level: int) -> tuple[Replayed, torch.Tensor]:
        replayed = Replayed(steps, level)
        return replayed, replayed.logits

    monkeypatch.setattr(GraphedSteps, "_captured", captured)
    prior = build("transformer", layout).double()
    assert isinstance(prior, Transformer)
    graphed = GraphedTransformer(prior)
    labels = torch.arange(4)
    for batch in range(2):  # the second on the first one's graphs and caches
        uniform = uniforms(batch, torch.arange(4), layout.length)
        plain, same = (generate(model, labels, uniform, Sampling(guidance=guidance)) for model in (prior, graphed))
        assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))


def test_steps_of_fixed_shape_are_one_program() -> None:
    """Traced once, whole, the program serves every position."""
    prior = build("transformer", LAYOUTS["one level"])
    assert isinstance(prior, Transformer)
    programs = []

    def count(graph: torch.fx.GraphModule, _inputs: object) -> object:
        programs.append(graph)
        return graph.forward

    compiled = torch.compile(prior.fixed_step, fullgraph=True, backend=count)
    nothing = torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        cache = prior.new_cache(2)
        for position in range(4):
            compiled(nothing, nothing, cache, torch.tensor([position]), 0)
    assert len(programs) == 1


@pytest.mark.parametrize(("preset", "millions"), [("B", 111), ("L", 343)])
def test_presets_have_the_sizes_of_the_literature(preset: str, millions: int) -> None:
    """LlamaGen's B and L (Sun et al. 2024, table 1): 16,384 codes, 1,000 labels, 16 x 16 positions."""
    with torch.device("meta"):
        prior = build_prior(TransformerPart(preset=preset), manifest(SequenceLayout([(16, 16)], [16_384]), 1000))  # type: ignore[arg-type]
    assert sum(parameter.numel() for parameter in prior.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_training_begins_with_codes_of_near_vectors_near_one_another() -> None:
    """Of each level by its own vectors, at the scale of an initialisation that knows none; without them, nothing of the kind."""
    layout = SequenceLayout([(1, 2), (2, 4)], [40, 60])
    plain = TransformerPart(layers=1, width=64, heads=1).build(layout, 0).state_dict()
    prior = TransformerPart(layers=1, width=64, heads=1).build(layout, 0)
    vectors = [torch.randn(k, 8) * scale for k, scale in zip(layout.num_codes, (0.01, 100), strict=True)]
    prior.begin_from(vectors)
    for name in ("token.weight", "head.weight"):
        found = prior.state_dict()[name]
        assert found.std().item() == pytest.approx(plain[name].std().item(), rel=0.1)
        for begun, fresh, of_level in zip(*(weight.split(layout.num_codes) for weight in (found, plain[name])), vectors, strict=True):
            distances = torch.stack([torch.pdist(rows) for rows in (of_level, begun, fresh)])
            _, with_vectors, without = torch.corrcoef(distances)[0].tolist()
            assert with_vectors > 0.7
            assert abs(without) < 0.2
