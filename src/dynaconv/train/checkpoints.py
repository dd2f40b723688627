"""Checkpoints that are whole at every moment, loaded without running what is in them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from dynaconv import _checks
from dynaconv._files import atomic_write_bytes
from dynaconv.integrations import import_lightning
from dynaconv.train.errors import TrainingDiverged
from dynaconv.train.module import DynaconvModule

lightning = import_lightning()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Content of a checkpoint: tensors and plain values only.

    Raises:
        FileNotFoundError: no such file; ValueError: damaged, truncated, or not a checkpoint of dynaconv.
    """
    if not Path(path).is_file():
        raise _checks.train_no_checkpoint(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise _checks.train_broken_checkpoint(path, error) from None
    if not isinstance(content, dict) or "dynaconv" not in content or "state_dict" not in content:
        raise _checks.train_foreign_checkpoint(path)
    return content


class WholeFileIO(lightning.pytorch.plugins.TorchCheckpointIO):
    """Writes to a temporary file and renames it; reads tensors and plain values only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Replace `path` entirely or not at all."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        atomic_write_bytes(path, buffer.getvalue())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """See `read_checkpoint`."""
        return read_checkpoint(path)


class RunCheckpoint(lightning.pytorch.callbacks.Checkpoint):
    """After every epoch: last.ckpt (all that a resumed run needs), and best.ckpt (weights of the best epoch).

    Raises:
        TrainingDiverged: the weights are not finite; nothing is written then, so the last good checkpoint stays.
    """

    def __init__(self, folder: Path, epochs_saved: int = 0) -> None:
        self.epochs_saved = epochs_saved
        self.last_path, self.best_path = folder / "last.ckpt", folder / "best.ckpt"
        self.best_score: float | None = None
        self.best_epoch = 0

    def on_train_epoch_end(self, trainer: Any, pl_module: DynaconvModule) -> None:
        """Write both; last.ckpt comes second, so that what it says about best.ckpt is true."""
        refuse_infinite_weights(pl_module, trainer.global_step)
        score = pl_module.score(pl_module.history[-1])
        if self.best_score is None or score >= self.best_score:
            self.best_score, self.best_epoch = score, pl_module.epochs_done
            trainer.save_checkpoint(self.best_path, weights_only=True)
        trainer.save_checkpoint(self.last_path)
        self.epochs_saved = pl_module.epochs_done

    def state_dict(self) -> dict[str, Any]:
        """The best epoch so far."""
        return {"best_score": self.best_score, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the best epoch so far."""
        self.best_score, self.best_epoch = state_dict["best_score"], state_dict["best_epoch"]


def refuse_infinite_weights(module: DynaconvModule, step: int) -> None:
    """Raise unless all weights are finite.

    Raises:
        TrainingDiverged: with the step and what to try.
    """
    if not all(bool(torch.isfinite(p).all()) for p in module.parameters()):
        cause = _checks.train_lower_lr(module.recipe.optim.lr)
        raise TrainingDiverged(_checks.train_diverged("weights are", step, cause))
