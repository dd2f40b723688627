from __future__ import annotations

import signal

import pytest
import torch
from tests.train.synthetic import At, Bundle, recipe

from dynaconv.data.scenes import load_scenes
from dynaconv.train import TrainingInterrupted, fit

FOUR = recipe(trainer={"epochs": 4}, optim={"name": "adamw", "lr": 3e-3, "warmup_epochs": 1})


@pytest.fixture(autouse=True)
def interrupts_arrive():
    """A shell that starts the tests in the background has them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ctrl_c(module) -> None:
    signal.raise_signal(signal.SIGINT)


def interrupted(folder, epoch: int, batch: int, **options) -> str:
    with pytest.raises(TrainingInterrupted) as caught:
        fit(FOUR, folder, bundle=Bundle(), progress=False, callbacks=[At(epoch, batch, ctrl_c)], **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return fit(FOUR, tmp_path_factory.mktemp("resume") / "straight", bundle=Bundle(), progress=False)


def assert_same_run(straight, resumed):
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    paths = [r.run_dir / "checkpoints" / "last.ckpt" for r in (straight, resumed)]
    one, two = (torch.load(path, weights_only=True) for path in paths)
    assert one["budget"] == two["budget"]
    assert one["lr_schedulers"] == two["lr_schedulers"]
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    for key, state in one["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, two["optimizer_states"][0]["state"][key][name]), name
    assert straight.history == resumed.history
    assert (straight.run_dir / "metrics.csv").read_text() == (resumed.run_dir / "metrics.csv").read_text()


@pytest.mark.parametrize("batch", [0, 2])
def test_two_and_two_epochs_are_four(straight, tmp_path, batch):
    message = interrupted(tmp_path / "run", 2, batch)
    assert f"epoch 3 of 4 (step {6 + batch})" in message
    assert "checkpoint of epoch 2 is whole, --resume continues with epoch 3" in message
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same_run(straight, fit(FOUR, tmp_path / "run", bundle=Bundle(), progress=False, resume=True))


def test_resumed_twice(straight, tmp_path):
    interrupted(tmp_path / "run", 1, 1)
    interrupted(tmp_path / "run", 3, 2, resume=True)
    assert_same_run(straight, fit(FOUR, tmp_path / "run", bundle=Bundle(), progress=False, resume=True))


def test_a_run_without_a_whole_epoch_starts_again(straight, tmp_path):
    assert "no epoch was completed yet, --resume starts again" in interrupted(tmp_path / "run", 0, 2)
    assert_same_run(straight, fit(FOUR, tmp_path / "run", bundle=Bundle(), progress=False, resume=True))


def test_ctrl_c_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    interrupted(folder, 1, 0)
    whole = (folder / "checkpoints" / "last.ckpt").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(TrainingInterrupted, match="checkpoint of epoch 1 is whole"):
        fit(FOUR, folder, bundle=Bundle(), progress=False, resume=True)
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == whole
    assert sorted(f.name for f in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_finished_run_resumes_to_itself(straight):
    before = (straight.run_dir / "metrics.csv").read_text()
    again = fit(FOUR, straight.run_dir, bundle=Bundle(), progress=False, resume=True)
    assert again.history == straight.history
    assert again.seconds < 1
    assert (straight.run_dir / "metrics.csv").read_text() == before


def test_what_cannot_be_resumed(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        fit(FOUR, folder, bundle=Bundle(), resume=True)
    interrupted(folder, 1, 0)
    with pytest.raises(ValueError, match="started with optim.lr = 0.003, but this recipe says 0.1"):
        fit({**FOUR, "optim": {**FOUR["optim"], "lr": 0.1}}, folder, bundle=Bundle(), resume=True)
    last = folder / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        last.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or truncated") as caught:
            fit(FOUR, folder, bundle=Bundle(), resume=True)
        assert "\n" not in str(caught.value)
    torch.save({"weights": torch.zeros(1)}, last)
    with pytest.raises(ValueError, match="not a checkpoint of a dynaconv run"):
        fit(FOUR, folder, bundle=Bundle(), resume=True)


def test_a_termination_signal_is_an_interruption(straight, tmp_path):
    with pytest.raises(TrainingInterrupted, match="continues with epoch 2"):
        terminate = At(1, 1, lambda module: signal.raise_signal(signal.SIGTERM))
        fit(FOUR, tmp_path / "run", bundle=Bundle(), progress=False, callbacks=[terminate])
    assert_same_run(straight, fit(FOUR, tmp_path / "run", bundle=Bundle(), progress=False, resume=True))


class Surprise:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_checkpoints_are_read_without_running_them(tmp_path, capsys):
    folder = tmp_path / "run"
    interrupted(folder, 1, 0)
    torch.save({"state_dict": {}, "dynaconv": Surprise()}, folder / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match="damaged or truncated"):
        fit(FOUR, folder, bundle=Bundle(), resume=True)
    assert "never" not in capsys.readouterr().out


def test_scenes_in_the_same_order_with_the_same_shifts(tmp_path):
    def scenes():
        return load_scenes(32, 64, calibration_size=32, test_size=1, progress=False)

    made = recipe(data={"name": "scenes", "image_size": 32}, trainer={"epochs": 2})
    straight = fit(made, tmp_path / "straight", bundle=scenes(), progress=False)
    with pytest.raises(TrainingInterrupted):
        fit(made, tmp_path / "run", bundle=scenes(), progress=False, callbacks=[At(1, 1, ctrl_c)])
    assert_same_run(straight, fit(made, tmp_path / "run", bundle=scenes(), progress=False, resume=True))
