"""The public names and their signatures: a change here is a change for users."""

from __future__ import annotations

import inspect
from pathlib import Path

import dynaconv as dc
import dynaconv.nn as dnn

SNAPSHOT = Path(__file__).parent / "public_names.txt"


def public_names() -> str:
    """One line a name: signature of functions and classes."""
    lines = []
    for prefix, module in (("dc", dc), ("dnn", dnn)):
        for name in sorted(module.__all__):
            value = getattr(module, name)
            if inspect.ismodule(value) or isinstance(value, str):
                lines.append(f"{prefix}.{name}")
                continue
            lines.append(f"{prefix}.{name}{inspect.signature(value)}")
            if inspect.isclass(value):
                lines += [f"{prefix}.{name}.{m}" for m in sorted(vars(value)) if not m.startswith("_")]
    return "\n".join(lines) + "\n"


def test_public_names_are_the_ones_promised() -> None:
    assert public_names() == SNAPSHOT.read_text(), (
        "public names or signatures changed; if that is meant, run: python -m tests.test_public_names"
    )


if __name__ == "__main__":
    SNAPSHOT.write_text(public_names())
