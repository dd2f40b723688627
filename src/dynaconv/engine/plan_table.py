"""What `fast.plan` shows: every step, its kernel, its times, and why it runs as it does."""

from __future__ import annotations

from typing import Any

from dynaconv._table import format_table
from dynaconv.engine.plan import NEVER, Plan, Step

# Steps too small to be worth a line.
_QUIET = ("threshold", "dilate", "mask_value", "layout", "copy")
# Steps of one row each, besides convolutions.
_BY_ROW = ("multiply", "add", "activate", "layer_norm")


class PlanTable:
    """The rows of a plan.

    Attributes:
        steps: one dict for each native step: layer, kernel, dense_ms, sparse_ms, break_even, choice, reason.
        raw: the `dynaconv.engine.plan.Plan`.
        aten: one dict for each operation that runs through ATen: layer, operation, reason.
    """

    def __init__(self, plan: Plan, backend: str = "cpu", backend_reason: str | None = None) -> None:
        self.raw, self.backend, self.backend_reason = plan, backend, backend_reason
        self.arena_bytes, self.image = plan.arena_bytes, plan.image
        self.steps = [_row(plan, i, step) for i, step in enumerate(plan.steps)]
        self.aten = [{"layer": a.layer, "operation": a.target, "reason": a.reason} for a in plan.aten]

    def table(self, *, everything: bool = False) -> str:
        """Readable table; masks and copies are left out unless `everything`."""
        head = ("layer", "kernel", "dense ms", "sparse ms", "break-even", "choice", "reason")
        rows = [
            (
                r["layer"], r["kernel"], _number(r["dense_ms"]), _number(r["sparse_ms"]), _number(r["break_even"], 2),
                r["choice"], r["reason"],
            )
            for r in self.steps
            if everything or r["kernel"] not in _QUIET
        ]  # fmt: skip
        text = format_table(head, rows, "llrrrll")
        for r in self.aten:
            text += f"\nthrough ATen: {r['layer']}: {r['operation']}: {r['reason']}"
        summary = f"{len(self.steps)} native steps, {len(self.aten)} through ATen; backend {self.backend}"
        if self.backend_reason:
            summary += f" ({self.backend_reason})"
        return f"{text}\n{summary}; arena {self.arena_bytes / 2**20:.1f} MiB an image of {list(self.image)}"

    def __str__(self) -> str:
        return self.table()

    __repr__ = __str__


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _row(plan: Plan, index: int, step: Step) -> dict[str, Any]:
    times = plan.measured.get(str(index), {})
    choice, reason = _choice(step, "break_even" in times)
    kernel = step.kind
    if step.kind == "conv" and plan.convs[step.conv[0]].winograd is not None:
        kernel = "conv (winograd)"
    if _is_unprojected(step):
        kernel = f"inverted (no projection{('', ', folded', ', factored')[step.ints[0]]})"
    return {
        "layer": step.layer, "kernel": kernel, "dense_ms": times.get("dense_ms"), "sparse_ms": times.get("sparse_ms"),
        "break_even": times.get("break_even"), "choice": choice, "reason": reason,
    }  # fmt: skip


def _is_unprojected(step: Step) -> bool:
    return step.kind == "inverted" and (step.conv[2] < 0 or step.ints[0] > 0)


def _choice(step: Step, measured: bool) -> tuple[str, str]:
    if step.kind in ("threshold", "dilate", "mask_value", "gate"):
        return "mask", "decides where to compute"
    if step.kind == "fusion_factors":
        return "dense", "what the channel fusion of the next step has for each image"
    if step.kind == "router":
        return "dense", "small layers behind a mean, in one step"
    if _is_unprojected(step) and step.grid < 0:
        return "dense", "what projects looks at all positions first" if step.aux[1] >= 0 else "no mask"
    if step.kind == "narrow":
        return "sparse", "closed channels of each image are not computed"
    if step.kind == "add" and step.aux[0] >= 0:
        return "sparse", "rows of weight 0 keep the shortcut"
    if step.grid < 0:
        return "dense", "no mask"
    if step.closed:
        return "closed rows", "they get the shortcut with its activation"
    if step.kind in _BY_ROW:
        return "sparse", "open rows only"
    if step.input2 >= 0 or step.run_all_above >= NEVER:
        return "sparse", "closed rows keep the shortcut" if step.input2 >= 0 else "sparse wins at any density"
    text = "measured" if measured else "not measured"
    return "sparse", f"dense above {step.run_all_above:.2f} open rows ({text})"
