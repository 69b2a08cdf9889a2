"""Check and benchmark this machine's GPU: correctness first, then speed, as one table to paste into an issue. About ten minutes.

    make gpu
    python -m benchmarks.gpu.check --parts search chain

Speeds are compared with a bare matrix product and a bare copy on the same GPU in the same run, since a data sheet's peaks are out of
reach. Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from benchmarks.gpu.computed import RECIPES, cost, recipe_for
from benchmarks.gpu.counting import Card
from benchmarks.gpu.steps import NUM_CLASSES, prior_step, tokenizer_step
from configs.errors import UserError, run_entry
from configs.parts import part_from
from configs.run_dir import REPOSITORY
from configs.schema import Compute
from stage1_vqvae.networks import group_norm as norm
from stage1_vqvae.quantizers.search import nearest_codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.classes import Classes
from stage2_prior.draw import StepwiseSampling, uniforms
from stage2_prior.priors.stepwise import FixedBatch, StepwisePrior
from stage2_prior.sampler import Sampler, in_bfloat16
from training.kernels import Kernel
from training.precision import ieee_float32
from training.processes import start

_ROUNDS, _WARM_UP = 5, 3
_COMMAND_TIMEOUT = 120
_CONDITION = Classes(names=[*map(str, range(1000))])


class Row(NamedTuple):
    """A row of the table."""

    name: str
    measured: str
    expected: str = ""
    right: bool = True


class Sizes(NamedTuple):
    """Sizes of the parts."""

    side: int
    """Codes per side of the sampled grids."""
    num_codes: int
    """Number of codes K."""
    preset: dict[str, int | str]
    """Sizes of the sampled prior."""
    batches: tuple[int, ...]
    """Samples per batch."""
    product: int
    """Rows and columns of the bare matrix product."""
    searches: tuple[tuple[int, int, int], ...]
    """Vectors, codes and channels of each search."""
    recipes: tuple[str, ...]


PARTS = ("search", "group_norm", "chain", "sampling", "training")
# On the borders of the kernel's tiles, then at recipes' sizes.
_SEARCHES = ((1, 2, 1), (65, 129, 3), (6272, 512, 16), (8192, 512, 64), (8192, 16384, 8), (8192, 8192, 32), (4096, 16384, 256))
FULL = Sizes(16, 16384, {"preset": "B"}, (64, 256), 8192, _SEARCHES, RECIPES)
TINY = Sizes(2, 64, {"layers": 2, "width": 32, "heads": 2}, (2,), 64, _SEARCHES[:2], ())
"""Small sizes, to test this script."""


def milliseconds(work: Callable[[], object], rounds: int = _ROUNDS) -> float:
    """Measure the median milliseconds of work on the GPU, after warm-up."""
    for _ in range(_WARM_UP):
        work()
    times = []
    for _ in range(rounds):
        torch.accelerator.synchronize()
        start = time.perf_counter()
        work()
        torch.accelerator.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def ceilings(device: torch.device, sizes: Sizes) -> Card:
    """Measure bare matrix products and a bare copy, as references for speeds."""
    n = sizes.product
    rates = []
    for dtype in (torch.bfloat16, torch.float32):
        left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        rates.append(2 * n**3 / milliseconds(lambda left=left, right=right: left @ right) * 1e3)
    source = torch.empty(n, n, 4, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return Card(memory, bandwidth, *rates)


def search(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Check the nearest-code search against float64, at tile borders and at recipes' sizes."""
    for count, num_codes, dim in sizes.searches:
        vectors, codebook = torch.randn(count, dim, device=device), torch.randn(num_codes, dim, device=device)
        nearest = nearest_codes(vectors, codebook)
        wrong = 0
        for rows, codes in zip(vectors.split(1024), nearest.split(1024), strict=True):
            distances = torch.cdist(rows.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
            # The bound that quantizers keep: 8 float32 eps of |z|^2 + |e|^2.
            tolerance = 8 * torch.finfo(torch.float32).eps * (rows.double().square().sum(1) + codebook.double().square().sum(1).max())
            wrong += int((distances.gather(1, codes[:, None])[:, 0] > distances.amin(1) + tolerance).sum())
        taken = milliseconds(lambda vectors=vectors, codebook=codebook: nearest_codes(vectors, codebook))
        yield Row(f"search N {count} K {num_codes} D {dim}", f"{wrong} wrong, {taken:.3f} ms", "0 wrong", wrong == 0)
    odd = torch.randn(70, 4, device=device)
    odd[3], odd[4] = torch.nan, torch.inf
    nearest = nearest_codes(odd, torch.randn(100, 4, device=device))
    inside = int(nearest.min()) >= 0 and int(nearest.max()) < 100
    yield Row("search of NaN and infinity", f"codes {int(nearest.min())} to {int(nearest.max())}", "0 to 99", inside)


def commands(folder: Path) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """List the commands of a short run of the digits: label, arguments, environment."""
    run = ["--run", str(folder / "run")]
    cpu = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    yield "stage 1", ["stage1_vqvae/train.py", *run, "--stage1.steps", "600"], {}
    yield "stage 1, resumed", ["stage1_vqvae/train.py", *run, "--resume", "--stage1.steps", "650"], {}
    yield "extraction", ["stage2_prior/extract_codes.py", *run], {}
    yield "stage 2", ["stage2_prior/train.py", *run, "--stage2.steps", "300"], {}
    yield "stage 2, resumed", ["stage2_prior/train.py", *run, "--resume", "--stage2.steps", "350"], {}
    yield "64 samples", ["pipelines/sample.py", *run, "--n", "64"], {}
    yield "the same samples again", ["pipelines/sample.py", *run, "--n", "64"], {}
    yield "a file of codes", ["pipelines/compress.py", *run, "--output", str(folder / "images.vqc")], {}
    file = ["pipelines/decompress.py", *run, "--file", str(folder / "images.vqc"), "--output"]
    yield "that file on the GPU", [*file, str(folder / "on_gpu")], {}
    yield "that file on the CPU", [*file, str(folder / "on_cpu")], cpu


def chain() -> Iterator[Row]:
    """Check the commands of a first run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, arguments, environment in commands(folder):
            start = time.monotonic()
            try:
                process = subprocess.run(
                    [sys.executable, *arguments],
                    cwd=REPOSITORY,
                    env={**os.environ, **environment},
                    capture_output=True,
                    encoding="utf-8",
                    timeout=_COMMAND_TIMEOUT,
                )
            except subprocess.TimeoutExpired:
                yield Row(label, f"not done in {_COMMAND_TIMEOUT} s", "exit code 0", right=False)
                continue
            right = process.returncode == 0
            if not right:
                print(process.stdout[-2000:], process.stderr[-4000:], sep="\n", file=sys.stderr)
            yield Row(label, f"exit code {process.returncode}, {time.monotonic() - start:.0f} s", "exit code 0", right)
        decoded = [{path.name: path.read_bytes() for path in (folder / output).rglob("*.png")} for output in ("on_gpu", "on_cpu")]
        same = len(decoded[0]) > 0 and decoded[0].keys() == decoded[1].keys()
        apart = max((_largest_difference(decoded[0][name], decoded[1][name]) for name in decoded[0]), default=255) if same else 255
        yield Row("images of that file, GPU beside CPU", f"{len(decoded[0])} images, at most {apart} of 255 apart", "at most 2", apart <= 2)
        samples = sorted((folder / "run" / "samples").glob("*/codes.safetensors"))
        same = len(samples) == 2 and samples[0].read_bytes() == samples[1].read_bytes()
        yield Row("samples of one seed, drawn twice", "equal codes" if same else "other codes", "equal codes", same)


def _largest_difference(left: bytes, right: bytes) -> int:
    """Compute the largest pixel difference of two PNG files."""
    images = [np.asarray(Image.open(io.BytesIO(content))).astype(int) for content in (left, right)]
    return int(np.abs(images[0] - images[1]).max())


def group_norm(device: torch.device) -> Iterator[Row]:
    """Check the fused normalisation and its gradients in bf16 against PyTorch in float64."""
    torch.manual_seed(0)
    x = torch.randn(2, 128, 33, 31, device=device).to(torch.bfloat16, memory_format=torch.channels_last)
    weight, bias = torch.randn(128, device=device), torch.randn(128, device=device)
    y, mean, rstd = norm.group_norm(x, weight, bias, 32, 1e-6, True)
    exact = norm.plain_group_norm(x.double(), weight.double(), bias.double(), 32, 1e-6, True)
    gradients = norm.group_norm_backward(y, x, weight, bias, mean, rstd, True)
    exact_gradients = norm.plain_group_norm_backward(y.double(), x.double(), weight.double(), bias.double(), exact[1], exact[2], True)
    names = ("result", "gradient at the input", "at the gain", "at the bias")
    for name, computed, exact_value in zip(names, (y, *gradients[:3]), (exact[0], *exact_gradients[:3]), strict=True):
        # Largest error in units of bf16's rounding of the largest value.
        apart = float((computed.double() - exact_value).abs().max() / exact_value.abs().max()) / torch.finfo(torch.bfloat16).eps
        yield Row(f"group normalisation in bf16, {name}", f"{apart:.2f} roundings apart", "at most 2", apart <= 2)


def steps_in_bfloat16(prior: StepwisePrior, sequences: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute logits (B, T, K), float32, of static-shape bfloat16 steps along fixed sequences (B, T)."""
    position = torch.zeros(1, dtype=torch.int64, device=sequences.device)
    steps = in_bfloat16(prior).fixed_steps(FixedBatch(sequences, labels, position))
    assert steps is not None
    logits = []
    for number in range(sequences.shape[1]):
        steps.prepare(number)
        logits.append(steps.logits(steps.phase(number)).float())
        position += 1
    return torch.stack(logits, 1)


def sampling(device: torch.device, sizes: Sizes, card: Card) -> Iterator[Row]:
    """Check CUDA graphs against eager steps, then measure codes per second of a class-conditional prior with guidance."""
    layout = SequenceLayout([(sizes.side, sizes.side)], [sizes.num_codes])
    kinds = {"transformer": sizes.preset, "pixelcnn": {"layers": 2, "width": 32}}
    guided = StepwiseSampling(guidance=1.5)
    for kind, fields in kinds.items():
        torch.manual_seed(0)
        prior = part_from("prior", {"kind": kind, **fields}).build(layout, _CONDITION).to(device).eval().requires_grad_(False)
        uniform, labels = uniforms(0, torch.arange(8), layout.length), torch.arange(8, device=device)
        by_graphs, eager = Sampler(prior, graphs=True), Sampler(prior, graphs=False)
        with ieee_float32(device):
            expected = eager(labels, uniform, guided)[0]
            for run in ("first", "second", "third"):  # the third only replays
                same = float((by_graphs(labels, uniform, guided)[0] == expected).double().mean())
                # Kernels sum in another order: a draw near a boundary may change, and with it later draws.
                yield Row(f"{kind}, graphs and eager steps, {run} batch", f"{same:.1%} equal codes", "at least 90 %", same >= 0.9)
    prior = part_from("prior", {"kind": "transformer", **sizes.preset}).build(layout, _CONDITION).to(device).eval().requires_grad_(False)
    sequences, labels = torch.randint(sizes.num_codes, (8, layout.length), device=device), torch.arange(8, device=device)
    with torch.no_grad(), ieee_float32(device):
        exact = prior.logits(layout.grids_of(sequences), labels)[0]
        # The error in units of that of rounding the weights to bf16.
        rounded = in_bfloat16(prior).float().logits(layout.grids_of(sequences), labels)[0]
        apart = float((steps_in_bfloat16(prior, sequences, labels) - exact).norm() / (rounded - exact).norm())
    yield Row("logits of sampling steps in bf16", f"{apart:.2f} x the error of rounded weights", "at most 4", apart <= 4)
    del by_graphs, eager, expected, exact, rounded  # their memory would count as sampling's
    prior = in_bfloat16(prior)
    weights = sum(weight.nbytes for name, weight in prior.named_parameters() if not name.startswith("token"))
    shape = part_from("prior", {"kind": "transformer", **sizes.preset}).sizes()
    for batch in sizes.batches:
        sampler, rows = Sampler(prior), 2 * batch
        uniform, labels = uniforms(0, torch.arange(batch), layout.length), torch.arange(batch, device=device) % 1000
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        taken = milliseconds(lambda: sampler(labels, uniform, guided), 3) / layout.length  # noqa: B023, called here
        # Keys and values of the mean prefix, of both halves of a guided batch.
        cache = rows * shape.layers * 2 * shape.width * 2 * (layout.length + 1) / 2
        floor = 1e3 * (max(weights / card.bandwidth, weights * rows / card.half) + cache / card.bandwidth)
        speed = f"{taken:.3f} ms per step, {1e3 * batch / taken:,.0f} codes/s, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        yield Row(f"sampling {shape.layers} x {shape.width}, guided, bfloat16, {batch} at once", speed, f"{floor:.3f} ms at the ceilings")


def training(accelerator: Accelerator, sizes: Sizes, card: Card) -> Iterator[Row]:
    """Measure steps of each GPU recipe: time and memory against the counted ones, and host synchronisations."""
    for name in sizes.recipes:
        for stage in (1, 2):
            try:
                yield from training_step(accelerator, name, stage, card)
            except torch.OutOfMemoryError:
                yield Row(f"{name}, stage {stage}", "out of memory", "see docs/gpus.md for what takes less")
            except Exception as error:  # the other recipes still run
                traceback.print_exc()
                yield Row(f"{name}, stage {stage}", f"failed: {type(error).__name__}", "", right=False)
            accelerator.free_memory()


def training_step(accelerator: Accelerator, name: str, stage: int, card: Card) -> Iterator[Row]:
    """Measure a step of one stage of a recipe."""
    expected = cost(accelerator, name, stage, card)
    if expected is None:
        yield Row(f"{name}, stage {stage}", "not run", "does not fit, as computed")
        return
    recipe = recipe_for(name, stage, expected.accumulation)
    batch = getattr(recipe, f"stage{stage}").batch_size
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.backends.cudnn.benchmark = stage == 1  # as stage1_vqvae/train.py has it
    step = tokenizer_step(accelerator, recipe) if stage == 1 else prior_step(accelerator, recipe, NUM_CLASSES.get(name, 0))
    taken = milliseconds(step.take)
    computed = f"computed: {1e3 * batch * expected.seconds_per_image:.0f} ms, {expected.memory / 2**30:.1f} GiB"
    speed = f"{taken:.0f} ms for {batch} images in {expected.accumulation}, {1e3 * batch / taken:,.0f} images/s"
    yield Row(f"{name}, stage {stage}", f"{speed}, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", computed)
    waits = host_waits(step.take)
    yield Row(f"{name}, stage {stage}, waits of the host in a step", "; ".join([str(len(waits)), *waits[:3]]), "0", not waits)


def host_waits(work: Callable[[], object]) -> list[str]:
    """Return file and line of each host wait, as torch reports them."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)]


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to test the check itself")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("make gpu: expected a GPU that torch.cuda knows, found none")
    accelerator, sizes = start(Compute()), TINY if options.tiny else FULL
    device = accelerator.device
    card = ceilings(device, sizes)
    parts = {
        "search": lambda: search(device, sizes),
        "group_norm": lambda: group_norm(device),
        "chain": chain,
        "sampling": lambda: sampling(device, sizes, card),
        "training": lambda: training(accelerator, sizes, card),
    }
    print(
        f"{torch.cuda.get_device_name(device)}, {card.memory / 1e9:.0f} GB, torch {torch.__version__}, Python {platform.python_version()}\n"
    )
    print("| check | measured | expected |\n| --- | --- | --- |")
    reached = f"{card.half / 1e12:.0f} TFLOP/s in bf16, {card.single / 1e12:.0f} in TF32, {card.bandwidth / 1e12:.2f} TB/s"
    print(f"| bare products of {sizes.product} x {sizes.product}, bare copy | {reached} | |", flush=True)
    failed = False
    for name in options.parts:
        try:
            for row in parts[name]():
                failed |= not row.right
                print(f"| {row.name} | {row.measured}{'' if row.right else ' **wrong**'} | {row.expected} |", flush=True)
        except Exception as error:  # the other parts still run
            failed = True
            traceback.print_exc()
            print(f"| {name} | **failed**: {type(error).__name__} {str(error).splitlines()[:1]} | |", flush=True)
    disabled = ", ".join(Kernel.disabled)
    print(f"| Triton kernels that could not be launched | {disabled or 'none'}{' **wrong**' if disabled else ''} | none |")
    if failed or disabled:
        sys.exit(1)


if __name__ == "__main__":
    run_entry(main)
