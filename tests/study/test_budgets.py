"""Studies of budgets on a data set that takes no time: variants, equal MACs, resuming, bad input."""

from __future__ import annotations

import csv

import pytest
from tests.train.synthetic import Bundle

import dynaconv.study.budget_runs as budget_runs
from dynaconv.study.budget_settings import BudgetSettings, budget_settings
from dynaconv.study.dial import dial
from dynaconv.study.dial import table as dial_table
from dynaconv.study.fixes import VARIANTS, changes_of, fixes, summarise, title
from dynaconv.study.fixes import table as fixes_table

pytestmark = pytest.mark.needs("lightning", "matplotlib")
SMALL = BudgetSettings(
    data="colours", network="resnet8_cifar", width=4, dense_epochs=1, epochs=1, batch_size=16, target=0.5
)


def test_variants_change_one_thing() -> None:
    base = SMALL.recipe(0, "runs/dense", changes_of("default", SMALL))
    differing = {}
    for variant in VARIANTS:
        made = SMALL.recipe(0, "runs/dense", {**changes_of(variant, SMALL), "trainer": {"teacher": None}})
        masks, other = made.masking.config(), base.masking.config()
        differing[variant] = [
            *(
                n
                for n in ("temperature", "init", "dilation_gradient", "norm")
                if getattr(masks, n) != getattr(other, n)
            ),
            *(
                n
                for n in ("gate_weight_decay", "gate_lr_multiplier")
                if getattr(made.optim, n) != getattr(base.optim, n)
            ),
            *(n for n in ("ramp", "scope") if getattr(made.budget, n) != getattr(base.budget, n)),
        ]
        assert title(variant)
    everything = ["temperature", "init", "dilation_gradient", "gate_weight_decay", "ramp"]
    assert differing["default"] == [] and differing["paper"] == everything
    assert differing["default-open"] == ["init"] and differing["default+gate-lr"] == ["gate_lr_multiplier"]
    for fix, name in zip(("temperature", "open", "dilation", "decay", "ramp"), everything, strict=True):
        assert differing[f"default-{fix}"] == [name]
        assert differing[f"paper+{fix}"] == [n for n in everything if n != name]


def test_fixes_compares_at_equal_macs_and_goes_on(tmp_path, monkeypatch) -> None:
    variants = ["paper", "default", "default+distill", "default+total"]
    data = fixes(SMALL, variants[:2], 1, tmp_path / "study", bundle=Bundle())
    trained = []
    fit = budget_runs.Runs.fit
    monkeypatch.setattr(budget_runs.Runs, "fit", lambda *args: trained.append(args[-1]) or fit(*args))
    data = fixes(SMALL, variants, 1, tmp_path / "study", bundle=Bundle())
    assert trained == variants[2:]
    assert [row["variant"] for row in data["variants"]] == variants
    for row in data["rows"]:
        assert abs(row["ratio"] - 0.5) < 0.1 and 0 <= row["accuracy"] <= 1
    with open(tmp_path / "study" / "fixes.csv") as file:
        assert [row["variant"] for row in csv.DictReader(file)] == variants
    assert "default with distillation" in fixes_table(data) and "target 0.5" in fixes_table(data)


def test_summaries_are_means_and_gains_over_the_base() -> None:
    rows = [
        {"variant": v, "seed": s, "accuracy": a, "ratio": 0.5, "ratio_before": 0.6, "accuracy_before": a}
        for v, s, a in (
            ("default", 0, 0.5),
            ("default-open", 0, 0.4),
            ("default", 1, 0.7),
            ("default-open", 1, 0.8),
        )
    ]
    base, other = summarise(rows)
    assert base["accuracy_mean"] == pytest.approx(0.6) and base["gain"] is None
    assert base["accuracy_std"] == pytest.approx(0.02**0.5) and other["gain"] == pytest.approx(0.0)


def test_a_dial_is_drawn_beside_networks_for_each_budget(tmp_path) -> None:
    budgets = (0.3, 0.5, 0.7)
    data = dial(SMALL, budgets, 1, tmp_path, bundle=Bundle())
    kinds = [(p["kind"], p["budget"]) for p in data["points"]]
    assert kinds[:5] == [("dial", b) for b in (0.3, 0.4, 0.5, 0.6, 0.7)]
    assert kinds[10:] == [("special", b) for b in budgets]
    assert (tmp_path / "dial.png").read_bytes()[:4] == b"\x89PNG"
    assert "one network, trained for the range" in dial_table(data)
    with pytest.raises(ValueError, match="was started with"):
        dial(budget_settings("colours", epochs=3), budgets, 1, tmp_path, bundle=Bundle())


def test_bad_input(tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown variant 'default-opn'; did you mean"):
        fixes(SMALL, ["default-opn"], 1, tmp_path / "a", bundle=Bundle())
    with pytest.raises(ValueError, match="needs three budgets or more, got 2"):
        dial(SMALL, (0.3, 0.5), 1, tmp_path / "b", bundle=Bundle())
    with pytest.raises(ValueError, match="targets must rise and differ"):
        dial(SMALL, (0.5, 0.3, 0.7), 1, tmp_path / "b", bundle=Bundle())
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
