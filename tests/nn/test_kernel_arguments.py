"""CondConv, DY-Conv and DyNet: arguments of convolutions, and messages for what they cannot take."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.nn.test_kernel_layers import LAYERS, METHODS, OPTIONS
from torch import Tensor, nn

from dynaconv.nn import CondConv2d, DYConv2d, DyNetConv2d


@pytest.mark.parametrize("method", METHODS)
def test_arguments_are_those_of_a_convolution(method: str) -> None:
    kind = LAYERS[method][2]
    with torch.device("meta"):
        static = nn.Conv2d(4, 8, (3, 5), (2, 1), (1, 2), 2, 4, False, "circular", dtype=torch.float64)
    layer = kind(
        4, 8, (3, 5), (2, 1), (1, 2), 2, 4, False, "circular", "meta", torch.float64, **OPTIONS[method]
    )
    for name in static.__constants__:
        if name != "output_padding":
            assert getattr(layer, name) == getattr(static, name), name
    assert layer.bias is None and layer.weight.device.type == "meta" and layer.weight.dtype == torch.float64
    assert all(p.device.type == "meta" for p in layer.parameters())
    text = repr(layer)
    for part in ("4, 8", "kernel_size=(3, 5)", "stride=(2, 1)", "groups=4", "padding_mode='circular'"):
        assert part in text
    with pytest.raises(TypeError, match="positional argument"):
        kind(4, 8, 3, 1, 0, 1, 1, True, "zeros", None, None, 4)
    copied = copy.deepcopy(kind(4, 8, 3, **OPTIONS[method]))
    assert copied.out_channels == 8


BAD_ARGUMENTS = [
    ({"in_channels": 5, "groups": 2}, r"in_channels must be divisible by groups, got 5 and groups=2"),
    ({"out_channels": 5, "groups": 2}, r"out_channels must be divisible by groups, got 5 and groups=2"),
    ({"groups": 0}, r"groups must be a whole number >= 1, got 0"),
    ({"in_channels": 0}, r"in_channels must be a whole number >= 1, got 0"),
    ({"padding": "sane"}, r"unknown padding 'sane'; did you mean 'same'"),
    (
        {"padding": "same", "stride": 2},
        r"padding='same' needs stride 1, got stride \(2, 2\); give the padding",
    ),
    ({"padding_mode": "reflection"}, r"unknown padding_mode 'reflection'; did you mean 'reflect'"),
    ({"execution": "winograd"}, r"unknown execution 'winograd'; known: auto, bmm, feature"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("changes", "message"), BAD_ARGUMENTS)
def test_bad_arguments(method: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAYERS[method][2](**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **changes})


def test_bad_numbers_of_experts_and_temperatures() -> None:
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="num_experts must be a whole number >= 1"):
            CondConv2d(4, 4, 3, num_experts=bad)
        with pytest.raises(ValueError, match="num_kernels must be a whole number >= 1"):
            DYConv2d(4, 4, 3, num_kernels=bad)
        with pytest.raises(ValueError, match="group_size must be a whole number >= 1"):
            DyNetConv2d(4, 4, 3, group_size=bad)
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive, got"):
            DYConv2d(4, 4, 3, temperature=bad)
        with pytest.raises(ValueError, match="temperature must be positive, got"):
            DYConv2d(4, 4, 3, temperature=bad, router=False)
    with pytest.raises(ValueError, match="reduction must be positive, got 0"):
        DYConv2d(4, 4, 3, reduction=0)
    with pytest.raises(ValueError, match="hidden must be a whole number >= 1, got 0"):
        DyNetConv2d(4, 4, 3, hidden=0)


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_and_routing(method: str) -> None:
    layer = LAYERS[method][2](4, 6, 3, **OPTIONS[method])
    shape, name = [2, *layer.routing_shape], type(layer).__name__
    x = torch.zeros(2, 4, 5, 5)
    for bad in (torch.zeros(2, 3, 5, 5), torch.zeros(4, 5, 5), torch.zeros(2, 4, 5)):
        with pytest.raises(ValueError, match=rf"{name} expects x \[B, 4, H, W\], got"):
            layer(bad)
    for bad in (torch.zeros(1, *shape[1:]), torch.zeros(*shape, 1), torch.zeros(*shape[:-1], shape[-1] + 1)):
        with pytest.raises(ValueError) as caught:
            layer(x, routing=bad)
        assert str(caught.value) == (
            f"{name}: routing must be {shape} (batch first), got {list(bad.shape)}; layer.route(x) makes it"
        )
    layer.execution = "bmm"
    with pytest.raises(
        ValueError, match=r"'bmm' cannot run here: .* this one is 3x3; use grouped, feature, unfold"
    ):
        layer(x)


class _Other(nn.Conv2d):
    """A convolution that does something else, as timm's Conv2dSame."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class _Named(nn.Conv2d):
    """Only another name."""


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel")
@pytest.mark.parametrize("method", METHODS)
def test_conversion_of_what_is_no_plain_convolution(method: str) -> None:
    kind = LAYERS[method][2]
    for other, shown in [
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d"),
        (nn.LazyConv2d(4, 3), "LazyConv2d"),
        (nn.Conv1d(4, 4, 3), "Conv1d"),
        (nn.Linear(4, 4), "Linear"),
        (kind(4, 4, 3), f"dynaconv.{kind.__name__}"),
        (_Other(4, 4, 3), "_Other"),
        (torch.ao.nn.quantized.Conv2d(4, 4, 3), r"torch\.ao\.nn\.quantized\.modules\.conv\.Conv2d"),
    ]:
        with pytest.raises(
            TypeError, match=rf"{kind.__name__}.from_conv expects a plain nn.Conv2d, got {shown}: "
        ):
            kind.from_conv(other)
    assert isinstance(kind.from_conv(_Named(4, 4, 3)), kind)
    with pytest.raises(ValueError, match="unknown init 'exakt'; did you mean 'exact'"):
        kind.from_conv(nn.Conv2d(4, 4, 3), init="exakt")


def test_noise_would_make_dyconv_inexact() -> None:
    with pytest.raises(ValueError, match=r"noise=0.1 would make the conversion inexact"):
        DYConv2d.from_conv(nn.Conv2d(4, 4, 3), noise=0.1)
    assert DYConv2d.from_conv(nn.Conv2d(4, 4, 3), noise=0.1, init="fresh").num_kernels == 4
