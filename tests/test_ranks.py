"""What each process holds after a step (launched/ranks_dump.py): the same on all, and the same as one process alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from configs.cli import load_recipe
from configs.errors import UserError
from stage1_vqvae.train import main as train_tokenizer
from stage2_prior.extract_codes import main as extract_codes
from tests.conftest import Script
from tests.launched.commands import NEXT
from tests.stage1_vqvae.quantizers.quantizer_kinds import KINDS, D, part
from tests.stage2_prior.priors.prior_kinds import KINDS as PRIOR_KINDS
from training.metrics_log import read_metrics

# Quantizers on one grid, those between which what processes must agree on differs; one of them on two: 2 x 3 and 4 x 6 codes; and one
# whose tokenizer has an adversary.
COMPOSED = ["residual_shared", "product_residual_projected"]
RUNS = ["ema", "gradient", "ema_cosine_projected", "gradient_entropy", "simvq", "fsq", "lfq", *COMPOSED, "hierarchy", "adversary"]


def settings_of(run: str) -> list[object]:
    if run == "hierarchy":
        network = ["--tokenizer.network.kind", "hierarchical", "--tokenizer.network.downsampling", "2"]
        return [*network, *settings_of("ema")]
    if run == "adversary":
        fields = ["kind=patch", "layers=1", "channels=4", "penalty=r1", "start=0", "ramp=0"]
        return [*settings_of("ema"), *(f"--stage1.adversarial.{field}" for field in fields)]
    restart = {"restart_below": 0.5} if hasattr(part(run), "restart_below") else {}
    chosen = [f"--tokenizer.quantizer.{key}={value}" for key, value in {**restart, **KINDS[run]}.items()]
    return ["--tokenizer.code_dim", D, *chosen]


# The ways of taking the same steps: how many processes, in how many parts each takes its share, and which way's checkpoint it goes on
# from half way. `make faults` takes fifty steps, and all ways.
STEPS = int(os.environ.get("STEPS", "8"))
HALF = STEPS // 2
WAYS: dict[str, tuple[int, int, str | None]] = {"one": (1, 1, None), "two": (2, 1, None)}
if STEPS == 50:
    WAYS |= {"in parts": (1, 2, None), "one, then two": (2, 1, "one"), "two, then one": (1, 1, "two")}
# Those of a prior alone: by processes that share its weights out.
WAYS_OF_PRIORS = {**WAYS, "shards": (2, 1, None), "shards, then one": (1, 1, "shards")}
if STEPS == 50:
    WAYS_OF_PRIORS |= {"shards in parts": (2, 2, None), "one, then shards": (2, 1, "one"), "shards, then four": (4, 1, "shards")}
# An entropy term needs the whole batch at once.
KINDS_OF = {way: [kind for kind in RUNS if parts == 1 or kind not in ("gradient_entropy", "lfq")] for way, (_, parts, _) in WAYS.items()}


def half_way(whole: Path, copy: Path, stage: str, result: str) -> None:
    """A copy of a run as it was when half of the steps were taken."""
    shutil.copytree(whole, copy)
    last = max((copy / stage / "checkpoints").glob("step-*"))
    assert last.stem == f"step-{STEPS:09d}"
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    (copy / result).unlink(missing_ok=True)


def dumped(folder: Path, way: str, number: int, rank: int = 0) -> dict[str, torch.Tensor]:
    """A process's own weights and moments after the last step of a run."""
    found: dict[str, torch.Tensor] = torch.load(folder / way / str(number) / f"{STEPS}-of-rank-{rank}.pt")
    return found


def compare(folder: Path, way: str, number: int, of_one: int) -> None:
    """A run of a way with one of one process, in one go."""
    expected, found = dumped(folder, "one", of_one), dumped(folder, way, number)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        scale = float(tensor.double().abs().max())
        assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-7 * max(scale, 1e-3)), name


def equal_ranks(folder: Path, number: int) -> None:
    first, second = (dumped(folder, "two", number, rank) for rank in (0, 1))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path, script: Script) -> Path:
    """Each kind, trained in each way; restarts, three steps apart, are among the steps."""
    folder = tmp_path_factory.mktemp("kinds")
    for way, (processes, parts, from_way) in WAYS.items():
        runs: list[object] = []
        for kind in KINDS_OF[way]:
            run = folder / f"run {way} {kind}"
            if from_way is not None:
                half_way(folder / f"run {from_way} {kind}", run, "stage1", "tokenizer.safetensors")
            section = {"steps": STEPS, "checkpoint_interval": HALF, "validation_interval": STEPS, "clip_norm": 0, "accumulation": parts}
            typed = [f"--stage1.{key}={value}" for key, value in section.items()]
            runs += [NEXT] if runs else []
            runs += ["--config", tiny_recipe, "--run", run, *typed, *settings_of(kind), *(["--resume"] if from_way else [])]
        (folder / way).mkdir()
        done = script("tests/launched/ranks_dump.py", folder / way, "stage1_vqvae.train", *runs, processes=processes)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("way", "kind"), [(way, kind) for way in WAYS if way != "one" for kind in KINDS_OF[way]])
