"""Settings of Accelerate's launcher: those that no training loop here follows are refused, whichever way they come.

`accelerate launch` hands most of its settings to its processes by environment variables. Some it keeps to itself where their framework is
not asked for (`--gradient_accumulation_steps` without DeepSpeed): those stand in its own command line alone.
"""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import Any

import psutil

from configs.errors import UserError

_SHARDED = "--compute.sharded true shares a prior's weights, gradients and moments out over processes"
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
"""Variables, the values that ask for nothing, and what helps where another was found."""

_OF_FSDP: dict[str, tuple[tuple[str, ...], str]] = {
    "FSDP_SHARDING_STRATEGY": (("", "full_shard", "1"), _SHARDED),
    "FSDP_RESHARD_AFTER_FORWARD": (("", "true", "full_shard", "1"), _SHARDED),
    "FSDP_OFFLOAD_PARAMS": (_OFF, "--stage2.gradient_checkpointing true takes less memory too"),
    "FSDP_ACTIVATION_CHECKPOINTING": (_OFF, "take --stage2.gradient_checkpointing true"),
}
"""The same, of a launcher that asks for FSDP. What else it says of FSDP changes speed alone, and is this project's to choose."""

_OPTIONS = {
    **{"gradient_accumulation": _ACCUMULATION, "gradient_clipping": _CLIPPING},
    **dict.fromkeys(("use_deepspeed", "deepspeed", "zero", "offload_"), _SHARDED),
    **dict.fromkeys(("use_megatron", "megatron", "use_parallelism", "parallelism"), _SHARDED),
    **dict.fromkeys(("tpu", "downcast_bf16", "main_training_function"), _NO_TPU),
    "fp8_": "--compute.mixed_precision takes no, fp16 and bf16",
}
"""Beginnings of the launcher's options, and what helps."""

_THREADS = "num_cpu_threads_per_process"


def check_launcher(sharded: bool) -> int | None:
    """The CPU threads of a process that `accelerate launch` was told; None: it was not.

    `sharded`: whether the launcher asks for FSDP. Errors: UserError for a setting that no loop follows.
    """
    for name, (harmless, advice) in {**_ENVIRONMENT, **(_OF_FSDP if sharded else {})}.items():
        value = os.environ.get(name, "")
        # Accelerate takes bf16 in capitals for no precision that it knows, and casts nothing.
        if (value if name == "ACCELERATE_MIXED_PRECISION" else value.lower()) not in harmless:
            expected = " or ".join(word for word in harmless if word) if harmless != _OFF else "no such setting"
            raise UserError(f"{name}: expected {expected}, found {value}; {advice}")
    options = _launcher_options()
    for name, value in options.items():
        instead = next((advice for beginning, advice in _OPTIONS.items() if name.startswith(beginning)), None)
        if instead is not None and (name, value) != ("gradient_accumulation_steps", 1):
            raise UserError(f"accelerate launch: expected no --{name}, which changes nothing here, found {value}; {instead}")
    return options.get(_THREADS)


def _launcher_options() -> dict[str, Any]:
    """Options that were typed to the launcher that started this process, if one did, and that `check_launcher` knows."""
    words = _parents_words()
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


def _parents_words() -> list[str]:
    """The command line of the process that started this one; none where that is not to be known."""
    try:
        parent = psutil.Process().parent()
        return [] if parent is None else list(parent.cmdline())
    except psutil.Error:
        return []
