"""The command `run.py`: the steps it runs or skips, and how it ends."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate.commands.config.config_args as config_args
import accelerate.commands.launch as accelerate_launch
import psutil
import pytest
import torch
import yaml

import pipelines.run as run_script
from configs.cli import Command, parse
from configs.errors import UserError
from configs.recipe_file import SECTIONS, load_recipe, recipe_dict
from configs.run_dir import REPOSITORY, RunDir, read_json, write_json
from configs.schema import Stage2
from pipelines.provenance import describe_weights, model_fingerprints, publishable_argument
from pipelines.run import Launch, check_options, current_evaluation, current_samples, main, run_to_its_end, steps
from pipelines.sample import main as sample
from tests.conftest import Script
from tests.stage2_prior.test_train import change_bytes
from training.processes import share_of_cores


def chain(*arguments: object) -> Command:
    return parse("", tuple(SECTIONS), list(map(str, arguments)), starts_run=True, training_folder=lambda run, *_: run.stage1)


def command_lines(*arguments: object) -> list[str]:
    return [step.typed() for step in steps(chain(*arguments))]


def test_each_step_is_an_ordinary_command() -> None:
    assert command_lines("--config", "configs/digits.yaml", "--run", "nowhere") == [
        "accelerate launch stage1_vqvae/train.py --config configs/digits.yaml --run nowhere --resume",
        "python stage2_prior/extract_codes.py --run nowhere",
        "accelerate launch stage2_prior/train.py --run nowhere --resume",
        "python pipelines/sample.py --run nowhere --n 64 --prior transformer",
        "python pipelines/sample.py --run nowhere --n 64 --prior uniform",
        "python pipelines/evaluate.py --run nowhere --prior transformer",
        "python pipelines/report.py --run nowhere",
    ]
    command = steps(chain("--run", "nowhere"))[0].command_line()
    assert command[0] == sys.executable
    assert Path(command[1]).is_file()


def parse_launch(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return Accelerate's parsed arguments for a step's command, which must cause no warning."""
    module, launcher, *options = launch.program()
    assert (module, launcher) == ("-m", "accelerate.commands.launch")
    warnings: list[str] = []
    monkeypatch.setattr(accelerate_launch.logger, "warning", lambda message, *_: warnings.append(message))
    arguments = accelerate_launch.launch_command_parser().parse_args([*options, "train.py"])
    parsed, *_ = accelerate_launch._validate_launch_command(arguments)
    assert warnings == []
    return parsed


@pytest.mark.parametrize(("devices", "processes"), [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 4), (8, 8)])
@pytest.mark.parametrize("configured", [False, True])
def test_training_uses_the_most_gpus_that_divide_the_batch(
    devices: int, processes: int, configured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without settings of Accelerate, and overriding a user's settings for one machine."""
    settings = tmp_path / "default_config.yaml"
    for module in (run_script, accelerate_launch, config_args):
        monkeypatch.setattr(module, "default_config_file", str(settings))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1 if configured else devices)
    if configured:
        settings.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_processes": devices}))
    launch = Launch.choose(Stage2(batch_size=128))
    assert launch.processes == processes
    if processes == 1 and not configured:
        assert launch.program() == []  # a launcher would add seconds and nothing else
    else:
        assert parse_launch(launch, monkeypatch).num_processes == processes
    if devices == processes:
        assert launch.warning() is None
    else:
        assert launch.warning() == f"{processes} of {devices} processes, the most that divide the batch of 128 images evenly"
    # The batch is also divided into micro-steps; one process is always possible.
    assert Launch.choose(Stage2(batch_size=12, accumulation=2)).processes == {1: 1, 2: 2, 3: 3, 4: 3, 5: 3}.get(devices, 6)
    assert Launch.choose(Stage2(batch_size=1)).processes == 1


def test_the_number_of_processes_of_several_machines_is_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "default_config.yaml"
    monkeypatch.setattr(run_script, "default_config_file", str(settings))
    settings.write_text(
        yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 12, "num_machines": 2})
    )
    launch = Launch.choose(Stage2(batch_size=128))
    assert (launch.processes, launch.program()) == (12, ["-m", "accelerate.commands.launch"])


