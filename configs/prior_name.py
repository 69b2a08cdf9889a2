"""Names of a run's priors, and their folders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.run_dir import RunDir

UNIFORM = "uniform"
"""Name of the prior under which all codes are equally likely; it has no file."""
LEVELWISE = "levelwise"
"""Default name of priors that are trained level by level."""


@dataclass(frozen=True)
class PriorName:
    """The name of a prior in its run. Errors: UserError for a name that cannot name a folder."""

    name: str
    level: int | None = None
    """The one level of codes that the prior models, 1 for the coarsest; None: all levels."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name) or self.name == UNIFORM:
            raise UserError(f"--name: expected letters, digits, '_', '-' and '.', and not {UNIFORM}, found {self.name}")

    @classmethod
    def from_options(cls, name: str | None, level: int | None, kind: str) -> PriorName:
        """Return the name that `--name` and `--level` choose; the default is the prior's kind."""
        return cls(name or (kind if level is None else LEVELWISE), level)

    def __str__(self) -> str:
        """The path below `priors/`."""
        return self.name if self.level is None else f"{self.name}/level{self.level}"

    @property
    def index(self) -> int | None:
        """The level counted from 0; None: all levels."""
        return None if self.level is None else self.level - 1

    def options(self) -> str:
        """Return the options that choose this prior."""
        return f"--name {self.name}" + ("" if self.level is None else f" --level {self.level}")

    def at_level(self, level: int | None) -> PriorName:
        """Return the name of the prior of one level under the same name; None: the prior of all levels."""
        return PriorName(self.name, level)

    def folder(self, run: RunDir) -> Path:
        """Return the prior's folder."""
        return run.prior(str(self))

    def check_free(self, run: RunDir) -> None:
        """Errors: UserError if priors of single levels and a prior of all levels would share the name in the run."""
        folder = self.at_level(None).folder(run)
        if self.level is not None and (folder / "recipe.yaml").exists():
            raise UserError(f"--name {self.name}: expected a name for priors of single levels, found that of a prior of all levels")
        if self.level is None and any(folder.glob("level*")):
            raise UserError(f"--name {self.name}: expected a name for a prior of all levels, found that of priors of single levels")
