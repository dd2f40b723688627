from __future__ import annotations

import json

import pytest

from dynaconv.cli.results import history, merge_points


@pytest.fixture
def runs(tmp_path):
    """Two runs with the least that a results.json may hold."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        point = {
            "target": 0.5,
            "ratio": 0.5,
            "accuracy": 0.9,
            "executed_macs": 50.0,
            "macs_ratio": 0.5,
            "blocks": [],
        }
        results = {
            "format": 1,
            "title": name,
            "created": "2026-01-01T00:00:00+00:00",
            "version": "0",
            "commit": None,
            "machine": "a machine",
            "command": "dynaconv eval",
            "dataset": {
                "name": "d",
                "classes": ["x", "y"],
                "image_size": 8,
                "train": 1,
                "calibration": 1,
                "test": 1,
            },
            "dense": {"name": "dense", "accuracy": 0.95, "macs": 100, "params": 10},
            "points": [point],
            "history": [],
            "notes": [],
        }
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    return tmp_path


def test_one_run_and_several(cli, runs) -> None:
    assert cli("report", runs / "a").out.strip() == str(runs / "a" / "report.html")
    out = runs / "both" / "comparison.html"
    assert cli("report", runs / "a", runs / "b", "--out", out, "--json").json["report"] == str(out)
    assert out.is_file()


def test_one_run_s_page_elsewhere_leaves_the_run_alone(cli, runs) -> None:
    before = sorted((runs / "a").rglob("*"))
    out = runs / "pages" / "a.html"
    assert cli("report", runs / "a", "--out", out).out.strip() == str(out)
    assert "<html" in out.read_text() and sorted((runs / "a").rglob("*")) == before


def test_bad_input(cli, runs) -> None:
    (runs / "empty").mkdir()
    cli("report", runs / "nothing").complains("there is no folder")
    cli("report", runs / "empty").complains("needs results.json", "dynaconv eval")
    cli("report", runs / "a", runs / "b", "--out", runs / "empty").complains("is a folder; name a file")
    cli("report", runs / "a", "--out", runs / "empty").complains("is a folder; name a file")
    (runs / "a" / "results.json").write_text('{"format": 1,')
    cli("report", runs / "a").complains("not valid JSON")
    assert not (runs / "a" / "report.html").exists()


def test_points_are_merged() -> None:
    old = [{"target": 0.3, "threshold": 1.0, "latency": {"1": {}}}, {"target": 0.5, "threshold": 0.5}]
    new = [{"target": 0.3, "threshold": 1.0, "accuracy": 0.9}, {"target": 1.0, "threshold": float("-inf")}]
    merged = merge_points(old, new)
    assert [p["target"] for p in merged] == [0.3, 0.5, 1.0]
    assert merged[0] == {"target": 0.3, "threshold": 1.0, "accuracy": 0.9, "latency": {"1": {}}}
    assert merged[2]["threshold"] is None
    # Another calibration makes the old points worthless.
    assert merge_points(old, [{"target": 0.3, "threshold": 1.2}]) == [{"target": 0.3, "threshold": 1.2}]


def test_history_from_metrics(tmp_path) -> None:
    assert history(tmp_path) == []
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,train_loss,val_loss,val_accuracy,val_ratio\n1,3,,,,\n1,4,2.0,1.5,0.5,0.4\n2,8,1.0,1.25,0.75,0.3\n"
    )
    rows = history(tmp_path)
    assert [(r["run"], r["epoch"], r["val_accuracy"], r["ratio"]) for r in rows] == [
        ("dynamic", 1, 0.5, 0.4),
        ("dynamic", 2, 0.75, 0.3),
    ]
