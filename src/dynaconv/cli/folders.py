"""Which folders a verb may write to."""

from __future__ import annotations

import os
from pathlib import Path

from dynaconv import _checks


def output_folder(path: str | Path) -> Path:
    """The folder, checked before any work is done; it need not exist yet.

    Raises:
        ValueError: it is a file, lies below a file, or cannot be written.
    """
    folder = Path(path)
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise _checks.cli_not_a_folder(folder, nearest)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _checks.cli_not_writable(folder)
    return folder


def holds_dynaconv_run(path: str | Path) -> bool:
    """Whether a folder was written by dynaconv: its recipe, its results or its network can be read as ours."""
    from dynaconv.measure import read_results
    from dynaconv.models import read_config
    from dynaconv.train import load_recipe

    folder = Path(path)
    tests = {"config.yaml": load_recipe, "results.json": read_results, "model": read_config}
    for name, read in tests.items():
        source = folder / name
        if source.exists():
            try:
                read(folder if name == "results.json" else source)
            except (ValueError, OSError, TypeError):
                continue
            return True
    return False


def own_or_new_folder(path: str | Path, parts: tuple[str, ...] = ()) -> Path:
    """A folder that may be written over: new, empty, or holding a dynaconv run itself or in one of `parts`.

    Raises:
        ValueError: it holds something else.
    """
    folder = output_folder(path)
    if folder.is_dir() and any(folder.iterdir()):
        if not any(holds_dynaconv_run(folder / part) for part in ("", *parts)):
            raise _checks.cli_foreign_folder(folder)
    return folder
