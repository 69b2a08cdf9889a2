"""Checkpoints of weights sharded over three processes (launched/shards.py), also read by one process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_multi_gpu_env

from configs.errors import UserError
from configs.run_dir import REPOSITORY
from configs.schema import Compute
from tests.conftest import Script
from tests.launched.shards import net
from training.checkpoint import Checkpoints
from training.optimizer import OptimizerState, adamw
from training.processes import asked_to_shard, start

RANKS = range(3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, script: Script) -> tuple[Path, list[str]]:
    """Checkpoints of steps 2 and 3, and the printed lines."""
    folder = tmp_path_factory.mktemp("shards")
    process = script("tests/launched/shards.py", folder, processes=len(RANKS))
    assert process.returncode == 0, process.stderr
    return folder, process.stdout.splitlines()


def train_unsharded(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Take the same steps in one process."""
    model = net()
    optimizer = adamw(model, 1e-2, 0.1, beta2=0.95)
    for _ in range(steps):
        model(torch.arange(4) % 3).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def read(folder: Path, stage: str = "stage 2") -> tuple[dict[str, Any] | None, torch.nn.Module, torch.optim.Optimizer]:
    model = net()
    optimizer = adamw(model, 1e-2, 0.1, beta2=0.95)
    target = {"model": model.state_dict(), "optimizer": OptimizerState(model, optimizer).state_dict()}
    return Checkpoints(folder, stage, 2, Accelerator(cpu=True)).load_latest(target), model, optimizer


def test_one_process_reads_a_checkpoint_of_three(saved: tuple[Path, list[str]]) -> None:
    state, model, optimizer = read(saved[0])
    assert state is not None
    assert state["step"] == 3
    assert state["best"] == {"step": 3, "bits": float("inf")}
    model.load_state_dict(state["model"])
    OptimizerState(model, optimizer).load_state_dict(state["optimizer"])
    gathered = torch.load(saved[0] / "expected.pt")
    expected, expected_optimizer = train_unsharded(3)
    for (name, weight), (_, reference) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(weight, gathered[name])
        assert torch.allclose(weight, reference, atol=1e-6)
        assert optimizer.state[weight]["step"] == 3
        assert torch.allclose(optimizer.state[weight]["exp_avg_sq"], expected_optimizer.state[reference]["exp_avg_sq"], atol=1e-6)


def test_errors_on_one_rank_are_reported_by_all_and_keep_the_checkpoints(saved: tuple[Path, list[str]]) -> None:
    """A full disk and a non-finite weight: no rank waits, and no partial file is left."""
    lines = saved[1]
    for rank in RANKS:
        assert f"{rank} on the disk: ['step-000000002.shards', 'step-000000003.shards']" in lines
        assert any(line.startswith(f"{rank} full: [Errno 28] No space left on device: ") and "step-000000004" in line for line in lines)
        broken = "step 5: expected finite weights, found others in 1.weight; the checkpoint before is kept"
        assert f"{rank} broken: {broken}" in lines
    assert sorted(path.name for path in saved[0].glob("step-*")) == ["step-000000002.shards", "step-000000003.shards"]


@pytest.mark.parametrize("damage", ["a bit", "cut", "a file less", "its list", "no list"])
def test_damaged_shards_fall_back_to_the_earlier_checkpoint(
    damage: str, saved: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(saved[0], tmp_path / "checkpoints")
    newest = folder / "step-000000003.shards"
    path = newest / "checkpoint.json" if "list" in damage else sorted(newest.glob("*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[-1] ^= 1
    elif damage == "its list":
        content[content.index(b'"step": 3') + 8] ^= 1  # another digit
    path.write_bytes(content[: -100 if damage == "cut" else None])
    if damage in ("a file less", "no list"):
        path.unlink()
    (folder / "step-000000003.shards.damaged").mkdir()  # left by earlier damage
    (folder / "step-000000003.shards.damaged/checkpoint.json").touch()
    state, *_ = read(folder)
    assert state is not None
    assert state["step"] == 2
    assert "put aside as step-000000003.shards.damaged" in capsys.readouterr().out


def test_shards_of_another_stage_are_refused(saved: tuple[Path, list[str]]) -> None:
    with pytest.raises(UserError, match=r"step-000000003\.shards: expected a checkpoint of stage 1, .* found one of stage 2"):
        read(saved[0], "stage 1")


def test_the_launcher_can_enable_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` with an FSDP configuration enables our sharding, and Accelerate must not shard as well."""
    options = ["--config_file", str(REPOSITORY / "configs/accelerate/fsdp.yaml"), "stage2_prior/train.py"]
    launched, *_ = _validate_launch_command(launch_command_parser().parse_args(options))
    for name, value in prepare_multi_gpu_env(launched).items():
        if "FSDP" in name:
            monkeypatch.setenv(name, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    monkeypatch.setattr("training.processes._Command.launched_sharded", False)
    accelerator = start(Compute(threads=1))
    assert "ACCELERATE_USE_FSDP" not in os.environ
    assert not asked_to_shard(accelerator, Compute())  # one process alone
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    assert asked_to_shard(accelerator, Compute())
    assert not asked_to_shard(accelerator, Compute(sharded=False))