def test_steps_are_the_same_however_they_are_shared_out(kind: str, way: str, tokenizers: Path) -> None:
    """K-means of the same latents, the same sums and restarts, gradients of the same batch, an adversary's ratio of it."""
    compare(tokenizers, way, KINDS_OF[way].index(kind), RUNS.index(kind))


@pytest.mark.parametrize("kind", ["gradient_entropy", "lfq"])
def test_an_entropy_term_takes_the_whole_batch_at_once(kind: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"tokenizer": {"quantizer": KINDS[kind]}, "stage1": {"accumulation": 2}}))
    with pytest.raises(UserError, match=r"stage1\.accumulation: expected 1 with an entropy term"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("kind", RUNS)
def test_processes_stay_equal(kind: str, tokenizers: Path) -> None:
    """DDP does not broadcast buffers here, so equality of the codebooks is the sums' doing."""
    equal_ranks(tokenizers, RUNS.index(kind))
    records = read_metrics(tokenizers / f"run two {kind}" / "stage1" / "metrics.jsonl")
    restarted = sum(record.get("restarted", 0) for record in records)
    assert (restarted > 0) == (kind not in ("simvq", "fsq", "lfq"))
    if kind == "adversary":
        assert bool((dumped(tokenizers, "one", RUNS.index(kind))["adversary.norms"] > 0).all())


# Priors over all levels, one of them by the other optimiser too; then, of a run with two grids, one of its lower level alone.
PRIORS = ["transformer", "pixelcnn, attention", "adamw", "a level"]


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory, finished_run: Path, tiny_recipe: Path, script: Script) -> Path:
    """Each kind, trained in each way."""
    folder = tmp_path_factory.mktemp("priors")
    run, two = shutil.copytree(finished_run, folder / "run"), folder / "two grids"
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(two), *map(str, settings_of("hierarchy")), "--stage1.steps", "10"])
    extract_codes(["--run", str(two)])
    for way, (processes, parts, from_way) in WAYS_OF_PRIORS.items():
        runs: list[object] = []
        sharded = ["--compute.sharded", "true"] if "shards" in way and way != "shards, then one" else []
        for number, kind in enumerate(PRIORS):
            settings: list[object] = ["--run", two, "--level", "2"]
            if kind in PRIOR_KINDS:
                settings = ["--run", run, *(text for key, value in PRIOR_KINDS[kind].items() for text in (f"--prior.{key}", value))]
            if kind == "adamw":
                settings = ["--run", run, "--stage2.optimizer", "adamw"]
            name = "".join(filter(str.isalnum, way)) + str(number)
            if from_way is not None:
                former, level = "".join(filter(str.isalnum, from_way)) + str(number), "/level2" if kind == "a level" else ""
                whole = two if level else run
                half_way(whole / "priors" / (former + level), whole / "priors" / (name + level), "", "prior.safetensors")
                settings += ["--resume"]
            # Of a high rate rounding grows into differences that are nobody's fault, here by Muon's small singular values.
            section = {"steps": STEPS, "checkpoint_interval": HALF, "validation_interval": STEPS, "accumulation": parts, "lr": 1e-3}
            runs += [NEXT] if runs else []
            typed = [f"--stage2.{key}={value}" for key, value in section.items()]
            runs += [*settings, *sharded, "--name", name, "--prior.dropout", "0", *typed]
        (folder / way).mkdir()
        done = script("tests/launched/ranks_dump.py", folder / way, "stage2_prior.train", *runs, processes=processes)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("way", "kind"), [(way, kind) for way in WAYS_OF_PRIORS if way != "one" for kind in PRIORS])
def test_steps_of_a_prior_are_the_same_however_they_are_shared_out(kind: str, way: str, priors: Path) -> None:
    number = PRIORS.index(kind)
    compare(priors, way, number, number)
    assert {name.partition(".")[0] for name in dumped(priors, way, number)} >= {"average", "best"}
    run = priors / ("two grids" if kind == "a level" else "run")
    name = "".join(filter(str.isalnum, way)) + str(number)
    last = max((run / "priors" / name).rglob("step-*"))
    assert (last.suffix == ".shards") == ("shards" in way and way != "shards, then one")
    assert any(name.startswith("above.") for name in dumped(priors, way, number)) == (kind == "a level")


@pytest.mark.parametrize("kind", PRIORS)
def test_processes_stay_equal_with_a_prior(kind: str, priors: Path) -> None:
    equal_ranks(priors, PRIORS.index(kind))
