"""The plan, interpreted with PyTorch operations: this defines what each native step computes.

One function for each kind of step; those of mixed convolutions are in reference_mixed.py. Rows that a grid leaves out
keep what they held: with `poison` the arena starts as NaN, so a result that depends on them shows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv import _checks
from dynaconv.engine import pack, pack_fusion
from dynaconv.engine.plan import KINDS, Conv, Plan, Step, slope_of
from dynaconv.engine.resampling import matrix_of
from dynaconv.ops.mask_ops import reference as mask_ops

APPLY: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid, "gelu": F.gelu, "tanh": torch.tanh,
    "elu": F.elu, "mish": F.mish, "gelu_tanh": partial(F.gelu, approximate="tanh"),
}  # fmt: skip
STEPS: dict[str, Callable] = {}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of an activation of a plan."""
    slope = slope_of(name)
    return APPLY[name] if slope is None else partial(F.leaky_relu, negative_slope=slope)


def step_kind(kind: str) -> Callable:
    """Register the function of a kind of step."""

    def register(function: Callable[[Run, Step], None]) -> Callable[[Run, Step], None]:
        STEPS[kind] = function
        return function

    return register


@dataclass
class Run:
    """One forward: the arena, external tensors [N, h, w, C] (the image [N, C, H, W]), masks decided so far."""

    plan: Plan
    n: int
    externals: list[Tensor | None]
    forced: dict[int, Tensor]
    weights: dict[int, tuple[Tensor, ...]]
    poison: bool = False
    masks: dict[int, Tensor] = field(default_factory=dict)
    step_ns: list[float] = field(init=False)
    arena: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.step_ns = [0.0] * len(self.plan.steps)
        size = self.plan.arena_bytes * self.n
        self.arena = torch.empty(size, dtype=torch.uint8)
        self.arena.view(torch.float32).fill_(float("nan") if self.poison else 0.0)

    def steps(self, first: int, last: int) -> None:
        """Run native steps [first, last)."""
        for i in range(first, last):
            start = time.perf_counter_ns()
            STEPS[self.plan.steps[i].kind](self, self.plan.steps[i])
            self.step_ns[i] = float(time.perf_counter_ns() - start)

    def close(self) -> None:
        """Nothing to give back."""

    @property
    def open_rows(self) -> list[int]:
        """Open rows of each grid over the batch, as far as they were decided."""
        return [int(self.masks[g].sum()) if g in self.masks else 0 for g in range(len(self.plan.grids))]

    def value(self, index: int) -> Tensor:
        """A writable view [N, h, w, C] of a value."""
        value = self.plan.values[index]
        if value.external >= 0:
            return self.externals[value.external]
        dtype = getattr(torch, value.dtype)
        start = value.offset * self.n // dtype.itemsize + value.first
        rows = value.height * value.width
        shape, strides = (self.n, *value.size, value.channels), (rows, value.width, 1)
        strides = (rows * value.stride, value.width * value.stride, value.stride, 1)
        return self.arena.view(dtype).as_strided(shape, strides, start)

    def planes(self, index: int) -> Tensor:
        """A value as [N, C, h, w] in float32; the image comes so."""
        external = self.plan.values[index].external
        if external >= 0 and self.plan.externals[external].source == "input":
            return self.externals[external]
        return self.value(index).permute(0, 3, 1, 2).float()

    def rounded(self, x: Tensor, index: int) -> Tensor:
        """A tensor as a value's precision holds it, in float32."""
        return x.to(getattr(torch, self.plan.values[index].dtype)).float()

    def conv(self, index: int) -> Conv:
        """A convolution of the plan."""
        return self.plan.convs[index]

    def weight(self, index: int) -> tuple[Tensor, ...]:
        """Unpacked weight and bias, kept for the next run."""
        if index not in self.weights:
            conv = self.conv(index)
            self.weights[index] = pack_fusion.UNPACK.get(conv.form, pack.unpack)(conv)
        return self.weights[index]

    def rows(self, step: Step) -> Tensor | None:
        """Which rows a step writes, [N, h, w] of bool; None for all of them."""
        if step.grid < 0:
            return None
        mask = self.masks[step.grid]
        if step.closed:
            return ~mask
        above = mask.numel() > 0 and mask.double().mean().item() > step.run_all_above
        return None if above else mask

    def write(self, step: Step, planes: Tensor) -> None:
        """Put a result [N, C, h, w] into the rows that the step writes."""
        out, rows = self.value(step.out), self.rows(step)
        result = planes.permute(0, 2, 3, 1).to(out.dtype)
        if rows is None:
            out.copy_(result)
        else:
            out[rows] = result[rows]


