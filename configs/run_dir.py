"""The folder of a run: its paths, history and lock; atomic writes.

runs/NAME/
  recipe.yaml            the resolved recipe of stage 1, which fixes the run
  data.json              record of the data of stage 1: images per class and split, and fingerprints
  history.jsonl          one line per command: arguments, resolved settings, versions, time
  tokenizer.safetensors  stage 1's result, its config in the header
  stage1/                metrics.jsonl, report.json, codebook.json, checkpoints, pictures
  codes/SPLIT/           manifest.json and the codes; codes.unfinished/ during extraction
  priors/NAME/           prior.safetensors, metrics.jsonl, report.json, recipe.yaml, data.json, checkpoints, pictures
  samples/NNN/           grid.png, images, codes, samples.json; likewise completions, evaluations, compressed and
                         the outputs of other pipelines
  classifier.safetensors, rotation.safetensors   feature networks trained for evaluation
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from filelock import FileLock, Timeout

from configs.errors import UserError, require_text

ROOT = __name__.removesuffix("configs.run_dir")
"""Prefix of the packages' names: empty in a checkout; `two_stage.` in a wheel, where they are subpackages of one package."""
COMMANDS = {
    "stage1_vqvae/train.py": "train-tokenizer",
    "stage1_vqvae/doctor.py": "doctor",
    "stage1_vqvae/import_tokenizer.py": "import-tokenizer",
    "stage1_vqvae/export_tokenizer.py": "export-tokenizer",
    "stage2_prior/extract_codes.py": "extract-codes",
    "stage2_prior/train.py": "train-prior",
    "stage2_prior/report.py": "likelihood",
    "stage2_prior/export_codes.py": "export-codes",
    "stage2_prior/import_codes.py": "import-codes",
    "pipelines/run.py": "run",
    "pipelines/sample.py": "sample",
    "pipelines/complete.py": "complete",
    "pipelines/evaluate.py": "evaluate",
    "pipelines/reconstruct.py": "reconstruct",
    "pipelines/anomalies.py": "anomalies",
    "pipelines/compress.py": "compress",
    "pipelines/decompress.py": "decompress",
    "pipelines/report.py": "report",
    "pipelines/summary.py": "summary",
    "pipelines/publish.py": "publish",
    "pipelines/app.py": "app",
    "pipelines/export_onnx.py": "export-onnx",
    "pipelines/export_web.py": "export-web",
}
"""Console command per script, after `two-stage-`."""
REPOSITORY = Path(__file__).resolve().parent.parent
"""Folder of the packages: the checkout, or, if they were installed without `-e`, site-packages."""
BUNDLE = "config.json"
"""Name of the file that marks a run as written by pipelines/publish.py."""
_LOCK = ".lock"
_SUM = "sha256 of the rest"
_VERSIONS_OF = ("torch", "torchvision", "accelerate", "datasets", "safetensors", "numpy")


def checkout() -> Path | None:
    """Return the checkout of the packages or of the running script; None: there is none."""
    for root in (REPOSITORY, Path(sys.argv[0]).resolve().parent.parent):
        if (root / "pyproject.toml").is_file() and (root / "configs" / "run_dir.py").is_file():
            return root
    return None


def runs_folder() -> Path:
    """Return the folder of named runs: `runs/` in the checkout, otherwise in the working directory."""
    return (checkout() or Path.cwd()) / "runs"


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block succeeds: even after a crash, `path` is the complete old file or the new one.

    `durable`: wait for the disk, so that this also holds after a power failure.

    Errors: OSError with the file's name (no space, no permission); the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is cut: with a suffix it may be longer than a file system allows.
    temporary = path.with_name(f"{path.name[:40]}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            # ENOSPC from write() carries no name; the user needs to know which disk is full.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a file atomically. Errors: as `replacing`."""
    with replacing(path, durable) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically; undecodable bytes of file names are escaped, as in `\\udce4`."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def append_json_line(path: Path, content: Any) -> None:
    """Append one line of JSON to a file, with the same line end on every system."""
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(content) + "\n")


def write_yaml(path: Path, content: Any) -> None:
    """Write YAML, atomically, in the order of its keys."""
    write_text(path, yaml.safe_dump(content, sort_keys=False))


