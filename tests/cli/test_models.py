from __future__ import annotations

import pytest
import torch

import dynaconv as dc


def test_numbers_are_those_of_profile(cli) -> None:
    rows = {row["name"]: row for row in cli("models", "*resnet8_*", "--json").json}
    assert set(rows) == set(dc.list_models("*resnet8_*"))
    for name, row in rows.items():
        model = dc.create_model(name)
        counted = dc.profile(model, torch.zeros(1, *row["input_size"]))
        assert (row["params"], row["dense_macs"]) == (counted.params, counted.dense_macs), name


def test_table(cli) -> None:
    out = cli("models", "resnet8_cifar").out
    assert "12,500,992" in out and "78,042" in out and "3x32x32" in out


def test_nothing_matches(cli) -> None:
    cli("models", "resnet9_cifar").complains("unknown model 'resnet9_cifar'", "did you mean 'resnet")


@pytest.mark.needs("timm", "torchvision")
def test_other_libraries(cli) -> None:
    names = cli("models", "timm:resnet50*").out.split()
    assert "timm:resnet50" in names
    assert all(name.startswith("timm:resnet50") for name in names)
