"""Compiled models on disk: one safetensors file, packed weights and the plan as JSON in its metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils import _pytree

from dynaconv import _checks
from dynaconv._files import atomic_path
from dynaconv.engine.plan import Plan
from dynaconv.engine.pool import pool_weights

FORMAT = 1


def save(plan: Plan, out_spec: Any, path: str | Path) -> Path:
    """Write a plan; the file appears whole or not at all."""
    data = plan.to_json()
    data["out_spec"] = _pytree.treespec_dumps(out_spec)
    metadata = {"dynaconv": "plan", "format": str(FORMAT), "plan": json.dumps(data)}
    # Tensors that share memory are written one by one.
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in plan.tensors().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return Path(path)


def load(path: str | Path) -> tuple[Plan, Any]:
    """A plan and the structure of its result.

    Raises:
        FileNotFoundError. ValueError: damaged, foreign, or of another version.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no compiled model at {file}")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("dynaconv") != "plan" or metadata.get("format") != str(FORMAT):
                raise _checks.engine_other_file(str(file), metadata.get("format"), FORMAT)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        data = json.loads(metadata["plan"])
        out_spec = _pytree.treespec_loads(data["out_spec"])
        plan = Plan.from_json(data, tensors)
        pool_weights(plan)
        return plan, out_spec
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise _checks.engine_damaged_file(str(file), error) from error
