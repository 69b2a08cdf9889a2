"""Endings of image files; formats that Pillow reads only with another package."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable

from PIL import Image

_NOT_ONE_IMAGE = ("HDF5", "MPEG", "PDF")  # formats that Pillow registers whose files hold no image or many
_HEIF, _AVIF, _JXL = ("pillow_heif", "pillow-heif"), ("pillow_avif", "pillow-avif-plugin"), ("pillow_jxl", "pillow-jxl-plugin")
_PLUGINS = {".heic": _HEIF, ".heif": _HEIF, ".hif": _HEIF, ".avif": _AVIF, ".jxl": _JXL}
"""Module of the Pillow plugin and its package, per ending; newer versions of Pillow read AVIF without one."""


def ending_of(name: str) -> str:
    """Return the ending of a file's name, lower-case, with its dot."""
    return os.path.splitext(name)[1].lower()


def image_endings(endings: Iterable[str]) -> frozenset[str]:
    """Return the endings of images that Pillow can read, and register the installed plugins that they need."""
    return frozenset(ending for ending in endings if _is_read(ending) or (_register(ending) and _is_read(ending)))


def register_for(path: str | None) -> None:
    """Register the plugin that a file's format needs, if it is installed."""
    if path is not None and (ending := ending_of(path)) in _PLUGINS and not _is_read(ending):
        _register(ending)


def package_for(ending: str) -> str | None:
    """Return the package to install for files of that ending; None: no package is known or needed."""
    return _PLUGINS[ending][1] if ending in _PLUGINS and not _is_read(ending) else None


def _is_read(ending: str) -> bool:
    kind = Image.registered_extensions().get(ending)
    return kind in Image.OPEN and kind not in _NOT_ONE_IMAGE


def _register(ending: str) -> bool:
    if ending not in _PLUGINS:
        return False
    try:
        module = importlib.import_module(_PLUGINS[ending][0])
    except (ImportError, OSError):  # not installed, or without the library that it wraps
        return False
    getattr(module, "register_heif_opener", lambda: None)()  # the other packages register as they are imported
    return True
