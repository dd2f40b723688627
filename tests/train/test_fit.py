from __future__ import annotations

import csv
import json

import pytest
import torch
from tests.train.synthetic import At, Bundle, Colours, files, recipe

import dynaconv as dc
from dynaconv.train import TrainingDiverged, evaluate, fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    lines: list[str] = []
    folder = tmp_path_factory.mktemp("run") / "dynamic"
    result = fit({**recipe(), "calibrate": [0.375, 0.5]}, folder, bundle=Bundle(), progress=lines.append)
    return result, lines


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_its_files(run):
    result, lines = run
    assert files(result.run_dir) == [
        "checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "metrics.csv",
        "model/config.json", "model/model.safetensors", "tensorboard/events.out",
    ]  # fmt: skip
    assert len(lines) == 2
    assert lines[0].startswith("epoch   1/2") and " GMACs  " in lines[0]


def test_history_and_metrics_agree(run):
    result, _ = run
    rows = rows_of(result.run_dir)
    steps, epochs = [r for r in rows if r["loss"]], [r for r in rows if r["val_loss"]]
    assert [int(r["step"]) for r in steps] == [1, 2, 3, 4, 5, 6]
    assert float(steps[0]["lr"]) == pytest.approx(0.05)
    assert all(r["density/layer1.0"] for r in steps if r["step"] in "14")
    for row, epoch in zip(epochs, result.history, strict=True):
        assert int(row["epoch"]) == epoch["epoch"]
        assert float(row["val_accuracy"]) == pytest.approx(epoch["val_accuracy"], rel=1e-4)
        assert float(row["val_ratio"]) == pytest.approx(epoch["ratio"], rel=1e-4)
        counted = dc.profile(result.model, torch.zeros(1, 3, 16, 16))
        fixed = counted.dense_macs - counted.conditional_macs + float(counted.routing_macs[0])
        executed = fixed + epoch["ratio"] * counted.conditional_macs
        assert float(row["val_gmacs"]) == pytest.approx(executed / 1e9, rel=1e-4)
        losses = [float(r["loss"]) for r in steps if r["epoch"] == row["epoch"]]
        assert epoch["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert float(epochs[-1]["val_density/layer3.0"]) <= 1


def test_the_saved_network_is_the_one_handed_back(run):
    result, _ = run
    loaded = dc.load(result.run_dir)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), result.model(x))
    saved = json.loads((result.run_dir / "model" / "config.json").read_text())
    assert saved["arch"] == {"name": "resnet8_cifar", "num_classes": 4, "width": 4, "image_size": 16}
    assert saved["metadata"]["classes"] == ["a", "b", "c", "d"]
    assert dc.calibrated_targets(loaded) == [0.375, 0.5]
    assert [row["target"] for row in saved["metadata"]["calibration"]] == [0.375, 0.5]


