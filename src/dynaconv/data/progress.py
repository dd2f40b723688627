"""A progress bar for long loading, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], what: str, wanted: bool = True) -> Iterable[T]:
    """Iterate with a bar on stderr, when stderr is a terminal and tqdm is installed."""
    if not wanted or not sys.stderr.isatty():
        return items
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, leave=False)
