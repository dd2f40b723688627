"""The report: whole, offline, escaped, and content with what there is."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path

import numpy as np
import pytest
from tests.report.synthetic import make_gallery, make_results, with_engines, write_run

from dynaconv.report import charts, engines, write_comparison, write_explanation, write_report
from dynaconv.report.gallery import load_gallery
from dynaconv.report.results import load_results


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    run = write_run(tmp_path_factory.mktemp("run"))
    return write_report(run).read_text(encoding="utf-8")


def test_one_file_that_loads_nothing(page: str) -> None:
    assert not re.search(r"<(script|img|link|iframe)[^>]+(src|href)=[\"']?(https?:)?//", page)
    assert not re.search(r"@import|url\([\"']?https?:", page)
    assert page.lstrip().lower().startswith("<!doctype html>")


def test_numbers_are_on_the_page(page: str) -> None:
    results = make_results()
    assert results["machine"] in page and results["command"] in page
    for point in results["points"]:
        assert f"{100 * point['accuracy']:.1f}" in page
        assert f"{point['ratio']:.3f}" in page
    assert "NaN" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)


def test_figures_and_determinism(tmp_path: Path) -> None:
    texts = []
    for name in "ab":
        run = write_run(tmp_path / name)
        texts.append(write_report(run).read_text(encoding="utf-8"))
        figures = {p.name: p.stat().st_size for p in (run / "figures").iterdir()}
        wanted = ("accuracy_vs_macs", "accuracy_vs_ms", "block_density", "gallery", "training")
        assert all(figures[f"{w}.png"] > 5000 for w in wanted)
        assert sorted(p.name for p in run.iterdir()) == [
            "figures",
            "gallery.npz",
            "report.html",
            "results.json",
        ]
    assert texts[0] == texts[1]


def test_every_engine_is_shown_where_the_file_tells_them_apart(page: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", with_engines(make_results()), {})
    text = write_report(run).read_text(encoding="utf-8")
    assert "Every engine" in text and "Every engine" not in page
    for told in ("ONNX Runtime", "OpenVINO bf16", "eager executor", "with dynaconv"):
        assert told in text
    assert "Not timed: torch.compile (needs a C++ compiler such as g++)." in text
    assert (run / "figures" / "engines.png").stat().st_size > 5000
    results = load_results(run)
    found = engines.entries(results)
    assert [e.title for e in found[:5]] == [
        "dynaconv", "PyTorch eager", "ONNX Runtime", "OpenVINO f32", "OpenVINO bf16",
    ]  # fmt: skip
    table = engines.engine_table(results)
    assert len(table["rows"]) == 5 + 2 * 3 and all(len(row) == len(table["columns"]) for row in table["rows"])
    assert [row[3] for row in table["rows"][:3]] == ["1.00", "1.60", "1.10"]
    charts_ = engines.engine_charts(results)
    assert set(charts_) == {"1", "32"} and len(charts_["1"]["data"][0]["x"]) == 11


def test_names_from_files_are_escaped(tmp_path: Path) -> None:
    results = make_results()
    results["dataset"]["classes"] = ["<script>alert(1)</script>"] * 10
    results["notes"] = ["<img src=x onerror=alert(1)>"]
    text = write_report(write_run(tmp_path / "run", results)).read_text(encoding="utf-8")
    assert "<script>alert(1)" not in text and "<img src=x" not in text


def without(*path: str) -> dict:
    results = copy.deepcopy(make_results())
    if path == ("latency",):
        for entry in (results["dense"], *results["points"]):
            entry.pop("latency")
    elif path == ("boxes",):
        for point in results["points"]:
            point["density_inside"] = point["density_outside"] = None
    elif path == ("one point",):
        results["points"] = results["points"][:1]
    else:
        results[path[0]] = [] if isinstance(results[path[0]], list) else None
    return results


@pytest.mark.parametrize("missing", ["latency", "boxes", "history", "dense", "one point", "notes", "points"])
def test_missing_parts_are_left_out(missing: str, tmp_path: Path) -> None:
    gallery = make_gallery() if missing != "points" else {}
    if missing == "boxes":
        gallery.pop("boxes")
    results = without(missing)
    if missing == "one point":
        gallery = {}
    text = write_report(write_run(tmp_path / "run", results, gallery)).read_text(encoding="utf-8")
    assert results["machine"] in text
    assert ">None<" not in text and ">nan<" not in text.lower()


def test_comparison_and_explanation(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("first", "second")]
    text = write_comparison(runs, tmp_path / "both.html").read_text(encoding="utf-8")
    assert "first" in text and "second" in text
    out = write_explanation(runs[0] / "gallery.npz", tmp_path / "out" / "explain.html", title="Mine")
    assert "Mine" in out.read_text(encoding="utf-8")
    assert len(list(out.parent.glob("*.png"))) == len(make_gallery()["labels"])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, FileNotFoundError),
        ('{"format": 1', ValueError),
        ('{"format": 99}', ValueError),
        ("[]", ValueError),
    ],
)
def test_bad_results_get_one_sentence(content: str | None, error: type, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(error, match="results.json"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_gallery_gets_one_sentence(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", gallery=make_gallery(count=2, size=32))
    whole = (run / "gallery.npz").read_bytes()
    flips = np.random.default_rng(0).integers(0, len(whole), (40, 3))
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    refused = 0
    for damaged in [
        whole[: len(whole) // 2],
        b"",
        array.getvalue(),
        *(flip(whole, places) for places in flips),
    ]:
        (run / "gallery.npz").write_bytes(damaged)
        try:
            load_gallery(run / "gallery.npz")
        except ValueError as error:
            assert "gallery" in str(error)
            refused += 1
    assert refused > 20


def flip(data: bytes, places: np.ndarray) -> bytes:
    changed = bytearray(data)
    for place in places:
        changed[place] ^= 0x55
    return bytes(changed)


def test_the_zoomed_axis_holds_the_whiskers(tmp_path: Path) -> None:
    raw = make_results()
    raw["dataset"]["test"] = 64
    chart = charts.accuracy_vs_macs(load_results(write_run(tmp_path, raw, {})))
    low, high = chart["zoom"]
    for trace in chart["data"]:
        for y, error in zip(trace["y"], trace["error_y"]["array"], strict=True):
            assert low <= y - error and min(100, y + error) <= high


def test_names_are_escaped_in_comparisons_and_explanations(tmp_path: Path) -> None:
    results = make_results()
    results["title"] = results["dense"]["name"] = results["machine"] = "<script>alert(1)</script>"
    run = write_run(tmp_path / "<script>alert(1)", results)
    gallery = make_gallery(count=2, size=32)
    gallery["names"] = np.array(["<script>alert(1).png", "../b.png"])
    write_run(run, results, gallery)
    pages = [
        write_comparison([run], tmp_path / "both.html"),
        write_explanation(run / "gallery.npz", tmp_path / "out" / "explain.html"),
    ]
    assert all("<script>alert(1)" not in page.read_text(encoding="utf-8") for page in pages)
    assert len(list((tmp_path / "out").glob("explain-*.png"))) == 2


def test_a_gallery_of_another_run_is_refused(tmp_path: Path) -> None:
    results = make_results()
    results["points"] = results["points"][:2]
    with pytest.raises(ValueError, match="different runs"):
        write_report(write_run(tmp_path / "run", results))
