"""Compiled networks give what the networks give, at any batch size, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.engine.networks import NETWORKS, SIZE, Lambda, exact_convolutions, network, poisoned
from torch import nn
from torch.utils import _pytree

import dynaconv as dc
from dynaconv.engine import runtime

BACKENDS = [
    "eager",
    pytest.param("cpu", marks=pytest.mark.skipif(bool(runtime.missing()), reason="no kernels")),
]


def check(fast, model, x, tolerance: float = 2e-5) -> None:
    """Leaves agree."""
    with torch.no_grad():
        expected = model(x)
    got = fast(x)
    assert _pytree.tree_structure(got) == _pytree.tree_structure(expected)
    for a, b in zip(_pytree.tree_leaves(got), _pytree.tree_leaves(expected), strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max() + 1e-6))
        else:
            assert a == b


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_results_match(name: str, backend: str) -> None:
    model = network(name)
    fast = dc.compile(model, (torch.randn(1, *SIZE),), backend=backend)
    for n in (1, 3):
        check(fast, model, torch.randn(n, *SIZE))
    check(fast, model, torch.randn(2, *SIZE).to(memory_format=torch.channels_last))
    expected = NETWORKS[name][1]
    assert expected is None or len(fast.plan.aten) == expected, fast.plan


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_reads_what_nobody_wrote(name: str) -> None:
    model = network(name)
    with exact_convolutions():
        check(poisoned(model, torch.randn(2, *SIZE)), model, torch.randn(2, *SIZE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_any_layout(backend: str) -> None:
    model = network("residual")
    fast = dc.compile(model, (torch.randn(1, *SIZE),), backend=backend)
    wide = torch.randn(2, 3, 17, 26)
    check(fast, model, wide[:, :, :, ::2])
    check(fast, model, torch.randn(2, 17, 13, 3).permute(0, 3, 1, 2))
    check(fast, model, torch.randn(1, *SIZE).expand(3, -1, -1, -1))


def test_what_runs_through_aten_is_listed_with_its_reason() -> None:
    fast = dc.compile(network("transposed"), (torch.randn(1, *SIZE),))
    assert [row["operation"] for row in fast.plan.aten] == ["aten::conv_transpose2d.input"]
    assert "no kernel" in fast.plan.aten[0]["reason"]
    assert "through ATen" in str(fast.plan)


def test_weights_that_are_computed_from_weights_are_computed_once() -> None:
    """As in scaled weight standardisation (arXiv 2101.08692); std_mean has two results."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        std, mean = torch.std_mean(m.conv.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, (m.conv.weight - mean) / std, m.conv.bias)

    model, x = Lambda(forward, conv=nn.Conv2d(3, 5, 3)).eval(), torch.randn(2, *SIZE)
    fast = dc.compile(model, (x,), backend="eager")
    assert fast.plan.aten == []
    check(fast, model, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images_give_an_empty_result(backend: str) -> None:
    fast = dc.compile(network("many_results"), (torch.randn(1, *SIZE),), backend=backend)
    y = fast(torch.empty(0, *SIZE))
    assert y["a"].shape == (0, 4, 17, 13) and y["b"][1].shape == (0, 8) and y["c"] == 3


def test_a_network_tied_to_its_batch_says_so() -> None:
    from tests.engine.networks import Lambda

    model = Lambda(lambda m, x: x * len(range(x.shape[0])))
    fast = dc.compile(model.eval(), (torch.randn(3, *SIZE),))
    check(fast, model, torch.randn(3, *SIZE))
    with pytest.raises(ValueError, match="tied this network to batches of 3"):
        fast(torch.randn(2, *SIZE))


def test_the_network_is_left_as_it_was() -> None:
    model = network("residual")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fast = dc.compile(model, (torch.randn(1, *SIZE),))
    y = fast(x := torch.randn(1, *SIZE))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    assert torch.equal(fast(x), y)
    assert not y.requires_grad
