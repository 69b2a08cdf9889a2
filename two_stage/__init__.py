"""The whole project as one package, which is how a wheel holds it: `from two_stage import Generator`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines import __getattr__ as __getattr__  # imports Generator on first use

if TYPE_CHECKING:
    from pipelines.generator import Generator

__all__ = ["Generator"]
