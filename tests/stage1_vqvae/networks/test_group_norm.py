"""Group normalisation with SiLU, its gradients, and the convolution after it, against torch's own in float64."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from configs.run_dir import REPOSITORY
from stage1_vqvae.networks import group_norm as under_test
from stage1_vqvae.networks import vqgan
from stage1_vqvae.networks.group_norm import GroupNorm, group_norm, group_norm_backward, normed_convolution
from stage1_vqvae.networks.vqgan import VQGANPart
from training.kernels import Kernel

CHANNELS_LAST = torch.channels_last


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's tensors go the way that a GPU's go, through the plain lines."""
    monkeypatch.setattr(under_test, "on_accelerator", lambda _: True)
    monkeypatch.setattr(vqgan, "on_accelerator", lambda _: True)


def in_a_process(program: str, **environment: str) -> Any:
    """What the program prints last, which is JSON."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with torch's CUDA builds")

_IN_THE_INTERPRETER = """
import json, torch
from torch.nn import functional as F
from stage1_vqvae.networks.group_norm import plain_group_norm, plain_group_norm_backward
from stage1_vqvae.networks.group_norm_kernels import launch_group_norm, launch_group_norm_backward

def error(found, exact, rounding):
    "The largest difference, in units of what the dtype rounds of the largest value."
    return ((found.double() - exact).abs().max() / (rounding * exact.abs().max())).item()

found = []
torch.manual_seed(0)
for shape, groups, silu, dtype, offset in (
    ((2, 6, 5, 7), 2, True, torch.float32, 3.0),  # three channels a group
    ((1, 512, 3, 5), 32, False, torch.float32, 0.0),
    ((1, 32, 15, 21), 32, True, torch.float32, -1.0),  # two chunks, the last of them not full
    ((1, 64, 1, 2), 2, True, torch.float32, 0.0),
    ((2, 128, 7, 11), 4, True, torch.float32, 1000.0),
    ((2, 128, 5, 11), 4, True, torch.bfloat16, 1.0),
    ((1, 160, 6, 5), 8, True, torch.float16, 1.0),
):
    x, gradient = ((torch.randn(shape) + move).to(dtype).contiguous(memory_format=torch.channels_last) for move in (offset, 0.0))
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    y = F.group_norm(exact[0], groups, *exact[1:], 1e-6)
    y = F.silu(y) if silu else y
    gradients = torch.autograd.grad(y, exact, gradient.double())
    for forward, backward in ((launch_group_norm, launch_group_norm_backward), (plain_group_norm, plain_group_norm_backward)):
        made, mean, rstd = forward(x, weight, bias, groups, 1e-6, silu)
        grad_x, grad_weight, grad_bias, again = backward(gradient, x, weight, bias, mean, rstd, silu)
        for map in (made, grad_x, again):
            assert map.dtype == dtype and map.is_contiguous(memory_format=torch.channels_last)
        float32 = torch.finfo(torch.float32).eps * (1 + abs(offset))
        rounding = max(float32, torch.finfo(dtype).eps)
        maps = [error(made, y, rounding), error(again, y, rounding), error(grad_x, gradients[0], rounding)]
        sums = [error(grad_weight, gradients[1], float32), error(grad_bias, gradients[2], float32)]
        found.append([f"{forward.__name__} {shape} {dtype}", maps, sums])
print(json.dumps(found))
"""


@needs_triton
def test_kernels_and_plain_lines_are_as_exact_as_rounding_lets_them_be() -> None:
    """In Triton's interpreter, which must be chosen before the import; it cuts bfloat16 off where a GPU rounds."""
    for name, maps, sums in in_a_process(_IN_THE_INTERPRETER, TRITON_INTERPRET="1"):
        assert max(maps) < 2, (name, maps)
        assert max(sums) < 3, (name, sums)


