"""Compiled models on disk: one safetensors file, packed weights and the plan as JSON in its metadata."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree

from dynaconv import _checks
from dynaconv._files import atomic_path
from dynaconv.engine.aten import is_known
from dynaconv.engine.plan import Plan
from dynaconv.engine.pool import Pool
from dynaconv.engine.structures import PLAN_ABI
from dynaconv.engine.trust import check_externals, check_weights

# A file goes with the kernels' version: what a step's numbers mean changes with it, and packed weights do, too.
FORMAT = PLAN_ABI
# What a plan may hold, by the name that safetensors gives it.
_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def save(plan: Plan, out_spec: Any, path: str | Path) -> Path:
    """Write a plan; the file appears whole or not at all."""
    data = plan.to_json()
    data["out_spec"] = _pytree.treespec_dumps(out_spec)
    # Tensors that share memory are written one by one.
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in plan.tensors().items()}
    text = json.dumps(data)
    metadata = {"dynaconv": "plan", "format": str(FORMAT), "plan": text, "checksum": checksum(text, tensors)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return Path(path)


def checksum(plan: str, tensors: Mapping[str, Tensor]) -> str:
    """A number that a changed bit of the plan or of a tensor changes."""
    value = zlib.crc32(plan.encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy()), value)
    return f"{value:08x}"


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
        tensors = _read_tensors(file)
        if checksum(metadata["plan"], tensors) != metadata["checksum"]:
            raise _checks.engine_damaged_file(str(file), "its checksum does not fit")
        data = json.loads(metadata["plan"])
        out_spec = _pytree.treespec_loads(data["out_spec"])
        plan = Plan.from_json(data, tensors)
        check_weights(plan)
        check_externals(plan)
    except (
        SafetensorError,
        KeyError,
        TypeError,
        IndexError,
        ZeroDivisionError,
        UnicodeDecodeError,
        json.JSONDecodeError,
    ) as error:
        raise _checks.engine_damaged_file(str(file), error) from error
    unknown = [step.target for step in plan.aten if not is_known(step.target)]
    if unknown:
        raise _checks.engine_unknown_operator(str(file), unknown[0])
    return plan, out_spec


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file that safetensors has accepted, read straight to its place, so that none is held twice."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(length))
        entries.pop("__metadata__", None)
        sizes = [end - start for start, end in (e["data_offsets"] for e in entries.values())]
        pool, tensors = Pool(sizes), {}
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            own = pool.take(end - start)
            opened.seek(8 + length + start)
            if end > start and opened.readinto(memoryview(own.numpy())) != end - start:
                raise _checks.engine_damaged_file(str(file), EOFError("a tensor ends early"))
            tensors[name] = own.view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors
