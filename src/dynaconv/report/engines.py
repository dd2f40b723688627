"""Every engine that was timed: dense ones on the static network, ours and eager PyTorch on the dynamic one."""

from __future__ import annotations

from dataclasses import dataclass

from dynaconv.report import charts, wording
from dynaconv.report.results import Latency, Results
from dynaconv.report.tables import Column


@dataclass(frozen=True)
class Entry:
    """One engine on one network: milliseconds by batch size. target: budget, None for the dense network."""

    target: float | None
    engine: str
    latency: dict[int, Latency]

    @property
    def network(self) -> str:
        """For a label."""
        return "dense" if self.target is None else f"budget {self.target:g}"

    @property
    def title(self) -> str:
        """The engine as people call it; eager PyTorch skips in a dynamic network."""
        eager = self.engine == "eager" and self.target is not None
        return "eager executor" if eager else wording.engine_name(self.engine)


def entries(results: Results) -> list[Entry]:
    """The dense network's engines, then those of every budget; empty for files that do not tell engines apart."""
    networks = [(None, results.dense)] if results.dense else []
    networks += [(point.target, point) for point in results.points]
    found = []
    for target, network in networks:
        names = dict.fromkeys(name for timed in network.latency.values() for name in timed.engines)
        for name in names:
            latency = {
                b: timed.engines[name] for b, timed in network.latency.items() if name in timed.engines
            }
            found.append(Entry(target, name, latency))
    return found


def engine_table(results: Results) -> dict | None:
    """Columns and rows of strings, or None without engines."""
    found = entries(results)
    if not found:
        return None
    timed = []
    for batch in results.batches:
        what = "one image" if batch == 1 else f"{batch} images"
        timed.append(Column(f"Time, {what}", "ms", "median wall-clock time of one forward pass of the batch"))
        timed.append(Column("against dense", "×", "measured time over that of the fastest dense engine"))
    rows = [[entry.network, entry.title, *_cells(results, entry)] for entry in found]
    return {"columns": [Column("Network"), Column("Engine"), *timed], "rows": rows}


def _cells(results: Results, entry: Entry) -> list[str]:
    cells = []
    for batch in results.batches:
        latency = entry.latency.get(batch)
        cells.append(wording.milliseconds(latency.ms, unit=False) if latency else wording.MISSING)
        cells.append(wording.ratio(_ratio(results, batch, latency)) if latency else wording.MISSING)
    return cells


def _ratio(results: Results, batch: int, latency: Latency) -> float | None:
    base = results.dense.latency.get(batch) if results.dense else None
    return latency.ms / base.ms if base and base.ms and latency.ms is not None else latency.ratio


def engine_charts(results: Results) -> dict[str, dict]:
    """One bar chart for each batch size, the dense network's engines on top."""
    made = {}
    for batch in results.batches:
        shown = [entry for entry in entries(results) if batch in entry.latency]
        if not shown:
            continue
        bars = {
            "type": "bar",
            "orientation": "h",
            "x": [entry.latency[batch].ms for entry in shown],
            "y": [charts.escape(f"{entry.network} · {entry.title}") for entry in shown],
            "customdata": [_describe(results, batch, entry) for entry in shown],
            "hovertemplate": charts.HOVER,
            "marker": {
                "color": [charts.DENSE if entry.target is None else charts.DYNAMIC for entry in shown],
                "opacity": [0.45 if entry.engine == "eager" else 0.9 for entry in shown],
            },
        }
        spec = charts.layout(
            xaxis=charts.axis(charts.ms_title(batch), rangemode="tozero"),
            yaxis=charts.axis("", type="category", autorange="reversed"),
            bargap=0.25,
        )
        made[str(batch)] = {"data": [bars], "layout": spec}
    return made


def _describe(results: Results, batch: int, entry: Entry) -> str:
    latency = entry.latency[batch]
    least = f", least {wording.milliseconds(latency.min_ms)}" if latency.min_ms is not None else ""
    return charts.lines(
        f"<b>{charts.escape(entry.network)}: {charts.escape(entry.title)}</b>",
        f"{wording.milliseconds(latency.ms)} for {wording.batch_words(batch)}{least}",
        f"{wording.times(_ratio(results, batch, latency))} the fastest dense engine",
    )


def left_out(results: Results) -> str:
    """One sentence that names the engines that were not timed; empty where all were."""
    named = [f"{wording.engine_name(name)} ({reason})" for name, reason in results.left_out.items()]
    return f"Not timed: {wording.join(named)}." if named else ""
