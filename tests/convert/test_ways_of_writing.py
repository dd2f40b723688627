"""One residual block, written in the ways that people write it: all are found, or refused with the reason."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from tests.convert.networks import randomise_norms
from torch import Tensor, nn

import dynaconv as dc
from dynaconv.testing import force_masks


class Block(nn.Module):
    """relu(x + branch(x)) with functions; subclasses write the sum in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.alpha = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("scale", torch.tensor(0.4))
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 5, 4]))

    def branch(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.branch(x))


class ByKeyword(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(input=x, other=self.branch(x)).relu()


class WithFactor(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.branch(x), alpha=0.5)


class Difference(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x - self.branch(x)


class FactorOfMethod(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x).sub(x, alpha=2)


class InPlaceStatements(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        y.mul_(0.5)
        F.relu(y, inplace=True)
        y = self.norm2(self.conv2(y))
        y.add_(x)
        return y.relu_()


class ReZero(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + (1 + self.alpha) * self.branch(x)


class Buffers(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)[:, self.order] * self.scale.sqrt()


class FrozenNorm(nn.Module):
    """An affine map from running statistics that are computed with in the forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(channels)
        self.register_buffer("mean", torch.randn(channels, generator=generator))
        self.register_buffer("variance", torch.rand(channels, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.variance.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale - self.mean.reshape(1, -1, 1, 1) * scale


class Frozen(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = FrozenNorm(8), FrozenNorm(6)


class PaddedShortcut(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv1.stride = (2, 2)
        self.conv2, self.norm2 = nn.Conv2d(8, 10, 3, padding=1), nn.BatchNorm2d(10)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + self.branch(x))


class Same(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 8, 3, padding="same", dilation=2)
        self.conv2 = nn.Conv2d(8, 6, (1, 3), padding="same")


class SameByFunction(Block):
    def branch(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(F.conv2d(x, self.conv1.weight, padding="same")))
        return self.norm2(self.conv2(y))


class Mirrored(Block):
    """With dilation a mirrored position is none that the kernel reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 8, 3, padding=1, padding_mode="replicate")
        self.conv2 = nn.Conv2d(8, 6, 3, padding=3, dilation=3, padding_mode="reflect")


class Around(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 8, 3, padding="same", padding_mode="circular")
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular")


class PaddedByLayers(Block):
    def __init__(self) -> None:
        super().__init__()
        self.pads = nn.ModuleList([nn.ReflectionPad2d(1), nn.CircularPad2d((2, 2, 1, 1)), nn.ZeroPad2d(0)])
        self.conv1, self.conv2 = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 6, (3, 5))

    def branch(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(self.pads[2](self.pads[0](x))))
        return self.norm2(self.conv2(self.pads[1](F.relu(y))))


class PartsOfAList(Block):
    def branch(self, x: Tensor) -> Tensor:
        parts = list(F.relu(self.norm1(self.conv1(x))).chunk(2, 1))
        return self.norm2(self.conv2(torch.cat([part.tanh() for part in parts[::-1]], 1)))


class WeightsOfItsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Parameter(torch.randn(8, 6, 3, 3) / 7),
            nn.Parameter(torch.randn(6, 8, 3, 3) / 8),
        )
        self.scale = nn.Parameter(torch.tensor(0.4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(F.relu(F.conv2d(x, self.first, padding=1)), self.second, padding="same")
        return F.relu(x + y * self.scale)


FOUND = [
    Block, ByKeyword, WithFactor, Difference, FactorOfMethod, InPlaceStatements, ReZero, Buffers, Frozen,
    PaddedShortcut, Same, SameByFunction, Mirrored, Around, PaddedByLayers, PartsOfAList, WeightsOfItsOwn,
]  # fmt: skip


@pytest.mark.parametrize("kind", FOUND)
def test_found_and_computed_as_it_is_written(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(randomise_norms(kind())).eval()
    x = torch.randn(3, 6, 9, 7)
    with torch.no_grad():
        want = model(x)
        assert dc.dynamize_(model, input_size=(6, 9, 7)).converted == ["0"]
        block = model[0]
        with force_masks(model, 1.0):
            for block.backend, block.break_even in (("eager", None), ("auto", 2.0), ("auto", 0.0)):
                torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        with force_masks(model, 0.4):
            block.backend = "eager"
            masked = model(x)
            block.backend, block.break_even = "auto", 2.0
            torch.testing.assert_close(model(x), masked, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(masked, want, atol=1e-3)
        block.inner.scale.fill_(0.1)
        follows = block.inner(x)
        with force_masks(model, 1.0):
            torch.testing.assert_close(model(x), follows, rtol=1e-4, atol=1e-5)


class AliasOfWhatChanges(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        same = y
        y *= 0.5
        return x + self.norm2(self.conv2(same))


class ThroughAView(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        y.view(y.shape[0], -1).mul_(0.5)
        return x + self.norm2(self.conv2(y))


class MakesATensor(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) * torch.tensor(0.5)


class Tuple(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.branch(x)
        return x + y, y


class Dictionary(Block):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": x + self.branch(x)}


class Pairs(Block):
    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, state = pair
        return x + self.branch(x), state


REFUSED = {
    AliasOfWhatChanges: "a map in its forward changes under another name; write y = y * 2, not y *= 2",
    ThroughAView: "its mul_ changes a map that is then read by another name",
    MakesATensor: "its forward makes a tensor of its own; register it as a buffer in __init__",
    Tuple: "its forward returns a tuple, expected one feature map",
    Dictionary: "its forward returns a dict, expected one feature map",
    Pairs: "its forward returns a tuple, expected one feature map",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_reason(kind: type[nn.Module]) -> None:
    model = nn.Sequential(Block(), kind())
    report = dc.dynamize_(model, input_size=(6, 9, 7))
    assert report.converted == ["0"] and report.skipped["1"] == REFUSED[kind]


class Aliased(nn.Module):
    """The same blocks under several names; the forward goes through the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.blocks = nn.ModuleList([self.first, self.second])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_with_several_names_are_masked_under_all_of_them() -> None:
    torch.manual_seed(0)
    model = Aliased().eval()
    original = list(model.blocks)
    dc.dynamize_(model, input_size=(6, 9, 7))
    x = torch.randn(2, 6, 9, 7)
    with dc.collect_masks(model) as masks:
        model(x)
    assert list(masks) == ["first", "second"]
    with force_masks(model, 0.3):
        assert dc.profile(model, x).conditional_ratio < 0.9
    dc.revert_(model)
    assert list(model.blocks) == original == [model.first, model.second]


class Repeated(nn.Module):
    """One block that runs three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x


def test_every_run_of_a_block_costs() -> None:
    torch.manual_seed(0)
    model = Repeated().eval()
    static = dc.profile(model, torch.randn(2, 6, 9, 7)).dense_macs
    dc.dynamize_(model, input_size=(6, 9, 7))
    gate, x = model.block.gate, torch.randn(2, 6, 9, 7)
    masks = [(torch.rand(2, 1, 9, 7) < share).float() for share in (0.1, 0.5, 1.0)]
    given = iter(masks * 3)
    gate.register_forward_hook(lambda _gate, args, _mask: next(given)[: len(args[0])])
    with dc.collect_masks(model) as collected:
        model(x)
    cost = collected.costs()["block"]
    needs = [n for mask in masks for n in model.block.needs(mask, (9, 7))]
    macs = model.block.macs_per_position * 3
    want = sum(n.flatten(1).sum(1).double() * m for n, m in zip(needs, macs, strict=True))
    assert torch.equal(cost.executed_macs, want) and cost.dense_macs == static
    profile = dc.profile(model, x)
    assert profile.dense_macs == static
    assert torch.equal(profile.executed_macs, want + 3 * gate.macs((9, 7)))
    assert profile.routing_macs.tolist() == [3.0 * gate.macs((9, 7))] * 2


def test_compiled_networks_that_run_a_block_several_times_verify() -> None:
    torch.manual_seed(0)
    model = Repeated().eval()
    dc.dynamize_(model, input_size=(6, 9, 7))
    nn.init.normal_(model.block.gate.conv.weight, std=0.3)
    nn.init.zeros_(model.block.gate.conv.bias)
    x = torch.randn(2, 6, 9, 7)
    assert dc.compile(model, (x,), measure=False).verify((x,))["error"] <= 1e-4


def test_layers_that_two_blocks_share_are_not_masked() -> None:
    model = nn.Sequential(Block(), Block(), Block())
    model[1].conv2 = model[0].conv2
    report = dc.dynamize_(model, input_size=(6, 9, 7))
    assert report.converted == ["2"]
    assert report.skipped == {
        "0": "its conv2 is also 1.conv2; give each place its own copy",
        "1": "its conv2 is also 0.conv2; give each place its own copy",
    }


def test_channel_gates_say_that_functions_are_in_their_way() -> None:
    with pytest.raises(ValueError, match=re.escape("modules such as nn.ReLU, not functions such as F.relu")):
        dc.dynamize_(nn.Sequential(Block()), dc.ChannelGate(), input_size=(6, 9, 7))


class AddsItself(nn.Module):
    """A residual part in the network's own forward, where no module is that could be masked."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.part = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.part(y) + y


def test_an_addition_in_the_network_itself_is_pointed_at() -> None:
    with pytest.raises(
        ValueError, match=r"Its own forward adds maps \(part, stem\); make modules of those parts"
    ):
        dc.dynamize_(AddsItself())