_COMPILED = """
import json, os, re, subprocess, tempfile, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import stage1_vqvae.networks.group_norm_kernels as kernels

PTXAS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")

def source(kernel, dtype, channels):
    shape = kernels.Partition(torch.empty(32, channels, 256, 256, device="meta"), 32)
    members = dict(zip(("channels", "width", "CHUNKS", "WIDTH"), shape.group_tile))
    fixed = {**dict(zip(("channels", "padded", "ROWS"), shape.tile)), **members, "silu": True}
    kinds = {name: "constexpr" if name in fixed else "*fp32" for name in kernel.arg_names}
    kinds |= {name: f"*{dtype}" for name in ("x", "y", "gradient", "grad_x") if name in kinds}
    kinds |= {name: "i32" for name in ("pixels", "chunk_pixels", "chunks", "groups") if name in kinds}
    kinds |= {"eps": "fp32"} if "eps" in kinds else {}
    aligned = {(number,): [["tt.divisibility", 16]] for number, name in enumerate(kernel.arg_names) if kinds[name][0] in "*i"}
    constants = {name: fixed[name] for name in kinds if name in fixed}
    return ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)

found = []
for capability, dtype, channels in ((80, "bf16", 512), (90, "fp32", 64)):
    for name in ("_moments", "_statistics", "_normalise", "_sums", "_group_sums", "_gradient"):
        made = triton.compile(source(getattr(kernels, name), dtype, channels), target=GPUTarget("cuda", capability, 32))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "kernel.ptx")
            open(path, "w").write(made.asm["ptx"])
            target = re.search(r"[.]target (sm_\\w+)", made.asm["ptx"])[1]
            command = [PTXAS, "-v", f"--gpu-name={target}", path, "-o", os.path.join(folder, "kernel.cubin")]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        wide = ".v4.b32" in made.asm["ptx"]
        registers, spilled = int(re.search(r"Used (\\d+) registers", said)[1]), sum(map(int, re.findall(r"(\\d+) bytes spill", said)))
        found.append([f"{name} sm_{capability} {dtype} {channels}", registers, spilled, wide, made.metadata.num_warps * 32])
print(json.dumps(found))
"""


@needs_triton
def test_kernels_compile_for_gpus_without_spills_and_with_wide_loads() -> None:
    """Registers let at least 12 warps live on a multiprocessor (65,536 registers), enough to hide memory's latency by 16-byte loads."""
    for name, registers, spilled, wide, threads in in_a_process(_COMPILED):
        assert spilled == 0, name
        assert registers * threads * 3 <= 65_536, (name, registers)
        assert wide or name.startswith(("_statistics", "_group_sums")), name


@pytest.mark.parametrize("silu", [True, False])
def test_gradients_are_those_of_finite_differences(silu: bool) -> None:
    x, weight, bias = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 6, 2, 3), (6,), (6,)))
    assert torch.autograd.gradcheck(lambda *given: group_norm(*given, 3, 1e-6, silu)[0], (x, weight, bias))


def test_where_a_kernel_cannot_be_compiled_the_plain_lines_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler() -> Any:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(Kernel, "usable", lambda kernel, _: not kernel._failed)
    for name in ("_forward_kernel", "_backward_kernel"):
        monkeypatch.setattr(under_test, name, Kernel(name, no_compiler))
    x, weight, bias = torch.randn(2, 64, 5, 3).requires_grad_(), *torch.rand(2, 64)
    for _ in range(2):
        y = group_norm(x, weight, bias, 32, 1e-6, True)[0]
        (gradient,) = torch.autograd.grad(y.sum(), x)
    expected = F.silu(F.group_norm(x, 32, weight, bias, 1e-6))
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(gradient, torch.autograd.grad(expected.sum(), x)[0], atol=1e-5)
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("unavailable, using slower PyTorch operators") == 2  # one line each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_compilers_are_told_of_the_operators_is_what_they_return(dtype: torch.dtype) -> None:
    """Shapes, dtypes, strides; also of maps whose channels come first."""
    x = torch.randn(2, 64, 5, 3).to(dtype)
    weight, bias = torch.rand(2, 64)
    _, mean, rstd = group_norm(x, weight, bias, 32, 1e-6, True)
    for operator, given in (
        (group_norm, (x, weight, bias, 32, 1e-6, True)),
        (group_norm_backward, (x, x, weight, bias, mean, rstd, True)),
    ):
        with FakeTensorMode() as fake:
            told = operator(*(fake.from_tensor(each) if isinstance(each, Tensor) else each for each in given))
        for expected, found in zip(told, operator(*given), strict=True):
            assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_in_float64_it_is_torchs_own(offset: float) -> None:
    x = torch.randn(2, 64, 5, 3, dtype=torch.float64) + offset
    weight, bias = torch.randn(2, 64, dtype=torch.float64)
    found = group_norm(x, weight, bias, 32, 1e-6, True)[0]
    assert torch.allclose(found, F.silu(F.group_norm(x, 32, weight, bias, 1e-6)), atol=1e-14 * (1 + offset))
    assert found.is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("silu", [True, False])
