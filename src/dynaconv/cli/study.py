"""`dynaconv study NAME`: what dynamic kernels and gates do, measured."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from dynaconv import _checks
from dynaconv.cli import (
    study_accuracy_macs,
    study_attention,
    study_compactness,
    study_correlation,
    study_dial,
    study_fixes,
)
from dynaconv.cli.outcome import Outcome

HELP = "study dynamic kernels (correlation, attention, compactness) and gates (fixes, dial, accuracy-macs)"
DESCRIPTION = """
Three studies of networks with dynamic kernels, each with CSV, JSON and a figure: how alike their kernels and
feature maps are, what their attention does, and what accuracy they give for their parameters. Three studies of
gates: what each fix of DynConv's training is worth, how one network does at every budget, and what accuracy every
kind of gate and smaller static networks give for their multiply-adds and milliseconds. Every study prints JSON
with --json."""
EXAMPLES = """\
dynaconv study correlation runs/static runs/dyconv
dynaconv study attention runs/dyconv
dynaconv study compactness --seeds 2
dynaconv study fixes
dynaconv study dial
dynaconv study accuracy-macs"""

VERBS: dict[str, ModuleType] = {
    "correlation": study_correlation,
    "attention": study_attention,
    "compactness": study_compactness,
    "fixes": study_fixes,
    "dial": study_dial,
    "accuracy-macs": study_accuracy_macs,
}


def add_arguments(parser: Any) -> None:
    """None of its own: each study has its own arguments."""


def prepare(words: Sequence[str]) -> list[str]:
    """Refuse unknown studies with the nearest name.

    Raises:
        ValueError: there is no such study.
    """
    name = next((word for word in words if not word.startswith("-")), None)
    if name is not None and name not in VERBS:
        raise _checks.unknown("study", name, VERBS)
    if name is None and not {"-h", "--help"} & set(words):
        raise _checks.study_which(VERBS)
    return list(words)


def run(args: Any) -> Outcome:
    """Run the study that was named.

    Raises:
        ValueError, OSError: bad input; CommandFailed: interrupted, or a training failed.
    """
    return VERBS[args.verb].run(args)
