"""What a verb hands back, and how it is printed: text or JSON on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@dataclass
class Outcome:
    """text for people, data for `--json` (None says nothing), and the exit code (0 done, 1 failed check)."""

    text: str = ""
    data: Mapping[str, Any] | list[Any] | None = field(default_factory=dict)
    code: int = DONE


class CommandFailed(Exception):
    """A run or a check that failed, with one sentence and an exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def say(line: str) -> None:
    """One line of progress on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def to_json(data: Any) -> str:
    """JSON text of plain values, tensors, arrays and paths; numbers that JSON lacks (nan, inf) become null.

    >>> print(to_json({"threshold": float("-inf")}))
    {
      "threshold": null
    }
    """
    return json.dumps(_plain(data), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple, set)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def count(number: int, thing: str) -> str:
    """1 epoch, 2 epochs."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def share(value: float | None, digits: int = 1) -> str:
    """0.9567 as 95.7 %; a dash where there is none."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def macs(value: float | None) -> str:
    """Multiply-adds in millions, as 12.5 M; a dash where there are none."""
    return "-" if value is None else f"{value / 1e6:,.2f} M"


def number(value: float | None, pattern: str = ".3f") -> str:
    """A number in the given format; a dash where there is none."""
    return "-" if value is None else format(value, pattern)
