"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from dynaconv._files import atomic_write_text


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="is a device or a pipe; name a file"):
        atomic_write_text(pipe, "text")
    assert stat.S_ISFIFO(pipe.stat().st_mode) and os.listdir(tmp_path) == ["pipe"]


def test_a_folder_is_named_as_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder; name a file") as caught:
        atomic_write_text(tmp_path / "folder", "text")
    assert caught.value.filename == str(tmp_path / "folder") and os.listdir(tmp_path) == ["folder"]


def test_an_error_names_the_file_and_not_its_temporary_name(tmp_path: Path, monkeypatch) -> None:
    def full(prefix: str, dir: Path) -> None:
        raise OSError(30, "Read-only file system", str(dir / f"{prefix}x"))

    monkeypatch.setattr("tempfile.mkstemp", full)
    with pytest.raises(OSError, match="Read-only") as caught:
        atomic_write_text(tmp_path / "file", "text")
    assert caught.value.filename == str(tmp_path / "file")
