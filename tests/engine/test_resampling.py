"""Operations that give a map another grid, and activations with slopes, in the compiled engine and in its reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.convert.networks import randomise_norms
from torch import Tensor, nn

import dynaconv as dc
from dynaconv.engine import runtime
from dynaconv.testing import force_masks

BACKENDS = [
    "eager",
    pytest.param("cpu", marks=pytest.mark.skipif(bool(runtime.missing()), reason="no kernels")),
]


class Function(nn.Module):
    """function(*modules, x) of a map."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.parts, self.function = nn.ModuleList(modules), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(*self.parts, x)


def conv(i: int, o: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **options)


def between(*parts: nn.Module, width: int = 20, last: int = 20) -> nn.Module:
    return nn.Sequential(conv(3, width), *parts, conv(last, 5))


def interpolated(**options: object) -> nn.Module:
    return Function(lambda one, two, x: two(F.interpolate(one(x), **options)), conv(3, 20), conv(20, 5))


def unpooled(*shape: int, **options: object) -> nn.Module:
    parts = nn.ConvTranspose2d(20, 8, *shape, **options), nn.BatchNorm2d(8), nn.LeakyReLU(0.3)
    return between(*parts, last=8)


# A network, and the kinds of its steps besides convolutions that matter.
NETWORKS: dict[str, tuple[nn.Module, set[str]]] = {
    "nearest": (between(nn.Upsample(scale_factor=2), nn.BatchNorm2d(20), nn.ReLU()), {"resample"}),
    "nearest of any size": (interpolated(size=(13, 7)), {"resample"}),
    "nearest exact": (interpolated(size=(23, 17), mode="nearest-exact"), {"resample"}),
    "bilinear": (between(nn.Upsample(scale_factor=2, mode="bilinear"), nn.BatchNorm2d(20)), {"resample"}),
    "bilinear by corners": (
        between(nn.Upsample(scale_factor=1.7, mode="bilinear", align_corners=True), nn.ReLU()), {"resample", "activate"}
    ),
    "bicubic": (interpolated(size=(9, 30), mode="bicubic"), {"resample"}),
    "mirrored": (nn.Sequential(nn.ReflectionPad2d((1, 2, 3, 0)), nn.Conv2d(3, 20, 3)), {"layout", "resample"}),
    "replicated": (between(nn.ReplicationPad2d((1, 2, 0, 3))), {"resample"}),
    "around": (nn.Sequential(conv(3, 20), conv(20, 5, padding_mode="circular")), {"resample"}),
    "zeros on all sides": (between(nn.ZeroPad2d(1)), set()),
    "zeros on one side": (between(nn.ZeroPad2d((0, 1, 0, 1)), nn.LeakyReLU(0.2)), {"resample"}),
    "cut": (Function(lambda one, two, x: two(F.pad(one(x), (-1, 2, -2, -1))), conv(3, 20), conv(20, 5)), {"resample"}),
    "turned": (Function(lambda one, two, x: two(one(x).flip(-1).flip(2)), conv(3, 20), conv(20, 5)), {"resample"}),
    "every second": (
        Function(lambda one, two, x: two(one(x)[:, :, 1::2, -15:-1:3]), conv(3, 20), conv(20, 5)), {"resample"}
    ),
    "more channels": (
        Function(lambda one, x: F.pad(one(x)[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3)), conv(3, 5)), {"resample"}
    ),
    "shuffled": (between(nn.PixelShuffle(3), nn.PReLU(4), width=36, last=4), {"resample", "activate"}),
    "shuffled with norms": (
        between(nn.BatchNorm2d(36), nn.ReLU(), nn.PixelShuffle(2), nn.BatchNorm2d(9), width=36, last=9),
        {"resample", "depthwise"},
    ),
    "shuffled by two": (
        Function(lambda one, x: torch.cat([F.pixel_shuffle(one(x), 2), F.pixel_shuffle(one(x), 2)], 1), conv(3, 36)),
        {"resample", "copy"},
    ),
    "shuffled groups": (between(conv(36, 36, groups=36), nn.PixelShuffle(2), width=36, last=9),
                        {"resample", "copy", "depthwise"}),
    "unshuffled": (between(nn.PixelUnshuffle(2), width=6, last=24), {"resample", "copy"}),
    "unpooled, 2 by 2": (unpooled(2, 2), {"resample"}),
    "unpooled, 4 by 2": (unpooled(4, 2, 1, bias=False), {"resample"}),
    "unpooled, 3 by 2": (unpooled(3, 2, 1, 1), {"resample"}),
    "unpooled, unequal": (unpooled((5, 3), (3, 1), (1, 0), (1, 0)), {"resample"}),
    "unpooled, 3 by 1": (unpooled(3, 1, 1), {"resample"}),
    "largest of all": (between(nn.AdaptiveMaxPool2d(1)), {"max_pool"}),
    "largest of tiles": (Function(lambda one, x: F.adaptive_max_pool2d(one(x), (3, 2)), conv(3, 5)), {"max_pool"}),
    "mean of channels": (Function(lambda one, x: one(x) * one(x).mean(1, keepdim=True), conv(3, 5)), {"multiply"}),
    "expanded": (
        Function(lambda one, x: x * F.adaptive_avg_pool2d(one(x), 1).expand_as(x), conv(3, 3)),
        {"mean", "multiply", "layout"},
    ),
    "slope": (between(nn.LeakyReLU(0.2)), set()),
    "slope of nothing": (between(nn.LeakyReLU(0.0)), {"activate"}),
    "steep slope": (between(nn.LeakyReLU(2.0)), {"activate"}),
    "learned slope": (between(nn.PReLU(init=0.37)), set()),
    "slopes": (between(nn.PReLU(20)), {"activate"}),
    "slope of chance": (between(nn.RReLU()), set()),
    "tanh": (between(nn.Tanh()), set()),
    "elu": (between(nn.ELU()), set()),
    "celu": (between(nn.CELU()), set()),
    "mish": (between(nn.Mish()), set()),
    "gelu by tanh": (between(nn.GELU("tanh")), set()),
}  # fmt: skip
CONVOLUTIONS = {"stem", "conv"}


