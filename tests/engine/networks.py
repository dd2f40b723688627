"""Small networks that show one thing each, and how tests run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from tests.convert.networks import randomise_norms
from torch import Tensor, nn

from dynaconv.engine import CompiledModel
from dynaconv.engine.compiler import make_plan
from dynaconv.engine.execute import Program

SIZE = (3, 17, 13)


def conv_bn(i: int, o: int, k: int = 3, act: nn.Module | None = None, **options) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    options.setdefault("padding", k // 2)
    parts = [nn.Conv2d(i, o, k, bias=False, **options), nn.BatchNorm2d(o)]
    return nn.Sequential(*parts, *([] if act is None else [act]))


class Lambda(nn.Module):
    """A function of the input and of submodules, as a module."""

    def __init__(self, function: Callable, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor):
        return self.function(self, x)


def squeeze_excite(channels: int) -> nn.Module:
    """Mean, two 1x1 convolutions, product."""
    return Lambda(
        lambda m, x: x * torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True))))),
        down=nn.Conv2d(channels, 4, 1),
        up=nn.Conv2d(4, channels, 1),
    )


def squeeze_excite_linear(channels: int) -> nn.Module:
    """The same with linear layers and a hard sigmoid."""
    return Lambda(
        lambda m, x: x * F.hardsigmoid(m.up(F.relu(m.down(x.mean((2, 3))))))[:, :, None, None],
        down=nn.Linear(channels, 4),
        up=nn.Linear(4, channels),
    )


def convnext(channels: int) -> nn.Module:
    """Depthwise 7x7, norm over channels, two linear layers, layer scale, residual."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.norm(m.dw(x).permute(0, 2, 3, 1))
        y = m.fc2(F.gelu(m.fc1(y))).permute(0, 3, 1, 2)
        return x + y * m.gamma.weight.reshape(1, -1, 1, 1)

    gamma = nn.Module()
    gamma.weight = nn.Parameter(torch.rand(channels))
    return Lambda(
        forward,
        dw=nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
        norm=nn.LayerNorm(channels),
        fc1=nn.Linear(channels, 2 * channels),
        fc2=nn.Linear(2 * channels, channels),
        gamma=gamma,
    )


def _stem(*parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv_bn(3, 8, act=nn.ReLU()), *parts)


