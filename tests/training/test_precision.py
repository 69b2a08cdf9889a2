"""The precision that a command uses, and torch's settings for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from training.precision import ieee_float32, resolve_precision, set_float32

GPU = torch.device("cuda", 0)


@pytest.fixture
def settings() -> Iterator[None]:
    """Restore torch's settings of float32 products afterwards."""
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
    ("setting", "launcher", "bf16", "networks", "float32"),
    [
        (None, None, True, "bf16", "tf32"),
        (None, "no", True, "bf16", "tf32"),  # the default of `accelerate launch`
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
def test_precision_on_a_gpu(setting: str | None, launcher: str | None, bf16: bool, networks: str, float32: str | None) -> None:
    precision = resolve_precision(setting, launcher, "cuda", bf16)
    assert (precision.networks, precision.float32) == (networks, float32)
    assert precision.line is not None
    assert precision.line.startswith("precision: ")
    if networks != "no":
        assert f"training in {networks}" in precision.line
        assert "--compute.mixed_precision no is exact" in precision.line
    assert ("TF32, nearest-code search" in precision.line) == (float32 == "tf32")


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_other_devices_use_the_setting_unchanged(device: str) -> None:
    for setting in (None, "no", "bf16"):
        for launcher in (None, "no", "bf16"):
            assert resolve_precision(setting, launcher, device, False) == (setting, None, None)


@pytest.mark.usefixtures("settings")
def test_float32_precision_is_set_on_gpus_only() -> None:
    *_, on_cpu = products()
    set_float32("tf32")
    assert products() == ("tf32", "tf32", on_cpu)
    assert torch.get_float32_matmul_precision() == "high"  # torch.compile reads it: it must not raise
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
def test_full_float32_ends_when_its_block_raises() -> None:
    set_float32("tf32")
    before = products()
    with pytest.raises(RuntimeError, match="inside"), ieee_float32(GPU):
        raise RuntimeError("inside")
    assert products() == before
    with ieee_float32(torch.device("cpu")):
        assert products() == before


@pytest.mark.usefixtures("settings")
def test_overlapping_blocks_may_end_in_any_order() -> None:
    set_float32("tf32")
    before = products()
    first, second = ieee_float32(GPU), ieee_float32(GPU)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert products()[:2] == ("ieee", "ieee")  # the second block is still active
    second.__exit__(None, None, None)
    assert products() == before
