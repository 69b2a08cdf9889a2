"""The stage 1 command: stopped, killed, damaged and resumed."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.recipe_file import load_recipe
from configs.run_dir import REPOSITORY, read_json
from pipelines.evaluate import main as evaluate
from pipelines.reconstruct import main as reconstruct
from stage1_vqvae.model import VQVAE, save_tokenizer
from stage1_vqvae.train import main
from stage2_prior.export_codes import main as export_codes
from stage2_prior.extract_codes import main as extract_codes
from stage2_prior.import_codes import main as import_codes
from tests.conftest import Killed, failing
from tests.pipelines.test_run import chain
from tests.stage1_vqvae.test_train_with_terms import ADVERSARY
from training.metrics_log import read_metrics
from training.stopping import STOPPED_IN_TIME


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def kill_after_checkpoint(command: list[str], checkpoint: Path, metrics: Path, last_step: int) -> None:
    """Start a training, wait until it has passed a checkpoint, then send SIGKILL."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (checkpoint.exists() and any(record["step"] >= last_step for record in read_metrics(metrics))):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()


def test_resuming_a_killed_run_is_bit_exact(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_line_error: Callable[..., str]
) -> None:
    settings = ["--config", str(tiny_recipe), "--compute.threads", "1", *ADVERSARY]
    settings += ["--stage1.steps", "120", "--stage1.checkpoint_interval", "40", "--stage1.validation_interval", "60"]
    main([*settings, "--run", str(tmp_path / "whole")])
    run = tmp_path / "killed"
    command = [sys.executable, str(REPOSITORY / "stage1_vqvae" / "train.py"), *settings, "--run", str(run)]
    kill_after_checkpoint(command, run / "stage1/checkpoints/step-000000040.pt", run / "stage1/metrics.jsonl", 50)
    assert not (run / "tokenizer.safetensors").exists()
    assert "--resume" in one_line_error(main, *settings, "--run", run)
    capsys.readouterr()
    main([*settings, "--run", str(run), "--resume"])
    out = capsys.readouterr().out
    assert re.search(r"going on after step (40|80)", out)
    assert out.count("48 images in 2 classes (across, down); train 36, validation 12 (held out)") == 1
    assert (run / "tokenizer.safetensors").read_bytes() == (tmp_path / "whole" / "tokenizer.safetensors").read_bytes()
    timeless = [
        [
            {key: value for key, value in record.items() if key not in ("images_per_second", "loading_share")}
            for record in read_metrics(path / "stage1/metrics.jsonl")
        ]
        for path in (run, tmp_path / "whole")
    ]
    assert timeless[0] == timeless[1]
    assert [record["step"] for record in timeless[0] if record.get("adversarial", 0) != 0] == [40, 50, 60, 70, 80, 90, 100, 110, 120]


