"""All of it by one command: train, extract, train, sample, evaluate, report.

    python pipelines/run.py --config configs/digits.yaml
    python pipelines/run.py --config configs/imagefolder.yaml --data.path FOLDER --run mine
    python pipelines/run.py --config configs/imagefolder_cpu.yaml --data.path FOLDER --run mine --minutes 20
    python pipelines/run.py --run mine

Each step is a command of its own, printed as one would type it. Typed again, what is finished is skipped and what was
interrupted goes on: Ctrl-C saves. Dotted options are stage 1's, which fixes the run's recipe for all steps, and in a run that
has begun refuses what can no longer change; what still may (compute, evaluation, where images are, accumulation, intervals) reaches all
steps that take it.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file

from configs.cli import DEFAULT_RECIPE, SECTIONS, Command, flattened, load_recipe, parse, recipe_dict
from configs.data import LOCAL_KEYS
from configs.errors import UserError, run_entry
from configs.run_dir import REPOSITORY, RunDir, checkout, read_json, runs_folder, typed
from configs.schema import Stage1, Stage2, keys_that_may_change
from pipelines.images.provenance import agrees, described_weights, identity, outputs, seen
from stage1_vqvae.data.splits import TRAIN, VALIDATION
from stage2_prior.priors.prior_file import UNIFORM
from training.batching import most_processes
from training.stopping import STOPPED_IN_TIME, available_signals

_SAMPLES = 64
# Sections of the steps after stage 1.
_LATER = ("extraction", "stage2", "sampling")
# Of a budget of minutes. The rest is for extraction, samples, evaluation and report.
_SHARES = {"stage1": 0.4, "stage2": 0.45}
# Windows has the first two alone, and no Ctrl-Z.
_SIGNALS = available_signals("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
_SLEEP = available_signals("SIGTSTP")
_INTERRUPTED = (*(128 + number for number in _SIGNALS), STOPPED_IN_TIME)


@dataclass(frozen=True)
class Launch:
    """How many processes train, one a GPU."""

    devices: int
    """Processes that there could be."""
    processes: int
    """The most of them that share a step's batch out evenly."""
    batch_size: int
    configured: bool
    """Whether `accelerate config` has said how many there could be."""

    @classmethod
    def of(cls, section: Stage1 | Stage2) -> Launch:
        """The launch of a stage on this machine."""
        configured = Path(default_config_file).is_file()
        settings = load_config_from_file(default_config_file) if configured else None
        devices = max(1, torch.accelerator.device_count() if settings is None else settings.num_processes)
        # On several machines the number is theirs together: each would have to be told the same.
        one_machine = settings is None or settings.num_machines in (None, 1)
        processes = most_processes(section.batch_size, section.accumulation, devices) if one_machine else devices
        return cls(devices, processes, section.batch_size, configured)

    def options(self) -> list[str]:
        """Options of `accelerate launch`. Where nobody has configured it all are given: otherwise it names each value that it had to
        choose, and seven lines of that would open every training step.
        """
        if self.configured:
            return [] if self.processes == self.devices else [f"--num_processes={self.processes}"]
        several = ["--multi_gpu"] if self.processes > 1 else []
        return [*several, f"--num_processes={self.processes}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]

    def warning(self) -> str | None:
        """Warning if some devices stay idle."""
        if self.processes == self.devices:
            return None
        return f"{self.processes} of {self.devices} processes, the most that divide the batch of {self.batch_size} images evenly"


@dataclass(frozen=True)
class Step:
    """One command of the chain, with what shows that it need not be run."""

    name: str
    script: str
    """The script's path in the repository."""
    arguments: list[str]
    launched: Launch | None = None
    """How Accelerate launches it, on all processes of its configuration; None: one process, without Accelerate."""
    found: Callable[[], Path | None] = lambda: None
    """What an earlier call of it left, if that is just what it would make now. The scripts of training and extraction
    know this themselves: they are always run, and say so."""

    def typed(self) -> str:
        """The command as a user would type it where they stand."""
        return f"{typed(self.script, self.launched is not None)} {shlex.join(self.arguments)}"

    def started(self) -> list[str]:
        """The command line that starts the step in this environment."""
        program = [] if self.launched is None else ["-m", "accelerate.commands.launch", *self.launched.options()]
        # Of this script's own checkout, if there is one: so that all look for runs in one place.
        return [sys.executable, *program, str((checkout() or REPOSITORY) / self.script), *self.arguments]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    argv = with_budgets(sys.argv[1:] if argv is None else argv)
    command = parse(__doc__, tuple(SECTIONS), argv, starts_run=True, begun_in=lambda run, *_: run.stage1, options=_options)
    check_options(command)
    began = time.monotonic()
    for step in steps(command):
        found = step.found()
        if found is not None:
            print(f"{step.name}: {RunDir.show(found)} is already there", flush=True)
            continue
        print(f"\n$ {step.typed()}", flush=True)
        if step.launched is not None and (warning := step.launched.warning()) is not None:
            print(f"{step.name}: {warning}", flush=True)
        step_began = time.monotonic()
        code = run_to_its_end(step.started(), command.run)
        if code != 0:
            what = f"error: {step.name} ended with exit code {code}, for the reason above; what is finished will be skipped"
            if code in _INTERRUPTED:
                what = f"{step.name} was interrupted; go on with the same command"
            print(what, file=sys.stderr, flush=True)
            sys.exit(code)
        print(f"{step.name}: {(time.monotonic() - step_began) / 60:.1f} minutes", flush=True)
    print(f"\n{command.run}: all is done, in {(time.monotonic() - began) / 60:.1f} minutes")


def _options(parser: Any) -> None:
    rest = f"--stage1.minutes gets {_SHARES['stage1']:.0%} of them, --stage2.minutes {_SHARES['stage2']:.0%}"
    parser.add_argument("--minutes", help=f"time budget of the whole chain: {rest}, the other steps have the rest")


def with_budgets(argv: Sequence[str]) -> list[str]:
    """The arguments with the stages' shares of `--minutes` in its place. Errors: UserError for anything but a number above 0."""
    found: list[str] = []
    left = iter(argv)
    for argument in left:
        name, equals, value = argument.partition("=")
        if name != "--minutes":
            found.append(argument)
            continue
        value = value if equals else next(left, "")
        try:
            minutes = float(value)
        except ValueError:
            minutes = 0.0
        if not 0 < minutes < float("inf"):
            raise UserError(f"--minutes: expected a number above 0, found {value or 'none'}")
        found += [f"--{stage}.minutes={share * minutes:g}" for stage, share in _SHARES.items()]
    return found


def check_options(command: Command) -> None:
    """Errors: UserError for an option that no step would heed: of a finished tokenizer's recipe, or not of one key."""
    run = command.run
    may_change = keys_that_may_change(command.recipe, ("data", "evaluation", "compute", *_LATER))
    for name in (key_of(argument) for argument in command.arguments if argument.startswith("--")):
        section, _, key = name.partition(".")
        if section not in SECTIONS:
            continue
        if not key:
            raise UserError(f"--{name}: expected options of single keys, --{name}.KEY, found the whole section")
        if section in may_change or name in may_change or not run.tokenizer.exists():
            continue
        asked, there = (flattened(recipe_dict(recipe)).get(name) for recipe in (command.recipe, load_recipe(run.recipe)))
        if asked != there:
            wanted = f"expected {there}, with which this run's tokenizer was finished and which codes and priors depend on"
            raise UserError(f"--{name}: {wanted}, found {asked}; begin another run with --run NAME, or use the stages' own commands")


def steps(command: Command) -> list[Step]:
    """The chain. A step's `found` looks at the run when it is asked, since the steps before it change the run."""
    run = command.run
    here = ["--run", run.path.name if run.path.parent == runs_folder() else str(run)]
    named = command.options.config or command.options.run
    default = here if run.exists() else ["--config", RunDir.show(DEFAULT_RECIPE)]
    begun = run.begun(run.stage1)
    # Of a recipe that is fixed, what a later step may change all the same is that step's.
    may_change = keys_that_may_change(command.recipe, _LATER) if begun else []
    later = [option for option in singles(command.arguments) if key_of(option) in may_change]
    arguments = [option for option in singles(command.arguments) if option not in later] if later else command.arguments
    begins = [*([] if named else default), *arguments]
    # Stage 1 takes these even where the run's recipe says otherwise, so that they have to be handed on.
    compute = options_of(command, "compute")
    images = [option for option in options_of(command, "data") if key_of(option).removeprefix("data.") in LOCAL_KEYS]
    data = ["--accept_changed_data"] if command.options.accept_changed_data else []
    extraction, stage2, sampling = ([option for option in later if option.startswith(f"--{section}.")] for section in _LATER)
    drawing = [f"--{option.removeprefix('--sampling.')}" for option in sampling]
    evaluation = [f"--{name.removeprefix('--evaluation.')}" for name in options_of(command, "evaluation")]
    recipe = load_recipe(run.recipe) if begun else command.recipe
    prior = recipe.prior.kind  # even if another one of the run was finished later
    drawn = ["--n", str(_SAMPLES), "--prior"]

    def launch(stage: str, path: Path) -> Launch:
        section = getattr(load_recipe(path) if begun and path.exists() else recipe, stage)
        typed = any(key_of(option) == f"{stage}.accumulation" for option in options_of(command, stage))
        return Launch.of(dataclasses.replace(section, accumulation=getattr(command.recipe, stage).accumulation) if typed else section)

    return [
        Step("stage 1", "stage1_vqvae/train.py", [*begins, "--resume"], launch("stage1", run.recipe)),
        Step("extraction", "stage2_prior/extract_codes.py", [*here, *extraction, *compute, *images, *data]),
        Step(
            "stage 2",
            "stage2_prior/train.py",
            [*here, *stage2, *compute, *data, "--resume"],
            launch("stage2", run.prior(prior) / "recipe.yaml"),
        ),
        Step("samples", "pipelines/sample.py", [*here, *drawn, prior, *drawing, *compute], found=lambda: samples_of(run, prior)),
        # Beside the others, what they would be without a learned prior.
        Step(
            "uniform samples", "pipelines/sample.py", [*here, *drawn, UNIFORM, *drawing, *compute], found=lambda: samples_of(run, UNIFORM)
        ),
        Step(
            "evaluation",
            "pipelines/evaluate.py",
            [*here, "--prior", prior, *evaluation, *sampling, *compute, *images, *data],
            found=lambda: evaluation_of(run, prior, asked_evaluation(command)),
        ),
        Step("report", "pipelines/report.py", here),
    ]


def singles(arguments: Sequence[str]) -> list[str]:
    """Arguments, each option with its value as one --key=value."""
    found: list[str] = []
    for argument in arguments:
        if argument.startswith("--") or not found or "=" in found[-1]:
            found.append(argument)
        else:
            found[-1] += f"={argument}"
    return found


def key_of(option: str) -> str:
    """The key of an option --key=value."""
    return option.partition("=")[0].removeprefix("--")


def options_of(command: Command, section: str) -> list[str]:
    """The typed options of a section, each as one argument --section.key=value."""
    return [option for option in singles(command.arguments) if option.startswith(f"--{section}.")]


def asked_evaluation(command: Command) -> dict[str, Any]:
    """The run's section `evaluation`, with what was typed."""
    typed = [key_of(option).removeprefix("evaluation.") for option in options_of(command, "evaluation")]
    own = dataclasses.asdict(load_recipe(command.run.recipe).evaluation)
    asked = own | {key: getattr(command.recipe.evaluation, key) for key in typed}
    return {**asked, "weights": described_weights(asked["weights"])}


def samples_of(run: RunDir, prior: str) -> Path | None:
    """The newest samples that are just what the chain would draw now; None if there are none."""
    sampling = dataclasses.asdict(load_recipe(run.recipe).sampling)
    wanted = {"n": _SAMPLES, "seed": 0, **identity(run, prior)}
    for path in reversed(outputs(run, "samples", "samples.json")):
        found = read_json(path)
        if not agrees(found, wanted) or (prior != UNIFORM and not agrees(found["sampling"], seen(sampling))):
            continue
        # Not of one label alone.
        if found["labels"] is None or len(set(found["labels"])) == min(_SAMPLES, len(found["label_names"])):
            return path.parent
    return None


def evaluation_of(run: RunDir, prior: str, asked: dict[str, Any]) -> Path | None:
    """The newest evaluation of what the run holds now, as asked for; None if there is none."""
    sampling = dataclasses.asdict(load_recipe(run.recipe).sampling)
    # Of samples that it drew itself, and not of others that were handed in.
    wanted = {"drawn": True, "split": VALIDATION, "reference": TRAIN, **identity(run, prior)}
    for path in reversed(outputs(run, "evaluations", "evaluation.json")):
        found = read_json(path)
        if not agrees(found, wanted) or not agrees(found.get("evaluation", {}), seen(asked)):
            continue
        if agrees(found["sampling"], seen(sampling)):
            return path.parent
    return None


def run_to_its_end(arguments: list[str], run: RunDir) -> int:
    """Run a command, its output where ours goes, and return its exit code.

    It runs in a process group of its own, to which Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 are passed on, as SIGINT: so they reach the
    training processes too, which Accelerate's launcher does not wait for. They finish their step and save; then we end with
    128 + the signal's number. Ctrl-Z stops them all, and whoever wakes us (fg, bg) wakes them. On Windows there are no such groups:
    a console's Ctrl-C reaches all of its processes by itself.
    """
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: FrameType | None = None) -> None:
        asked.append(number)
        if child is not None and hasattr(os, "killpg"):
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGINT)

    def sleep(*_: object) -> None:
        # Not their group alone: torchrun's processes have sessions of their own.
        below: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):  # it may just have ended
            below = [] if child is None else [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        os.kill(os.getpid(), signal.SIGSTOP)
        for process in reversed(below):
            with suppress(psutil.NoSuchProcess):
                process.resume()

    former = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    former |= {number: signal.signal(number, sleep) for number in _SLEEP}
    try:
        # A group in the terminal's background may write, but would be stopped for reading.
        group: dict[str, Any] = {"process_group": 0} if hasattr(os, "killpg") else {}
        child = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, **group)
        if asked:
            pass_on(asked[0])
        code = child.wait()
        if asked:
            wait_for_the_lock(run)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    return 128 + asked[0] if asked else code if code >= 0 else 128 - code


def wait_for_the_lock(run: RunDir) -> None:
    """Until nobody writes into the run any more."""
    while run.path.exists():
        try:
            with run.lock():
                return
        except UserError:
            time.sleep(0.1)


if __name__ == "__main__":
    run_entry(main)
