"""Reports and galleries."""

from __future__ import annotations

from collections.abc import Sequence

from dynaconv._checks.general import _some


def report_no_results(run_dir: object) -> FileNotFoundError:
    """Error for a run folder without results.json."""
    return FileNotFoundError(
        f"a report needs results.json, but {str(run_dir)!r} has none; run `dynaconv eval {run_dir}` first"
    )


def report_broken_json(path: object, error: Exception) -> ValueError:
    """Error for a results file that is not valid JSON."""
    return ValueError(
        f"{path} is not valid JSON ({error}); it may be cut off: write it again with `dynaconv eval`"
    )


def report_unknown_format(path: object, got: object, known: int) -> ValueError:
    """Error for a results file of another format number."""
    return ValueError(
        f"{path} has format {got!r}, but this dynaconv reads format {known}; "
        "write it again with `dynaconv eval` or update dynaconv"
    )


def report_bad_field(path: object, field: str, expected: str, got: object) -> ValueError:
    """Error for a value of the wrong kind in a results file."""
    shown = repr(got) if len(repr(got)) <= 60 else repr(got)[:57] + "..."
    return ValueError(f"{path}: {field} must be {expected}, got {shown}; write it again with `dynaconv eval`")


def report_no_gallery(path: object) -> FileNotFoundError:
    """Error for a gallery file that is not there."""
    return FileNotFoundError(f"no gallery at {str(path)!r}; expected a gallery.npz written by dynaconv")


def report_broken_gallery(path: object, error: Exception) -> ValueError:
    """Error for a gallery that numpy cannot read."""
    return ValueError(
        f"{path} is not a readable gallery ({type(error).__name__}: {error}); it may be cut off: write it again"
    )


def report_gallery_lacks(path: object, key: str) -> ValueError:
    """Error for a gallery without one of its arrays."""
    return ValueError(f"{path} has no array {key!r}, so it is not a whole gallery; write it again")


def report_gallery_shape(path: object, key: str, expected: object, got: object) -> ValueError:
    """Error for a gallery whose arrays disagree."""
    return ValueError(
        f"{path}: {key} must be {expected} to match the pictures, got {got}; write the gallery again"
    )


def report_other_run(path: object, what: str, known: Sequence[str]) -> ValueError:
    """Error for a gallery that belongs to other results."""
    return ValueError(
        f"{path} has {what}, but results.json beside it has {_some(known)}; "
        "they come from different runs: write both again"
    )


def report_no_runs() -> ValueError:
    """Error for a comparison of nothing."""
    return ValueError("a comparison needs at least one run folder, got none; name the folders to compare")


def report_missing_package(name: str | None) -> ModuleNotFoundError:
    """Error for a report asked for without the packages that draw it."""
    return ModuleNotFoundError(
        f"a report needs the package {name!r}; install it with `pip install 'dynaconv[report]'`"
    )
