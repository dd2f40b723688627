"""A study's folder belongs to one process at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynaconv.study.folder import StudyFolder

HOLD = """
import sys
from dynaconv.study.folder import StudyFolder
folder = StudyFolder(sys.argv[1], "fixes")
folder.claim({})
print("held", flush=True)
sys.stdin.read()
"""


def test_the_folder_is_free_again_when_its_process_has_died(tmp_path) -> None:
    study = tmp_path / "study"
    source = Path(__file__).parents[2] / "src"
    path = os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", HOLD, str(study)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError) as told:
            StudyFolder(study, "fixes").claim({})
        assert str(told.value) == (
            f"process {process.pid} is working in the study folder {str(study)!r}, and two would mix their results; "
            "wait until it has finished or stop it (what it has finished stays), or name another folder with --out"
        )
    finally:
        process.kill()
        process.communicate()
    StudyFolder(study, "fixes").claim({})


def test_a_process_does_not_keep_itself_out(tmp_path) -> None:
    first, second = StudyFolder(tmp_path, "fixes"), StudyFolder(tmp_path, "fixes")
    first.claim({})
    second.claim({})
    first.lock.close()
    third = StudyFolder(tmp_path, "fixes")
    third.claim({})
    assert third.check()["study"] == "fixes"


def test_a_folder_with_nothing_but_a_lock_is_empty(tmp_path) -> None:
    (tmp_path / ".lock").write_text("1\n")
    assert StudyFolder(tmp_path, "dial").check() == {}
