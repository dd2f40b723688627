"""Convolutions with a kernel for each image, interpreted with PyTorch operations (see reference.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.engine import pack
from dynaconv.engine.plan import Step
from dynaconv.engine.reference import Run, activation, convolve, finish, step_kind
from dynaconv.ops.channel_fusion.reference import centre_taps
from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry
from dynaconv.ops.dynamic_conv2d.reference import mix_biases, mix_kernels


@step_kind("dynamic_conv")
def dynamic_conv(run: Run, step: Step) -> None:
    """As conv, with the kernel and bias of each image mixed from experts."""
    conv, x, size = run.conv(step.conv[0]), run.planes(step.input), run.plan.values[step.out].size
    experts, static = run.weight(step.conv[0])
    routing, taps, inputs, outputs = (run.value(a).reshape(run.n, -1) if a >= 0 else None for a in step.aux)
    routing = torch.ones(run.n, 1) if routing is None else routing
    if step.ints[1]:
        routing = routing.unflatten(1, (conv.out_channels, -1))
    kernels = mix_kernels(experts, routing, taps)
    if inputs is not None:
        by_group = kernels.unflatten(1, (conv.groups, -1))
        kernels = (by_group * inputs.reshape(run.n, conv.groups, 1, -1, 1, 1)).flatten(1, 2)
    if outputs is not None:
        kernels = kernels * outputs[:, :, None, None, None]
    biases = static.expand(run.n, -1)
    if step.conv[1] >= 0:
        biases = biases + mix_biases(run.weight(step.conv[1])[0], routing)
    images = [convolve(x[i : i + 1], conv, kernels[i], biases[i], size) for i in range(run.n)]
    run.write(step, finish(run, step, activation(step.activation[0])(torch.cat(images))))


@step_kind("channel_fusion")
def channel_fusion(run: Run, step: Step) -> None:
    """act(scale * (conv(in) + inner bias) + P (matrix (Q in + shift)) + bias), Q reading under the centre tap."""
    static, x, size = run.conv(step.conv[0]), run.planes(step.input), run.plan.values[step.out].size
    weight, inner = run.weight(step.conv[0])
    q, shift, p, offset, scale, matrix = _fusion_parts(run, step)
    y = convolve(x, static, weight if step.ints[3] else weight[0], inner, size) * scale[:, :, None, None]
    geometry = ConvGeometry(static.stride, static.padding, static.dilation, 1)
    centre = centre_taps(x, static.kernel, geometry)
    latent = F.conv2d(centre, q[:, :, None, None], shift, static.stride).flatten(2)
    latent = torch.bmm(matrix.transpose(1, 2), latent).unflatten(2, size)
    y = y + F.conv2d(latent, p[:, :, None, None], offset)
    run.write(step, finish(run, step, activation(step.activation[0])(y)))


@step_kind("fusion_factors")
def fusion_factors(run: Run, step: Step) -> None:
    """The scale of every output, padded to panels; rows times the matrix, padded to 16.

    They are Q's bias and its rows, or with an input what Q makes of every position.
    """
    q, shift = run.weight(step.conv[1])
    q, rank = q.flatten(1), len(q)
    given = run.value(step.aux[0]).reshape(run.n, -1).float()
    scale, matrix = given[:, : -rank * rank], given[:, -rank * rank :].unflatten(1, (rank, rank))
    scale = F.relu6(scale + 3) / 3 if step.ints[4] else scale
    rows = torch.cat([shift[None], q.t()])
    if step.input >= 0:
        rows = run.value(step.input).flatten(1, 2).float() @ q.t() + shift
    rows = rows @ matrix
    scale, rows = F.pad(scale, (0, -scale.shape[1] % pack.PANEL)), F.pad(rows, (0, -rank % 16))
    run.value(step.out).copy_(torch.cat([scale, rows.flatten(1)], 1)[:, None, None])


@step_kind("router")
def router(run: Run, step: Step) -> None:
    """act2(linear2(h)), where h = act0(linear0(in)), times act1(linear1(h)) where there is such a layer."""
    hidden = _layer(run, step, 0, run.planes(step.input))
    if step.conv[1] >= 0:
        hidden = hidden * _layer(run, step, 1, hidden)
    run.write(step, _layer(run, step, 2, hidden))


def _layer(run: Run, step: Step, place: int, x: Tensor) -> Tensor:
    index = step.conv[place]
    return activation(step.activation[place])(convolve(x, run.conv(index), *run.weight(index), (1, 1)))


def _fusion_parts(run: Run, step: Step) -> tuple[Tensor, ...]:
    """Q [L, I] and its shift, P [O, L] and its offset, scale [N, O] and matrix [N, L, L] of a channel fusion."""
    (q, shift), (p, offset) = (run.weight(step.conv[i]) for i in (1, 2))
    q = q.flatten(1)
    given = run.value(step.aux[0]).reshape(run.n, -1).float()
    scale, matrix = given[:, : len(p)], given[:, len(p) :].unflatten(1, (len(q), len(q)))
    return q, shift, p, offset, F.relu6(scale + 3) / 3 if step.ints[4] else scale, matrix
