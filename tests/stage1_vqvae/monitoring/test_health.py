"""Codebook health: figures, collapse warnings and advice."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

from configs.parts import part_from
from configs.schema import Stage1, Tokenizer
from stage1_vqvae.monitoring.health import (
    CollapseWatch,
    Health,
    checksum,
    collapse_warning,
    examine,
    health_from_json,
    health_table,
    histogram,
    nearest_distances,
)
from tests.stage1_vqvae.quantizers.quantizer_kinds import KINDS, build, part


def test_figures_of_known_counts() -> None:
    counts = torch.tensor([0.0, 1, 1, 2, 3, 4, 0, 9])
    health = examine(counts, None)
    assert health.usage == 6 / 8
    assert health.dead == 2
    assert health.num_codes == 8
    assert health.nearest_pair is None
    assert histogram(counts) == {"0": 2, "1": 2, "2-3": 2, "4-7": 1, "8-15": 1}
    assert sum(health.histogram.values()) == 8


def test_nearest_distances_equal_brute_force() -> None:
    vectors = torch.randn(700, 5)
    distances = torch.cdist(vectors.double(), vectors.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(float("inf"))
    radius = (vectors - vectors.mean(0)).double().square().sum(1).mean().sqrt()
    assert torch.allclose(nearest_distances(vectors), distances.min(1).values / radius)
    twins = torch.cat([vectors, vectors[:1]]) + 1000
    assert examine(torch.ones(701), twins).nearest_pair == 0


def test_collapse_warning_names_codebook_and_remedy() -> None:
    healthy = torch.full((16,), 40.0)
    collapsed = torch.zeros(16)
    collapsed[:3] = 4000.0
    quantizer, config = build("ema"), Tokenizer(quantizer=part("ema", restart_below=0))
    assert collapse_warning([healthy], quantizer, config) is None
    warning = collapse_warning([collapsed], quantizer, config)
    assert warning == f"the codebook is collapsing: 3 of 16 codes in use, perplexity 3.0; {config.quantizer.advice_on_collapse}"
    second = collapse_warning([healthy, collapsed, healthy], build("residual"), config)
    assert (second or "").startswith("codebook 2 of 3 is collapsing")


def test_levels_with_a_shared_codebook_are_assessed_together() -> None:
    few = torch.zeros(16)
    few[:2] = 500.0
    levels = [torch.full((16,), 100.0), few, few]
    assert collapse_warning(levels, build("residual_shared"), Tokenizer(quantizer=part("residual_shared"))) is None
    assert collapse_warning([few, few, few], build("residual_shared"), Tokenizer(quantizer=part("residual_shared"))) is not None


def window(perplexity: float, num_codes: int = 512) -> torch.Tensor:
    """Return counts of about this perplexity: `perplexity` codes used equally often."""
    counts = torch.zeros(num_codes)
    counts[: round(perplexity)] = 10_000.0
    return counts


@pytest.mark.parametrize(
    ("perplexities", "expected"),
    [
        ([26, 290, 300, 320, 330, 340], []),  # the recipe `digits`
        ([10, 14, 20, 28, 39, 55, 77, 108], []),  # slow, but rising
        ([3, 3, 3, 3, 3, 3], [3, 4, 5]),
        ([200, 120, 60, 30, 15, 8, 4, 2], [3, 4, 5, 6, 7]),  # below half of the codes from the first window on
        ([3, 3, 3, 3, 300, 300, 3, 3, 3, 3], [3, 9]),  # recovered, and lost again
    ],
)
def test_only_lasting_collapses_are_reported(perplexities: list[int], expected: list[int]) -> None:
    watch = CollapseWatch(build("ema", num_codes=512), Tokenizer())
    warnings = [watch.warning([window(value)]) for value in perplexities]
    assert [number for number, text in enumerate(warnings) if text is not None] == expected


@pytest.mark.parametrize("num_codes", [8, 512])
def test_a_dominant_code_is_a_collapse(num_codes: int) -> None:
    counts = torch.ones(num_codes)
    counts[0] = 1e6
    assert collapse_warning([counts], build("ema", num_codes=num_codes), Tokenizer()) is not None


def test_too_few_vectors_give_no_warning() -> None:
    counts = torch.zeros(512)
    counts[0] = 1000
    assert collapse_warning([counts], build("ema", num_codes=512), Tokenizer()) is None
    health = Health(step=1, processes=1, checksum="0", levels=[examine(counts, None)], warning=None)
    assert health_table(health).endswith("too few codes in the split to judge usage by")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"restart_below": 0.0}, "restart_below"),
        ({"initialisation": "random"}, "initialisation kmeans"),
        ({"decay": 0.99}, "decay"),
        ({}, "restart_interval"),
        ({"kind": "gradient", "decay": 0.99}, "restart_interval"),
        ({"kind": "simvq", "entropy_weight": 0.1}, "raise tokenizer.quantizer.entropy_weight"),
        ({"kind": "lfq", "entropy_weight": 0.1}, "raise tokenizer.quantizer.entropy_weight"),
        ({"kind": "simvq"}, "entropy_weight"),
        ({"kind": "fsq"}, "stage1.lr"),
    ],
)
def test_advice_depends_on_the_settings(changes: dict[str, object], expected: str) -> None:
    assert expected in part_from("tokenizer.quantizer", changes).advice_on_collapse


@pytest.mark.parametrize("kind", KINDS)
def test_checksum_changes_with_every_weight(kind: str) -> None:
    quantizer, other = build(kind), build(kind)
    assert checksum(quantizer) == checksum(other)
    for value in other.state_dict().values():
        before = value.flatten()[0].item()
        value.view(-1)[0] += max(1e-6, 1e-6 * abs(before))
        assert checksum(quantizer) != checksum(other)
        value.view(-1)[0] = before
        assert checksum(quantizer) == checksum(other)


def test_health_survives_json_and_is_printed() -> None:
    levels = [examine(100 * torch.arange(512).float(), torch.randn(512, 4)), examine(100 * torch.ones(8), None)]
    health = Health(step=70, processes=2, checksum="00ab", levels=levels, warning="a codebook is collapsing")
    stored = health_from_json(json.loads(json.dumps(dataclasses.asdict(health))))
    assert stored == health
    table = health_table(stored)
    assert "after step 70 (checksum 00ab, equal on 2 processes)" in table
    assert "level 2 of 2: K = 8" in table
    assert "usage        99.8% (1 dead)" in table
    assert table.endswith("warning: a codebook is collapsing")
    assert health_table(dataclasses.replace(health, warning=None)).endswith("no sign of a collapse")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["kmeans", "random"])
def test_advice_can_be_followed(kind: str, start: str) -> None:
    """Settings it names exist; values it suggests are valid and differ from the current ones."""
    config = part(kind)
    if hasattr(config, "restart_below"):
        config = dataclasses.replace(config, restart_below=0.05 if start == "kmeans" else 0.0, initialisation=start)  # type: ignore[call-arg]
    advice = config.advice_on_collapse
    for name, value in re.findall(r"set tokenizer\.quantizer\.(\w+) ([\w.]+\w)", advice):
        current = getattr(config, name)
        changed = dataclasses.replace(config, **{name: type(current)(value)})
        assert getattr(changed, name) != current
    names = re.findall(r"(tokenizer\.quantizer|stage1)\.(\w+)", advice)
    assert names
    assert all(hasattr({"tokenizer.quantizer": config, "stage1": Stage1()}[section], name) for section, name in names)


def test_nearest_cosine_codes_are_compared_as_unit_vectors() -> None:
    quantizer = build("ema_cosine_projected")
    (codebook,) = quantizer.codebooks()
    codebook.weight[1] = 3 * codebook.weight[0]
    assert examine(torch.ones(16), codebook.vectors()).nearest_pair == pytest.approx(0, abs=1e-5)
