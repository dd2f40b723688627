"""Training the networks of a study of budgets, each once, and measuring them at equal executed multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dynaconv.study.budget_settings import BudgetSettings
from dynaconv.study.cell import seeded
from dynaconv.study.folder import StudyFolder, read_json

Tell = Callable[[str], None]


class Runs:
    """Networks of one study: trained in `runs/`, results of finished ones kept in `cells/`.

    prefix: of the names of both, where a study has several data sets. easier: prefix of the data set whose networks
    these start from, None where they start from scratch.
    """

    def __init__(
        self,
        folder: StudyFolder,
        settings: BudgetSettings,
        bundle: Any,
        tell: Tell,
        prefix: str = "",
        easier: str | None = None,
    ) -> None:
        self.folder, self.settings, self.bundle, self.tell = folder, settings, bundle, tell
        self.prefix, self.easier = prefix, easier

    def run_folder(self, name: str, seed: int) -> Path:
        """Where a network is trained."""
        return self.folder.path / "runs" / f"{self.prefix}{name}-seed{seed}"

    def kept(self, name: str) -> dict[str, Any] | None:
        """The finished result of a cell, None where there is none."""
        file = self.folder.path / "cells" / f"{self.prefix}{name}.json"
        return read_json(file) if file.is_file() else None

    def keep(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        """Write a finished result."""
        self.folder.write_json(f"cells/{self.prefix}{name}.json", result)
        return result

    def from_easier(self, name: str, seed: int) -> str | None:
        """The run folder of the network of that name on the easier data set; None where it was not trained."""
        cell = f"{self.easier}{name}-seed{seed}"
        if self.easier is None or not (self.folder.path / "cells" / f"{cell}.json").is_file():
            return None
        return str(self.folder.path / "runs" / cell)

    def dense(self, seed: int, start: str | None = None) -> str:
        """The run folder of the dense start of a seed, trained where it is not yet; start: a run it begins with."""
        run = self.run_folder("dense", seed)
        if self.kept(f"dense-seed{seed}") is None:
            model = self.fit(self.settings.dense_recipe(seed, start), run, seed, "dense")
            self.keep(f"dense-seed{seed}", self.test(model))
        return str(run)

    def dynamic(
        self,
        name: str,
        seed: int,
        changes: dict[str, dict[str, Any]],
        calibrate: Sequence[float] = (),
        start: str | None = None,
    ) -> nn.Module:
        """A network trained from the dense start; thresholds as training left them, unless it is calibrated.

        start: the run that the dense start begins with.
        """
        recipe = self.settings.recipe(seed, self.dense(seed, start), changes, calibrate)
        return self.fit(recipe, self.run_folder(name, seed), seed, name)

    def test(self, model: nn.Module) -> dict[str, Any]:
        """Accuracy and executed share on the test split, as the network is set."""
        from dynaconv.train import evaluate

        found = evaluate(model, self.bundle.test, batch_size=self.settings.batch_size)
        return {"accuracy": found["accuracy"], "ratio": found["ratio"]}

    def calibrate(self, model: nn.Module, targets: Sequence[float]) -> None:
        """On the calibration split."""
        from dynaconv.budget import calibrate_
        from dynaconv.data import make_loader

        loader = make_loader(
            self.bundle.calibration, self.settings.batch_size, shuffle=False, seed=0, drop_last=False
        )
        calibrate_(model, loader, targets)

    def fit(self, recipe: Any, run: Path, seed: int, name: str) -> nn.Module:
        """The trained network of a recipe; a run that was interrupted goes on."""
        from dynaconv.train import fit
        from dynaconv.train.run_folder import RunFolder

        there = RunFolder(run).last.exists()
        result = fit(
            recipe,
            run,
            resume=there,
            overwrite=not there,
            progress=lambda line: self.tell(f"{name}, seed {seed}: {line}"),
            bundle=seeded(self.bundle, seed),
        )
        return result.model


def open_study(out: str | Path, study: str, settings: BudgetSettings, bundle: Any, tell: Tell | None) -> Runs:
    """The study's folder, claimed, with its data.

    Raises:
        ValueError: `out` belongs to something else, or was started with other settings; unusable data.
    """
    from dynaconv.study.compactness import check_settings, load_data

    folder = StudyFolder(out, study)
    check_settings(folder, settings)
    bundle = bundle if bundle is not None else load_data(settings)
    folder.claim(settings.to_dict())
    return Runs(folder, settings, bundle, tell or (lambda _line: None))
