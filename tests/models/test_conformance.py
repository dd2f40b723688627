"""The published networks: parameters and multiply-adds as exact integers, and the published figures they round to.

Networks are built on the meta device, without memory. 224x224, 1000 classes, classifier included; no biases, no
pooling, no element-wise operations counted.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tests.models import closed_forms as forms
from tests.models.closed_forms import Count
from torch import nn

import dynaconv as dc
from dynaconv.models.dynamic.widths import WEIGHTNET_WIDTHS

pytestmark = pytest.mark.needs("torchvision")
MAIN = ("conv",)
ALL_BUT_STEM = ("expand", "depthwise", "project", "head")


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        return dc.create_model(name).eval()


def params(name: str) -> int:
    return sum(p.numel() for p in build(name).parameters())


def counted(name: str, form: str = "factored") -> tuple[int, int, int, int]:
    """(static, mixing, routing, total) that the profile of one image says; weights do not matter and stay empty."""
    model = build(name).to_empty(device="cpu")
    for layer in model.modules():
        if isinstance(layer, dc.nn.DCDConv2d):
            layer.form = form
    profile = dc.profile(model, torch.zeros(1, 3, 224, 224), include_linear=True)
    mixing, routing = int(profile.mixing_macs[0]), int(profile.routing_macs[0])
    total = int(profile.executed_macs[0])
    return total - mixing - routing, mixing, routing, total


# name: (parameters, published millions).
PARAMETERS = {
    "torchvision:resnet18": (11_689_512, "11.69"),
    "torchvision:resnet50": (25_557_032, "25.56"),
    "torchvision:resnet101": (44_549_160, "44.55"),
    "torchvision:mobilenet_v2": (3_504_872, "3.50"),
    "torchvision:efficientnet_b0": (5_288_548, "5.3"),
    "condconv4_efficientnet_b0": (13_314_116, "13.3"),
    "condconv8_efficientnet_b0": (24_013_284, "24.0"),
    "condconv8_efficientnet_b0_depth110": (39_715_968, "39.7"),
    "condconv8_resnet18": (81_345_120, "81.35"),
    "condconv8_mobilenetv2_100": (22_877_496, "22.88"),
    "dyconv4_resnet18": (45_472_052, "45.47"),
    "dyconv4_mobilenetv2_100": (12_404_540, "12.40"),
    "dcd_resnet18": (14_703_332, "14.70"),
    "dcd_mobilenetv2_100": (5_720_028, "5.72"),
    "odconv1_resnet18": (11_943_944, "11.94"),
    "odconv4_resnet18": (44_901_640, "44.90"),
    "odconv1_resnet50": (28_635_112, "28.64"),
    "odconv4_resnet50": (90_670_888, "90.67"),
    "odconv1_resnet101": (50_818_769, "50.82"),
    "odconv2_resnet101": (90_441_623, "90.44"),
    "odconv1_mobilenetv2_100": (4_940_185, "4.94"),
    "odconv4_mobilenetv2_100": (11_512_149, "11.51"),
    "odconv1_mobilenetv2_075": (3_507_113, "3.51"),
    "odconv4_mobilenetv2_075": (7_496_013, "7.50"),
    "odconv1_mobilenetv2_050": (2_425_537, "2.43"),
    "odconv4_mobilenetv2_050": (4_435_501, "4.44"),
}

# name: (static, mixing, routing, total).
MACS = {
    "torchvision:resnet18": (1_814_073_344, 0, 0, 1_814_073_344),
    "torchvision:resnet50": (4_089_184_256, 0, 0, 4_089_184_256),
    "torchvision:mobilenet_v2": (300_774_272, 0, 0, 300_774_272),
    "torchvision:efficientnet_b0": (385_814_752, 0, 0, 385_814_752),
    "condconv4_efficientnet_b0": (385_814_752, 10_694_400, 4_736, 396_513_888),
    "condconv8_resnet18": (1_814_073_344, 79_593_472, 12_288, 1_893_679_104),
    "condconv8_mobilenetv2_100": (300_774_272, 22_122_496, 16_384, 322_913_152),
    "dyconv4_resnet18": (1_814_073_344, 44_630_016, 308_992, 1_859_012_352),
    "dyconv4_mobilenetv2_100": (300_774_272, 8_755_584, 2_328_832, 311_858_688),
    "dcd_resnet18": (1_814_073_344, 66_257_179, 2_715_008, 1_883_045_531),
    "dcd_mobilenetv2_100": (300_774_272, 95_872_512, 1_741_300, 398_388_084),
    "odconv1_resnet18": (1_814_073_344, 10_985_472, 246_448, 1_825_305_264),
    "odconv1_mobilenetv2_100": (300_774_272, 64_224, 1_406_960, 302_245_456),
    "dyresnet18": (577_480_704, 16_533_504, 424_448, 594_438_656),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_the_published_figure(name: str) -> None:
    exact, published = PARAMETERS[name]
    assert params(name) == exact
    assert f"{exact / 1e6:.{len(published.partition('.')[2])}f}" == published


@pytest.mark.parametrize("name", MACS)
def test_multiply_adds(name: str) -> None:
    assert counted(name) == MACS[name]


def test_multiply_adds_of_folded_channel_fusion() -> None:
    assert counted("dcd_resnet18", "folded") == (1_814_073_344, 63_934_720, 2_715_008, 1_880_723_072)
    assert counted("dcd_mobilenetv2_100", "folded") == (300_774_272, 52_709_248, 1_741_300, 355_224_820)


def test_multiply_adds_of_dymobile_are_published_without_the_classifier() -> None:
    static, mixing, routing, total = counted("dymobile_100")
    classifier = 1280 * 1000
    assert (static - classifier, mixing, routing) == (129_262_392, 2_897_208, 2_984_040)
    assert total - classifier == 135_143_640


def test_published_multiply_adds() -> None:
    """Rounded as printed; docs/networks.md names the sources."""
    assert f"{MACS['torchvision:resnet18'][3] / 1e9:.3f}" == "1.814"
    assert f"{MACS['torchvision:mobilenet_v2'][3] / 1e6:.1f}" == "300.8"
    assert round(MACS["torchvision:resnet18"][3] / 2**20) == 1730
    assert round((MACS["condconv4_efficientnet_b0"][3] - 385_814_752) / 1e6) == 402 - 391
    assert f"{MACS['condconv8_resnet18'][3] / 1e9:.3f}" == "1.894"
    assert f"{(MACS['dyconv4_resnet18'][3] + 2_032_128) / 1e9:.3f}" == "1.861"
    assert int(MACS["dyresnet18"][0] / 2**20) == 550
    assert round(MACS["dyresnet18"][3] / 2**20) == round(1730 * (1 - 0.672))
    assert abs(135_143_640 / 1e6 - 298 * (1 - 0.547)) < 0.2
    # DCD's paper counts in units of 2^20, and MobileNetV2 with a static classifier.
    assert f"{PARAMETERS['dcd_resnet18'][0] / 2**20:.1f}" == "14.0"
    assert forms.dcd(forms.mobilenet_v2(1.0), classifier=False).params == 5_720_028 - 179_840


def last_blocks(net: forms.Net, count: int) -> int:
    return 1 + max(c.block for c in net.convs) - count


def structure(name: str) -> Count:
    """The closed form of a published network."""
    own = re.fullmatch(r"(dymobile_|dyresnet|weightnet_shufflenetv2_)(\d+)", name)
    if own:
        return OWN[own[1]](int(own[2]))
    method, base = name.split("_", 1)
    kind, number = method.rstrip("0123456789"), int(method.lstrip("abcdefghijklmnopqrstuvwxyz") or 0)
    if base.startswith("efficientnet"):
        net, first = forms.efficientnet_b0(1.1 if base.endswith("110") else 1.0)
        return forms.condconv(net, number, first, False)
    resnet = base.startswith("resnet")
    net = forms.resnet(int(base[6:])) if resnet else forms.mobilenet_v2(int(base[-3:]) / 100)
    if kind == "condconv":
        return forms.condconv(net, number, last_blocks(net, 3 if resnet else 6))
    if kind == "dyconv":
        return forms.dyconv(net, number)
    if kind == "odconv":
        return forms.odconv(net, number, MAIN if resnet else ALL_BUT_STEM)
    if kind == "dcd":
        narrow = not resnet and int(base[-3:]) < 75
        return forms.dcd(net, fc_squeeze=8 if narrow else 16)
    return forms.dynet(net, 6, 2 if resnet else 1)


OWN = {
    "dymobile_": lambda width: forms.dynet(forms.dymobile(width / 100), 6, 1),
    "dyresnet": lambda depth: forms.dynet(forms.resnet(depth, base=32), 6, 2),
    "weightnet_shufflenetv2_": lambda width: forms.weightnet_shufflenet(WEIGHTNET_WIDTHS[width]),
}
RESNETS = [f"resnet{d}" for d in (18, 34, 50, 101)]
MOBILENETS = [f"mobilenetv2_{w:03d}" for w in (35, 50, 75, 100, 140)]


@pytest.mark.parametrize("base", RESNETS + MOBILENETS)
@pytest.mark.parametrize("method", ["condconv3", "dyconv4", "dcd", "odconv4", "dynet"])
def test_parameters_of_every_width_and_depth(method: str, base: str) -> None:
    assert params(f"{method}_{base}") == structure(f"{method}_{base}").params


@pytest.mark.parametrize(
    "name", ["condconv3_mobilenetv2_050", "odconv4_resnet34", "dyconv2_resnet50", "dcd_resnet50"]
)
def test_multiply_adds_of_other_widths_and_depths(name: str) -> None:
    expected = structure(name)
    assert counted(name) == (expected.static, expected.mixing, expected.routing, expected.total)


def test_the_table_of_the_documentation() -> None:
    page = Path(__file__).parents[2] / "docs" / "networks.md"
    if not page.exists():
        pytest.skip("the documentation is not part of a source distribution")
    rows = re.findall(r"^\| `(\w+)` ((?:\| [\d,]+ ){5})\|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 50
    for name, cells in rows:
        numbers = tuple(int(cell.replace(",", "")) for cell in cells.split("|")[1:])
        if name == "fixmobile_100":
            net = forms.dymobile(1.0)
            assert numbers == (net.params, net.macs, 0, 0, net.macs)
            continue
        expected = structure(name)
        assert numbers == (
            expected.params,
            expected.static,
            expected.mixing,
            expected.routing,
            expected.total,
        ), name


@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.0, 1.3])
def test_dymobile_of_every_width(width: float) -> None:
    assert params(f"dymobile_{round(100 * width):03d}") == forms.dynet(forms.dymobile(width), 6, 1).params
    assert params(f"fixmobile_{round(100 * width):03d}") == forms.dymobile(width).params


@pytest.mark.parametrize("depth", [18, 50, 101])
def test_dyresnet_of_every_depth(depth: int) -> None:
    expected = forms.dynet(forms.resnet(depth, base=32), 6, 2)
    assert params(f"dyresnet{depth}") == expected.params
    if depth == 50:
        total = (expected.static, expected.mixing, expected.routing, expected.total)
        assert counted("dyresnet50") == total


@pytest.mark.parametrize("experts", [4, 8])
@pytest.mark.parametrize("depth", [1.0, 1.1])
def test_efficientnet_condconv(experts: int, depth: float) -> None:
    net, first = forms.efficientnet_b0(depth)
    suffix = "" if depth == 1 else "_depth110"
    assert (
        params(f"condconv{experts}_efficientnet_b0{suffix}")
        == forms.condconv(net, experts, first, False).params
    )


@pytest.mark.parametrize(
    ("width", "stages", "params_m", "macs_m"),
    [
        ("050", (48, 96, 192), "1.5", "41"),
        ("100", (112, 224, 448), "2.4", "139"),
        ("150", (176, 352, 704), "3.9", "301"),
        # Printed as 6.1 and 562.
        ("200", (248, 496, 992), "6.2", "561"),
    ],
)
def test_weightnet(width: str, stages: tuple[int, int, int], params_m: str, macs_m: str) -> None:
    expected = forms.weightnet_shufflenet(stages)
    name = f"weightnet_shufflenetv2_{width}"
    assert params(name) == expected.params and f"{expected.params / 1e6:.1f}" == params_m
    assert counted(name) == (expected.static, expected.mixing, expected.routing, expected.total)
    assert f"{expected.total / 1e6:.0f}" == macs_m


def test_published_sizes_of_channel_fusion() -> None:
    """(I, O, L, s) of MobileNetV2 x1.0 in network order, reference networks of arXiv 2103.08756."""
    layers = [m for m in build("dcd_mobilenetv2_100").modules() if isinstance(m, dc.nn.DCDConv2d)]
    got = [(m.in_channels, m.out_channels, m.latent_channels, m.squeeze_channels) for m in layers]
    assert got == [
        *((16, 96, 8, 4), (96, 24, 12, 9), (24, 144, 12, 9), (144, 24, 12, 9), (24, 144, 12, 9)),
        *((144, 32, 16, 16), *((32, 192, 16, 16), (192, 32, 16, 16)) * 2, (32, 192, 16, 16)),
        *((192, 64, 16, 16), *((64, 384, 16, 16), (384, 64, 16, 24)) * 3, (64, 384, 16, 16)),
        *((384, 96, 24, 36), *((96, 576, 24, 36), (576, 96, 24, 36)) * 2, (96, 576, 24, 36)),
        *((576, 160, 20, 36), *((160, 960, 20, 40), (960, 160, 40, 100)) * 2),
        *((160, 960, 20, 40), (960, 320, 40, 100)),
    ]
