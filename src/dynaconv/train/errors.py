"""What can end a training run early, each with one sentence for the user."""

from __future__ import annotations


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or a termination signal: the checkpoint of the last completed epoch is whole and can be resumed."""


class TrainingDiverged(RuntimeError):
    """The loss or the weights are no longer finite; the last good checkpoint is kept."""
