"""The transformer: what each place may see, caches, likelihoods, labels."""

from __future__ import annotations

import math

import pytest
import torch

from configs.schema import Prior, Sampling
from stage2_prior.generate import generate, uniforms
from stage2_prior.sequence import SequenceLayout
from stage2_prior.transformer import Transformer, rotary_angles, rotate

LAYOUT = SequenceLayout([(3, 4)], [9])


def prior(num_labels: int = 5, layout: SequenceLayout = LAYOUT, **settings: float) -> Transformer:
    torch.manual_seed(0)
    config = Prior(**{"layers": 2, "width": 32, "heads": 4, "dropout": 0.0, **settings})  # type: ignore[arg-type]
    model = Transformer(config, layout, num_labels).eval()
    # Larger weights than at the start of training, so that a difference shows.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_each_place_sees_the_tokens_before_it_and_no_other() -> None:
    model = prior()
    embedded: list[torch.Tensor] = []
    model.token.register_forward_hook(lambda _m, _i, output: (embedded.append(output.requires_grad_()), output)[1])
    tokens = torch.randint(9, (1, 12))
    logits = model(tokens, torch.tensor([2]))
    for place in range(12):
        (gradient,) = torch.autograd.grad(logits[0, place].square().sum(), embedded[0], retain_graph=True)
        seen = torch.nonzero(gradient[0].abs().sum(-1))[:, 0].tolist()
        # Input t-1 of the embedded tokens is place t-1; the last token is never an input.
        assert seen == list(range(place))


def test_probabilities_sum_to_one_over_all_sequences() -> None:
    """The chain of conditionals is one distribution: the sum of exp(log_prob) over all 3^4 grids is 1."""
    model = prior(layout=SequenceLayout([(2, 2)], [3])).double()
    grids = torch.cartesian_prod(*[torch.arange(3)] * 4).view(-1, 2, 2)
    log_prob = model.log_prob((grids,), torch.full((81,), 1))
    assert log_prob.shape == (81, 4)
    assert log_prob.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("layout", [LAYOUT, SequenceLayout([(1, 2), (2, 3)], [4, 6])], ids=["one level", "two levels"])
@pytest.mark.parametrize("labelled", [True, False])
def test_cached_steps_give_the_logits_of_the_full_pass(layout: SequenceLayout, labelled: bool) -> None:
    model = prior(layout=layout)
    codes = tuple(torch.randint(k, (6, *grid)) for grid, k in zip(layout.grids, layout.num_codes, strict=True))
    tokens, labels = layout.to_tokens(codes), torch.arange(6) % 6 if labelled else None
    full = model(tokens, labels)
    cache = model.new_cache(6)
    stepped = [model.step(None if t == 0 else tokens[:, t - 1], labels, cache) for t in range(layout.length)]
    assert torch.allclose(torch.stack(stepped, 1), full, atol=1e-4, rtol=1e-4)
    cache64 = model.double().new_cache(6)
    stepped = [model.step(None if t == 0 else tokens[:, t - 1], labels, cache64) for t in range(layout.length)]
    assert torch.allclose(torch.stack(stepped, 1), model(tokens, labels), atol=1e-10)


def test_a_prefix_gives_the_logits_of_the_full_pass() -> None:
    model = prior()
    tokens, labels = torch.randint(9, (2, 12)), torch.tensor([0, 5])
    full = model(tokens, labels)
    for known in (0, 1, 5, 11):
        assert torch.allclose(model(tokens[:, :known], labels), full[:, : known + 1], atol=1e-5)


def test_labels_matter_and_no_label_is_not_a_label() -> None:
    model = prior(num_labels=5)
    tokens = torch.randint(9, (6, 12))[:1].expand(6, -1)
    logits = model(tokens, torch.arange(6))
    for a in range(6):
        for b in range(a):
            assert not torch.allclose(logits[a], logits[b], atol=1e-3)
    assert torch.equal(model(tokens, None), model(tokens, torch.full((6,), 5)))


def test_start_labels_and_tokens_share_no_embedding() -> None:
    model = prior()
    assert model.token.weight.shape == (9, 32)
    assert model.label.weight.shape == (6, 32)
    pointers = {model.start.data_ptr(), model.token.weight.data_ptr(), model.label.weight.data_ptr()}
    assert len(pointers) == 3


def test_dropout_is_off_in_eval() -> None:
    model = prior(dropout=0.5)
    tokens = torch.randint(9, (2, 12))
    assert torch.equal(model(tokens, None), model(tokens, None))
    model.train()
    assert not torch.equal(model(tokens, None), model(tokens, None))


def test_it_begins_near_the_uniform_prior() -> None:
    torch.manual_seed(0)
    model = Transformer(Prior(layers=4, width=64, heads=4), SequenceLayout([(4, 4)], [512]), 10).eval()
    nats = -model.log_prob((torch.randint(512, (32, 4, 4)),), torch.arange(32) % 10).mean().item()
    assert nats == pytest.approx(math.log(512), rel=0.02)


def test_rotary_scores_depend_on_the_offset_between_places_alone() -> None:
    positions = torch.tensor([[0, row, column] for row in range(4) for column in range(5)])
    cosines, sines = rotary_angles(positions, 16)
    query, key = torch.randn(16).expand(1, 1, 20, 16), torch.randn(16).expand(1, 1, 20, 16)
    scores = (rotate(query, cosines, sines) @ rotate(key, cosines, sines).transpose(-1, -2))[0, 0]
    by_offset: dict[tuple[int, int], list[float]] = {}
    for a in range(20):
        for b in range(20):
            offset = (positions[a] - positions[b])[1:].tolist()
            by_offset.setdefault((offset[0], offset[1]), []).append(scores[a, b].item())
    assert all(max(values) - min(values) < 1e-4 for values in by_offset.values())
    assert len({round(values[0], 3) for values in by_offset.values()}) > 40  # rows and columns both matter


def test_mixed_precision_on_tiny_tensors() -> None:
    model = prior()
    codes, labels = (torch.randint(9, (2, 3, 4)),), torch.tensor([0, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.log_prob(codes, labels)
    assert half.dtype == torch.float32
    assert torch.allclose(half, model.log_prob(codes, labels), atol=0.2)


@pytest.mark.parametrize("sizes", [(3, 2), (2, 3)])
def test_no_probability_is_lost_on_other_levels_tokens(sizes: tuple[int, int]) -> None:
    """Over two levels of 1 x 2 codes: the sum of exp(log_prob) over all their grids is 1, and draws are codes of their level."""
    layout = SequenceLayout([(1, 2), (1, 2)], sizes)
    model = prior(layout=layout).double()
    codes = torch.cartesian_prod(*(torch.arange(k) for k in (sizes[0], sizes[0], sizes[1], sizes[1])))
    levels = (codes[:, None, :2], codes[:, None, 2:])
    assert model.log_prob(levels, None).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-5)
    for guidance in (1.0, 3.0):
        labels = torch.arange(200) % 5
        drawn = generate(model, labels, uniforms(0, torch.arange(200), 4), Sampling(temperature=5.0, guidance=guidance))
        for level, k in zip(drawn, sizes, strict=True):
            assert set(level.flatten().tolist()) == set(range(k))
