"""The pass that turns a float32 plan into a bfloat16 one.

Feature maps and weights become bfloat16, sums stay float32. What decides (logits, routing weights, masks), what crosses
to ATen or to the caller, and kernels mixed for each image stay float32; conversions are put where the two meet.
"""

from __future__ import annotations

from dataclasses import replace

from dynaconv.engine import pack, pack_bfloat16
from dynaconv.engine.plan import Conv, Plan, Step, Value

FLOAT, HALF = "float32", "bfloat16"
# Rows that are a multiple of this many bytes apart would fight for the same lines of the cache.
_ALIASING_BYTES, _PADDING = 2048, 32
# Kinds that read either precision and write either.
_FREE = ("layout", "stem", "activate", "mean")
_MIXED = ("dynamic_conv", "channel_fusion", "narrow")
_FLOAT_ONLY = ("threshold", "softmax", *_MIXED)
_WRITES_FLOAT = ("gate", "mask_value", "softmax", *_MIXED)
# What may stand between a mean and the decision that follows from it.
_LEADS_ON = ("activate", "add", "multiply", "avg_pool", "copy", "softmax", "conv")


def to_bfloat16(plan: Plan) -> None:
    """Change a plan that `lower` made, before its values have places in the arena."""
    _Change(plan).run()


class _Change:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.steps: list[Step] = []
        self.twins: dict[int, int] = {}

    def run(self) -> None:
        plan = self.plan
        self._choose_dtypes()
        homes = self._homes()
        last = {step.out: i for i, step in enumerate(plan.steps)}
        new_index, ends = [], [0]
        for i, step in enumerate(plan.steps):
            target = step.out
            step = replace(step, input=homes.get(step.input, step.input), input2=homes.get(step.input2, step.input2),
                           out=homes.get(step.out, step.out))  # fmt: skip
            self._add(step)
            new_index.append(len(self.steps) - 1)
            if target in homes and last[target] == i:
                self._convert(homes[target], target, step.layer)
            ends.append(len(self.steps))
        # Steps were put in: segments and gates count anew.
        for segment in plan.segments:
            if segment.aten < 0:
                segment.first, segment.last = ends[segment.first], ends[segment.last]
        for gate in plan.gates:
            gate.step = new_index[gate.step]
        plan.steps, plan.dtype = self.steps, HALF
        self._pack()

    # Which values are bfloat16

    def _choose_dtypes(self) -> None:
        values, steps = self.plan.values, self.plan.steps
        always = {a for s in steps for a in s.aux if a >= 0} | {
            s.out for s in steps if s.kind in _WRITES_FLOAT
        }
        always |= self._numbers()
        # Values computed in place have one precision.
        floats = {values[i].storage for i in always if i >= 0}
        decisions = self._decisions()
        halves = {v.storage for i, v in enumerate(values) if i not in decisions} - floats
        widths: dict[int, int] = {}
        for value in values:
            widths[value.storage] = max(widths.get(value.storage, 0), value.first + value.channels)
        for value in values:
            if value.external < 0 and value.storage in halves:
                _halve(value, widths[value.storage])

    def _numbers(self) -> set[int]:
        """Values of one number a position that are added up, such as halting scores: 8 bits do not tell 0.99 from 1."""
        values, found = self.plan.values, set()
        for step in reversed(self.plan.steps):
            sums = step.kind in ("add", "multiply") and values[step.out].channels == 1
            spreads = step.kind == "mean" and step.out in found
            if sums or spreads or (step.kind == "activate" and step.ints[0] == 1):
                found |= {i for i in (step.input, step.input2, step.out) if i >= 0}
        return found

    def _decisions(self) -> set[int]:
        """Values that only lead to masks or to routing weights."""
        found: set[int] = set()
        readers: dict[int, list[Step]] = {}
        for step in self.plan.steps:
            for index in (step.input, step.input2):
                readers.setdefault(index, []).append(step)
        for step in reversed(self.plan.steps):
            uses = readers.get(step.out, [])
            if step.out >= 0 and uses and all(self._decides(r, found) for r in uses):
                found.add(step.out)
        return found

    def _decides(self, step: Step, decisions: set[int]) -> bool:
        if step.kind in ("threshold", "softmax"):
            return True
        small = step.kind != "conv" or self.plan.values[step.out].size == (1, 1)
        return step.kind in _LEADS_ON and small and step.out in decisions

    def _homes(self) -> dict[int, int]:
        """bfloat16 values that stand for results in float32 outside of the arena, until these are complete."""
        writers: dict[int, list[Step]] = {}
        read = set()
        for step in self.plan.steps:
            writers.setdefault(step.out, []).append(step)
            read |= {step.input, step.input2}
        homes = {}
        for external in self.plan.externals:
            steps = writers.get(external.value, [])
            if not steps or (len(steps) == 1 and external.value not in read and self._writes_float(steps[0])):
                continue
            homes[external.value] = self._twin(external.value, HALF)
        return homes

    @staticmethod
    def _writes_float(step: Step) -> bool:
        return step.kind in (*_FREE, *_WRITES_FLOAT) or (step.kind == "conv" and step.input2 < 0)

    # Conversions

    def _add(self, step: Step) -> None:
        """Append a step, with its operands in the precision that it wants."""
        values = self.plan.values
        if step.kind in _FLOAT_ONLY:
            self._operands(step, FLOAT, FLOAT)
        elif step.kind == "conv":
            small = values[step.out].size == (1, 1) and values[step.out].dtype == FLOAT
            whole = small and values[step.input].dtype == FLOAT and values[step.input].external < 0
            self._operands(step, FLOAT if whole else HALF, values[step.out].dtype)
        elif step.kind not in (*_FREE, "gate", "dilate", "mask_value"):
            self._operands(step, values[step.out].dtype, values[step.out].dtype)
        self.steps.append(step)

    def _operands(self, step: Step, first: str, second: str) -> None:
        step.input = self._as(step.input, first, step.layer)
        step.input2 = self._as(step.input2, second, step.layer)
        if step.kind in _MIXED:
            step.aux = [self._as(a, FLOAT, step.layer) for a in step.aux]

    def _as(self, index: int, dtype: str, layer: str) -> int:
        """The value, or its twin in another precision, made here when there is none yet."""
        if index < 0 or self.plan.values[index].dtype == dtype:
            return index
        if index not in self.twins:
            self.twins[index] = self._twin(index, dtype)
            self._convert(index, self.twins[index], layer)
        return self.twins[index]

    def _convert(self, source: int, target: int, layer: str) -> None:
        self.steps.append(Step("activate", input=source, out=target, layer=layer))

    def _twin(self, index: int, dtype: str) -> int:
        """A new value in the arena with the shape of another."""
        value, place = self.plan.values[index], len(self.plan.values)
        twin = replace(value, stride=value.channels, storage=place, dtype=FLOAT, external=-1, first=0)
        self.plan.values.append(_halve(twin, twin.channels) if dtype == HALF else twin)
        return place

    def _pack(self) -> None:
        done = set()
        for step in self.steps:
            values = self.plan.values
            half = values[step.out if step.kind == "stem" else step.input].dtype == HALF
            if step.kind in ("conv", "stem", "depthwise", "inverted") and half:
                for index in step.conv:
                    if index >= 0 and index not in done:
                        _pack_conv(self.plan.convs[index], values[step.out].dtype == HALF)
                        done.add(index)
        if all(c.winograd is None for c in self.plan.convs) and all(s.kind not in _MIXED for s in self.steps):
            for grid in self.plan.grids:
                grid.tiles = 0


def _halve(value: Value, width: int) -> Value:
    """In bfloat16, in rows of so many channels."""
    value.dtype = HALF
    value.stride = width + (_PADDING if width * 2 % _ALIASING_BYTES == 0 else 0)
    return value


def _pack_conv(conv: Conv, to_half: bool) -> None:
    weight, bias = pack.unpack(conv)
    points, conv.winograd = conv.winograd, None
    if conv.form == "depthwise":
        conv.weight, conv.bias = pack_bfloat16.pack_depthwise(weight, bias)
    else:
        conv.weight = pack_bfloat16.pack_pairs(weight, conv.groups, conv.form == "stem")
        if points is not None and to_half:
            # Of the weights before they are rounded, so that only the transformed ones are.
            conv.winograd = pack_bfloat16.pair_points(points)
