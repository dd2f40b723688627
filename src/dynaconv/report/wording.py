"""The words and number formats of the report: plain sentences from results, in one place."""

from __future__ import annotations

from dynaconv.report.results import Point, Results

MISSING = "–"
THIN = "\u202f"
ENGINES = {
    "eager": "PyTorch eager",
    "inductor": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino-f32": "OpenVINO f32",
    "openvino": "OpenVINO bf16",
    "dynaconv": "dynaconv",
    "dynaconv-bf16": "dynaconv bf16",
}


def percent(share: float | None, digits: int = 1) -> str:
    """A share as per cent."""
    return MISSING if share is None else f"{100 * share:.{digits}f}{THIN}%"


def points_of(difference: float | None) -> str:
    """A difference of two shares in percentage points, signed: ``−0.7 points``."""
    if difference is None:
        return MISSING
    value = round(100 * difference, 1)
    if value == 0:
        return "no difference"
    return f"{'+' if value > 0 else '−'}{abs(value):.1f} point{'' if abs(value) == 1 else 's'}"


def significant(value: float, digits: int = 3) -> str:
    """``digits`` significant digits without an exponent: 0.412, 5.13, 12.3, 1,234."""
    if value == 0:
        return "0"
    magnitude = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if magnitude:
        return f"{value:,.{max(0, digits - magnitude)}f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def mmac(macs: float | None, unit: bool = True) -> str:
    """Multiply-adds in millions."""
    if macs is None:
        return MISSING
    return significant(macs / 1e6) + (f"{THIN}MMac" if unit else "")


def milliseconds(ms: float | None, unit: bool = True) -> str:
    """A time in milliseconds."""
    return MISSING if ms is None else significant(ms) + (f"{THIN}ms" if unit else "")


def ratio(value: float | None, digits: int = 2) -> str:
    """A ratio with a fixed number of digits."""
    return MISSING if value is None else f"{value:.{digits}f}"


def times(value: float | None) -> str:
    """A factor with a multiplication sign."""
    return MISSING if value is None else f"{value:.2f}{THIN}×"


def engine_name(engine: str | None) -> str:
    """An engine of results.json as people call it; files without one were timed in eager PyTorch."""
    return ENGINES.get(engine or "eager", str(engine))


def batch_words(batch: int) -> str:
    """A batch size in words."""
    return "one image" if batch == 1 else f"a batch of {batch} images"


def less_or_more(value: float | None, noun: str) -> str:
    """``38 % less time``, ``4 % more time`` or ``the same time`` from a ratio."""
    if value is None:
        return ""
    change = round(100 * (value - 1))
    if change == 0:
        return f"the same {noun}"
    many = noun.endswith("s")
    if change < 0:
        return f"{-change}{THIN}% {'fewer' if many else 'less'} {noun}"
    return f"{change}{THIN}% more {noun}"


def join(parts: list[str]) -> str:
    """English list: ``a``, ``a and b``, ``a, b and c``."""
    parts = [part for part in parts if part]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1] if parts else ""


def headline(results: Results) -> str:
    """The answer in one sentence, for the lowest budget."""
    if not results.points:
        return f"{results.title}: no budget has been evaluated yet."
    point = results.points[0]
    saved = []
    if point.macs_ratio is not None:
        saved.append(f"{percent(point.macs_ratio, 0)} of the multiply-adds")
    shares = sorted(
        round(100 * latency.ratio) for latency in point.latency.values() if latency.ratio is not None
    )
    if shares:
        spread = f"{shares[0]}" if shares[0] == shares[-1] else f"{shares[0]} to {shares[-1]}"
        saved.append(f"{spread}{THIN}% of the time")
    accuracy = f"{percent(point.accuracy)} accuracy" if point.accuracy is not None else "A dynamic network"
    return f"{accuracy} with {join(saved)}" if saved else f"{accuracy} at budget {point.target:g}"


def subline(results: Results) -> str:
    """What the headline compares with."""
    dense = results.dense
    if dense is None:
        return (
            "No dense baseline was recorded in this run, so nothing here says what the budget cost or saved."
        )
    facts = []
    if dense.accuracy is not None:
        facts.append(f"is right on {percent(dense.accuracy)} of the test images")
    if dense.macs is not None:
        facts.append(f"spends {mmac(dense.macs)} on every image")
    timed = [
        f"{milliseconds(lat.ms)} for {batch_words(batch)}{_by(lat.engine)}"
        for batch, lat in dense.latency.items()
    ]
    if timed:
        facts.append(f"takes {join(timed)}")
    return f"The same network computed everywhere ({dense.name}) {join(facts)}." if facts else ""


def _by(engine: str | None) -> str:
    """By which engine, where the file says so."""
    return f" with {engine_name(engine)}" if engine else ""


