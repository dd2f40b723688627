from __future__ import annotations

import json

import pytest

from dynaconv.cli.demo import lean_on
from dynaconv.train import TrainingDiverged, load_recipe


def test_quick_demo_from_nothing_to_a_report(cli, tmp_path, monkeypatch) -> None:
    out = tmp_path / "demo"
    answer = cli("demo", "--quick", "--out", out)
    assert answer.code == 0, answer.err
    for told in (
        "dense",
        "0.3",
        "0.5",
        "0.7",
        "ms at batch 1",
        "PyTorch eager",
        "eager executor",
        "peak memory",
        f"Report: {out / 'report.html'}",
    ):
        assert told in answer.out
    for stage in (
        "1. Draw the scenes",
        "2. Train the dense",
        "3. Train the dynamic",
        "4. Measure",
        "5. Write",
    ):
        assert stage in answer.err
    results = json.loads((out / "results.json").read_text())
    assert [point["target"] for point in results["points"]] == [0.3, 0.5, 0.7]
    assert {entry["run"] for entry in results["history"]} == {"dense", "dynamic"}
    for point in results["points"]:
        assert point["calibration_ratio"] == pytest.approx(point["target"], abs=0.02)
        assert point["latency"]["1"]["median_ms"] > 0 and point["density_inside"] is not None
    names = {file.name for file in out.iterdir()}
    assert names >= {"report.html", "results.json", "gallery.npz", "model", "dense", "figures", "config.yaml"}
    _again(cli, out, monkeypatch)


def _again(cli, out, monkeypatch) -> None:
    """An earlier demo is replaced, what a user put beside it stays, and no report of the old one is left."""
    (out / "mine.txt").write_text("keep me")

    def diverge(*_args, **_options):
        raise TrainingDiverged("training stopped at step 1: the loss is not finite")

    monkeypatch.setattr("dynaconv.train.fit", diverge)
    answer = cli("demo", "--quick", "--out", out)
    assert (answer.code, answer.out) == (1, "")
    assert "stopped at step 1" in answer.err
    assert (out / "mine.txt").read_text() == "keep me"
    assert not (out / "report.html").exists() and not (out / "results.json").exists()


def test_somebody_else_s_folder_is_left_alone(cli, tmp_path) -> None:
    for name in ("config.yaml", "results.json"):
        folder = tmp_path / name.partition(".")[0]
        (folder / "model").mkdir(parents=True)
        (folder / name).write_text('{"theirs": 1}')
        cli("demo", "--quick", "--out", folder).complains("not a dynaconv run", "--out")
        assert (folder / name).read_text() == '{"theirs": 1}' and (folder / "model").is_dir()
    (tmp_path / "file").write_text("x")
    cli("demo", "--out", tmp_path / "file").complains("it is a file")


def test_ctrl_c(cli, tmp_path, monkeypatch) -> None:
    def stop(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("dynaconv.train.fit", stop)
    answer = cli("demo", "--quick", "--out", tmp_path / "demo")
    assert answer.code == 130
    assert (
        answer.err.strip().splitlines()[-1]
        == "dynaconv: interrupted; dynaconv demo starts again from the beginning"
    )


def test_the_recipe_decides_what_the_dynamic_network_takes_from_the_dense_one(tmp_path) -> None:
    recipe = load_recipe(
        "scenes_dynconv", {"trainer.init_from": None, "trainer.teacher": None, "trainer.distill_weight": 0}
    )
    assert lean_on(recipe, tmp_path) == recipe
    started = lean_on(load_recipe(recipe, {"trainer.init_from": "runs/any"}), tmp_path).trainer
    assert (started.init_from, started.teacher) == (str(tmp_path), None)
    taught = lean_on(
        load_recipe(recipe, {"trainer.teacher": "runs/any", "trainer.distill_weight": 0.5}), tmp_path
    )
    assert taught.trainer.teacher == str(tmp_path)
