"""Memory-mapped arrays of npz files: tens of thousands of images take up no memory.

Compressed arrays are unpacked in chunks into a temporary file.
"""

from __future__ import annotations

import math
import shutil
import struct
import tempfile
from pathlib import Path
from typing import IO, Any, Literal
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np

from configs.errors import UserError

_CHUNK = 2**22  # bytes
# A zip member's local header: its size, and where the lengths of name and extra field are.
_LOCAL_HEADER, _LENGTHS = 30, slice(26, 30)


def names_in(path: Path, option: str) -> set[str]:
    """List the arrays in an npz file. `option`: option that names the file, for messages. Errors: UserError if it is no npz file."""
    try:
        with ZipFile(path) as content:
            return {name.removesuffix(".npy") for name in content.namelist()}
    except Exception as error:  # many kinds: of the file system, of zipfile
        raise UserError(f"{option} {path}: expected an npz file, found: {error}") from None


def array_in(path: Path, name: str, option: str) -> np.ndarray:
    """Map one array of an npz file, copy-on-write. `option`: as in `names_in`.

    The array is read through once to verify its checksum.
    Errors: UserError if the file is damaged or no npz file, or if the array is missing or one of pickled objects, never unpickled.
    """
    try:
        return _mapped(path, name)
    except Exception as error:  # many kinds: of the file system, zipfile, zlib, numpy
        reason = f"no {name}.npy in it" if isinstance(error, KeyError) else error
        raise UserError(f"{option} {path}: expected an npz file with {name}, found: {reason}") from None


def _mapped(path: Path, name: str) -> np.ndarray:
    with ZipFile(path) as content:
        info = content.getinfo(f"{name}.npy")
        with content.open(info) as member:
            shape, fortran, dtype = _npy_header(member)
            if dtype.hasobject:
                raise ValueError(f"{name} of pickled objects")
            start = member.tell()
            size = math.prod(shape) * dtype.itemsize
            if start + size != info.file_size:
                raise ValueError(f"{info.file_size - start} bytes of {name}, where {dtype} {shape} takes {size}")
            if size == 0:
                return np.empty(shape, dtype)
            order: Literal["F", "C"] = "F" if fortran else "C"
            # Both branches read to the member's end, where zipfile verifies the checksum.
            if info.compress_type != ZIP_STORED:
                if size > (free := shutil.disk_usage(tempfile.gettempdir()).free):
                    raise ValueError(f"{size:,} bytes of {name} when unpacked, with {free:,} free in {tempfile.gettempdir()}")
                with tempfile.TemporaryFile() as unpacked:
                    shutil.copyfileobj(member, unpacked, _CHUNK)
                    return np.memmap(unpacked, dtype, "c", 0, shape, order)  # the mapping outlives the closed file
            while member.read(_CHUNK):
                pass
    return np.memmap(path, dtype, "c", _data_offset(path, info) + start, shape, order)


def _npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the shape, Fortran order and dtype."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(member)
    raise ValueError(f"an array in version {version} of numpy's format")


def _data_offset(path: Path, info: ZipInfo) -> int:
    """Compute the offset of a member's data in a zip file."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        name, extra = struct.unpack("<HH", file.read(_LOCAL_HEADER)[_LENGTHS])
    return info.header_offset + _LOCAL_HEADER + name + extra
