"""Run the complete chain: train the tokenizer, extract codes, train the prior, sample, evaluate, report.

    python pipelines/run.py --config configs/digits.yaml
    python pipelines/run.py --config configs/imagefolder.yaml --data.path FOLDER --run mine
    python pipelines/run.py --config configs/imagefolder_cpu.yaml --data.path FOLDER --run mine --minutes 20
    python pipelines/run.py --run mine

Each step is a separate command, which is printed before it starts. Ctrl-C saves; the same command again skips finished steps and resumes
an interrupted one. Dotted options are passed to stage 1, which fixes the run's recipe for all steps; in a run that has started, options
that can no longer change are refused. Those that may still change (compute, evaluation, paths of images, accumulation, intervals) are
passed to every step that takes them.
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

from configs.cli import Command, parse
from configs.data import LOCAL_KEYS
from configs.errors import UserError, run_entry
from configs.recipe_file import DEFAULT_RECIPE, SECTIONS, flattened, load_recipe, recipe_dict
from configs.run_dir import REPOSITORY, RunDir, checkout, read_json, runs_folder, typed
from configs.schema import Stage1, Stage2, condition_from, keys_that_may_change
from pipelines.provenance import contains, describe_weights, model_fingerprints, outputs, significant
from stage1_vqvae.data.splits import TRAIN, VALIDATION
from stage2_prior.priors.prior_file import UNIFORM
from training.batching import most_processes
from training.stopping import STOPPED_IN_TIME, available_signals

_SAMPLES = 64
# Sections of the steps after stage 1.
_LATER = ("extraction", "stage2", "sampling")
# Shares of a budget of minutes. The rest is for extraction, samples, evaluation and report.
_SHARES = {"stage1": 0.4, "stage2": 0.45}
# Windows only has the first two, and no Ctrl-Z.
_SIGNALS = available_signals("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
_SLEEP = available_signals("SIGTSTP")
_INTERRUPTED = (*(128 + number for number in _SIGNALS), STOPPED_IN_TIME)


@dataclass(frozen=True)
class Launch:
    """Number of training processes, one per GPU."""

    devices: int
    """Devices available on this machine, or processes that Accelerate is configured for."""
    processes: int
    """Largest number of processes that divides a step's batch evenly."""
    batch_size: int
    configured: bool
    """Whether `devices` comes from `accelerate config`."""

    @classmethod
    def choose(cls, section: Stage1 | Stage2) -> Launch:
        """Choose the number of processes for a stage on this machine."""
        configured = Path(default_config_file).is_file()
        settings = load_config_from_file(default_config_file) if configured else None
        devices = max(1, torch.accelerator.device_count() if settings is None else settings.num_processes)
        # On several machines the setting counts the processes of all, and must be the same on each.
        one_machine = settings is None or settings.num_machines in (None, 1)
        processes = most_processes(section.batch_size, section.accumulation, devices) if one_machine else devices
        return cls(devices, processes, section.batch_size, configured)

    def program(self) -> list[str]:
        """Return `accelerate launch` as arguments of Python, with its options; nothing where it would only start one process."""
        if self.configured:
            options = [] if self.processes == self.devices else [f"--num_processes={self.processes}"]
        elif self.processes == 1:
            return []  # saves its start, which takes seconds
        else:  # all options, since it prints a line per default that it chooses
            options = f"--multi_gpu --num_processes={self.processes} --num_machines=1 --mixed_precision=no --dynamo_backend=no".split()
        return ["-m", "accelerate.commands.launch", *options]

    def warning(self) -> str | None:
        """Return a warning if some devices stay idle."""
        if self.processes == self.devices:
            return None
        return f"{self.processes} of {self.devices} processes, the most that divide the batch of {self.batch_size} images evenly"


@dataclass(frozen=True)
class Step:
    """One command of the chain, and the check for an output that makes it unnecessary."""

    name: str
    script: str
    """The script's path in the repository."""
    arguments: list[str]
    launched: Launch | None = None
    """Processes that Accelerate launches; None: one process without Accelerate."""
    existing: Callable[[], Path | None] = lambda: None
    """Returns an earlier output that equals the output of this command. Training and extraction always run, since their scripts check
    this themselves."""

    def typed(self) -> str:
        """Return the command as a user would type it in the working directory."""
        return f"{typed(self.script, self.launched is not None)} {shlex.join(self.arguments)}"

    def command_line(self) -> list[str]:
        """Return the arguments that start the step in this environment."""
        program = [] if self.launched is None else self.launched.program()
        # Take the script of the same checkout, so that all steps use the same folder of runs.
        return [sys.executable, *program, str((checkout() or REPOSITORY) / self.script), *self.arguments]


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    argv = with_budgets(sys.argv[1:] if argv is None else argv)
    command = parse(__doc__, tuple(SECTIONS), argv, starts_run=True, training_folder=lambda run, *_: run.stage1, options=_options)
    check_options(command)
    start = time.monotonic()
    for step in steps(command):
        existing = step.existing()
        if existing is not None:
            print(f"{step.name}: {RunDir.show(existing)} is already there", flush=True)
            continue
        print(f"\n$ {step.typed()}", flush=True)
        if step.launched is not None and (warning := step.launched.warning()) is not None:
            print(f"{step.name}: {warning}", flush=True)
        step_start = time.monotonic()
        code = run_to_its_end(step.command_line(), command.run)
        if code != 0:
            message = f"error: {step.name} ended with exit code {code}, for the reason above; finished steps will be skipped"
            if code in _INTERRUPTED:
                message = f"{step.name} was interrupted; go on with the same command"
            print(message, file=sys.stderr, flush=True)
            sys.exit(code)
        print(f"{step.name}: {(time.monotonic() - step_start) / 60:.1f} minutes", flush=True)
    print(f"\n{command.run}: finished in {(time.monotonic() - start) / 60:.1f} minutes")


