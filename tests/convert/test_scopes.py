"""Roles of layers, and which layers each paper makes dynamic, against lists written down by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dynaconv as dc
from dynaconv.convert.layer_sites import ROLES, find_blocks, network_family
from dynaconv.convert.scopes import METHODS, LayerSite, layer_sites, paper_sites
from dynaconv.models.dynamic import DyMobile, DyShuffleNetV2, WeightShuffleNetV2

FAMILIES = {
    "resnet14_cifar": "resnet",
    "torchvision:resnet18": "resnet",
    "torchvision:resnet50": "resnet",
    "timm:resnet50": "resnet",
    "timm:seresnet50": "resnet",
    "timm:regnety_004": "resnet",
    "torchvision:mobilenet_v2": "mobilenetv2",
    "timm:mobilenetv2_050": "mobilenetv2",
    "torchvision:mobilenet_v3_large": "mobilenetv3",
    "torchvision:mobilenet_v3_small": "mobilenetv3",
    "timm:mobilenetv3_large_100": "mobilenetv3",
    "torchvision:efficientnet_b0": "efficientnet",
    "timm:efficientnet_b0": "efficientnet",
    "timm:efficientnetv2_rw_t": "efficientnet",
    "torchvision:mnasnet1_0": "mnasnet",
    "timm:mnasnet_100": "mnasnet",
    "torchvision:shufflenet_v2_x1_0": "shufflenetv2",
    "torchvision:convnext_tiny": "convnext",
    "timm:convnext_tiny": "convnext",
    "timm:convnext_tiny_hnf": "convnext",
}
pytestmark = pytest.mark.needs("timm", "torchvision")


def build(name: str) -> nn.Module:
    """A network without memory for its weights."""
    with torch.device("meta"):
        return dc.create_model(name)


def names(model: nn.Module, method: str, **options) -> list[str]:
    return [site.name for site in paper_sites(model, method, **options)]


def roles(model: nn.Module) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for site in layer_sites(model):
        found.setdefault(site.role, []).append(site.name)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_convolution_has_one_role_and_lies_in_its_block(name: str) -> None:
    model = build(name)
    assert network_family(model) == FAMILIES[name]
    sites = layer_sites(model)
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert [s.name for s in sites if isinstance(model.get_submodule(s.name), nn.Conv2d)] == convs
    assert {s.role for s in sites} <= set(ROLES)
    assert sites[0].role == "stem" and sites[-1].role == "classifier"
    assert [s.role for s in sites].count("classifier") == 1
    for site in sites:
        assert site.block is None or (
            site.name.startswith(site.block + ".") and site.block in find_blocks(model)
        )
        conv = model.get_submodule(site.name)
        depthwise = isinstance(conv, nn.Conv2d) and 1 < conv.groups == conv.in_channels
        assert not depthwise or site.role in ("depthwise", "shortcut")
    for method in METHODS:
        chosen = paper_sites(model, method)
        assert [s.name for s in chosen] == [s.name for s in sites if s.name in {c.name for c in chosen}]
        assert not {s.role for s in chosen} & {"stem", "squeeze_excite", "post_pool"}
        assert len(chosen) > 0


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_resnet18(library: str) -> None:
    model = build(f"{library}:resnet18")
    blocks = [f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)]
    main = [f"{b}.{conv}" for b in blocks for conv in ("conv1", "conv2")]
    shortcuts = [f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)]
    assert list(find_blocks(model)) == blocks
    assert roles(model) == {"stem": ["conv1"], "conv": main, "shortcut": shortcuts, "classifier": ["fc"]}
    assert names(model, "condconv") == [
        *("layer3.1.conv1", "layer3.1.conv2", "layer4.0.conv1", "layer4.0.conv2"),
        *("layer4.1.conv1", "layer4.1.conv2", "fc"),
    ]
    assert {s.name: s.block for s in paper_sites(model, "condconv")}["layer4.0.conv2"] == "layer4.0"
    assert sorted(names(model, "dyconv")) == sorted(main + shortcuts)
    assert names(model, "dynet") == names(model, "odconv") == main
    assert names(model, "dcd") == [*main, "fc"]
    assert sorted(names(model, "weightnet")) == sorted(main + shortcuts)


@pytest.mark.parametrize(("name", "last"), [("torchvision:resnet50", 2), ("timm:resnet101", 2)])
def test_bottlenecks(name: str, last: int) -> None:
    model = build(name)
    expected = [f"layer4.{i}.conv{j}" for i in range(last + 1) for j in (1, 2, 3)]
    assert names(model, "condconv") == [*expected, "fc"]
    assert len(names(model, "dcd")) == 3 * len(find_blocks(model)) + 1
    assert len(names(model, "dyconv")) == 3 * len(find_blocks(model)) + 4
    assert len(names(model, "odconv")) == 3 * len(find_blocks(model))


def test_squeeze_excite_and_grouped_convolutions_of_residual_blocks() -> None:
    model = build("timm:seresnet50")
    assert len(roles(model)["squeeze_excite"]) == 32
    assert len(names(model, "dynet")) == 48
    grouped = roles(build("timm:regnety_004"))
    assert "depthwise" not in grouped and len(grouped["shortcut"]) == 4
    assert roles(build("timm:resnet50d"))["stem"] == ["conv1.0", "conv1.3", "conv1.6"]


def test_cifar_resnet() -> None:
    model = build("resnet14_cifar")
    last = ["layer2.1.conv1", "layer2.1.conv2", "layer3.0.conv1", "layer3.0.conv2"]
    assert names(model, "condconv") == [*last, "layer3.1.conv1", "layer3.1.conv2", "fc"]
    assert len(names(model, "odconv")) == 12 and len(names(model, "dyconv")) == 14


def mobilenet_v2_torchvision() -> tuple[list[tuple[str, ...]], list[str]]:
    """(expand, depthwise, project) of every block in forward order, and (head, classifier)."""
    first = ("features.1.conv.0.0", "features.1.conv.1")
    rest = [
        (f"features.{i}.conv.0.0", f"features.{i}.conv.1.0", f"features.{i}.conv.2") for i in range(2, 18)
    ]
    return [first, *rest], ["features.18.0", "classifier.1"]


def mobilenet_v2_timm() -> tuple[list[tuple[str, ...]], list[str]]:
    """The same for timm."""
    where = [(row, i) for row, repeats in enumerate((2, 3, 4, 3, 3, 1), start=1) for i in range(repeats)]
    rest = [tuple(f"blocks.{r}.{i}.{conv}" for conv in ("conv_pw", "conv_dw", "conv_pwl")) for r, i in where]
    return [("blocks.0.0.conv_dw", "blocks.0.0.conv_pw"), *rest], ["conv_head", "classifier"]


@pytest.mark.parametrize(
    ("name", "layout"),
    [("torchvision:mobilenet_v2", mobilenet_v2_torchvision), ("timm:mobilenetv2_035", mobilenet_v2_timm)],
)
def test_mobilenet_v2(name: str, layout) -> None:
    model = build(name)
    blocks, (head, classifier) = layout()
    in_blocks = [conv for block in blocks for conv in block]
    last_six = [conv for block in blocks[-6:] for conv in block]
    assert names(model, "condconv") == [*last_six, classifier]
    assert names(model, "dyconv") == names(model, "odconv") == [*in_blocks, head]
    assert names(model, "dynet") == names(model, "weightnet") == in_blocks
    pointwise = [conv for block in blocks[1:] for conv in (block[0], block[2])]
    assert names(model, "dcd") == [*pointwise, classifier]


def test_the_wider_condconv_of_later_papers() -> None:
    model = build("torchvision:mobilenet_v2")
    blocks, (head, classifier) = mobilenet_v2_torchvision()
    # The first 64-wide block is the seventh of seventeen.
    wide = [conv for block in blocks[6:] for conv in block]
    assert names(model, "condconv", first_block="features.7", head=True) == [*wide, head, classifier]
    assert names(model, "condconv", first_block=6, classifier=False) == wide
    assert names(model, "condconv", first_block=-11, classifier=False) == wide
    assert names(model, "odconv", first_block=-1, head=False) == list(blocks[-1])


@pytest.mark.parametrize(
    ("name", "head", "behind"),
    [
        ("torchvision:mobilenet_v3_large", "features.16.0", "classifier.0"),
        ("timm:mobilenetv3_large_100", "blocks.6.0.conv", "conv_head"),
    ],
)
def test_mobilenet_v3_large(name: str, head: str, behind: str) -> None:
    model = build(name)
    found = roles(model)
    assert found["head"] == [head] and found["post_pool"] == [behind]
    blocks = list(find_blocks(model))
    assert [len(found[r]) for r in ("expand", "depthwise", "project")] == [14, 15, 15]
    assert len(blocks) == 15 and len(found["squeeze_excite"]) == 16
    last = paper_sites(model, "condconv")
    assert list(dict.fromkeys(s.block for s in last if s.block)) == blocks[-6:]
    assert len(last) == 6 * 3 + 1 and last[-1].role == "classifier"
    in_blocks = [s.name for s in layer_sites(model) if s.role in ("expand", "depthwise", "project")]
    assert names(model, "dyconv") == names(model, "odconv") == [*in_blocks, head]
    assert names(model, "dynet") == in_blocks
    # The first block has no expansion.
    assert len(names(model, "dcd")) == 2 * 14 + 1
    assert not any(n.startswith(blocks[0] + ".") for n in names(model, "dcd"))


@pytest.mark.parametrize(
    ("name", "blocks"), [("torchvision:mobilenet_v3_small", 11), ("timm:mobilenetv3_small_100", 11)]
)
def test_mobilenet_v3_small(name: str, blocks: int) -> None:
    model = build(name)
    assert len(find_blocks(model)) == blocks
    assert len(names(model, "condconv")) == 19 and len(names(model, "dynet")) == 32
    assert len(names(model, "dyconv")) == 33 and len(names(model, "dcd")) == 21


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("torchvision:efficientnet_b0", ("features.5", "features.6", "features.7")),
        ("timm:efficientnet_b0", ("blocks.4", "blocks.5", "blocks.6")),
    ],
)
def test_efficientnet(name: str, rows: tuple[str, ...]) -> None:
    model = build(name)
    blocks = list(find_blocks(model))
    assert len(blocks) == 16
    chosen = paper_sites(model, "condconv")
    assert list(dict.fromkeys(s.block for s in chosen)) == blocks[8:]
    assert {s.block.rpartition(".")[0] for s in chosen} == set(rows)
    assert len(chosen) == 8 * 3
    assert len(names(model, "dyconv")) == len(names(model, "odconv")) == 15 * 3 + 2 + 1
    assert len(names(model, "dynet")) == 47 and len(names(model, "dcd")) == 31


def test_fused_blocks_of_efficientnet_v2() -> None:
    found = roles(build("torchvision:efficientnet_v2_s"))
    assert found["conv"] == ["features.1.0.block.0.0", "features.1.1.block.0.0"]
    assert "features.2.0.block.0.0" in found["expand"] and "features.2.0.block.1.0" in found["project"]


@pytest.mark.parametrize(
    ("name", "first", "rows"),
    [
        ("torchvision:mnasnet1_0", ["layers.3", "layers.6"], ("layers.11", "layers.12", "layers.13")),
        (
            "timm:mnasnet_100",
            ["blocks.0.0.conv_dw", "blocks.0.0.conv_pw"],
            ("blocks.4", "blocks.5", "blocks.6"),
        ),
    ],
)
def test_mnasnet(name: str, first: list[str], rows: tuple[str, ...]) -> None:
    model = build(name)
    assert len(roles(model)["stem"]) == 1
    chosen = paper_sites(model, "condconv")
    assert {s.block.rpartition(".")[0] for s in chosen} == set(rows) and len(chosen) == 7 * 3
    assert len(names(model, "dyconv")) == len(names(model, "odconv")) == 51
    assert names(model, "dyconv")[:2] == names(model, "dynet")[:2] == first
    assert len(names(model, "dynet")) == 50 and len(names(model, "dcd")) == 33


def test_shufflenet_v2() -> None:
    model = build("torchvision:shufflenet_v2_x1_0")
    units = [f"stage{s}.{i}" for s, repeats in ((2, 4), (3, 8), (4, 4)) for i in range(repeats)]
    right = {u: [f"{u}.branch2.{i}" for i in (0, 3, 5)] for u in units}
    left = {u: [f"{u}.branch1.{i}" for i in (0, 2)] for u in ("stage2.0", "stage3.0", "stage4.0")}
    both = [conv for u in units for conv in [*left.get(u, []), *right[u]]]
    assert list(find_blocks(model)) == units
    assert roles(model)["shortcut"] == [conv for convs in left.values() for conv in convs]
    assert names(model, "condconv") == [*(c for u in units[-6:] for c in right[u]), "fc"]
    assert names(model, "dyconv") == names(model, "odconv") == [*both, "conv5.0"]
    assert names(model, "weightnet") == both
    assert names(model, "dynet") == [conv for u in units for conv in right[u]]
    assert [s.block for s in paper_sites(model, "dynet")][:3] == ["stage2.0.branch2"] * 3
    assert {s.block for s in paper_sites(model, "weightnet")} == {
        u if u in left else f"{u}.branch2" for u in units
    }
    assert {s.block for s in paper_sites(model, "condconv") if s.block} == set(units[-6:])
    assert names(model, "dcd") == [*(c for u in units for c in right[u][::2]), "fc"]


@pytest.mark.parametrize(
    ("name", "stem", "between", "depthwise", "last"),
    [
        (
            "torchvision:convnext_tiny",
            "features.0.0",
            [f"features.{i}.1" for i in (2, 4, 6)],
            [f"features.{2 * s + 1}.{i}.block.0" for s, n in enumerate((3, 3, 9, 3)) for i in range(n)],
            "classifier.2",
        ),
        (
            "timm:convnext_tiny",
            "stem.0",
            [f"stages.{i}.downsample.1" for i in (1, 2, 3)],
            [f"stages.{s}.blocks.{i}.conv_dw" for s, n in enumerate((3, 3, 9, 3)) for i in range(n)],
            "head.fc",
        ),
    ],
)
def test_convnext(name: str, stem: str, between: list[str], depthwise: list[str], last: str) -> None:
    model = build(name)
    assert roles(model) == {"stem": [stem], "depthwise": depthwise, "conv": between, "classifier": [last]}
    assert names(model, "condconv") == [*depthwise[-6:], last]
    assert sorted(names(model, "dyconv")) == sorted(names(model, "odconv")) == sorted(depthwise + between)
    assert names(model, "dynet") == names(model, "weightnet") == depthwise
    assert names(model, "dcd") == [*between, last]


def test_convnext_with_pointwise_convolutions() -> None:
    found = roles(build("timm:convnext_tiny_hnf"))
    assert len(found["expand"]) == len(found["project"]) == len(found["depthwise"]) == 18
    assert found["expand"][0] == "stages.0.blocks.0.mlp.fc1"


def test_own_networks() -> None:
    with torch.device("meta"):
        mobile, shuffle, weight = DyMobile(), DyShuffleNetV2(), WeightShuffleNetV2()
    assert {role: len(found) for role, found in roles(mobile).items()} == {
        "stem": 1,
        "conv": 51,
        "head": 1,
        "classifier": 1,
    }
    assert names(mobile, "dynet")[:3] == ["blocks.0.first.0", "blocks.0.spatial.0", "blocks.0.last.0"]
    assert len(names(mobile, "dynet")) == 51 and len(names(mobile, "dyconv")) == 52
    assert len(names(shuffle, "dynet")) == 48 and len(names(weight, "weightnet")) == 54
    assert {s.block for s in paper_sites(shuffle, "dynet")} == {f"{b}.branch2" for b in find_blocks(shuffle)}
    strided = {"stage2.0", "stage3.0", "stage4.0"}
    fed = {b if b in strided else f"{b}.branch2" for b in find_blocks(weight)}
    assert {s.block for s in paper_sites(weight, "weightnet")} == fed


def test_gates_are_no_sites() -> None:
    model = dc.create_model("dynconv_resnet8_cifar")
    sites = layer_sites(model)
    assert len(sites) == 10
    assert LayerSite("layer1.0.block.conv1", "conv", "layer1.0.block") in sites


@pytest.mark.parametrize(
    "name", ["torchvision:vgg11", "timm:resnetv2_50", "timm:mobilenetv4_conv_medium", "timm:skresnet18"]
)
def test_unknown_networks_ask_for_rules(name: str) -> None:
    with pytest.raises(ValueError, match="have no known roles.*name the layers by rules instead"):
        layer_sites(build(name))


def test_bad_choices() -> None:
    model = build("resnet8_cifar")
    with pytest.raises(ValueError, match="unknown dynamic kernel method 'dynconv'; did you mean"):
        paper_sites(model, "dynconv")
    with pytest.raises(ValueError, match=r"unknown block 'layer3.1'; did you mean 'layer3.0'"):
        paper_sites(model, "condconv", first_block="layer3.1")
    with pytest.raises(ValueError, match="first_block must be an index from -3 to 2, got 3"):
        paper_sites(model, "condconv", first_block=3)
    with pytest.raises(ValueError, match="the layers of Sequential have no known roles"):
        paper_sites(nn.Sequential(nn.Conv2d(3, 8, 3)), "odconv")