def test_a_run_killed_before_its_first_checkpoint_keeps_its_recipe(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another recipe needs --config or options and is reported; run.py sees the same recipe."""
    run = ["--run", str(tmp_path / "run")]
    settings = ["--config", str(tiny_recipe), *run, "--stage1.steps", "2", "--tokenizer.quantizer", "fsq"]
    with monkeypatch.context() as patched:
        patched.setattr("stage1_vqvae.train.take_step", failing(Killed()))
        for lr in ("0.002", "0.004"):
            with pytest.raises(Killed):
                main([*settings, "--stage1.lr", lr])
    assert "its recipe, by which nothing has been trained yet, is replaced: stage1.lr: 0.004, not 0.002\n" in capsys.readouterr().out
    first = load_recipe(tmp_path / "run/recipe.yaml")
    assert (first.stage1.lr, first.tokenizer.quantizer.kind) == (0.004, "fsq")
    assert chain(*run).recipe == first
    main([*run, "--resume"])
    assert "replaced" not in capsys.readouterr().out
    assert load_recipe(tmp_path / "run/recipe.yaml") == first
    assert read_json(tmp_path / "run/stage1/report.json")["steps"] == 2


def test_memory_of_a_later_discriminator_is_rehearsed_at_the_start(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line_error: Callable[..., str]
) -> None:
    """The advice in the error works, before the first checkpoint and after it."""
    run = ["--run", str(tmp_path / "run")]
    settings = ["--config", str(tiny_recipe), *run, *ADVERSARY, "--stage1.steps", "4", "--stage1.checkpoint_interval", "1"]
    full = failing(torch.OutOfMemoryError("no room"))
    with monkeypatch.context() as patched:
        patched.setattr("stage1_vqvae.objectives.adversarial.Adversary.discriminator_loss", full)
        assert "--resume and --stage1.accumulation 2" in one_line_error(main, *settings)
        assert not (tmp_path / "run/stage1/metrics.jsonl").exists()
        patched.setattr("stage1_vqvae.train.rehearse", lambda *_: None)
        line = one_line_error(main, *run, "--resume", "--stage1.accumulation", "2", "--stage1.keep_checkpoints", "1")
    assert len(list((tmp_path / "run/stage1/checkpoints").glob("step-*.pt"))) == 1
    advised = re.findall(r"--resume and (--stage1\.accumulation) (\d+)", line)[0]
    assert advised[1] == "4"
    main([*run, "--resume", *advised, "--stage1.log_interval", "1"])
    assert read_json(tmp_path / "run/stage1/report.json")["steps"] == 4


def test_changed_data_is_refused_unless_accepted(
    run_copy: Path, pictures: Path, tmp_path: Path, one_line_error: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """In stage 1, extraction, evaluation, reconstruction and code import."""
    folder = shutil.copytree(pictures, tmp_path / "images")
    (folder / "bird").mkdir()
    for number in range(4):
        shutil.copy(folder / "down/000.png", folder / "bird" / f"{number}.png")
    before = files(run_copy)
    settings = ["--run", str(run_copy), "--data.path", str(folder)]
    changed = 'train: 39 images, was 36; validation: 13 images, was 12; class "bird" is new'
    for command, *options in ((main, "--resume", "--stage1.steps", "70"), (extract_codes, "--overwrite"), (evaluate,)):
        assert f"expected the data that its training began with, found {changed}; put it back" in one_line_error(
            command, *settings, *options
        )
    assert 'found validation: 13 images, was 12; class "bird" is new' in one_line_error(reconstruct, *settings)
    assert files(run_copy) == before
    extract_codes([*settings, "--overwrite", "--accept-changed-data"])
    assert f"going on with data that has changed: {changed}; images that it was trained on may be among" in capsys.readouterr().out
    assert read_json(run_copy / "data.json")["train"]["images"] == 36
    export_codes(["--run", str(run_copy), "--output", str(tmp_path / "codes")])
    import_codes(["--run", str(run_copy), "--folder", str(tmp_path / "codes"), "--overwrite"])
    assert f"going on with data that has changed: {changed}; images" in capsys.readouterr().out


def test_a_signal_saves_and_prints_how_to_resume(tiny_recipe: Path, tmp_path: Path) -> None:
    """SIGTERM, as from a scheduler; test_two_processes.py has SIGINT."""
    run = tmp_path / "run"
    command = [sys.executable, str(REPOSITORY / "stage1_vqvae/train.py"), "--config", str(tiny_recipe), "--run", str(run)]
    process = subprocess.Popen([*command, "--stage1.steps", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not read_metrics(run / "stage1/metrics.jsonl"):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in err
    step = int(re.findall(r"stopped after step (\d+) and saved; go on with: .*--resume --run", out)[0])
    newest = max((run / "stage1/checkpoints").iterdir())
    assert newest.name == f"step-{step:09d}.pt"
    assert torch.load(newest, weights_only=True)["step"] == step


def test_stop_after_saves_and_a_moved_run_resumes(tiny_recipe: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    run, moved, settings = tmp_path / "run", tmp_path / "elsewhere" / "moved", ["--config", str(tiny_recipe), "--stage1.steps", "10"]
    with pytest.raises(SystemExit) as ended:
        main([*settings, "--run", str(run), "--stop-after", "1e-9"])
    assert ended.value.code == STOPPED_IN_TIME
    assert [path.name for path in (run / "stage1/checkpoints").glob("step-*")] == ["step-000000001.pt"]
    shutil.copytree(run, moved)
    shutil.rmtree(run)
    main(["--run", str(moved), "--resume", "--stop-after", "60"])
    assert not run.exists()
    main([*settings, "--run", str(tmp_path / "whole")])
    assert (moved / "tokenizer.safetensors").read_bytes() == (tmp_path / "whole/tokenizer.safetensors").read_bytes()
    assert "stop_after" in one_line_error(main, "--run", moved, "--stop-after", "0")


def test_rerunning_a_finished_stage_changes_nothing(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: (run_copy / name).read_bytes() for name in files(run_copy)}
    main(["--run", str(run_copy)])
    out = capsys.readouterr().out
    assert "already finished" in out
    assert "--resume" in out
    assert "--run" in out
    assert {name: (run_copy / name).read_bytes() for name in files(run_copy) if name != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


def test_a_finished_stage_can_be_extended(run_copy: Path) -> None:
    before = (run_copy / "tokenizer.safetensors").read_bytes()
    main(["--run", str(run_copy), "--resume", "--stage1.steps", "70"])
    assert (run_copy / "tokenizer.safetensors").read_bytes() != before
    assert read_json(run_copy / "stage1" / "report.json")["steps"] == 70


def test_an_interrupted_extension_can_be_resumed(
    run_copy: Path, capsys: pytest.CaptureFixture[str], one_line_error: Callable[..., str]
) -> None:
    main(["--run", str(run_copy), "--resume", "--stage1.steps", "70"])
    extended = (run_copy / "tokenizer.safetensors").read_bytes()
    # As after Ctrl-C at step 60 of 70: the recipe has 70 steps, the newest checkpoint and the weights have 60.
    shutil.copy(finished_weights(run_copy, 60), run_copy / "tokenizer.safetensors")
    (run_copy / "stage1/checkpoints/step-000000070.pt").unlink()
    assert "finished after 60 steps, but asked for were 70" in one_line_error(main, "--run", run_copy)
    main(["--run", str(run_copy), "--resume"])
    assert "already finished" not in capsys.readouterr().out
    assert (run_copy / "tokenizer.safetensors").read_bytes() == extended


def finished_weights(run: Path, steps: int) -> Path:
    """Write the tokenizer file of a checkpoint beside the run."""
    recipe = load_recipe(run / "recipe.yaml")
    model = VQVAE(recipe.tokenizer, recipe.data.height, recipe.data.width, recipe.data.channels)
    model.load_state_dict(torch.load(run / f"stage1/checkpoints/step-{steps:09d}.pt", weights_only=True)["model"])
    save_tokenizer(run.parent / "weights.safetensors", model, steps)
    return run.parent / "weights.safetensors"


def test_a_failed_first_attempt_does_not_fix_the_recipe(tiny_recipe: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    run = tmp_path / "new"
    one_line_error(main, "--config", tiny_recipe, "--run", run, "--data.path", tmp_path / "nowhere")
    assert not run.exists()
    main(["--config", str(tiny_recipe), "--run", str(run), "--stage1.steps", "2"])
    assert (run / "tokenizer.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--stage1.weight_decay", "0.5"], ["stage1.weight_decay: 0.5, not 0.0", "--run"]),
        (["--stage1.steps", "3"], ["finished after 60 steps", "--resume", "--run"]),
        (["--resume", "--data.seed", "9"], ["data.seed: 9, not 0"]),
    ],
)
def test_a_runs_recipe_is_fixed(run_copy: Path, arguments: list[str], parts: list[str], one_line_error: Callable[..., str]) -> None:
    line = one_line_error(main, "--run", run_copy, *arguments)
    assert all(part in line for part in parts), line


def test_a_finished_stage_without_checkpoints_is_not_restarted(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    """It cannot be extended, and its results stay."""
    shutil.rmtree(run_copy / "stage1" / "checkpoints")
    written = (run_copy / "tokenizer.safetensors").read_bytes()
    line = one_line_error(main, "--run", run_copy, "--resume", "--stage1.steps", "99")
    assert "expected a checkpoint to go on from after 60 steps, found none" in line
    assert (run_copy / "tokenizer.safetensors").read_bytes() == written


def test_resume_without_a_checkpoint_starts_training(tiny_recipe: Path, tmp_path: Path) -> None:
    main(["--config", str(tiny_recipe), "--run", str(tmp_path / "new"), "--resume", "--stage1.steps", "2"])
    assert (tmp_path / "new" / "tokenizer.safetensors").exists()


def test_resuming_after_the_last_checkpoint_writes_the_results(tiny_recipe: Path, tmp_path: Path) -> None:
    settings = ["--config", str(tiny_recipe), "--run", str(tmp_path / "new"), "--stage1.steps", "4"]
    main(settings)
    written = (tmp_path / "new" / "tokenizer.safetensors").read_bytes()
    report = read_json(tmp_path / "new" / "stage1" / "report.json")
    (tmp_path / "new" / "tokenizer.safetensors").unlink()
    main([*settings, "--resume"])
    assert (tmp_path / "new" / "tokenizer.safetensors").read_bytes() == written
    assert read_json(tmp_path / "new" / "stage1" / "report.json")["validation"] == report["validation"]


def test_damaged_checkpoints_are_reported_and_not_deleted(tiny_recipe: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    """When no checkpoint is intact; tests/faults covers falling back to an earlier one."""
    folder = tmp_path / "new" / "stage1" / "checkpoints"
    main(["--config", str(tiny_recipe), "--run", str(tmp_path / "new"), "--stage1.steps", "2", "--stage1.checkpoint_interval", "1"])
    (tmp_path / "new" / "tokenizer.safetensors").unlink()
    paths = sorted(folder.glob("step-*.pt"))
    for path in paths:
        path.write_bytes(b"nonsense")
    assert "step-000000002.pt" in one_line_error(main, "--run", tmp_path / "new", "--resume")
    assert [path.read_bytes() for path in paths] == [b"nonsense"] * 2


def test_a_non_finite_loss_stops_the_run_and_keeps_finite_checkpoints(
    tiny_recipe: Path, tmp_path: Path, one_line_error: Callable[..., str]
) -> None:
    settings = ["--config", tiny_recipe, "--run", tmp_path / "new", "--stage1.clip_norm", "0", "--stage1.warmup_steps", "4"]
    line = one_line_error(main, *settings, "--stage1.lr", "1e30", "--stage1.checkpoint_interval", "1", "--stage1.log_interval", "1")
    step = int(re.findall(r"step (\d+): expected (?:\w+ to be finite|finite weights)", line)[0])
    for path in (tmp_path / "new" / "stage1" / "checkpoints").glob("step-*.pt"):
        state = torch.load(path, weights_only=True)
        assert state["step"] < step
        assert all(bool(torch.isfinite(weight).all()) for weight in state["model"].values())


def test_resuming_with_a_lower_learning_rate_after_divergence(
    tiny_recipe: Path, tmp_path: Path, one_line_error: Callable[..., str]
) -> None:
    """As the error about a non-finite loss advises."""
    settings = ["--config", tiny_recipe, "--run", tmp_path / "new", "--stage1.clip_norm", "0", "--stage1.checkpoint_interval", "2"]
    main([str(value) for value in [*settings, "--stage1.steps", "2"]])
    run = ["--run", str(tmp_path / "new"), "--resume", "--stage1.steps", "9"]
    assert "lower --stage1.lr and go on with --resume" in one_line_error(main, *run, "--stage1.lr", "1e30")
    main([*run, "--stage1.lr", "1e-4"])
    records = [record for record in read_metrics(tmp_path / "new" / "stage1/metrics.jsonl") if record["step"] == 9]
    assert len(records) == 2