def test_evaluate_counts_what_training_validated(run):
    result, _ = run
    dc.set_budget_(result.model, None)
    data = Colours(32, 1)
    found = evaluate(result.model, data, batch_size=8)
    best = result.history[result.best_epoch - 1]
    assert found["images"] == 32
    assert found["accuracy"] == result.best_accuracy == best["val_accuracy"]
    assert found["ratio"] == pytest.approx(best["ratio"])
    assert set(found["densities"]) == set(dc.masked_blocks(result.model))
    whole = evaluate(result.model, [(data.images, data.labels)])
    assert whole["loss"] == pytest.approx(found["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="no images"):
        evaluate(result.model, [])


def test_dense_runs_have_no_ratio(tmp_path):
    result = fit(
        recipe(dynamic=False, trainer={"epochs": 1}), tmp_path / "dense", bundle=Bundle(), progress=False
    )
    assert result.history[0]["ratio"] is None
    assert "ratio" not in {k for row in rows_of(result.run_dir) for k, v in row.items() if v}
    assert evaluate(result.model, Colours(8, 3))["ratio"] is None
    assert not dc.gates(result.model)


def test_a_run_is_not_overwritten_by_accident(run, tmp_path):
    result, _ = run
    before = files(result.run_dir)
    with pytest.raises(FileExistsError, match="--resume.*--overwrite"):
        fit(recipe(), result.run_dir, bundle=Bundle())
    assert files(result.run_dir) == before
    other = tmp_path / "again"
    short = recipe(dynamic=False, trainer={"epochs": 1})
    for _ in range(2):
        fit(short, other, bundle=Bundle(), progress=False, overwrite=True)
    assert len(rows_of(other)) == 4


def test_bad_input_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "run"
    for wrong, message in (
        (recipe(model={"name": "resnet9_cifar"}), "unknown model"),
        (recipe(model={"num_classes": 3}), "has 4 classes"),
        (recipe(trainer={"init_from": str(tmp_path / "none")}), "no saved network"),
        (recipe(trainer={"distill_weight": 0.5}), "needs trainer.teacher"),
        (recipe(dynamic=False, model={"name": "dynconv_resnet8_cifar"}), "masks needs budget"),
        (recipe(dynamic=False, budget={"target": 0.5}), "budget needs masking"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            fit(wrong, folder, bundle=Bundle())
    assert not folder.exists()


def test_a_start_that_is_not_there_is_seen_before_the_data_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("dynaconv.train.fitting.load_dataset", lambda *_, **__: pytest.fail("made data"))
    for key in ("init_from", "teacher"):
        with pytest.raises(FileNotFoundError, match="no saved network"):
            fit(recipe(trainer={key: str(tmp_path / "none"), "distill_weight": 0.5}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way_and_a_full_disk(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        fit(recipe(), tmp_path / "file", bundle=Bundle())
    with pytest.raises(OSError, match="cannot write the run to .*Not a directory"):
        fit(recipe(), tmp_path / "file" / "run", bundle=Bundle())

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("dynaconv.train.checkpoints.atomic_write_bytes", full)
    with pytest.raises(OSError, match="cannot write the run to .*No space left") as caught:
        fit(recipe(), tmp_path / "run", bundle=Bundle(), progress=False)
    assert not str(caught.value).startswith("[Errno")


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    def spoil(module):
        module.model.fc.weight.data.fill_(float("nan"))

    with pytest.raises(
        TrainingDiverged, match="step 4: the loss is not finite; most likely the learning rate"
    ):
        fit(recipe(), tmp_path / "run", bundle=Bundle(), progress=False, callbacks=[At(1, 1, spoil)])
    weights = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(bool(torch.isfinite(v).all()) for v in weights.values())


def test_nan_in_the_pictures_is_told_apart(tmp_path):
    bundle = Bundle()
    bundle.train.images[:] = float("nan")
    with pytest.raises(TrainingDiverged, match="step 0.*pictures of this batch hold NaN"):
        fit(recipe(), tmp_path / "run", bundle=bundle, progress=False)


def test_weights_that_overflow_at_the_end_of_an_epoch_are_not_saved(tmp_path):
    class Spoil(At):
        def on_validation_end(self, trainer, pl_module):
            pl_module.model.fc.bias.data.fill_(float("inf"))

    with pytest.raises(TrainingDiverged, match="step 3: the weights are not finite"):
        fit(recipe(), tmp_path / "run", bundle=Bundle(), progress=False, callbacks=[Spoil(9, 9, None)])
    assert not (tmp_path / "run/checkpoints/last.ckpt").exists()


def test_starting_from_a_dense_run_and_learning_from_it(tmp_path):
    dense = fit(
        recipe(dynamic=False, trainer={"epochs": 1}), tmp_path / "dense", bundle=Bundle(), progress=False
    )
    tuned = recipe(trainer={"epochs": 1, "init_from": str(dense.run_dir), "teacher": str(dense.run_dir),
                            "distill_weight": 0.5}, optim={"lr": 1e-9})  # fmt: skip
    result = fit(tuned, tmp_path / "tuned", bundle=Bundle(), progress=False)
    torch.testing.assert_close(result.model.fc.weight, dense.model.fc.weight, rtol=1e-5, atol=1e-5)
    plain = fit(recipe(trainer={"epochs": 1, "init_from": str(dense.run_dir)}, optim={"lr": 1e-9}), tmp_path / "plain",
                bundle=Bundle(), progress=False)  # fmt: skip
    assert result.history[0]["train_loss"] > plain.history[0]["train_loss"]
    other = recipe(model={"options": {"width": 8}}, trainer={"init_from": str(dense.run_dir)})
    with pytest.raises(ValueError, match="do not fit"):
        fit(other, tmp_path / "other", bundle=Bundle())


def test_options_of_the_loop(tmp_path):
    bf16 = recipe(
        trainer={
            "epochs": 1,
            "precision": "bf16",
            "gradient_clip": 1.0,
            "label_smoothing": 0.1,
            "best": "last",
        },
        optim={"name": "adamw", "lr": 1e-3, "schedule": "multistep", "milestones": [1], "warmup_epochs": 0.5},
    )
    result = fit(bf16, tmp_path / "run", bundle=Bundle(), progress=False)
    assert next(result.model.parameters()).dtype == torch.float32
    assert torch.isfinite(torch.tensor(result.history[0]["train_loss"]))


def test_a_network_of_ones_own(tmp_path):
    torch.manual_seed(0)
    model = dc.create_model("resnet8_cifar", num_classes=4)
    result = fit(
        recipe(trainer={"epochs": 1}), tmp_path / "run", bundle=Bundle(), model=model, progress=False
    )
    assert result.model is model
    assert dc.load(result.run_dir).conv1.out_channels == 16
