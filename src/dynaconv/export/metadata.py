"""What an exported file says about itself, as JSON under one key, in ONNX and beside a .pt2 program alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dynaconv import _checks
from dynaconv._version import __version__
from dynaconv.convert import gates

KEY, FORMAT = "dynaconv", 1


def describe(
    model: nn.Module, example: tuple[Tensor, ...], extra: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Facts about a network: version, input, classes and preprocessing (from `extra`), gates, table of budgets."""
    found = gates(model)
    table = next((gate.budget_table for gate in found.values()), None)
    return {
        "format": FORMAT,
        "dynaconv_version": __version__,
        "input_size": list(example[0].shape[1:]),
        "gates": list(found),
        "threshold": {name: float(gate.threshold) for name, gate in found.items()},
        # [share of the conditional MACs, threshold that meets it, 1 where the share was asked for], ascending.
        "budgets": [] if table is None else [[round(float(v), 6) for v in row[:3]] for row in table],
        **dict(extra or {}),
    }


def to_json(facts: Mapping[str, Any]) -> str:
    """One line of JSON; an infinite threshold (everything open) becomes null."""
    return json.dumps(_plain(facts), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What an ONNX file that was written by `export.onnx` says about itself.

    Raises:
        FileNotFoundError: no such file. ValueError: no ONNX file, or one of somebody else.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}; `dynaconv export RUN` makes one")
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise _checks.export_not_ours(path, f"it is no ONNX file: {error}") from None
    if not model.graph.node:
        raise _checks.export_not_ours(path, "it is no ONNX file, or an empty one")
    text = next((p.value for p in model.metadata_props if p.key == KEY), None)
    if text is None:
        raise _checks.export_not_ours(path)
    try:
        facts = json.loads(text)
    except json.JSONDecodeError as error:
        raise _checks.export_not_ours(path, f"its metadata is damaged: {error}") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise _checks.export_not_ours(path, f"its metadata is not of format {FORMAT}")
    return facts
