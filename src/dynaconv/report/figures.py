"""Still pictures of a run as PNG bytes: the report's figures for READMEs and slides (matplotlib, no display)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from dynaconv import _checks
from dynaconv.report import charts, contact_sheet, engines
from dynaconv.report.gallery import Gallery
from dynaconv.report.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = (
    "accuracy_vs_macs.png",
    "accuracy_vs_ms.png",
    "block_density.png",
    "engines.png",
    "gallery.png",
    "training.png",
)
DPI = 200
BLUE, ORANGE, GREEN, PINK = "#0b6bb0", "#b9520f", "#00805c", "#a8477f"
BUDGET_COLOURS = ("#0b4f8a", "#3f9bd9", "#a9d3f0", "#cfd6dc", "#e3e3e3")


@contextmanager
def house_style() -> Iterator[None]:
    """Our fonts and colours for the block; global settings and names from files cannot break a figure."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise _checks.report_missing_package(error.name) from None
    style = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9.5,
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#8a929b",
        "axes.labelcolor": "#1a1e24",
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e7e4dd",
        "xtick.color": "#59626d",
        "ytick.color": "#59626d",
        "legend.frameon": False,
        "figure.facecolor": "white",
    }
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes, the same for the same content."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def run_figures(results: Results, gallery: Gallery | None) -> dict[str, bytes]:
    """PNG bytes by file name, without the figures that nothing was recorded for."""
    made: dict[str, Figure | None] = {}
    with house_style():
        made["accuracy_vs_macs.png"] = accuracy_vs_macs(results)
        made["accuracy_vs_ms.png"] = accuracy_vs_ms(results)
        made["block_density.png"] = block_density(results)
        made["engines.png"] = engine_bars(results)
        made["training.png"] = training(results)
        if gallery is not None and len(gallery):
            made["gallery.png"] = contact_sheet.contact_sheet(gallery)
        return {name: png(figure) for name, figure in made.items() if figure is not None}


