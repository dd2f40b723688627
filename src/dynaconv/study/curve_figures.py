"""Figures of the study: accuracy against multiply-adds, milliseconds, size of pictures and share of the object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynaconv.report.figures import house_style, new_figure, png
from dynaconv.study.curve_points import batches_of, verdict
from dynaconv.study.curve_settings import DENSE, TITLES

COLOURS = {
    DENSE: "#1a1e24",
    "dynconv": "#0b6bb0",
    "layer-gate": "#b9520f",
    "halting": "#00805c",
    "halting-image": "#6fa88f",
    "channel-gate": "#8a6d00",
    "random": "#a8477f",
    "narrow": "#6a6f78",
}
MARKERS = {
    DENSE: "s",
    "dynconv": "o",
    "layer-gate": "^",
    "halting": "D",
    "halting-image": "d",
    "channel-gate": "P",
    "random": "X",
    "narrow": "v",
}
GREY = "#8a929b"
Points = Sequence[Mapping[str, Any]]


def all_figures(points: Points, data: str) -> dict[str, bytes]:
    """PNG bytes by file name; what nothing was trained or timed for is left out."""
    shown = [p for p in points if p["accuracy_mean"] is not None]
    if not shown:
        return {}
    name = data.partition(":")[0]
    with house_style():
        made = {"accuracy-macs.png": _against_macs(shown, name)}
        if batches_of(shown):
            made["accuracy-ms.png"] = _against_ms(shown, name)
        if len({p["image_size"] for p in shown}) > 1:
            made["image-size.png"] = _against_size(shown, name)
        if len({p["object_share"] for p in shown} - {None}) > 1:
            made["object-share.png"] = _against_share(shown, name)
        return {file: png(figure) for file, figure in made.items()}


def _against_macs(points: Points, name: str) -> Any:
    groups = _by_pictures(points)
    figure, axes = new_figure(max(7.0, 5.2 * len(groups)), 4.6, len(groups))
    for axis, (title, own) in zip(axes, groups.items(), strict=True):
        _curves(axis, own, [p["executed_macs_mean"] / 1e6 for p in own])
        axis.set(xlabel="executed multiply-adds of one image (millions)", ylabel="test accuracy (%)")
        axis.set_title(title or f"Accuracy against MACs, {name}")
    _legend(figure, axes, _spread(points))
    return figure


def _against_ms(points: Points, name: str) -> Any:
    batches = batches_of(points)
    groups = _by_pictures([p for p in points if any(p.get(f"ms_{b}") is not None for b in batches)])
    panels = [(title, own, batch) for title, own in groups.items() for batch in batches]
    figure, axes = new_figure(max(7.0, 5.2 * len(panels)), 4.6, len(panels))
    for axis, (title, own, batch) in zip(axes, panels, strict=True):
        timed = [p for p in own if p.get(f"ms_{batch}") is not None]
        xs = [p[f"ms_{batch}"] for p in timed]
        _curves(axis, timed, xs)
        for point, x in zip(timed, xs, strict=True):
            if verdict(point, own, batch) == "beat":
                at = (x, 100 * point["accuracy_mean"])
                axis.plot(*at, marker="o", ms=14, mfc="none", mec=COLOURS[point["method"]], mew=1.2)
        axis.set(xlabel=f"milliseconds of a batch of {batch}", ylabel="test accuracy (%)")
        axis.set_title(f"{title or name}, batch {batch}; ringed: beats static networks")
    _legend(figure, axes, f"{_spread(points)}; static networks in their fastest engine, float32")
    return figure


def _against_size(points: Points, name: str) -> Any:
    """A line for each network through all sizes of pictures: budgets do not change along it."""
    figure, (axis,) = new_figure(7.6, 4.6)
    full = max((p["width"] or 0 for p in points if p["method"] == DENSE), default=0)
    kept = [
        p for p in points if p["object_share"] is None and (p["method"] != DENSE or (p["width"] or 0) == full)
    ]
    for key in dict.fromkeys((p["method"], p["budget"]) for p in kept):
        own = sorted((p for p in kept if (p["method"], p["budget"]) == key), key=lambda p: p["image_size"])
        label = TITLES[key[0]] if key[1] is None else f"{TITLES[key[0]]} {key[1]:g}"
        _line(axis, own, [p["executed_macs_mean"] / 1e6 for p in own], key[0], label, "--")
        for point in own:
            at = (point["executed_macs_mean"] / 1e6, 100 * point["accuracy_mean"])
            axis.annotate(
                f"{point['image_size']}", at, (5, -11), textcoords="offset points", fontsize=8, color=GREY
            )
    axis.set(xlabel="executed multiply-adds of one image (millions)", ylabel="test accuracy (%)")
    axis.set_title(f"Along the size of the pictures (pixels at the points), {name}")
    _legend(figure, [axis], _spread(points))
    return figure


def _against_share(points: Points, name: str) -> Any:
    """Accuracy as the object shrinks, and how far each network is from the static one on the same pictures."""
    figure, (left, right) = new_figure(11.0, 4.6, 2)
    kept = [p for p in points if p["object_share"] is not None]
    full = {p["object_share"]: p for p in sorted(kept, key=lambda p: p["width"] or 0) if p["method"] == DENSE}
    for key in dict.fromkeys((p["method"], p["budget"]) for p in kept if p["method"] != DENSE):
        own = sorted((p for p in kept if (p["method"], p["budget"]) == key), key=lambda p: p["object_share"])
        label = f"{TITLES[key[0]]} {key[1]:g}"
        alpha = 0.45 + 0.55 * key[1]
        _line(left, own, [p["object_share"] for p in own], key[0], label, "-", alpha)
        known = [p for p in own if p["object_share"] in full]
        lost = [100 * (p["accuracy_mean"] - full[p["object_share"]]["accuracy_mean"]) for p in known]
        right.plot(
            [p["object_share"] for p in known],
            lost,
            MARKERS[key[0]] + "-",
            color=COLOURS[key[0]],
            alpha=alpha,
        )
    own = [full[share] for share in sorted(full)]
    if own:
        _line(left, own, [p["object_share"] for p in own], DENSE, "static, full width", "-")
        right.axhline(0.0, color=COLOURS[DENSE], lw=1)
    for axis in (left, right):
        axis.set_xscale("log")
        shares = sorted({p["object_share"] for p in kept})
        axis.set_xticks(shares, [f"{share:g}" for share in shares])
        axis.minorticks_off()
        axis.set_xlabel("share of the picture that the object's box covers")
    left.set_ylabel("test accuracy (%)")
    left.set_title(f"Accuracy as the object shrinks, {name}")
    right.set_ylabel("minus the full static network (points)")
    right.set_title("What the budget costs")
    _legend(figure, [left], _spread(points))
    return figure


def _by_pictures(points: Points) -> dict[str, Points]:
    """Points on the same pictures, by a title that is empty where there is one kind only."""
    keys = dict.fromkeys((p["image_size"], p["object_share"]) for p in points)
    groups = {}
    for size, share in keys:
        title = f"{size} pixels" + ("" if share is None else f", object {share:g} of the picture")
        own = [p for p in points if (p["image_size"], p["object_share"]) == (size, share)]
        groups[title if len(keys) > 1 else ""] = own
    return groups


def _curves(axis: Any, points: Points, xs: Sequence[float]) -> None:
    """A line for each method through its budgets or widths."""
    for method in dict.fromkeys(p["method"] for p in points):
        own = sorted((x, i) for i, x in enumerate(xs) if points[i]["method"] == method)
        _line(axis, [points[i] for _, i in own], [x for x, _ in own], method, TITLES[method], "-")
    axis.set_xlim(left=0)


def _line(
    axis: Any, points: Points, xs: Sequence[float], method: str, label: str, style: str, alpha: float = 1.0
) -> None:
    axis.errorbar(
        xs,
        [100 * p["accuracy_mean"] for p in points],
        yerr=[100 * (p["accuracy_std"] or 0.0) for p in points],
        fmt=MARKERS[method] + style,
        color=COLOURS[method],
        ms=6,
        lw=1.4,
        elinewidth=1.1,
        capsize=3,
        alpha=alpha,
        label=label,
    )


def _spread(points: Points) -> str:
    seeds = max(p["seeds"] for p in points)
    return f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed"


def _legend(figure: Any, axes: Sequence[Any], note: str) -> None:
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    legend = figure.legend(
        found.values(),
        found.keys(),
        loc="outside lower center",
        ncols=min(len(found), int(figure.get_figwidth() / 1.8)),
        frameon=False,
    )
    legend.set_title(note)
