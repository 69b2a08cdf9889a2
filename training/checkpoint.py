"""Checkpoints: written whole or not at all, behind the training; the last k kept and the best; checked when they are read.

A checkpoint is a dictionary of state dictionaries and plain values. The main process writes it into one file (checkpoint_file.py); if its
tensors are shared out over processes, each of them writes its own into a folder (checkpoint_shards.py). Random state is not in it: there
is none (randomness.py).
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
from training.sharding import own_part, shared_out_as
from training.watch import progressed

_TICK = 1.0  # second


class Checkpoints:
    """The checkpoints of one stage, in one folder: `step-NNNNNNNNN.pt`, or folders `step-NNNNNNNNN.shards`."""

    def __init__(self, folder: Path, stage: str, keep: int, accelerator: Accelerator, shared_out: bool = False) -> None:
        """`shared_out`: whether the tensors that are saved are, over several processes, all of which make one of these then."""
        self.folder, self.stage, self.keep = folder, stage, keep
        self._accelerator, self._device = accelerator, numbered(accelerator.device)
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None
        # Of what is written, since the training goes on using its own.
        self._group: dist.ProcessGroup | None = shards_group() if shared_out else None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Nothing is being written any more when the block ends, however it ends. Errors: OSError, if nothing else went wrong."""
        self._join()
        if kind is None:
            self.check()

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(path for form in ("pt", "shards") for path in self.folder.glob(f"step-*.{form}"))

    def save(self, step: int, state: dict[str, Any], score: float | None = None) -> None:
        """Take a copy of the state after `step` steps, to be written while the training goes on; and let go of the oldest beyond `keep`,
        but not of the best. The one before is waited for.

        Args:
            step: steps taken.
            state: state dictionaries and plain values.
            score: how good it is, less being better; None: nobody has looked.
        Errors: UserError if a weight of a `model` in it, its own or a part's, is not finite; the last good checkpoint stays. OSError of
            the write before.
        """
        self._check_weights(step, state)
        if self._group is None and not self._accelerator.is_main_process:
            return
        self.wait()
        copy = copied({"format": FORMAT, "stage": self.stage, "step": step, **state})
        self._writing = threading.Thread(target=self._write, args=(step, copy, score), name="checkpoint")
        self._writing.start()

    def check(self) -> None:
        """Errors: OSError of a write that has failed by now."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Until what was saved last is on the disk. Errors: OSError if it could not be written."""
        self._join()
        self.check()

    def _join(self) -> None:
        """Until nothing is being written. As long as what is written grows, that is no hang, however long it takes."""
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
        """The newest state that is whole, the same on all processes; None if there is none. A damaged one is said and put aside.

        `into`: a state of the same structure: as its tensors are shared out, so are those that are read, and they may be read into them;
        None: no tensor is shared out. Errors: UserError for checkpoints of which none is whole, and for one of something else.
        """
        damaged: dict[Path, str] = {}
        for path in reversed(self._from_main(self.paths())):
            state, damage = self._read(path, into)
            if damage is not None:
                damaged[path] = damage
                continue
            if self._accelerator.is_main_process:
                for other, found in damaged.items():
                    aside = other.with_name(f"{other.name}.damaged")
                    if aside.exists():  # of an earlier damage of that step
                        _remove(aside)
                    other.rename(aside)
                    say(f"{RunDir.show(other)}: {found}; put aside as {other.name}.damaged, for the one before")
            return state
        if damaged:  # they stay: without any checkpoint training would begin anew
            where, why = next(iter(damaged.items()))
            raise UserError(
                f"{RunDir.show(where)}: {why}; none before it is whole; delete it to begin anew, or train another with --run NAME"
            )
        return None

    def _read(self, path: Path, into: dict[str, Any] | None) -> tuple[dict[str, Any] | None, str | None]:
        """A checkpoint's state, or what is wrong with it. Errors: UserError for one of something else."""
        one, state = self._accelerator, None
        damage, foreign = None, None
        try:
            if path.suffix == ".shards":
                check_shards(path, self.stage, one.process_index, one.num_processes)
            elif one.is_main_process:
                state = read_file(path, self.stage)
        except DamagedCheckpoint as found:
            damage = str(found)
        except UserError as found:
            foreign = str(found)
        # Others might see another file, or another damage.
        outcomes = gather_object([(damage, foreign)])
        for damage, foreign in outcomes:
            if foreign is not None:
                raise UserError(foreign)
            if damage is not None:
                return None, damage
        if path.suffix == ".shards":
            return read_shards(path, self.stage, into or {}), None
        whole = read_file(path, self.stage) if state is None else state
        return shared_out_as(whole, into), None

    def _from_main(self, found: list[Path]) -> list[Path]:
        """The same on all processes, as the main one found it."""
        sent: list[Any] = [found]
        if self._accelerator.num_processes > 1:
            broadcast_object_list(sent)
        return list(sent[0])

    def _check_weights(self, step: int, state: dict[str, Any]) -> None:
        models = [part["model"] for part in (state, *state.values()) if isinstance(part, dict) and "model" in part]
        weights = ((name, own_part(weight)) for model in models for name, weight in model.items() if weight.is_floating_point())
        broken = [name for name, weight in weights if not bool(torch.isfinite(weight).all())]
        if self._group is not None:  # one process may hold what the others do not
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
                self._let_go(path, step, score)
        except BaseException as error:
            self._failure = error

    def _let_go(self, path: Path, step: int, score: float | None) -> None:
        """Of the checkpoints that are not kept beside a new one."""
        for later in self.paths():  # of a training that went on from an earlier step since
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
        """Step and score of the best checkpoint that is still there."""
        try:
            best = read_summed_json(self.folder / "best.json")
        except UserError:  # there is none yet, or it is damaged: no reason to end a training
            return None
        return best if self._of_step(best["step"]) else None


def _size_of(paths: Iterable[Path]) -> int:
    """Bytes of files and of those in folders, of which some may be gone."""
    found = 0
    for path in paths:
        with suppress(FileNotFoundError):
            found += _size_of(path.iterdir()) if path.is_dir() else path.stat().st_size
    return found


def _remove(path: Path) -> None:
    if path.is_dir():
        # Under another name first: one that is half gone must not be taken for a checkpoint.
        gone = path if ".tmp-" in path.name else path.rename(path.with_name(f"{path.name}.tmp-1"))
        shutil.rmtree(gone)
    else:
        path.unlink()


def copied(state: Any) -> Any:
    """The same state on the CPU, sharing no memory with what goes on changing."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(copied, state))
    return state
