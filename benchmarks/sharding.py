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
    parser.add_argument("--batch", type=int, default=2, help="images a process and step")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--of", choices=["copies", "shards"], help="one of the processes to be measured")
    parser.add_argument("--folder", type=Path, help="where its codes are")
    options = parser.parse_args()
    if options.of is not None:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_codes(Path(folder), options.codes, options.side)
        found = {of: measured(options, of, folder) for of in ("copies", "shards")}
    print(f"{found['copies']['parameters'] / 1e6:.0f} M parameters, {options.processes} processes, {options.optimizer}")
    for what, unit in (("built", "MiB to begin with, at most"), ("held", "MiB in a step, at most"), ("sent", "MB sent a step")):
        copies, shards = (found[of][what] for of in ("copies", "shards"))
        print(f"{unit}: {copies:,.0f} with a copy each, {shards:,.0f} in shards, ratio {shards / copies:.2f}")
    print(f"a step: {found['copies']['seconds']:.2f} s, {found['shards']['seconds']:.2f} s")


def measured(options: argparse.Namespace, of: str, folder: str) -> dict[str, float]:
    """Run processes of one kind; returns rank 0's memory and the mean bytes sent."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes), "--"]
    typed = [f"--{name}={getattr(options, name)}" for name in ("preset", "codes", "side", "batch", "optimizer", "processes")]
    # What has been given back is the system's at once, instead of the allocator's: what is measured is what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    command = [*torchrun, __file__, *typed, f"--of={of}", f"--folder={folder}"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write_codes(folder: Path, codes: int, side: int) -> None:
    """Write a store of random codes of a few images."""
    manifest = Manifest(
        split="train",
        rows=_ROWS,
        grids=[(side, side)],
        num_codes=[codes],
        label_names=None,
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
    compute = Compute(sharded=options.of == "shards")
    accelerator = start(compute)
    config = Stage2(batch_size=options.batch * options.processes, optimizer=options.optimizer)
    before, memory = _own_mib(), _Highest()
    prior = part_from("prior", {"kind": "transformer", "preset": options.preset, "conditional": False}).build(
        SequenceLayout([(options.side, options.side)], [options.codes]), 0
    )
    state = PriorState(accelerator, prior, config, compute)
    built = memory.since_asked()
    loader, seconds = CodeLoader(CodeStore(options.folder), prior.num_classes, config, accelerator), []
    state.model.train()
    for step in range(_STEPS):
        if step == _UNTIMED:
            accelerator.wait_for_everyone()
            sent = _sent()
            memory.since_asked()
        began = time.perf_counter()
        take_step(accelerator, state, loader, config, step)
        seconds.append(time.perf_counter() - began)
    accelerator.wait_for_everyone()
    found = {
        "parameters": sum(parameter.numel() for parameter in prior.parameters()),
        "built": built - before,
        "held": memory.since_asked() - before,
        "sent": (_sent() - sent) / (_STEPS - _UNTIMED) / options.processes / 1e6,
        "seconds": statistics.median(seconds[_UNTIMED:]),
    }
    if accelerator.is_main_process:
        print(json.dumps(found), flush=True)
    finish(accelerator)


class _Highest:
    """Peak of this process's anonymous memory."""

    def __init__(self) -> None:
        self._found = _own_mib()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(0.01)
            self._found = max(self._found, _own_mib())

    def since_asked(self) -> float:
        """Return the peak since the last call."""
        found, self._found = self._found, _own_mib()
        return found


def _own_mib() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def _sent() -> int:
    """Read the bytes sent over the loopback device."""
    line = next(line for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


if __name__ == "__main__":
    main()
