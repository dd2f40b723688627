from __future__ import annotations

import pytest

FAST = ["--rounds", "1", "--batch", "1", "2"]


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch) -> None:
    """A round of one call: these tests look at what is measured, not at how long it takes."""
    from dynaconv.cost import latency

    whole = latency.compare_latency
    monkeypatch.setattr(latency, "compare_latency", lambda f, **o: whole(f, **{**o, "min_round_ms": 0.01}))


def test_network_by_name_gets_forced_masks(cli) -> None:
    data = cli("bench", "dynconv_resnet8_cifar", *FAST, "--json").json
    assert data["masks"] == "forced, density 0.5" and data["pictures"] == "noise"
    assert set(data["batches"]) == {"1", "2"}
    point = data["batches"]["1"]["points"][0]
    assert point["density"] == 0.5 and 0.5 < point["conditional_ratio"] < 0.7
    assert point["ratio_min"] == pytest.approx(point["min_ms"] / data["batches"]["1"]["dense"]["min_ms"])
    assert max(data["largest_deviation"].values()) < 1e-4
    assert "torch" in data["machine"]


def test_targets_of_a_saved_network(cli, saved) -> None:
    answer = cli("bench", saved, *FAST, "--threads", "1", "--target", "0.3", "0.7")
    assert answer.code == 0
    for told in ("target 0.3", "target 0.7", "decided by the gates", "median/dense", "1 threads", "noise"):
        assert told in answer.out
    assert "agrees with computing everything" in answer.err


def test_no_times_when_skipping_is_wrong(cli, monkeypatch) -> None:
    monkeypatch.setattr(
        "dynaconv.measure.compare_with_dense", lambda model, x: {"layer1.0": 1e-6, "layer2.0": 0.1}
    )
    answer = cli("bench", "dynconv_resnet8_cifar", *FAST)
    assert (answer.code, answer.out) == (1, "")
    assert "block 'layer2.0'" in answer.err and "nothing was timed" in answer.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["resnet8_cifar"], ["resnet8_cifar is static", "--dynamize"]),
        (["dynconv_resnet8_cifar", "--target", "0"], ["must lie in (0, 1], got 0"]),
        (["dynconv_resnet8_cifar", "--target", "0.5"], ["not calibrated"]),
        (["dynconv_resnet8_cifar", "--target", "0.5", "--force-density", "0.5"], ["exclude each other"]),
        (["dynconv_resnet8_cifar", "--force-density", "-0.5"], ["density must lie in [0, 1]"]),
        (["dynconv_resnet8_cifar", "--batch", "0"], ["--batch must be at least 1"]),
        (["dynconv_resnet8_cifar", "--rounds", "0"], ["--rounds must be at least 1"]),
        (["dynconv_resnet8_cifar", "--threads", "0"], ["--threads must be at least 1"]),
    ],
)
def test_bad_input(cli, words, told) -> None:
    cli("bench", *words).complains(*told)
