"""The GPU kernel of the nearest-code search without a GPU: interpreted, compiled, and failing to launch.

Triton reads TRITON_INTERPRET when it is imported and caches its compiler and driver, so some parts run this file as a script in
another process.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import stage1_vqvae.quantizers.search as search
from stage1_vqvae.quantizers.search import nearest_codes
from training.kernels import Kernel

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with torch's CUDA builds")
EPS = torch.finfo(torch.float32).eps


def run_part(part: str, **environment: str) -> str:
    """Run a part of this file in another process and return its output."""
    process = subprocess.run([sys.executable, __file__, part], env={**os.environ, **environment}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_interpreted_kernel_is_exact() -> None:
    run_part("interpreted", TRITON_INTERPRET="1")


def interpreted() -> None:
    """Covers sizes around every tile border and every padded width."""
    from stage1_vqvae.quantizers.fused import fused_nearest

    Kernel.usable = lambda self, device: not self._failed
    torch.manual_seed(0)
    # Small integers have exact float32 distances with many ties: only the lowest index is right.
    shapes = [*itertools.product((1, 63, 64, 65, 130), (2, 63, 64, 65, 129), (1, 4, 8))]
    shapes += [(70, 130, width) for width in (9, 16, 17, 32, 33, 63, 64)]
    for count, num_codes, width in shapes:
        vectors, codes = torch.randint(-2, 3, (count, width)).float(), torch.randint(-2, 3, (num_codes, width)).float()
        exact = (vectors.double()[:, None] - codes.double()).square().sum(2).argmin(1)
        result = fused_nearest(vectors, codes, codes.square().sum(1))
        assert result.dtype == torch.int64
        assert torch.equal(result, exact), (count, num_codes, width)
    # Arbitrary numbers: nearest up to float32 rounding, and equal to the blocked search except for near ties.
    for width, offset, layout in ((5, 0.0, "rows"), (8, 3.0, "columns"), (24, 1e3, "rows"), (64, 0.0, "bfloat16")):
        vectors, codes = torch.randn(130, width) + offset, torch.randn(200, width) + offset
        if layout == "columns":
            vectors, codes = vectors.T.contiguous().T, codes.T.contiguous().T
        vectors = vectors.bfloat16() if layout == "bfloat16" else vectors
        distances = (vectors.double()[:, None] - codes.double()).square().sum(2)
        squares = vectors.double().square().sum(1) + codes.double().square().sum(1).amax()
        result = nearest_codes(vectors, codes)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Kernel, "usable", lambda *_: False)
            blocked = nearest_codes(vectors, codes)
        for chosen in (result, blocked):
            assert bool((distances.gather(1, chosen[:, None])[:, 0] <= distances.amin(1) + 8 * EPS * squares).all()), (width, offset)
        assert float((result != blocked).float().mean()) <= 0.02
    assert nearest_codes(torch.empty(0, 4), torch.randn(3, 4)).shape == (0,)
    # All distances equal, within a tile and across tiles.
    assert fused_nearest(torch.ones(70, 4), torch.zeros(200, 4), torch.zeros(200)).tolist() == [0] * 70
    halves = torch.cat([torch.ones(64, 2), -torch.ones(64, 2)])
    assert fused_nearest(torch.zeros(5, 2), halves, halves.square().sum(1)).tolist() == [0] * 5
    # Non-finite vectors get an existing code, and non-finite codes are never chosen.
    odd = torch.randn(70, 4)
    odd[3, 1], odd[5], odd[6, 0], odd[7] = torch.nan, torch.inf, -torch.inf, torch.tensor([torch.inf, -torch.inf, 0, 0])
    assert bool((nearest_codes(odd, torch.randn(100, 4)) < 100).all())
    assert bool((nearest_codes(odd, torch.full((70, 4), torch.nan)) < 70).all())
    codes = torch.randn(100, 4)
    codes[10], codes[70] = torch.nan, torch.inf
    finite = [number for number in range(100) if number not in (10, 70)]
    vectors = torch.randn(70, 4)
    assert torch.equal(nearest_codes(vectors, codes), torch.tensor(finite)[nearest_codes(vectors, codes[finite])])
    assert not search._FUSED._failed


@pytest.mark.parametrize("capability", [75, 80, 90, 100])
def test_the_compiled_kernel_fits_into_registers_and_shared_memory(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every width: no spills in the loop and 16 warps per multiprocessor, or 8 where ptxas prefetches into all registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from stage1_vqvae.quantizers import fused

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    signature = {"vectors": "*fp32", "codes": "*fp32", "squares": "*fp32", "nearest": "*i64", "count": "i32", "num_codes": "i32"}
    signature |= dict.fromkeys(("DIM", "ROWS", "CODES"), "constexpr")
    # As at a launch: torch's memory is aligned, and codes come in complete tiles.
    aligned = {(number,): [["tt.divisibility", 16]] for number in (0, 1, 2, 3, 5)}
    for width in (8, 16, 32, 64):
        constants = {"DIM": max(width, fused._MIN_CHANNELS), "ROWS": fused._ROWS, "CODES": fused._CODES}
        source = ASTSource(fn=fused._nearest, signature=signature, constexprs=constants, attrs=aligned)
        options = {"num_warps": fused._WARPS, "num_stages": fused._STAGES}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        binary = tmp_path / "nearest.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        ahead = capability == 80 and width >= 32
        assert registers <= (255 if ahead else 128), (width, registers)
        assert stack <= (16 if ahead else 0), (width, stack)
        assert compiled.metadata.shared <= 32 * 2**10, (width, compiled.metadata.shared)
        # Products are float32, not TF32.
        assert "fma.rn.f32" in compiled.asm["ptx"]
        assert "mma." not in compiled.asm["ptx"]


def test_fallback_to_the_blocked_search_where_the_kernel_cannot_be_launched(tmp_path: Path) -> None:
    """Triton's first launch fails without a driver, a compiler or Python's headers."""
    lines = run_part("not_launched", TRITON_CACHE_DIR=str(tmp_path), TRITON_LIBCUDA_PATH=str(tmp_path)).splitlines()
    errors = [re.search(r"unavailable, using slower PyTorch operators \((\w+)", line)[1] for line in lines]
    assert errors == ["RuntimeError", "FileNotFoundError", "CalledProcessError", "RuntimeError"]


def not_launched() -> None:
    """Search twice per machine: results equal the CPU's, and only the first search prints a warning."""
    import triton
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.build import _find_compiler

    vectors, codes = torch.randn(100, 8), torch.randn(200, 8)
    expected = nearest_codes(vectors, codes)
    Kernel.usable = lambda self, device: not self._failed
    machines: list[tuple[bool, dict[str, str]]] = [
        (False, {}),  # no driver
        (True, {"CC": "/nonexistent/compiler"}),
        (True, {"CC": "false"}),  # a failing compiler, as without Python.h
        (True, {"PATH": "/nonexistent"}),
    ]
    for driver, environment in machines:
        with pytest.MonkeyPatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            patched.setattr(CudaDriver, "is_active", staticmethod(lambda driver=driver: driver))
            patched.setattr(triton.backends.backends["nvidia"].driver, "is_active", staticmethod(lambda driver=driver: driver))
            getattr(_find_compiler, "cache_clear", lambda: None)()
            patched.setattr(search, "_FUSED", Kernel("the nearest-code search", search._load_fused))
            for _ in range(2):
                assert torch.equal(nearest_codes(vectors, codes), expected)


if __name__ == "__main__":
    parts: dict[str, Callable[[], None]] = {"interpreted": interpreted, "not_launched": not_launched}
    parts[sys.argv[1]]()
