"""A check that refuses settings of Accelerate's launcher which have no effect here.

`accelerate launch` passes most settings to its processes as environment variables. Some, such as `--gradient_accumulation_steps` without
DeepSpeed, are only in its own command line.
"""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import Any

import psutil

from configs.errors import UserError

_SHARDED = "--compute.sharded true shards a prior's weights, gradients and moments over processes"
_ACCUMULATION = "take --stage1.accumulation N or --stage2.accumulation N"
_CLIPPING = "take --stage1.clip_norm X or --stage2.clip_norm X"
_NO_TPU = "training runs on CPUs and GPUs"
_OFF = ("", "0", "false", "no", "none")

_ENVIRONMENT: dict[str, tuple[tuple[str, ...], str]] = {
    "ACCELERATE_MIXED_PRECISION": (("", "no", "fp16", "bf16"), "--compute.mixed_precision says the same"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("", "1"), _ACCUMULATION),
    "ACCELERATE_GRADIENT_CLIPPING": (("", "none"), _CLIPPING),
    "ACCELERATE_USE_DEEPSPEED": (_OFF, _SHARDED),
    "ACCELERATE_USE_MEGATRON_LM": (_OFF, _SHARDED),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (_OFF, _SHARDED),
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": (_OFF, _NO_TPU),
    "ACCELERATE_DOWNCAST_BF16": (_OFF, _NO_TPU),
    "ACCELERATE_IN_TPU_POD": (_OFF, _NO_TPU),
    "XLA_DOWNCAST_BF16": (_OFF, _NO_TPU),
    "XLA_USE_BF16": (_OFF, _NO_TPU),
}
"""Environment variables: values without effect, and advice for any other value."""

_FSDP_ENVIRONMENT: dict[str, tuple[tuple[str, ...], str]] = {
    "FSDP_SHARDING_STRATEGY": (("", "full_shard", "1"), _SHARDED),
    "FSDP_RESHARD_AFTER_FORWARD": (("", "true", "full_shard", "1"), _SHARDED),
    "FSDP_OFFLOAD_PARAMS": (_OFF, "--stage2.gradient_checkpointing true takes less memory too"),
    "FSDP_ACTIVATION_CHECKPOINTING": (_OFF, "take --stage2.gradient_checkpointing true"),
}
"""The same for a launcher with FSDP. Its other FSDP settings affect speed alone, and are ignored."""

_OPTIONS = {
    **{"gradient_accumulation": _ACCUMULATION, "gradient_clipping": _CLIPPING},
    **dict.fromkeys(("use_deepspeed", "deepspeed", "zero", "offload_"), _SHARDED),
    **dict.fromkeys(("use_megatron", "megatron", "use_parallelism", "parallelism"), _SHARDED),
    **dict.fromkeys(("tpu", "downcast_bf16", "main_training_function"), _NO_TPU),
    "fp8_": "--compute.mixed_precision takes no, fp16 and bf16",
}
"""Prefixes of the launcher's options, and advice."""

_THREADS = "num_cpu_threads_per_process"


def check_launcher(sharded: bool) -> int | None:
    """Refuse settings that have no effect here. Returns: CPU threads per process as `accelerate launch` has them; None: not set.

    `sharded`: whether the launcher is set to FSDP. Errors: UserError that names the setting.
    """
    for name, (allowed, advice) in {**_ENVIRONMENT, **(_FSDP_ENVIRONMENT if sharded else {})}.items():
        value = os.environ.get(name, "")
        # Accelerate ignores a precision in capitals.
        if (value if name == "ACCELERATE_MIXED_PRECISION" else value.lower()) not in allowed:
            expected = " or ".join(word for word in allowed if word) if allowed != _OFF else "no such setting"
            raise UserError(f"{name}: expected {expected}, found {value}; {advice}")
    options = _launcher_options()
    for name, value in options.items():
        remedy = next((advice for prefix, advice in _OPTIONS.items() if name.startswith(prefix)), None)
        if remedy is not None and (name, value) != ("gradient_accumulation_steps", 1):
            raise UserError(f"accelerate launch: expected no --{name}, which changes nothing here, found {value}; {remedy}")
    return options.get(_THREADS)


def _launcher_options() -> dict[str, Any]:
    """Return the launcher's options that differ from their defaults and that `check_launcher` knows; empty without a launcher."""
    words = _parent_command()
    names = [PurePath(word).name for word in words[:4]]
    start = next((number + 1 for number, name in enumerate(names) if name in ("accelerate-launch", "accelerate.commands.launch")), None)
    if start is None and "launch" in names and names[names.index("launch") - 1] == "accelerate":
        start = names.index("launch") + 1
    known = (_THREADS, *_OPTIONS)
    if start is None or not any(word.lstrip("-").replace("-", "_").startswith(known) for word in words[start:]):
        return {}
    from accelerate.commands.launch import launch_command_parser  # slow to import, and needed for these options alone

    parser = launch_command_parser()
    typed, defaults = vars(parser.parse_known_args(words[start:])[0]), vars(parser.parse_args(["script"]))
    return {name: value for name, value in typed.items() if name.startswith(known) and value != defaults.get(name)}


def _parent_command() -> list[str]:
    """Return the parent process's command line; empty if it cannot be read."""
    try:
        parent = psutil.Process().parent()
        return [] if parent is None else list(parent.cmdline())
    except psutil.Error:
        return []
