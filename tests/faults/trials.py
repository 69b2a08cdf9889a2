"""What is tried: a command is hit, given again as its user would, and what it leaves compared with what an undisturbed one leaves."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

import stage2_prior.extract_codes
import stage2_prior.train  # noqa: F401, forked from here, commands begin at once
from tests.conftest import TINY, write_pictures
from tests.faults.harness import Blow, Command, Ended, contents, damage, run
from training.stopping import STOPPED_IN_TIME
from training.watch import ENDED_FOR_ANOTHER

RESULTS = {
    "stage 1": ("tokenizer.safetensors", "stage1/report.json"),
    "extraction": ("codes/**/*",),
    "stage 2": ("priors/transformer/prior.safetensors", "priors/transformer/likelihood.json"),
    "stage 2 in shards": ("priors/shards/prior.safetensors", "priors/shards/likelihood.json"),
}
# By more than one process alone.
SHARDS = "stage 2 in shards"
FOLDERS = {"sampling": "samples", "evaluation": "evaluations", "compression": "compressed"}


@dataclass(frozen=True)
class Outcome:
    """Of one trial."""

    kind: str
    lost: bool
    """Whether the work could not be gone on with."""
    wrong: bool
    """Whether it ended with other results."""
    detail: str = ""


class World:
    """An undisturbed run, by one process and by two, and copies of it in which things go wrong."""

    def __init__(self, folder: Path, recipe: Path, processes: tuple[int, ...] = (1, 2)) -> None:
        self.folder, self.recipe = folder, recipe
        self.whole = {count: folder / f"whole{count}" for count in processes}
        self.seconds: dict[tuple[str, int], float] = {}
        self._number = 0
        for count, path in self.whole.items():
            for stage in (*RESULTS, *FOLDERS):
                if (stage in FOLDERS and count > 1) or (stage == SHARDS and count == 1):
                    continue
                ended = run(self.command(stage, path), folder, count)
                assert set(ended.codes) == {0}, f"{stage} by {count}: {ended.said}"
                self.seconds[stage, count] = ended.seconds

    def command(self, stage: str, path: Path) -> Command:
        """As typed, to begin and to go on."""
        here = ["--run", str(path)]
        commands = {
            "stage 1": ["stage1_vqvae.train", "--config", str(self.recipe), *here, "--resume"],
            "extraction": ["stage2_prior.extract_codes", *here],
            "stage 2": ["stage2_prior.train", *here, "--resume"],
            SHARDS: ["stage2_prior.train", *here, "--name", "shards", "--compute.sharded", "true", "--resume"],
            "sampling": ["pipelines.sample", *here, "--n", "12"],
            "evaluation": ["pipelines.evaluate", *here, "--n", "24", "--features", "classifier"],
            "compression": ["pipelines.compress", *here],
        }
        return commands[stage]

    def begun(self, stage: str, processes: int) -> Path:
        """A copy of the undisturbed run as it was before a stage."""
        self._number += 1
        path = self.folder / f"try{self._number}"
        drop = {
            "stage 1": ["*"],
            "extraction": ["codes", "priors", *FOLDERS.values()],
            "stage 2": ["priors", *FOLDERS.values()],
            SHARDS: ["shards", *FOLDERS.values()],
        }.get(stage, [*FOLDERS.values(), "classifier.safetensors", "rotation.safetensors"])
        shutil.copytree(self.whole[processes], path, ignore=shutil.ignore_patterns(*drop))
        return path

    def results(self, stage: str, path: Path) -> dict[str, bytes | str]:
        """What a stage leaves."""
        if stage in RESULTS:
            return contents(path, *RESULTS[stage])
        newest = max((path / FOLDERS[stage]).iterdir(), key=lambda folder: folder.name)
        return contents(newest, "*.json", "*.safetensors", "*.vqc")

    def judge(self, kind: str, stage: str, path: Path, processes: int, ended: Ended) -> Outcome:
        """Give the command again, until it is done, and compare."""
        said = ended.said
        for _ in range(3):
            again = run(self.command(stage, path), self.folder, processes)
            said += again.said
            if set(again.codes) == {0}:
                break
        else:
            return Outcome(kind, lost=True, wrong=False, detail=said[-3000:])
        expected, found = self.results(stage, self.whole[processes]), self.results(stage, path)
        other = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        shutil.rmtree(path)
        return Outcome(kind, lost=False, wrong=bool(other), detail=f"{stage}: {other}\n{said[-2000:]}" if other else "")


def made_world(folder: Path, processes: tuple[int, ...] = (1, 2)) -> World:
    """Of tiny pictures and a tiny recipe."""
    write_pictures(folder / "pictures")
    recipe = folder / "tiny.yaml"
    stage1 = {**TINY["stage1"], "checkpoint_interval": 10, "validation_interval": 20}
    recipe.write_text(yaml.safe_dump({**TINY, "stage1": stage1, "data": {**TINY["data"], "path": str(folder / "pictures")}}))
    return World(folder, recipe, processes)


Trial = Callable[[World, random.Random], Outcome]
STAGES = (*RESULTS, *FOLDERS)


def killed(stage: str, processes: int = 1) -> Trial:
    """At a random moment, all processes."""

    def trial(world: World, draw: random.Random) -> Outcome:
        path = world.begun(stage, processes)
        blow = Blow(seconds=draw.uniform(0, world.seconds[stage, processes]))
        ended = run(world.command(stage, path), world.folder, processes, blow)
        return world.judge(f"SIGKILL at random, {stage}, {processes}", stage, path, processes, ended)

    return trial


def killed_at_a_call(stage: str, processes: int = 1) -> Trial:
    """In the middle of a save: before something is synced, renamed, made or removed; of several processes, by one of them."""

    def trial(world: World, draw: random.Random) -> Outcome:
        path = world.begun(stage, processes)
        blow = Blow(at_call=draw.randint(1, 40), ranks=(draw.randrange(processes),))
        ended = run(world.command(stage, path), world.folder, processes, blow)
        return world.judge(f"SIGKILL in a save or a rename, {stage}", stage, path, processes, ended)

    return trial


def one_of_two(stage: str, number: signal.Signals) -> Trial:
    """Of two processes one is hit: the other ends by itself."""

    def trial(world: World, draw: random.Random) -> Outcome:
        kind = f"{number.name} of one of two, {stage}"
        path = world.begun(stage, 2)
        blow = Blow(seconds=draw.uniform(0.5, world.seconds[stage, 2]), signal=number, ranks=(draw.randrange(2),))
        ended = run(world.command(stage, path), world.folder, 2, blow)
        allowed = {0, -signal.SIGKILL, ENDED_FOR_ANOTHER, 1, 2}
        if number in (signal.SIGTERM, signal.SIGUSR1):
            allowed = {0, 128 + number, -number, ENDED_FOR_ANOTHER, 1}
        assert set(ended.codes) <= allowed, ended
        return world.judge(kind, stage, path, 2, ended)

    return trial


def late(stage: str) -> Trial:
    """Of two processes one begins later."""

    def trial(world: World, draw: random.Random) -> Outcome:
        path = world.begun(stage, 2)
        ended = run(world.command(stage, path), world.folder, 2, Blow(late={draw.randrange(2): draw.uniform(0, 5)}))
        assert set(ended.codes) == {0}, ended.said
        return world.judge(f"one of two is late, {stage}", stage, path, 2, ended)

    return trial


def stopped_in_time(stage: str) -> Trial:
    """By `--stop-after`, again and again."""

    def trial(world: World, draw: random.Random) -> Outcome:
        path = world.begun(stage, 1)
        ended = Ended([])
        for _ in range(2):
            ended = run([*world.command(stage, path), "--stop-after", str(draw.uniform(0.0001, 0.02))], world.folder)
            assert set(ended.codes) <= {0, STOPPED_IN_TIME}, ended.said
        return world.judge(f"--stop-after, {stage}", stage, path, 1, ended)

    return trial


def damaged_checkpoint(stage: str, how: str) -> Trial:
    """The newest checkpoint of a training that was interrupted after its last step."""

    def trial(world: World, draw: random.Random) -> Outcome:
        processes = 2 if stage == SHARDS else 1
        path = world.begun("stage 2" if stage == "stage 1" else "evaluation", processes)
        folder, result = {
            "stage 1": (path / "stage1", path / "tokenizer.safetensors"),
            "stage 2": (path / "priors/transformer", path / "priors/transformer/prior.safetensors"),
            SHARDS: (path / "priors/shards", path / "priors/shards/prior.safetensors"),
        }[stage]
        result.unlink()
        (folder / "report.json").unlink()
        newest = max((folder / "checkpoints").glob("step-*"))
        damage(draw.choice(sorted(newest.iterdir())) if newest.is_dir() else newest, draw, how)
        return world.judge(f"checkpoint {how}, {stage}", stage, path, processes, Ended([]))

    return trial


def damaged_input(stage: str, pattern: str, how: str) -> Trial:
    """A file that a command reads: it is refused by name, or what comes out is what would have; with the file back, all is well."""

    def trial(world: World, draw: random.Random) -> Outcome:
        kind = f"{pattern.rpartition('/')[2]} {how}, {stage}"
        path = world.begun(stage, 1)
        file = draw.choice(sorted(path.glob(pattern)))
        good = file.read_bytes()
        damage(file, draw, how)
        ended = run(world.command(stage, path), world.folder)
        if ended.codes == [0]:
            expected, found = world.results(stage, world.whole[1]), world.results(stage, path)
            if expected != found:
                return Outcome(kind, lost=False, wrong=True, detail=f"{file}: not noticed\n{ended.said[-1000:]}")
        elif ended.codes != [2] or "Traceback" in ended.said:
            return Outcome(kind, lost=False, wrong=True, detail=f"{file}: {ended}")
        file.write_bytes(good)
        return world.judge(kind, stage, path, 1, ended)

    return trial


def damaged_vqc(how: str) -> Trial:
    """A compressed file is refused, whatever bit of it is another."""

    def trial(world: World, draw: random.Random) -> Outcome:
        path = world.begun("evaluation", 1)
        shutil.copytree(world.whole[1] / "compressed", path / "compressed")
        file = next((path / "compressed").rglob("*.vqc"))
        damage(file, draw, how)
        command = ["pipelines.decompress", "--run", str(path), "--file", str(file)]
        ended = run(command, world.folder)
        shutil.rmtree(path)
        kind = f"vqc {how}, decompression"
        wrong = ended.codes != [2] or "Traceback" in ended.said or "error: " not in ended.said
        return Outcome(kind, lost=False, wrong=wrong, detail=ended.said[-1000:] if wrong else "")

    return trial


def full_disk(stage: str, mount: Callable[[Path, int], bool], unmount: Callable[[Path], None]) -> Trial:
    """The run lies on a disk that is full after some kilobytes, and has room again later."""

    processes = 2 if stage == SHARDS else 1

    def trial(world: World, draw: random.Random) -> Outcome:
        source = world.begun(stage, processes)
        path = world.folder / "disk" / source.name
        path.parent.mkdir(exist_ok=True)
        used = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
        assert mount(path.parent, used + 100_000 + draw.randrange(600_000))
        try:
            shutil.move(source, path)
            ended = run(world.command(stage, path), world.folder, processes)
            kind = f"full disk, {stage}"
            if set(ended.codes) != {0} and ("Traceback" in ended.said or "No space left on device" not in ended.said):
                return Outcome(kind, lost=False, wrong=True, detail=ended.said[-2000:])
            back = Path(shutil.copytree(path, world.folder / f"{path.name}-back"))
        finally:
            unmount(path.parent)
        return world.judge(kind, stage, back, processes, ended)

    return trial


def short() -> list[Trial]:
    """One of each sort, for every test run."""
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
    """Each with how often it is tried in a run of 300."""
    by_one = [stage for stage in STAGES if stage != SHARDS]
    found: list[tuple[Trial, int]] = [(killed(stage), 14 if stage in RESULTS else 6) for stage in by_one]
    found += [(killed_at_a_call(stage), 12 if stage in RESULTS else 5) for stage in by_one]
    found += [(killed(stage, 2), 12 if stage == SHARDS else 5) for stage in RESULTS]
    found += [(killed_at_a_call(SHARDS, 2), 12)]
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGUSR1):
        found += [
            (one_of_two(stage, number), 3) for stage in RESULTS if number in (signal.SIGKILL, signal.SIGSTOP) or stage != "extraction"
        ]
    found += [(late(stage), 2) for stage in RESULTS]
    found += [(stopped_in_time(stage), 4) for stage in ("stage 1", "stage 2")]
    for how in ("truncated", "with a bit flipped"):
        found += [(damaged_checkpoint(stage, how), 8) for stage in ("stage 1", "stage 2", SHARDS)]
        found += [(damaged_input("stage 2", "codes/*/*.safetensors", how), 8)]
        found += [(damaged_input(stage, "tokenizer.safetensors", how), 4) for stage in ("extraction", "stage 2", "sampling", "compression")]
        found += [(damaged_input(stage, "priors/transformer/prior.safetensors", how), 5) for stage in FOLDERS]
        found += [(damaged_vqc(how), 8)]
    return found
