"""Blocks that add several times: one addition is masked, and what runs before its branch always runs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.convert.families import BLOCKS, TwoAdditions
from tests.convert.test_families import deviation, lively, set_backend
from torch import Tensor, nn

import dynaconv as dc
from dynaconv.testing import force_masks


class Second(TwoAdditions):
    """The second branch cannot be masked; behind the first there is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)


class Beside(TwoAdditions):
    """A convolution of the shortcut alone, and one of more than one position."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.down(x))
        return self.mix(x) + self.leave(F.relu(self.enter(self.norm(x))))


class Nested(nn.Module):
    """A block that runs another one before its own, smaller or larger branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = Residual(4, 6)
        self.second = nn.Sequential(nn.Conv2d(4, width, 1), nn.ReLU(), nn.Conv2d(width, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.second(x)


class Residual(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(F.relu(self.enter(x)))


class Around(Residual):
    """A block around others, which are its branch."""

    def __init__(self) -> None:
        super().__init__(4, 40)
        self.inner = nn.Sequential(Residual(4, 6), Residual(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(F.relu(self.enter(self.inner(x))))


class Attends(nn.Module):
    """Attention between all positions, then a mixer of channels, on a smaller map."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.norm, self.enter, self.leave = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)

    def attend(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        weight = (tokens @ tokens.transpose(1, 2)).softmax(-1)
        return (weight @ tokens).transpose(1, 2).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        x = x + self.attend(x)
        return x + self.leave(F.relu(self.enter(self.norm(x))))


class AttendsLast(Attends):
    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return x + self.leave(F.relu(self.enter(self.attend(x))))


class Pools(Attends):
    """A smaller map and back, in ways that do not say how large they would be for other inputs."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        x = F.interpolate(F.max_pool2d(x, 2), size=x.shape[2:])
        return x + self.leave(F.relu(self.enter(x)))


def converted(model: nn.Module, config: object = None, channels: int = 4) -> list[str]:
    return dc.dynamize_(copy.deepcopy(model), config, input_size=(channels, 8, 8)).converted


def test_the_larger_of_nested_blocks_is_masked() -> None:
    assert converted(nn.Sequential(Nested(8))) == ["0"]
    assert converted(nn.Sequential(Nested(6))) == ["0.first"]
    assert converted(nn.Sequential(Nested(4))) == ["0.first"]
    assert converted(nn.Sequential(Around())) == ["0.inner.0", "0.inner.1"]


def test_a_rule_for_the_inner_block_is_followed() -> None:
    model = nn.Sequential(Nested(8))
    assert converted(model, {"0.first": dc.SpatialMasking()}) == ["0.first"]
    assert converted(model, {r"re:.*first": dc.SpatialMasking()}) == ["0.first"]
    assert converted(model, {"0": dc.SpatialMasking()}) == ["0"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Second, r"norm \(GroupNorm\) mixes positions"),
        (Beside, "shortcut has a convolution of more than one position"),
        (AttendsLast, r"flatten\(\) mixes positions"),
        (Pools, "its branch starts behind something that mixes positions"),
    ],
)
def test_refused_with_the_reason(kind: type[nn.Module], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        converted(nn.Sequential(kind()), channels=6)


def test_halted_positions_would_change() -> None:
    with pytest.raises(ValueError, match="what surrounds its branch would change positions"):
        converted(nn.Sequential(nn.Sequential(TwoBranches(), TwoBranches())), dc.Halting())


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        x = x + self.two(x)
        return x


def network(kind: type[nn.Module] = TwoAdditions) -> nn.Module:
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return lively(nn.Sequential(nn.Conv2d(3, 6, 1), kind(), head)).eval()


def test_what_always_runs_is_charged_in_full() -> None:
    model = network()
    dc.dynamize_(model, input_size=(3, 10, 12))
    with force_masks(model, 0.0):
        layers = {y.name: y for y in dc.profile(model, torch.randn(2, 3, 10, 12)).layers}
    roles = {name.removeprefix("1.block."): (y.role, y.density) for name, y in layers.items()}
    assert roles["down"] == roles["mix"] == ("fixed", 1.0)
    assert roles["enter"] == roles["leave"] == ("conditional", 0.0)
    assert layers["1.block.mix"].executed_macs == 5 * 6 * (8 * 9 + 8)


@pytest.mark.parametrize("kind", [TwoAdditions, Attends])
def test_compiled_exported_saved(kind: type[nn.Module], tmp_path: Path) -> None:
    model, x = network(kind), torch.randn(2, 3, 10, 12)
    static = copy.deepcopy(model)
    dc.dynamize_(model, input_size=(3, 10, 12))
    set_backend(model, "eager")
    fast = dc.compile(model, (x,), measure=False)
    fast.verify((x,))
    program = dc.export.program(model, (x,)).module()
    dc.save(model, tmp_path, arch={"name": "mine"})
    again = dc.load(tmp_path, model=static)
    with torch.no_grad():
        assert deviation(program(x), model(x)) <= 1e-5
        assert deviation(again(x), model(x)) <= 1e-5
        for density in (0.0, 0.3, 1.0):
            with force_masks(model, density):
                want = model(x)
                assert deviation(fast(x), want) <= 1e-5
                set_backend(model, "auto")
                assert deviation(model(x), want) <= 1e-5
                set_backend(model, "eager")


@pytest.mark.needs("timm")
def test_repvit_masks_its_channel_mixer() -> None:
    model = nn.Sequential(BLOCKS["repvit"]())
    dc.dynamize_(model, input_size=(6, 8, 8))
    assert model[0].conv_paths == ["block.channel_mixer.conv1.c", "block.channel_mixer.conv2.c"]
