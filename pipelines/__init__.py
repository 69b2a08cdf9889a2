"""Pipelines over both stages: `Generator`, and scripts that only tests import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.generator import Generator

__all__ = ["Generator"]


def __getattr__(name: str) -> Any:
    # Imported on first use: scripts that only start others need no torch.
    if name == "Generator":
        from pipelines.generator import Generator

        return Generator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
