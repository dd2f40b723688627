from __future__ import annotations

import pytest


def test_totals_of_a_network_by_name(cli) -> None:
    data = cli("profile", "resnet8_cifar", "--json").json
    assert data["dense_macs"] == 12_500_992
    assert data["executed_macs"] == [12_500_992] * 8
    assert data["macs_ratio"] == 1.0
    assert {layer["name"] for layer in data["layers"]} >= {"conv1", "layer1.0.conv1"}


def test_forced_density_and_batch(cli) -> None:
    data = cli("profile", "resnet8_cifar", "--dynamize", "--density", "0.5", "--batch", "2", "--json").json
    assert len(data["executed_macs"]) == 2
    assert 0.5 < data["conditional_ratio"] < 0.7
    assert all(routing > 0 for routing in data["routing_macs"])


def test_target_of_a_saved_network(cli, saved) -> None:
    ratios = [
        cli("profile", saved, "--target", t, "--batch", "32", "--json").json["conditional_ratio"]
        for t in (0.3, 0.7)
    ]
    assert ratios[0] == pytest.approx(0.3, abs=0.1) and ratios[1] == pytest.approx(0.7, abs=0.1)


def test_text_says_where_the_masks_come_from(cli) -> None:
    answer = cli("profile", "dynconv_resnet8_cifar", "--density", "0.4", "--input-size", "3", "33", "31")
    assert "3x33x31" in answer.out
    assert "masks forced to density 0.4" in answer.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["resnet8_cifar", "--input-size", "4", "32", "32"], ["takes 3 channels", "--input-size 3 32 32"]),
        (["resnet8_cifar", "--input-size", "3", "0", "32"], ["--input-size expects", "3 0 32"]),
        (["resnet8_cifar", "--batch", "0"], ["--batch must be at least 1, got 0"]),
        (["resnet8_cifar", "--density", "0.5"], ["no gates"]),
        (["resnet8_cifar", "--target", "0.5"], ["no gates"]),
        (["dynconv_resnet8_cifar", "--density", "1.5"], ["density must lie in [0, 1], got 1.5"]),
        (["dynconv_resnet8_cifar", "--target", "1.5"], ["--target must lie in (0, 1], got 1.5"]),
        (["dynconv_resnet8_cifar", "--target", "0.5"], ["not calibrated", "--calibrate"]),
        (["dynconv_resnet8_cifar", "--dynamize"], ["dynamic already"]),
        (["runs/nothing"], ["there is no folder 'runs/nothing'"]),
    ],
)
def test_bad_input(cli, words, told) -> None:
    cli("profile", *words).complains(*told)


def test_target_outside_the_calibrated_range(cli, saved) -> None:
    cli("profile", saved, "--target", "0.1").complains(
        "--target 0.1 is outside", "0.3, 0.5, 0.7", "--calibrate 0.1"
    )


@pytest.mark.needs("torchvision")
def test_picture_too_small_for_the_network(cli) -> None:
    cli("profile", "torchvision:alexnet", "--input-size", "3", "8", "8").complains("does not accept", "3x8x8")
