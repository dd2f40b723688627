from __future__ import annotations

import csv
import json

import pytest
import torch
from tests.train.synthetic import Bundle, Colours

from dynaconv.study import cell as cells
from dynaconv.study.cell import Cell, Reordered, grid
from dynaconv.study.compactness import compactness
from dynaconv.study.compactness_figure import figure
from dynaconv.study.compactness_table import summarise, table
from dynaconv.study.folder import StudyFolder
from dynaconv.study.methods import METHODS, parse_method, parse_methods
from dynaconv.study.settings import CompactnessSettings
from dynaconv.train import TrainingDiverged

SETTINGS = CompactnessSettings(data="colours", width=4, epochs=1, batch_size=16, precision="fp32")
STATIC = parse_methods(["static"])


def run(out, methods=STATIC, seeds=1, settings=SETTINGS, **options):
    return compactness(settings, methods, seeds, out, bundle=Bundle(), batches=(), **options)


def test_method_names() -> None:
    assert [parse_method(name).kind for name in METHODS] == list(METHODS)
    assert parse_method("dyconv8").number == 8
    assert parse_method("condconv4").title == "CondConv 4x"
    assert (parse_method("static16").title, parse_method("static16").width) == ("static 16 wide", 16)
    assert [m.name for m in parse_methods(["dcd", "static", "dcd"])] == ["dcd", "static"]
    for name in ("dcd4", "weightnet2", "dyconvs", "", "4"):
        with pytest.raises(ValueError, match="unknown method"):
            parse_method(name)
    with pytest.raises(ValueError, match="at least one"):
        parse_methods([])


def test_static_weights_depend_on_the_seed_alone() -> None:
    cases = [("static", 0), ("dyconv", 0), ("dcd", 0), ("static", 1)]
    stems = [cells.build(SETTINGS, Cell(parse_method(m), seed), Bundle()).conv1.weight for m, seed in cases]
    assert all(torch.equal(stems[0], stem) for stem in stems[1:3])
    assert not torch.equal(stems[0], stems[3])


def test_recipes_say_what_is_trained() -> None:
    assert SETTINGS.recipe(STATIC[0], 0).kernels is None
    assert SETTINGS.recipe(parse_method("static6"), 0).model.options == {"width": 6}
    section = CompactnessSettings(epochs=10, anneal=0.2).recipe(parse_method("odconv4"), 1).kernels
    assert (section.method, section.options, section.anneal_epochs) == ("odconv", {"num_kernels": 4}, 2.0)
    assert CompactnessSettings(anneal=0).recipe(parse_method("dyconv"), 1).kernels.start_temperature == 1
    with pytest.raises(ValueError, match="num_kernels"):
        CompactnessSettings().recipe(parse_method("dyconv0"), 0)


def test_seeds_come_one_after_the_other() -> None:
    names = [cell.name for cell in grid(parse_methods(["static", "dcd"]), 2)]
    assert names == ["static-seed0", "dcd-seed0", "static-seed1", "dcd-seed1"]


def test_rows_files_and_resume(tmp_path, monkeypatch) -> None:
    found = run(tmp_path / "out", seeds=2)
    assert [(row["method"], row["seed"]) for row in found["rows"]] == [("static", 0), ("static", 1)]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {
        "study.json",
        "compactness.json",
        "compactness.csv",
        "rows.csv",
        "compactness.png",
        "cells",
        "runs",
    }
    assert json.loads((tmp_path / "out" / "compactness.json").read_text()) == found
    with open(tmp_path / "out" / "rows.csv", newline="") as stream:
        assert [float(row["accuracy"]) for row in csv.DictReader(stream)] == [
            r["accuracy"] for r in found["rows"]
        ]
    (tmp_path / "out" / "cells" / "static-seed1.json").unlink()
    trained = []
    real = cells.build
    monkeypatch.setattr(cells, "build", lambda s, cell, b: trained.append(cell.seed) or real(s, cell, b))
    again = run(tmp_path / "out", seeds=3)
    # Seed 0 is kept, seed 1's finished run is only tested again, seed 2 is new.
    assert trained == [1, 2]
    assert again["rows"][:2] == [
        found["rows"][0],
        {**found["rows"][1], "seconds": again["rows"][1]["seconds"]},
    ]


def test_rows_of_earlier_calls_stay(tmp_path) -> None:
    run(tmp_path / "out", parse_methods(["static6"]))
    found = run(tmp_path / "out", parse_methods(["static", "static6"]))
    assert [row["method"] for row in found["rows"]] == ["static", "static6"]
    again = run(tmp_path / "out", STATIC)
    assert [row["method"] for row in again["methods"]] == ["static", "static6"]
    assert found["rows"][0]["params"] < found["rows"][1]["params"]


