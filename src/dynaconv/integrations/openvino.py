"""OpenVINO's core, of which a process may have one only."""

from __future__ import annotations

from functools import cache
from typing import Any

from dynaconv.integrations._optional import import_optional


@cache
def openvino_core() -> Any:
    """The one OpenVINO core of this process.

    Its CPU plugin replaces the thread's alternate signal stack and puts the former one back when it goes. Of two that
    overlap, the second puts back the freed stack of the first, and the next signal, Ctrl-C too, kills the process.

    Raises:
        ImportError: openvino is not installed.
    """
    return import_optional("openvino", "engines").Core()
