"""The chain on a pretended GPU (tests/pretended): no mixed devices, the CPU's figures, no waits in ordinary steps."""

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
from tests.pretended.tiny import commands, fast_settings, run_command, write_recipe
from training.metrics_log import read_metrics

# Entries that depend on the host, or repeat train records.
_NO_FIGURES = ("split", "warning", "images_per_second", "loading_share", "train_bits_per_token")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", pictures)


@pytest.fixture(scope="module")
def cpu_run(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The same commands on the CPU, in this process."""
    run = tmp_path_factory.mktemp("cpu") / "run"
    with fast_settings():
        for words in commands(recipe, run).values():
            for state in (PartialState, GradientState):
                state._reset_state()
            AcceleratorState._reset_state(reset_partial_state=True)
            run_command(*words)
    return run


class Chain(NamedTuple):
    """A run on pretended devices, and each process's log."""

    run: Path
    logs: list[dict[str, Any]]


def run_chain(kind: str, processes: int, folder: Path, recipe: Path, pretended: Pretended, *left_out: str) -> Chain:
    names = [name for name in commands(recipe, folder / "run", processes) if name not in left_out]
    words = (recipe, folder / "run", folder / "log", *names)
    done = pretended(kind, processes, "tests.pretended.chain", *words, processes=processes)
    assert done.returncode == 0, done.stderr[-4000:]
    return Chain(folder / "run", [json.loads((folder / f"log.{rank}.json").read_text()) for rank in range(processes)])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, recipe: Path, pretended: Pretended) -> Chain:
    """One process, whose device has no index in Accelerate."""
    return run_chain("cuda", 1, tmp_path_factory.mktemp("one_process"), recipe, pretended)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory, recipe: Path, pretended: Pretended) -> Chain:
    """Two processes with a GPU each, under NCCL's rules."""
    return run_chain("cuda", 2, tmp_path_factory.mktemp("two_processes"), recipe, pretended)


@pytest.fixture(scope="module")
def apple(tmp_path_factory: pytest.TempPathFactory, recipe: Path, pretended: Pretended) -> Chain:
    """A device without float64, whose rules the chain checks too (apple.py)."""
    return run_chain("mps", 1, tmp_path_factory.mktemp("apple"), recipe, pretended, "evaluate")


def figures(run: Path) -> dict[str, Any]:
    """Return figures of training and of the prior's likelihood by name, from the first validation on: before it, several processes may
    stop a step later than one.
    """
    result: dict[str, Any] = {}
    for stage in ("stage1", "priors/transformer"):
        records = read_metrics(run / stage / "metrics.jsonl")
        first = next(record["step"] for record in records if record["split"] == "validation")
        for record in (record for record in records if record["split"] == "validation" or record["step"] > first):
            prefix = f"{stage} {record['step']} {record['split']}"
            result |= {f"{prefix} {name}": value for name, value in record.items() if name not in _NO_FIGURES}
    likelihood = read_json(run / "priors/transformer/likelihood.json")
    return result | {f"likelihood {name}": likelihood[name] for name in ("validation", "unigram", "uniform")}


def stored_codes(folder: Path) -> list[Tensor]:
    """Load the codes of a split, (N, variants, h, w) per level."""
    shards = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return [torch.cat([shard[name] for shard in shards]) for name in sorted(shards[0]) if name.startswith("level")]


@pytest.mark.parametrize(("name", "tolerance"), [("one_process", 1e-5), ("two_processes", 1e-3), ("apple", 1e-5)])
def test_figures_equal_the_cpus(name: str, tolerance: float, cpu_run: Path, request: pytest.FixtureRequest) -> None:
    """Several processes sum in another order, and the differences grow from step to step."""
    run = request.getfixturevalue(name).run
    expected, result = figures(cpu_run), figures(run)
    assert result.keys() == expected.keys()
    assert {figure: pytest.approx(value, rel=tolerance, abs=1e-6) for figure, value in expected.items()} == result
    for split in ("train", "validation"):
        for level, cpu_level in zip(*(stored_codes(folder / "codes" / split) for folder in (run, cpu_run)), strict=True):
            assert (level == cpu_level).double().mean() > 0.99


@pytest.mark.parametrize("name", ["one_process", "apple"])
def test_samples_equal_the_cpus(name: str, cpu_run: Path, request: pytest.FixtureRequest) -> None:
    """Sampled in float64, from weights that are equal up to rounding."""
    runs = request.getfixturevalue(name).run, cpu_run
    grids = [np.asarray(Image.open(run / "samples/000/grid.png"), dtype=int) for run in runs]
    assert np.abs(grids[0] - grids[1]).max() <= 1


def test_rules_of_a_pretended_gpu(pretended: Pretended) -> None:
    """Refusals, counts and replays of the pretended device, and training/devices.py on it."""
    done = pretended("cuda", 2, "tests.pretended.rules")
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("command", ["resume", "resume prior"])
@pytest.mark.parametrize("name", ["one_process", "two_processes"])
def test_ordinary_steps_do_not_wait(name: str, command: str, request: pytest.FixtureRequest) -> None:
    """From one step to the next, where nothing is logged, validated, saved or restarted."""
    for log in request.getfixturevalue(name).logs:
        steps = log[command]["steps"]
        assert len(steps) >= 2
        assert {step: waits for step, waits in steps.items() if waits} == {}


def test_augmentations_do_not_wait(one_process: Chain) -> None:
    images = one_process.logs[0]["images"]
    assert len(images) > 1
    assert {augmentation: waits for augmentation, waits in images.items() if waits} == {}


def test_files_compressed_on_a_gpu_decompress_on_the_cpu(one_process: Chain, tmp_path: Path) -> None:
    decompress(["--run", str(one_process.run), "--file", str(one_process.run.with_suffix(".vqc")), "--output", str(tmp_path / "out")])
    decoded = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").iterdir())]
    generator = Generator.from_pretrained(one_process.run, device="cpu")
    expected = generator.decode(tuple(level[:, 0].long() for level in stored_codes(one_process.run / "codes/validation")), output="tensor")
    assert np.array_equal(np.stack(decoded), expected.numpy())
