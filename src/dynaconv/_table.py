"""Plain-text tables for reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]], align: str | None = None) -> str:
    """Align columns with spaces; `align` has one of l, r for each column.

    >>> print(format_table(("layer", "MACs"), [("stem", 12), ("layer1", 3456)], "lr"))
    layer   MACs
    ------  ----
    stem      12
    layer1  3456
    """
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(str(header[i])), *(len(r[i]) for r in cells), 0) for i in range(len(header))]
    align = align or "l" * len(header)

    def line(values: Sequence[str]) -> str:
        padded = (
            v.rjust(w) if a == "r" else v.ljust(w) for v, w, a in zip(values, widths, align, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join(
        [line([str(h) for h in header]), line(["-" * w for w in widths]), *(line(r) for r in cells)]
    )
