"""The report of one run: report.html and the PNGs under figures/."""

from __future__ import annotations

from pathlib import Path

from dynaconv._files import atomic_write_bytes, atomic_write_text
from dynaconv.report import charts, engines, figures, tables, wording
from dynaconv.report.gallery import Gallery, load_gallery
from dynaconv.report.page import render
from dynaconv.report.results import Results, load_results


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write ``run_dir/report.html`` and ``run_dir/figures/*.png`` from results.json and gallery.npz.

    The page is one self-contained file that opens without a network. Everything is drawn before anything is
    written, and each file appears whole or not at all. Missing pieces (times, boxes, history, dense baseline,
    gallery) leave a sentence instead of a section.

    Args:
        run_dir: a run folder.
        out: write the page there, and nothing into the run.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the folder has no results.json.
        ValueError: results.json or gallery.npz is broken, of an unknown format, or they belong to different runs.
    """
    run_dir = Path(run_dir)
    results = load_results(run_dir)
    gallery_path = run_dir / "gallery.npz"
    gallery = load_gallery(gallery_path, results) if gallery_path.exists() else None
    page = run_page(results, gallery)
    if out is not None:
        atomic_write_text(out, page)
        return Path(out)
    pictures = figures.run_figures(results, gallery)
    for name in figures.NAMES:
        path = run_dir / "figures" / name
        if name in pictures:
            atomic_write_bytes(path, pictures[name])
        else:
            # A figure of an earlier report would contradict this one.
            path.unlink(missing_ok=True)
    atomic_write_text(run_dir / "report.html", page)
    return run_dir / "report.html"


def run_page(results: Results, gallery: Gallery | None) -> str:
    """The HTML of one run's report."""
    timed = charts.accuracy_vs_ms(results)
    blocks = charts.block_charts(results)
    return render(
        "report.html.j2",
        charts={
            "accuracy_vs_macs": charts.accuracy_vs_macs(results),
            "accuracy_vs_ms": timed,
            "saved": charts.saved_chart(results),
            "engines": engines.engine_charts(results),
            "blocks": blocks,
            "training": charts.training_charts(results),
        },
        gallery=gallery,
        title=results.title,
        version=results.version,
        created=results.created,
        headline=wording.headline(results),
        subline=wording.subline(results),
        cards=wording.cards(results),
        lowest=f"{results.points[0].target:g}" if results.points else "",
        budgets=[
            {"target": f"{p.target:g}", "sentence": wording.budget_sentence(results, p)}
            for p in results.points
        ],
        machine=results.machine,
        sizes=results.sizes,
        batches=[(key, "batch 1" if key == "1" else f"batch {key}") for key in timed],
        saved_sentences=[wording.saved_sentence(p) for p in results.points if wording.saved_sentence(p)],
        saved_missing=wording.saved_missing(results),
        table=run_table(results),
        engines=engines.engine_table(results),
        left_out=engines.left_out(results),
        block_targets=[(target, target) for target in blocks],
        facts=wording.facts(results),
        definitions=wording.definitions(),
        notes=results.notes,
    )


def run_table(results: Results) -> dict:
    """Columns and rows of all numbers, the dense network first."""
    boxes = any(point.density_inside is not None for point in results.points)
    rows = [tables.dense_cells(results.dense, results.batches, boxes)] if results.dense else []
    rows += [tables.point_cells(point, results.batches, boxes) for point in results.points]
    columns = tables.columns(results.batches, boxes)
    return {"columns": columns, "rows": rows, "has_dense": results.dense is not None, "has_boxes": boxes}
