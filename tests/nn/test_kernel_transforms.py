"""The compiled kernel inside layers: its copy of the weights follows them, and tracers and transforms go around it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dynaconv.nn import CondConv2d, DYConv2d, DyNetConv2d, ODConv2d
from dynaconv.ops import _native
from dynaconv.ops.dynamic_conv2d import choice, compiled

LAYERS = {
    "condconv": lambda: CondConv2d(8, 6, 3, padding=1, num_experts=3),
    "dyconv depthwise": lambda: DYConv2d(8, 8, 3, padding=1, groups=8),
    "dynet": lambda: DyNetConv2d(8, 6, 3, padding=1, group_size=2),
    "odconv": lambda: ODConv2d(8, 6, 3, padding=1, num_kernels=2),
}


@pytest.fixture
def calls(monkeypatch):
    """Calls of the compiled kernel, which is made the choice for every shape."""
    if _native.missing() is not None:
        pytest.skip("the compiled kernels are not built")
    rows, seen, plain = [{**row, "compiled": True} for row in choice.measured()], [], compiled.dynamic_conv
    monkeypatch.setattr(choice, "measured", lambda: rows)
    monkeypatch.setattr(compiled, "dynamic_conv", lambda *a: seen.append(a) or plain(*a))
    choice._nearest.cache_clear()
    yield seen
    choice._nearest.cache_clear()


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]().eval()


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 8, 9, 7, generator=torch.Generator().manual_seed(1))


def agrees(layer: nn.Module, calls: list) -> None:
    """The compiled kernel runs, and gives what the other strategies give."""
    before, x = len(calls), images()
    with torch.no_grad():
        got = layer(x)
    assert len(calls) == before + 1
    want = layer(x).detach()
    assert len(calls) == before + 1
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("name", LAYERS)
def test_changed_weights_are_packed_again(name: str, calls: list) -> None:
    layer = make(name)
    agrees(layer, calls)
    with torch.no_grad():
        layer.weight.mul_(2)
    agrees(layer, calls)
    layer.load_state_dict({k: v * 0.7 for k, v in layer.state_dict().items()})
    agrees(layer, calls)
    layer.load_state_dict({k: v * 0.7 for k, v in layer.state_dict().items()}, assign=True)
    agrees(layer, calls)
    for _ in range(5):
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))
        agrees(layer, calls)
    # An optimizer that writes through `.data` leaves no other trace than the change of mode.
    layer.train()
    layer.weight.data.mul_(2)
    layer.eval()
    agrees(layer, calls)
    other = copy.deepcopy(layer)
    other.weight.data.mul_(2)
    agrees(other, calls)
    agrees(layer, calls)


@pytest.mark.parametrize("name", LAYERS)
def test_weights_given_from_outside_do_not_linger(name: str, calls: list) -> None:
    layer, x = make(name), images()
    for factor in (1.0, 3.0, 0.5):
        given = {k: v.detach() * factor for k, v in layer.named_parameters()}
        with torch.no_grad():
            got = torch.func.functional_call(layer, given, (x,))
        want = torch.func.functional_call(
            layer, {k: v.requires_grad_() for k, v in given.items()}, (x,)
        ).detach()
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
        del given
    agrees(layer, calls)


def test_layers_of_one_shape_do_not_mix(calls: list) -> None:
    first, second = make("condconv"), make("condconv")
    nn.init.normal_(second.weight)
    for _ in range(2):
        agrees(first, calls)
        agrees(second, calls)


@pytest.mark.parametrize("name", LAYERS)
def test_function_transforms(name: str, calls: list) -> None:
    layer, x = make(name), images()
    want = layer(x).detach()
    with torch.no_grad():
        for batched in (x[:, None], x.contiguous(memory_format=torch.channels_last)[:, None]):
            got = torch.vmap(layer)(batched)[:, 0]
            assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    leaf = x.clone().requires_grad_(True)
    layer(leaf).square().sum().backward()
    each = torch.vmap(torch.func.grad(lambda image: layer(image[None]).square().sum()))(x)
    assert float((each - leaf.grad).detach().abs().max()) <= 1e-4 * float(leaf.grad.abs().max())


def test_an_ensemble_of_weights(calls: list) -> None:
    members, x = [make("condconv") for _ in range(3)], images()
    for i, member in enumerate(members):
        nn.init.normal_(member.weight, 0.0, 1.0 + i)
    stacked, _ = torch.func.stack_module_state(members)
    with torch.no_grad():
        got = torch.vmap(lambda given: torch.func.functional_call(members[0], given, (x,)))(stacked)
    want = torch.stack([member(x).detach() for member in members])
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("name", LAYERS)
def test_fake_and_meta_tensors(name: str, calls: list) -> None:
    layer, x = make(name), images()
    with torch.no_grad():
        shape = layer(x).shape
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(x)).shape == layer(x).shape == shape
        with torch.device("meta"):
            assert LAYERS[name]().eval()(torch.empty(3, 8, 9, 7)).shape[0] == 3


@pytest.mark.parametrize("name", LAYERS)
def test_counters_of_operations_see_it(name: str, calls: list) -> None:
    layer, counted = make(name), []
    for batch in (1, 3):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(images(batch))
        counted.append(counter.get_total_flops() / 2)
    assert not calls and counted[1] == pytest.approx(3 * counted[0], rel=0.2)
    assert counted[0] == pytest.approx(layer.macs(63).total, rel=0.35)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_a_recorded_trace_runs_at_other_batch_sizes(name: str, calls: list) -> None:
    layer = make(name)
    with torch.no_grad():
        traced = torch.jit.trace(layer, images(2))
        for batch in (1, 2, 5):
            got, want = traced(images(batch)), layer(images(batch))
            assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