def read_yaml(path: Path) -> Any:
    """Read YAML. Errors: UserError naming the file, if it is missing, empty or not YAML, or repeats a key."""
    try:
        loader = yaml.SafeLoader(path.read_bytes())
        node = loader.get_single_node()
        if node is None:
            raise UserError(f"{path}: expected a recipe (a YAML file), found an empty file")
        _refuse_repeated_keys(path, node, "", set())
        return loader.construct_document(node)
    except OSError:
        raise UserError(f"{path}: expected a recipe (a YAML file), found no readable file") from None
    except (yaml.YAMLError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{path}: expected YAML, found {error}") from None


def _refuse_repeated_keys(path: Path, node: yaml.Node, prefix: str, visited: set[int]) -> None:
    """Errors: UserError for the first repeated key, dotted, with both lines."""
    if id(node) in visited or not isinstance(node, yaml.CollectionNode):  # an anchor's aliases share a node
        return
    visited.add(id(node))
    if not isinstance(node, yaml.MappingNode):
        for child in node.value:
            _refuse_repeated_keys(path, child, prefix, visited)
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in lines:
            where = f"twice in line {line}" if line == lines[name] else f"in lines {lines[name]} and {line}"
            raise UserError(f"{path}: expected each key once, found {name} {where}")
        lines[name] = line
        _refuse_repeated_keys(path, value, f"{name}.", visited)


def read_json(path: Path) -> Any:
    """Read JSON. Errors: UserError naming the file, if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: expected a JSON file, found nothing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected JSON, found {error}") from None


def write_summed_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that contains its own sha256, atomically."""
    write_json(path, {**content, _SUM: _sum_of(content)})


def read_summed_json(path: Path) -> dict[str, Any]:
    """Read a file of `write_summed_json`. Errors: as `read_json`; UserError if its sha256 is missing or differs."""
    content = read_json(path)
    written = content.pop(_SUM, None) if isinstance(content, dict) else None
    if written != _sum_of(content):
        raise UserError(f"{path}: expected JSON as it was written, found content that its sha256 does not match")
    return dict(content)


def _sum_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def natural(name: str | Path) -> list[tuple[int, str]]:
    """Return a sorting key that compares numbers in names as numbers: `run2` before `run10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(name))]


def unused_path(option: str, typed: str) -> Path:
    """Return the path that an option names, for `new_folder`. Errors: UserError if it exists."""
    path = Path(typed).expanduser()
    if path.exists():
        raise UserError(f"--{option} {path}: expected a folder that does not exist yet, found one")
    return path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder that is renamed to `path` when the block succeeds, and deleted when it fails.

    Errors: OSError with the name, if `path` has been created meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{path.name[:40]}.tmp-", dir=path.parent))
    temporary.chmod(0o755)  # readable by others, like any folder
    try:
        yield temporary
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(path: Path, replacement: Path) -> None:
    """Replace the folder `path` by another folder beside it.

    The caller holds the run's lock, so leftovers of killed commands may be deleted.
    """
    for leftover in path.parent.glob(f"{path.name}.old-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    outgoing = path.with_name(f"{path.name}.old-{os.getpid()}")
    if path.exists():
        os.rename(path, outgoing)
    os.rename(replacement, path)
    shutil.rmtree(outgoing, ignore_errors=True)


class RunDir:
    """Paths of a run; it does not read the files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.data = path / "data.json"
        self.history = path / "history.jsonl"
        self.tokenizer = path / "tokenizer.safetensors"
        self.stage1 = path / "stage1"
        self.codebook_health = self.stage1 / "codebook.json"
        self.codes = path / "codes"
        self.unfinished_codes = path / "codes.unfinished"
        self.priors = path / "priors"
        self.samples = path / "samples"
        self.evaluations = path / "evaluations"

    def __str__(self) -> str:
        """Return the path as a user would type it: relative to the working directory if it is inside."""
        return self.show(self.path)

    @staticmethod
    def show(path: Path) -> str:
        """Return a path for messages: relative to the working directory if it is inside."""
        resolved = path.resolve()
        if not resolved.is_relative_to(Path.cwd()):
            return str(path)
        shown = str(resolved.relative_to(Path.cwd()))
        # A bare name would mean a run in `runs/`.
        return shown if _has_separator(shown) else os.path.join(".", shown)

    @classmethod
    def named(cls, run: str) -> RunDir:
        """Return the run with this name in `runs_folder`, or at this path if it has a separator. Errors: UserError for an empty text."""
        require_text("--run", run)
        is_path = _has_separator(run) or run in (".", "..") or run.startswith("~")
        return cls(Path(run).expanduser() if is_path else runs_folder() / run)

    @classmethod
    def last_touched(cls) -> RunDir | None:
        """Return the run in `runs_folder` that was used last; None: there is none."""
        runs = [cls(recipe.parent) for recipe in runs_folder().glob("*/recipe.yaml")]
        return max(runs, key=RunDir._touched, default=None)

    def _touched(self) -> float:
        return (self.history if self.history.exists() else self.recipe).stat().st_mtime

    def exists(self) -> bool:
        """Return whether the run exists. Errors: UserError if something else is at its path."""
        if self.recipe.is_file():
            return True
        nothing = {self.path / _LOCK, *self._unfinished_recipes()}
        if self.path.exists() and (not self.path.is_dir() or set(self.path.iterdir()) - nothing):
            raise UserError(f"{self}: expected a run (a folder with recipe.yaml) or nothing, found something else")
        return False

    def _unfinished_recipes(self) -> list[Path]:
        """Return temporary files of a first command that was killed while it wrote the recipe."""
        return list(self.path.glob(f"{self.recipe.name}.tmp-*"))

    @staticmethod
    def started(folder: Path) -> bool:
        """Return whether a training folder (stage 1's or a prior's) has a checkpoint or a result."""
        return (folder / "report.json").exists() or RunDir.has_checkpoint(folder)

    @staticmethod
    def has_checkpoint(folder: Path) -> bool:
        """Return whether a training folder has a checkpoint."""
        return any(path.suffix in (".pt", ".shards") for path in (folder / "checkpoints").glob("step-*"))

    def prior(self, name: str) -> Path:
        """Return the folder of a prior."""
        return self.priors / name

    def finished_priors(self) -> list[str]:
        """Return the names of the finished priors."""
        return sorted((path.parent.name for path in self.priors.glob("*/prior.safetensors")), key=natural)

    def last_prior(self) -> str | None:
        """Return the name of the prior that was finished last; None: there is none."""
        finished = self.priors.glob("*/prior.safetensors")
        newest = max(finished, key=lambda path: path.stat().st_mtime, default=None)
        return newest.parent.name if newest else None

    @contextmanager
    def numbered(self, kind: str, create: bool = True) -> Iterator[Path | None]:
        """Create the folder `kind`/NNN with the next free number for the outputs of one command; it is deleted if the block fails.

        `create`: False gives None, as on all ranks but the main one.
        """
        if not create:
            yield None
            return
        folder = self._next_number(self.path / kind)
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder)
            with suppress(OSError):  # other outputs are in it
                folder.parent.rmdir()
            raise

    @staticmethod
    def _next_number(parent: Path) -> Path:
        parent.mkdir(parents=True, exist_ok=True)
        number = max((int(path.name) for path in parent.iterdir() if path.name.isdigit()), default=-1) + 1
        while True:
            path = parent / f"{number:03d}"
            try:
                path.mkdir(parents=True)  # a failed command may just have deleted the empty parent
                return path
            except FileExistsError:  # taken by another command meanwhile
                number += 1

    def record(self, command: str, arguments: list[str], resolved: dict[str, Any]) -> None:
        """Append a command to the history, with its arguments, resolved recipe, versions and machine."""
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "arguments": arguments,
            "resolved": resolved,
            "commit": _commit(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": {name: metadata.version(name) for name in _VERSIONS_OF},
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
        }
        self.path.mkdir(parents=True, exist_ok=True)
        append_json_line(self.history, entry)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run's lock, on rank 0, while a command writes into it. Errors: UserError if another command holds it."""
        if os.environ.get("RANK", "0") != "0":
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / _LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(f"{self}: another command is writing into this run; wait for it, or name another with --run") from None
        try:
            for part in self._unfinished_recipes():
                part.unlink()
            yield
        finally:
            lock.release()


def _has_separator(path: str) -> bool:
    return any(separator in path for separator in (os.sep, os.altsep) if separator is not None)


def _commit() -> str | None:
    """Return the checkout's commit, marked if files differ from it; None outside git."""
    root = checkout()
    if root is None:  # site-packages may lie in an unrelated repository
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def program() -> str:
    """Return the running script's path in the checkout, or among the packages."""
    script = Path(sys.argv[0]).resolve()
    root = next((root for root in (checkout(), REPOSITORY) if root is not None and script.is_relative_to(root)), script.parent)
    return script.relative_to(root).as_posix()


def typed(script: str, launched: bool = False) -> str:
    """Return the command that runs a script (its path in the repository): its path in a checkout, otherwise the installed command.

    `launched`: by Accelerate.
    """
    root = checkout()
    if root is not None:
        return f"{'accelerate launch' if launched else 'python'} {shlex.quote(RunDir.show(root / script))}"
    module = ROOT + script.removesuffix(".py").replace("/", ".")
    return f"accelerate launch -m {module}" if launched else f"two-stage-{COMMANDS[script]}"
