"""results.json and gallery.npz of a run folder."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynaconv._files import atomic_path, atomic_write_text
from dynaconv._version import __version__
from dynaconv.cost import machine_line, source_commit
from dynaconv.data import DataBundle, task_of

FORMAT = 1


def write_results(
    run_dir: str | Path,
    *,
    title: str,
    command: str,
    bundle: DataBundle,
    measured: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    gallery: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write results.json (and gallery.npz) into a run folder, each whole or not at all.

    Args:
        measured: from `measure_points`; history: one entry an epoch, see the report.
    Returns:
        The path of results.json.
    """
    folder = Path(run_dir)
    data = {
        "format": FORMAT,
        "title": title,
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "version": __version__,
        "commit": source_commit(),
        "machine": machine_line(),
        "command": command,
        "dataset": {
            "name": bundle.name,
            "classes": list(bundle.classes),
            "image_size": bundle.image_size,
            "train": len(bundle.train),
            "calibration": len(bundle.calibration),
            "test": len(bundle.test),
            "metric": task_of(bundle.test).metric,
        },
        **measured,
        "history": list(history),
        "notes": list(notes),
    }
    if gallery is not None:
        with atomic_path(folder / "gallery.npz") as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **gallery)
    atomic_write_text(folder / "results.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
    return folder / "results.json"


def read_results(run_dir: str | Path) -> dict[str, Any]:
    """results.json of a run folder.

    Raises:
        FileNotFoundError: the run has none yet. ValueError: it is damaged or of another format.
    """
    file = Path(run_dir) / "results.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; `dynaconv eval RUN` or `dynaconv demo` writes it")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}); measure the run again") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{file} is not a results file of format {FORMAT}; measure the run again")
    return data
