"""The study of accuracy against multiply-adds, on a data set that takes no time."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.train.synthetic import Bundle

import dynaconv.study.budget_runs as budget_runs
from dynaconv.study.accuracy_macs import Timing, accuracy_macs
from dynaconv.study.curve_figures import all_figures
from dynaconv.study.curve_points import point_name, static_accuracy, summarise, verdict
from dynaconv.study.curve_settings import Axes, CurveSettings, curve_settings
from dynaconv.study.curve_table import table
from dynaconv.train import load_recipe

pytestmark = pytest.mark.needs("lightning", "matplotlib")
SMALL = CurveSettings(
    data="colours",
    network="resnet14_cifar",
    width=4,
    dense_epochs=1,
    epochs=1,
    batch_size=16,
    precision="fp32",
)


def run(out, axes: Axes, settings: CurveSettings = SMALL, timing: Timing | None = None):
    return accuracy_macs(settings, axes, out, timing=timing, load=lambda _settings: Bundle())


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "curves"
    axes = Axes(("dense", "dynconv", "halting"), (0.4, 0.7), widths=(2,))
    return out, run(out, axes, timing=Timing((2,), rounds=3, engines=("eager",)))


def test_points_meet_their_budgets_of_the_whole_network(study) -> None:
    out, data = study
    found = {(p["method"], p["budget"] or p["width"]): p for p in data["points"]}
    assert [key[0] for key in found] == ["dense", "dense", "dynconv", "dynconv", "halting", "halting"]
    full = found["dense", 4]
    assert full["share_mean"] == 1.0 and full["executed_macs_mean"] == full["dense_macs"]
    assert 0.2 < found["dense", 2]["share_mean"] < 0.35
    for budget in (0.4, 0.7):
        # Thresholds come from 32 other pictures.
        assert abs(found["dynconv", budget]["share_mean"] - budget) < 0.1
    assert (
        "target of 0.4 cannot be met" in found["halting", 0.4]["left_out"]
        and found["halting", 0.4]["seeds"] == 0
    )
    assert "left out: Halting (SACT) 0.4" in table(data)
    rows = list(csv.DictReader((out / "rows.csv").read_text().splitlines()))
    assert len(rows) == 6 and float(rows[2]["conditional_target"]) < 0.4
    assert json.loads((out / "accuracy-macs.json").read_text())["points"] == data["points"]
    for name in ("accuracy-macs.png", "accuracy-ms.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"


def test_static_networks_train_as_long_as_start_and_dynamic_together(study) -> None:
    out, _ = study
    epochs = {
        name: len((out / "runs" / f"{name}-seed0" / "metrics.csv").read_text().splitlines())
        for name in ("static-width4", "dense", "dynconv-0.4")
    }
    assert SMALL.static_recipe(0, 2).trainer.epochs == 2 and SMALL.dense_recipe(0).trainer.epochs == 1
    assert epochs["static-width4"] > max(epochs["dense"], epochs["dynconv-0.4"])


def test_every_point_is_timed_and_compared(study) -> None:
    _, data = study
    for point in data["points"]:
        if point["seeds"]:
            static = point["method"] == "dense"
            assert point["ms_2"] > 0 and point["engine_2"] in (
                ("eager", "dynaconv") if static else ("dynaconv", "eager")
            )
            assert (verdict(point, data["points"], "2") is None) == static
    assert "milliseconds at batch 2:" in table(data) and "dense starts: " in table(data)
    rows = [{**row, "accuracy": 0.9} if row["method"] == "dense" else row for row in data["rows"]]
    assert "give it more --dense-epochs" in table({**data, "rows": rows})


def test_more_seeds_methods_and_budgets_add_rows(study, monkeypatch) -> None:
    out, first = study
    trained = []
    fit = budget_runs.Runs.fit
    monkeypatch.setattr(budget_runs.Runs, "fit", lambda *args: trained.append(args[-1]) or fit(*args))
    again = run(out, Axes(("dense", "dynconv"), (0.4, 0.7), widths=(2,)))
    assert trained == [] and again["points"] == first["points"]
    data = run(out, Axes(("dynconv", "narrow"), (0.4,), seeds=2))
    assert trained == ["narrow-0.4", "dense", "dynconv-0.4", "narrow-0.4"]
    seeds = {(p["method"], p["budget"]): p["seeds"] for p in data["points"]}
    assert seeds["dynconv", 0.4] == 2 and seeds["narrow", 0.4] == 2 and seeds["dynconv", 0.7] == 1
    assert next(p for p in data["points"] if p["budget"])["accuracy_std"] is not None


def test_networks_for_small_objects_start_from_those_for_larger_ones(tmp_path) -> None:
    axes = Axes(("dense", "dynconv"), (0.7,), widths=(4,), object_shares=(0.01, 0.25))
    rows = run(tmp_path, axes, replace(SMALL, data="scenes"))["rows"]
    assert len(rows) == 4
    starts = {}
    for file in (tmp_path / "runs").glob("*/config.yaml"):
        start = load_recipe(file).trainer.init_from
        starts[file.parent.name] = start and Path(start).name
    assert starts == {
        "object0.25-static-width4-seed0": None,
        "object0.25-dense-seed0": None,
        "object0.25-dynconv-0.7-seed0": "object0.25-dense-seed0",
        "object0.01-static-width4-seed0": "object0.25-static-width4-seed0",
        "object0.01-dense-seed0": "object0.25-static-width4-seed0",
        "object0.01-dynconv-0.7-seed0": "object0.01-dense-seed0",
    }


def test_other_settings_and_folders_are_refused(study, tmp_path) -> None:
    out, _ = study
    with pytest.raises(ValueError, match="started with epochs = 1, but now it is 3"):
        run(out, Axes(("dynconv",), (0.4,)), CurveSettings(**{**SMALL.__dict__, "epochs": 3}))
    bad = {
        "unknown method 'dynconf'; did you mean 'dynconv'": Axes(("dynconf",), (0.4,)),
        "--methods needs at least one name": Axes((), (0.4,)),
        "targets must rise and differ": Axes(("dynconv",), (0.4, 0.4)),
        "must lie in": Axes(("dynconv",), (1.4,)),
        "--methods names dynconv twice": Axes(("dynconv", "dynconv"), (0.4,)),
        "object_share is an option of scenes": Axes(("dense",), (0.4,), object_shares=(0.1,)),
    }
    for words, axes in bad.items():
        with pytest.raises(ValueError, match=words):
            run(tmp_path / "new", axes)
    with pytest.raises(ValueError, match="halting does not fit resnet8_cifar: .*leave it out"):
        run(
            tmp_path / "new",
            Axes(("halting",), (0.7,)),
            CurveSettings(**{**SMALL.__dict__, "network": "resnet8_cifar"}),
        )
    with pytest.raises(ValueError, match="has no width to change"):
        run(
            tmp_path / "new",
            Axes(("dense",), (0.7,), (8,)),
            CurveSettings(data="colours", network="timm:resnet18"),
        )
    assert not (tmp_path / "new").exists()


def test_gains_are_those_over_straight_lines_between_static_networks() -> None:
    curve = [(4.0, 0.6), (1.0, 0.5), (3.0, 0.7)]
    assert static_accuracy(curve, 0.9) is None and static_accuracy(curve, 9.0) == 0.7
    assert static_accuracy(curve, 2.5) == pytest.approx(0.65)
    macs = {("dense", 1): (1.0, 0.5), ("dense", 2): (3.0, 0.7), ("dense", 3): (4.0, 0.6)}
    macs |= {("dynconv", 0.3): (0.5, 0.55), ("dynconv", 0.5): (2.0, 0.58), ("dynconv", 0.7): (5.0, 0.72)}
    rows, times = [], {}
    for (method, value), (cost, accuracy) in macs.items():
        own = {"width": value, "budget": None} if method == "dense" else {"budget": value, "width": None}
        row = {"image_size": 16, "object_share": None, "method": method, "seed": 0, "dense_macs": 3, **own}
        rows.append({**row, "accuracy": accuracy, "executed_macs": cost, "share": 1.0})
        times[point_name(row)] = {"1": {"median_ms": cost, "engine": "eager"}}
    points = summarise(rows, times)
    gains = {p["budget"]: (p["gain_macs"], p["gain_ms_1"]) for p in points if p["budget"]}
    assert gains[0.3] == (None, None) and gains[0.5] == (pytest.approx(-0.02), pytest.approx(-0.02))
    assert gains[0.7] == (pytest.approx(0.02), pytest.approx(0.02))
    words = [verdict(p, points, "1") for p in points if p["budget"]]
    assert words == ["are faster than all of", "do not beat", "are slower than all of"]
    sizes = [{**p, "image_size": 32} for p in points]
    shares = [{**p, "object_share": share} for p in points for share in (0.25, 0.01)]
    assert {"image-size.png", "accuracy-macs.png"} <= set(all_figures([*points, *sizes], "scenes"))
    assert "object-share.png" in all_figures(shares, "scenes")


def test_scenes_take_a_network_with_two_blocks_in_a_stage() -> None:
    settings = curve_settings("scenes", epochs=2)
    assert settings.network == "resnet14_scenes" and settings.epochs == 2 and settings.dense_epochs == 12
    recipe = settings.at(96, 0.1).recipe(0, "dense", settings.method("narrow", 0.4), calibrate=(0.4,))
    assert recipe.data.object_share == 0.1 and recipe.data.image_size == 96 and recipe.calibrate == [0.4]
    assert recipe.masking.options == {"budget": 0.4}
    assert Axes(("dense",), (0.3, 0.5)).static_widths(settings) == [8, 12, 16]
