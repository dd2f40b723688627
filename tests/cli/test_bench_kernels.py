"""`dynaconv bench kernels`."""

from __future__ import annotations

import pytest

from dynaconv.measure import kernels


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "SHAPES", (kernels.KernelShape("3x3", 8, 8, 3, 6),))


def test_it_prints_a_table_and_means(cli, small):
    done = cli("bench", "kernels", "--batch", "2", "--rounds", "1")
    assert done.code == 0
    assert "3x3" in done.out and "timm / auto" in done.out and "peak memory in MiB" in done.out


def test_json(cli, small):
    data = cli("bench", "kernels", "--batch", "2", "--rounds", "1", "--layout", "contiguous", "--json").json
    assert len(data["timings"]) == 2 and {row["batch"] for row in data["summary"]} == {2}
    assert data["timings"][0]["entries"]["auto"]["min_ms"] > 0


def test_write_wants_everything_measured(cli):
    done = cli("bench", "kernels", "--write", "--batch", "2")
    assert done.code == 2 and "--write needs all layouts and batch sizes" in done.err


def test_networks_have_no_table(cli):
    done = cli("bench", "resnet8_cifar", "--write")
    assert done.code == 2 and "dynaconv bench kernels" in done.err
