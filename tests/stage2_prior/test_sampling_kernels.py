"""Sampling's Triton kernels without a GPU: correct in the interpreter, few launches, compiled without register spills."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.run_dir import REPOSITORY

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="comes with torch's CUDA builds")


def test_kernels_agree_with_pytorch_and_a_code_takes_few_launches() -> None:
    """Launches besides matrix products of a transformer of 12 layers: at most 40 per code, three per layer."""
    program = REPOSITORY / "tests/launched/sampling_kernels.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, cwd=REPOSITORY, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["kernels"]["others"] <= 40
    assert counts["kernels"]["by operator"] == {
        **{"embed": 1, "native_layer_norm": 25, "attend": 12, "draw": 1, "add_": 1},
        **{"mm": 13, "addmm_": 24, "gate": 12},
    }
    assert counts["kernels, top_k, top_p, min_p"]["others"] <= 85
    assert counts["eager"]["others"] > 150


# Argument types and constants for LlamaGen-B at batch 256 with guidance, and for other head widths.
_ATTEND = {"projected": "*{}", "rotations": "*fp32", "keys": "*{}", "values": "*{}", "position": "*i64", "gains": "*{}", "attended": "*{}"}
_LENGTHS = {"length": "i32", "scale": "fp32"}
_CASES: dict[str, tuple[str, dict[str, str], dict[str, Any], int]] = {
    **{
        f"attend {width} {dtype}": (
            "step_kernels._attend",
            {name: kind.format(dtype) for name, kind in _ATTEND.items()} | _LENGTHS,
            {"width": width, "GAINED": gained, "TABLES": tables, "HALF": half, "BLOCK": block},
            warps,
        )
        for width, half, block, warps, dtype, gained, tables in (
            (64, 32, 32, 4, "bf16", True, 1),
            (64, 32, 32, 4, "fp32", False, 1),
            (128, 64, 16, 4, "bf16", False, 2),
        )
    },
    "gate": (
        "step_kernels._gate",
        {"x": "*bf16", "gate": "*bf16", "up": "*bf16", "hidden": "*bf16", "count": "i32", "outputs": "i32", "width": "i32"},
        {"ROWS": 128, "COLUMNS": 64, "DEPTH": 64},
        8,
    ),
    "embed": (
        "step_kernels._embed",
        {"sequences": "*i64", "offsets": "*i64", "tokens": "*bf16", "start": "*bf16", "classes": "*bf16", "labels": "*i64"}
        | {"positions": "*bf16", "above": "*bf16", "position": "*i64", "embedded": "*bf16"}
        | dict.fromkeys(("batch", "stride", "length", "width"), "i32"),
        {"GIVEN": True, "PADDED": 1024},
        4,
    ),
    "draw": (
        "draw_kernel._draw",
        {"logits": "*bf16", "uniforms": "*fp64", "scales": "*fp64", "to_draw": "*i32", "temperatures": "*fp64", "position": "*i64"}
        | {"sequences": "*i64", "failed": "*i32", "batch": "i32", "num_codes": "i32", "length": "i32"},
        {"GUIDED": True, "GREEDY": False, "WIDE": False, "BLOCK": 2048, "BLOCKS": 8},
        8,
    ),
}
_REGISTERS = {"attend 64 bf16": 72, "attend 64 fp32": 80, "attend 128 bf16": 72, "gate": 160, "embed": 48, "draw": 80}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", _CASES)
def test_kernels_compile_without_register_spills(case: str, capability: int, tmp_path: Path) -> None:
    """Triton's compiler needs no GPU; shared memory stays within that of every GPU with bf16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from stage2_prior import draw_kernel
    from stage2_prior.priors import step_kernels

    name, types, constants, warps = _CASES[case]
    module, function = name.split(".")
    kernel: Any = getattr({"step_kernels": step_kernels, "draw_kernel": draw_kernel}[module], function)
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    # Sizes and addresses that are multiples of 16.
    aligned = [number for number, argument in enumerate(kernel.arg_names) if types.get(argument, "fp32") != "fp32"]
    source = ASTSource(kernel, signature, constants, attrs={(number,): [["tt.divisibility", 16]] for number in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert compiled.metadata.shared <= 99 * 1024
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    reader = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage_text = subprocess.run([reader, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    usage = {resource: int(number) for resource, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage_text)}
    assert usage["REG"] <= _REGISTERS[case]
    assert usage["STACK"] == usage["LOCAL"] == 0
