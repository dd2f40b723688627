"""One router for the dynamic layers of a block: plain data flow, copies, modes, and blocks that cannot share one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.nn import CondConv2d, DyNetConv2d, RoutedBlock
from dynaconv.nn.routers import ChannelRouter, SigmoidRouter


class Block(nn.Module):
    """Two dynamic convolutions, one of them inside a container, a norm, and a choice that depends on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = CondConv2d(4, 6, 3, padding=1, num_experts=3, router=False)
        self.norm = nn.BatchNorm2d(6)
        self.rest = nn.Sequential(nn.ReLU(), CondConv2d(6, 4, 1, num_experts=3, router=False))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.norm(self.first(x))
        if self.training:
            y = 2 * y
        return x + F.dropout(self.rest(y), 0.0, training=self.training)


LAYERS = ("first", "rest.1")


def routed(seed: int = 0) -> RoutedBlock:
    torch.manual_seed(seed)
    router = SigmoidRouter(4, 3)
    nn.init.normal_(router.fc.weight)
    return RoutedBlock(Block(), router, LAYERS)


def by_hand(model: RoutedBlock, x: Tensor) -> Tensor:
    block, r = model.block, model.router(x)
    y = block.norm(block.first(x, routing=r))
    y = 2 * y if block.training else y
    return x + block.rest[1](F.relu(y), routing=r)


@pytest.mark.parametrize("training", [True, False])
def test_passes_one_routing_to_all_layers(training: bool) -> None:
    model = routed().train(training)
    other, x = copy.deepcopy(model), torch.randn(3, 4, 5, 5)
    y, want = model(x), by_hand(other, x)
    assert torch.equal(y, want)
    routing = model.route(x)
    assert list(routing) == list(LAYERS) and all(r is routing["first"] for r in routing.values())
    for z, m in ((y, model), (want, other)):
        z.square().sum().backward()
        assert all(p.grad is not None for p in m.parameters())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert torch.equal(model.block.norm.running_mean, other.block.norm.running_mean)


def test_a_router_may_give_each_layer_its_own() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(
        DyNetConv2d(4, 6, 3, group_size=2, router=False), DyNetConv2d(6, 5, 1, group_size=2, router=False)
    )
    model = RoutedBlock(block, ChannelRouter(4, [6, 5], 2), ["0", "1"])
    x = torch.randn(3, 4, 5, 5)
    first, second = model.router(x)
    assert torch.equal(model(x), block[1](block[0](x, routing=first), routing=second))
    assert {name: tuple(r.shape) for name, r in model.route(x).items()} == {"0": (3, 6, 2), "1": (3, 5, 2)}


def test_the_block_keeps_its_modules_and_names() -> None:
    block = Block()
    before, modules = list(block.state_dict()), list(block.modules())
    model = RoutedBlock(block, SigmoidRouter(4, 3), LAYERS)
    assert model.block is block and list(block.modules()) == modules and list(block.state_dict()) == before
    assert {n.split(".")[0] for n in model.state_dict()} == {"block", "router"}
    assert "layers=('first', 'rest.1')" in repr(model)


def test_modes_of_parts_are_left_alone() -> None:
    """A norm that was frozen by hand stays frozen."""
    block = Block().train()
    block.norm.eval()
    model = RoutedBlock(block, SigmoidRouter(4, 3), LAYERS)
    assert model.training and block.training and not block.norm.training and model.router.training
    still = RoutedBlock(Block().eval(), SigmoidRouter(4, 3), LAYERS)
    assert not any(m.training for m in still.modules())


def test_copies_pickles_and_states() -> None:
    model, x = routed().eval(), torch.randn(2, 4, 5, 5)
    want = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), want)
        with torch.no_grad():
            copied.block.first.weight.zero_()
        assert torch.equal(model(x), want) and not torch.equal(copied(x), want)
    fresh = routed(seed=1).eval()
    assert not torch.equal(fresh(x), want)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), want)


def test_parts_can_be_replaced_afterwards() -> None:
    model, x = routed().eval(), torch.randn(2, 4, 5, 5)
    model.block.norm = nn.Identity()
    r = model.router(x)
    want = x + model.block.rest[1](F.relu(model.block.first(x, routing=r)), routing=r)
    assert torch.equal(model(x), want)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = CondConv2d(4, 4, 1, router=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


class Never(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return x


class ByData(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


class TwoInputs(Twice):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.conv(x) * scale


class UsedExtra(Twice):
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.conv(x) * scale


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Twice, "it calls conv 2 times, expected once"),
        (Never, "it calls conv 0 times, expected once"),
        (ByData, "symbolically traced variables cannot be used as inputs to control flow"),
        (TwoInputs, "its forward also takes 'scale'"),
        (UsedExtra, "its forward also takes 'scale'"),
    ],
)
def test_blocks_that_cannot_share_a_router(block: type[nn.Module], reason: str) -> None:
    made = block().train()
    with pytest.raises(ValueError) as caught:
        RoutedBlock(made, SigmoidRouter(4, 8), ["conv"])
    text = str(caught.value)
    assert text.startswith(f"a router cannot be shared inside this {block.__name__}: ") and reason in text
    assert text.endswith("give every layer its own with routing='layer'")
    assert all(m.training for m in made.modules())