def overlay(gallery: Gallery, index: int) -> bytes:
    """One picture with its computation map and two block masks, as PNG bytes."""
    with house_style():
        return png(contact_sheet.overlay(gallery, index))


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list]:
    """An empty figure with its axes, in the report's style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def _accuracy_axes(axes, results: Results, cost: Callable, label: str) -> bool:
    """Draw one accuracy plot; False where there is nothing to draw."""
    count = results.sizes.get("test")
    points = sorted((p for p in results.points if p.accuracy is not None and cost(p) is not None), key=cost)
    dense = results.dense if results.dense and results.dense.accuracy is not None else None
    dense_cost = cost(dense) if dense else None
    if not points and dense_cost is None:
        return False
    if points:
        xs, ys = [cost(p) for p in points], [100 * p.accuracy for p in points]
        errors = [charts.standard_error(p.accuracy, count) for p in points]
        axes.errorbar(
            xs,
            ys,
            yerr=errors,
            color=BLUE,
            marker="o",
            ms=7,
            lw=1.8,
            elinewidth=1,
            capsize=3,
            label="dynamic",
        )
        for point, x, y in zip(points, xs, ys, strict=True):
            axes.annotate(
                f"budget {point.target:g}",
                (x, y),
                (7, -14),
                textcoords="offset points",
                color=BLUE,
                fontsize=8.5,
            )
    if dense_cost is not None:
        y, error = 100 * dense.accuracy, charts.standard_error(dense.accuracy, count)
        axes.axhline(y, color=ORANGE, lw=1, ls=":")
        axes.errorbar(
            [dense_cost],
            [y],
            yerr=[error],
            color=ORANGE,
            marker="D",
            mfc="white",
            mew=2,
            ms=8,
            elinewidth=1,
            capsize=3,
        )
        axes.annotate(
            "dense",
            (dense_cost, y),
            (-4, 10),
            textcoords="offset points",
            color=ORANGE,
            ha="right",
            fontsize=9,
        )
    costs = [cost(p) for p in points] + ([dense_cost] if dense_cost is not None else [])
    axes.set(xlim=(0, 1.14 * max(costs)), ylim=charts.accuracy_range(charts.accuracies(results)))
    axes.set(xlabel=label, ylabel="accuracy (%), zoomed axis")
    return True


def accuracy_vs_macs(results: Results) -> Figure | None:
    """Accuracy against executed MACs, or None without points."""
    figure, (axes,) = new_figure(6.4, 4.2)
    axes.set_title("Accuracy against executed MACs")
    return figure if _accuracy_axes(axes, results, charts.macs_of, "executed MMac per image") else None


def accuracy_vs_ms(results: Results) -> Figure | None:
    """One panel per batch size, at most three."""
    batches = [b for b in results.batches if charts.series(results, charts.ms_of(b), "", BLUE)][:3]
    if not batches:
        return None
    figure, panels = new_figure(1.6 + 4.4 * len(batches), 4.2, len(batches))
    for axes, batch in zip(panels, batches, strict=True):
        label = "ms per image (batch 1)" if batch == 1 else f"ms per batch of {batch} images"
        _accuracy_axes(axes, results, charts.ms_of(batch), label)
        axes.set_title(f"Accuracy against measured time, batch {batch}")
    if results.machine:
        shown = results.machine if len(results.machine) <= 130 else results.machine[:127] + "..."
        figure.supxlabel(shown, fontsize=7, color="#59626d")
    return figure


def block_density(results: Results) -> Figure | None:
    """Mean density per block, a bar per budget; whiskers are one std over images, cut at 0 and 1."""
    points = [p for p in results.points if p.blocks]
    if not points:
        return None
    names = list(dict.fromkeys(block.name for p in points for block in p.blocks))
    figure, (axes,) = new_figure(min(18.0, max(6.4, 1.6 + 0.24 * len(names) * len(points))), 4.0)
    width = 0.82 / len(points)
    for index, point in enumerate(points):
        known = {block.name: block for block in point.blocks}
        shown = [(place, known[name]) for place, name in enumerate(names) if name in known]
        xs = [place + (index - (len(points) - 1) / 2) * width for place, _ in shown]
        means = np.array([block.density_mean for _, block in shown])
        spreads = np.array([block.density_std or 0.0 for _, block in shown])
        errors = np.stack([np.minimum(spreads, means), np.minimum(spreads, 1 - means)])
        colour = BUDGET_COLOURS[index % len(BUDGET_COLOURS)]
        style = {"ecolor": "#1a1e24", "elinewidth": 0.9, "capsize": 2}
        axes.bar(
            xs,
            means,
            width * 0.92,
            yerr=errors,
            color=colour,
            label=f"budget {point.target:g}",
            error_kw=style,
        )
    axes.set(ylim=(0, 1.02), ylabel="density (share of positions)")
    axes.set_xticks(
        range(len(names)),
        names,
        rotation=35 if len(names) > 5 else 0,
        ha="right" if len(names) > 5 else "center",
    )
    axes.grid(axis="x", visible=False)
    axes.set_title("Density per block (whiskers: std over images)", pad=24)
    axes.legend(
        ncols=5,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.2,
        columnspacing=1.2,
        handlelength=1.2,
    )
    return figure


def engine_bars(results: Results) -> Figure | None:
    """Milliseconds of every engine, a panel per batch size, at most three."""
    found = engines.entries(results)
    batches = [batch for batch in results.batches if any(batch in entry.latency for entry in found)][:3]
    if not batches:
        return None
    figure, panels = new_figure(1.6 + 4.4 * len(batches), 1.4 + 0.26 * len(found), len(batches))
    for axes, batch in zip(panels, batches, strict=True):
        shown = [entry for entry in found if batch in entry.latency][::-1]
        names = [f"{entry.network}: {entry.title}" for entry in shown]
        colours = [ORANGE if entry.target is None else BLUE for entry in shown]
        bars = axes.barh(names, [entry.latency[batch].ms for entry in shown], color=colours, height=0.7)
        for bar, entry in zip(bars, shown, strict=True):
            bar.set_alpha(0.45 if entry.engine == "eager" else 0.9)
        axes.bar_label(bars, [f"{entry.latency[batch].ms:.3g}" for entry in shown], padding=3, fontsize=8)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.14)
        axes.set(xlabel="ms per image (batch 1)" if batch == 1 else f"ms per batch of {batch} images")
        axes.set_title(f"Every engine, batch {batch}")
    return figure


def training(results: Results) -> Figure | None:
    """Loss, accuracy and executed ratio per epoch, from the same specs as the page."""
    specs = charts.training_charts(results)
    if not specs:
        return None
    titles = {"loss": "Loss", "accuracy": "Validation accuracy", "ratio": "Conditional MACs executed"}
    colours = {charts.DENSE: ORANGE, charts.DYNAMIC: BLUE}
    dashes = {"solid": "-", "dot": ":"}
    figure, panels = new_figure(1.2 + 3.7 * len(specs), 3.5, len(specs))
    for axes, (key, spec) in zip(panels, specs.items(), strict=True):
        for index, trace in enumerate(spec["data"]):
            line = trace["line"]
            colour = colours.get(line["color"], (GREEN, PINK)[index % 2])
            name = next(
                run for run in [*charts.runs_of(results), ""] if trace["name"].startswith(charts.escape(run))
            )
            label = trace["name"] if key == "loss" else name
            axes.plot(
                trace["x"],
                trace["y"],
                color=colour,
                ls=dashes[line["dash"]],
                lw=1.7,
                marker=".",
                ms=4,
                label=label,
            )
        axes.set_title(titles[key])
        axes.set(xlabel="epoch", ylabel=spec["layout"]["yaxis"]["title"]["text"])
        if key != "accuracy":
            axes.set_ylim(bottom=0)
        axes.legend(fontsize=8.5)
    return figure
