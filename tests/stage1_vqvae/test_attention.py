"""Attention shared by networks and priors: rotary positions and projections."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from stage1_vqvae.attention import Attention, RotaryTable, rotate, rotations


def test_rotary_scores_depend_on_relative_offsets_only() -> None:
    positions = torch.tensor([[0, row, column] for row in range(4) for column in range(5)])
    turns = rotations(positions[:, 1:], 16).float()
    query, key = torch.randn(16).expand(1, 1, 20, 16), torch.randn(16).expand(1, 1, 20, 16)
    scores = (rotate(query, turns) @ rotate(key, turns).transpose(-1, -2))[0, 0]
    by_offset: dict[tuple[int, int], list[float]] = {}
    for a in range(20):
        for b in range(20):
            offset = (positions[a] - positions[b])[1:].tolist()
            by_offset.setdefault((offset[0], offset[1]), []).append(scores[a, b].item())
    assert all(max(values) - min(values) < 1e-4 for values in by_offset.values())
    assert len({round(values[0], 3) for values in by_offset.values()}) > 40  # rows and columns both matter


def test_rotary_table_is_exact_in_float64_and_rounded_once() -> None:
    """However a model is converted to float64 and back."""
    coordinates = torch.rand(7, 2, dtype=torch.float64) * 50
    frequencies = [100.0 ** (-number / 4) for number in range(4)]
    angles = [[float(x) * frequency for x in place for frequency in frequencies] for place in coordinates]
    exact = torch.tensor([[[math.cos(a), math.sin(a)] for a in row] for row in angles], dtype=torch.float64)
    table = RotaryTable(coordinates, 16)
    assert torch.equal(table.table, exact.float())
    for wide in (copy.deepcopy(table).double(), table.to(torch.float64)):
        assert torch.allclose(wide.table, exact, rtol=0, atol=1e-13)
    assert torch.equal(table.float().table, exact.float())


@pytest.mark.parametrize("gain", [False, True])
def test_training_and_cached_decoding_use_the_same_projections(gain: bool) -> None:
    """Values and gradients of `forward` equal attention with one fused projection, as in cached decoding."""
    torch.manual_seed(0)
    attention = Attention(16, 2, gain).double()
    if attention.gain is not None:
        torch.nn.init.normal_(attention.gain)
    table = rotations(torch.rand(3, 2, dtype=torch.float64), 8)
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    query, key, value = attention._separated(attention.qkv(x), table)
    weights = (query @ key.transpose(2, 3) / 8**0.5).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf).softmax(-1)
    results = [attention(x, table), attention.out((weights @ value).transpose(1, 2).flatten(2))]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(result.sin().sum(), (x, *attention.parameters())) for result in results))


def test_a_gain_multiplies_each_heads_logits_and_changes_nothing_at_one() -> None:
    torch.manual_seed(0)
    plain, gained = Attention(16, 2), Attention(16, 2, gain=True)
    gained.load_state_dict(plain.state_dict(), strict=False)
    table, x = rotations(torch.rand(5, 2), 8).float(), torch.randn(3, 5, 16)
    assert torch.equal(gained(x, table), plain(x, table))
    gained.gain = torch.nn.Parameter(torch.tensor([0.5, 40.0]))
    (query, key, _), (gained_query, gained_key, _) = (attention._separated(attention.qkv(x), table) for attention in (plain, gained))
    factors = torch.tensor([0.5, 40.0])[:, None, None]
    torch.testing.assert_close(gained_query @ gained_key.mT, factors * (query @ key.mT), rtol=1e-4, atol=1e-4)
    bound = 8**0.5
    assert (query @ key.mT).abs().max() / bound <= bound < (gained_query @ gained_key.mT).abs().max() / bound
