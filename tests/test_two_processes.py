"""Two processes by torchrun (gloo): the same results as one, written once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.run_dir import read_json
from stage1_vqvae.training.metrics_log import read_metrics
from stage2_prior.code_store import CodeStore
from tests.conftest import Script
from tests.ranks_dump import NEXT
from tests.stage1_vqvae.quantizer_kinds import KINDS, D
from tests.stage2_prior.prior_kinds import KINDS as PRIOR_KINDS


def paths(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def two_process_run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path, script: Script) -> Path:
    """All three training and extraction commands at two processes."""
    run = tmp_path_factory.mktemp("two") / "run"
    commands = (("stage1_vqvae/train.py", "--config", tiny_recipe), ("stage2_prior/extract_codes.py",), ("stage2_prior/train.py",))
    for command, *arguments in commands:
        done = script(command, *arguments, "--run", run, processes=2)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("next: ") == 1  # one process speaks
    return run


def test_two_processes_leave_the_same_files_as_one(two_process_run: Path, finished_run: Path) -> None:
    assert paths(two_process_run) == paths(finished_run)
    for name in ("stage1/metrics.jsonl", "priors/transformer/metrics.jsonl"):
        steps = [[(record["step"], record["split"]) for record in read_metrics(run / name)] for run in (two_process_run, finished_run)]
        assert steps[0] == steps[1]


def test_metrics_agree_with_those_of_one_process(two_process_run: Path, finished_run: Path) -> None:
    """Not bit for bit: a flipped code grows. The margins are those of another seed's rounding, not of another algorithm."""
    one, two = (read_json(run / "stage1/report.json")["validation"] for run in (finished_run, two_process_run))
    assert two["mse"] == pytest.approx(one["mse"], rel=0.1)
    one, two = (read_json(run / "priors/transformer/likelihood.json") for run in (finished_run, two_process_run))
    assert two["validation"] == pytest.approx(one["validation"], rel=0.1)


def test_the_code_store_has_each_row_once(run_copy: Path, finished_run: Path, script: Script) -> None:
    """36 and 12 rows in batches of 7 at two processes: no batch divides."""
    done = script("stage2_prior/extract_codes.py", "--run", run_copy, "--overwrite", processes=2)
    assert done.returncode == 0, done.stderr
    for split in ("train", "validation"):
        one, two = CodeStore(finished_run / "codes" / split), CodeStore(run_copy / "codes" / split)
        assert np.array_equal(one.levels[0], two.levels[0])
        assert torch.equal(one.labels, two.labels)


@pytest.mark.parametrize(("count", "batch_size"), [(64, 7), (3, 64)])
def test_samples_are_those_of_one_process(run_copy: Path, count: int, batch_size: int, script: Script) -> None:
    for processes in (1, 2):
        settings = ["--run", run_copy, "--n", count, "--batch-size", batch_size, "--npz"]
        done = script("pipelines/sample.py", *settings, processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = (run_copy / "samples" / name for name in ("000", "001"))
    assert not (run_copy / "samples" / "002").exists()
    codes = [load_file(folder / "codes.safetensors") for folder in (one, two)]
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])
    assert len(np.load(two / "samples.npz")["arr_0"]) == count
    assert (one / "samples.npz").read_bytes() == (two / "samples.npz").read_bytes()


@pytest.fixture(scope="module")
def steps_of_all_kinds(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path, script: Script) -> Path:
    """Each quantizer: one step at one process, one at two, fifty at two; restarts, three steps apart, are among the 50."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, processes, steps in (("one", 1, 1), ("two", 2, 1), ("long", 2, 50)):
        (folder / name).mkdir()
        runs: list[object] = []
        for kind in KINDS:
            tokenizer = {"code_dim": D, "restart_below": 0.5, **KINDS[kind]}
            settings = [text for key, value in tokenizer.items() for text in (f"--tokenizer.{key}", value)]
            runs += [NEXT] if runs else []
            runs += [
                "--config",
                tiny_recipe,
                "--run",
                folder / f"run-{name}-{kind}",
                "--stage1.steps",
                steps,
                "--stage1.clip_norm",
                0,
                *settings,
            ]
        done = script("tests/ranks_dump.py", folder / name, "stage1_vqvae.train", *runs, processes=processes)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_at_two_processes_is_the_step_of_one(kind: str, steps_of_all_kinds: Path) -> None:
    """K-means of the same latents, the same sums, and gradients of the same global batch, entropy terms included."""
    number = str(list(KINDS).index(kind))
    one, two = (torch.load(steps_of_all_kinds / name / number / "1-of-rank-0.pt") for name in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_leave_equal_ranks(kind: str, steps_of_all_kinds: Path) -> None:
    """DDP does not broadcast buffers here, so equality of the codebooks is the sums' doing."""
    number = str(list(KINDS).index(kind))
    first, second = (torch.load(steps_of_all_kinds / "long" / number / f"50-of-rank-{rank}.pt") for rank in (0, 1))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    records = read_metrics(steps_of_all_kinds / f"run-long-{kind}" / "stage1" / "metrics.jsonl")
    restarted = sum(record.get("restarted", 0) for record in records)
    assert (restarted > 0) == (kind not in ("simvq", "simvq_entropy", "fsq", "lfq"))


@pytest.fixture(scope="module")
def steps_of_priors(tmp_path_factory: pytest.TempPathFactory, finished_run: Path, script: Script) -> Path:
    """Each kind of prior: one step at one process and at two."""
    folder = tmp_path_factory.mktemp("priors")
    run = shutil.copytree(finished_run, folder / "run")
    for processes in (1, 2):
        (folder / str(processes)).mkdir()
        runs: list[object] = []
        for number, kind in enumerate(PRIOR_KINDS.values()):
            settings = [text for key, value in kind.items() for text in (f"--prior.{key}", value)]
            runs += [NEXT] if runs else []
            runs += ["--run", run, "--name", f"p{processes}-{number}", "--stage2.steps", "1", "--prior.dropout", "0", *settings]
        done = script("tests/ranks_dump.py", folder / str(processes), "stage2_prior.train", *runs, processes=processes)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", PRIOR_KINDS)
def test_one_step_of_the_prior_is_the_same_step(kind: str, steps_of_priors: Path) -> None:
    number = list(PRIOR_KINDS).index(kind)
    names = (f"1/{number}/1-of-rank-0.pt", f"2/{number}/1-of-rank-0.pt", f"2/{number}/1-of-rank-1.pt")
    one, first, second = (torch.load(steps_of_priors / name) for name in names)
    for name in one:
        assert torch.allclose(one[name], first[name], atol=1e-5), name
        assert torch.equal(first[name], second[name]), name


def test_one_signal_stops_both_at_the_same_step(tiny_recipe: Path, tmp_path: Path) -> None:
    import os
    import re
    import signal
    import subprocess
    import sys
    import time

    from configs.run_dir import REPOSITORY

    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    command += [str(REPOSITORY / "stage1_vqvae/train.py"), "--config", str(tiny_recipe), "--run", str(run), "--stage1.steps", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not read_metrics(run / "stage1/metrics.jsonl"):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    out, _ = process.communicate(timeout=60)
    step = int(re.findall(r"stopped after step (\d+) and saved", out)[0])
    assert out.count("stopped after step") == 1
    assert max((run / "stage1/checkpoints").iterdir()).name == f"step-{step:09d}.pt"