# name: (how to build it, operations that go through ATen).
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "conv_bias": (lambda: nn.Conv2d(3, 5, 3), 0),
    "strided_dilated": (lambda: _stem(conv_bn(8, 40, 3, stride=2, padding=2, dilation=2)), 0),
    "asymmetric_kernel": (lambda: _stem(nn.Conv2d(8, 6, (1, 3), (2, 1), (0, 1))), 0),
    "same_padding": (lambda: _stem(nn.Conv2d(8, 6, 3, padding="same", dilation=2)), 0),
    "groups": (lambda: _stem(conv_bn(8, 12, groups=4, act=nn.SiLU())), 0),
    "depthwise": (lambda: _stem(conv_bn(8, 8, 5, stride=2, groups=8, act=nn.Hardswish()), nn.Conv2d(8, 4, 1)), 0),
    "norm_of_conv_bias": (lambda: _stem(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), 0),
    "preactivation": (lambda: _stem(nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)), 0),
    "activations": (
        lambda: _stem(
            conv_bn(8, 8, act=nn.ReLU6()), conv_bn(8, 8, act=nn.GELU()), conv_bn(8, 8, act=nn.LeakyReLU()),
            conv_bn(8, 8, act=nn.Sigmoid()), conv_bn(8, 8, act=nn.Hardsigmoid()), nn.SiLU(),
        ),
        0,
    ),
    "swish_by_hand": (lambda: _stem(Lambda(lambda m, x: x * x.sigmoid()), nn.Conv2d(8, 4, 1)), 0),
    "max_pool_ceil": (lambda: _stem(nn.MaxPool2d(3, 2, 1, ceil_mode=True)), 0),
    "avg_pool": (lambda: _stem(nn.AvgPool2d(3, 2, 1)), 0),
    "avg_pool_ceil": (lambda: _stem(nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)), 0),
    "avg_pool_ceil_padded": (lambda: _stem(nn.AvgPool2d(4, 3, 2, ceil_mode=True)), 0),
    "mean_of_flattened": (lambda: _stem(Lambda(lambda m, x: x.flatten(2).mean(2)), nn.Linear(8, 3)), 0),
    "shuffle": (lambda: _stem(nn.ChannelShuffle(2), nn.Conv2d(8, 4, 1)), 0),
    "shuffle_by_view": (
        lambda: _stem(Lambda(lambda m, x: x.view(-1, 2, 4, 17, 13).transpose(1, 2).flatten(1, 2)), nn.Conv2d(8, 4, 1)),
        0,
    ),
    "weights_and_scales_in_parts": (
        lambda: _stem(
            Lambda(lambda m, x: x[:, :5] + x[:, :5].sigmoid() * x[:, 6:7]),
            Lambda(lambda m, x: torch.cat([x[:, :1] * 2 + 1, x, (x[:, 2:3] * 3 - 1).sigmoid()], 1)), nn.Conv2d(7, 4, 1),
        ),
        0,
    ),
    "shuffle_of_parts": (
        lambda: _stem(
            Lambda(lambda m, x: F.channel_shuffle(torch.cat([x, m.a(x), m.a(x) * 2], 1), 3), a=conv_bn(8, 8)),
            Lambda(lambda m, x: torch.cat([x[:, ::2], x[:, 1::2], x[:, -5:-2], x[:, 3:9]], 1)),
            nn.Conv2d(33, 4, 1),
        ),
        0,
    ),
    "part_of_a_shuffle": (
        lambda: _stem(
            Lambda(lambda m, x: m.a(F.channel_shuffle(x, 4)[:, 2:6]) + x[:, 4:], a=nn.Conv2d(4, 4, 1)),
        ),
        0,
    ),
    "parts_of_parts": (
        lambda: _stem(
            Lambda(
                lambda m, x: torch.cat([m.a(x[:, :3]), m.b(x[:, 3:].chunk(2, 1)[1]), x[:, 1:7][:, 2:3], m.c(x)], 1),
                a=conv_bn(3, 5, act=nn.ReLU()), b=conv_bn(2, 6, 1), c=conv_bn(8, 8, groups=8),
            ),
            Lambda(lambda m, x: torch.cat([F.relu(x[:, 5:]), x[:, :5].sigmoid() * x[:, :5].mean((2, 3), True)], 1)),
            Lambda(lambda m, x: torch.split(m.a(x) + x, [4, 9, 7], 1)[1], a=conv_bn(20, 20)),
        ),
        0,
    ),
    "matrices": (
        lambda: _stem(
            Lambda(lambda m, x: m.a(x.mean((2, 3))).unflatten(1, (5, 4)), a=nn.Linear(8, 20)),
            Lambda(lambda m, x: torch.cat([a.flatten(1) for a in x.split([2, 3], 1)[::-1]], 1)), nn.Linear(20, 3),
        ),
        0,
    ),
    "groups_of_channels_seen_by_aten": (
        lambda: _stem(
            Lambda(lambda m, x: (x.unflatten(1, (2, 4)).sum(2), x.unflatten(1, (4, 2)).transpose(1, 2).amax(1))),
            Lambda(lambda m, x: (x[0].mean((2, 3)).unflatten(1, (1, 2)).sum(2), x[1])),
        ),
        None,
    ),
    "hard_gates": (
        lambda: _stem(
            Lambda(lambda m, x: x * F.relu6(x + 3) / 6, ),
            Lambda(lambda m, x: m.b(m.a(x) * (F.relu6(m.a(x) + 3) / 3)), a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 4, 3)),
            Lambda(lambda m, x: F.relu6(x + 3) * 0.25),
        ),
        0,
    ),
    "adaptive_pooling": (
        lambda: _stem(Lambda(lambda m, x: [F.adaptive_avg_pool2d(x, s) for s in (2, (3, 5), (1, 4), (20, 30))])), 0
    ),
    "classifier": (
        lambda: _stem(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 7), nn.Softmax(1)), 0
    ),
    "flatten_map": (lambda: _stem(nn.MaxPool2d(4), nn.Flatten(), nn.Linear(8 * 4 * 3, 7)), 0),
    "squeeze_excite": (lambda: _stem(squeeze_excite(8), conv_bn(8, 4, 1)), 0),
    "squeeze_excite_linear": (lambda: _stem(squeeze_excite_linear(8), conv_bn(8, 4, 1)), 0),
    "convnext": (lambda: nn.Sequential(nn.Conv2d(3, 8, 4, 4), convnext(8), convnext(8)), 0),
    "concat": (
        lambda: _stem(
            Lambda(lambda m, x: torch.cat([m.a(x), x, m.b(x)], 1), a=conv_bn(8, 6, 1), b=conv_bn(8, 4)),
            nn.Conv2d(18, 5, 1),
        ),
        0,
    ),
    "residual": (lambda: _stem(Lambda(lambda m, x: F.relu_(m.a(x).add_(x)), a=conv_bn(8, 8))), 0),
    "residual_two_convs": (lambda: _stem(Lambda(lambda m, x: m.a(x) + m.b(x), a=conv_bn(8, 8), b=conv_bn(8, 8, 1))), 0),
    "residual_of_itself": (lambda: _stem(Lambda(lambda m, x: m.a(x) + x, a=conv_bn(8, 8, 1))), 0),
    "doubled": (lambda: _stem(Lambda(lambda m, x: x + x)), 0),
    "constants": (lambda: _stem(Lambda(lambda m, x: (x - 0.5) / 2 * torch.arange(8.0)[:, None, None])), 0),
    "half_through_aten": (
        lambda: _stem(Lambda(lambda m, x: torch.fft.fft2(x).real.to(x.dtype)), conv_bn(8, 6), nn.Tanh()), None
    ),
    "nothing_known": (lambda: Lambda(lambda m, x: torch.tanh(x).cumsum(2).sum(1)), None),
    "no_batch_axis": (
        lambda: _stem(Lambda(lambda m, x: x.flatten(0, 1).tanh().unflatten(0, (-1, 8))), nn.Conv2d(8, 4, 1)), None
    ),
    "many_results": (
        lambda: _stem(Lambda(lambda m, x: {"a": m.a(x), "b": (x, x.mean((2, 3))), "c": 3}, a=conv_bn(8, 4))), 0
    ),
    "image_itself": (lambda: Lambda(lambda m, x: (x, m.a(x) + x), a=nn.Conv2d(3, 3, 3, padding=1)), 0),
    "split": (lambda: _stem(Lambda(lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1)), nn.Conv2d(8, 4, 1)), 0),
    "split_along_lines": (lambda: _stem(Lambda(lambda m, x: x.split([5, 12], 2)[0]), nn.Conv2d(8, 4, 1)), None),
    "mutated_view": (lambda: _stem(Lambda(lambda m, x: _write_half(m.a(x)), a=nn.Conv2d(8, 8, 1))), None),
    "regions": (lambda: Lambda(_regions, a=conv_bn(3, 8), b=conv_bn(8, 4)), None),
    "branches": (lambda: _stem(Lambda(_branches, a=nn.Conv2d(8, 4, 1))), None),
    "transposed": (lambda: _stem(nn.ConvTranspose2d(8, 8, 2, 2, groups=8)), 1),
}  # fmt: skip


def _write_half(x: Tensor) -> Tensor:
    x[:, :4].relu_()
    return x * 2


def _regions(m: nn.Module, x: Tensor) -> Tensor:
    x = m.a(x)
    with torch.no_grad():
        x = x.relu_()
    with torch.autocast("cpu", enabled=False):
        x = x * 2 + x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x + x
    return m.b(y.float())


def _branches(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda y: m.a(y), lambda y: m.a(-y), (x,))


def network(name: str) -> nn.Module:
    """One of NETWORKS, with random batch norms, in evaluation mode."""
    torch.manual_seed(0)
    return randomise_norms(NETWORKS[name][0]()).eval()


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions that read nothing but their own taps, so that NaN elsewhere does not reach them."""
    torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=True)


def poisoned(model: nn.Module, x: Tensor) -> CompiledModel:
    """A compiled model on the interpreter whose arena starts as NaN."""
    plan, exported = make_plan(model, (x,))
    compiled = CompiledModel(plan, exported.out_spec, backend="eager", source=model)
    compiled._program = Program(plan, "eager", poison=True)
    return compiled
