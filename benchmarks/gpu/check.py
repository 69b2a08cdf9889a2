"""What this machine's GPU makes of the project: right first, then how fast, as one table to paste into an issue. Ten minutes at most.

    make gpu
    python -m benchmarks.gpu.check --parts search chain

Speeds stand beside what the same GPU reaches, in the same run, in a bare matrix product and a bare copy: a data sheet's peaks are out of
reach for both. Exit code 1 if something is not right.
"""

from __future__ import annotations

import argparse
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

import torch
from accelerate import Accelerator

from benchmarks.gpu.computed import RECIPES, cost, recipe_for
from benchmarks.gpu.counting import Card
from benchmarks.gpu.steps import NUM_CLASSES, prior_step, tokenizer_step
from configs.errors import UserError, run_entry
from configs.parts import part_from
from configs.run_dir import REPOSITORY
from configs.schema import Compute, Sampling
from stage1_vqvae.quantizers.search import nearest_codes
from stage1_vqvae.training.processes import start
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.generate import uniforms
from stage2_prior.sampler import Sampler

_ROUNDS, _WARM_UP = 5, 3
_SECONDS_OF_A_COMMAND = 120


class Row(NamedTuple):
    """A line of the table."""

    what: str
    found: str
    beside: str = ""
    """What it is compared with."""
    right: bool = True


class Sizes(NamedTuple):
    """How large the parts are."""

    side: int
    """Codes along each side of the sampled grids."""
    preset: dict[str, int | str]
    """The sampled prior's sizes."""
    batches: tuple[int, ...]
    """Samples at once."""
    product: int
    """Rows and columns of the bare matrix product."""
    recipes: tuple[str, ...]


PARTS = ("search", "chain", "sampling", "training")
FULL = Sizes(16, {"preset": "B"}, (64, 256), 8192, RECIPES)
TINY = Sizes(2, {"layers": 2, "width": 32, "heads": 2}, (2,), 64, ())
"""For a look at the check itself, where there is no GPU."""


def milliseconds(work: Callable[[], object], rounds: int = _ROUNDS) -> float:
    """The median time of some work on the GPU, after it has warmed up."""
    for _ in range(_WARM_UP):
        work()
    taken = []
    for _ in range(rounds):
        torch.accelerator.synchronize()
        began = time.perf_counter()
        work()
        torch.accelerator.synchronize()
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken)


def ceilings(device: torch.device, sizes: Sizes) -> Card:
    """What this GPU reaches in bare products and a bare copy, in place of a data sheet."""
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


