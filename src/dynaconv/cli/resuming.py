"""What a verb says when it was interrupted and can go on."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator

from dynaconv.cli.outcome import INTERRUPTED, CommandFailed


@contextlib.contextmanager
def resumable(kept: str = "networks") -> Iterator[None]:
    """Tell which command goes on where an interrupted study stopped; `kept`: what is finished.

    Raises:
        CommandFailed: the training inside was interrupted.
    """
    from dynaconv.train import TrainingInterrupted

    try:
        yield
    except TrainingInterrupted:
        again = shlex.join(["dynaconv", *sys.argv[1:]])
        raise CommandFailed(
            f"interrupted; finished {kept} are kept, go on with: {again}", INTERRUPTED
        ) from None
