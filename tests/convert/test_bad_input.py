"""What a conversion, a calibration or a masked operation refuses, and that the model is then as it was."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import dynaconv as dc
from dynaconv.ops import masked_conv2d
from dynaconv.ops.masked_mean import masked_mean

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return dc.create_model("resnet8_cifar", width=4)


def hook(*_args) -> None:
    return None


ATTACHED = {
    "layer1.0 has a forward hook": lambda m: m.layer1[0].register_forward_hook(hook),
    "layer2.0.conv1 has a forward-pre hook": lambda m: m.layer2[0].conv1.register_forward_pre_hook(hook),
    "layer3.0.bn2 has a backward hook": lambda m: m.layer3[0].bn2.register_full_backward_hook(hook),
    "layer1.0.conv1 has a forward-pre hook.*prune.remove": lambda m: prune.identity(
        m.layer1[0].conv1, "weight"
    ),
    "layer1.0.conv2 has a parametrization of weight": lambda m: parametrizations.weight_norm(
        m.layer1[0].conv2
    ),
    "layer2.0.conv1 has a .*remove_parametrizations": lambda m: parametrizations.orthogonal(
        m.layer2[0].conv1
    ),
}
CONFIGS = [dc.SpatialMasking(), dc.ChannelGate(), dc.CondConv(scope="all")]


@pytest.mark.parametrize("words", ATTACHED)
@pytest.mark.parametrize(
    "config", [dc.SpatialMasking(), dc.ChannelGate(), dc.CondConv(scope="all")], ids=lambda c: c.kind
)
def test_hooks_and_parametrizations_are_refused(words: str, config) -> None:
    model = network()
    ATTACHED[words](model)
    if config.kind == "condconv" and ("forward hook" in words or "bn2" in words):
        # Only convolutions are replaced, so what hangs on blocks and norms goes on working.
        assert dc.dynamize_(model, config).converted
        return
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    with pytest.raises(ValueError, match=words):
        dc.dynamize_(model, config)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("rules", "skipped"),
    [
        ({"body": dc.DYConv(), "body.2": None}, ["body.1"]),
        ({r"re:body.[01]": dc.DYConv(), "head": dc.DYConv()}, ["body.1"]),
        ({"stem": dc.DYConv(), "body.1": dc.DYConv()}, ["body.1"]),
        (dc.DYConv(scope="all"), ["body.1", "body.2"]),
    ],
    ids=["parent", "pattern", "name", "all"],
)
def test_parametrized_layers_that_rules_cover_are_named(rules, skipped) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
    for layer in body[1:]:
        parametrizations.weight_norm(layer)
    parts = {"stem": nn.Conv2d(3, 4, 1), "body": body, "head": nn.Conv2d(4, 5, 1)}
    model = nn.Sequential(OrderedDict(parts)).eval()
    want = model(X)
    report = dc.dynamize_(model, rules)
    assert list(report.skipped) == skipped and "parametrization" in report.skipped["body.1"]
    assert report.converted and not set(skipped) & set(report.converted)
    torch.testing.assert_close(model(X), want)


def test_parametrized_layers_alone_are_refused() -> None:
    model = network()
    parametrizations.weight_norm(model.layer1[0].conv2)
    for rule in ("layer1.0.conv2", r"re:.*1\.0\.conv2"):
        with pytest.raises(ValueError, match="layer1.0.conv2 has a parametrization of weight"):
            dc.dynamize_(model, {rule: dc.DYConv()})


def test_hooks_outside_of_what_is_converted_go_on_working() -> None:
    model, seen = network(), []
    model.layer3.register_forward_hook(lambda m, a, y: seen.append(y.shape))
    model.conv1.register_forward_hook(lambda m, a, y: seen.append(y.shape))
    dc.dynamize_(model, {"layer1": dc.SpatialMasking()})
    seen.clear()
    model.eval()(X)
    assert [list(s) for s in seen] == [[4, 4, 32, 32], [4, 16, 8, 8]]


def test_gates_on_a_converted_network() -> None:
    model = network()
    dc.dynamize_(model)
    before = list(dict(model.named_modules()))
    with pytest.raises(ValueError, match="3 blocks are dynamic already.*call dc.revert_ first"):
        dc.dynamize_(model, dc.LayerGate())
    assert list(dict(model.named_modules())) == before


@pytest.mark.parametrize(
    ("loader", "targets", "words"),
    [
        ([], (0.5,), "got no images"),
        ([(X[:1],)], (0.5,), "got one image"),
        ([(X,)], (0.5, 0.3), "targets must rise and differ, got 0.5, 0.3; write 0.3, 0.5"),
        ([(X,)], (0.5, 0.5), "targets must rise and differ"),
        ([(X,)], (), "at least one target"),
        ([(X,)], (0.0, 0.5), r"must lie in \(0, 1\]"),
        ([(X,), (X * torch.nan,)], (0.5,), "answers hold NaN"),
    ],
)
def test_calibrations_that_mean_nothing(loader, targets, words: str) -> None:
    model = network()
    dc.dynamize_(model)
    for gate in dc.gates(model).values():
        gate.threshold.fill_(0.25)
    with pytest.raises(ValueError, match=words):
        dc.calibrate_(model, loader, targets)
    assert model.training
    assert all(float(g.threshold) == 0.25 and len(g.budget_table) == 0 for g in dc.gates(model).values())


def test_masks_with_nan() -> None:
    mask = torch.ones(4, 1, 32, 32)
    mask[2, 0, 5, 7] = torch.nan
    with pytest.raises(ValueError, match="mask holds NaN.*torch.isnan"):
        masked_conv2d(X, mask, torch.ones(2, 3, 1, 1))
    with pytest.raises(ValueError, match="mask holds NaN"):
        masked_mean(X, mask)
    model = network()
    dc.dynamize_(model)
    block = dc.masked_blocks(model)["layer1.0"]
    with torch.no_grad(), pytest.raises(ValueError, match="mask holds NaN"):
        block.eval().run(torch.randn(4, 4, 32, 32), mask)


def test_a_budget_below_what_is_always_computed_names_the_floor() -> None:
    model = network()
    dc.dynamize_(model)
    with pytest.raises(
        ValueError, match=r"total target of 0.05 cannot be met: (0\.\d+) of .*choose a target in \(\1, 1\]"
    ):
        dc.MacBudget(model, 0.05, total_steps=1, scope="total")


def test_decisions_larger_than_the_map() -> None:
    model, kinds = network(), {}
    kinds = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(
        ValueError, match="granularity 16 is larger than the 8x8 feature map of layer3.0.*at most 8"
    ):
        dc.dynamize_(model, dc.SpatialMasking(granularity=(1, 2, 16)), input_size=(3, 32, 32))
    assert {name: type(m) for name, m in model.named_modules()} == kinds


class Silent(nn.Module):
    """A branch whose gate somebody wrote, wrongly."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] * torch.nan


def test_a_gate_of_ones_own_that_decides_nan() -> None:
    model = network()
    dc.dynamize_(model)
    dc.masked_blocks(model)["layer1.0"].gate = Silent()
    with torch.no_grad(), pytest.raises(ValueError, match="mask holds NaN"):
        model.eval()(X)
