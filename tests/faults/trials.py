"""Trials: a fault hits a command, the command is run again, and its results are compared with those of an undisturbed run."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

import stage2_prior.extract_codes
import stage2_prior.train  # noqa: F401, so that forked commands start at once
from tests.conftest import TINY, write_pictures
from tests.faults.harness import Command, Fault, Result, contents, damage, run
from training.stopping import STOPPED_IN_TIME
from training.watch import ENDED_FOR_ANOTHER

RESULTS = {
    "stage 1": ("tokenizer.safetensors", "stage1/report.json"),
    "extraction": ("codes/**/*",),
    "stage 2": ("priors/transformer/prior.safetensors", "priors/transformer/likelihood.json"),
    "stage 2 in shards": ("priors/shards/prior.safetensors", "priors/shards/likelihood.json"),
}
# Only with more than one process.
SHARDS = "stage 2 in shards"
FOLDERS = {"sampling": "samples", "evaluation": "evaluations", "compression": "compressed"}


@dataclass(frozen=True)
class Outcome:
    """The outcome of one trial."""

    kind: str
    lost: bool
    """Whether the work could not be resumed."""
    wrong: bool
    """Whether the results differ."""
    detail: str = ""


class World:
    """Undisturbed runs with one process and with two, and copies of them for trials."""

    def __init__(self, folder: Path, recipe: Path, processes: tuple[int, ...] = (1, 2)) -> None:
        self.folder, self.recipe = folder, recipe
        self.undisturbed = {count: folder / f"undisturbed{count}" for count in processes}
        self.seconds: dict[tuple[str, int], float] = {}
        self._number = 0
        for count, path in self.undisturbed.items():
            for stage in (*RESULTS, *FOLDERS):
                if (stage in FOLDERS and count > 1) or (stage == SHARDS and count == 1):
                    continue
                result = run(self.command(stage, path), folder, count)
                assert set(result.codes) == {0}, f"{stage} by {count}: {result.output}"
                self.seconds[stage, count] = result.seconds

    def command(self, stage: str, path: Path) -> Command:
        """Return the command of a stage, which starts it or resumes it."""
        run_option = ["--run", str(path)]
        commands = {
            "stage 1": ["stage1_vqvae.train", "--config", str(self.recipe), *run_option, "--resume"],
            "extraction": ["stage2_prior.extract_codes", *run_option],
            "stage 2": ["stage2_prior.train", *run_option, "--resume"],
            SHARDS: ["stage2_prior.train", *run_option, "--name", "shards", "--compute.sharded", "true", "--resume"],
            "sampling": ["pipelines.sample", *run_option, "--n", "12"],
            "evaluation": ["pipelines.evaluate", *run_option, "--n", "24", "--features", "classifier"],
            "compression": ["pipelines.compress", *run_option],
        }
        return commands[stage]

    def copy_before(self, stage: str, processes: int) -> Path:
        """Copy the undisturbed run as it was before a stage."""
        self._number += 1
        path = self.folder / f"try{self._number}"
        drop = {
            "stage 1": ["*"],
            "extraction": ["codes", "priors", *FOLDERS.values()],
            "stage 2": ["priors", *FOLDERS.values()],
            SHARDS: ["shards", *FOLDERS.values()],
        }.get(stage, [*FOLDERS.values(), "classifier.safetensors", "rotation.safetensors"])
        shutil.copytree(self.undisturbed[processes], path, ignore=shutil.ignore_patterns(*drop))
        return path

    def results(self, stage: str, path: Path) -> dict[str, bytes | str]:
        """Read the results of a stage."""
        if stage in RESULTS:
            return contents(path, *RESULTS[stage])
        newest = max((path / FOLDERS[stage]).iterdir(), key=lambda folder: folder.name)
        return contents(newest, "*.json", "*.safetensors", "*.vqc")

    def rerun_and_compare(self, kind: str, stage: str, path: Path, processes: int, result: Result) -> Outcome:
        """Run the command again until it succeeds, and compare its results."""
        output = result.output
        for _ in range(3):
            rerun = run(self.command(stage, path), self.folder, processes)
            output += rerun.output
            if set(rerun.codes) == {0}:
                break
        else:
            return Outcome(kind, lost=True, wrong=False, detail=output[-3000:])
        expected, results = self.results(stage, self.undisturbed[processes]), self.results(stage, path)
        different = [name for name in expected.keys() | results.keys() if expected.get(name) != results.get(name)]
        shutil.rmtree(path)
        return Outcome(kind, lost=False, wrong=bool(different), detail=f"{stage}: {different}\n{output[-2000:]}" if different else "")


def build_world(folder: Path, processes: tuple[int, ...] = (1, 2)) -> World:
    """Build a world of tiny pictures and a tiny recipe."""
    write_pictures(folder / "pictures")
    recipe = folder / "tiny.yaml"
    stage1 = {**TINY["stage1"], "checkpoint_interval": 10, "validation_interval": 20}
    recipe.write_text(yaml.safe_dump({**TINY, "stage1": stage1, "data": {**TINY["data"], "path": str(folder / "pictures")}}))
    return World(folder, recipe, processes)


Trial = Callable[[World, random.Random], Outcome]
STAGES = (*RESULTS, *FOLDERS)


def killed(stage: str, processes: int = 1) -> Trial:
    """SIGKILL all processes at a random moment."""

    def trial(world: World, rng: random.Random) -> Outcome:
        path = world.copy_before(stage, processes)
        fault = Fault(seconds=rng.uniform(0, world.seconds[stage, processes]))
        result = run(world.command(stage, path), world.folder, processes, fault)
        return world.rerun_and_compare(f"SIGKILL at random, {stage}, {processes}", stage, path, processes, result)

    return trial


def killed_at_a_call(stage: str, processes: int = 1) -> Trial:
    """SIGKILL one process in the middle of a save, before a file is synced, renamed, made or removed."""

    def trial(world: World, rng: random.Random) -> Outcome:
        path = world.copy_before(stage, processes)
        fault = Fault(at_call=rng.randint(1, 40), ranks=(rng.randrange(processes),))
        result = run(world.command(stage, path), world.folder, processes, fault)
        return world.rerun_and_compare(f"SIGKILL in a save or a rename, {stage}", stage, path, processes, result)

    return trial


def one_of_two(stage: str, number: signal.Signals) -> Trial:
    """Send a signal to one of two processes; the other must end by itself."""

    def trial(world: World, rng: random.Random) -> Outcome:
        kind = f"{number.name} of one of two, {stage}"
        path = world.copy_before(stage, 2)
        fault = Fault(seconds=rng.uniform(0.5, world.seconds[stage, 2]), signal=number, ranks=(rng.randrange(2),))
        result = run(world.command(stage, path), world.folder, 2, fault)
        allowed = {0, -signal.SIGKILL, ENDED_FOR_ANOTHER, 1, 2}
        if number in (signal.SIGTERM, signal.SIGUSR1):
            allowed = {0, 128 + number, -number, ENDED_FOR_ANOTHER, 1}
        assert set(result.codes) <= allowed, result
        return world.rerun_and_compare(kind, stage, path, 2, result)

    return trial


def late(stage: str) -> Trial:
    """Start one of two processes late."""

    def trial(world: World, rng: random.Random) -> Outcome:
        path = world.copy_before(stage, 2)
        result = run(world.command(stage, path), world.folder, 2, Fault(late={rng.randrange(2): rng.uniform(0, 5)}))
        assert set(result.codes) == {0}, result.output
        return world.rerun_and_compare(f"one of two is late, {stage}", stage, path, 2, result)

    return trial


def stopped_in_time(stage: str) -> Trial:
    """Stop by `--stop-after`, twice."""

    def trial(world: World, rng: random.Random) -> Outcome:
        path = world.copy_before(stage, 1)
        result = Result([])
        for _ in range(2):
            result = run([*world.command(stage, path), "--stop-after", str(rng.uniform(0.0001, 0.02))], world.folder)
            assert set(result.codes) <= {0, STOPPED_IN_TIME}, result.output
        return world.rerun_and_compare(f"--stop-after, {stage}", stage, path, 1, result)

    return trial


def damaged_checkpoint(stage: str, kind: str) -> Trial:
    """Damage the newest checkpoint of a training that was interrupted after its last step."""

    def trial(world: World, rng: random.Random) -> Outcome:
        processes = 2 if stage == SHARDS else 1
        path = world.copy_before("stage 2" if stage == "stage 1" else "evaluation", processes)
        folder, result = {
            "stage 1": (path / "stage1", path / "tokenizer.safetensors"),
            "stage 2": (path / "priors/transformer", path / "priors/transformer/prior.safetensors"),
            SHARDS: (path / "priors/shards", path / "priors/shards/prior.safetensors"),
        }[stage]
        result.unlink()
        (folder / "report.json").unlink()
        newest = max((folder / "checkpoints").glob("step-*"))
        damage(rng.choice(sorted(newest.iterdir())) if newest.is_dir() else newest, rng, kind)
        return world.rerun_and_compare(f"checkpoint {kind}, {stage}", stage, path, processes, Result([]))

    return trial


def damaged_input(stage: str, pattern: str, how: str) -> Trial:
    """Damage an input file: it is refused by name or makes no difference, and once restored the command works."""

    def trial(world: World, rng: random.Random) -> Outcome:
        kind = f"{pattern.rpartition('/')[2]} {how}, {stage}"
        path = world.copy_before(stage, 1)
        file = rng.choice(sorted(path.glob(pattern)))
        original = file.read_bytes()
        damage(file, rng, how)
        result = run(world.command(stage, path), world.folder)
        if result.codes == [0]:
            expected, results = world.results(stage, world.undisturbed[1]), world.results(stage, path)
            if expected != results:
                return Outcome(kind, lost=False, wrong=True, detail=f"{file}: not noticed\n{result.output[-1000:]}")
        elif result.codes != [2] or "Traceback" in result.output:
            return Outcome(kind, lost=False, wrong=True, detail=f"{file}: {result}")
        file.write_bytes(original)
        return world.rerun_and_compare(kind, stage, path, 1, result)

    return trial


def damaged_vqc(damage_kind: str) -> Trial:
    """Damage a compressed file: decompression must refuse it."""

    def trial(world: World, rng: random.Random) -> Outcome:
        path = world.copy_before("evaluation", 1)
        shutil.copytree(world.undisturbed[1] / "compressed", path / "compressed")
        file = next((path / "compressed").rglob("*.vqc"))
        damage(file, rng, damage_kind)
        command = ["pipelines.decompress", "--run", str(path), "--file", str(file)]
        result = run(command, world.folder)
        shutil.rmtree(path)
        kind = f"vqc {damage_kind}, decompression"
        wrong = result.codes != [2] or "Traceback" in result.output or "error: " not in result.output
        return Outcome(kind, lost=False, wrong=wrong, detail=result.output[-1000:] if wrong else "")

    return trial


def full_disk(stage: str, mount: Callable[[Path, int], bool], unmount: Callable[[Path], None]) -> Trial:
    """Run on a disk that fills up, then again with enough space."""

    processes = 2 if stage == SHARDS else 1

    def trial(world: World, rng: random.Random) -> Outcome:
        source = world.copy_before(stage, processes)
        path = world.folder / "disk" / source.name
        path.parent.mkdir(exist_ok=True)
        used = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
        assert mount(path.parent, used + 100_000 + rng.randrange(600_000))
        try:
            shutil.move(source, path)
            result = run(world.command(stage, path), world.folder, processes)
            kind = f"full disk, {stage}"
            if set(result.codes) != {0} and ("Traceback" in result.output or "No space left on device" not in result.output):
                return Outcome(kind, lost=False, wrong=True, detail=result.output[-2000:])
            restored = Path(shutil.copytree(path, world.folder / f"{path.name}-back"))
        finally:
            unmount(path.parent)
        return world.rerun_and_compare(kind, stage, restored, processes, result)

    return trial


def short_trials() -> list[Trial]:
    """Return one trial of each kind, for every test run."""
    return [
        killed("stage 1"),
        killed("stage 2"),
        killed_at_a_call("stage 2"),
        killed("extraction"),
        damaged_checkpoint("stage 1", "with a bit flipped"),
        damaged_checkpoint("stage 2", "truncated"),
        damaged_input("stage 2", "codes/train/*.safetensors", "with a bit flipped"),
        damaged_input("sampling", "priors/transformer/prior.safetensors", "with a bit flipped"),
        damaged_input("sampling", "tokenizer.safetensors", "with a bit flipped"),
        damaged_vqc("with a bit flipped"),
    ]


def all_trials() -> list[tuple[Trial, int]]:
    """Return all trials with their number in a run of 300."""
    by_one = [stage for stage in STAGES if stage != SHARDS]
    trials: list[tuple[Trial, int]] = [(killed(stage), 14 if stage in RESULTS else 6) for stage in by_one]
    trials += [(killed_at_a_call(stage), 12 if stage in RESULTS else 5) for stage in by_one]
    trials += [(killed(stage, 2), 12 if stage == SHARDS else 5) for stage in RESULTS]
    trials += [(killed_at_a_call(SHARDS, 2), 12)]
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGUSR1):
        trials += [
            (one_of_two(stage, number), 3) for stage in RESULTS if number in (signal.SIGKILL, signal.SIGSTOP) or stage != "extraction"
        ]
    trials += [(late(stage), 2) for stage in RESULTS]
    trials += [(stopped_in_time(stage), 4) for stage in ("stage 1", "stage 2")]
    for how in ("truncated", "with a bit flipped"):
        trials += [(damaged_checkpoint(stage, how), 8) for stage in ("stage 1", "stage 2", SHARDS)]
        trials += [(damaged_input("stage 2", "codes/*/*.safetensors", how), 8)]
        trials += [
            (damaged_input(stage, "tokenizer.safetensors", how), 4) for stage in ("extraction", "stage 2", "sampling", "compression")
        ]
        trials += [(damaged_input(stage, "priors/transformer/prior.safetensors", how), 5) for stage in FOLDERS]
        trials += [(damaged_vqc(how), 8)]
    return trials