def test_the_default_run_is_that_of_the_default_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("configs.run_dir", "pipelines.run"):
        monkeypatch.setattr(f"{module}.runs_folder", lambda: tmp_path)  # without the run of `make demo`
    first, second, *_ = command_lines()
    assert first == "accelerate launch stage1_vqvae/train.py --config configs/digits.yaml --resume"
    assert second.endswith("extract_codes.py --run digits")
    assert command_lines("--stage1.steps", "7")[0].endswith("--config configs/digits.yaml --stage1.steps 7 --resume")
    monkeypatch.chdir(tmp_path)
    assert all(Path(command.split()[2 if command.startswith("accelerate") else 1]).is_file() for command in command_lines())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--stage1.steps", "1000"], ["--stage1.steps", "expected 60", "found 1000"]),
        (["--stage1.lr=1.0"], ["--stage1.lr", "1.0"]),
        (["--prior.kind", "pixelcnn"], ["--prior.kind", "transformer", "pixelcnn"]),
        (["--tokenizer.quantizer", "fsq"], ["--tokenizer.quantizer.kind", "expected ema", "found fsq"]),
        (["--evaluation", "{n: 3}"], ["--evaluation.KEY"]),
    ],
)
def test_options_without_effect_are_refused_before_any_step(
    arguments: list[str], parts: list[str], finished_run: Path, one_line_error: Callable[..., str]
) -> None:
    """On a finished run: training stage 1 for longer would leave the prior without its tokenizer."""
    before = (finished_run / "history.jsonl").read_text()
    line = one_line_error(main, "--run", finished_run, *arguments)
    assert all(part in line for part in parts), line
    assert (finished_run / "history.jsonl").read_text() == before


def test_options_are_passed_to_the_steps_that_take_them(tmp_path: Path) -> None:
    """Stage 1 writes all of them into the recipe; options that may differ from an existing recipe are passed on."""
    path = tmp_path / "a run"
    options = ["--prior.kind", "pixelcnn", "--compute.threads=1", "--evaluation.n", "9", "--evaluation.features=classifier"]
    options += ["--data.workers", "1", "--data.height=8"]
    first, extract, second, draw, uniform, evaluate, report = command_lines("--run", path, *options)
    assert first == f"accelerate launch stage1_vqvae/train.py --run '{path}' {' '.join(options)} --resume"
    assert extract.endswith(f"extract_codes.py --run '{path}' --compute.threads=1 --data.workers=1")
    assert second.endswith(f"train.py --run '{path}' --compute.threads=1 --resume")
    assert draw.endswith("--prior pixelcnn --compute.threads=1")
    assert uniform.endswith("--prior uniform --compute.threads=1")
    assert evaluate.endswith("--prior pixelcnn --n=9 --features=classifier --compute.threads=1 --data.workers=1")
    assert report.endswith(f"report.py --run '{path}'")


