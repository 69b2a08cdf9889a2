"""The codebook doctor: what it measures, what it names, what it advises."""

from __future__ import annotations

import json

import pytest
import torch

from configs.schema import Tokenizer
from stage1_vqvae.quantizers.health import (
    advice,
    checksum,
    collapse_warning,
    examine,
    from_json,
    health_table,
    histogram,
    nearest_distances,
    to_json,
)
from tests.stage1_vqvae.quantizer_kinds import KINDS, build, section


def test_counts_are_summed_up() -> None:
    counts = torch.tensor([0.0, 1, 1, 2, 3, 4, 0, 9])
    health = examine(counts, None)
    assert health.usage == 6 / 8
    assert health.dead == 2
    assert health.num_codes == 8
    assert health.nearest_pair is None
    assert histogram(counts) == {"0": 2, "1": 2, "2-3": 2, "4-7": 1, "8-15": 1}
    assert sum(health.histogram.values()) == 8


def test_nearest_distances_against_all_pairs() -> None:
    vectors = torch.randn(700, 5)
    distances = torch.cdist(vectors.double(), vectors.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(float("inf"))
    radius = (vectors - vectors.mean(0)).double().square().sum(1).mean().sqrt()
    assert torch.allclose(nearest_distances(vectors), distances.min(1).values / radius)
    twins = torch.cat([vectors, vectors[:1]]) + 1000
    assert examine(torch.ones(701), twins).nearest_pair == 0


def test_collapse_is_named_with_its_level_and_a_remedy() -> None:
    healthy = torch.full((512,), 40.0)
    collapsed = torch.zeros(512)
    collapsed[:9] = 4000.0
    config = Tokenizer(restart_below=0)
    assert collapse_warning([healthy], config) is None
    found = collapse_warning([collapsed], config)
    assert found is not None
    assert found.startswith("the codebook is collapsing: 9 of 512 codes in use, perplexity 9.0; ")
    assert "tokenizer.restart_below" in found
    assert (collapse_warning([healthy, collapsed], config) or "").startswith("level 2 of 2 is collapsing")


def test_few_codes_that_carry_everything_are_a_collapse_too() -> None:
    counts = torch.ones(512)
    counts[0] = 1e6
    assert collapse_warning([counts], Tokenizer()) is not None


def test_too_few_vectors_say_nothing() -> None:
    counts = torch.zeros(512)
    counts[0] = 1000
    assert collapse_warning([counts], Tokenizer()) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"restart_below": 0.0}, "restart_below"),
        ({"initialisation": "random"}, "initialisation kmeans"),
        ({"ema_decay": 0.99}, "ema_decay"),
        ({}, "restart_interval"),
        ({"quantizer": "gradient", "ema_decay": 0.99}, "restart_interval"),
        ({"quantizer": "lfq"}, "set tokenizer.entropy_weight"),
        ({"quantizer": "lfq", "entropy_weight": 0.1}, "raise tokenizer.entropy_weight"),
        ({"quantizer": "simvq"}, "entropy_weight"),
        ({"quantizer": "fsq"}, "stage1.lr"),
    ],
)
def test_advice_is_about_what_is_set(changes: dict[str, object], named: str) -> None:
    assert named in advice(Tokenizer(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_checksums_tell_any_change_of_any_quantizer(kind: str) -> None:
    quantizer, other = build(kind), build(kind)
    assert checksum(quantizer) == checksum(other)
    for value in other.state_dict().values():
        before = value.flatten()[0].item()
        value.view(-1)[0] += max(1e-6, 1e-6 * abs(before))
        assert checksum(quantizer) != checksum(other)
        value.view(-1)[0] = before
        assert checksum(quantizer) == checksum(other)


def test_what_is_printed_comes_back_from_json() -> None:
    levels = [examine(torch.arange(512).float(), torch.randn(512, 4)), examine(torch.ones(8), None)]
    stored = json.loads(json.dumps(to_json(70, levels, "a level is collapsing")))
    assert from_json(stored) == (70, levels, "a level is collapsing")
    table = health_table(*from_json(stored))
    assert "after step 70" in table
    assert "level 2 of 2: K = 8" in table
    assert "usage        99.8% (1 dead)" in table
    assert table.endswith("warning: a level is collapsing")


def test_every_kind_has_advice() -> None:
    assert all("stage1." in advice(section(kind)) or "tokenizer." in advice(section(kind)) for kind in KINDS)
