"""What a conversion did, module by module."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from dynaconv._table import format_table


@dataclass(frozen=True)
class ModuleOutcome:
    """What became of one module: status is "converted", "inside" (part of a converted block), "kept" or "skipped"."""

    name: str
    type: str
    status: str
    detail: str
    params: int


@dataclass
class ConversionReport:
    """Every module of the network, what became of it and why; sizes before and after.

    `dense_macs_before/after` count one image of `input_size` (C, H, W), without and with the gates; None when the
    input size is not known.
    """

    modules: list[ModuleOutcome] = field(default_factory=list)
    params_before: int = 0
    params_after: int = 0
    dense_macs_before: int | None = None
    dense_macs_after: int | None = None
    input_size: tuple[int, int, int] | None = None

    @property
    def converted(self) -> list[str]:
        """Names of the blocks that are dynamic now."""
        return [m.name for m in self.modules if m.status == "converted"]

    @property
    def skipped(self) -> dict[str, str]:
        """Residual blocks and layers that were asked for and stay static: name -> reason."""
        return {m.name: m.detail for m in self.modules if m.status == "skipped"}

    def table(self, every: bool = False) -> str:
        """Readable table; `every` also lists the modules inside converted blocks and the containers."""
        shown = [m for m in self.modules if every or m.status in ("converted", "skipped")]
        rows = [(m.name, m.type, m.status, f"{m.params:,}", m.detail) for m in shown]
        text = format_table(("module", "type", "outcome", "parameters", "detail"), rows, "lllrl")
        return f"{text}\n{self.summary()}"

    def summary(self) -> str:
        """One line: counts, parameters and dense MACs before and after."""
        line = (
            f"{len(self.converted)} blocks converted, {len(self.skipped)} skipped; "
            f"parameters {self.params_before:,} -> {self.params_after:,}"
        )
        if self.dense_macs_before is not None and self.dense_macs_after is not None:
            size = "x".join(str(v) for v in self.input_size or ())
            line += (
                f"; dense MACs at {size}: {self.dense_macs_before:,} -> {self.dense_macs_after:,} with gates"
            )
        return line

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    def to_json(self) -> str:
        """JSON text of everything in the report."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return self.table()
