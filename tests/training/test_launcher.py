"""Settings of Accelerate's launcher: followed, or refused with the alternative."""

from __future__ import annotations

import sys

import pytest
import torch

from configs.errors import UserError
from configs.schema import Compute
from training import launcher
from training.processes import _Command, start


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp8", "expected no or fp16 or bf16, found fp8"),
        ("ACCELERATE_MIXED_PRECISION", "BF16", "found BF16"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "expected no or bf16 on a CPU, found fp16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "expected 1, found 4; take --stage1.accumulation N"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "expected no such setting, found true; --compute.sharded"),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "found True"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "found true"),
        ("ACCELERATE_DYNAMO_BACKEND", "nonsense", "Accelerate: "),
        ("XLA_USE_BF16", "1", "found 1; training runs on CPUs and GPUs"),
        ("FSDP_OFFLOAD_PARAMS", "true", "found true"),
        ("FSDP_SHARDING_STRATEGY", "SHARD_GRAD_OP", "expected full_shard or 1, found SHARD_GRAD_OP"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "found true; take --stage2.gradient_checkpointing true"),
    ],
)
def test_unsupported_settings_in_the_environment_are_refused(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(_Command, "launched_sharded", name.startswith("FSDP"))
    with pytest.raises(UserError, match=message) as error:
        start(Compute(threads=1))
    assert name in str(error.value) or message == "Accelerate: "


HARMLESS = {
    "MIXED_PRECISION": "no",
    "GRADIENT_ACCUMULATION_STEPS": "1",
    "DYNAMO_BACKEND": "NO",
    "DYNAMO_MODE": "default",
    "USE_CPU": "True",
}


@pytest.mark.parametrize("launch_command", [["accelerate", "launch"], ["accelerate-launch"], ["-m", "accelerate.commands.launch"]])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gradient_accumulation_steps 4", "expected no --gradient_accumulation_steps, .* found 4; take --stage1.accumulation N"),
        ("--gradient-accumulation-steps=4 --num_processes 2", "found 4"),
        ("--gradient_clipping 1.0", "found 1.0; take --stage1.clip_norm X"),
        ("--zero_stage 3", "found 3; --compute.sharded"),
        ("--multi_gpu --tpu", "expected no --tpu"),
        ("--downcast_bf16", "training runs on CPUs and GPUs"),
        ("--megatron_lm_tp_degree 2", "found 2"),
        ("--gradient_accumulation_steps 1 --num_processes 2", None),
        ("--mixed_precision bf16 --num_cpu_threads_per_process 3", None),
    ],
)
def test_unsupported_options_of_the_launcher_are_refused(
    options: str, message: str | None, launch_command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options on its command line; those after the script belong to the script."""
    for name, value in HARMLESS.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    words = [sys.executable, *launch_command, *options.split(), "stage1_vqvae/train.py", "--gradient_clipping", "8", "--tpu"]
    monkeypatch.setattr(launcher, "_parent_command", lambda: words)
    before = torch.get_num_threads()
    if message is None:
        start(Compute())
        assert ("threads" not in options) or torch.get_num_threads() == 3
        torch.set_num_threads(before)
    else:
        with pytest.raises(UserError, match=message):
            start(Compute(threads=1))


def test_other_parent_processes_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher.check_launcher(False) is None
    for words in ([], ["bash"], ["make", "launch", "--tpu"], ["python", "accelerate", "config", "--tpu"]):
        monkeypatch.setattr(launcher, "_parent_command", lambda words=words: words)
        assert launcher.check_launcher(False) is None
