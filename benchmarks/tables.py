"""Tables as docs/benchmarks.md shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table; None is an empty cell."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join('' if c is None else str(c) for c in line)} |" for line in lines)


def ms(times: dict | None) -> str | None:
    """Minimum and median of a measurement in milliseconds."""
    return None if times is None else f"{digits(times['min_ms'])} / {digits(times['median_ms'])}"


def digits(value: float) -> str:
    """Three significant digits, no exponent.

    >>> digits(0.12345), digits(12.345), digits(1234.5)
    ('0.123', '12.3', '1234')
    """
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
