"""results.json as frozen dataclasses: read, checked, with whatever is missing as ``None`` or empty."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dynaconv import _checks

FORMAT = 1


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass of a whole batch; ratios are dynamic / fastest dense (below 1 is faster).

    engine: what ran it, None in files from before engines were told apart (eager PyTorch ran all of those). engines:
    every engine that was timed on this network, that one among them.
    """

    min_ms: float | None
    median_ms: float | None
    ratio_min: float | None = None
    ratio_median: float | None = None
    engine: str | None = None
    engines: dict[str, Latency] = field(default_factory=dict)

    @property
    def ms(self) -> float | None:
        """The number shown: the median, or the minimum where no median was recorded."""
        return self.min_ms if self.median_ms is None else self.median_ms

    @property
    def ratio(self) -> float | None:
        """Dynamic over dense milliseconds, None without a dense time."""
        return self.ratio_min if self.ratio_median is None else self.ratio_median


@dataclass(frozen=True)
class Block:
    """One masked block at one budget: density (0..1) over test images, MACs per image."""

    name: str
    density_mean: float
    density_std: float | None
    dense_macs: float | None
    executed_macs: float | None


@dataclass(frozen=True)
class Dense:
    """The static network: accuracy 0..1, MACs of one image, latency by batch size."""

    name: str
    accuracy: float | None
    macs: float | None
    params: int | None
    train_seconds: float | None
    latency: dict[int, Latency]


@dataclass(frozen=True)
class Point:
    """The dynamic network at one budget; MACs are means per image over the test set."""

    target: float
    threshold: float | None
    calibration_ratio: float | None
    ratio: float | None
    accuracy: float | None
    executed_macs: float | None
    macs_ratio: float | None
    routing_macs: float | None
    density_inside: float | None
    density_outside: float | None
    latency: dict[int, Latency]
    blocks: tuple[Block, ...]

    @property
    def focus(self) -> float | None:
        """Executed-MAC density inside the object's box divided by that outside."""
        if self.density_inside is None or not self.density_outside:
            return None
        return self.density_inside / self.density_outside


@dataclass(frozen=True)
class Epoch:
    """One row of the training history."""

    run: str
    epoch: float
    train_loss: float | None
    val_loss: float | None
    val_accuracy: float | None
    ratio: float | None


