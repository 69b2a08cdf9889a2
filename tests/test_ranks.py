"""What each process holds after a step (launched/ranks_dump.py): the same on all, and the same as one process alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from stage1_vqvae.train import main as train_tokenizer
from stage1_vqvae.training.metrics_log import read_metrics
from stage2_prior.extract_codes import main as extract_codes
from tests.conftest import Script
from tests.launched.commands import NEXT
from tests.stage1_vqvae.quantizers.quantizer_kinds import KINDS, D, part
from tests.stage2_prior.priors.prior_kinds import KINDS as PRIOR_KINDS

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


@pytest.fixture(scope="module")
def steps_of_all_kinds(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path, script: Script) -> Path:
    """Each quantizer: one step at one process, twelve at two; restarts, three steps apart, are among them."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, processes, steps in (("one", 1, 1), ("two", 2, 12)):
        (folder / name).mkdir()
        runs: list[object] = []
        for kind in RUNS:
            runs += [NEXT] if runs else []
            runs += [
                "--config",
                tiny_recipe,
                "--run",
                folder / f"run-{name}-{kind}",
                "--stage1.steps",
                # An adversary pulls from the second step on.
                max(steps, 4) if kind == "adversary" else steps,
                "--stage1.checkpoint_interval",
                1,
                "--stage1.clip_norm",
                0,
                *settings_of(kind),
            ]
        done = script("tests/launched/ranks_dump.py", folder / name, "stage1_vqvae.train", *runs, processes=processes)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", RUNS)
def test_one_step_at_two_processes_is_the_step_of_one(kind: str, steps_of_all_kinds: Path) -> None:
    """K-means of the same latents, the same sums, and gradients of the same global batch, entropy terms included."""
    number = str(RUNS.index(kind))
    one, two = (torch.load(steps_of_all_kinds / name / number / "1-of-rank-0.pt") for name in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-7), name


def test_an_adversarys_steps_at_two_processes_are_those_of_one(steps_of_all_kinds: Path) -> None:
    """The discriminator's gradients are averaged, the ratio is of the whole batch's, and the tokenizer is pulled alike."""
    number = str(RUNS.index("adversary"))
    one, two = (torch.load(steps_of_all_kinds / name / number / "2-of-rank-0.pt") for name in ("one", "two"))
    assert bool((one["adversary.norms"] > 0).all())
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("kind", RUNS)
def test_twelve_steps_leave_equal_ranks(kind: str, steps_of_all_kinds: Path) -> None:
    """DDP does not broadcast buffers here, so equality of the codebooks is the sums' doing."""
    number = str(RUNS.index(kind))
    first, second = (torch.load(steps_of_all_kinds / "two" / number / f"12-of-rank-{rank}.pt") for rank in (0, 1))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    records = read_metrics(steps_of_all_kinds / f"run-two-{kind}" / "stage1" / "metrics.jsonl")
    restarted = sum(record.get("restarted", 0) for record in records)
    assert (restarted > 0) == (kind not in ("simvq", "fsq", "lfq"))


# Each kind of prior over all levels; then, of a run with two grids, one of its lower level alone.
PRIORS = [*PRIOR_KINDS, "a level"]


@pytest.fixture(scope="module")
def steps_of_priors(tmp_path_factory: pytest.TempPathFactory, finished_run: Path, tiny_recipe: Path, script: Script) -> Path:
    """One step at one process and at two."""
    folder = tmp_path_factory.mktemp("priors")
    run, two = shutil.copytree(finished_run, folder / "run"), folder / "two"
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(two), *map(str, settings_of("hierarchy")), "--stage1.steps", "10"])
    extract_codes(["--run", str(two)])
    for processes in (1, 2):
        (folder / str(processes)).mkdir()
        runs: list[object] = []
        for number, kind in enumerate(PRIORS):
            settings: list[object] = ["--run", two, "--level", "2"]
            if kind in PRIOR_KINDS:
                settings = ["--run", run, *(text for key, value in PRIOR_KINDS[kind].items() for text in (f"--prior.{key}", value))]
            runs += [NEXT] if runs else []
            runs += [*settings, "--name", f"p{processes}-{number}", "--stage2.steps", "1", "--prior.dropout", "0"]
        done = script("tests/launched/ranks_dump.py", folder / str(processes), "stage2_prior.train", *runs, processes=processes)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", PRIORS)
def test_one_step_of_the_prior_is_the_same_step(kind: str, steps_of_priors: Path) -> None:
    number = PRIORS.index(kind)
    names = (f"1/{number}/1-of-rank-0.pt", f"2/{number}/1-of-rank-0.pt", f"2/{number}/1-of-rank-1.pt")
    one, first, second = (torch.load(steps_of_priors / name) for name in names)
    assert any(name.startswith("above.") for name in one) == (kind == "a level")
    for name in one:
        assert torch.allclose(one[name], first[name], atol=1e-5), name
        assert torch.equal(first[name], second[name]), name