def test_options_that_may_change_are_passed_only_to_their_step(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1 would refuse them, and on a finished run they would have no effect elsewhere."""
    options = ["--stage2.accumulation", "2", "--extraction.batch_size=5", "--sampling.batch_size", "9", "--stage1.accumulation", "4"]
    command = chain("--run", finished_run, *options[:-2], "--accept-changed-data")
    check_options(command)
    first, extract, second, draw, _, evaluate, _ = [step.typed() for step in steps(command)]
    assert first.endswith(f"train.py --run={finished_run} --accept_changed_data --resume")
    assert extract.endswith(f"--run {finished_run} --extraction.batch_size=5 --accept_changed_data")
    assert second.endswith(f"--run {finished_run} --stage2.accumulation=2 --accept_changed_data --resume")
    assert draw.endswith("--prior transformer --batch_size=9")
    assert evaluate.endswith("--prior transformer --sampling.batch_size=9 --accept_changed_data")
    with pytest.raises(UserError, match=r"--stage1\.accumulation: expected 1"):
        check_options(chain("--run", finished_run, *options[-2:]))
    # An existing run, also the default one, is used with its recipe.
    monkeypatch.setattr("configs.run_dir.runs_folder", lambda: tmp_path)
    monkeypatch.setattr("pipelines.run.runs_folder", lambda: tmp_path)
    (tmp_path / "digits").mkdir()
    shutil.copy(finished_run / "recipe.yaml", tmp_path / "digits")
    assert command_lines()[0] == "accelerate launch stage1_vqvae/train.py --run digits --resume"


def test_a_started_run_keeps_its_kind_of_prior(run_copy: Path, tiny_recipe: Path) -> None:
    """Stage 1 resumes with the run's recipe even if the recipe file has changed."""
    assert command_lines("--config", tiny_recipe, "--run", run_copy, "--prior.kind", "pixelcnn")[3].endswith("--prior transformer")
    shutil.rmtree(run_copy / "stage1")
    assert command_lines("--config", tiny_recipe, "--run", run_copy, "--prior.kind", "pixelcnn")[3].endswith("--prior pixelcnn")


def test_existing_samples_are_reused_only_if_they_would_be_drawn_the_same(run_copy: Path) -> None:
    run = RunDir(run_copy)
    for others in (["--n", "8"], ["--seed", "1"], ["--label", "down"], ["--temperature", "0.5"], ["--prior", "uniform"]):
        sample(["--run", str(run_copy), "--n", "64", *others])
        assert current_samples(run, "transformer") is None, others
    assert current_samples(run, "uniform") == run.samples / "004"
    sample(["--run", str(run_copy), "--n", "64", "--batch-size", "5"])
    assert current_samples(run, "transformer") == run.samples / "005"
    change_bytes(run.prior("transformer") / "prior.safetensors")
    assert (current_samples(run, "transformer"), current_samples(run, "uniform")) == (None, run.samples / "004")
    change_bytes(run.tokenizer)
    assert current_samples(run, "uniform") is None


def test_an_existing_evaluation_is_reused_only_if_nothing_has_changed(run_copy: Path) -> None:
    run = RunDir(run_copy)
    recipe = recipe_dict(load_recipe(run.recipe))
    settings = recipe["evaluation"]
    content: dict[str, Any] = {
        **model_fingerprints(run, "transformer"),
        "evaluation": settings,
        "sampling": {**recipe["sampling"], "precision": "float64"},
        "split": "validation",
        "reference": "train",
        "drawn": True,
    }
    folder = run_copy / "evaluations" / "000"
    changes: list[dict[str, Any]] = [
        {"split": "train"},
        {"reference": "validation"},
        {"prior_sha256": "0"},
        {"sampling": {**recipe["sampling"], "temperature": 2.0}},
        {"evaluation": {**settings, "features": "classifier"}},
        {"drawn": False},
    ]
    for change in changes:
        write_json(folder / "evaluation.json", content | change)
        assert current_evaluation(run, "transformer", settings) is None, change
    write_json(folder / "evaluation.json", content)
    assert current_evaluation(run, "transformer", settings) == folder
    assert current_evaluation(run, "transformer", {**settings, "n": 7}) is None
    assert current_evaluation(run, "transformer", {**settings, "batch_size": 7}) == folder
    change_bytes(run.prior("transformer") / "prior.safetensors")
    assert current_evaluation(run, "transformer", settings) is None


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (3, "error: extraction ended with exit code 3, for the reason above; finished steps will be skipped"),
        (130, "extraction was interrupted; go on with the same command"),
    ],
)
def test_a_failing_step_ends_the_chain_with_its_code(
    run_copy: Path, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second step fails."""
    commands = []

    def run_instead(arguments: list[str], run: RunDir) -> int:
        commands.append(arguments)
        return 0 if len(commands) == 1 else code

    monkeypatch.setattr("pipelines.run.run_to_its_end", run_instead)
    with pytest.raises(SystemExit) as stop:
        main(["--run", str(run_copy)])
    assert stop.value.code == code
    out, err = capfd.readouterr()
    assert err == f"{message}\n"
    assert f"$ python stage2_prior/extract_codes.py --run {run_copy}\n" in out
    assert len(commands) == 2


@pytest.mark.parametrize("arguments", [["--minutes"], ["--minutes=soon"], ["--minutes", "0"], ["--minutes", "nan"]])
def test_invalid_budgets_are_refused(arguments: list[str], tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    line = one_line_error(main, "--run", tmp_path / "run", *arguments)
    assert "--minutes: expected a number above 0, found" in line
    assert not (tmp_path / "run").exists()


def test_invalid_options_are_refused_before_any_step(tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    assert "stage1.lr" in one_line_error(main, "--run", tmp_path / "run", "--stage1.lr", "fast")
    assert not (tmp_path / "run").exists()


def test_the_exit_code_is_that_of_the_step(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "nothing")
    assert run_to_its_end([sys.executable, "-c", "raise SystemExit(5)"], run) == 5
    assert run_to_its_end([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], run) == 137
    assert not run.path.exists()


# A launcher that dies of Ctrl-C at once, and its training process, which holds the run's lock until it has saved.
LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]]).wait()
"""
TRAINING = """
import pathlib, sys, time
from configs.run_dir import RunDir
run = RunDir(pathlib.Path(sys.argv[1]))
with run.lock():
    try:
        (run.path / "ready").touch()
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(1)
        (run.path / "saved").touch()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)])
def test_a_signal_reaches_the_training_process_and_its_checkpoint_is_waited_for(tmp_path: Path, number: int, code: int) -> None:
    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=send)
    thread.start()
    assert run_to_its_end([sys.executable, "-c", LAUNCHER, TRAINING, str(tmp_path)], RunDir(tmp_path)) == code
    assert (tmp_path / "saved").exists()
    thread.join()
    assert signal.getsignal(number) is before


# Started by a launcher in a separate session, as torchrun does: counts until it is stopped.
COUNTING = """
import sys, time
for number in range(10**6):
    open(sys.argv[1], "w").write(str(number))
    time.sleep(0.01)
"""
STARTS_IT = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]], start_new_session=True)"
CHAIN = """
import sys
from pathlib import Path
from configs.run_dir import RunDir
from pipelines.run import run_to_its_end
sys.exit(run_to_its_end([sys.executable, "-c", *sys.argv[2:]], RunDir(Path(sys.argv[1]))))
"""


def test_ctrl_z_stops_all_processes_and_fg_continues_them(tmp_path: Path) -> None:
    counted = tmp_path / "count"
    arguments = [sys.executable, "-c", CHAIN, str(tmp_path), STARTS_IT, COUNTING, str(counted)]
    chain = psutil.Popen(arguments, cwd=REPOSITORY, start_new_session=True)

    def settles(state: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + 60
        while not state() and time.monotonic() < deadline:
            time.sleep(0.02)
        return state()

    def counts() -> bool:
        before = counted.read_text()
        return settles(lambda: counted.read_text() not in ("", before))

    try:
        assert settles(counted.exists)
        assert counts()
        family = [chain, *chain.children(recursive=True)]
        assert len(family) == 3
        chain.send_signal(signal.SIGTSTP)
        assert settles(lambda: all(process.status() == psutil.STATUS_STOPPED for process in family))
        chain.send_signal(signal.SIGCONT)
        assert counts()
        assert not [process for process in family if process.status() == psutil.STATUS_STOPPED]
    finally:
        for process in (*chain.children(recursive=True), chain):
            process.kill()
        chain.wait()


def test_one_command_makes_a_report_and_a_second_skips_finished_steps(tiny_recipe: Path, tmp_path: Path, script: Script) -> None:
    path = tmp_path / "run"
    options = ["--config", tiny_recipe, "--run", path, "--evaluation.features", "classifier", "--evaluation.n", "24"]
    done = script("pipelines/run.py", *options, "--minutes", "0.1", threads=1)
    assert done.returncode == 0, done.stdout + done.stderr
    arguments = [*options, "--stage1.minutes=0.04", "--stage2.minutes=0.045"]
    assert done.stdout.count(" a step on this machine") == 2
    printed = [line.removeprefix("$ ") for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert printed == command_lines(*arguments, "--compute.threads", "1")
    assert "Samples by class" in (path / "report.html").read_text()
    assert [read_json(path / f"samples/{number}/samples.json")["prior"] for number in ("000", "001")] == ["transformer", "uniform"]
    commands = [json.loads(line)["command"] for line in (path / "history.jsonl").read_text().splitlines()]
    training = ["stage1_vqvae/train.py", "stage2_prior/extract_codes.py", "stage2_prior/train.py"]
    assert commands == [*training, *(f"pipelines/{name}.py" for name in ("sample", "sample", "evaluate"))]
    existing = {step.name: step.existing() for step in steps(chain(*arguments))}
    assert {name for name, folder in existing.items() if folder is not None} == {"samples", "uniform samples", "evaluation"}
    again = steps(chain("--run", path, "--evaluation.n", "25"))
    assert {step.name for step in again if step.existing() is not None} == {"samples", "uniform samples"}


def test_steps_run_without_posix_signals_and_process_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    for module, names in (
        (signal, ("SIGHUP", "SIGUSR1", "SIGTSTP", "SIGSTOP", "SIGKILL")),
        (os, ("killpg", "getuid", "sched_getaffinity")),
    ):
        for name in names:
            monkeypatch.delattr(module, name)
    fresh = runpy.run_path(str(REPOSITORY / "pipelines/run.py"))
    assert fresh["run_to_its_end"]([sys.executable, "-c", "raise SystemExit(3)"], RunDir(tmp_path / "run")) == 3
    assert share_of_cores() >= 1


def test_weights_are_described_by_name_and_content(tmp_path: Path) -> None:
    """Paths, which are of this machine only, are left out; another file of the same name counts as other weights."""
    described = []
    for content in (b"one", b"two"):
        (tmp_path / "w.pth").write_bytes(content)
        described.append(describe_weights(str(tmp_path / "w.pth")))
    assert described[0] != described[1]
    assert all((text or "").startswith("w.pth, sha256 ") for text in described)
    assert describe_weights(None) is None
    assert publishable_argument(f"--samples={tmp_path}/here") == "--samples=./here"
    assert publishable_argument("../bob/pictures") == publishable_argument("~/pictures") == "./pictures"
    assert publishable_argument("uoft-cs/cifar10") == "uoft-cs/cifar10"
    assert publishable_argument(str(REPOSITORY / "pipelines/sample.py")) == "pipelines/sample.py"
