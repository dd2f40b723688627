"""One compiled model, many threads: the same bits, and no more memory than the threads need."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.engine.networks import SIZE, conv_bn, network
from tests.engine.test_masks import masked
from torch import nn

import dynaconv as dc
from dynaconv.engine import runtime
from dynaconv.testing import force_masks

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason="no kernels")
THREADS, CALLS = 8, 1000


def resident_bytes() -> int:
    """Memory of this process that is in use, as far as the system tells."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def together(count: int, work: Callable[[int], None]) -> None:
    """Run `work(i)` on `count` threads that start at the same moment; errors come back."""
    start, errors = threading.Barrier(count), []

    def run(i: int) -> None:
        start.wait()
        try:
            work(i)
        except Exception as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_eight_threads_share_a_model_without_growth() -> None:
    fast = dc.compile(masked("basic_s2"), (torch.zeros(1, *SIZE),), backend="cpu", threads=1)
    inputs = [
        torch.randn(1 + i % 3, *SIZE, generator=torch.Generator().manual_seed(i)) for i in range(THREADS)
    ]
    expected = [fast(x) for x in inputs]
    # One arena, for the largest of the batches.
    single = fast.memory

    def call(i: int, times: int) -> None:
        for _ in range(times):
            assert torch.equal(fast(inputs[i]), expected[i])

    together(THREADS, lambda i: call(i, CALLS // 10))
    resident = resident_bytes()
    together(THREADS, lambda i: call(i, CALLS))
    assert 0 < fast.memory <= THREADS * single
    assert resident_bytes() - resident < 8 << 20


def test_threads_within_threads_give_the_same_bits() -> None:
    model = masked("inverted")
    fast = dc.compile(model, (torch.zeros(1, *SIZE),), backend="cpu", threads=2)
    x = torch.randn(3, *SIZE)
    expected = fast(x)

    def call(_: int) -> None:
        for _ in range(50):
            assert torch.equal(fast(x), expected)

    together(3, call)
    assert all(torch.equal(fast(x), expected) for _ in range(50))


def test_results_do_not_depend_on_what_ran_before() -> None:
    """Arenas are used again by other batch sizes, masks and ranges of steps."""
    model = masked("bottleneck")
    fast = dc.compile(model, (torch.zeros(1, *SIZE),), backend="cpu", threads=1)
    fresh = dc.compile(model, (torch.zeros(1, *SIZE),), backend="cpu", threads=1)
    inputs = [torch.randn(n, *SIZE) for n in (1, 4, 2, 3)]
    expected = []
    for x in inputs:
        with force_masks(fresh, 0.4):
            expected.append(fresh(x))
    for density in (1.0, 0.0, 0.7):
        for x, y in zip(inputs, expected, strict=True):
            with force_masks(fast, density):
                fast(torch.full_like(x, float("nan")))
            with force_masks(fast, 0.4):
                assert torch.equal(fast(x), y)


def test_more_threads_than_work() -> None:
    fast = dc.compile(nn.Conv2d(3, 2, 1).eval(), (torch.zeros(1, 3, 1, 1),), backend="cpu", threads=7)
    x = torch.randn(1, 3, 1, 1)
    assert torch.equal(fast(x), fast(x))
    for threads in (0, -1, 100_000):
        fast.threads = threads
        if threads:
            with pytest.raises((RuntimeError, ValueError), match="threads"):
                fast(x)


def test_a_model_may_vanish_while_it_runs() -> None:
    """A call keeps what it needs; the plan is freed once, after the last of them."""
    x = torch.randn(2, *SIZE)
    for _ in range(5):
        fast = dc.compile(network("residual"), (x,), backend="cpu", threads=1, measure=False)
        models = [fast] * 4

        def call(i: int, models: list = models) -> None:
            model, models[i] = models[i], None
            for _ in range(20):
                model(x)

        del fast
        together(4, call)


def test_budgets_change_between_calls_of_other_threads() -> None:
    model = masked("basic", unit="conv1x1")
    images = [torch.randn(4, *SIZE)]
    dc.calibrate_(model, images, targets=(0.3, 0.7))
    fast = dc.compile(model, (images[0],), backend="cpu", threads=1)
    allowed = []
    for target in (0.3, 0.7):
        fast.set_budget(target)
        allowed.append(fast(images[0]))

    def call(i: int) -> None:
        for step in range(50):
            if i == 0:
                fast.set_budget((0.3, 0.7)[step % 2])
            y = fast(images[0])
            assert any(torch.equal(y, a) for a in allowed)

    together(4, call)


def test_arenas_are_freed_with_their_model() -> None:
    wide = nn.Sequential(conv_bn(3, 64), conv_bn(64, 64, act=nn.ReLU()), nn.AdaptiveAvgPool2d(1)).eval()
    x = torch.randn(8, 3, 64, 64)

    def once() -> None:
        fast = dc.compile(wide, (x,), backend="cpu", threads=1, measure=False)
        fast(x)
        assert fast.memory > 8 << 20

    once()
    before = resident_bytes()
    for _ in range(6):
        once()
    assert resident_bytes() - before < 24 << 20
