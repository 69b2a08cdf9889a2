"""What a command computes in, as a table; and what torch is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from training.precision import ieee_float32, resolve_precision, set_float32

GPU = torch.device("cuda", 0)


@pytest.fixture
def settings() -> Iterator[None]:
    """Those of float32 products, as they were before."""
    names = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [name.fp32_precision for name in names]
    yield
    torch.set_float32_matmul_precision("highest")
    for name, value in zip(names, before, strict=True):
        name.fp32_precision = value


def products() -> tuple[str, str, str]:
    backends = torch.backends
    return backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision, backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("asked", "launcher", "bf16", "networks", "float32"),
    [
        (None, None, True, "bf16", "tf32"),
        (None, "no", True, "bf16", "tf32"),  # what `accelerate launch` says if nobody said anything
        (None, "bf16", True, "bf16", "tf32"),
        (None, "fp16", True, "fp16", "tf32"),
        ("bf16", "fp16", True, "bf16", "tf32"),
        ("fp16", "no", True, "fp16", "tf32"),
        ("no", None, True, "no", "ieee"),
        ("no", "bf16", True, "no", "ieee"),
        (None, None, False, "no", None),
        (None, "no", False, "no", None),
        (None, "fp16", False, "fp16", None),
        ("bf16", None, False, "bf16", None),
        ("no", "fp16", False, "no", "ieee"),
    ],
)
def test_precision_on_a_gpu(asked: str | None, launcher: str | None, bf16: bool, networks: str, float32: str | None) -> None:
    found = resolve_precision(asked, launcher, "cuda", bf16)
    assert (found.networks, found.float32) == (networks, float32)
    assert found.line is not None
    assert found.line.startswith("precision: ")
    if networks != "no":
        assert f"training in {networks}" in found.line
        assert "--compute.mixed_precision no is exact" in found.line
    assert ("TF32, nearest-code search" in found.line) == (float32 == "tf32")


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_elsewhere_it_is_what_was_asked_for(device: str) -> None:
    for asked in (None, "no", "bf16"):
        for launcher in (None, "no", "bf16"):
            assert resolve_precision(asked, launcher, device, False) == (asked, None, None)


@pytest.mark.usefixtures("settings")
def test_float32_is_set_for_products_and_convolutions_of_a_gpu_alone() -> None:
    *_, on_cpu = products()
    set_float32("tf32")
    assert products() == ("tf32", "tf32", on_cpu)
    assert torch.get_float32_matmul_precision() == "high"  # torch.compile asks by this name: it must not raise
    with ieee_float32(GPU):
        assert products() == ("ieee", "ieee", on_cpu)
        torch.get_float32_matmul_precision()
    assert products() == ("tf32", "tf32", on_cpu)
    set_float32("ieee")
    assert products() == ("ieee", "ieee", on_cpu)
    assert torch.get_float32_matmul_precision() == "highest"
    torch.backends.cuda.matmul.allow_tf32 = True  # as Accelerate does where it compiles
    set_float32("ieee")
    assert products() == ("ieee", "ieee", on_cpu)


@pytest.mark.usefixtures("settings")
def test_full_float32_ends_with_its_block_however_it_ends() -> None:
    set_float32("tf32")
    before = products()
    with pytest.raises(RuntimeError, match="inside"), ieee_float32(GPU):
        raise RuntimeError("inside")
    assert products() == before
    with ieee_float32(torch.device("cpu")):
        assert products() == before


@pytest.mark.usefixtures("settings")
def test_blocks_of_several_threads_may_end_in_any_order() -> None:
    set_float32("tf32")
    before = products()
    first, second = ieee_float32(GPU), ieee_float32(GPU)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert products()[:2] == ("ieee", "ieee")  # the second is still inside
    second.__exit__(None, None, None)
    assert products() == before
