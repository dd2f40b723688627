"""Import an optional package, or say which extra brings it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from dynaconv import _checks


def import_optional(package: str, extra: str) -> ModuleType:
    """Import ``package``; where it is not installed, name the extra of dynaconv that brings it.

    A package that is installed but broken keeps its own error: a wrong advice would hide it.

    Raises:
        ImportError: ``package`` is not installed.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise _checks.integrations_missing(package, extra) from None
