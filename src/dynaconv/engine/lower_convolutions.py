"""Steps of convolutions, with what becomes of the rows that a mask closes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dynaconv.engine import pack
from dynaconv.engine.fold import zero_bias
from dynaconv.engine.ir import Node
from dynaconv.engine.masks import partial_grid
from dynaconv.engine.plan import Conv
from dynaconv.engine.structures import KINDS

if TYPE_CHECKING:
    from dynaconv.engine.lower import Lowering

# Open share above which a needed but not masked convolution computes every row, until it is measured.
RUN_ALL_ABOVE = 0.75
STEM_CHANNELS = 4


def _conv(lowering: Lowering, node: Node) -> None:
    form = _form(lowering, node)
    if "channels" not in node.inputs:
        convolution(lowering, form, node, lambda: packed(lowering, node, form))
        return
    ints = _narrowed(form, *(int(node.attrs.get(side, False)) for side in ("open_in", "open_out")))
    grid = lowering.grids[node.inputs["channels"]]
    convolution(lowering, "narrow", node, lambda: packed(lowering, node, form), grid=grid, ints=ints)


def _inverted(lowering: Lowering, node: Node) -> None:
    source, residual, grid = lowering.value(node.x), node.inputs.get("residual"), node.inputs.get("grid")
    in2 = -1 if residual is None else lowering.value(residual)
    out = lowering.result(node, in2 if _may_overwrite(lowering, node) else -1)
    final, parts = node.attrs.get("final_act", "none"), node.attrs["parts"]
    forms = ("conv", "depthwise", "conv")
    convs = [-1 if p is None else packed(lowering, p, f)[0] for p, f in zip(parts, forms, strict=True)]
    for index in (convs[0], convs[2]):
        if index >= 0:
            lowering.plan.convs[index].winograd = None
    acts = ["none" if p is None else p.attrs["act"] for p in parts]
    fields: dict[str, Any] = {}
    if grid is not None:
        fields = {"grid": lowering.grids[grid]}
        if "grid2" in node.inputs:
            fields["grid2"] = lowering.grids[node.inputs["grid2"]]
        fields["ints"] = [0, _filled(lowering, node, in2, out, final), *[0] * 6]
    kind = "inverted"
    if "channels" in node.inputs:
        kind, fields = (
            "narrow",
            {"grid": lowering.grids[node.inputs["channels"]], "ints": _narrowed(kind, 0, 0)},
        )
    lowering.step(
        kind, node, input=source, input2=in2, out=out, conv=convs, activation=acts,
        final_activation=final, **fields,
    )  # fmt: skip


def convolution(
    lowering: Lowering,
    kind: str,
    node: Node,
    convs: Callable[[], list[int]],
    *,
    tiles: bool = False,
    **fields: Any,
) -> None:
    """The step of a convolution, with what becomes of the rows that its mask closes.

    Args:
        convs: makes the step's convolutions, after its values.
        tiles: it may run by Winograd's tiles though its convolution has no weights for them.
    """
    source = lowering.external(node.x) if kind == "stem" else lowering.value(node.x)
    residual, grid = node.inputs.get("residual"), node.inputs.get("grid")
    in2 = -1 if residual is None else lowering.value(residual)
    out = lowering.result(node, in2 if _may_overwrite(lowering, node) else -1)
    final, apart = node.attrs.get("final_act", "none"), node.attrs.get("closed") == "apart"
    fields |= {
        "input": source, "input2": -1 if apart else in2, "out": out, "conv": convs(), "final_activation": final,
        "activation": [node.attrs["act"], "none", "none"],
    }  # fmt: skip
    if grid is not None:
        fields["grid"] = lowering.grids[grid]
        if tiles or lowering.plan.convs[fields["conv"][0]].winograd is not None:
            lowering.plan.grids[fields["grid"]].tiles = 1
    held = partial_grid(node.x)
    if held is not None:
        # Which rows of the input hold something.
        fields["grid2"] = lowering.grids[held]
    if node.attrs.get("masked"):
        _closed_rows(lowering, node, in2, out, final, fields["grid"])
    elif "closed_act" in node.attrs:
        closed = {**fields, "activation": [node.attrs["closed_act"], "none", "none"], "closed": 1}
        lowering.step(kind, node, **closed)
        if node.attrs.get("closed_only"):
            return
    elif grid is not None:
        fields["run_all_above"] = RUN_ALL_ABOVE
    lowering.step(kind, node, **fields)


def packed(lowering: Lowering, node: Node, form: str) -> list[int]:
    """The convolution of a node with its weights as kernels of this form read them, as the only one of a step."""
    weight, bias, groups = node.attrs["weight"], zero_bias(node), node.attrs["groups"]
    if form == "depthwise":
        packed = pack.pack_depthwise(weight, bias)
    else:
        packed = pack.pack_conv(weight, bias, groups)
    conv = Conv(
        form, weight.shape[1] * groups, weight.shape[0], groups, tuple(weight.shape[2:]),
        *(node.attrs[k] for k in ("stride", "padding", "dilation")), *packed,
    )  # fmt: skip
    if form == "conv" and pack.can_winograd(conv) and "closed_act" not in node.attrs:
        conv.winograd = pack.pack_winograd(weight)
    return lowering.conv_data(conv)


def _form(lowering: Lowering, node: Node) -> str:
    weight, groups = node.attrs["weight"], node.attrs["groups"]
    if groups > 1 and groups == weight.shape[0] and weight.shape[1] == 1:
        return "depthwise"
    # Of a shortcut that is computed along only the closed rows are somebody else's.
    plain = "residual" not in node.inputs or node.attrs.get("closed") == "apart"
    plain = plain and groups == 1 and node.attrs["dilation"] == (1, 1)
    return "stem" if is_picture(node.x) and plain else "conv"


def is_picture(node: Node) -> bool:
    """What the first layers read as it lies: an image of few channels."""
    return node.op == "input" and node.size[2] <= STEM_CHANNELS and node.size[:2] != (1, 1)


def _filled(lowering: Lowering, node: Node, in2: int, out: int, final: str) -> int:
    """What closed rows become: what they hold (0), the shortcut (1), or that with the last activation (2)."""
    if node.attrs["closed"] == "activate" and final != "none":
        return 2
    return int(lowering.plan.values[in2].place != lowering.plan.values[out].place)


def _closed_rows(lowering: Lowering, node: Node, in2: int, out: int, final: str, grid: int) -> None:
    """What becomes of the rows that the masked convolution leaves alone."""
    filled = _filled(lowering, node, in2, out, final)
    if filled:
        acts = [final if filled == 2 else "none", "none", "none"]
        lowering.step("activate", node, input=in2, out=out, activation=acts, grid=grid, closed=1)


def _may_overwrite(lowering: Lowering, node: Node) -> bool:
    """The result may take the residual's place: nobody reads it later, nor does the convolution itself."""
    residual = node.inputs.get("residual")
    if residual is None or not lowering.is_last_reader(node, residual):
        return False
    values = lowering.plan.values
    storage = values[lowering.values[residual]].storage
    return node.x not in lowering.values or values[lowering.values[node.x]].storage != storage


def _narrowed(kind: str, ins: int, outs: int) -> list[int]:
    """What a step of this kind does of open channels: on which sides of its convolution they are decided."""
    return [KINDS.index(kind), ins, outs] + [0] * 5


EMIT = {"conv": _conv, "inverted": _inverted}