def _options(parser: Any) -> None:
    shares = f"--stage1.minutes gets {_SHARES['stage1']:.0%} of them, --stage2.minutes {_SHARES['stage2']:.0%}"
    parser.add_argument("--minutes", help=f"time budget of the whole chain: {shares}, the other steps get the rest")


def with_budgets(argv: Sequence[str]) -> list[str]:
    """Replace `--minutes` by the stages' shares of it. Errors: UserError for anything but a number above 0."""
    result: list[str] = []
    rest = iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != "--minutes":
            result.append(argument)
            continue
        value = value if equals else next(rest, "")
        try:
            minutes = float(value)
        except ValueError:
            minutes = 0.0
        if not 0 < minutes < float("inf"):
            raise UserError(f"--minutes: expected a number above 0, found {value or 'none'}")
        result += [f"--{stage}.minutes={share * minutes:g}" for stage, share in _SHARES.items()]
    return result


def check_options(command: Command) -> None:
    """Refuse options without effect. Errors: UserError for a setting that a finished tokenizer fixes, or for a section as one option."""
    run = command.run
    may_change = keys_that_may_change(command.recipe, ("data", "evaluation", "compute", *_LATER))
    for name in (option_key(argument) for argument in command.arguments if argument.startswith("--")):
        section, _, key = name.partition(".")
        if section not in SECTIONS:
            continue
        if not key:
            raise UserError(f"--{name}: expected options of single keys, --{name}.KEY, found the whole section")
        if section in may_change or name in may_change or not run.tokenizer.exists():
            continue
        typed_value, recipe_value = (flattened(recipe_dict(recipe)).get(name) for recipe in (command.recipe, load_recipe(run.recipe)))
        if typed_value != recipe_value:
            expected = f"expected {recipe_value}, the value of the finished tokenizer, on which codes and priors depend"
            raise UserError(
                f"--{name}: {expected}, found {typed_value}; start another run with --run NAME, or use the stages' own commands"
            )


def steps(command: Command) -> list[Step]:
    """Build the chain. A step's `existing` reads the run when it is called, since earlier steps change the run."""
    run = command.run
    run_option = ["--run", run.path.name if run.path.parent == runs_folder() else str(run)]
    started = run.started(run.stage1)
    stage1, later = split_options(command, run_option, started)
    # Stage 1 accepts these although the run's recipe differs, so every step needs them on its command line.
    compute = section_options(command, "compute")
    images = [option for option in section_options(command, "data") if option_key(option).removeprefix("data.") in LOCAL_KEYS]
    data = ["--accept_changed_data"] if command.options.accept_changed_data else []
    extraction, stage2, sampling = ([option for option in later if option.startswith(f"--{section}.")] for section in _LATER)
    evaluation = [f"--{name.removeprefix('--evaluation.')}" for name in section_options(command, "evaluation")]
    recipe = load_recipe(run.recipe) if started else command.recipe
    prior = recipe.prior.kind  # even if another prior of the run was finished later

    def launch(stage: str, path: Path) -> Launch:
        section = getattr(load_recipe(path) if started and path.exists() else recipe, stage)
        typed = any(option_key(option) == f"{stage}.accumulation" for option in section_options(command, stage))
        return Launch.choose(dataclasses.replace(section, accumulation=getattr(command.recipe, stage).accumulation) if typed else section)

    def samples(name: str, prior: str) -> Step:
        options = [f"--{option.removeprefix('--sampling.')}" for option in sampling]
        arguments = [*run_option, "--n", str(_SAMPLES), "--prior", prior, *options, *compute]
        return Step(name, "pipelines/sample.py", arguments, existing=lambda: current_samples(run, prior))

    return [
        Step("stage 1", "stage1_vqvae/train.py", [*stage1, "--resume"], launch("stage1", run.recipe)),
        Step("extraction", "stage2_prior/extract_codes.py", [*run_option, *extraction, *compute, *images, *data]),
        Step(
            "stage 2",
            "stage2_prior/train.py",
            [*run_option, *stage2, *compute, *data, "--resume"],
            launch("stage2", run.prior(prior) / "recipe.yaml"),
        ),
        samples("samples", prior),
        samples("uniform samples", UNIFORM),  # for comparison, without a learned prior
        Step(
            "evaluation",
            "pipelines/evaluate.py",
            [*run_option, "--prior", prior, *evaluation, *sampling, *compute, *images, *data],
            existing=lambda: current_evaluation(run, prior, evaluation_settings(command)),
        ),
        Step("report", "pipelines/report.py", run_option),
    ]