def test_on_a_cpu_it_is_torchs_own_bit_for_bit(silu: bool) -> None:
    norm, own = GroupNorm(32, 64, silu=silu), nn.GroupNorm(32, 64, eps=1e-6)
    x = torch.randn(2, 64, 5, 3).requires_grad_()
    expected = F.silu(own(x), inplace=True) if silu else own(x)
    assert torch.equal(norm(x), expected)
    assert norm.state_dict().keys() == own.state_dict().keys()
    gradients = [torch.autograd.grad(of.square().sum(), x)[0] for of in (norm(x), expected)]
    assert torch.equal(*gradients)


class Copies(TorchDispatchMode):
    """The operators that copied a map, or activated one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        self.seen += [name] if name in ("clone", "silu_") else []
        return function(*arguments, **(keywords or {}))


def test_in_training_no_map_is_copied_for_an_activation() -> None:
    """SiLU in place makes autograd keep a copy of its input; where nothing is trained it saves a map."""
    block, x = vqgan.ResidualBlock(32, 64), torch.randn(2, 32, 5, 3)
    with Copies() as copies:
        block(x).square().sum().backward()
    assert copies.seen == []
    with torch.no_grad(), Copies() as copies:
        block(x)
    assert copies.seen == ["silu_", "silu_"]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_convolution_after_it_has_torchs_gradients_and_keeps_its_input_alone() -> None:
    norm, convolution = GroupNorm(32, 64, silu=True), nn.Conv2d(64, 32, 3, stride=2, padding=1)
    for module in (norm, convolution):
        module.double()
    x = torch.randn(2, 64, 6, 8, dtype=torch.float64).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    leaves = [x, *norm.parameters(), *convolution.parameters()]
    kept: dict[int, tuple[int, ...]] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = normed_convolution(x, norm, convolution)
    expected = convolution(F.silu(F.group_norm(x, 32, norm.weight, norm.bias, 1e-6)))
    assert torch.allclose(found, expected, atol=1e-12)
    gradient = torch.randn_like(found)
    gradients = zip(*(torch.autograd.grad(of, leaves, gradient) for of in (found, expected)), strict=True)
    assert all(torch.allclose(*pair, atol=1e-12) for pair in gradients)
    assert [shape for shape in kept.values() if len(shape) == 4 and shape[2] == 6] == [x.shape]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_torch_compile_sees_it_whole() -> None:
    """Without a break in the graph, under autocast too, and with the same values."""
    norm, after, convolution = GroupNorm(32, 32, silu=True), GroupNorm(32, 64), nn.Conv2d(32, 64, 3, padding=1)

    def layers(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return after(normed_convolution(x, norm, convolution))

    x = torch.randn(2, 32, 4, 6).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    results = []
    for function in (layers, torch.compile(layers, backend="aot_eager", fullgraph=True)):
        y = function(x)
        assert y.dtype == torch.bfloat16
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, norm.weight, convolution.weight])])
    assert all(torch.allclose(*pair, rtol=1e-2, atol=1e-3) for pair in zip(*results, strict=True))


class Layouts(TorchDispatchMode):
    """Counts convolutions by whether all maps they read are channels last, and passes that do nothing but turn channels round."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        found = function(*arguments, **(keywords or {}))
        name = function._schema.name.split("::")[1]
        maps = [of for of in arguments if isinstance(of, Tensor) and of.dim() == 4 and of.shape[2] > 3]  # no kernels
        last = [of.is_contiguous(memory_format=CHANNELS_LAST) for of in maps]
        if name in ("convolution", "convolution_backward"):
            self.seen[f"{name} {all(last)}"] += 1
        elif name in ("clone", "copy_", "_to_copy", "contiguous") and maps:
            self.seen["turned"] += last[0] != found.is_contiguous(memory_format=CHANNELS_LAST)
        return found


