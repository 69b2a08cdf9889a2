"""One fault of each sort; `make faults` tries hundreds."""

from __future__ import annotations

import random

import pytest

from tests.faults.trials import World, made_world, short


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return made_world(tmp_path_factory.mktemp("world"), processes=(1,))


@pytest.mark.parametrize("number", range(len(short())))
def test_nothing_is_lost_and_nothing_comes_out_wrong(number: int, world: World) -> None:
    outcome = short()[number](world, random.Random(number))
    assert not outcome.lost, outcome
    assert not outcome.wrong, outcome
