"""Memory-mapped arrays of npz files agree with numpy; damaged and dangerous files are refused."""

from __future__ import annotations

import io
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from pipelines.evaluation.npz import array_in, names_in

ARRAYS = {
    "arr_0": np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8),
    "mu": np.linspace(-1, 1, 5),
    "sigma": np.asfortranarray(np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)),
    "empty": np.zeros((0, 4, 6, 3), np.uint8),
}


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version, allow_pickle=True)
    return buffer.getvalue()


def zipped(path: Path, content: bytes, comment: bytes = b"") -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("arr_0.npy", content)
        file.comment = comment


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_equal_those_of_numpy(save: Callable[..., None], tmp_path: Path) -> None:
    save(tmp_path / "some.npz", **ARRAYS)
    assert names_in(tmp_path / "some.npz", "--some") == set(ARRAYS)
    for name, array in ARRAYS.items():
        mapped = array_in(tmp_path / "some.npz", name, "--some")
        assert mapped.dtype == array.dtype
        assert np.array_equal(mapped, array)
    mapped = array_in(tmp_path / "some.npz", "arr_0", "--some")
    mapped[:] = 0  # not written to the file
    assert np.array_equal(array_in(tmp_path / "some.npz", "arr_0", "--some"), ARRAYS["arr_0"])


def test_the_second_version_of_the_format_and_a_comment_are_read(tmp_path: Path) -> None:
    zipped(tmp_path / "some.npz", npy(ARRAYS["arr_0"], (2, 0)), b"by somebody")
    assert np.array_equal(array_in(tmp_path / "some.npz", "arr_0", "--some"), ARRAYS["arr_0"])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_array_takes_no_memory(save: Callable[..., None], tmp_path: Path) -> None:
    save(tmp_path / "large.npz", np.zeros((1000, 256, 256, 1), np.uint8))
    tracemalloc.start()
    mapped = array_in(tmp_path / "large.npz", "arr_0", "--some")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mapped.nbytes == 1000 * 256 * 256
    assert peak < 20e6  # a few chunks


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("code from an npz file was run",))


def damaged(kind: str, path: Path) -> None:
    np.savez(path, **ARRAYS)
    content = bytearray(path.read_bytes())
    if kind == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "a changed byte":
        content[content.index(ARRAYS["arr_0"].tobytes()) + 100] ^= 255
        path.write_bytes(content)
    elif kind == "pickled objects":
        zipped(path, npy(np.array([Harmful()], object)))
    elif kind == "a pickle":
        zipped(path, pickle.dumps(Harmful()))
    elif kind == "fewer bytes than its header says":
        zipped(path, npy(ARRAYS["arr_0"])[:-100])
    elif kind == "a header of nonsense":
        zipped(path, npy(ARRAYS["arr_0"]).replace(b"'shape': (7,", b"'shape': (x,"))
    elif kind == "no arr_0":
        np.savez(path, images=ARRAYS["arr_0"])
    elif kind == "an npy":
        path.write_bytes(npy(ARRAYS["arr_0"]))
    elif kind == "nothing":
        path.unlink()


KINDS = ["cut short", "a changed byte", "pickled objects", "a pickle", "fewer bytes than its header says", "a header of nonsense"]


@pytest.mark.parametrize("kind", [*KINDS, "no arr_0", "an npy", "nothing"])
def test_invalid_files_are_refused_and_never_executed(kind: str, tmp_path: Path) -> None:
    damaged(kind, tmp_path / "some.npz")
    with pytest.raises(UserError, match=r"--some .*some\.npz: expected an npz file with arr_0, found: .") as raised:
        array_in(tmp_path / "some.npz", "arr_0", "--some")
    assert "\n" not in str(raised.value)
