"""Interactive charts as plain plotly dictionaries; colours are CSS variables the page resolves for light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable
from typing import Any

from dynaconv.report import wording
from dynaconv.report.results import Block, Epoch, Latency, Point, Results

DENSE, DYNAMIC = "var(--dense)", "var(--dynamic)"
SERIES = ["var(--s1)", "var(--s2)", "var(--s3)", "var(--s4)", "var(--s5)", "var(--s6)"]
SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "star"]
HOVER = "%{customdata}<extra></extra>"


def escape(text: str) -> str:
    """Plotly reads a subset of HTML in labels, so names from files are escaped there too."""
    return html.escape(str(text), quote=False)


def lines(*rows: str) -> str:
    """Join the rows of a hover text with HTML line breaks."""
    return "<br>".join(row for row in rows if row)


def axis(title: str, **extra) -> dict:
    """Plotly settings of an axis."""
    return {"title": {"text": title, "standoff": 10}, "automargin": True, "zeroline": False, **extra}


def layout(**extra) -> dict:
    """Plotly layout that all charts share."""
    return {
        "margin": {"l": 56, "r": 18, "t": 14, "b": 52},
        "hovermode": "closest",
        "showlegend": False,
        **extra,
    }


def accuracy_range(values: Iterable[float]) -> list[float]:
    """Zoomed accuracy axis in percent: the values with air around them, on whole percents, inside 0..100."""
    shown = [100 * value for value in values]
    if not shown:
        return [0, 100]
    air = max(1.0, 0.35 * (max(shown) - min(shown)))
    return [max(0, math.floor(min(shown) - air)), min(100.4, math.ceil(max(shown) + air))]


def standard_error(accuracy: float, count: int | None) -> float:
    """Binomial standard error of an accuracy over ``count`` test images, in percent; 0 where count is unknown."""
    return 100 * math.sqrt(accuracy * (1 - accuracy) / count) if count else 0.0


def describe_point(results: Results, point: Point) -> str:
    """Everything known about one budget, for hovering."""
    timed = [
        f"time, {wording.batch_words(batch)}: {wording.milliseconds(lat.ms)}"
        + (f" = {wording.times(lat.ratio)} dense" if lat.ratio is not None else "")
        + (f", least {wording.milliseconds(lat.min_ms)}" if lat.min_ms is not None else "")
        for batch, lat in point.latency.items()
    ]
    return lines(
        f"<b>dynamic, budget {point.target:g}</b>",
        f"accuracy {wording.percent(point.accuracy, 2)}",
        f"executed {wording.mmac(point.executed_macs)} per image, {wording.times(point.macs_ratio)} dense",
        f"of which routing {wording.mmac(point.routing_macs)}" if point.routing_macs is not None else "",
        f"conditional MACs executed, held-out: {wording.ratio(point.ratio, 3)}"
        if point.ratio is not None
        else "",
        *timed,
        f"density in the box {wording.ratio(point.density_inside)}, outside {wording.ratio(point.density_outside)}"
        if point.density_inside is not None
        else "",
    )


def describe_dense(results: Results) -> str:
    """Hover text of the dense network."""
    dense = results.dense
    timed = [
        f"time, {wording.batch_words(batch)}: {wording.milliseconds(lat.ms)}"
        for batch, lat in dense.latency.items()
    ]
    return lines(
        f"<b>dense: {escape(dense.name)}</b>",
        f"accuracy {wording.percent(dense.accuracy, 2)}",
        f"{wording.mmac(dense.macs)} per image",
        f"{dense.params:,} parameters" if dense.params else "",
        *timed,
    )


def series(
    results: Results, cost, name: str, colour: str, symbol: str = "circle", prefix: str = ""
) -> list[dict]:
    """Traces accuracy (%) against ``cost(entry)``: the budgets as a line, the dense network as an open diamond."""
    count = results.sizes.get("test")
    shown = [p for p in results.points if p.accuracy is not None and cost(p) is not None]
    shown.sort(key=cost)
    traces = []
    if shown:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers+text",
                "name": escape(name),
                "x": [cost(p) for p in shown],
                "y": [100 * p.accuracy for p in shown],
                "text": [f"{p.target:g}" for p in shown],
                "textposition": "bottom center",
                "textfont": {"color": colour},
                "customdata": [prefix + describe_point(results, p) for p in shown],
                "hovertemplate": HOVER,
                "line": {"color": colour, "width": 2},
                "marker": {"color": colour, "size": 11, "symbol": symbol},
                "error_y": {
                    "array": [standard_error(p.accuracy, count) for p in shown],
                    "visible": bool(count),
                    "thickness": 1,
                    "width": 4,
                    "color": colour,
                },
            }
        )
    dense = results.dense
    if dense and dense.accuracy is not None and cost(dense) is not None:
        colour = colour if prefix else DENSE
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": escape(f"{name}, dense" if prefix else "dense"),
                "x": [cost(dense)],
                "y": [100 * dense.accuracy],
                "text": ["dense"],
                "textposition": "top center",
                "textfont": {"color": colour},
                "customdata": [prefix + describe_dense(results)],
                "hovertemplate": HOVER,
                "marker": {
                    "color": colour,
                    "size": 13,
                    "symbol": "diamond-open",
                    "line": {"width": 2.5, "color": colour},
                },
                "error_y": {
                    "array": [standard_error(dense.accuracy, count)],
                    "visible": bool(count),
                    "thickness": 1,
                    "width": 4,
                    "color": colour,
                },
            }
        )
    return traces


def macs_of(entry) -> float | None:
    """MMac per image of a point (executed) or of the dense network (all)."""
    macs = entry.executed_macs if isinstance(entry, Point) else entry.macs
    return None if macs is None else macs / 1e6


def ms_of(batch: int) -> Callable[[Any], float | None]:
    """Function: milliseconds of a point or the dense network at one batch size."""

    def cost(entry) -> float | None:
        latency: Latency | None = entry.latency.get(batch)
        return latency.ms if latency else None

    return cost


def ms_title(batch: int) -> str:
    """Axis title for milliseconds at this batch size."""
    return "ms per image (batch 1), from 0" if batch == 1 else f"ms per batch of {batch} images, from 0"


def accuracies(results: Results) -> list[float]:
    """Both ends of every accuracy's whisker, 0..1."""
    networks = [*results.points, *([results.dense] if results.dense else [])]
    values = [network.accuracy for network in networks if network.accuracy is not None]
    errors = [standard_error(value, results.sizes.get("test")) / 100 for value in values]
    return [value + sign * error for value, error in zip(values, errors, strict=True) for sign in (-1, 1)]