def budget_sentence(results: Results, point: Point) -> str:
    """One budget against the dense network, in plain words."""
    parts = []
    dense_accuracy = results.dense.accuracy if results.dense else None
    if point.accuracy is not None:
        gap = ""
        if dense_accuracy is not None:
            difference = points_of(point.accuracy - dense_accuracy)
            gap = " (as dense)" if difference == "no difference" else f" ({difference} against dense)"
        parts.append(f"{percent(point.accuracy)} accuracy{gap}")
    if point.executed_macs is not None:
        against = (
            f" ({less_or_more(point.macs_ratio, 'multiply-adds')})" if point.macs_ratio is not None else ""
        )
        parts.append(f"{mmac(point.executed_macs)} per image{against}")
    for batch, latency in point.latency.items():
        against = f" ({less_or_more(latency.ratio, 'time')})" if latency.ratio is not None else ""
        parts.append(f"{milliseconds(latency.ms)} for {batch_words(batch)}{against}")
    return join(parts) + "." if parts else "nothing was measured at this budget."


def cards(results: Results) -> list[dict[str, str]]:
    """Cards for the lowest budget: label, big value, what it is compared with."""
    if not results.points:
        return []
    point, dense = results.points[0], results.dense
    made = []
    if point.accuracy is not None:
        against = ""
        if dense and dense.accuracy is not None:
            against = f"dense {percent(dense.accuracy)}, {points_of(point.accuracy - dense.accuracy)}"
        made.append({"label": "Accuracy", "value": percent(point.accuracy), "detail": against})
    if point.executed_macs is not None:
        against = f"{times(point.macs_ratio)} dense ({mmac(dense.macs)})" if dense and dense.macs else ""
        made.append(
            {"label": "Executed MACs per image", "value": mmac(point.executed_macs), "detail": against}
        )
    for batch, latency in point.latency.items():
        base = dense.latency.get(batch) if dense else None
        against = (
            f"{times(latency.ratio)} dense ({milliseconds(base.ms)}{_by(base.engine)})"
            if base and latency.ratio is not None
            else ""
        )
        label = "Time for one image" if batch == 1 else f"Time for {batch} images"
        made.append({"label": label, "value": milliseconds(latency.ms), "detail": against})
    if point.focus is not None:
        inside, outside = percent(point.density_inside, 0), percent(point.density_outside, 0)
        detail = f"{inside} of the MACs inside the box, {outside} outside"
        made.append({"label": "Focus on the object", "value": times(point.focus), "detail": detail})
    return made


def definitions() -> list[tuple[str, str]]:
    """The four numbers that are never mixed up, one sentence each."""
    return [
        (
            "Dense MACs",
            "multiply-adds the static network, without gates, spends on one image; known from its shape alone.",
        ),
        (
            "Executed MACs",
            "multiply-adds really done for an image at a budget, counted from its own masks with gates, stem and "
            "classifier included, as a mean per image over the test set.",
        ),
        ("Routing MACs", "the part of the executed MACs that only decides where to compute."),
        (
            "Milliseconds",
            "wall-clock time of one forward pass of a whole batch on the machine named here, median of runs in which "
            "all engines take turns: the dynamic network by the engine of dynaconv where it ran, the dense one by the "
            "fastest dense engine; no MAC count enters it.",
        ),
    ]


def saved_sentence(point: Point) -> str:
    """How much of the saved MACs became saved time at one budget."""
    if point.macs_ratio is None:
        return ""
    kept = [
        f"{percent(latency.ratio, 0)} of the time for {batch_words(batch)}"
        for batch, latency in point.latency.items()
        if latency.ratio is not None
    ]
    return (
        f"Budget {point.target:g}: {percent(point.macs_ratio, 0)} of the MACs, {join(kept)}." if kept else ""
    )


def saved_missing(results: Results) -> str:
    """What is missing for the chart of saved time, in words."""
    missing = [] if results.dense else ["no dense network"]
    missing += [] if results.points else ["no budget"]
    missing += [] if results.batches else ["no measured times"]
    missing += [] if any(p.macs_ratio is not None for p in results.points) else ["no MAC ratios"]
    return join(missing) or "no pair of times at the same batch size"


def duration(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def facts(results: Results) -> list[tuple[str, str]]:
    """What was run, as name and value, without what is unknown."""
    sizes = [
        f"{results.sizes[part]:,} {part}"
        for part in ("train", "calibration", "test")
        if part in results.sizes
    ]
    pictures = [f"{results.image_size} × {results.image_size} pixels"] if results.image_size else []
    classes = [f"{len(results.classes)} classes"] if results.classes else []
    data = ", ".join(part for part in [results.dataset, *classes, *pictures] if part)
    dense = results.dense
    network = (
        [
            dense.name,
            f"{dense.params:,} parameters" if dense.params else "",
            mmac(dense.macs) if dense.macs else "",
        ]
        if dense
        else []
    )
    trained = duration(dense.train_seconds) if dense and dense.train_seconds else ""
    calibrated = [
        f"{p.target:g} → {p.calibration_ratio:.3f} on calibration, {p.ratio:.3f} held-out"
        for p in results.points
        if p.calibration_ratio is not None and p.ratio is not None
    ]
    rows = [
        ("Command", results.command),
        ("Data set", data),
        ("Images", ", ".join(sizes)),
        ("Dense network", ", ".join(part for part in network if part)),
        ("Dense training", trained),
        ("Calibration", "; ".join(calibrated)),
        ("Machine", results.machine),
        ("dynaconv", results.version),
        ("Commit", results.commit or ""),
        ("Created", results.created),
    ]
    return [(name, value) for name, value in rows if value]