def convolve(x: Tensor, conv: Conv, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """x [N, C, H, W] -> [N, O, h, w]; `size` is (h, w)."""
    y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    assert tuple(y.shape[2:]) == tuple(size)
    return y


def finish(run: Run, step: Step, y: Tensor) -> Tensor:
    """Residual, then the last activation."""
    if step.input2 >= 0:
        y = y + run.planes(step.input2)
    return activation(step.final_activation)(y)


@step_kind("layout")
def layout(run: Run, step: Step) -> None:
    """The image as rows."""
    run.write(step, run.planes(step.input))


@step_kind("conv")
@step_kind("depthwise")
def conv(run: Run, step: Step) -> None:
    """out = final(act(conv(in)) [+ in2])."""
    size = run.plan.values[step.out].size
    y = convolve(run.planes(step.input), run.conv(step.conv[0]), *run.weight(step.conv[0]), size)
    run.write(step, finish(run, step, activation(step.activation[0])(y)))


@step_kind("narrow")
def narrow(run: Run, step: Step) -> None:
    """The step of kind ints[0] of each image's open channels, which lie first in the rows that it reads and writes."""
    open_ = run.masks[step.grid][:, 0]
    if KINDS[step.ints[0]] == "inverted":
        _narrow_inverted(run, step, open_)
        return
    weight, bias = run.weight(step.conv[0])
    conv, size, groups = run.conv(step.conv[0]), run.plan.values[step.out].size, open_.shape[1]
    x, out = run.planes(step.input), run.value(step.out)
    whole = torch.zeros(run.n, conv.in_channels, *x.shape[2:])
    for i in range(run.n):
        ins = _open_indices(open_[i], conv.in_channels // groups) if step.ints[1] else slice(None)
        outs = _open_indices(open_[i], conv.out_channels // groups) if step.ints[2] else slice(None)
        count = int(open_[i].sum()) * (conv.in_channels // groups) if step.ints[1] else conv.in_channels
        whole[i, ins] = x[i, :count]
        y = activation(step.activation[0])(convolve(whole[i : i + 1], conv, weight, bias, size))[:, outs]
        y = y if step.input2 < 0 else y + run.planes(step.input2)[i : i + 1]
        out[i, ..., : y.shape[1]] = activation(step.final_activation)(y)[0].permute(1, 2, 0).to(out.dtype)


def _narrow_inverted(run: Run, step: Step, open_: Tensor) -> None:
    x, size = run.planes(step.input), run.plan.values[step.out].size
    width = run.conv(step.conv[1]).out_channels // open_.shape[1]
    mask = open_.repeat_interleave(width, 1)[:, :, None, None].float()
    for i, (index, act) in enumerate(zip(step.conv, step.activation, strict=True)):
        grid = tuple(x.shape[2:]) if i == 0 else size
        x = activation(act)(convolve(x, run.conv(index), *run.weight(index), grid))
        x = x if i == 2 else x * mask
    y = finish(run, step, x)
    run.value(step.out).copy_(y.permute(0, 2, 3, 1))


def _open_indices(open_: Tensor, width: int) -> Tensor:
    return open_.repeat_interleave(width).nonzero().flatten()


@step_kind("stem")
def stem(run: Run, step: Step) -> None:
    """As conv, from the image."""
    size = run.plan.values[step.out].size
    image = run.rounded(run.planes(step.input), step.out)
    y = convolve(image, run.conv(step.conv[0]), *run.weight(step.conv[0]), size)
    run.write(step, finish(run, step, activation(step.activation[0])(y)))


@step_kind("inverted")
def inverted(run: Run, step: Step) -> None:
    """out = final([in2 +] project(act2(depthwise(act1(expand(in)))))); without expand when conv[0] is -1.

    Without projection when conv[2] is -1, or ints[0] > 0: then the expansion is a channel fusion with the static weight
    conv[0], P = conv[2] and the factors aux[0], folded (1) or not (2). aux[1] takes the mean of what is not projected,
    over open rows where there is a mask (0: none is open). ints[1]: closed rows become in2 (1), or final(in2) (2).
    """
    x, size = run.planes(step.input), run.plan.values[step.out].size
    grids = [run.plan.values[step.input].size, size, size]
    for i, (index, act, grid) in enumerate(zip(step.conv, step.activation, grids, strict=True)):
        if i == 0 and step.ints[0]:
            x = activation(act)(fused(run, step, x))
        elif index >= 0 and not (i == 2 and step.ints[0]):
            x = convolve(run.rounded(x, step.input), run.conv(index), *run.weight(index), grid)
            x = activation(act)(x)
    if step.aux[1] >= 0:
        run.value(step.aux[1]).copy_(mean_of(run, step.grid, x, (1, 1)).permute(0, 2, 3, 1))
    run.write(step, finish(run, step, x))
    rows = run.rows(step)
    if fills(step) and rows is not None:
        act = activation(step.final_activation if step.ints[1] == 2 else "none")
        out = run.value(step.out)
        out[~rows] = act(run.value(step.input2).float()).to(out.dtype)[~rows]


def fills(step: Step) -> bool:
    """Closed rows get what is added to open ones."""
    return step.kind == "inverted" and step.ints[1] > 0


def fused(run: Run, step: Step, x: Tensor) -> Tensor:
    """A channel fusion's 1x1 convolution from its factors."""
    (weight, bias), (p, offset) = run.weight(step.conv[0]), run.weight(step.conv[2])
    outputs, rank = p.shape
    factors = run.value(step.aux[0]).reshape(run.n, -1)
    count = 1 + x.shape[1] if step.ints[0] == 1 else x.shape[2] * x.shape[3]
    rows = factors[:, -count * (rank + -rank % 16) :].unflatten(1, (count, -1))[..., :rank]
    if step.ints[0] == 2:
        y = F.conv2d(x, weight, bias) * factors[:, :outputs, None, None]
        return y + (rows @ p.t() + offset).transpose(1, 2).unflatten(2, tuple(x.shape[2:]))
    rows = rows @ p.t() + torch.cat([bias[None], weight.flatten(1).t()]) * factors[:, None, :outputs]
    return torch.einsum("nihw,nio->nohw", x, rows[:, 1:]) + (rows[:, 0] + offset)[:, :, None, None]


@step_kind("max_pool")
def max_pool(run: Run, step: Step) -> None:
    """Padding, also the one on the far side that a rounded-up size needs, counts as -inf."""
    c, x, out = run.conv(step.conv[0]), run.planes(step.input), run.plan.values[step.out]
    x = _pad_to(x, c, out.size, float("-inf"))
    run.write(step, activation(step.activation[0])(F.max_pool2d(x, c.kernel, c.stride, 0, c.dilation)))


@step_kind("avg_pool")
def avg_pool(run: Run, step: Step) -> None:
    """ints[0] = 1: padding (but not what lies behind it) counts in the average."""
    c, x, out = run.conv(step.conv[0]), run.planes(step.input), run.plan.values[step.out]
    ones = torch.ones_like(x[:1, :1])
    if step.ints[0]:
        ones = F.pad(ones, (c.padding[1],) * 2 + (c.padding[0],) * 2, value=1.0)
    count = _pad_to(ones, c, out.size, 0.0, 0 if step.ints[0] else None)
    total, area = _pad_to(x, c, out.size, 0.0), c.kernel[0] * c.kernel[1]
    sums = F.avg_pool2d(total, c.kernel, c.stride) * area
    run.write(step, sums / (F.avg_pool2d(count, c.kernel, c.stride) * area))


def _pad_to(x: Tensor, c: Conv, size: tuple[int, int], fill: float, padding: int | None = None) -> Tensor:
    """Padding before and behind so that windows give exactly `size` results."""
    before = c.padding if padding is None else (padding, padding)
    pads = []
    for axis in (1, 0):
        reach = (size[axis] - 1) * c.stride[axis] + c.dilation[axis] * (c.kernel[axis] - 1) + 1
        pads += [before[axis], reach - x.shape[2 + axis] - before[axis]]
    return F.pad(x, pads, value=fill)


@step_kind("mean")
def mean(run: Run, step: Step) -> None:
    """Over bins of the grid, as many as the result has; over open rows only where there is a mask (0: none is open)."""
    y = mean_of(run, step.grid, run.planes(step.input), run.plan.values[step.out].size)
    run.value(step.out).copy_(activation(step.activation[0])(y).permute(0, 2, 3, 1))


def mean_of(run: Run, grid: int, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Over bins of x [N, C, h, w], as many as `size` says, of all rows or those that a grid opens."""
    if grid < 0:
        return F.adaptive_avg_pool2d(x, size)
    mask = run.masks[grid][:, None].float()
    share = F.adaptive_avg_pool2d(mask, size)
    return F.adaptive_avg_pool2d(torch.where(mask > 0, x, 0.0), size) / torch.where(share > 0, share, 1.0)


@step_kind("add")
def add(run: Run, step: Step) -> None:
    """out = act(in + in2), in2 broadcast over positions or channels; ints[0]: minus; aux[0]: in2 times it first."""
    y, second = run.planes(step.input), run.planes(step.input2)
    if step.aux[0] >= 0:
        weight = run.planes(step.aux[0])
        # What is not wanted may hold anything.
        second = torch.where(weight == 0, 0.0, weight * second)
    run.write(step, activation(step.activation[0])(y - second if step.ints[0] else y + second))


@step_kind("multiply")
def multiply(run: Run, step: Step) -> None:
    """out = act(in * in2), in2 broadcast over positions or channels."""
    y = run.planes(step.input) * run.planes(step.input2)
    run.write(step, activation(step.activation[0])(y))


@step_kind("activate")
def activate(run: Run, step: Step) -> None:
    """out = act(in); with ints[0] = 1 act(in * floats[0] + floats[1]), with 2 a slope for each channel."""
    x = run.planes(step.input)
    if step.ints[0] == 2:
        return run.write(step, F.prelu(x, run.conv(step.conv[0]).bias))
    x = x * step.floats[0] + step.floats[1] if step.ints[0] else x
    run.write(step, activation(step.activation[0])(x))


@step_kind("resample")
def resample(run: Run, step: Step) -> None:
    """out[y, x] = sum of in[lines[y], columns[x]], or one of the rows that lie beside each other there."""
    c, x = run.conv(step.conv[0]), run.planes(step.input)
    (height, width), (down, across) = run.plan.values[step.out].size, c.kernel
    taps = c.weight[: height * down].view(height, down, 2), c.weight[height * down :].view(width, across, 2)
    lines, columns = (matrix_of(t, size) for t, size in zip(taps, x.shape[2:], strict=True))
    parts = [max(n, 1) for n in step.ints[:2]]
    if parts == [1, 1]:
        return run.write(step, torch.einsum("nchw,yh,xw->ncyx", x, lines, columns))
    beside = x.view(len(x), *parts, -1, *x.shape[2:])
    y = x.new_zeros(len(x), beside.shape[3], height, width)
    for i in range(parts[0]):
        for j in range(parts[1]):
            ys, xs = ((n - o) % p for n, o, p in zip((i, j), step.ints[2:4], parts, strict=True))
            rows, cols = lines[ys :: parts[0]], columns[xs :: parts[1]]
            y[:, :, ys :: parts[0], xs :: parts[1]] = torch.einsum(
                "nchw,yh,xw->ncyx", beside[:, i, j], rows, cols
            )
    return run.write(step, y)


@step_kind("gate")
def gate(run: Run, step: Step) -> None:
    """Logits [N, h, w, 1]; ints[0] = 1 adds the weighted average over the grid, ints[1] = 1 a bias of taps inside."""
    c, x = run.conv(step.conv[0]), run.planes(step.input)
    weight, linear, bias = pack.unpack_gate(c, bool(step.ints[0]))
    z = F.conv2d(x, weight, bias, c.stride, c.padding)
    if step.ints[1]:
        taps = c.bias[1:].reshape(1, 1, *c.kernel)
        z = z + F.conv2d(torch.ones_like(x[:, :1]), taps, None, c.stride, c.padding)
    if linear is not None:
        z = z + (x.mean((2, 3)) @ linear)[:, None, None, None]
    run.write(step, z)


@step_kind("threshold")
def threshold(run: Run, step: Step) -> None:
    """A logit opens its row when it is at least the threshold, within grid2 if there is one; raises for NaN there."""
    grid = run.plan.grids[step.grid]
    within = run.masks[step.grid2] if step.grid2 >= 0 else torch.tensor(True)
    mask = run.forced.get(step.grid)
    if mask is None:
        logits = run.value(step.input).float().reshape(-1, grid.height, grid.width)
        if (logits.isnan() & within).any():
            raise _checks.engine_nan_logits(step.layer)
        mask = logits >= step.floats[0]
    run.masks[step.grid] = mask & within


@step_kind("dilate")
def dilate(run: Run, step: Step) -> None:
    """Rows of grid2 that conv[0] reads for the open rows of grid."""
    c, target = run.conv(step.conv[0]), run.plan.grids[step.grid2]
    size = (target.height, target.width)
    source = run.masks[step.grid][:, None].float()
    need = mask_ops.dilate(source, size, c.kernel, c.stride, c.padding, c.dilation)[:, 0] > 0.5
    run.masks[step.grid2] = run.forced.get(step.grid2, need)


@step_kind("mask_value")
def mask_value(run: Run, step: Step) -> None:
    """A mask as rows of 0 and 1."""
    out = run.value(step.out)
    out.copy_(run.masks[step.grid].reshape(out.shape))


@step_kind("layer_norm")
def layer_norm(run: Run, step: Step) -> None:
    """Over channels."""
    c, x = run.conv(step.conv[0]), run.value(step.input).float()
    y = F.layer_norm(x, x.shape[3:], c.weight.float(), c.bias.float(), step.floats[0])
    run.write(step, activation(step.activation[0])(y).permute(0, 3, 1, 2))


@step_kind("softmax")
def softmax(run: Run, step: Step) -> None:
    """Over groups of ints[0] channels, of in * floats[0]."""
    x = run.value(step.input).float()
    y = (x.unflatten(3, (-1, step.ints[0])) * step.floats[0]).softmax(4).flatten(3)
    run.write(step, y.permute(0, 3, 1, 2))


@step_kind("copy")
def copy(run: Run, step: Step) -> None:
    """Channels from ints[1] on of in, ints[3] apart, into those of out from ints[0] on, ints[2] apart."""
    source, out, rows = run.value(step.input), run.value(step.out), run.rows(step)
    part, result = copied(step, out), source[..., step.ints[1] :: max(step.ints[3], 1)].to(out.dtype)
    count = min(part.shape[3], result.shape[3])
    part, result = part[..., :count], result[..., :count]
    if rows is None:
        part.copy_(result)
    else:
        part[rows] = result[rows]


def copied(step: Step, out: Tensor) -> Tensor:
    """Channels of `out` that a copy may write."""
    return out[..., step.ints[0] :: max(step.ints[2], 1)]
