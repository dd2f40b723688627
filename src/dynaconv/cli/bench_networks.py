"""`dynaconv bench MODEL`: the static network with every dense engine, the dynamic one with ours and in eager."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from dynaconv import _checks
from dynaconv._table import format_table
from dynaconv.cli.networks import Opened, choose_targets, set_target
from dynaconv.cli.outcome import CommandFailed, Outcome, number, say
from dynaconv.cli.profile import pictures

TOLERANCE = 1e-4
DEFAULT_DENSITY = 0.5
# Without --rounds a batch size is timed for some seconds, so that a large network does not take minutes.
ROUNDS, SECONDS = 25, 8.0


def prepare(opened: Opened, size: tuple[int, int, int], args: Any) -> nn.Module:
    """Settle untrained weights, convert a static network where that was asked for, and return the static one.

    Raises:
        ValueError: a static network, and nothing that would make it dynamic.
    """
    import torch

    import dynaconv as dc
    from dynaconv.measure import dense_twin
    from dynaconv.measure.untrained import settle_norms_, with_one_result

    x = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    if opened.folder is None:
        settle_norms_(opened.model, x)
    opened.model = with_one_result(opened.model, x[:1])
    dynamic = bool(dc.gates(opened.model) or dc.dynamic_layers(opened.model))
    if not (args.dynamize or (args.force_density is not None and not dynamic)):
        if not dynamic:
            raise _checks.cli_already_static(opened.name)
        return dense_twin(opened.model)
    dense = copy.deepcopy(opened.model)
    dc.dynamize_(opened.model, input_size=size)
    return dense


def _runners(opened: Opened, args: Any) -> list[Any]:
    """The network at each budget, with each density forced, or, with dynamic kernels only, as it is."""
    import dynaconv as dc
    from dynaconv.measure.race import Runner

    densities = args.force_density
    masked = bool(dc.gates(opened.model))
    if densities is None and args.target is None and opened.folder is None and masked:
        densities = [DEFAULT_DENSITY]
    if densities is not None:
        return [Runner(f"density {density:g}", opened.model, density) for density in densities]
    runners = []
    for target in choose_targets(opened.model, args.target):
        model = copy.deepcopy(opened.model)
        set_target(model, target)
        kind = "as trained" if masked else "dynamic kernels"
        runners.append(Runner(kind if target is None else f"target {target:g}", model))
    return runners


def measure(opened: Opened, dense: nn.Module, size: tuple[int, int, int], args: Any) -> Outcome:
    """Check, time, show.

    Raises:
        CommandFailed: skipping and computing everything disagree, or our engine and eager PyTorch do.
    """
    import dynaconv as dc
    from dynaconv.cost import machine_line
    from dynaconv.measure import EnginesDisagree
    from dynaconv.measure.race import forced

    x, source = pictures(opened, size, max(*args.batch, 8))
    deviations, runners = {}, _runners(opened, args)
    for runner in runners if dc.gates(opened.model) else ():
        with forced(runner.model, runner.density):
            deviations[runner.label] = verify(runner.model, x[:8], runner.label)
    if deviations:
        say(
            f"skipping agrees with computing everything (largest deviation {max(deviations.values()):.1e}); timing ..."
        )
    batches = sorted({batch for batch in args.batch if batch <= len(x)})
    left_out: dict[str, str] = {}
    try:
        timed = {str(batch): _time(dense, runners, x, batch, args, left_out) for batch in batches}
    except EnginesDisagree as error:
        raise CommandFailed(str(error)) from None
    data = {
        "model": opened.name,
        "machine": machine_line(),
        "input_size": list(size),
        "masks": _masks(runners),
        "pictures": source,
        "precision": args.precision,
        "dense": "the same network without gates (dc.revert_), by the fastest engine of this precision; batch norm "
        "folded in all",
        "largest_deviation": deviations,
        "left_out": left_out,
        "batches": timed,
    }
    return Outcome(_text(data), data)


def _masks(runners: list[Any]) -> str:
    densities = [f"{runner.density:g}" for runner in runners if runner.density is not None]
    return f"forced, density {', '.join(densities)}" if densities else "decided by the gates"


def verify(model: nn.Module, x: Tensor, label: str) -> float:
    """Largest relative deviation of skipping from computing everything.

    Raises:
        CommandFailed: above 1e-4, naming the worst block.
    """
    from dynaconv.measure import compare_with_dense

    deviations = compare_with_dense(model, x)
    worst = max(deviations, key=deviations.__getitem__)
    if not deviations[worst] <= TOLERANCE:
        raise CommandFailed(
            f"at {label}, skipping differs from computing everything by {deviations[worst]:.1e} in block {worst!r} "
            f"(allowed {TOLERANCE:.0e}); nothing was timed, please report this with the output of `dynaconv doctor`"
        )
    return deviations[worst]


def _time(
    dense: nn.Module, runners: list[Any], x: Tensor, batch: int, args: Any, left_out: dict[str, str]
) -> dict[str, Any]:
    from dynaconv.measure import dense_latency, dynamic_latency
    from dynaconv.measure.race import race

    # A dynamic network's time depends on its pictures, so small batches are timed on several.
    groups = [x[s : s + batch] for s in range(0, len(x) - batch + 1, batch)][: max(1, 8 // batch)]
    if all(runner.density is not None for runner in runners):
        groups = groups[:1]
    seconds = SECONDS if args.rounds is None else None
    result = race(
        dense,
        runners,
        groups,
        rivals=args.engines,
        precisions=[args.precision],
        rounds=args.rounds or ROUNDS,
        seconds=seconds,
        progress=say,
    )
    left_out |= result.left_out
    points = [
        {
            "label": runner.label,
            "target": _target(runner.label),
            "density": runner.density,
            "conditional_ratio": result.conditional_ratio[runner.label],
            "macs_ratio": result.macs_ratio[runner.label],
            **dynamic_latency(result, runner.label, args.precision),
        }
        for runner in runners
    ]
    return {"dense": dense_latency(result, args.precision), "points": points}


def _target(label: str) -> float | None:
    return float(label.removeprefix("target ")) if label.startswith("target ") else None


def _text(data: dict[str, Any]) -> str:
    from dynaconv.measure import left_out_line

    header = ("batch", "network", "engine", "MACs/dense", "min ms", "median ms", "min/dense", "median/dense")
    rows = [row for batch, timed in data["batches"].items() for row in _rows(batch, timed)]
    size = "x".join(map(str, data["input_size"]))
    lines = [
        f"{data['model']} at {size}; pictures: {data['pictures']}; masks: {data['masks']}",
        data["machine"],
        "",
        format_table(header, rows, "rllrrrrr"),
        "Ratios are to the fastest dense engine (*) of the same precision, below 1 is faster; the share of MACs is the "
        "limit of the share of milliseconds.",
        left_out_line(data["left_out"]),
    ]
    return "\n".join(line for i, line in enumerate(lines) if line or i == 2)


def _rows(batch: str, timed: dict[str, Any]) -> list[tuple[str, ...]]:
    from dynaconv.measure.race import EAGER, TITLES

    base = timed["dense"]
    rows = []
    for name, times in base["engines"].items():
        mark = " *" if name == base["engine"] else ""
        ratios = (times["min_ms"] / base["min_ms"], times["median_ms"] / base["median_ms"])
        cells = map(number, (1.0, times["min_ms"], times["median_ms"], *ratios))
        rows.append((batch, "static", TITLES[name] + mark, *cells))
    for point in timed["points"]:
        for name, times in point["engines"].items():
            title = "eager executor" if name == EAGER else TITLES[name]
            keys = ("min_ms", "median_ms", "ratio_min", "ratio_median")
            cells = map(number, (point["macs_ratio"], *(times[key] for key in keys)))
            rows.append((batch, point["label"], title, *cells))
    return rows
