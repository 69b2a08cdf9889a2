"""Checkpoints: written whole or not at all, in a thread beside the training; pruned to the newest k and the best; verified when read.

A checkpoint is a dictionary of state dictionaries and plain values (state.py). The main process writes it into one file
(checkpoint_file.py); if its tensors are sharded, every rank writes its shards into a folder (checkpoint_shards.py).
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from configs.errors import UserError, say
from configs.run_dir import RunDir, read_summed_json, write_summed_json
from training.checkpoint_file import FORMAT, DamagedCheckpoint, read_file, write_file
from training.checkpoint_shards import check_shards, read_shards, shards_group, write_shards
from training.devices import numbered, set_current_device
from training.sharding import local_tensor, sharded_like
from training.watch import progressed

_TICK = 1.0  # second


class Checkpoints:
    """The checkpoints of one stage, in one folder: `step-NNNNNNNNN.pt`, or folders `step-NNNNNNNNN.shards`."""

    def __init__(self, folder: Path, stage: str, keep: int, accelerator: Accelerator, sharded: bool = False) -> None:
        """`sharded`: whether the saved tensors are; all ranks must then create one."""
        self.folder, self.stage, self.keep = folder, stage, keep
        self._accelerator, self._device = accelerator, numbered(accelerator.device)
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None
        # A group of its own: the training uses its collectives while a checkpoint is written.
        self._group: dist.ProcessGroup | None = shards_group() if sharded else None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the writer, however the block ends. Errors: OSError of the write, if nothing else went wrong."""
        self._join()
        if kind is None:
            self.check()

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(path for form in ("pt", "shards") for path in self.folder.glob(f"step-*.{form}"))

    def save(self, step: int, state: dict[str, Any], score: float | None = None) -> None:
        """Copy the state after `step` steps and write it in a thread; then prune. An earlier write is waited for.

        Args:
            step: steps taken.
            state: state dictionaries and plain values.
            score: validation loss, of which the lowest is kept; None: not validated at this step.
        Errors: UserError if a weight of a `model` in it, at the top or one level below, is not finite; the last good checkpoint stays.
            OSError of the earlier write.
        """
        self._check_weights(step, state)
        if self._group is None and not self._accelerator.is_main_process:
            return
        self.wait()
        copy = copied({"format": FORMAT, "stage": self.stage, "step": step, **state})
        self._writing = threading.Thread(target=self._write, args=(step, copy, score), name="checkpoint")
        self._writing.start()

    def check(self) -> None:
        """Errors: OSError of a write that has failed meanwhile."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Wait until the newest checkpoint is on the disk. Errors: OSError if it could not be written."""
        self._join()
        self.check()

    def _join(self) -> None:
        """Wait for the writer thread. While its files grow, that counts as progress, however long it takes."""
        size = 0
        while self._writing is not None:
            self._writing.join(_TICK)
            if not self._writing.is_alive():
                self._writing = None
                return
            now = _size_of(self.folder.glob("step-*.tmp-*"))
            if now != size:
                progressed()
            size = now

    def load_latest(self, into: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Read the newest undamaged checkpoint, on every rank; None if there is none. Damaged ones are reported and renamed.

        `into`: a state of the same structure, whose tensors say how those read are sharded, and may be overwritten; None: not sharded.
        Errors: UserError if all checkpoints are damaged, and for one of another stage.
        """
        damaged: dict[Path, str] = {}
        for path in reversed(self._from_main(self.paths())):
            state, damage = self._read(path, into)
            if damage is not None:
                damaged[path] = damage
                continue
            if self._accelerator.is_main_process:
                for other, damage in damaged.items():
                    aside = other.with_name(f"{other.name}.damaged")
                    if aside.exists():  # of an earlier damage of that step
                        _remove(aside)
                    other.rename(aside)
                    say(f"{RunDir.show(other)}: {damage}; put aside as {other.name}.damaged, for the one before")
            return state
        if damaged:  # they stay: without any checkpoint the training would start again
            where, why = next(iter(damaged.items()))
            raise UserError(
                f"{RunDir.show(where)}: {why}; none before it is whole; delete it to begin anew, or train another with --run NAME"
            )
        return None

    def _read(self, path: Path, into: dict[str, Any] | None) -> tuple[dict[str, Any] | None, str | None]:
        """Read a checkpoint. Returns: its state, or its damage. Errors: UserError for one of another stage."""
        accelerator, state = self._accelerator, None
        damage, foreign = None, None
        try:
            if path.suffix == ".shards":
                check_shards(path, self.stage, accelerator.process_index, accelerator.num_processes)
            elif accelerator.is_main_process:
                state = read_file(path, self.stage)
        except DamagedCheckpoint as error:
            damage = str(error)
        except UserError as error:
            foreign = str(error)
        # Ranks might see different files, or different damage.
        outcomes = gather_object([(damage, foreign)])
        for damage, foreign in outcomes:
            if foreign is not None:
                raise UserError(foreign)
            if damage is not None:
                return None, damage
        if path.suffix == ".shards":
            return read_shards(path, self.stage, into or {}), None
        state = read_file(path, self.stage) if state is None else state
        return sharded_like(state, into), None

    def _from_main(self, paths: list[Path]) -> list[Path]:
        """Broadcast paths from the main process."""
        sent: list[Any] = [paths]
        if self._accelerator.num_processes > 1:
            broadcast_object_list(sent)
        return list(sent[0])

    def _check_weights(self, step: int, state: dict[str, Any]) -> None:
        models = [part["model"] for part in (state, *state.values()) if isinstance(part, dict) and "model" in part]
        weights = ((name, local_tensor(weight)) for model in models for name, weight in model.items() if weight.is_floating_point())
        broken = [name for name, weight in weights if not bool(torch.isfinite(weight).all())]
        if self._group is not None:  # each rank checks its own shards
            broken = gather_object(broken)
        if broken:
            raise UserError(f"step {step}: expected finite weights, found others in {broken[0]}; the checkpoint before is kept")

    def _write(self, step: int, state: dict[str, Any], score: float | None) -> None:
        path = self.folder / f"step-{step:09d}.{'pt' if self._group is None else 'shards'}"
        try:
            set_current_device(self._device)
            if self._accelerator.is_main_process:
                for part in self.folder.glob("step-*.tmp-*"):  # of a process that was killed while it wrote
                    _remove(part)
            if self._group is not None:
                write_shards(path, state, self._group)
            else:
                write_file(path, state)
            if self._accelerator.is_main_process:
                self._prune(path, step, score)
        except BaseException as error:
            self._failure = error

    def _prune(self, path: Path, step: int, score: float | None) -> None:
        """Delete all but the newest `keep` checkpoints and the best one."""
        for later in self.paths():  # of a training that was since resumed from an earlier step
            if later > path:
                _remove(later)
        best = self._best()
        if score is not None and (best is None or score < best["score"]):
            best = {"step": step, "score": score}
            write_summed_json(self.folder / "best.json", best)
        for old in self.paths()[: -self.keep]:
            if best is None or old not in self._of_step(best["step"]):
                _remove(old)

    def _of_step(self, step: int) -> list[Path]:
        return [path for path in self.paths() if path.stem == f"step-{step:09d}"]

    def _best(self) -> dict[str, Any] | None:
        """Return step and score of the best checkpoint on the disk."""
        try:
            best = read_summed_json(self.folder / "best.json")
        except UserError:  # there is none yet, or it is damaged: no reason to end a training
            return None
        return best if self._of_step(best["step"]) else None


def _size_of(paths: Iterable[Path]) -> int:
    """Return the bytes of files and folders, some of which may vanish meanwhile."""
    size = 0
    for path in paths:
        with suppress(FileNotFoundError):
            size += _size_of(path.iterdir()) if path.is_dir() else path.stat().st_size
    return size


def _remove(path: Path) -> None:
    if path.is_dir():
        # Renamed first: a half deleted folder must not be taken for a checkpoint.
        temporary = path if ".tmp-" in path.name else path.rename(path.with_name(f"{path.name}.tmp-1"))
        shutil.rmtree(temporary)
    else:
        path.unlink()


def copied(state: Any) -> Any:
    """Copy a state to the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(copied, state))
    return state