def search(device: torch.device) -> Iterator[Row]:
    """The nearest-code search against float64, on the tiles' borders and at recipes' sizes."""
    shapes = [(1, 2, 1), (65, 129, 3), (6272, 512, 16), (8192, 512, 64), (8192, 16384, 8), (8192, 8192, 32), (4096, 16384, 256)]
    for count, num_codes, dim in shapes:
        vectors, codebook = torch.randn(count, dim, device=device), torch.randn(num_codes, dim, device=device)
        found = nearest_codes(vectors, codebook)
        wrong = 0
        for rows, codes in zip(vectors.split(1024), found.split(1024), strict=True):
            distances = torch.cdist(rows.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
            # The bound that quantizers keep: 8 float32 eps of |z|^2 + |e|^2.
            room = 8 * torch.finfo(torch.float32).eps * (rows.double().square().sum(1) + codebook.double().square().sum(1).max())
            wrong += int((distances.gather(1, codes[:, None])[:, 0] > distances.amin(1) + room).sum())
        taken = milliseconds(lambda vectors=vectors, codebook=codebook: nearest_codes(vectors, codebook))
        yield Row(f"search N {count} K {num_codes} D {dim}", f"{wrong} wrong, {taken:.3f} ms", "0 wrong", wrong == 0)
    odd = torch.randn(70, 4, device=device)
    odd[3], odd[4] = torch.nan, torch.inf
    found = nearest_codes(odd, torch.randn(100, 4, device=device))
    inside = int(found.min()) >= 0 and int(found.max()) < 100
    yield Row("search of NaN and infinity", f"codes {int(found.min())} to {int(found.max())}", "0 to 99", inside)


def commands(folder: Path) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """The chain of a short run of the digits: what each command shows, its arguments, and its environment."""
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
    """The commands that every user begins with."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what, arguments, environment in commands(folder):
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=REPOSITORY,
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                timeout=_SECONDS_OF_A_COMMAND,
            )
            right = done.returncode == 0
            if not right:
                print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
            yield Row(what, f"exit code {done.returncode}, {time.monotonic() - began:.0f} s", "exit code 0", right)
        samples = sorted((folder / "run" / "samples").glob("*/codes.safetensors"))
        same = len(samples) == 2 and samples[0].read_bytes() == samples[1].read_bytes()
        yield Row("samples of one seed, drawn twice", "equal codes" if same else "other codes", "equal codes", same)


def sampling(device: torch.device, sizes: Sizes, card: Card) -> Iterator[Row]:
    """CUDA graphs against eager steps, then codes a second of a class-conditional prior with guidance."""
    layout = SequenceLayout([(sizes.side, sizes.side)], [16384])
    kinds = {"transformer": sizes.preset, "pixelcnn": {"layers": 2, "width": 32}}
    guided = Sampling(guidance=1.5)
    for kind, fields in kinds.items():
        torch.manual_seed(0)
        prior = part_from("prior", {"kind": kind, **fields}).build(layout, 1000).to(device).eval().requires_grad_(False)
        uniform, labels = uniforms(0, torch.arange(8), layout.length), torch.arange(8, device=device)
        by_graphs, eager = Sampler(prior, graphs=True), Sampler(prior, graphs=False)
        expected = eager(labels, uniform, guided)[0]
        for run in ("first", "second"):  # the second is of captured graphs from its first position on
            same = float((by_graphs(labels, uniform, guided)[0] == expected).double().mean())
            yield Row(f"{kind}, graphs beside eager steps, {run} run", f"{same:.2%} equal codes", "100 % in float32", same == 1)
    prior = part_from("prior", {"kind": "transformer", **sizes.preset}).build(layout, 1000).to(device, torch.bfloat16).eval()
    weights = sum(weight.nbytes for name, weight in prior.named_parameters() if not name.startswith("token"))
    shape = part_from("prior", {"kind": "transformer", **sizes.preset}).sizes()
    for batch in sizes.batches:
        sampler, rows = Sampler(prior.requires_grad_(False)), 2 * batch
        uniform, labels = uniforms(0, torch.arange(batch), layout.length), torch.arange(batch, device=device) % 1000
        taken = milliseconds(lambda: sampler(labels, uniform, guided), 3) / layout.length  # noqa: B023, called here
        # Keys and values of the mean prefix, of both halves of a guided batch.
        cache = rows * shape.layers * 2 * shape.width * 2 * (layout.length + 1) / 2
        floor = 1e3 * (max(weights / card.bandwidth, weights * rows / card.half) + cache / card.bandwidth)
        speed = f"{taken:.3f} ms a step, {1e3 * batch / taken:,.0f} codes/s, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        yield Row(f"sampling {shape.layers} x {shape.width}, guided, bfloat16, {batch} at once", speed, f"{floor:.3f} ms at the ceilings")


def training(accelerator: Accelerator, sizes: Sizes, card: Card) -> Iterator[Row]:
    """Each GPU recipe's steps: time beside what was counted, memory, and how often the host waits for the GPU."""
    for name in sizes.recipes:
        for stage in (1, 2):
            found = cost(accelerator, name, stage, card)
            if found is None:
                yield Row(f"{name}, stage {stage}", "does not fit")
                continue
            recipe = recipe_for(name, stage, found.accumulation)
            torch.cuda.reset_peak_memory_stats()
            step = tokenizer_step(accelerator, recipe) if stage == 1 else prior_step(accelerator, recipe, NUM_CLASSES.get(name, 0))
            taken = milliseconds(step.take)
            batch = getattr(recipe, f"stage{stage}").batch_size
            computed = f"{1e3 * batch * found.seconds_per_image:.0f} ms, {found.memory / 2**30:.1f} GiB computed"
            speed = f"{taken:.0f} ms for {batch} images, {1e3 * batch / taken:,.0f} images/s"
            yield Row(f"{name}, stage {stage}", f"{speed}, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", computed)
            waits = waits_of(step.take)
            yield Row(f"{name}, stage {stage}, waits of the host in a step", str(waits), "0", waits == 0)
            del step
            accelerator.free_memory()


def waits_of(work: Callable[[], object]) -> int:
    """How often the host waits for the GPU, by torch's own account."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a look at the check itself")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("make gpu: expected a GPU that torch.cuda knows, found none")
    accelerator, sizes = start(Compute()), TINY if options.tiny else FULL
    device = accelerator.device
    card = ceilings(device, sizes)
    parts = {
        "search": lambda: search(device),
        "chain": chain,
        "sampling": lambda: sampling(device, sizes, card),
        "training": lambda: training(accelerator, sizes, card),
    }
    print(
        f"{torch.cuda.get_device_name(device)}, {card.memory / 1e9:.0f} GB, torch {torch.__version__}, Python {platform.python_version()}\n"
    )
    print("| what | found | beside |\n| --- | --- | --- |")
    reached = f"{card.half / 1e12:.0f} TFLOP/s in bf16, {card.single / 1e12:.0f} in TF32, {card.bandwidth / 1e12:.2f} TB/s"
    print(f"| bare products of {sizes.product} x {sizes.product}, bare copy | {reached} | |", flush=True)
    failed = False
    for name in options.parts:
        try:
            for row in parts[name]():
                failed |= not row.right
                print(f"| {row.what} | {row.found}{'' if row.right else ' **wrong**'} | {row.beside} |", flush=True)
        except Exception as error:  # the other parts are worth having all the same
            failed = True
            traceback.print_exc()
            print(f"| {name} | **failed**: {type(error).__name__} {str(error).splitlines()[:1]} | |", flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_entry(main)
