"""What people came for, over both stages: `Generator`, and scripts, imported by nobody but tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.generator import Generator

__all__ = ["Generator"]


def __getattr__(name: str) -> Any:
    # Not before it is asked for: scripts that only start others would wait for torch.
    if name == "Generator":
        from pipelines.generator import Generator

        return Generator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