def accuracy_chart(
    all_traces: list[list[dict]], title: str, values: list[float], legend: bool = False
) -> dict | None:
    """One chart spec with ``zoom`` (accuracy axis near the values) and the full 0..100 range for the page's switch."""
    traces = [trace for traces in all_traces for trace in traces]
    if not traces:
        return None
    low, high = accuracy_range(values)
    largest = max(x for trace in traces for x in trace["x"])
    spec = layout(
        xaxis=axis(title, range=[0, 1.12 * largest]),
        yaxis=axis("accuracy (%)", range=[low, high]),
        showlegend=legend,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    return {"data": traces, "layout": spec, "zoom": [low, high], "full": [0, 103]}


def accuracy_vs_macs(results: Results) -> dict | None:
    """Accuracy (%) against executed MMac per image, dense included."""
    traces = series(results, macs_of, "dynamic", DYNAMIC)
    return accuracy_chart([traces], "executed MMac per image, from 0", accuracies(results))


def accuracy_vs_ms(results: Results) -> dict[str, dict]:
    """The same against measured milliseconds, one spec per batch size."""
    charts = {}
    for batch in results.batches:
        traces = series(results, ms_of(batch), "dynamic", DYNAMIC)
        chart = accuracy_chart([traces], ms_title(batch), accuracies(results))
        if chart:
            charts[str(batch)] = chart
    return charts


def saved_chart(results: Results) -> dict | None:
    """Time ratio against MAC ratio (dynamic / dense); the diagonal is where every MAC saved is time saved."""
    traces, largest = [], 1.0
    for index, batch in enumerate(results.batches):
        shown = [
            p
            for p in results.points
            if p.macs_ratio is not None and batch in p.latency and p.latency[batch].ratio is not None
        ]
        if not shown:
            continue
        shown.sort(key=lambda p: p.macs_ratio)
        ys = [p.latency[batch].ratio for p in shown]
        largest = max(largest, *ys, *(p.macs_ratio for p in shown))
        colour = SERIES[index % len(SERIES)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers+text",
                "name": f"batch {batch}",
                "x": [p.macs_ratio for p in shown],
                "y": ys,
                "text": [f"{p.target:g}" for p in shown],
                "textposition": "top center",
                "textfont": {"color": colour},
                "customdata": [describe_point(results, p) for p in shown],
                "hovertemplate": HOVER,
                "line": {"color": colour, "width": 2, "dash": ["solid", "dash", "dot"][index % 3]},
                "marker": {"color": colour, "size": 11, "symbol": SYMBOLS[index % len(SYMBOLS)]},
            }
        )
    if not traces:
        return None
    end = 1.08 * largest
    limit = {
        "type": "scatter",
        "mode": "lines",
        "name": "limit: time saved = MACs saved",
        "x": [0, end],
        "y": [0, end],
        "line": {"color": "var(--muted)", "width": 1.5, "dash": "dot"},
        "hoverinfo": "skip",
    }
    dense_line = {
        **limit,
        "name": "dense time",
        "y": [1, 1],
        "line": {"color": DENSE, "width": 1.5},
    }
    spec = layout(
        xaxis=axis("executed MACs, dynamic / dense", range=[0, end]),
        yaxis=axis("measured time, dynamic / dense", range=[0, end]),
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    return {"data": [limit, dense_line, *traces], "layout": spec}


def describe_block(block: Block) -> str:
    """Hover text of one block's bar."""
    return lines(
        f"<b>{escape(block.name)}</b>",
        f"density {wording.percent(block.density_mean)} of positions"
        + (
            f", std over images {wording.percent(block.density_std)}" if block.density_std is not None else ""
        ),
        f"executed {wording.mmac(block.executed_macs)} of {wording.mmac(block.dense_macs)} per image"
        if block.dense_macs is not None
        else "",
    )


def block_chart(point: Point) -> dict | None:
    """Mean density per block at one budget; whiskers are one std over images, cut at 0 and 1."""
    if not point.blocks:
        return None
    means = [block.density_mean for block in point.blocks]
    spreads = [block.density_std or 0 for block in point.blocks]
    bars = {
        "type": "bar",
        "x": [escape(block.name) for block in point.blocks],
        "y": means,
        "customdata": [describe_block(block) for block in point.blocks],
        "hovertemplate": HOVER,
        "marker": {"color": DYNAMIC, "opacity": 0.85},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [min(s, 1 - m) for m, s in zip(means, spreads, strict=True)],
            "arrayminus": [min(s, m) for m, s in zip(means, spreads, strict=True)],
            "thickness": 1.5,
            "width": 5,
            "color": "var(--ink)",
        },
    }
    spec = layout(
        xaxis=axis("masked block, in forward order", type="category"),
        yaxis=axis("density (share of positions)", range=[0, 1.02]),
        bargap=0.35,
    )
    return {"data": [bars], "layout": spec}


