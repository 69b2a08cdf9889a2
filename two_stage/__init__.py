"""The whole project as one package, which is how a wheel holds it: `from two_stage import Generator`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.generator import Generator

__all__ = ["Generator"]


def __getattr__(name: str) -> Any:
    # Not before it is asked for: commands that only start others would wait for torch.
    if name == "Generator":
        from pipelines.generator import Generator

        return Generator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