def settled(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = randomise_norms(NETWORKS[name][0]).eval()
    for module in model.modules():
        if isinstance(module, nn.PReLU) and module.num_parameters > 1:
            nn.init.normal_(module.weight)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_operation_is_left_to_aten(name: str, backend: str) -> None:
    model, x = settled(name), 3 * torch.randn(3, 3, 12, 18)
    with torch.no_grad():
        want = model(x)
        fast = dc.compile(model, (x[:1],), backend=backend)
        assert not fast.plan.aten, fast.plan.aten
        assert {step["kernel"].split(" ")[0] for step in fast.plan.steps} - CONVOLUTIONS == NETWORKS[name][1]
        torch.testing.assert_close(fast(x), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.skipif(bool(runtime.missing_bfloat16()), reason="no bfloat16")
@pytest.mark.parametrize("name", NETWORKS)
def test_in_bfloat16(name: str) -> None:
    model, x = settled(name), torch.randn(2, 3, 12, 18)
    dc.compile(model, (x,), dtype=torch.bfloat16).verify((x,))


REASONS = {
    "depthwise": (nn.ConvTranspose2d(3, 3, 4, 2, 1, groups=3), "groups or dilation"),
    "wide border": (nn.ConvTranspose2d(3, 3, 2, 2, 0, 1), "reaches beyond"),
    "other borders": (nn.ConstantPad2d(1, 0.5), "only borders"),
    "unequal windows": (nn.AdaptiveMaxPool2d(5), "different sizes"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_left_to_aten_says_why(name: str) -> None:
    layer, reason = REASONS[name]
    model, x = nn.Sequential(conv(3, 3), layer).eval(), torch.randn(2, 3, 12, 18)
    fast = dc.compile(model, (x,), measure=False)
    assert reason in fast.plan.aten[0]["reason"]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


class Residual(nn.Module):
    """x + branch(x) with an activation of its own."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv(20, 20), act, conv(20, 20))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", [nn.LeakyReLU(0.2), nn.PReLU(20), nn.Mish()], ids=["leaky", "slopes", "mish"])
def test_a_masked_branch_skips_before_its_activation(act: nn.Module, backend: str) -> None:
    torch.manual_seed(0)
    if isinstance(act, nn.PReLU):
        nn.init.normal_(act.weight)
    model = nn.Sequential(conv(3, 20), Residual(act))
    dc.dynamize_(model, input_size=(3, 12, 18))
    x = torch.randn(3, 3, 12, 18)
    fast = dc.compile(model.eval(), (x,), backend=backend)
    masked = [s for s in fast.plan.raw.steps if s.kind == "conv" and s.grid >= 0]
    assert len(masked) == 2 and not fast.plan.aten
    for density in (0.0, 0.3, 1.0):
        with torch.no_grad(), force_masks(model, density):
            want = model(x)
            torch.testing.assert_close(fast(x), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


class NormByHand(nn.Module):
    """A layer norm over channels, as many networks write it."""

    def __init__(self, channels: int, squared: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(channels))
        self.squared = squared

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = self.squared(x - mean).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


@pytest.mark.parametrize(
    "squared", [lambda d: d.pow(2), lambda d: d * d, lambda d: d**2], ids=["pow", "product", "power"]
)
def test_a_layer_norm_written_by_hand_is_one_step(squared: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = between(NormByHand(20, squared)).eval(), torch.randn(2, 3, 12, 18)
    fast = dc.compile(model, (x,), measure=False)
    assert [s["kernel"] for s in fast.plan.steps][1:2] == ["layer_norm"] and not fast.plan.aten
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_plan_with_slopes_and_another_grid_is_saved(tmp_path) -> None:
    model = between(nn.PReLU(20), nn.Upsample(scale_factor=2, mode="bilinear"), nn.LeakyReLU(0.2)).eval()
    x = torch.randn(2, 3, 12, 18)
    fast = dc.compile(model, (x,), measure=False)
    fast.save(tmp_path / "model.plan")
    assert torch.equal(dc.engine.load(tmp_path / "model.plan")(x), fast(x))


LARGE = {
    "patches": (nn.Conv2d(3, 4, 24, 24), ["conv2d"]),
    "flattened": (nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 48, 4)), ["linear"]),
    "mean": (nn.AvgPool2d((24, 48)), []),
    "means": (nn.AvgPool2d(23, 1, padding=3), ["avg_pool2d"]),
    "largest": (nn.MaxPool2d(23, 2, padding=5), []),
    "unpooled": (nn.ConvTranspose2d(3, 4, 24), ["conv_transpose2d"]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LARGE)
def test_windows_with_more_taps_than_a_step_may_have(name: str, backend: str) -> None:
    torch.manual_seed(0)
    layer, left = LARGE[name]
    model, x = nn.Sequential(conv(3, 3), layer).eval(), torch.randn(2, 3, 24, 48)
    fast = dc.compile(model, (x,), measure=False, backend=backend)
    operations = [row["operation"].removeprefix("aten::").split(".")[0] for row in fast.plan.aten]
    assert [o for o in operations if o != "flatten"] == left
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