def block_charts(results: Results) -> dict[str, dict]:
    """One bar chart of block densities for each budget."""
    charts = {f"{point.target:g}": block_chart(point) for point in results.points}
    return {target: chart for target, chart in charts.items() if chart}


def _curve(rows: list[Epoch], field: str, name: str, colour: str, dash: str, scale: float) -> dict | None:
    shown = [row for row in rows if getattr(row, field) is not None]
    if not shown:
        return None
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(shown) < 40 else "lines",
        "name": escape(name),
        "x": [row.epoch for row in shown],
        "y": [scale * getattr(row, field) for row in shown],
        "line": {"color": colour, "width": 2, "dash": dash},
        "marker": {"color": colour, "size": 5},
        "hovertemplate": "epoch %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
    }


def runs_of(results: Results) -> dict[str, list[Epoch]]:
    """Epochs of the history by run."""
    runs: dict[str, list[Epoch]] = {}
    for row in results.history:
        runs.setdefault(row.run, []).append(row)
    return runs


def training_charts(results: Results) -> dict[str, dict]:
    """Loss, accuracy and conditional-MAC ratio per epoch, one spec each; absent where nothing was recorded."""
    runs = runs_of(results)
    colours = {"dense": DENSE, "dynamic": DYNAMIC}
    panels = {
        "loss": (
            [("train_loss", "train", "dot"), ("val_loss", "validation", "solid")],
            "loss",
            1,
            {"rangemode": "tozero"},
        ),
        "accuracy": ([("val_accuracy", "validation", "solid")], "validation accuracy (%)", 100, {}),
        "ratio": ([("ratio", "", "solid")], "conditional MACs executed / dense", 1, {"range": [0, 1.02]}),
    }
    charts = {}
    for key, (fields, title, scale, extra) in panels.items():
        traces = []
        for index, (run, rows) in enumerate(runs.items()):
            colour = colours.get(run, SERIES[index % len(SERIES)])
            traces += [
                _curve(rows, f, f"{run} {word}".strip(), colour, dash, scale) for f, word, dash in fields
            ]
        traces = [trace for trace in traces if trace]
        if traces:
            spec = layout(
                xaxis=axis("epoch"),
                yaxis=axis(title, **extra),
                showlegend=True,
                legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            )
            charts[key] = {"data": traces, "layout": spec}
    return charts
