"""One fault of each kind; `make faults` tries hundreds."""

from __future__ import annotations

import random

import pytest

from tests.faults.trials import World, build_world, short_trials


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"), processes=(1,))


@pytest.mark.parametrize("number", range(len(short_trials())))
def test_faults_lose_nothing_and_corrupt_nothing(number: int, world: World) -> None:
    outcome = short_trials()[number](world, random.Random(number))
    assert not outcome.lost, outcome
    assert not outcome.wrong, outcome
