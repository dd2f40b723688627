"""`dynaconv.export.program`: a network in evaluation mode as a `torch.export.ExportedProgram`."""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dynaconv import _checks
from dynaconv._files import atomic_write_bytes
from dynaconv.export.subject import prepare
from dynaconv.ops import decompositions

BATCH, HEIGHT, WIDTH = "batch", "height", "width"


def program(
    model: nn.Module,
    example: tuple[Tensor, ...],
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    decompose: bool = True,
) -> ExportedProgram:
    """Export a network, static or dynamic, so that it runs without its Python code.

    Masked blocks compute densely and multiply by their masks: what skips is made from this (`export.onnx`,
    `dynaconv.compile`). The network is not changed; masks that were forced on it are left behind.

    Args:
        model: in evaluation mode. example: (x,) with images [N, C, H, W].
        dynamic_batch: serve any number of images. dynamic_size: serve any height and width.
        decompose: write this library's operators in PyTorch's own, so that loading needs no dynaconv.
    Raises:
        ValueError: a network in training mode, or one that torch.export cannot follow or ties to one size.
        TypeError: no module, or no tuple of tensors.

    >>> import torch, dynaconv as dc
    >>> model = dc.create_model("dynconv_resnet8_cifar").eval()
    >>> exported = dc.export.program(model, (torch.randn(1, 3, 32, 32),))
    >>> exported.module()(torch.randn(3, 3, 32, 32)).shape
    torch.Size([3, 10])
    """
    exported = export(prepare(model, example), example, dynamic_batch, dynamic_size)
    if not decompose:
        return exported
    with quiet():
        return exported.run_decompositions(decompositions())


def save_program(
    exported: ExportedProgram, path: str | Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a program as a .pt2 file, whole or not at all; `metadata` lies beside it as extra files.

    Raises:
        OSError: the path cannot be written or the disk is full.
    """
    path = Path(path)
    # Not straight to the file: where the disk is full, torch's archive writer ends the process.
    archive = io.BytesIO()
    with quiet():
        torch.export.save(exported, archive, extra_files=dict(metadata or {}))
    atomic_write_bytes(path, archive.getvalue())
    return path


def export(
    model: nn.Module, example: tuple[Any, ...], dynamic_batch: bool, dynamic_size: bool
) -> ExportedProgram:
    """`torch.export.export` of a prepared copy, with the axes that were asked for left free."""
    name = type(model).__name__
    inputs = _several(example) if dynamic_batch else tuple(example)
    axes = ({0: Dim.DYNAMIC} if dynamic_batch else {}) | (
        {2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if dynamic_size else {}
    )
    shapes = _by_parameter(model, [_free(t, axes, t is inputs[0]) for t in inputs])
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        if axes and _exports(model, example):
            raise _checks.export_tied(name, dynamic_batch, dynamic_size, error) from error
        raise _checks.export_not_traceable(name, error) from error


def _free(t: Any, axes: dict[int, Any], images: bool) -> dict[int, Any]:
    """Those axes that a tensor has; beside the images, one of length 1 is no height or width."""
    return {a: kind for a, kind in axes.items() if a < t.dim() and (images or a == 0 or t.shape[a] > 1)}


def _by_parameter(model: nn.Module, shapes: list[Any]) -> tuple[Any, ...]:
    """As torch.export wants them: what goes to `*rest` of the forward is one tuple."""
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(shapes)
    plain = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:plain], tuple(shapes[plain:]))


def _several(example: tuple[Any, ...]) -> tuple[Any, ...]:
    """torch.export takes an axis of length 1 for a constant, so one image becomes two."""
    return tuple(torch.cat([t, t]) if t.shape[0] == 1 else t for t in example)


def _exports(model: nn.Module, example: tuple[Any, ...]) -> bool:
    try:
        with torch.no_grad(), quiet():
            # The first try has marked the example's own tensors.
            torch.export.export(model, tuple(t.clone() for t in example), strict=False)
    except Exception:  # noqa: BLE001 - whatever it is, the first error is the one to tell
        return False
    return True


class quiet(warnings.catch_warnings):
    """Third-party notices about the inner workings of torch.export and torch.onnx, held back."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
