"""The folder of a study: study.json says whose it is, and every file in it is whole at every moment."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynaconv import _checks
from dynaconv._files import atomic_write_bytes, atomic_write_text
from dynaconv._version import __version__
from dynaconv.study.lock import LOCK, FolderLock

FORMAT = 1
MARKER = "study.json"


class StudyFolder:
    """Where a study keeps its files.

    Args:
        path: a new or empty folder, or one of the same study. study: its name.
    """

    def __init__(self, path: str | Path, study: str) -> None:
        self.path, self.study = Path(path), study
        self.lock: FolderLock | None = None

    def check(self) -> dict[str, Any]:
        """What study.json says, {} for a folder that is new or empty; writes nothing.

        Raises:
            ValueError: the folder belongs to another study or to something else, or its study.json is damaged.
        """
        if self.path.exists() and not self.path.is_dir():
            raise _checks.cli_not_a_folder(self.path, self.path)
        marker = self.path / MARKER
        if not marker.is_file():
            if self.path.is_dir() and any(file.name != LOCK for file in self.path.iterdir()):
                raise _checks.study_foreign_folder(self.path, self.study)
            return {}
        found = read_json(marker)
        if found.get("format") != FORMAT or not isinstance(found.get("settings"), dict):
            raise _checks.study_damaged(marker, f"it is not of format {FORMAT}")
        if found.get("study") != self.study:
            raise _checks.study_other_study(self.path, found.get("study"), self.study)
        return found

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Write study.json, and keep other processes out for as long as this object lives.

        Raises:
            ValueError: another process works in the folder.
        """
        self.lock = self.lock or FolderLock(self.path)
        self.write_json(
            MARKER,
            {"format": FORMAT, "study": self.study, "version": __version__, "settings": dict(settings)},
        )

    def write_json(self, name: str, data: Any) -> Path:
        """JSON file of plain values."""
        atomic_write_text(self.path / name, json.dumps(data, indent=1, allow_nan=False) + "\n")
        return self.path / name

    def write_csv(self, name: str, header: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Path:
        """CSV file; what a row lacks stays empty."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(header), restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write_text(self.path / name, stream.getvalue())
        return self.path / name

    def write_bytes(self, name: str, data: bytes) -> Path:
        """A figure."""
        atomic_write_bytes(self.path / name, data)
        return self.path / name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _checks.study_damaged(path, str(error)) from None
    if not isinstance(data, dict):
        raise _checks.study_damaged(path, f"it holds a {type(data).__name__}")
    return data
