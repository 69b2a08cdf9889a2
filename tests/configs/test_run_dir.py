"""Atomic writes, locks and paths of run folders."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.run_dir import (
    REPOSITORY,
    RunDir,
    new_folder,
    read_json,
    read_summed_json,
    replace_folder,
    write_bytes,
    write_json,
    write_summed_json,
)


def test_bare_names_are_in_the_folder_runs_and_paths_are_literal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunDir.named("mine").path == REPOSITORY / "runs" / "mine"
    assert RunDir.named("./mine").path.resolve() == tmp_path / "mine"
    assert RunDir.named(str(tmp_path / "x")).path == tmp_path / "x"


def test_a_failed_write_keeps_the_old_file_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left") as error:
        write_bytes(path, b"new")
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_new_folder_is_complete_or_absent(tmp_path: Path) -> None:
    """Folders with similar names are left alone."""
    folder, other = tmp_path / "codes", tmp_path / "codes.old-2024"
    other.mkdir()

    def fill_and_fail() -> None:
        with new_folder(folder) as new:
            (new / "half").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill_and_fail()
    assert os.listdir(tmp_path) == [other.name]
    with new_folder(folder) as new:
        (new / "whole").touch()
    assert sorted(os.listdir(tmp_path)) == ["codes", other.name]
    assert os.listdir(folder) == ["whole"]


def test_replacing_a_folder_leaves_no_old_files(tmp_path: Path) -> None:
    for name in ("codes", "by", "codes.old-1"):  # the last is left over from a killed command
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "codes", tmp_path / "by")
    assert os.listdir(tmp_path) == ["codes"]
    assert os.listdir(tmp_path / "codes") == ["by"]


def test_paths_that_are_no_run_are_refused(tmp_path: Path) -> None:
    assert not RunDir(tmp_path / "nothing").exists()
    assert not RunDir(tmp_path).exists()
    (tmp_path / "letter.txt").touch()
    for path in (tmp_path, tmp_path / "letter.txt"):
        with pytest.raises(UserError, match=r"expected a run \(a folder with recipe.yaml\)"):
            RunDir(path).exists()


def test_a_half_written_recipe_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml.tmp-7").touch()
    run = RunDir(tmp_path)
    assert not run.exists()
    with run.lock():
        assert os.listdir(tmp_path) == [".lock"]


def test_two_commands_cannot_write_into_one_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with run.lock(), pytest.raises(UserError, match="another command is writing"), RunDir(tmp_path).lock():
        pass
    with run.lock():
        pass


def test_file_names_may_be_255_characters_long(tmp_path: Path) -> None:
    write_bytes(tmp_path / ("x" * 255), b"content")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"content"]


def test_outputs_are_numbered_never_overwritten_and_vanish_on_failure(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    names = []
    for _ in range(2):
        with run.numbered("samples") as folder:
            assert folder is not None
            names.append(folder.name)
    assert names == ["000", "001"]
    (run.samples / "007").mkdir()
    with pytest.raises(FileNotFoundError), run.numbered("samples") as folder:
        (run.samples / "008" / "nowhere" / "half.png").write_bytes(b"")
    assert sorted(path.name for path in run.samples.iterdir()) == ["000", "001", "007"]
    with run.numbered("samples", create=False) as folder:
        assert folder is None
    assert len(list(run.samples.iterdir())) == 3


def test_the_latest_finished_prior_is_the_default(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.last_prior() is None
    for age, name in ((1, "new"), (2, "old")):
        path = run.prior(name) / "prior.safetensors"
        write_bytes(path, b"")
        os.utime(path, (1e9 - age, 1e9 - age))
    (run.prior("unfinished")).mkdir()
    assert run.last_prior() == "new"


def test_history_records_arguments_and_versions(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.record("train.py", ["--stage1.lr", "1"], {"stage1": {"lr": 1.0}})
    run.record("extract_codes.py", [], {})
    first, second = map(json.loads, run.history.read_text().splitlines())
    assert first["arguments"] == ["--stage1.lr", "1"]
    assert first["versions"]["torch"]
    assert second["command"] == "extract_codes.py"


def test_errors_name_missing_or_broken_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found nothing"):
        read_json(tmp_path / "a.json")
    write_bytes(tmp_path / "a.json", b"{")
    with pytest.raises(UserError, match=r"a\.json: expected JSON"):
        read_json(tmp_path / "a.json")
    write_json(tmp_path / "a.json", {"a": [1]})
    assert read_json(tmp_path / "a.json") == {"a": [1]}


def test_errors_name_json_that_was_changed(tmp_path: Path) -> None:
    path, content = tmp_path / "a.json", {"grids": [(2, 3)], "bits": float("inf"), "of": {"step": 3}}
    write_summed_json(path, content)
    assert read_summed_json(path) == {**content, "grids": [[2, 3]]}
    path.write_text(path.read_text().replace('"step": 3', '"step": 2'))
    with pytest.raises(UserError, match=r"a\.json: expected JSON as it was written"):
        read_summed_json(path)
    write_json(path, content)
    with pytest.raises(UserError, match=r"a\.json: expected JSON as it was written"):
        read_summed_json(path)
