"""Networks without trained weights: what they return is made one tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dynaconv.measure.untrained import FirstResult, with_one_result


class Returns(nn.Module):
    """A convolution's result, as some networks return it."""

    def __init__(self, how) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 2, 1), how

    def forward(self, x: Tensor):
        return self.how(self.conv(x))


X = torch.randn(1, 3, 4, 4)


@pytest.mark.parametrize(
    "how", [lambda y: {"out": y, "aux": -y}, lambda y: (y, -y), lambda y: [{"maps": [y]}]]
)
def test_the_first_tensor_of_several_is_the_result(how) -> None:
    network = Returns(how).eval()
    one = with_one_result(network, X)
    assert isinstance(one, FirstResult) and not one.training
    assert torch.equal(one(X), network.conv(X))


def test_one_tensor_stays_what_it_is() -> None:
    network = Returns(lambda y: y)
    assert with_one_result(network, X) is network
    with pytest.raises(TypeError, match="Returns returns str without a tensor"):
        with_one_result(Returns(lambda y: "nothing"), X)
