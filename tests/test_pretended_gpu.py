"""The chain on a pretended GPU (tests/pretended): it finishes, mixes no devices, has the CPU's figures, and no ordinary step waits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from configs.run_dir import read_json
from pipelines import Generator
from pipelines.decompress import main as decompress
from tests.conftest import Pretended
from tests.pretended.tiny import commands, in_short, run_command, write_recipe
from training.metrics_log import read_metrics

# Of the host, not of the run; and what train records say too.
_NO_FIGURES = ("split", "warning", "images_per_second", "loading_share", "train_bits_per_token")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", pictures)


@pytest.fixture(scope="module")
def run_of_cpu(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The same commands on the CPU, in this process."""
    run = tmp_path_factory.mktemp("cpu") / "run"
    with in_short():
        for words in commands(recipe, run).values():
            for state in (PartialState, GradientState):
                state._reset_state()
            AcceleratorState._reset_state(reset_partial_state=True)
            run_command(*words)
    return run


class Chain(NamedTuple):
    """A run of pretended processes, and what each of them saw."""

    run: Path
    seen: list[dict[str, Any]]


def chain_of(kind: str, processes: int, folder: Path, recipe: Path, pretended: Pretended, *left_out: str) -> Chain:
    names = [name for name in commands(recipe, folder / "run", processes) if name not in left_out]
    words = (recipe, folder / "run", folder / "seen", *names)
    done = pretended(kind, processes, "tests.pretended.chain", *words, processes=processes)
    assert done.returncode == 0, done.stderr[-4000:]
    return Chain(folder / "run", [json.loads((folder / f"seen.{rank}.json").read_text()) for rank in range(processes)])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, recipe: Path, pretended: Pretended) -> Chain:
    """By one process, for which Accelerate's device has no number."""
    return chain_of("cuda", 1, tmp_path_factory.mktemp("alone"), recipe, pretended)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, recipe: Path, pretended: Pretended) -> Chain:
    """By two processes, a GPU each, under NCCL's rules."""
    return chain_of("cuda", 2, tmp_path_factory.mktemp("together"), recipe, pretended)


@pytest.fixture(scope="module")
def of_apple(tmp_path_factory: pytest.TempPathFactory, recipe: Path, pretended: Pretended) -> Chain:
    """On a device without float64, whose rules the chain checks too (apple.py)."""
    return chain_of("mps", 1, tmp_path_factory.mktemp("apple"), recipe, pretended, "evaluate")


def figures(run: Path) -> dict[str, Any]:
    """What a run's training and its prior's likelihood came to, by the name of each figure; not before the first log line, where several
    processes may stop a step later than one.
    """
    found: dict[str, Any] = {}
    for stage in ("stage1", "priors/transformer"):
        records = read_metrics(run / stage / "metrics.jsonl")
        first = next(record["step"] for record in records if record["split"] == "validation")
        for record in (record for record in records if record["split"] == "validation" or record["step"] > first):
            of = f"{stage} {record['step']} {record['split']}"
            found |= {f"{of} {name}": value for name, value in record.items() if name not in _NO_FIGURES}
    likelihood = read_json(run / "priors/transformer/likelihood.json")
    return found | {f"likelihood {name}": likelihood[name] for name in ("validation", "unigram", "uniform")}


def stored(folder: Path) -> list[Tensor]:
    """The codes of a split, (N, variants, h, w) a level."""
    shards = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return [torch.cat([shard[name] for shard in shards]) for name in sorted(shards[0]) if name.startswith("level")]


@pytest.mark.parametrize(("name", "tolerance"), [("alone", 1e-5), ("together", 1e-3), ("of_apple", 1e-5)])
def test_figures_are_those_of_the_cpu(name: str, tolerance: float, run_of_cpu: Path, request: pytest.FixtureRequest) -> None:
    """Of several processes sums are in another order, and what comes of that grows from step to step."""
    run = request.getfixturevalue(name).run
    expected, found = figures(run_of_cpu), figures(run)
    assert found.keys() == expected.keys()
    assert {figure: pytest.approx(value, rel=tolerance, abs=1e-6) for figure, value in expected.items()} == found
    for split in ("train", "validation"):
        for level, of_cpu in zip(*(stored(folder / "codes" / split) for folder in (run, run_of_cpu)), strict=True):
            assert (level == of_cpu).double().mean() > 0.99


@pytest.mark.parametrize("name", ["alone", "of_apple"])
def test_samples_are_those_of_the_cpu(name: str, run_of_cpu: Path, request: pytest.FixtureRequest) -> None:
    """Drawn in float64, from weights that are the same to float tolerance."""
    runs = request.getfixturevalue(name).run, run_of_cpu
    grids = [np.asarray(Image.open(run / "samples/000/grid.png"), dtype=int) for run in runs]
    assert np.abs(grids[0] - grids[1]).max() <= 1


def test_rules_of_a_pretended_gpu(pretended: Pretended) -> None:
    """What it refuses, counts and replays; and training/devices.py on it."""
    done = pretended("cuda", 2, "tests.pretended.rules")
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("command", ["resume", "resume prior"])
@pytest.mark.parametrize("name", ["alone", "together"])
def test_no_ordinary_step_waits(name: str, command: str, request: pytest.FixtureRequest) -> None:
    """From the beginning of a step to that of the next, where nothing is logged, validated, saved or restarted."""
    for seen in request.getfixturevalue(name).seen:
        steps = seen[command]["steps"]
        assert len(steps) >= 2
        assert {step: waits for step, waits in steps.items() if waits} == {}


def test_no_augmentation_waits(alone: Chain) -> None:
    images = alone.seen[0]["images"]
    assert len(images) > 1
    assert {augmentation: waits for augmentation, waits in images.items() if waits} == {}


def test_what_a_gpu_compressed_decompresses_on_the_cpu(alone: Chain, tmp_path: Path) -> None:
    decompress(["--run", str(alone.run), "--file", str(alone.run.with_suffix(".vqc")), "--output", str(tmp_path / "out")])
    found = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").iterdir())]
    generator = Generator.from_pretrained(alone.run, device="cpu")
    expected = generator.decode(tuple(level[:, 0].long() for level in stored(alone.run / "codes/validation")), output="tensor")
    assert np.array_equal(np.stack(found), expected.numpy())
