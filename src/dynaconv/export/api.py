"""`dynaconv.export.onnx`: standard operators, dynamic batch, and masks that still skip, in one file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv._files import atomic_path
from dynaconv._table import format_table
from dynaconv.convert import gates
from dynaconv.export import clean
from dynaconv.export import gates as gate_logits
from dynaconv.export.branches import find_branches
from dynaconv.export.channels import find_channel_branches
from dynaconv.export.choose import choose_sparse, measure_densities
from dynaconv.export.dense import decide_everywhere, spread_masks
from dynaconv.export.dial import BUDGET, THRESHOLDS, add_densities, add_dial, check_dial
from dynaconv.export.merge import merge_parallel
from dynaconv.export.metadata import KEY, describe, to_json
from dynaconv.export.own import write_densely
from dynaconv.export.parity import Parity, can_check, check_graph
from dynaconv.export.rows import lower
from dynaconv.export.settled import settle
from dynaconv.export.subject import check_subject
from dynaconv.export.trace import NEWEST_OPSET, OLDEST_OPSET, Traced, trace

LOWERINGS = ("sparse", "dense", "auto")


@dataclass(frozen=True)
class OnnxReport:
    """What was written.

    blocks: masked block -> "sparse", "dense", or where its gate has nothing to decide "open" or "closed".
    densities: those by which lowering="auto" chose. inputs, outputs: name -> shape, free axes by name.
    error, flips: see `Parity`; None where nothing was compared.
    """

    path: Path
    opset: int
    lowering: str
    blocks: dict[str, str] = field(default_factory=dict)
    densities: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, list[Any]] = field(default_factory=dict)
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    error: float | None = None
    flips: float | None = None

    def table(self) -> str:
        """Readable text."""
        lines = [f"{self.path} ({self.path.stat().st_size / 1e6:.1f} MB), opset {self.opset}"]
        lines += [f"input  {name} {shape}" for name, shape in self.inputs.items()]
        lines += [f"output {name} {shape}" for name, shape in self.outputs.items()]
        if self.error is None:
            lines.append("not compared with eager PyTorch")
        else:
            lines.append(
                f"ONNX Runtime against eager PyTorch: off by {self.error:.1e} of the largest magnitude; "
                f"{self.flips:.1e} of the mask positions decided differently"
            )
        if self.blocks:
            rows = [(name, kind, _number(self.densities.get(name))) for name, kind in self.blocks.items()]
            lines += ["", format_table(("block", "lowering", "density"), rows, "llr")]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def onnx(
    model: nn.Module,
    example: tuple[Tensor, ...],
    path: str | os.PathLike[str],
    *,
    lowering: str = "auto",
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    batch: int = 1,
    winograd: bool = True,
    opset: int = OLDEST_OPSET,
    dial: str | None = "budget",
    report: Iterable[str] = ("densities",),
    densities: Mapping[str, float] | float | None = None,
    metadata: Mapping[str, Any] | None = None,
    check: bool | None = None,
) -> OnnxReport:
    """Write a network, static or dynamic, as an ONNX file of standard operators.

    Args:
        model: in evaluation mode; it is not changed. Masks that were forced on it are left behind.
        example: (x,) with images [N, C, H, W].
        path: of the file; written whole or not at all.
        lowering: "dense" (convolution times mask), "sparse" (open positions of all images in one product), or "auto":
            each masked block by whichever is faster at its density.
        dynamic_batch: any number of images. dynamic_size: any height and width.
        batch: how many images the file shall be fastest for; it serves any number. Where the number is fixed, it is
            that one.
        winograd: let sparse blocks compute wide 3 x 3 convolutions of many positions by Winograd's F(2 x 2, 3 x 3),
            arXiv 1509.09308, which rounds like any float32. False for a file that 8 bits shall be made of.
        opset: version of the operator set, 18 or newer.
        dial: "budget" adds the input `budget_threshold` [], the threshold of all gates; "gates" adds `thresholds`
            [gates], one for each; None fixes them.
        report: outputs beside the network's own: "densities" [N, gates], the open share of each mask, and
            "executed_macs" [N], what was computed for each image. Networks without gates have none.
        densities: for lowering="auto": one share, or block -> share. Left out, a calibrated network has those that
            calibration measured at the thresholds that are set, and another one those of the example.
        metadata: JSON-ready facts to keep in the file (classes, mean, std, ...).
        check: compare with eager PyTorch in ONNX Runtime before writing; None does so where that is installed.
    Returns:
        OnnxReport; the file's inputs are `images` (and `input_1`, ...), its outputs `output` (or `output_0`, ...).
    Raises:
        ValueError: training mode, an opset too old, an unknown lowering, a block without sparse lowering, a network
            that cannot be exported. ImportError: a package is missing. RuntimeError: the graph and eager differ.
        OSError: the path cannot be written; nothing is left there.
    """
    _check_arguments(lowering, opset, batch)
    check_subject(model, example)
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    report = tuple(report) if gates(model) or tuple(report) != ("densities",) else ()
    dial = check_dial(model, dial, report)
    if dynamic_size and "executed_macs" in report:
        raise _checks.export_no_count()
    traced = trace(
        model,
        example,
        dynamic_batch=dynamic_batch,
        dynamic_size=dynamic_size,
        count="executed_macs" in report,
    )
    add_dial(traced, dial)
    if lowering == "dense" or not traced.masks:
        write_densely(traced.graph)
    _tidy(traced)
    images = batch if dynamic_batch else len(example[0])
    blocks, shares = _lower(traced, model, example, lowering, densities, images if winograd else 0)
    if "densities" in report:
        add_densities(traced)
    facts = describe(model, example, metadata)
    facts |= {"lowering": blocks, "dial": dial, "opset": opset}
    parity = _finish(traced, model, example, opset, dial, check)
    _write(traced, path, facts)
    shapes = [
        {value.name: [d if isinstance(d, int) else str(d) for d in value.shape] for value in values}
        for values in (traced.graph.inputs, traced.graph.outputs)
    ]
    return OnnxReport(path, opset, lowering, blocks, shares, *shapes, *(parity or (None, None)))


def _check_arguments(lowering: str, opset: int, batch: int) -> None:
    _checks.one_of("lowering", lowering, LOWERINGS)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be a whole number of images, 1 or more, got {batch!r}")
    if isinstance(opset, bool) or not isinstance(opset, int) or not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise _checks.export_opset(opset, OLDEST_OPSET, NEWEST_OPSET)


def _tidy(traced: Traced) -> None:
    clean.simplify(traced.model)
    clean.fold_norms(traced.graph)
    merge_parallel(traced.graph)
    clean.transpose_weights(traced.graph)
    clean.average_pools(traced.graph)
    clean.drop_expands(traced.graph)
    clean.drop_unused(traced.model)


def _lower(
    traced: Traced, model: nn.Module, example: tuple[Tensor, ...], lowering: str, densities: Any, images: int
) -> tuple[dict[str, str], dict[str, float]]:
    """Rewrite masked blocks; how each became, and the densities that decided it."""
    settled = settle(traced)
    clean.drop_unread(traced.model)
    found = [*find_branches(traced.graph, traced.masks), *find_channel_branches(traced.masks)]
    names = {branch.name for branch in found}
    if lowering == "sparse":
        _refuse_dense(traced, names | set(settled))
    shares: dict[str, float] = {}
    chosen = found if lowering == "sparse" else []
    if lowering == "auto" and found:
        shares = measure_densities(model, example, densities)
        chosen = choose_sparse(found, shares, images)
    dense = [branch for branch in found if branch not in chosen]
    write_densely(traced.graph, [node for branch in chosen for node in branch.own])
    # What batched products make is in no layout that a mask of all channels would keep.
    dense = [branch for branch in dense if not branch.own]
    served = decide_everywhere(traced.graph, dense)
    clean.drop_unread(traced.model)
    spread_masks(traced.graph, [branch for branch in dense if branch not in served])
    if chosen:
        lower(traced.graph, chosen, images)
        write_densely(traced.graph)
    else:
        gate_logits.rewrite(traced.graph)
    skipping = {branch.name for branch in chosen}
    names = dict.fromkeys([*traced.gates, *(branch.name for branch in found)])
    blocks = {name: "sparse" if name in skipping else settled.get(name, "dense") for name in names}
    return blocks, {name: shares[name] for name in blocks if name in shares}


def _refuse_dense(traced: Traced, found: set[str]) -> None:
    for name, mask in traced.masks.items():
        if name in found:
            continue
        if mask.shape is not None and len(mask.shape) == 4 and mask.shape[1] == 1:
            reason = "its masked result is not a chain of convolutions and of functions of single positions"
        else:
            reason = "its gate does not decide for the hidden channels of a chain of convolutions"
        raise _checks.export_not_sparse(name, reason)


def _finish(
    traced: Traced,
    model: nn.Module,
    example: tuple[Tensor, ...],
    opset: int,
    dial: str | None,
    check: bool | None,
) -> Parity | None:
    """The graph in its final form, checked."""
    import onnx_ir as ir

    clean.drop_unused(traced.model)
    traced.graph.opset_imports.pop("dynaconv", None)
    traced.graph.sort()
    clean.convert(traced.model, opset)
    traced.name_outputs()
    parity = None
    if can_check() if check is None else check:
        data = ir.to_proto(traced.model).SerializeToString()
        parity = check_graph(traced, data, model, example, default_feed(model, dial))
    traced.drop_mask_outputs()
    clean.drop_unread(traced.model)
    return parity


def default_feed(model: nn.Module, dial: str | None) -> dict[str, np.ndarray]:
    """What to feed a dial so that the file computes what the network computes as it is set now."""
    values = np.array([float(gate.threshold) for gate in gates(model).values()], np.float32)
    if dial == "budget":
        return {BUDGET: np.array(values[0])}
    return {THRESHOLDS: values} if dial == "gates" else {}


def _write(traced: Traced, path: Path, facts: Mapping[str, Any]) -> None:
    import onnx as onnx_package
    import onnx_ir as ir

    traced.model.metadata_props.clear()
    traced.model.metadata_props[KEY] = to_json(facts)
    traced.model.producer_name, traced.model.producer_version = "dynaconv", facts["dynaconv_version"]
    clean.strip(traced.model)
    proto = ir.to_proto(traced.model)
    onnx_package.checker.check_model(proto, full_check=False)
    data = proto.SerializeToString()
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


__all__ = ["LOWERINGS", "OnnxReport", "default_feed", "onnx"]
