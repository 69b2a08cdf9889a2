"""Two processes by torchrun (gloo) give the same results as one, and write them once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from configs.recipe_file import load_recipe
from configs.run_dir import RunDir, read_json
from pipelines.complete import main as complete
from pipelines.evaluate import main as evaluate
from pipelines.sample import main as sample
from stage1_vqvae.data.pixels import to_model
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.metrics import perplexity
from stage1_vqvae.model import load_tokenizer
from stage2_prior.codes.store import CodeStore
from stage2_prior.extract_codes import main as extract_codes
from tests.conftest import Script, write_pictures
from tests.launched.commands import NEXT
from training.metrics_log import read_metrics


def paths(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path, script: Script) -> tuple[Path, str]:
    """A run trained and extracted by two processes, beside it a stage 1 with a budget and a run on few images; and the output."""
    run = tmp_path_factory.mktemp("two") / "run"
    stage1 = ["stage1_vqvae.train", "--config", tiny_recipe, "--run", run]
    codes, prior = (["stage2_prior.extract_codes", "--run", run], ["stage2_prior.train", "--run", run])
    budget = ["stage1_vqvae.train", "--config", tiny_recipe, "--run", run.with_name("budget"), "--stage1.minutes", "0.02"]
    few_images, few_run = run.with_name("few"), ["--run", run.with_name("few run")]
    write_pictures(few_images / "train", 1)
    write_pictures(few_images / "val", 1)
    shutil.rmtree(few_images / "val/down")
    one = ["--config", tiny_recipe, *few_run, "--data.path", few_images, "--stage1.steps", "2"]
    words = [
        *stage1,
        NEXT,
        *codes,
        NEXT,
        *prior,
        NEXT,
        *budget,
        NEXT,
        "stage1_vqvae.train",
        *one,
        NEXT,
        "stage2_prior.extract_codes",
        *few_run,
    ]
    words += [NEXT, "stage2_prior.train", *few_run, "--stage2.steps", "2"]
    process = script("tests/launched/commands.py", *words, processes=2)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("next: ") == 7  # only rank 0 prints
    return run, process.stdout


@pytest.fixture(scope="module")
def two_process_run(trained_by_two: tuple[Path, str]) -> Path:
    return trained_by_two[0]


def test_ranks_agree_on_the_steps_of_a_budget(trained_by_two: tuple[Path, str]) -> None:
    """Otherwise one rank would wait for the other forever."""
    run, printed = trained_by_two
    assert printed.count("steps in 0.02 minutes") == 1
    budget = run.with_name("budget")
    assert read_json(budget / "stage1/report.json")["steps"] == load_recipe(budget / "recipe.yaml").stage1.steps


def test_a_rank_may_have_no_validation_image(trained_by_two: tuple[Path, str], tmp_path: Path) -> None:
    """With one validation image and two training images, in batches of eight."""
    run = trained_by_two[0].with_name("few run")
    codes = CodeStore(run / "codes/validation")
    assert len(codes) == 1
    report, likelihood = read_json(run / "stage1/report.json"), read_json(run / "priors/transformer/likelihood.json")
    tokenizer, image = load_tokenizer(RunDir(run)), load_images(load_recipe(run / "recipe.yaml").data, ["validation"])
    (expected,) = tokenizer.encode(to_model(image.splits["validation"].pixels[:]))
    assert torch.equal(codes.codes(torch.tensor([0]))[0], expected)
    assert report["validation"]["perplexity"] == pytest.approx(perplexity(expected.flatten().bincount(minlength=16)))
    assert likelihood["images"] == {"train": 1, "validation": 1}


def test_two_processes_write_the_same_files_as_one(two_process_run: Path, finished_run: Path) -> None:
    assert paths(two_process_run) == paths(finished_run)
    for name in ("stage1/metrics.jsonl", "priors/transformer/metrics.jsonl"):
        steps = [[(record["step"], record["split"]) for record in read_metrics(run / name)] for run in (two_process_run, finished_run)]
        assert steps[0] == steps[1]


def test_metrics_are_close_to_those_of_one_process(two_process_run: Path, finished_run: Path) -> None:
    """Not bit for bit, since a flipped code grows; the tolerance allows rounding, not another algorithm."""
    one, two = (read_json(run / "stage1/report.json")["validation"] for run in (finished_run, two_process_run))
    assert two["mse"] == pytest.approx(one["mse"], rel=0.1)
    one, two = (read_json(run / "priors/transformer/likelihood.json") for run in (finished_run, two_process_run))
    assert two["validation"] == pytest.approx(one["validation"], rel=0.1)


def test_the_code_store_equals_that_of_one_process(two_process_run: Path, tmp_path: Path) -> None:
    """Byte for byte, with 36 and 12 rows in shards of 8 and batches of 7, so that nothing divides evenly."""
    copy = shutil.copytree(two_process_run, tmp_path / "run")
    extract_codes(["--run", str(copy), "--overwrite"])
    names = [path.relative_to(copy) for path in sorted((copy / "codes").rglob("*")) if path.is_file()]
    assert len(names) == 5 + 1 + 2 + 1
    assert all((copy / name).read_bytes() == (two_process_run / name).read_bytes() for name in names)


# Counts and batches that do not divide evenly over two processes.
SAMPLES = [["--n", "64", "--batch-size", "7", "--npz"], ["--n", "3", "--batch-size", "64", "--npz"]]
COMPLETIONS = ["--n", "3", "--continuations", "3", "--batch-size", "4"]
EVALUATION = ["--features", "classifier", "--n", "21", "--sampling.batch_size", "4"]


@pytest.fixture(scope="module")
def used_by_two(tmp_path_factory: pytest.TempPathFactory, finished_run: Path, script: Script) -> tuple[Path, str]:
    """A run on which two processes have run every pipeline, and the output."""
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("used") / "run"))
    commands = [("pipelines.sample", *SAMPLES[0]), ("pipelines.sample", *SAMPLES[1]), ("pipelines.complete", *COMPLETIONS)]
    commands += [("pipelines.reconstruct",), ("pipelines.anomalies",), ("pipelines.evaluate", *EVALUATION)]
    words = [word for module, *arguments in commands for word in (NEXT, module, "--run", run, *arguments)]
    process = script("tests/launched/commands.py", *words[1:], processes=2)
    assert process.returncode == 0, process.stderr
    return run, process.stdout


@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_samples_equal_those_of_one_process(number: int, run_copy: Path, used_by_two: tuple[Path, str]) -> None:
    sample(["--run", str(run_copy), *SAMPLES[number]])
    one, two = run_copy / "samples" / "000", used_by_two[0] / "samples" / f"{number:03d}"
    codes = [load_file(folder / "codes.safetensors") for folder in (one, two)]
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])
    assert len(np.load(two / "samples.npz")["arr_0"]) == int(SAMPLES[number][1])
    assert (one / "samples.npz").read_bytes() == (two / "samples.npz").read_bytes()


def test_completions_equal_those_of_one_process(run_copy: Path, used_by_two: tuple[Path, str]) -> None:
    complete(["--run", str(run_copy), *COMPLETIONS])
    one, two = (np.asarray(Image.open(run / "completions" / "000" / "completions.png")) for run in (run_copy, used_by_two[0]))
    assert np.array_equal(one, two)


def test_evaluation_figures_equal_those_of_one_process(run_copy: Path, used_by_two: tuple[Path, str]) -> None:
    # Training the feature network again would take seconds.
    shutil.copy(used_by_two[0] / "classifier.safetensors", run_copy)
    evaluate(["--run", str(run_copy), *EVALUATION])
    one, two = (read_json(run / "evaluations" / "000" / "evaluation.json") for run in (run_copy, used_by_two[0]))
    assert one["distances"]["samples"]["frechet"] == pytest.approx(two["distances"]["samples"]["frechet"], rel=1e-4)


def test_results_are_written_and_printed_once(used_by_two: tuple[Path, str]) -> None:
    run, printed = used_by_two
    folders = {"samples": len(SAMPLES), "completions": 1, "reconstructions": 1, "anomalies": 1, "evaluations": 1}
    assert {name: len(list((run / name).iterdir())) for name in folders} == folders
    assert printed.count("reconstructions.csv; look at") == printed.count("ranked 12 images") == 1


def test_a_signal_stops_both_ranks_at_the_same_step(tiny_recipe: Path, tmp_path: Path) -> None:
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
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal
    out, err = process.communicate(timeout=60)
    assert "stopped after step" in out, err
    step = int(re.findall(r"stopped after step (\d+) and saved", out)[0])
    assert out.count("stopped after step") == 1
    assert max((run / "stage1/checkpoints").iterdir()).name == f"step-{step:09d}.pt"
