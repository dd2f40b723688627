from __future__ import annotations

from types import SimpleNamespace

import pytest
from tests.cli.conftest import TOY

from dynaconv.cli.train import again, prepare, run_name
from dynaconv.train import TrainingDiverged, TrainingInterrupted


@pytest.mark.parametrize(
    ("words", "prepared"),
    [
        (["r.yaml", "--budget.target", "0.5"], ["r.yaml", "--set=budget.target=0.5"]),
        (["--optim.lr=0.1", "r.yaml", "--resume"], ["--set=optim.lr=0.1", "r.yaml", "--resume"]),
        (["r", "--masking", "none", "--json"], ["r", "--set=masking=none", "--json"]),
        (["r", "--calibrate", "0.3", "0.5", "--json"], ["r", "--set=calibrate=[0.3,0.5]", "--json"]),
        (["r", "--calibrate", "0.3"], ["r", "--set=calibrate=[0.3]"]),
        (["r", "--calibrate=[0.3]"], ["r", "--set=calibrate=[0.3]"]),
        (["--optim.milestones", "150", "250", "r"], ["--set=optim.milestones=[150,250]", "r"]),
        (["r", "--run", "runs/a.b"], ["r", "--run", "runs/a.b"]),
        (["r", "--budget.target"], ["r", "--set=budget.target="]),
    ],
)
def test_overrides_become_settings(words, prepared) -> None:
    assert prepare(words) == prepared


def test_print_config_shows_the_changes(cli) -> None:
    data = cli(
        "train",
        "scenes_dynconv",
        "--budget.target",
        "0.4",
        "--calibrate",
        "0.3",
        "0.6",
        "--print-config",
        "--json",
    ).json
    assert data["budget"]["target"] == 0.4
    assert data["calibrate"] == [0.3, 0.6]
    dense = cli(
        "train", "scenes_dynconv", "--masking", "none", "--budget", "none", "--calibrate=[]", "--print-config"
    ).out
    assert "masking" not in dense and "budget:" not in dense and "name: resnet8_scenes" in dense


def test_help_explains_the_keys_of_a_recipe(cli) -> None:
    out = cli("train", "--help").out
    for key in ("--budget.target", "--masking.preset", "--trainer.epochs", "--optim.lr", "--data.name"):
        assert key in out
    assert "share of the conditional MACs" in out


def test_names_of_runs_and_the_command_that_continues(tmp_path) -> None:
    assert run_name("recipes/scenes_dense.yaml") == "scenes_dense"
    assert run_name("runs/mine/") == "mine"
    args = SimpleNamespace(recipe="scenes_dense", set=["optim.lr=0.1"])
    assert again(args, tmp_path) == f"dynaconv train scenes_dense --run {tmp_path} --optim.lr=0.1 --resume"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["scenes_dynconf"], ["unknown recipe 'scenes_dynconf'", "did you mean 'scenes_dynconv'"]),
        (["missing.yaml"], ["there is no recipe file 'missing.yaml'"]),
        (["scenes_dense", "--budgte.target", "0.5"], ["unknown section 'budgte'; did you mean 'budget'"]),
        (["scenes_dense", "--optim.lrr", "0.5"], ["unknown recipe key 'optim.lrr'; did you mean 'optim.lr'"]),
        (["scenes_dynconv", "--budget.target", "1.5"], ["budget.target must lie in (0, 1], got 1.5"]),
        (["scenes_dense", "--trainer.epochs", "many"], ["'trainer.epochs' expects int, got 'many'"]),
        (
            ["scenes_dense", "--resum"],
            ["unknown option of dynaconv train '--resum'; did you mean '--resume'"],
        ),
        (
            ["scenes_dense", "--model.name", "resnet9_scenes", "--data.train_size=8"],
            ["unknown model 'resnet9_scenes'"],
        ),
        (["scenes_dense", "--data.name", "scnes"], ["unknown data set 'scnes'", "'scenes'"]),
    ],
)
def test_bad_input(cli, tmp_path, words, told) -> None:
    cli("train", *words, "--run", tmp_path / "run").complains(*told)
    assert not (tmp_path / "run").exists()


def test_run_folder_that_is_a_file(cli, tmp_path) -> None:
    file = tmp_path / "taken"
    file.write_text("mine")
    cli("train", "scenes_dense", "--run", file).complains("it is a file")
    cli("train", "scenes_dense", "--run", file / "run").complains("is a file")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (
            TrainingInterrupted("training interrupted in epoch 3 of 5"),
            130,
            "continue with: dynaconv train scenes_dense --run",
        ),
        (TrainingDiverged("training stopped at step 7: the loss is not finite"), 1, "stopped at step 7"),
        (
            OSError(
                28,
                "cannot write the run to x: No space left on device; free some space or name another folder",
            ),
            2,
            "free some",
        ),
    ],
)
def test_runs_that_end_early(cli, tmp_path, monkeypatch, error, code, told) -> None:
    def fit(*_args, **_options):
        raise error

    monkeypatch.setattr("dynaconv.train.fit", fit)
    answer = cli("train", "scenes_dense", "--run", tmp_path / "run")
    assert (answer.code, answer.out) == (code, "")
    assert told in answer.err and "Traceback" not in answer.err
    if code == 130:
        assert answer.err.rstrip().endswith("--resume")


def test_a_run_says_where_it_is_and_is_not_overwritten(cli, trained) -> None:
    assert {f.name for f in trained.iterdir()} >= {"config.yaml", "metrics.csv", "checkpoints", "model"}
    cli("train", "scenes_dynconv", "--run", trained, *TOY).complains(
        "holds a run already", "--resume", "--overwrite"
    )
    # All epochs are done, so this only writes the network again.
    data = cli("train", "scenes_dynconv", "--run", trained, "--resume", "--json", *TOY).json
    assert data["epochs"] == 1 and data["run"] == str(trained)
    assert [row["target"] for row in data["calibration"]] == [0.3, 0.5, 0.7]


def test_other_processes_of_a_distributed_run_say_nothing(cli, tmp_path, monkeypatch) -> None:
    history = [{"epoch": 1, "ratio": 0.5}]
    result = SimpleNamespace(
        history=history, seconds=1.0, best_epoch=1, best_accuracy=0.9, calibration=[], metric="accuracy"
    )
    monkeypatch.setattr("dynaconv.train.fit", lambda *_args, **_options: result)
    assert "trained 1 epoch in 1 s" in cli("train", "scenes_dense", "--run", tmp_path / "run").out
    monkeypatch.setenv("RANK", "1")
    for words in ([], ["--json"]):
        answer = cli("train", "scenes_dense", "--run", tmp_path / "run", *words)
        assert (answer.code, answer.out) == (0, "")


def test_torchrun_passes_every_option_on() -> None:
    """torchrun takes words that begin like its own options for abbreviations of them."""
    from torch.distributed.run import parse_args

    from dynaconv.cli import train
    from dynaconv.cli.parser import build_parser

    example = next(line for line in train.EXAMPLES.splitlines() if line.startswith("torchrun"))
    assert parse_args(example.split()[1:]).training_script_args[0] == "train"
    for action in build_parser()[1]["train"]._actions:
        if action.option_strings:
            words = ["-m", "dynaconv", "train", "recipe", action.option_strings[-1]]
            assert parse_args(words).training_script_args[-1] == words[-1]
