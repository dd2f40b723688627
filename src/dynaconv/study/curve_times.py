"""Milliseconds of the study's networks: static ones in every engine installed, dynamic ones in ours, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.cost import compare_latency, machine_line, prepare_for_timing
from dynaconv.measure.race import (
    DECIDED,
    EAGER,
    FORCED,
    OURS,
    SETTLE_SECONDS,
    channels_last,
    compile_for,
    eager_outputs,
    torch_threads,
)
from dynaconv.measure.rivals import RIVALS, DenseRivals, choose_rivals, deviation
from dynaconv.study.accuracy_macs import Pictures, Timing
from dynaconv.study.budget_runs import Tell
from dynaconv.study.curve_cells import Group
from dynaconv.study.curve_points import point_name
from dynaconv.study.curve_report import TIMES
from dynaconv.study.curve_settings import DENSE
from dynaconv.study.folder import StudyFolder

PRECISION = "float32"
# A dynamic network's time depends on the pictures, so it sees several batches.
BATCHES_OF_FEW = 16
Call = Callable[[], Any]
Calls = dict[tuple[str, str], Call]


def time_study(
    folder: StudyFolder, rows: Sequence[Mapping[str, Any]], pictures: Pictures, timing: Timing, tell: Tell
) -> None:
    """Measure every point with the network of its first seed, and write times.json.

    Networks on the same pictures are timed in turns, in one process, at the same number of threads, in float32. Every
    engine's answers were compared with eager PyTorch's before; who deviates is left out, with the reason.
    """
    points: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    with torch_threads(timing.threads):
        for group, own in _by_pictures(rows).items():
            models = {point_name(row): (row["method"] == DENSE, _load(folder, row, group)) for row in own}
            bundle = pictures(group)
            for batch in timing.batches:
                tell(f"milliseconds at batch {batch}: {len(models)} networks {group.title}")
                for name, found in _race(models, bundle.test, batch, timing, left_out, tell).items():
                    points.setdefault(name, {})[str(batch)] = found
        threads = torch.get_num_threads()
    data = {"machine": machine_line(), "threads": threads, "precision": PRECISION, "left_out": left_out}
    folder.write_json(TIMES, {**data, "points": points})


def _by_pictures(rows: Sequence[Mapping[str, Any]]) -> dict[Group, list[Mapping[str, Any]]]:
    """The first seed of every point that was trained, by pictures."""
    first: dict[str, Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        if "accuracy" in row:
            first.setdefault(point_name(row), row)
    groups: dict[Group, list[Mapping[str, Any]]] = {}
    for row in first.values():
        groups.setdefault(Group(row["asked_size"], row["object_share"]), []).append(row)
    return groups


def _load(folder: StudyFolder, row: Mapping[str, Any], group: Group) -> nn.Module:
    from dynaconv import load

    return load(folder.path / "runs" / row["run"]).eval()


def _race(
    models: Mapping[str, tuple[bool, nn.Module]],
    pictures: Any,
    batch: int,
    timing: Timing,
    left_out: dict[str, str],
    tell: Tell,
) -> dict[str, dict[str, Any]]:
    """Milliseconds of one batch: {"median_ms", "min_ms", "engine", "engines"}, by name."""
    calls: Calls = {}
    count = BATCHES_OF_FEW if batch < BATCHES_OF_FEW else 1
    for name, (static, model) in models.items():
        add = _static_calls if static else _dynamic_calls
        add(calls, name, model, _batches(pictures, batch, 1 if static else count), timing, left_out)
    tell(f"timing {len(calls)} alternatives in turns")
    times = compare_latency(
        {f"{engine}: {name}": call for (name, engine), call in calls.items()},
        rounds=timing.rounds,
        seconds=timing.seconds,
        settle_seconds=SETTLE_SECONDS,
    )
    found: dict[str, dict[str, Any]] = {}
    for name, engine in calls:
        measured = times[f"{engine}: {name}"]
        each = 1 if models[name][0] else count
        engines = found.setdefault(name, {"engines": {}})["engines"]
        engines[engine] = {key: measured[key] / each for key in ("median_ms", "min_ms")}
    for name, one in found.items():
        fastest = min(one["engines"], key=lambda engine: one["engines"][engine]["median_ms"])
        found[name] = {**one["engines"][fastest], "engine": fastest, **one}
    return found


def _batches(pictures: Any, batch: int, count: int) -> list[Tensor]:
    total = len(pictures)
    indices = [[(i * batch + j) % total for j in range(batch)] for i in range(count)]
    return [pictures.__getitems__(own)[0].contiguous() for own in indices]


def _static_calls(
    calls: Calls, name: str, model: nn.Module, batches: list[Tensor], timing: Timing, left_out: dict[str, str]
) -> None:
    """The network in every dense engine of this precision, and in ours."""
    names = [rival for rival in choose_rivals(timing.engines) if RIVALS[rival].precision == PRECISION]
    with DenseRivals(model, names=names) as rivals:
        for rival, run in rivals.prepare(batches[0]).items():
            calls[name, rival] = run
        expected = eager_outputs(rivals.subject.model, [channels_last(batches[0])])
    left_out |= {f"{rival}: {name}": reason for rival, reason in rivals.left_out.items()}
    _ours(calls, name, model, batches, expected, FORCED[PRECISION], left_out)


def _dynamic_calls(
    calls: Calls, name: str, model: nn.Module, batches: list[Tensor], timing: Timing, left_out: dict[str, str]
) -> None:
    """The network in our engine; in eager PyTorch only where ours cannot run it."""
    eager, ready = prepare_for_timing(model), [channels_last(x) for x in batches]
    expected = eager_outputs(eager, ready)
    if not _ours(calls, name, model, batches, expected, DECIDED[PRECISION], left_out):
        calls[name, EAGER] = lambda: eager_outputs(eager, ready)


def _ours(
    calls: Calls,
    name: str,
    model: nn.Module,
    batches: list[Tensor],
    expected: Sequence[Tensor],
    allowed: float,
    left_out: dict[str, str],
) -> bool:
    """Compile, compare, and enter the race; False with a reason in `left_out` where that fails."""
    engine = OURS[PRECISION]
    try:
        fast = compile_for(model, batches[0], PRECISION)
    except (ValueError, RuntimeError) as error:
        left_out[f"{engine}: {name}"] = str(error)
        return False
    worst = max(deviation(fast(x), y) for x, y in zip(batches, expected, strict=True))
    if not worst <= allowed:
        left_out[f"{engine}: {name}"] = _checks.measure_deviates(worst, allowed)
        return False
    calls[name, engine] = lambda: [fast(x) for x in batches]
    return True