def test_other_settings_and_foreign_folders_are_refused(tmp_path) -> None:
    run(tmp_path / "out")
    with pytest.raises(ValueError, match="epochs = 1, but now it is 2"):
        run(tmp_path / "out", settings=CompactnessSettings(**{**SETTINGS.to_dict(), "epochs": 2}))
    with pytest.raises(ValueError, match="not a compactness study"):
        run(tmp_path)
    StudyFolder(tmp_path / "other", "attention").claim({})
    with pytest.raises(ValueError, match="belongs to the study 'attention'"):
        run(tmp_path / "other")
    (tmp_path / "out" / "cells" / "static-seed0.json").write_text('{"method": ')
    with pytest.raises(ValueError, match="static-seed0.json is damaged"):
        run(tmp_path / "out")
    (tmp_path / "out" / "study.json").write_text("[]")
    with pytest.raises(ValueError, match=r"study.json is damaged"):
        run(tmp_path / "out")


@pytest.mark.parametrize(
    "method", ["static", "condconv2", "dyconv", "dynet2", "dcd", "odconv", "odconv2", "weightnet"]
)
def test_every_method_trains_and_loads(method, tmp_path) -> None:
    import dynaconv as dc

    # DCD's batch norms have to settle before it can be evaluated.
    longer = {"epochs": 15, "lr": 0.005} if method == "dcd" else {}
    settings = CompactnessSettings(**{**SETTINGS.to_dict(), **longer})
    row = run(tmp_path / "out", parse_methods([method]), settings=settings)["rows"][0]
    model = dc.load(tmp_path / "out" / "runs" / f"{method}-seed0")
    assert row["params"] == sum(p.numel() for p in model.parameters())
    assert row["macs"] == row["static_macs"] + row["mixing_macs"] + row["routing_macs"]
    assert (row["routing_macs"] > 0) == bool(dc.convert.dynamic_layers(model)) == (method != "static")
    from dynaconv.train import evaluate

    assert evaluate(model, Bundle().test)["accuracy"] == pytest.approx(row["accuracy"])


def test_a_training_that_diverges_is_a_row(tmp_path, monkeypatch) -> None:
    import dynaconv.train.fitting

    def fit(*args, **options):
        raise TrainingDiverged("the loss is not finite")

    monkeypatch.setattr(dynaconv.train.fitting, "fit", fit)
    found = run(tmp_path / "out")
    assert found["rows"][0]["diverged"] == "the loss is not finite"
    assert found["methods"][0]["accuracy_mean"] is None
    assert "diverged" in table(found["methods"])


def test_answers_that_are_not_finite_are_a_row(tmp_path, monkeypatch) -> None:
    import dynaconv.train

    monkeypatch.setattr(dynaconv.train, "evaluate", lambda *a, **k: {"accuracy": 0.1, "loss": float("nan")})
    assert "not finite" in run(tmp_path / "out")["rows"][0]["diverged"]


def test_seeds_see_the_same_pictures_in_another_order() -> None:
    base = Colours(8, 0)
    moved = Reordered(base, [3, 1, 0, 2, 4, 5, 7, 6])
    assert len(moved) == 8
    assert torch.equal(moved.__getitems__([0, 1])[0], base.__getitems__([3, 1])[0])
    bundle = Bundle()
    first, second = (cells.seeded(bundle, seed).train for seed in (0, 1))
    assert sorted(first.order) == sorted(second.order) and first.order != second.order
    assert isinstance(bundle.train, Colours)


def _rows() -> list[dict]:
    costs = {
        "params": 10,
        "static_macs": 100,
        "mixing_macs": 0,
        "routing_macs": 0,
        "macs": 100,
        "seconds": 1.0,
    }
    values = {"static": (0.5, 0.6), "dyconv4": (0.6, 0.8), "dcd": (0.7, None)}
    rows = []
    for method, accuracies in values.items():
        for seed, accuracy in enumerate(accuracies):
            own = {"diverged": "why"} if accuracy is None else {"accuracy": accuracy}
            rows.append({"method": method, "seed": seed, **costs, **own})
    return rows


def test_summary_means_spreads_and_gains() -> None:
    latency = {
        "static": {"1": {"median_ms": 2.0, "min_ms": 1.0}},
        "dyconv4": {"1": {"median_ms": 3.0, "min_ms": 2.0}},
    }
    static, dyconv, dcd = summarise(_rows(), latency)
    assert static["accuracy_mean"] == pytest.approx(0.55) and static["gain"] == 0
    assert dyconv["accuracy_std"] == pytest.approx(0.1414, abs=1e-4) and dyconv["gain"] == pytest.approx(0.15)
    assert (dyconv["ms_1"], dyconv["ms_1_ratio"]) == (3.0, 1.5)
    assert (dcd["seeds"], dcd["accuracy_std"], dcd["gain"]) == (1, None, pytest.approx(0.2))
    text = table([static, dyconv, dcd])
    assert "DY-Conv 4x" in text and "70.00 % ± 14.14" in text and "+15.00" in text and "3.00 (1.50)" in text


def test_figure_is_a_png() -> None:
    assert figure(summarise(_rows(), {}), "scenes").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"anneal": 1.5}, "--anneal"),
        ({"epochs": 0}, "epochs"),
        ({"width": 0}, "--width"),
        ({"lr": 0.0}, "lr"),
    ],
)
def test_settings_out_of_range(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        CompactnessSettings(**options)


def test_cell_names() -> None:
    assert Cell(parse_method("odconv4"), 2).name == "odconv4-seed2"
