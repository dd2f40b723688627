"""Spatial masks and dynamic kernels in one network: skipping computes what masking does, one budget counts both."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.convert.kernel_networks import CONFIGS
from tests.convert.networks import randomise_norms
from torch import Tensor, nn

import dynaconv as dc
from dynaconv.cost import count_dense
from dynaconv.nn import MaskedBlock, RoutedBlock
from dynaconv.nn.masked_kernels import needs_of
from dynaconv.nn.routers import Router
from dynaconv.testing import force_masks

NETWORKS = ["resnet8_cifar", "timm:mobilenetv2_035"]
SIZE = 40


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == want.shape
    assert float((got - want).detach().abs().max()) <= tolerance * float(want.detach().abs().max())


def both(name: str, config: object, order: str = "together") -> nn.Module:
    """A converted network whose kernels differ from image to image."""
    torch.manual_seed(0)
    model = randomise_norms(dc.create_model(name, num_classes=7))
    steps = {"together": [(dc.SpatialMasking(), config)], "masks first": [dc.SpatialMasking(), config]}
    for step in {**steps, "kernels first": [config, dc.SpatialMasking()]}[order]:
        dc.dynamize_(model, step, input_size=(3, SIZE, SIZE))
    with torch.no_grad():
        for layer in dc.dynamic_layers(model).values():
            for parameter in layer.parameters(recurse=False):
                parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, Router):
                for parameter in module.parameters():
                    nn.init.normal_(parameter, 0.0, 0.5 * parameter.shape[-1] ** -0.5)
    return model


def run(model: nn.Module, x: Tensor, backend: str, break_even: float | None = None) -> Tensor:
    for block in dc.masked_blocks(model).values():
        block.backend, block.break_even = backend, break_even
    with torch.no_grad():
        return model(x)


@pytest.mark.needs("timm")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", CONFIGS)
def test_skipping_equals_masking(name: str, method: str) -> None:
    model, x = both(name, CONFIGS[method]).eval(), images()
    assert dc.masked_blocks(model) and dc.dynamic_layers(model)
    outputs = []
    for density in (0.0, 0.3, 1.0):
        with force_masks(model, density):
            want = run(model, x, "eager")
            # Above 1 skipping always pays, at 0 never.
            for break_even in (2.0, None, 0.0):
                close(run(model, x, "auto", break_even), want)
            for image in range(len(x)):
                outputs.append(want[image])
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in zip(outputs, outputs[3:], strict=False))


@pytest.mark.parametrize("method", CONFIGS)
def test_open_masks_are_the_network_without_masks(method: str) -> None:
    model = both("resnet8_cifar", CONFIGS[method]).eval()
    unmasked = copy.deepcopy(model)
    for stage in (unmasked.layer1, unmasked.layer2, unmasked.layer3):
        stage[0] = stage[0].block
    with force_masks(model, 1.0), torch.no_grad():
        for break_even in (2.0, None):
            close(run(model, images(), "auto", break_even), unmasked(images()))


def by_definition(block: MaskedBlock, x: Tensor, mask: Tensor) -> Tensor:
    """act(shortcut + M * branch) with kernels that see what was computed; one image after the other."""
    inner, images = block.inner, []
    for i in range(len(x)):
        image, m = x[i : i + 1], mask[i : i + 1]
        shared = block.block.route(image) if isinstance(block.block, RoutedBlock) else {}
        first, second = needs_of(m, x.shape[2:], block.convs)
        routing = shared["conv1"] if shared else inner.conv1.route(image)
        hidden = F.relu(inner.bn1(inner.conv1(image, routing=routing)))
        assert torch.equal(second, m)
        routing = shared["conv2"] if shared else inner.conv2.route(hidden, first)
        hidden = inner.bn2(inner.conv2(hidden, routing=routing))
        rest = image
        if inner.downsample is not None:
            conv, norm = inner.downsample
            rest = norm(
                conv(image, routing=shared["downsample.0"]) if "downsample.0" in shared else conv(image)
            )
        images.append(F.relu(rest + m * hidden))
    return torch.cat(images)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_a_block_computes_its_definition(method: str, density: float) -> None:
    model = both("resnet8_cifar", CONFIGS[method]).eval()
    for block in (model.layer1[0], model.layer3[0]):
        channels = block.convs[0].in_channels
        x = torch.randn(3, channels, 9, 7, generator=torch.Generator().manual_seed(2))
        with force_masks(model, density), torch.no_grad():
            mask = block.gate(x)
            want = by_definition(block, x, mask)
            close(block.dense_forward(x, mask), want, 1e-5)
            block.break_even = 2.0
            close(block(x), want, 1e-5)


@pytest.mark.parametrize("method", CONFIGS)
def test_closed_positions_do_not_reach_later_kernels(method: str) -> None:
    """What the first convolution would give at closed positions must not change any open position."""
    model = both("resnet8_cifar", CONFIGS[method]).eval()
    block = model.layer1[0]
    x = torch.randn(2, 16, 9, 7, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(2, 1, 9, 7)
    mask[:, :, :3, :3] = 1
    with torch.no_grad():
        want = block.dense_forward(x, mask)
        seen = []

        def spoil(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            needed = needs_of(mask, x.shape[2:], block.convs)[0]
            seen.append(float(needed.mean()))
            return torch.where(needed > 0, output, 1e3)

        handle = block.inner.relu.register_forward_hook(lambda m, a, o: spoil(m, a, o) if not seen else o)
        got = block.dense_forward(x, mask)
        handle.remove()
    assert 0 < seen[0] < 1
    close(got, want, 1e-5)


@pytest.mark.parametrize("method", ["condconv", "dyconv", "dcd", "odconv"])
@pytest.mark.parametrize("name", NETWORKS)
def test_everything_gets_gradient_in_training(method: str, name: str) -> None:
    model = both(name, CONFIGS[method]).train()
    budget = dc.MacBudget(model, 0.5, total_steps=10, input_size=(3, SIZE, SIZE))
    optimizer = torch.optim.SGD(budget.param_groups(1e-3), 1e-3)
    for step in range(2):
        optimizer.zero_grad()
        with budget.observe() as cost:
            y = model(images())
        (F.cross_entropy(y, torch.tensor([0, 1, 2])) + cost.loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step == 0:
            optimizer.step()
            budget.step()
    assert 0 < cost.ratio <= 1
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), key
    for gate in dc.gates(model).values():
        assert any(bool(p.grad.any()) for p in gate.parameters())
    for key, layer in dc.dynamic_layers(model).items():
        assert bool(layer.weight.grad.any()), key


def test_gradients_of_skipping_and_masking_agree() -> None:
    for method, config in CONFIGS.items():
        model = both("resnet8_cifar", config).eval()
        gradients = []
        with force_masks(model, 0.4):
            for backend in ("eager", "auto"):
                for block in dc.masked_blocks(model).values():
                    block.backend, block.break_even = backend, 2.0
                model.zero_grad()
                model(images()).square().sum().backward()
                gradients.append(
                    {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
                )
        eager, auto = gradients
        assert set(eager) == set(auto), method
        for key, gradient in eager.items():
            scale = max(float(gradient.abs().max()), 1e-3)
            assert float((auto[key] - gradient).abs().max()) <= 1e-3 * scale, (method, key)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_total_budget_counts_routing_and_mixing(method: str) -> None:
    model = both("resnet8_cifar", CONFIGS[method]).eval()
    with force_masks(model, 0.5):
        profile = dc.profile(model, images(), include_linear=False)
    spent = float(profile.executed_macs.mean())
    assert float(profile.mixing_macs.mean()) > 0 and float(profile.routing_macs.mean()) > 0
    fixed = spent - profile.conditional_ratio * profile.conditional_macs
    floor = fixed / profile.dense_macs
    target = floor + 0.4 * profile.conditional_macs / profile.dense_macs
    budget = dc.MacBudget(model, min(target, 1.0), total_steps=10, scope="total", input_size=(3, SIZE, SIZE))
    reached = fixed + budget.conditional_target * profile.conditional_macs
    assert reached / profile.dense_macs == pytest.approx(budget.target, rel=1e-9)
    with pytest.raises(
        ValueError, match=r"MACs are always computed \(stem, shortcuts, gates, routers, mixing\)"
    ):
        dc.MacBudget(model, 0.5 * floor, total_steps=10, scope="total", input_size=(3, SIZE, SIZE))


@pytest.mark.parametrize("method", CONFIGS)
def test_profile_of_both_axes(method: str) -> None:
    """Conditional multiply-adds follow the masks; mixing and routing are spent for every image."""
    model, x = both("resnet8_cifar", CONFIGS[method]).eval(), images()
    only_kernels = dc.create_model("resnet8_cifar", num_classes=7)
    dc.dynamize_(only_kernels, CONFIGS[method])
    plain = dc.profile(only_kernels, x)
    gates = count_dense(model, (3, SIZE, SIZE)).gates
    for density in (0.0, 0.3, 1.0):
        with force_masks(model, density):
            profile = dc.profile(model, x)
            with torch.no_grad(), dc.collect_masks(model) as masks:
                run(model, x, "eager")
        assert profile.dense_macs == plain.dense_macs
        assert torch.equal(profile.mixing_macs, plain.mixing_macs)
        assert torch.equal(profile.routing_macs, plain.routing_macs + gates)
        executed = sum(cost.executed_macs for cost in masks.costs().values())
        want = plain.executed_macs + gates - profile.conditional_macs + executed
        assert torch.equal(profile.executed_macs, want)
    assert torch.equal(executed, torch.full_like(executed, profile.conditional_macs))


@pytest.mark.needs("timm")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", CONFIGS)
def test_revert_restores_the_original(name: str, method: str) -> None:
    torch.manual_seed(0)
    original = randomise_norms(dc.create_model(name, num_classes=7)).eval()
    for order in ("together", "kernels first", "masks first"):
        model = copy.deepcopy(original)
        config = CONFIGS[method]
        steps = {"together": [(dc.SpatialMasking(), config)], "masks first": [dc.SpatialMasking(), config]}
        for step in {**steps, "kernels first": [config, dc.SpatialMasking()]}[order]:
            dc.dynamize_(model, step, input_size=(3, SIZE, SIZE))
        assert not any(m.training for m in model.modules())
        with force_masks(model, 1.0), torch.no_grad():
            close(run(model, images(), "auto", 2.0), original(images()))
        names = list(dc.masked_blocks(model))
        assert dc.revert_(model)[: len(names)] == names
        before, after = original.state_dict(), model.state_dict()
        assert list(before) == list(after)
        for key, value in before.items():
            assert torch.allclose(after[key], value, rtol=1e-5, atol=1e-6), (order, key)


def test_the_order_of_conversion_does_not_matter() -> None:
    for config in (dc.DYConv(num_kernels=2), dc.ODConv()):
        keys = [sorted(both("resnet8_cifar", config, o).state_dict()) for o in ("together", "kernels first")]
        assert keys[0] == keys[1] == sorted(both("resnet8_cifar", config, "masks first").state_dict())


def test_rules_combine_both_axes() -> None:
    model = dc.create_model("resnet8_cifar")
    report = dc.dynamize_(
        model,
        {
            "layer1": dc.SpatialMasking(),
            "layer2": (dc.SpatialMasking(granularity=2), dc.CondConv(num_experts=2)),
            "layer3": dc.DYConv(),
            "layer2.0.downsample": None,
        },
    )
    assert list(dc.masked_blocks(model)) == ["layer1.0", "layer2.0"]
    assert [type(y).__name__ for y in dc.dynamic_layers(model).values()] == ["CondConv2d"] * 2 + [
        "DYConv2d"
    ] * 3
    assert model.layer2[0].gate.granularity_px == 2 and isinstance(model.layer2[0].block, RoutedBlock)
    assert report.converted == [
        "layer1.0", "layer2.0", "layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2",
        "layer3.0.downsample.0",
    ]  # fmt: skip


def test_frozen_norms_stay_frozen() -> None:
    model = dc.create_model("resnet8_cifar").train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    dc.dynamize_(model, (dc.SpatialMasking(), dc.CondConv(num_experts=2)))
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(b.training and b.gate.training for b in dc.masked_blocks(model).values())


@pytest.mark.parametrize("method", ["condconv", "dyconv", "dcd", "odconv"])
def test_compiles(method: str) -> None:
    torch._dynamo.reset()
    model = both("resnet8_cifar", CONFIGS[method]).eval().layer1
    x = torch.randn(3, 16, 9, 7)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(x), model(x), 1e-4)


@pytest.mark.needs("torchvision")
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_grouped_and_missing_kernels_do_not_stand_in_the_way(name: str) -> None:
    """Masks around blocks without a single static convolution, and around kernels that cannot be written down."""
    model = dc.create_model(f"torchvision:{name}", num_classes=7).eval()
    dc.dynamize_(model, dc.DYConv(num_kernels=2, scope="all"), input_size=(3, SIZE, SIZE))
    dc.dynamize_(model, dc.SpatialMasking(), input_size=(3, SIZE, SIZE))
    with force_masks(model, 0.3):
        want = run(model, images(1), "eager")
        close(run(model, images(1), "auto", 2.0), want)


def test_grouped_channel_fusion_runs_densely_inside_masks() -> None:
    torch.manual_seed(0)
    model = dc.create_model("resnet8_cifar").eval()
    model.layer1[0].conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False).eval()
    dc.dynamize_(model, {"layer1": (dc.SpatialMasking(), dc.DCDConv())})
    with force_masks(model, 0.3), torch.no_grad():
        for layer in dc.dynamic_layers(model).values():
            nn.init.normal_(layer.p, 0.0, 0.3)
        close(run(model, images(), "auto", 2.0), run(model, images(), "eager"))
