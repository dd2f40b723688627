"""A way to run the command line in this process, and small saved networks to run it on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

import dynaconv as dc
from dynaconv.cli import main
from dynaconv.data import registry
from dynaconv.data.scenes import load_scenes


@pytest.fixture(scope="session", autouse=True)
def few_scenes():
    """Small calibration and test splits: these tests look at words and files, not at accuracy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load_scenes", partial(load_scenes, calibration_size=160, test_size=160))
        yield


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch) -> None:
    """Rounds of one call, and no engines that take seconds to prepare unless a test names them."""
    from dynaconv.measure import race
    from dynaconv.measure.rivals import table

    timed, chosen = race.compare_latency, table.choose_rivals
    monkeypatch.setattr(race, "compare_latency", lambda f, **o: timed(f, **{**o, "min_round_ms": 0.01}))
    monkeypatch.setattr(table, "choose_rivals", lambda names: chosen(["eager"] if names is None else names))


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)

    def complains(self, *words: str) -> None:
        """One sentence on stderr, exit code 2, nothing on stdout."""
        assert self.code == 2, (self.code, self.err)
        assert self.out == ""
        last = self.err.strip().splitlines()[-1]
        assert last.startswith("dynaconv: "), self.err
        assert "Traceback" not in self.err
        for word in words:
            assert word in last, last


@pytest.fixture
def cli(capsys):
    """cli("models", "--json") -> Answer."""

    def run(*words: object) -> Answer:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A dynamic network of 4 classes, not trained, calibrated on noise to 0.3, 0.5 and 0.7."""
    torch.manual_seed(0)
    model = dc.create_model("dynconv_resnet8_cifar", num_classes=4).eval()
    dc.calibrate_(model, [torch.randn(32, 3, 32, 32)], (0.3, 0.5, 0.7))
    metadata = {
        "classes": list("abcd"),
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "image_size": 32,
        "dataset": None,
    }
    return dc.save(model, tmp_path_factory.mktemp("saved") / "net", metadata=metadata)


@pytest.fixture(scope="session")
def uncalibrated(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return dc.save(dc.create_model("dynconv_resnet8_cifar"), tmp_path_factory.mktemp("saved") / "raw")


TOY = ["--data.image_size=32", "--data.train_size=64", "--data.batch_size=32", "--trainer.epochs=1"]
TOY += [
    "--trainer.init_from=none",
    "--model.options.width=8",
    "--trainer.precision=fp32",
    "--trainer.gradient_clip=none",
]


@pytest.fixture(scope="session")
def trained(few_scenes, tmp_path_factory) -> Path:
    """A run of the dynamic recipe on tiny scenes."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    assert main(["train", "scenes_dynconv", "--run", str(folder), "--quiet", *TOY]) == 0
    return folder
