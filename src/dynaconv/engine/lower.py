"""From the compiler's graph to the flat plan: values, grids, convolutions and steps in order of execution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dynaconv.engine import pack
from dynaconv.engine.aten import encode, is_known, slot_ref, target_text
from dynaconv.engine.fold import zero_bias
from dynaconv.engine.ir import Constant, Graph, Node, Ref, View
from dynaconv.engine.lower_mixed import lower_expanded, lower_mixed, lower_router
from dynaconv.engine.masks import partial_grid
from dynaconv.engine.plan import (
    KINDS,
    NEVER,
    AtenStep,
    Conv,
    External,
    GateInfo,
    Grid,
    Plan,
    Segment,
    Step,
    Value,
)

# Open share above which a needed but not masked convolution computes every row, until it is measured.
RUN_ALL_ABOVE = 0.75
STEM_CHANNELS = 4
_MOST_TAPS = 256
_ALIASING_BYTES, _ALIASING_ELEMENTS = 2048, 16


def lower(graph: Graph, batch: int | None = None, inputs: int = 1) -> Plan:
    """The plan of a graph whose passes are done; offsets in the arena come later (arena.py)."""
    lowering = Lowering(graph, batch)
    lowering.plan.inputs = lowering.plan.slots = inputs
    return lowering.run()


class Lowering:
    """Walks over the graph and emits what computes each node; mixed convolutions are in lower_mixed.py."""

    def __init__(self, graph: Graph, batch: int | None) -> None:
        self.graph = graph
        self.plan = Plan(batch=batch)
        self.values: dict[Node, int] = {}
        self.slots: dict[Node, int] = {}
        self.grids: dict[Node, int] = {}
        self.users = graph.users()
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self.first_native = 0
        # Memory of which some values are a part.
        self.shared: set[int] = set()
        self.pieces = self._pieces()

    def run(self) -> Plan:
        plan = self.plan
        for node in self.graph.nodes:
            emit: Callable[[Node], None] = getattr(self, f"_{node.op}")
            emit(node)
        plan.outputs = [encode(self._argument(o), plan.constants) for o in self.graph.outputs]
        self._cut()
        for grid in {s.grid for s in plan.steps if s.closed}:
            plan.grids[grid].closed = 1
        return plan

    # Values

    def _pieces(self) -> dict[Node, tuple[Node, int]]:
        """What is computed where its concatenation wants it: in which one, and from which channel on."""
        found = {}
        for node in self.graph.nodes:
            if node.op != "concat" or self._is_made(node):
                continue
            channel = 0
            for piece in node.inputs.values():
                if len(self.users[piece]) == 1 and not piece.is_grid and piece.op not in ("aten", "input"):
                    found[piece] = (node, channel)
                channel += piece.size[2]
        return found

    def room(self, size: tuple[int, int, int], name: str, share: int = -1, external: str = "") -> int:
        h, w, c = size
        stride = c if external or (c * 4) % _ALIASING_BYTES else c + _ALIASING_ELEMENTS
        index = len(self.plan.values)
        storage = index if share < 0 else self.plan.values[share].storage
        value = Value(h, w, c, stride, storage, name=name)
        self.plan.values.append(value)
        if external:
            value.external = len(self.plan.externals)
            self.plan.externals.append(External(index, external))
        return index

    def _slot(self, node: Node) -> int:
        if node not in self.slots:
            self.slots[node] = self.plan.slots
            self.plan.slots += 1
        return self.slots[node]

    def _part(self, node: Node, of: int, start: int) -> int:
        """Channels of a value, from `start` on, as the value of a node."""
        source, index = self.plan.values[of], len(self.plan.values)
        value = replace(source, channels=node.size[2], first=source.first + start, name=node.layer)
        self.plan.values.append(value)
        self.shared.add(source.storage)
        self.values[node] = index
        return index

    def _whole(self, node: Node) -> int:
        """The value of a concatenation, some of whose parts may already be in it."""
        if node not in self.values:
            self.result(node)
        return self.values[node]

    def _is_made(self, node: Node) -> bool:
        """ATen or the caller reads the value, so it lies outside of the arena."""
        return any(user is None or user.op == "aten" for user in self.users[node])

    def result(self, node: Node, share: int = -1) -> int:
        """The value of a node's result."""
        made = self._is_made(node)
        if not made and share < 0 and node in self.pieces:
            whole, start = self.pieces[node]
            return self._part(node, self._whole(whole), start)
        index = self.room(node.size, node.layer, -1 if made else share, "made" if made else "")
        if made:
            external = self.plan.externals[-1]
            external.slot = self._slot(node)
        self.values[node] = index
        return index

    def value(self, node: Node) -> int:
        """Rows that hold a node's value, for a native reader."""
        if node not in self.values:
            if node.is_grid or node.op == "open_channels":
                out = self.result(node)
                self.step("mask_value", node, grid=self.grids[node], out=out)
            else:
                assert node.op in ("aten", "input")
                source = self._external(node)
                self.values[node] = source
                if node.op == "input":
                    self.values[node] = self.room(node.size, node.layer)
                    self.step("layout", node, input=source, out=self.values[node])
        return self.values[node]

    def _external(self, node: Node) -> int:
        """An external value that holds the image, or what an ATen step made."""
        source = "input" if node.op == "input" else "slot"
        index = self.room(node.size, node.layer, external=source)
        self.plan.externals[-1].slot = self._slot(node)
        self.plan.externals[-1].layout = node.attrs.get("held", "nchw")
        return index

    def step(self, kind: str, node: Node, **fields: Any) -> Step:
        step = Step(kind, layer=node.layer, **fields)
        self.plan.steps.append(step)
        return step

    def conv_data(self, conv: Conv) -> list[int]:
        """A convolution as the only one of a step."""
        self.plan.convs.append(conv)
        return [len(self.plan.convs) - 1, -1, -1]

    # Operations

    def _input(self, node: Node) -> None:
        index = node.attrs["index"]
        self.slots[node] = index
        if node.size is not None and index == 0:
            h, w, c = node.size
            self.plan.image = (c, h, w)

    def _conv(self, node: Node) -> None:
        if node.is_mixed:
            lower_mixed(self, node)
            return
        form = self._form(node)
        if "channels" not in node.inputs:
            self.convolution(form, node, lambda: self.packed(node, form))
            return
        ints = _narrowed(form, *(int(node.attrs.get(side, False)) for side in ("open_in", "open_out")))
        grid = self.grids[node.inputs["channels"]]
        self.convolution("narrow", node, lambda: self.packed(node, form), grid=grid, ints=ints)

    def convolution(
        self, kind: str, node: Node, convs: Callable[[], list[int]], *, tiles: bool = False, **fields: Any
    ) -> None:
        """The step of a convolution, with what becomes of the rows that its mask closes.

        Args:
            convs: makes the step's convolutions, after its values.
            tiles: it may run by Winograd's tiles though its convolution has no weights for them.
        """
        source = self._external(node.x) if kind == "stem" else self.value(node.x)
        residual, grid = node.inputs.get("residual"), node.inputs.get("grid")
        in2 = -1 if residual is None else self.value(residual)
        out = self.result(node, in2 if self._may_overwrite(node) else -1)
        final = node.attrs.get("final_act", "none")
        fields |= {
            "input": source, "input2": in2, "out": out, "conv": convs(), "final_activation": final,
            "activation": [node.attrs["act"], "none", "none"],
        }  # fmt: skip
        if grid is not None:
            fields["grid"] = self.grids[grid]
            if tiles or self.plan.convs[fields["conv"][0]].winograd is not None:
                self.plan.grids[fields["grid"]].tiles = 1
        held = partial_grid(node.x)
        if held is not None:
            # Which rows of the input hold something.
            fields["grid2"] = self.grids[held]
        if node.attrs.get("masked"):
            self._closed_rows(node, in2, out, final, fields["grid"])
        elif "closed_act" in node.attrs:
            closed = {**fields, "activation": [node.attrs["closed_act"], "none", "none"], "closed": 1}
            self.step(kind, node, **closed)
        elif grid is not None:
            fields["run_all_above"] = RUN_ALL_ABOVE
        self.step(kind, node, **fields)

    def _inverted(self, node: Node) -> None:
        source, residual, grid = self.value(node.x), node.inputs.get("residual"), node.inputs.get("grid")
        in2 = -1 if residual is None else self.value(residual)
        out = self.result(node, in2 if self._may_overwrite(node) else -1)
        final, parts = node.attrs.get("final_act", "none"), node.attrs["parts"]
        forms = ("conv", "depthwise", "conv")
        convs = [-1 if p is None else self.packed(p, f)[0] for p, f in zip(parts, forms, strict=True)]
        for index in (convs[0], convs[2]):
            if index >= 0:
                self.plan.convs[index].winograd = None
        acts = ["none" if p is None else p.attrs["act"] for p in parts]
        fields: dict[str, Any] = {}
        if grid is not None:
            fields = {"grid": self.grids[grid], "grid2": self.grids[node.inputs["grid2"]]}
            self._closed_rows(node, in2, out, final, fields["grid"])
        kind = "inverted"
        if "channels" in node.inputs:
            kind, fields = (
                "narrow",
                {"grid": self.grids[node.inputs["channels"]], "ints": _narrowed(kind, 0, 0)},
            )
        self.step(
            kind, node, input=source, input2=in2, out=out, conv=convs, activation=acts,
            final_activation=final, **fields,
        )  # fmt: skip

    def _expanded(self, node: Node) -> None:
        lower_expanded(self, node)

    def _router(self, node: Node) -> None:
        lower_router(self, node)

    def _closed_rows(self, node: Node, in2: int, out: int, final: str, grid: int) -> None:
        """What becomes of the rows that the masked convolution leaves alone."""
        in_place = self.plan.values[in2].place == self.plan.values[out].place
        act = final if node.attrs["closed"] == "activate" else "none"
        if act != "none" or not in_place:
            acts = [act, "none", "none"]
            self.step("activate", node, input=in2, out=out, activation=acts, grid=grid, closed=1)

    def _may_overwrite(self, node: Node) -> bool:
        """The result may take the residual's place: nobody reads it later, nor does the convolution itself."""
        residual = node.inputs.get("residual")
        if residual is None or not self._is_last_reader(node, residual):
            return False
        values = self.plan.values
        storage = values[self.values[residual]].storage
        return node.x not in self.values or values[self.values[node.x]].storage != storage

    def _is_last_reader(self, node: Node, source: Node) -> bool:
        """Nobody reads this operand later, and its memory is its own."""
        if source.is_grid or source not in self.values:
            return False
        value = self.plan.values[self.values[source]]
        if value.external >= 0 or value.storage in self.shared:
            return False
        return all(u is not None and self.place[u] <= self.place[node] for u in self.users[source])

    def _form(self, node: Node) -> str:
        weight, groups = node.attrs["weight"], node.attrs["groups"]
        if groups > 1 and groups == weight.shape[0] and weight.shape[1] == 1:
            return "depthwise"
        image = node.x.op == "input" and node.x.size[2] <= STEM_CHANNELS and groups == 1
        plain = not {"grid", "residual"} & set(node.inputs) and node.attrs["dilation"] == (1, 1)
        return "stem" if image and plain and node.x.size[:2] != (1, 1) else "conv"

    def packed(self, node: Node, form: str) -> list[int]:
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
        return self.conv_data(conv)

    def _geometry(self, node: Node) -> list[int]:
        channels, attrs = node.x.size[2] if "x" in node.inputs else 1, node.attrs
        return self.conv_data(
            Conv(
                "none",
                channels,
                channels,
                1,
                *(attrs[k] for k in ("kernel", "stride", "padding", "dilation")),
            )
        )

    def _max_pool(self, node: Node) -> None:
        source = self.value(node.x)
        self.step("max_pool", node, input=source, out=self.result(node), conv=self._geometry(node))

    def _avg_pool(self, node: Node) -> None:
        ints = [int(node.attrs["include_pad"])] + [0] * 7
        source = self.value(node.x)
        self.step("avg_pool", node, input=source, out=self.result(node), conv=self._geometry(node), ints=ints)

    def _mean(self, node: Node) -> None:
        if node in self.values:
            # The step before took it on the way.
            return
        source = self.value(node.x)
        grid = self.grids[node.inputs["grid"]] if "grid" in node.inputs else -1
        self.step("mean", node, input=source, out=self.result(node), grid=grid)

    def _act(self, node: Node) -> None:
        source = self.value(node.x)
        acts = [node.attrs["act"], "none", "none"]
        self.step("activate", node, input=source, out=self.result(node), activation=acts)

    def _pairwise(self, node: Node, kind: str, share: int = -1, **fields: Any) -> None:
        first, second = self.value(node.x), self.value(node.inputs["y"])
        acts = [node.attrs.get("act", "none"), "none", "none"]
        out = self.result(node, share)
        self.step(kind, node, input=first, input2=second, out=out, activation=acts, **fields)

    def _add(self, node: Node) -> None:
        self._pairwise(node, "add")

    def _sub(self, node: Node) -> None:
        self._pairwise(node, "add", ints=[1] + [0] * 7)

    def _mul(self, node: Node) -> None:
        self._pairwise(node, "multiply")

    def _weighted_add(self, node: Node) -> None:
        weight = self.value(node.inputs["weight"])
        total = node.x
        share = self.value(total) if self._is_last_reader(node, total) else -1
        self._pairwise(node, "add", share, aux=[weight, -1, -1, -1])

    def _scale(self, node: Node) -> None:
        source, attrs = self.value(node.x), node.attrs
        floats, acts = [attrs["scale"], attrs["shift"], 0.0, 0.0], [attrs["act"], "none", "none"]
        out, ints = self.result(node), [1] + [0] * 7
        self.step("activate", node, input=source, out=out, activation=acts, ints=ints, floats=floats)

    def _layer_norm(self, node: Node) -> None:
        c, source = node.size[2], self.value(node.x)
        conv = self.conv_data(Conv("norm", c, c, weight=node.attrs["weight"], bias=node.attrs["bias"]))
        floats = [float(node.attrs["eps"]), 0.0, 0.0, 0.0]
        self.step("layer_norm", node, input=source, out=self.result(node), conv=conv, floats=floats)

    def _softmax(self, node: Node) -> None:
        ints, floats = [node.attrs["group"]] + [0] * 7, [node.attrs["scale"], 0.0, 0.0, 0.0]
        source = self.value(node.x)
        self.step("softmax", node, input=source, out=self.result(node), ints=ints, floats=floats)

    def _slice(self, node: Node) -> None:
        source, start, step = self.value(node.x), node.attrs["start"], node.attrs["step"]
        inside = self.plan.values[source].external < 0 and not self._is_made(node)
        if inside and step == 1 and node not in self.pieces:
            self._part(node, source, start)
        else:
            self.step("copy", node, input=source, out=self.result(node), ints=[0, start, 1, step] + [0] * 4)

    def _concat(self, node: Node) -> None:
        out, channel = self._whole(node), 0
        for piece in node.inputs.values():
            source, whole = self.value(piece), self.plan.values[out]
            if self.plan.values[source].place != (whole.storage, whole.first + channel):
                self.step("copy", node, input=source, out=out, ints=[channel] + [0] * 7)
            channel += piece.size[2]

    def _interleave(self, node: Node) -> None:
        sources = [self.value(piece) for piece in node.inputs.values()]
        out = self.result(node)
        for i, source in enumerate(sources):
            self.step("copy", node, input=source, out=out, ints=[i, 0, len(sources)] + [0] * 5)

    # Masks

    def _gate(self, node: Node) -> None:
        source, weight = self.value(node.x), node.attrs["weight"]
        packed = pack.pack_gate(weight, node.attrs.get("linear"), node.attrs["bias"])
        geometry = (node.attrs[k] for k in ("stride", "padding", "dilation"))
        conv = Conv("gate", weight.shape[1], 1, 1, tuple(weight.shape[2:]), *geometry, *packed)
        tap_bias = node.attrs.get("tap_bias")
        if tap_bias is not None:
            conv.bias = torch.cat([conv.bias, tap_bias])
        ints, aux = [int(node.attrs["squeeze"]), int(tap_bias is not None)] + [0] * 6, [-1] * 4
        if node.attrs["squeeze"]:
            # One sum for each line of the map.
            aux[0] = self.room((self.plan.values[source].height, 1, 1), f"{node.layer} sums")
        out = self.result(node)
        self.step("gate", node, input=source, out=out, conv=self.conv_data(conv), ints=ints, aux=aux)

    def _grid(self, node: Node, gate: str = "") -> int:
        h, w, _ = node.size
        self.plan.grids.append(Grid(h, w, gate=gate))
        self.grids[node] = len(self.plan.grids) - 1
        return self.grids[node]

    def _threshold(self, node: Node) -> None:
        logits = self.value(node.x)
        grid = self._grid(node, node.attrs.get("gate", ""))
        floats = [float(node.attrs["threshold"]), 0.0, 0.0, 0.0]
        within = self.grids[node.inputs["within"]] if "within" in node.inputs else -1
        self.step("threshold", node, input=logits, grid=grid, grid2=within, floats=floats)
        self._tell_gate(node, grid)
        self._mask_out(node)

    def _tell_gate(self, node: Node, grid: int) -> None:
        """The last step is the decision of a gate that the network names."""
        if node.attrs.get("gate") is None:
            return
        budgets = node.attrs.get("budgets", [])
        about = node.attrs.get("scope", "position"), node.attrs.get("dial", True)
        step = len(self.plan.steps) - 1
        self.plan.gates.append(GateInfo(node.attrs["gate"], grid, step, budgets, *about))

    def _open_channels(self, node: Node) -> None:
        """A mask of 1 x channels positions."""
        logits = self.value(node.x)
        self.plan.grids.append(Grid(1, node.size[2], gate=node.attrs.get("gate", "")))
        self.grids[node] = grid = len(self.plan.grids) - 1
        self.step(
            "threshold", node, input=logits, grid=grid, floats=[float(node.attrs["threshold"]), 0.0, 0.0, 0.0]
        )
        self._tell_gate(node, grid)
        self._mask_out(node)

    def _repeat(self, node: Node) -> None:
        source, times, out = self.value(node.x), node.attrs["times"], self.result(node)
        for i in range(times):
            self.step("copy", node, input=source, out=out, ints=[i, 0, times] + [0] * 5)

    def _upsample(self, node: Node) -> None:
        factors, size = node.attrs["factors"], node.size
        kernel = (min(factors[0], size[0]), min(factors[1], size[1]))
        source = self.grids[node.x]
        rows = source
        # A decision for a whole map would have more taps than a kernel may have: along rows, then along columns.
        if kernel[0] * kernel[1] > _MOST_TAPS:
            self.plan.grids.append(Grid(size[0], node.x.size[1]))
            rows = len(self.plan.grids) - 1
            conv = self.conv_data(Conv("none", 1, 1, 1, (kernel[0], 1), (factors[0], 1)))
            self.step("dilate", node, grid=source, grid2=rows, conv=conv)
            kernel, factors = (1, kernel[1]), (1, factors[1])
        conv = self.conv_data(Conv("none", 1, 1, 1, kernel, factors))
        grid = self._grid(node, self.plan.grids[source].gate)
        # Forced masks have the size of the gate's result, which is this one.
        for gate in self.plan.gates:
            if gate.grid == source:
                gate.grid = grid
        self.step("dilate", node, grid=rows, grid2=grid, conv=conv)
        self._mask_out(node)

    def _dilate(self, node: Node) -> None:
        source = self.grids[node.inputs["grid"]]
        grid = self._grid(node)
        self.step("dilate", node, grid=source, grid2=grid, conv=self._geometry(node))

    def _mask_out(self, node: Node) -> None:
        if self._is_made(node):
            self.value(node)

    # ATen

    def _aten(self, node: Node) -> None:
        attrs = node.attrs
        self._close_segment()
        args = encode(_map(attrs["args"], lambda v: self._filled(node, v)), self.plan.constants)
        kwargs = encode(_map(attrs["kwargs"], lambda v: self._filled(node, v)), self.plan.constants)
        text = target_text(attrs["target"])
        if not is_known(text):
            # An operator of somebody else's: this plan holds it, but no file can.
            self.plan.constants[text] = attrs["target"]
        step = AtenStep(text, args, kwargs, self._slot(node), node.layer, attrs["reason"])
        self.plan.aten.append(step)
        self.plan.segments.append(Segment(aten=len(self.plan.aten) - 1))

    def _filled(self, node: Node, arg: Any) -> Any:
        return self._argument(View(node.inputs[arg.role], arg.layout) if isinstance(arg, Ref) else arg)

    def _argument(self, arg: Any) -> Any:
        """A reference to what a view looks at; constants as tensors; others as they are."""
        if isinstance(arg, Constant):
            return arg.tensor
        if not isinstance(arg, View):
            return arg
        node = arg.node
        if node.op in ("aten", "input"):
            held = node.attrs.get("held", "nchw" if node.size is not None else "raw")
            return slot_ref(self._slot(node), held, arg.layout)
        return slot_ref(self._slot(node), "rows", arg.layout)

    def _close_segment(self) -> None:
        if len(self.plan.steps) > self.first_native:
            self.plan.segments.append(Segment(self.first_native, len(self.plan.steps)))
            self.first_native = len(self.plan.steps)

    def _cut(self) -> None:
        self._close_segment()
        last: dict[int, int] = {}
        for i, step in enumerate(self.plan.aten):
            for slot in _slots_in([step.args, step.kwargs]):
                last[slot] = i
        keep = set(_slots_in(self.plan.outputs)) | {e.slot for e in self.plan.externals}
        for slot, i in last.items():
            if slot not in keep:
                self.plan.aten[i].frees.append(slot)


def _narrowed(kind: str, ins: int, outs: int) -> list[int]:
    """What a step of this kind does of open channels: on which sides of its convolution they are decided."""
    return [KINDS.index(kind), ins, outs] + [0] * 5


def _map(arg: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(arg, Ref):
        return change(arg)
    if isinstance(arg, list):
        return [_map(a, change) for a in arg]
    if isinstance(arg, dict):
        return {k: _map(v, change) for k, v in arg.items()}
    return change(arg)


def _slots_in(tree: Any) -> list[int]:
    if isinstance(tree, list):
        return [s for t in tree for s in _slots_in(t)]
    if isinstance(tree, dict):
        return [tree["slot"]] if tree.get("$") == "slot" else [s for t in tree.values() for s in _slots_in(t)]
    return []


__all__ = ["NEVER", "RUN_ALL_ABOVE", "lower"]