@dataclass(frozen=True)
class Results:
    """Everything results.json says about one run."""

    title: str
    created: str
    version: str
    commit: str | None
    machine: str
    command: str
    dataset: str
    classes: tuple[str, ...]
    image_size: int | None
    sizes: dict[str, int]
    dense: Dense | None
    points: tuple[Point, ...]
    history: tuple[Epoch, ...]
    notes: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def targets(self) -> tuple[float, ...]:
        """The budgets, ascending."""
        return tuple(point.target for point in self.points)

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes that were timed for any network, ascending."""
        timed = [self.dense.latency] if self.dense else []
        timed += [point.latency for point in self.points]
        return tuple(sorted({batch for latency in timed for batch in latency}))


def load_results(run_dir: str | Path) -> Results:
    """Read ``run_dir/results.json``.

    Raises:
        FileNotFoundError: the folder has no results.json.
        ValueError: it is not valid JSON, has another format number, or holds values of the wrong kind.
    """
    path = Path(run_dir) / "results.json"
    if not path.is_file():
        raise _checks.report_no_results(run_dir)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _checks.report_broken_json(path, error) from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        got = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise _checks.report_unknown_format(path, got, FORMAT)
    return _Reader(path).results(raw)


class _Reader:
    """Turns parsed JSON into dataclasses and names the field when a value is of the wrong kind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, field: str, expected: str, got: Any) -> ValueError:
        return _checks.report_bad_field(self.path, field, expected, got)

    def number(self, raw: dict, key: str, where: str = "") -> float | None:
        """A finite number, or None where it is absent, null, NaN or infinite."""
        value = raw.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(where + key, "a number", value)
        return value if math.isfinite(value) else None

    def share(self, raw: dict, key: str, where: str = "") -> float | None:
        value = self.number(raw, key, where)
        if value is not None and not -1e-6 <= value <= 1 + 1e-6:
            raise self.fail(where + key, "a share between 0 and 1", value)
        return None if value is None else min(1.0, max(0.0, value))

    def mapping(self, value: Any, field: str) -> dict:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.fail(field, "an object", value)
        return value

    def rows(self, value: Any, field: str) -> list[dict]:
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
            raise self.fail(field, "a list of objects", value)
        return value

    def strings(self, value: Any, field: str) -> tuple[str, ...]:
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.fail(field, "a list of strings", value)
        return tuple(str(item) for item in value)

    def results(self, raw: dict) -> Results:
        data = self.mapping(raw.get("dataset"), "dataset")
        dense = self.dense(raw["dense"]) if raw.get("dense") else None
        points = [self.point(row, dense, i) for i, row in enumerate(self.rows(raw.get("points"), "points"))]
        history = [self.epoch(row) for row in self.rows(raw.get("history"), "history")]
        sizes = {part: self.number(data, part, "dataset.") for part in ("train", "calibration", "test")}
        image_size = self.number(data, "image_size", "dataset.")
        return Results(
            title=str(raw.get("title") or "dynaconv run"),
            created=str(raw.get("created") or ""),
            version=str(raw.get("version") or ""),
            commit=str(raw["commit"]) if raw.get("commit") else None,
            machine=str(raw.get("machine") or ""),
            command=str(raw.get("command") or ""),
            dataset=str(data.get("name") or ""),
            classes=self.strings(data.get("classes"), "dataset.classes"),
            image_size=None if image_size is None else int(image_size),
            sizes={part: int(count) for part, count in sizes.items() if count is not None},
            dense=dense,
            points=tuple(sorted(points, key=lambda point: point.target)),
            history=tuple(sorted(history, key=lambda row: (row.run, row.epoch))),
            notes=self.strings(raw.get("notes"), "notes"),
            left_out={k: str(v) for k, v in self.mapping(raw.get("left_out"), "left_out").items()},
        )

    def dense(self, value: Any) -> Dense:
        raw = self.mapping(value, "dense")
        params = self.number(raw, "params", "dense.")
        return Dense(
            name=str(raw.get("name") or "dense network"),
            accuracy=self.share(raw, "accuracy", "dense."),
            macs=self.number(raw, "macs", "dense."),
            params=None if params is None else int(params),
            train_seconds=self.number(raw, "train_seconds", "dense."),
            latency=self.latency(raw.get("latency"), "dense.latency", {}),
        )

    def point(self, raw: dict, dense: Dense | None, index: int) -> Point:
        where = f"points[{index}]."
        target = self.share(raw, "target", where)
        if target is None:
            raise self.fail(where + "target", "a budget in (0, 1]", raw.get("target"))
        executed = self.number(raw, "executed_macs", where)
        macs_ratio = self.number(raw, "macs_ratio", where)
        if macs_ratio is None and executed is not None and dense and dense.macs:
            macs_ratio = executed / dense.macs
        return Point(
            target=target,
            threshold=self.number(raw, "threshold", where),
            calibration_ratio=self.number(raw, "calibration_ratio", where),
            ratio=self.number(raw, "ratio", where),
            accuracy=self.share(raw, "accuracy", where),
            executed_macs=executed,
            macs_ratio=macs_ratio,
            routing_macs=self.number(raw, "routing_macs", where),
            density_inside=self.share(raw, "density_inside", where),
            density_outside=self.share(raw, "density_outside", where),
            latency=self.latency(raw.get("latency"), where + "latency", dense.latency if dense else {}),
            blocks=tuple(self.blocks(raw.get("blocks"), where + "blocks")),
        )

    def latency(self, value: Any, field: str, dense: dict[int, Latency]) -> dict[int, Latency]:
        timed = {}
        for key, row in self.mapping(value, field).items():
            if not str(key).isdecimal():
                raise self.fail(f"{field}.{key}", "a batch size as its name", key)
            row = self.mapping(row, f"{field}.{key}")
            base = dense.get(int(key))
            found = self.times(row, f"{field}.{key}", base)
            engines = {
                name: times
                for name, entry in self.mapping(row.get("engines"), f"{field}.{key}.engines").items()
                if (times := self.times(self.mapping(entry, f"{field}.{key}.engines.{name}"), name, base))
            }
            if found is not None:
                engine = str(row["engine"]) if row.get("engine") else None
                timed[int(key)] = replace(found, engine=engine, engines=engines)
        return dict(sorted(timed.items()))

    def times(self, row: dict, where: str, base: Latency | None) -> Latency | None:
        """One measurement, its ratios to the dense one filled in; None without milliseconds."""
        least, median, ratio_min, ratio_median = (
            self.number(row, name, f"{where}.")
            for name in ("min_ms", "median_ms", "ratio_min", "ratio_median")
        )
        if ratio_median is None and base and base.median_ms and median is not None:
            ratio_median = median / base.median_ms
        if ratio_min is None and base and base.min_ms and least is not None:
            ratio_min = least / base.min_ms
        return None if least is None and median is None else Latency(least, median, ratio_min, ratio_median)

    def blocks(self, value: Any, field: str) -> list[Block]:
        rows = []
        for index, raw in enumerate(self.rows(value, field)):
            where = f"{field}[{index}]."
            density = self.share(raw, "density_mean", where)
            if density is not None:
                spread, dense, executed = (
                    self.number(raw, key, where) for key in ("density_std", "dense_macs", "executed_macs")
                )
                rows.append(Block(str(raw.get("name") or f"block {index}"), density, spread, dense, executed))
        return rows

    def epoch(self, raw: dict) -> Epoch:
        names = ("train_loss", "val_loss", "val_accuracy", "ratio")
        values = [self.number(raw, key, "history.") for key in names]
        return Epoch(str(raw.get("run") or "run"), self.number(raw, "epoch", "history.") or 0, *values)