@pytest.mark.usefixtures("as_on_a_gpu")
def test_no_map_of_the_whole_network_changes_its_layout_on_the_way_there_or_back() -> None:
    """Under autocast; and values and gradients in float64 are those of torch's own lines."""
    part = VQGANPart(hidden_channels=32, multipliers=[1, 2], attention=[2], residual_blocks=1, latent_channels=16)
    encoder, decoder = part.build(3, 5, 3)
    images = torch.rand(2, 3, 16, 24).contiguous(memory_format=CHANNELS_LAST)
    with Layouts() as spy:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = decoder(encoder(images))
        made.float().square().sum().backward()
    convolutions = sum(isinstance(module, nn.Conv2d) for network in (encoder, decoder) for module in network.modules())
    assert spy.seen["convolution True"] == convolutions
    assert spy.seen["convolution False"] == spy.seen["convolution_backward False"] == spy.seen["turned"] == 0
    assert spy.seen["convolution_backward True"] >= convolutions


def test_the_whole_network_computes_the_same_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    part = VQGANPart(hidden_channels=32, multipliers=[1, 2], attention=[2], residual_blocks=1, latent_channels=16)
    network = nn.Sequential(*part.build(3, 5, 3)).double()
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    results = []
    for accelerator in (False, True):
        for module in (under_test, vqgan):
            monkeypatch.setattr(module, "on_accelerator", lambda _, answer=accelerator: answer)
        made = network(images)
        results.append([made, *torch.autograd.grad(made.square().sum(), list(network.parameters()))])
    assert all(torch.allclose(*pair, rtol=1e-9, atol=1e-9) for pair in zip(*results, strict=True))


_KEPT = """
import json, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from configs.cli import load_recipe
from configs.run_dir import REPOSITORY

torch._C._ensureCUDADeviceGuardSet()
torch.cuda.is_available = lambda: True
torch.cuda.is_bf16_supported = lambda *_, **__: True
recipe, kept, layouts = load_recipe(REPOSITORY / "configs" / "photos.yaml"), [], []
channels_last = torch.channels_last
with FakeTensorMode():
    with torch.device("cuda"):
        encoder, decoder = recipe.tokenizer.network.build(3, recipe.tokenizer.code_dim, 3)
        images = torch.randn(32, 3, 256, 256).contiguous(memory_format=channels_last)
    weights = {weight.untyped_storage()._cdata for network in (encoder, decoder) for weight in network.parameters()}
    for precision in (torch.float32, torch.bfloat16):
        found = {}
        def keep(tensor):
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cuda", precision, enabled=precision != torch.float32):
                decoder(encoder(images))
        kept.append(sum(storage.nbytes() for number, storage in found.items() if number not in weights) / 2**30)
    # float16's convolutions are cuDNN's on every GPU; whether bfloat16's are, torch asks the GPU, and there is none.
    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function is torch.ops.aten.convolution.default:
                layouts.append(arguments[0].is_contiguous(memory_format=channels_last))
            return function(*arguments, **(keywords or {}))
    with torch.autocast("cuda", torch.float16), torch.no_grad(), Spy():
        made = decoder(encoder(images))
kept += [sum(layouts), len(layouts), made.is_contiguous(memory_format=channels_last)]
print(json.dumps(kept))
"""


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch without CUDA has no such device, not even in name")
def test_photos_keeps_a_quarter_of_what_torchs_own_lines_would_and_channels_stay_last() -> None:
    """In GiB for the backward pass at 32 images; 50.8 and 41.6 by nn.GroupNorm, F.silu and nn.Conv2d. Tensors without data."""
    float32, bfloat16, channels_last, convolutions, made = in_a_process(_KEPT)
    assert float32 < 22
    assert bfloat16 < 11
    assert channels_last == convolutions > 60
    assert made
