"""Counting: published totals, a brute-force count of multiply-adds, maps."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn

import dynaconv as dc
from dynaconv.cost import count_dense
from dynaconv.testing import blob_mask, force_masks

TOTALS = {
    "resnet8_cifar": (12_500_992, 11_796_480, 204_096),
    "resnet14_cifar": (26_656_768, 25_952_256, 463_488),
    "resnet20_cifar": (40_812_544, 40_108_032, 722_880),
    "resnet32_cifar": (69_124_096, 68_419_584, 1_241_664),
}


@pytest.mark.parametrize("name", TOTALS)
def test_published_totals(name: str) -> None:
    dense, conditional, gates = TOTALS[name]
    profile = dc.profile(dc.create_model(f"dynconv_{name}"), torch.randn(2, 3, 32, 32))
    assert (profile.dense_macs, profile.conditional_macs) == (dense, conditional)
    assert profile.routing_macs.tolist() == [gates] * 2
    assert dc.profile(dc.create_model(name), torch.randn(1, 3, 32, 32)).dense_macs == dense


@pytest.mark.needs("timm")
@pytest.mark.parametrize(
    ("name", "convolutions", "with_classifier"),
    [
        ("timm:resnet18", 1_813_561_344, 1_814_073_344),
        ("timm:resnet50", 4_087_136_256, 4_089_184_256),
        ("timm:resnet101", 7_799_357_440, 7_801_405_440),
        ("timm:mobilenetv2_100", 299_494_272, 300_774_272),
    ],
)
def test_published_imagenet_totals(name: str, convolutions: int, with_classifier: int) -> None:
    counts = count_dense(dc.create_model(name), (3, 224, 224))
    assert counts.static == convolutions
    assert counts.static + sum(counts.linears.values()) == with_classifier


@pytest.mark.needs("torchvision")
def test_gates_of_resnet101_as_published() -> None:
    model = dc.create_model("torchvision:resnet101")
    dc.dynamize_(model)
    assert count_dense(model, (3, 224, 224)).gates == 71_819_055


@pytest.mark.parametrize(("target", "total"), [(0.1, 8.788), (0.3, 22.472), (0.5, 36.156), (0.7, 49.840)])
def test_exact_budget_totals_of_resnet32(target: float, total: float) -> None:
    dense, conditional, gates = TOTALS["resnet32_cifar"]
    assert round((dense - conditional + gates + target * conditional) / 1e6, 3) == total


def brute_force(model: nn.Module, masks: dict[str, torch.Tensor], image: int, size: int) -> int:
    """Multiply-adds of a converted CIFAR ResNet, one output position and one reader at a time."""
    count = size * size * 27 * model.conv1.out_channels
    for name, mask in masks.items():
        block = dc.masked_blocks(model)[name].block
        m = mask[image, 0].bool()
        h, w = m.shape
        stride = block.conv1.stride[0]
        c, o = block.conv1.in_channels, block.conv1.out_channels
        needed = set()
        for y, x in itertools.product(range(h), range(w)):
            count += 9 * c + 1
            if stride != 1 or c != o:
                count += c * o
            if not m[y, x]:
                continue
            count += 9 * o * o
            for dy, dx in itertools.product((-1, 0, 1), repeat=2):
                if 0 <= y + dy < h and 0 <= x + dx < w:
                    needed.add((y + dy, x + dx))
        count += len(needed) * 9 * c * o
    return count


@pytest.mark.parametrize("size", [8, 11])
@pytest.mark.parametrize("density", [0.0, 0.15, 0.5, 1.0])
def test_executed_macs_equal_a_brute_force_count(size: int, density: float) -> None:
    model = dc.models.CifarResNet(8, width=4, image_size=size)
    dc.dynamize_(model)
    x = torch.randn(3, 3, size, size)
    with force_masks(model, density, seed=4):
        profile = dc.profile(model, x)
        with torch.no_grad(), dc.collect_masks(model.eval()) as masks:
            model(x)
    for i in range(3):
        assert profile.executed_macs[i] == brute_force(model, masks, i, size)


def test_executed_macs_rise_with_density() -> None:
    model = dc.create_model("dynconv_resnet14_cifar")
    x = torch.randn(2, 3, 32, 32)
    spent = []
    for density in (0.0, 0.1, 0.4, 0.9, 1.0):
        with force_masks(model, density):
            spent.append(float(dc.profile(model, x).executed_macs.mean()))
    assert spent == sorted(spent) and spent[0] < spent[-1]


def test_the_model_is_left_as_it_was() -> None:
    model = dc.create_model("dynconv_resnet8_cifar").train()
    model.layer1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    dc.profile(model, torch.randn(1, 3, 32, 32))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(b.backend == "auto" for b in dc.masked_blocks(model).values())
    assert not any(g._forward_hooks for g in dc.gates(model).values())


def test_table_and_json_agree() -> None:
    profile = dc.profile(dc.create_model("dynconv_resnet8_cifar"), torch.randn(2, 3, 32, 32))
    data = json.loads(profile.to_json())
    assert data["dense_macs"] == 12_500_992 and len(data["executed_macs"]) == 2
    assert sum(layer["dense_macs"] for layer in data["layers"] if layer["role"] != "routing") == 12_500_992
    assert "12,500,992 MACs per image of 3x32x32" in profile.table()
    assert profile.params == sum(p.numel() for p in dc.create_model("dynconv_resnet8_cifar").parameters())


def test_bad_input() -> None:
    model = dc.create_model("resnet8_cifar")
    with pytest.raises(ValueError, match=r"profile expects x \[N, C, H, W\], got \[3, 32, 32\]"):
        dc.profile(model, torch.randn(3, 32, 32))
    with pytest.raises(ValueError, match="at least one image"):
        dc.profile(model, torch.randn(0, 3, 32, 32))
    with pytest.raises(ValueError, match="no gates"):
        dc.ponder_map({})


def test_maps_add_up() -> None:
    model = dc.create_model("dynconv_resnet8_cifar").eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for density, share in ((1.0, 1.0), (0.0, 0.0)):
            with force_masks(model, density), dc.collect_masks(model) as masks:
                model(x)
            assert dc.ponder_map(masks).shape == (2, 32, 32)
            assert torch.all(dc.ponder_map(masks) == 3 * share)
            assert torch.allclose(dc.ponder_map(masks, weighted=True), torch.tensor(3.0 * share))
            assert torch.allclose(dc.mac_density_map(masks, (64, 64)), torch.tensor(share))
        with force_masks(model, 0.3), dc.collect_masks(model) as masks:
            model(x)
        mean = dc.mac_density_map(masks, (32, 32)).mean((1, 2))
        assert torch.allclose(mean, masks.conditional_ratio().float(), atol=1e-5)


def test_masks_are_spatial_masks_and_forcing_is_deterministic() -> None:
    model = dc.create_model("dynconv_resnet8_cifar").eval()
    x = torch.randn(2, 3, 32, 32)
    runs = []
    for _ in range(2):
        with torch.no_grad(), force_masks(model, 0.25, seed=7), dc.collect_masks(model) as masks:
            model(x)
        runs.append({k: v.clone() for k, v in masks.items()})
    assert list(runs[0]) == ["layer1.0", "layer2.0", "layer3.0"]
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    mask = masks["layer1.0"]
    assert isinstance(mask, dc.nn.SpatialMask) and mask.density == pytest.approx(0.25)
    assert mask.resize((16, 16)).shape == (2, 1, 16, 16)
    assert mask.dilate().density >= mask.density
    assert blob_mask(2, (10, 10), 0.33).mean() == pytest.approx(0.33)
    with pytest.raises(ValueError, match=r"must be a tensor \[N, 1, h, w\]"):
        dc.nn.SpatialMask(torch.ones(2, 3, 4, 4))
