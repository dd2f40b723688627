from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

import dynaconv as dc


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


def test_results_go_into_the_run(cli, run) -> None:
    data = cli("eval", run, "--json").json
    assert [row["target"] for row in data["rows"]] == [0.3, 0.5, 0.7]
    for row in data["rows"]:
        assert row["ratio"] == pytest.approx(row["target"], abs=0.1)
        assert row["macs_ratio"] == pytest.approx(row["executed_macs"] / row["dense_macs"])
    results = json.loads((run / "results.json").read_text())
    assert [point["target"] for point in results["points"]] == [0.3, 0.5, 0.7]
    assert [entry["run"] for entry in results["history"]] == ["dynamic"]
    for point in results["points"]:
        timed = point["latency"]["1"]
        assert (
            timed["median_ms"] == timed["engines"][timed["engine"]]["median_ms"]
            and "eager" in timed["engines"]
        )
    assert set(results["dense"]["latency"]) == {"1", "32"}
    assert (run / "gallery.npz").is_file()
    page = cli("report", run)
    assert page.code == 0 and (run / "report.html").is_file()
    # A budget of 1 opens everything; its threshold is infinite, which JSON lacks.
    answer = cli("eval", run, "--target", "1", "--times")
    assert "1.000" in answer.out and "ms at batch" not in answer.out
    again = json.loads((run / "results.json").read_text())["points"]
    assert [point["target"] for point in again] == [0.3, 0.5, 0.7, 1.0]
    assert again[-1]["threshold"] is None
    # What was not timed again keeps its milliseconds.
    assert again[0]["latency"] == results["points"][0]["latency"] and "latency" not in again[-1]


def test_limit_prints_and_writes_nothing(cli, run) -> None:
    data = cli("eval", run, "--limit", "20", "--target", "0.5", "--json").json
    assert [(row["target"], row["images"]) for row in data["rows"]] == [(0.5, 20)]
    assert data["results"] is None and not (run / "results.json").exists()


def test_calibrate_saves_the_budgets(cli, run) -> None:
    before = dc.models.read_config(run)
    answer = cli("eval", run, "--calibrate", "0.4", "0.6", "--limit", "20")
    assert answer.code == 0 and "0.4" in answer.out and "0.6" in answer.out
    assert dc.calibrated_targets(dc.load(run)) == [0.4, 0.6]
    after = dc.models.read_config(run)
    assert after["arch"] == before["arch"]
    assert after["metadata"]["classes"] == before["metadata"]["classes"]
    assert [row["target"] for row in after["metadata"]["calibration"]] == [0.4, 0.6]


def test_network_that_is_not_calibrated(cli, uncalibrated) -> None:
    answer = cli("eval", uncalibrated, "--data", "scenes", "--limit", "10")
    assert "as trained" in answer.out and "--calibrate 0.3 0.5 0.7" in answer.out
    cli("eval", uncalibrated, "--data", "scenes", "--target", "0.5").complains("not calibrated")
    cli("eval", uncalibrated).complains("does not say which data set", "--data scenes")


@pytest.mark.parametrize("target", ["0", "-0.5", "1.5"])
def test_target_out_of_range(cli, trained, target) -> None:
    cli("eval", trained, "--target", target).complains("must lie in (0, 1]", target)
    cli("eval", trained, "--calibrate", target).complains("must lie in (0, 1]", target)


def test_data_with_other_classes(cli, trained, saved, tmp_path) -> None:
    for name in ("cat", "dog", "owl"):
        (tmp_path / "few" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (40, 30), (10 * i, 80, 90)).save(tmp_path / "few" / name / f"{i}.png")
    spec = f"imagefolder:{tmp_path / 'few'}"
    cli("eval", trained, "--data", spec).complains(
        "tells 10 classes apart", "has 3", "use the data set it was trained on"
    )
    cli("eval", saved, "--data", "scenes").complains("tells 4 classes apart", "has 10")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "scnes"], ["unknown data set 'scnes'", "'scenes'"]),
        (["--data", "imagefolder:nothing/here"], ["nothing/here"]),
        (["--limit", "0"], ["--limit must be at least 1"]),
        (["--batch", "0"], ["--batch must be at least 1"]),
    ],
)
def test_bad_input(cli, trained, words, told) -> None:
    cli("eval", trained, *words).complains(*told)


def test_empty_image_folder(cli, trained, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    cli("eval", trained, "--data", f"imagefolder:{tmp_path / 'empty'}").complains("empty")


def test_damaged_networks(cli, run) -> None:
    cli("eval", "resnet8_scenes").complains("eval needs a trained network", "'resnet8_scenes'")
    file = run / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    cli("eval", run).complains("damaged or truncated", "use another checkpoint")
    file.unlink()
    cli("eval", run).complains("model.safetensors is missing")
    (run / "model" / "config.json").write_text('{"format": 1, ')
    cli("eval", run).complains("config.json is damaged")
    cli("eval", run / "checkpoints").complains("no saved network in")
    cli("eval", run.parent / "rum").complains("there is no folder", f"did you mean '{run}'")
