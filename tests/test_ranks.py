"""State of each rank after training steps (launched/ranks_dump.py): equal on all ranks, and equal to one process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from configs.errors import UserError
from configs.recipe_file import load_recipe
from stage1_vqvae.train import main as train_tokenizer
from stage2_prior.extract_codes import main as extract_codes
from tests.conftest import Script
from tests.launched.commands import NEXT
from tests.stage1_vqvae.quantizers.quantizer_kinds import KINDS, D, part
from tests.stage2_prior.priors.prior_kinds import KINDS as PRIOR_KINDS
from training.metrics_log import read_metrics

# Quantizers that synchronise different state; one of them on two grids, 2 x 3 and 4 x 6 codes; and one with a discriminator.
COMPOSED = ["residual_shared", "product_residual_projected", "multiscale"]
RUNS = ["ema", "gradient", "ema_cosine_projected", "gradient_entropy", "simvq", "fsq", "lfq", *COMPOSED, "hierarchy", "adversary"]


def settings_for(run: str) -> list[object]:
    if run == "hierarchy":
        network = ["--tokenizer.network.kind", "hierarchical", "--tokenizer.network.downsampling", "2"]
        return [*network, *settings_for("ema")]
    if run == "adversary":
        fields = ["kind=patch", "layers=1", "channels=4", "penalty=r1", "start=0", "ramp=0"]
        return [*settings_for("ema"), *(f"--stage1.adversarial.{field}" for field in fields)]
    restart = {"restart_below": 0.5} if hasattr(part(run), "restart_below") else {}
    fields: dict[str, Any] = {**restart, **KINDS[run]}
    if run == "multiscale":
        fields["quantizer"] = {**fields["quantizer"], "restart_below": 0.5}
    chosen = [f"--tokenizer.quantizer.{key}={value}" for key, value in fields.items()]
    return ["--tokenizer.code_dim", D, *chosen]


# Ways to take the same steps: number of processes, micro-batches per process, and the way whose checkpoint is resumed at half of the
# steps. `make faults` takes fifty steps, in all ways.
STEPS = int(os.environ.get("STEPS", "8"))
HALF = STEPS // 2
WAYS: dict[str, tuple[int, int, str | None]] = {"one": (1, 1, None), "two": (2, 1, None)}
if STEPS == 50:
    WAYS |= {"in parts": (1, 2, None), "one, then two": (2, 1, "one"), "two, then one": (1, 1, "two")}
# Only for priors: with sharded weights.
PRIOR_WAYS = {**WAYS, "shards": (2, 1, None), "shards, then one": (1, 1, "shards")}
if STEPS == 50:
    PRIOR_WAYS |= {"shards in parts": (2, 2, None), "one, then shards": (2, 1, "one"), "shards, then four": (4, 1, "shards")}
# An entropy term needs the entire batch at once.
KINDS_BY_WAY = {
    way: [kind for kind in RUNS if parts == 1 or kind not in ("gradient_entropy", "lfq")] for way, (_, parts, _) in WAYS.items()
}


def copy_at_half_way(run: Path, copy: Path, stage: str, result: str) -> None:
    """Copy a run as it was after half of the steps."""
    shutil.copytree(run, copy)
    last = max((copy / stage / "checkpoints").glob("step-*"))
    assert last.stem == f"step-{STEPS:09d}"
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    (copy / result).unlink(missing_ok=True)


def dumped(folder: Path, way: str, number: int, rank: int = 0) -> dict[str, torch.Tensor]:
    """Load a rank's weights and moments after the last step of a run."""
    tensors: dict[str, torch.Tensor] = torch.load(folder / way / str(number) / f"{STEPS}-of-rank-{rank}.pt")
    return tensors


def compare(folder: Path, way: str, number: int, reference: int) -> None:
    """Compare a run with the one of a single process without a resume."""
    expected, tensors = dumped(folder, "one", reference), dumped(folder, way, number)
    assert expected.keys() == tensors.keys()
    for name, tensor in expected.items():
        scale = float(tensor.double().abs().max())
        assert torch.allclose(tensors[name], tensor, rtol=1e-5, atol=1e-7 * max(scale, 1e-3)), name


def equal_ranks(folder: Path, number: int) -> None:
    first, second = (dumped(folder, "two", number, rank) for rank in (0, 1))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path, script: Script) -> Path:
    """Each kind trained in each way; the steps include restarts, three steps apart."""
    folder = tmp_path_factory.mktemp("kinds")
    for way, (processes, parts, from_way) in WAYS.items():
        runs: list[object] = []
        for kind in KINDS_BY_WAY[way]:
            run = folder / f"run {way} {kind}"
            if from_way is not None:
                copy_at_half_way(folder / f"run {from_way} {kind}", run, "stage1", "tokenizer.safetensors")
            section = {"steps": STEPS, "checkpoint_interval": HALF, "validation_interval": STEPS, "clip_norm": 0, "accumulation": parts}
            options = [f"--stage1.{key}={value}" for key, value in section.items()]
            runs += [NEXT] if runs else []
            runs += ["--config", tiny_recipe, "--run", run, *options, *settings_for(kind), *(["--resume"] if from_way else [])]
        (folder / way).mkdir()
        process = script("tests/launched/ranks_dump.py", folder / way, "stage1_vqvae.train", *runs, processes=processes)
        assert process.returncode == 0, process.stderr
    return folder


