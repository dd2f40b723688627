"""metrics.csv and TensorBoard events of a run; both continue when the run is resumed."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from dynaconv._files import atomic_write_text
from dynaconv.integrations import import_lightning

lightning = import_lightning()
rank_zero_only = lightning.pytorch.utilities.rank_zero_only

STEP_COLUMNS = ("epoch", "step", "lr", "loss", "task_loss", "budget_loss", "ratio")
EPOCH_COLUMNS = ("train_loss", "val_loss", "val_accuracy", "val_ratio", "val_gmacs")


class MetricsFile(lightning.pytorch.loggers.Logger):
    """A CSV file with one row a training step and one row an epoch; columns are fixed from the start.

    Lightning's own CSVLogger begins a new file on resume and rewrites it when a column appears.

    Args:
        path: the file.
        blocks: names of the masked blocks, which get density columns.
        epochs_done: rows of later epochs are dropped first, since those epochs will run again.
    """

    def __init__(
        self, path: Path, blocks: Iterable[str] = (), epochs_done: int = 0, flush_every: int = 50
    ) -> None:
        super().__init__()
        self.path, self.epochs_done, self.flush_every = path, epochs_done, flush_every
        blocks = list(blocks)
        densities = [f"{kind}/{name}" for kind in ("density", "val_density") for name in blocks]
        self.columns = [*STEP_COLUMNS, *EPOCH_COLUMNS, *densities]
        self._file: TextIO | None = None
        self._rows = 0

    @property
    def name(self) -> str:
        """Lightning wants one."""
        return "metrics"

    @property
    def version(self) -> str:
        """Lightning wants one."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The recipe is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row."""
        if self._file is None:
            self._file = self._open()
        row = {"step": step, **metrics}
        self._file.write(",".join(_text(row.get(column)) for column in self.columns) + "\n")
        self._rows += 1
        if self._rows % self.flush_every == 0:
            self._file.flush()

    @rank_zero_only
    def save(self) -> None:
        """Make what was written visible."""
        if self._file is not None:
            self._file.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        kept = read_metrics(self.path) if self.epochs_done and self.path.is_file() else []
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in kept if int(row["epoch"]) <= self.epochs_done)
        atomic_write_text(self.path, text.getvalue())
        return open(self.path, "a", encoding="utf-8")


def read_metrics(path: str | Path) -> list[dict[str, str]]:
    """Rows of a metrics.csv; a last line that was cut off is left out."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row.values() and row.get("epoch", "").isdigit()]


def _text(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.6g}"


class EventFiles(lightning.pytorch.loggers.TensorBoardLogger):
    """TensorBoard events, without Lightning's hparams.yaml."""

    @rank_zero_only
    def save(self) -> None:
        """Make what was written visible."""
        self.experiment.flush()
