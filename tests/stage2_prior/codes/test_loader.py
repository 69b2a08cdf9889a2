"""Training batches of codes, on any number of ranks and threads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.schema import Stage2
from stage2_prior.codes.loader import CodeBatch, CodeLoader
from stage2_prior.codes.store import CodeStore, Manifest, write_manifest, write_shard
from stage2_prior.conditions.classes import Classes
from stage2_prior.conditions.contract import Condition
from stage2_prior.conditions.none import NoCondition
from training.randomness import DataOrder

CONFIG = Stage2(batch_size=8, accumulation=2, condition_dropout=0.5)
ROWS, CLASSES = 20, 3
CONDITION = Classes(names=["a", "b", "c"])


@pytest.fixture
def store(tmp_path: Path) -> CodeStore:
    """Two levels of codes that encode their row, variant and level."""
    manifest = Manifest(
        split="train",
        rows=ROWS,
        grids=[(1, 2), (2, 2)],
        num_codes=[40, 80],
        condition=CONDITION,
        augmentation="horizontal_flip",
        variants=2,
        image_shape=(3, 8, 8),
        tokenizer_sha256="0" * 64,
        rows_per_shard=ROWS,
        sha256=[],
    )
    row_codes = 2 * torch.arange(ROWS)[:, None] + torch.arange(2)
    levels = [(row_codes + 40 * level)[:, :, None, None].expand(-1, -1, *grid).contiguous() for level, grid in enumerate(manifest.grids)]
    write_shard(tmp_path, manifest, 0, levels, torch.arange(ROWS) % CLASSES)
    write_manifest(tmp_path, manifest)
    return CodeStore(tmp_path)


def loader(store: CodeStore, rank: int = 0, processes: int = 1, ahead: bool | None = None, condition: Condition = CONDITION) -> CodeLoader:
    accelerator: Any = SimpleNamespace(num_processes=processes, process_index=rank, device=torch.device("cpu"))
    return CodeLoader(store, condition, CONFIG, accelerator, num_draws=3, ahead=ahead)


def steps(code_loader: CodeLoader, first: int = 0) -> list[CodeBatch]:
    """Batches of all micro-steps from step `first` on."""
    return [code_loader.batch(step, micro_step) for step in range(first, 6) for micro_step in range(2)]


def equal(one: CodeBatch, other: CodeBatch) -> bool:
    pairs = zip((*one.codes, *one[1:]), (*other.codes, *other[1:]), strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def test_codes_labels_and_variants_belong_together(store: CodeStore) -> None:
    """Each row appears at its place in the order, once per epoch."""
    order, num_dropped = DataOrder(ROWS, CONFIG.batch_size, CONFIG.seed), 0
    batches = steps(loader(store))
    for step in range(6):
        rows = torch.cat([batch.codes[0][:, 0, 0] // 2 for batch in batches[2 * step : 2 * step + 2]])
        assert torch.equal(rows, order.batch(step))
    for batch in batches:
        rows, labels = batch.codes[0][:, 0, 0] // 2, batch.condition
        assert labels is not None
        assert torch.equal(batch.codes[0], (2 * rows + batch.variants)[:, None, None].expand(-1, 1, 2))
        assert torch.equal(batch.codes[1], (2 * rows + batch.variants + 40)[:, None, None].expand(-1, 2, 2))
        assert bool(((labels == rows % CLASSES) | (labels == CLASSES)).all())
        num_dropped += int((labels == CLASSES).sum())
    assert 10 < num_dropped < 38  # of 48, half of them
    assert {int(variant) for batch in batches for variant in batch.variants} == {0, 1}


def test_batches_are_the_same_with_any_number_of_threads_and_ranks(store: CodeStore) -> None:
    expected = steps(loader(store))
    assert all(map(equal, expected, steps(loader(store, ahead=True))))
    halves = [steps(loader(store, rank, 2, ahead=True)) for rank in range(2)]
    for batch, *parts in zip(expected, *halves, strict=True):
        assert torch.equal(batch.codes[1], torch.cat([part.codes[1] for part in parts]))
        assert torch.equal(batch.variants, torch.cat([part.variants for part in parts]))
        assert batch.draws is not None
        assert torch.equal(batch.draws, torch.cat([part.draws for part in parts if part.draws is not None]))


def test_progress_is_the_share_of_the_steps_before_this_one(store: CodeStore) -> None:
    progress = [batch.progress.item() for batch in steps(loader(store))]
    assert progress == pytest.approx([step / CONFIG.steps for step in range(6) for _ in range(2)])


@pytest.mark.parametrize("ahead", [True, False])
def test_a_resumed_training_has_the_batches_of_an_uninterrupted_one(ahead: bool, store: CodeStore) -> None:
    expected = steps(loader(store))
    resumed = loader(store, ahead=ahead)
    assert all(map(equal, steps(resumed), expected))
    assert all(map(equal, steps(resumed, first=3), expected[6:]))  # out of order, as a rehearsal does


def test_batches_of_an_unconditional_prior_have_no_labels(store: CodeStore) -> None:
    assert all(batch.condition is None and len(batch.codes) == 2 for batch in steps(loader(store, condition=NoCondition(), ahead=True)))


def test_codes_beyond_the_codebook_are_refused(store: CodeStore) -> None:
    store.manifest.num_codes[1] = 41
    with pytest.raises(UserError, match="expected codes of level 1 below 41"):
        steps(loader(store, ahead=True))