@pytest.mark.parametrize(("way", "kind"), [(way, kind) for way in WAYS if way != "one" for kind in KINDS_BY_WAY[way]])
def test_steps_do_not_depend_on_world_size_or_micro_batches(kind: str, way: str, tokenizers: Path) -> None:
    """Including k-means, statistics, restarts, gradients and the adversarial weight."""
    compare(tokenizers, way, KINDS_BY_WAY[way].index(kind), RUNS.index(kind))


@pytest.mark.parametrize("kind", ["gradient_entropy", "lfq"])
def test_an_entropy_term_refuses_accumulation(kind: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"tokenizer": {"quantizer": KINDS[kind]}, "stage1": {"accumulation": 2}}))
    with pytest.raises(UserError, match=r"stage1\.accumulation: expected 1 with an entropy term"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("kind", RUNS)
def test_ranks_stay_equal(kind: str, tokenizers: Path) -> None:
    """DDP does not broadcast buffers here, so codebooks are equal only if statistics are summed over ranks."""
    equal_ranks(tokenizers, RUNS.index(kind))
    records = read_metrics(tokenizers / f"run two {kind}" / "stage1" / "metrics.jsonl")
    restarted = sum(record.get("restarted", 0) for record in records)
    assert (restarted > 0) == (kind not in ("simvq", "fsq", "lfq"))
    if kind == "adversary":
        assert bool((dumped(tokenizers, "one", RUNS.index(kind))["adversary.norms"] > 0).all())


# Priors over all levels, one also with AdamW; and one over the lower level only of a run with two grids.
PRIORS = ["transformer", "pixelcnn, attention", "adamw", "a level"]


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory, finished_run: Path, tiny_recipe: Path, script: Script) -> Path:
    """Each kind trained in each way."""
    folder = tmp_path_factory.mktemp("priors")
    run, two_grids = shutil.copytree(finished_run, folder / "run"), folder / "two grids"
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(two_grids), *map(str, settings_for("hierarchy")), "--stage1.steps", "10"])
    extract_codes(["--run", str(two_grids)])
    for way, (processes, parts, from_way) in PRIOR_WAYS.items():
        runs: list[object] = []
        sharded = ["--compute.sharded", "true"] if "shards" in way and way != "shards, then one" else []
        for number, kind in enumerate(PRIORS):
            settings: list[object] = ["--run", two_grids, "--level", "2"]
            if kind in PRIOR_KINDS:
                settings = ["--run", run, *(text for key, value in PRIOR_KINDS[kind].items() for text in (f"--prior.{key}", value))]
            if kind == "adamw":
                settings = ["--run", run, "--stage2.optimizer", "adamw"]
            name = "".join(filter(str.isalnum, way)) + str(number)
            if from_way is not None:
                earlier, level = "".join(filter(str.isalnum, from_way)) + str(number), "/level2" if kind == "a level" else ""
                source = two_grids if level else run
                copy_at_half_way(source / "priors" / (earlier + level), source / "priors" / (name + level), "", "prior.safetensors")
                settings += ["--resume"]
            # At a high rate rounding errors grow, here by Muon's small singular values.
            section = {"steps": STEPS, "checkpoint_interval": HALF, "validation_interval": STEPS, "accumulation": parts, "lr": 1e-3}
            runs += [NEXT] if runs else []
            options = [f"--stage2.{key}={value}" for key, value in section.items()]
            runs += [*settings, *sharded, "--name", name, "--prior.dropout", "0", *options]
        (folder / way).mkdir()
        process = script("tests/launched/ranks_dump.py", folder / way, "stage2_prior.train", *runs, processes=processes)
        assert process.returncode == 0, process.stderr
    return folder


@pytest.mark.parametrize(("way", "kind"), [(way, kind) for way in PRIOR_WAYS if way != "one" for kind in PRIORS])
def test_prior_steps_do_not_depend_on_world_size_sharding_or_micro_batches(kind: str, way: str, priors: Path) -> None:
    number = PRIORS.index(kind)
    compare(priors, way, number, number)
    assert {name.partition(".")[0] for name in dumped(priors, way, number)} >= {"average", "best"}
    run = priors / ("two grids" if kind == "a level" else "run")
    name = "".join(filter(str.isalnum, way)) + str(number)
    last = max((run / "priors" / name).rglob("step-*"))
    assert (last.suffix == ".shards") == ("shards" in way and way != "shards, then one")
    assert any(name.startswith("above.") for name in dumped(priors, way, number)) == (kind == "a level")


@pytest.mark.parametrize("kind", PRIORS)
def test_ranks_stay_equal_with_a_prior(kind: str, priors: Path) -> None:
    equal_ranks(priors, PRIORS.index(kind))
