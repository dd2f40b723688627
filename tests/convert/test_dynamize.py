"""Conversion: what is converted, what is refused and why, and the way back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tests.convert.networks import randomise_norms
from torch import nn

import dynaconv as dc
from dynaconv.convert import config_from_dict
from dynaconv.testing import force_masks

NETWORKS = [
    ("resnet8_cifar", 32, 3),
    ("resnet14_cifar", 32, 6),
    ("resnet20_cifar", 32, 9),
    ("resnet26_cifar", 32, 12),
    ("resnet32_cifar", 32, 15),
    ("timm:resnet18", 65, 8),
    ("timm:resnet50", 64, 16),
    ("torchvision:resnet18", 64, 8),
    ("torchvision:resnet50", 65, 16),
    ("timm:mobilenetv2_050", 64, 10),
    ("torchvision:mobilenet_v2", 64, 10),
    ("timm:resnext50_32x4d", 64, 16),
]


@pytest.mark.needs("timm", "torchvision")
@pytest.mark.parametrize(("name", "size", "blocks"), NETWORKS)
def test_open_masks_change_nothing_and_revert_restores(name: str, size: int, blocks: int, seed: int) -> None:
    model = randomise_norms(dc.create_model(name, num_classes=7)).eval()
    original = copy.deepcopy(model)
    x = torch.randn(2, 3, size, size)
    report = dc.dynamize_(model)
    assert len(report.converted) == blocks
    with torch.no_grad():
        want = original(x)
        with force_masks(model, 1.0):
            assert (model(x) - want).abs().max() <= 1e-4 * want.abs().max()
        with force_masks(model, 0.4):
            deviations = _sparse_against_dense(model, x)
    assert deviations < 1e-4
    assert dc.revert_(model) == report.converted
    restored, before = model.state_dict(), original.state_dict()
    assert list(restored) == list(before)
    assert all(torch.equal(restored[k], before[k]) for k in before)


def _sparse_against_dense(model: nn.Module, x: torch.Tensor) -> float:
    outputs = []
    for backend in ("auto", "eager"):
        for block in dc.masked_blocks(model).values():
            block.backend, block.break_even = backend, 2.0
        outputs.append(model(x))
    return float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())


def test_report_lists_every_module_with_sizes() -> None:
    model = dc.create_model("resnet8_cifar")
    names = [n for n, _ in model.named_modules() if n]
    report = dc.dynamize_(model)
    assert [m.name for m in report.modules] == names
    assert report.dense_macs_before == 12_500_992
    assert report.dense_macs_after == 12_500_992 + 204_096
    assert report.params_after - report.params_before == sum(9 * c + 1 + c + 1 for c in (16, 16, 32))
    status = {m.name: m.status for m in report.modules}
    assert (status["layer1.0"], status["layer1.0.conv1"], status["fc"]) == ("converted", "inside", "kept")
    assert "layer1.0" in report.table() and "layer1.0.conv1" in report.table(every=True)
    assert json.loads(report.to_json())["dense_macs_before"] == 12_500_992


@pytest.mark.needs("timm")
def test_inverted_residuals_without_shortcut_are_skipped_with_the_reason() -> None:
    report = dc.dynamize_(dc.create_model("timm:mobilenetv2_050"))
    assert len(report.skipped) == 6
    assert all("no shortcut" in reason for reason in report.skipped.values())


def test_depthwise_branches_that_are_thin_beside_their_mask_unit_are_skipped_with_the_reason() -> None:
    class Block(nn.Module):
        def __init__(self, kernel: int, parallel: int = 1) -> None:
            super().__init__()
            convs = (nn.Conv2d(8, 8, kernel, padding=kernel // 2, groups=8) for _ in range(parallel))
            self.convs, self.norm = nn.ModuleList(convs), nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.norm(sum(conv(x) for conv in self.convs))

    report = dc.dynamize_(model := nn.Sequential(Block(3, parallel=4), Block(7)), input_size=(8, 9, 7))
    reason = "its branch takes 72 multiply-adds a position, and the mask unit that would decide for it 72"
    assert report.converted == ["1"] and reason in report.skipped["0"]
    dc.revert_(model)
    model = nn.Sequential(Block(5), Block(7))
    report = dc.dynamize_(model, input_size=(8, 9, 7))
    assert report.converted == ["1"] and reason.replace("72", "200", 1) in report.skipped["0"]
    dc.revert_(model)
    for config in (dc.SpatialMasking(unit="conv1x1"), dc.SpatialMasking(granularity=2)):
        assert dc.dynamize_(model, config, input_size=(8, 9, 7)).converted == ["0", "1"]
        dc.revert_(model)

    class Around(nn.Module):
        """A residual block around one that is not worth a gate: masked as a whole."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Conv2d(8, 16, 1), Block(3), nn.Conv2d(8, 8, 1)
            self.between = nn.Conv2d(16, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.last(self.inner(self.between(self.first(x))))

    model = nn.Sequential(Around())
    assert dc.dynamize_(model, input_size=(8, 9, 7)).converted == ["0"]
    dc.revert_(model)
    cheap = dc.SpatialMasking(unit="conv1x1")
    assert dc.dynamize_(model, cheap, input_size=(8, 9, 7)).converted == ["0.inner"]


@pytest.mark.needs("timm")
def test_thin_first_block_of_mobilenetv3_stays_static() -> None:
    report = dc.dynamize_(dc.create_model("timm:mobilenetv3_large_100"))
    assert "400 multiply-adds a position" in report.skipped["blocks.0.0"] and len(report.converted) == 9


def test_rules_by_name() -> None:
    coarse = dc.SpatialMasking(granularity=2)
    model = dc.create_model("resnet14_cifar")
    report = dc.dynamize_(model, {"layer1": None, r"re:layer[23]\.": coarse, "layer2.1": dc.SpatialMasking()})
    assert report.converted == ["layer2.0", "layer2.1", "layer3.0", "layer3.1"]
    assert report.skipped["layer1.0"] == "no rule asks for it"
    granularities = {n: b.gate.granularity_px for n, b in dc.masked_blocks(model).items()}
    assert granularities == {"layer2.0": 2, "layer2.1": 1, "layer3.0": 2, "layer3.1": 2}


def test_config_round_trip_and_validation() -> None:
    config = dc.SpatialMasking(preset="paper", unit="conv1x1", granularity=2)
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (dc.SpatialMasking("paper").temperature, dc.SpatialMasking("paper").dilation_gradient) == (
        1.0,
        "none",
    )
    for bad, message in [
        ({"preset": "papr"}, "unknown preset 'papr'; did you mean 'paper'"),
        ({"unit": "conv3"}, "unknown mask unit"),
        ({"granularity": 0}, "granularity must be"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"dilation_gradient": "some"}, "unknown dilation_gradient"),
    ]:
        with pytest.raises(ValueError, match=message):
            dc.SpatialMasking(**bad)
    with pytest.raises(ValueError, match="unknown option of spatial_masking 'unitt'; did you mean 'unit'"):
        config_from_dict({"unitt": "squeeze"})


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"layer9": None}, "unknown module 'layer9'; did you mean"),
        ({"re:nothing": None}, "matches no module"),
        ({"re:[": None}, "not a regular expression"),
    ],
)
def test_broken_rules_leave_the_model_alone(rules: dict, message: str) -> None:
    model = dc.create_model("resnet8_cifar")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        dc.dynamize_(model, rules)
    assert list(model.state_dict()) == keys


def test_nothing_to_convert_and_already_converted() -> None:
    with pytest.raises(ValueError, match="Sequential has nothing to convert"):
        dc.dynamize_(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))
    model = dc.create_model("dynconv_resnet8_cifar")
    with pytest.raises(ValueError, match="dynamic already.*revert_"):
        dc.dynamize_(model)
    with pytest.raises(TypeError, match="expected a config"):
        dc.dynamize_(dc.create_model("resnet8_cifar"), "paper")
    assert dc.revert_(dc.create_model("resnet8_cifar")) == []


def test_training_mode_and_device_follow_the_block() -> None:
    model = dc.create_model("resnet8_cifar").double().eval()
    dc.dynamize_(model)
    gates = dc.gates(model).values()
    assert all(not g.training and g.conv.weight.dtype == torch.float64 for g in gates)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64
