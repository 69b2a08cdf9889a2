"""Memory and traffic per process of a prior with sharded weights, against replicated ones.

    python benchmarks/sharding.py [--preset B] [--codes 16384] [--side 16] [--processes 2] [--batch 2] [--optimizer adamw]

Memory is a process's anonymous pages, minus those before the prior was built; bytes are those of the loopback device per step, divided by
the number of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from configs.parts import part_from
from configs.schema import Compute, Stage2
from stage2_prior.codes.loader import CodeLoader
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.codes.store import CodeStore, Manifest, write_manifest, write_shard
from stage2_prior.conditions.none import NoCondition
from stage2_prior.steps import PriorState, take_step
from training.processes import finish, start

_ROWS, _STEPS, _UNTIMED = 64, 6, 2


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="B")
    parser.add_argument("--codes", type=int, default=16384)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2, help="images per process and step")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--kind", choices=["copies", "shards"], help="run one rank that is measured")
    parser.add_argument("--folder", type=Path, help="folder of the rank's codes")
    options = parser.parse_args()
    if options.kind is not None:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_codes(Path(folder), options.codes, options.side)
        results = {kind: run_ranks(options, kind, folder) for kind in ("copies", "shards")}
    print(f"{results['copies']['parameters'] / 1e6:.0f} M parameters, {options.processes} processes, {options.optimizer}")
    for name, unit in (("built", "MiB to begin with, at most"), ("held", "MiB in a step, at most"), ("sent", "MB sent per step")):
        copies, shards = (results[kind][name] for kind in ("copies", "shards"))
        print(f"{unit}: {copies:,.0f} replicated, {shards:,.0f} sharded, ratio {shards / copies:.2f}")
    print(f"step: {results['copies']['seconds']:.2f} s, {results['shards']['seconds']:.2f} s")


def run_ranks(options: argparse.Namespace, kind: str, folder: str) -> dict[str, float]:
    """Run processes of one kind; returns rank 0's memory and the mean bytes sent."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes), "--"]
    options_passed = [f"--{name}={getattr(options, name)}" for name in ("preset", "codes", "side", "batch", "optimizer", "processes")]
    # Freed memory returns to the system at once, so that only live memory is measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    command = [*torchrun, __file__, *options_passed, f"--kind={kind}", f"--folder={folder}"]
    process = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=environment)
    if process.returncode:
        raise SystemExit(process.stderr[-3000:])
    return dict(json.loads(process.stdout.splitlines()[-1]))


def write_codes(folder: Path, codes: int, side: int) -> None:
    """Write a store of random codes of a few images."""
    manifest = Manifest(
        split="train",
        rows=_ROWS,
        grids=[(side, side)],
        num_codes=[codes],
        condition=NoCondition(),
        augmentation="none",
        variants=1,
        image_shape=(256, 256, 3),
        tokenizer_sha256="",
        rows_per_shard=_ROWS,
        sha256=[],
    )
    write_shard(folder, manifest, 0, [torch.randint(codes, (_ROWS, 1, side, side))], None)
    write_manifest(folder, manifest)


def measure(options: argparse.Namespace) -> None:
    """Run one rank: build the prior, take steps, print memory and bytes."""
    compute = Compute(sharded=options.kind == "shards")
    accelerator = start(compute)
    config = Stage2(batch_size=options.batch * options.processes, optimizer=options.optimizer)
    before, memory = _memory_mib(), _PeakMemory()
    prior = part_from("prior", {"kind": "transformer", "preset": options.preset}).build(
        SequenceLayout([(options.side, options.side)], [options.codes]), NoCondition()
    )
    state = PriorState(accelerator, prior, config, compute)
    built = memory.take()
    loader, seconds = CodeLoader(CodeStore(options.folder), prior.condition, config, accelerator), []
    state.model.train()
    for step in range(_STEPS):
        if step == _UNTIMED:
            accelerator.wait_for_everyone()
            sent = _sent()
            memory.take()
        step_start = time.perf_counter()
        take_step(accelerator, state, loader, config, step)
        seconds.append(time.perf_counter() - step_start)
    accelerator.wait_for_everyone()
    result = {
        "parameters": sum(parameter.numel() for parameter in prior.parameters()),
        "built": built - before,
        "held": memory.take() - before,
        "sent": (_sent() - sent) / (_STEPS - _UNTIMED) / options.processes / 1e6,
        "seconds": statistics.median(seconds[_UNTIMED:]),
    }
    if accelerator.is_main_process:
        print(json.dumps(result), flush=True)
    finish(accelerator)


class _PeakMemory:
    """Peak of this process's anonymous memory."""

    def __init__(self) -> None:
        self._peak = _memory_mib()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(0.01)
            self._peak = max(self._peak, _memory_mib())

    def take(self) -> float:
        """Return the peak since the last call."""
        peak, self._peak = self._peak, _memory_mib()
        return peak


def _memory_mib() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def _sent() -> int:
    """Read the bytes sent over the loopback device."""
    line = next(line for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


if __name__ == "__main__":
    main()
