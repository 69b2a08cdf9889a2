"""Properties of every condition, and classes of a data set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.parts import FAMILIES, as_dict, part_class
from configs.schema import condition_from
from stage1_vqvae.data.splits import ImageSource, ImageSplit
from stage2_prior.conditions.classes import Classes
from stage2_prior.conditions.contract import Condition
from stage2_prior.conditions.none import NoCondition
from stage2_prior.extract_codes import encode_condition

PIXELS = torch.zeros(4, 2, 2, 1, dtype=torch.uint8)
SPLIT = ImageSplit(PIXELS, np.array([2, 0, 1, 0]), ["caf\u00e9", "x", "1"])
SOURCE = ImageSource({"train": SPLIT}, ["caf\u00e9", "x", "1"])


@pytest.fixture(params=FAMILIES["condition"])
def condition(request: pytest.FixtureRequest) -> Condition:
    """One condition of each kind, built for a data set of three classes."""
    return part_class("condition", request.param)().build(SOURCE)


def test_conditions_survive_writing_and_reading(condition: Condition) -> None:
    assert condition_from(as_dict(condition)) == condition


def test_encoded_rows_survive_storing_showing_and_parsing(condition: Condition) -> None:
    rows = condition.encode(SPLIT, slice(1, 4))
    assert (rows is None) == isinstance(condition, NoCondition)
    if rows is not None:
        assert rows.shape == (3, *condition.shape)
        assert torch.equal(torch.from_numpy(rows.numpy().astype(condition.disk_dtype)).to(rows.dtype), rows)
        assert torch.equal(torch.stack([condition.parse(condition.show(row), "label") for row in rows]), rows)
    with pytest.raises(UserError, match="label"):
        condition.parse("no such class", "label")


def test_dropped_rows_are_the_null_condition_with_a_separate_embedding(condition: Condition) -> None:
    null, embedding = condition.null(3), condition.embedding(8)
    assert embedding(null).shape == (3, 8)
    if (rows := condition.encode(SPLIT, slice(3))) is not None:
        dropped = condition.drop(rows, torch.tensor([True, False, True]))
        assert dropped.dtype == null.dtype == rows.dtype
        assert torch.equal(embedding(dropped), torch.where(torch.tensor([[1], [0], [1]]) > 0, embedding(null), embedding(rows)))
        assert not torch.isclose(embedding(rows), embedding(null)).all(1).any()


def test_classes_come_from_the_data_set_or_the_recipe() -> None:
    """In the recipe's order; an image of another class is refused, and a data set without labels has no condition."""
    assert Classes().build(SOURCE) == Classes(names=["caf\u00e9", "x", "1"])
    named = Classes(names=["1", "x", "cafe\u0301"])
    assert encode_condition(named.build(SOURCE), SPLIT, range(4)).tolist() == [0, 2, 1, 2]  # type: ignore[union-attr]
    with pytest.raises(UserError, match="condition: expected classes 1, x of all images, found another one in row 1"):
        encode_condition(Classes(names=["1", "x"]), SPLIT, range(4))
    assert Classes().build(ImageSource({"train": ImageSplit(PIXELS, None)}, None)) == NoCondition()
    assert named.encode(ImageSplit(PIXELS, None), slice(4)) is None
    assert Classes().accepts(named)
    assert Classes().accepts(NoCondition())
    assert not Classes(names=["1"]).accepts(named)
