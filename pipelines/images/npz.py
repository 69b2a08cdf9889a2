"""Arrays in npz files, mapped into memory rather than read: tens of thousands of images take up none of it.

What lies compressed in the file is unpacked, piece by piece, into a temporary one.
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

_PIECE = 2**22
# Of the header that stands before a member of a zip file: its length, and where in it two numbers of bytes stand that come after it.
_LOCAL_HEADER, _LENGTHS = 30, slice(26, 30)


def names_in(path: Path, option: str) -> set[str]:
    """Names of the arrays in an npz file; `option` is what named it, for messages. Errors: UserError for another file."""
    try:
        with ZipFile(path) as content:
            return {name.removesuffix(".npy") for name in content.namelist()}
    except Exception as error:  # of many kinds: the file system's, zip's
        raise UserError(f"{option} {path}: expected an npz file, found: {error}") from None


def array_in(path: Path, name: str, option: str) -> np.ndarray:
    """One array of an npz file, mapped; what is written to it is not written to the file.

    The file is read through once, so that a damaged one is found out here. Errors: UserError for what is no npz file, has no such array,
    or one of pickled objects, which are never unpickled; `option` is what named the file.
    """
    try:
        return _mapped(path, name)
    except Exception as error:  # of many kinds: the file system's, zip's, zlib's, numpy's
        found = f"no {name}.npy in it" if isinstance(error, KeyError) else error
        raise UserError(f"{option} {path}: expected an npz file with {name}, found: {found}") from None


def _mapped(path: Path, name: str) -> np.ndarray:
    with ZipFile(path) as content:
        info = content.getinfo(f"{name}.npy")
        with content.open(info) as member:
            shape, fortran, dtype = _npy_header(member)
            if dtype.hasobject:
                raise ValueError(f"{name} of pickled objects")
            begin = member.tell()
            size = math.prod(shape) * dtype.itemsize
            if begin + size != info.file_size:
                raise ValueError(f"{info.file_size - begin} bytes of {name}, where {dtype} {shape} takes {size}")
            if size == 0:
                return np.empty(shape, dtype)
            order: Literal["F", "C"] = "F" if fortran else "C"
            # Both read to the member's end, where zipfile compares the checksum.
            if info.compress_type != ZIP_STORED:
                with tempfile.TemporaryFile() as unpacked:
                    shutil.copyfileobj(member, unpacked, _PIECE)
                    return np.memmap(unpacked, dtype, "c", 0, shape, order)  # goes on when the file is closed
            while member.read(_PIECE):
                pass
    return np.memmap(path, dtype, "c", _data_offset(path, info) + begin, shape, order)


def _npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and type."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(member)
    raise ValueError(f"an array in version {version} of numpy's format")


def _data_offset(path: Path, info: ZipInfo) -> int:
    """Where in a zip file a member's bytes begin."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        name, extra = struct.unpack("<HH", file.read(_LOCAL_HEADER)[_LENGTHS])
    return info.header_offset + _LOCAL_HEADER + name + extra