def split_options(command: Command, run_option: list[str], started: bool) -> tuple[list[str], list[str]]:
    """Split the typed options into those of stage 1 and those of later steps.

    In a run that has started, its recipe is fixed, and settings that a later step may still change are for that step only.
    """
    named = command.options.config or command.options.run
    default = run_option if command.run.exists() else ["--config", RunDir.show(DEFAULT_RECIPE)]
    may_change = keys_that_may_change(command.recipe, _LATER) if started else []
    later = [option for option in joined_options(command.arguments) if option_key(option) in may_change]
    arguments = [option for option in joined_options(command.arguments) if option not in later] if later else command.arguments
    return [*([] if named else default), *arguments], later


def joined_options(arguments: Sequence[str]) -> list[str]:
    """Join each option with its value into one --key=value."""
    result: list[str] = []
    for argument in arguments:
        if argument.startswith("--") or not result or "=" in result[-1]:
            result.append(argument)
        else:
            result[-1] += f"={argument}"
    return result


def option_key(option: str) -> str:
    """Return the key of an option --key=value."""
    return option.partition("=")[0].removeprefix("--")


def section_options(command: Command, section: str) -> list[str]:
    """Return the typed options of a section, each as --section.key=value."""
    return [option for option in joined_options(command.arguments) if option.startswith(f"--{section}.")]


def evaluation_settings(command: Command) -> dict[str, Any]:
    """Return the run's section `evaluation` with the typed options."""
    typed = [option_key(option).removeprefix("evaluation.") for option in section_options(command, "evaluation")]
    recipe_settings = dataclasses.asdict(load_recipe(command.run.recipe).evaluation)
    settings = recipe_settings | {key: getattr(command.recipe.evaluation, key) for key in typed}
    return {**settings, "weights": describe_weights(settings["weights"])}


def current_samples(run: RunDir, prior: str) -> Path | None:
    """Find the newest samples that equal what the chain would draw now; None if there are none."""
    sampling = dataclasses.asdict(load_recipe(run.recipe).sampling)
    expected = {"n": _SAMPLES, "seed": 0, **model_fingerprints(run, prior)}
    for path in reversed(outputs(run, "samples", "samples.json")):
        details = read_json(path)
        if not contains(details, expected) or (prior != UNIFORM and not contains(details["sampling"], significant(sampling))):
            continue
        # Not samples of a single class.
        names = condition_from(details["condition"] or {"kind": "none"}).class_names
        if not names or len(set(details["labels"])) == min(_SAMPLES, len(names)):
            return path.parent
    return None


def current_evaluation(run: RunDir, prior: str, settings: dict[str, Any]) -> Path | None:
    """Find the newest evaluation of the run's current models with these settings; None if there is none."""
    sampling = dataclasses.asdict(load_recipe(run.recipe).sampling)
    # Only evaluations that drew their own samples.
    expected = {"drawn": True, "split": VALIDATION, "reference": TRAIN, **model_fingerprints(run, prior)}
    for path in reversed(outputs(run, "evaluations", "evaluation.json")):
        results = read_json(path)
        if not contains(results, expected) or not contains(results.get("evaluation", {}), significant(settings)):
            continue
        if contains(results["sampling"], significant(sampling)):
            return path.parent
    return None


def run_to_its_end(arguments: list[str], run: RunDir) -> int:
    """Run a command with this process's output streams, and return its exit code.

    It runs in its own process group, to which Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 are forwarded as SIGINT, so that they also reach the
    training processes, for which Accelerate's launcher does not wait. These finish their step and save; the exit code is then 128 + the
    signal's number. Ctrl-Z stops all of them, fg and bg continue them. Windows has no process groups, but a console's Ctrl-C reaches all
    of its processes.
    """
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: FrameType | None = None) -> None:
        received.append(number)
        if child is not None and hasattr(os, "killpg"):
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGINT)

    def sleep(*_: object) -> None:
        # Not only the group: torchrun's processes have their own sessions.
        processes: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):  # it may have ended by now
            processes = [] if child is None else [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        os.kill(os.getpid(), signal.SIGSTOP)
        for process in reversed(processes):
            with suppress(psutil.NoSuchProcess):
                process.resume()

    previous_handlers = {number: signal.signal(number, forward) for number in _SIGNALS}
    previous_handlers |= {number: signal.signal(number, sleep) for number in _SLEEP}
    try:
        # A background process group may write to the terminal, but is stopped when it reads.
        group: dict[str, Any] = {"process_group": 0} if hasattr(os, "killpg") else {}
        child = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, **group)
        if received:
            forward(received[0])
        code = child.wait()
        if received:
            wait_for_the_lock(run)
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else code if code >= 0 else 128 - code


def wait_for_the_lock(run: RunDir) -> None:
    """Wait until no process holds the run's lock."""
    while run.path.exists():
        try:
            with run.lock():
                return
        except UserError:
            time.sleep(0.1)


if __name__ == "__main__":
    run_entry(main)
