"""Words in, exit codes and sentences out."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from dynaconv import __version__
from dynaconv.cli import models
from dynaconv.cli.main import describe, main
from dynaconv.cli.outcome import CommandFailed, Outcome
from dynaconv.cli.parser import VERBS

OPTIONS_OF_ALL = ("--help", "--debug")


def fresh(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dynaconv", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def test_process_prints_pure_json_and_exits_0() -> None:
    done = fresh("models", "resnet8_*", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads(done.stdout)] == ["resnet8_cifar", "resnet8_scenes"]
    assert done.stderr == ""


def test_process_complains_in_one_sentence_and_exits_2() -> None:
    done = fresh("profile", "resnet8_cifr")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("dynaconv: unknown model 'resnet8_cifr'; did you mean 'resnet8_cifar'")


def test_help_and_models_load_nothing_heavy() -> None:
    code = """
import sys
from dynaconv.cli import main
main(["--help"]); main(["models"])
heavy = {"lightning", "timm", "torchvision", "plotly", "matplotlib", "sklearn", "torch._dynamo"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr


def test_help_lists_every_verb(cli) -> None:
    answer = cli("--help")
    assert answer.code == 0
    for verb, module in VERBS.items():
        assert f"    {verb} " in answer.out
        assert module.HELP.split()[0] in answer.out


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches(cli, verb) -> None:
    answer = cli(verb, "--help")
    assert answer.code == 0
    assert answer.out.startswith(f"usage: dynaconv {verb}")
    assert answer.out.count(f"  dynaconv {verb}") >= 2
    for option in OPTIONS_OF_ALL:
        assert option in answer.out
    assert "--json" in answer.out
    # A paragraph, not a word.
    assert len(VERBS[verb].DESCRIPTION.split()) > 30


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_explained(verb) -> None:
    from dynaconv.cli.parser import build_parser

    for action in build_parser()[1][verb]._actions:
        assert action.help and len(action.help.split()) >= 2, action.option_strings or action.dest


def test_version(cli) -> None:
    assert __version__ in cli("--version").out


def test_no_verb_shows_the_help_on_stderr(cli) -> None:
    answer = cli()
    assert (answer.code, answer.out) == (2, "")
    assert "demo" in answer.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["profil", "x"], ["unknown verb 'profil'", "did you mean 'profile'"]),
        (
            ["profile", "resnet8_cifar", "--bacth", "3"],
            ["unknown option of dynaconv profile '--bacth'", "'--batch'"],
        ),
        (["profile", "resnet8_cifar", "--batch=three"], ["--batch expects a whole number, got 'three'"]),
        (["bench", "resnet8_cifar", "--target", "x"], ["--target expects a number, got 'x'"]),
        (["profile"], ["missing: model"]),
        (["profile", "resnet8_cifar", "more"], ["does not expect 'more'"]),
        (["bench", "resnet8_cifar", "--target"], ["expected at least one argument"]),
    ],
)
def test_words_that_cannot_be_understood(cli, words, told) -> None:
    cli(*words).complains(*told)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("a bad value"), 2, "a bad value"),
        (FileNotFoundError("there is no x"), 2, "there is no x"),
        (ImportError("timm is not installed; install it with: pip", name="timm"), 2, "timm is not installed"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 2, "the disk is full"),
        (CommandFailed("the loss is not finite"), 1, "the loss is not finite"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("oops"), 1, "unexpected ZeroDivisionError: oops; run again with --debug"),
    ],
)
def test_errors_become_a_sentence_and_a_code(cli, monkeypatch, error, code, told) -> None:
    def fail(_args):
        raise error

    monkeypatch.setattr(models, "run", fail)
    answer = cli("models")
    assert (answer.code, answer.out) == (code, "")
    assert answer.err.startswith("dynaconv: ") and told in answer.err
    assert answer.err.count("\n") == 1


def test_debug_shows_the_traceback(cli) -> None:
    for words in (["--debug", "profile", "nothing"], ["profile", "nothing", "--debug"]):
        answer = cli(*words)
        assert answer.code == 2
        assert "Traceback" in answer.err and "dynaconv: unknown model 'nothing'" in answer.err


def test_what_libraries_print_does_not_reach_stdout(cli, monkeypatch) -> None:
    def run(_args):
        print("a library says hello")
        return Outcome("text", {"threshold": float("-inf"), "list": (1, 2)}, 1)

    monkeypatch.setattr(models, "run", run)
    answer = cli("models", "--json")
    assert answer.json == {"threshold": None, "list": [1, 2]}
    assert answer.code == 1
    assert "hello" in answer.err


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (5, "gone"),
    ],
)
def test_operating_system_errors(number, told) -> None:
    sentence = describe(OSError(number, "gone", "some/file"))
    assert told in sentence and "'some/file'" in sentence


def test_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "dynaconv", "models"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
        check=False,
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 1


def test_main_reads_the_process_s_words(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["dynaconv", "models", "resnet8_cifar"])
    assert main() == 0
    assert "78,042" in capsys.readouterr().out
