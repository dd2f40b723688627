"""The parser of all verbs, with help that teaches and errors that name the nearest word."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from dynaconv import _checks
from dynaconv._version import __version__
from dynaconv.cli import (
    bench,
    convert,
    demo,
    doctor,
    evaluate,
    explain,
    export,
    models,
    profile,
    report,
    study,
    train,
)

try:
    import jsonargparse
except ModuleNotFoundError as error:
    if error.name != "jsonargparse":
        raise
    raise _checks.integrations_missing("jsonargparse", "train") from None

VERBS: dict[str, ModuleType] = {
    "demo": demo,
    "train": train,
    "eval": evaluate,
    "profile": profile,
    "bench": bench,
    "explain": explain,
    "report": report,
    "study": study,
    "convert": convert,
    "export": export,
    "models": models,
    "doctor": doctor,
}

DESCRIPTION = """
Convolutional networks that decide, per input, where to compute and with which kernel: convert a network, train it
under a compute budget, and see what it saves in multiply-adds (MACs) and in milliseconds."""

EXAMPLES = """\
dynaconv demo                                   the whole story in minutes, on an embedded data set
dynaconv train scenes_dense --run runs/dense    train from a recipe
dynaconv explain runs/demo photo.jpg            where did it compute on my picture?
dynaconv convert timm:resnet50                  what would become dynamic in a network of mine?"""

EXIT_CODES = "Exit codes: 0 done, 1 a check or a run failed, 2 bad input, 130 interrupted."


class UsageError(Exception):
    """The command line cannot be understood."""


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Wraps paragraphs, leaves indented lines (the examples) alone."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = [
            p if p.startswith(" ") or "\n  " in p else textwrap.fill(" ".join(p.split()), width)
            for p in text.split("\n\n")
        ]
        return "\n\n".join(parts)


class Parser(jsonargparse.ArgumentParser):
    """Raises instead of leaving the process, so that `main` can answer in one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(message) from ex


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of `dynaconv`, and those of its verbs."""
    root = Parser(
        prog="dynaconv",
        usage="dynaconv [--debug] VERB ...",
        description=DESCRIPTION,
        epilog=f"{_examples(EXAMPLES)}\n\n`dynaconv VERB --help` teaches a verb. {EXIT_CODES}",
        formatter_class=HelpFormatter,
        version=__version__,
        allow_abbrev=False,
    )
    _add_debug(root)
    return root, _add_verbs(root, VERBS, "dynaconv")


def _add_verbs(parent: Parser, modules: dict[str, ModuleType], who: str) -> dict[str, Parser]:
    """Give `parent` a subcommand for each module, and those their own ones (VERBS); "verb subverb" -> its parser."""
    subcommands = parent.add_subcommands(
        dest="verb", required=False, title="verbs", metavar="VERB", help="`VERB --help` teaches each of them"
    )
    parsers: dict[str, Parser] = {}
    for name, module in modules.items():
        parser = _verb_parser(module)
        subcommands.add_subcommand(name, parser, help=module.HELP)
        parser.prog = f"{who} {name}"
        # jsonargparse wants outer levels first.
        inner = _add_verbs(parser, module.VERBS, parser.prog) if hasattr(module, "VERBS") else {}
        parsers |= {name: parser, **{f"{name} {below}": found for below, found in inner.items()}}
    return parsers


def _verb_parser(module: ModuleType) -> Parser:
    parser = Parser(
        description=module.DESCRIPTION, epilog=_examples(module.EXAMPLES), formatter_class=HelpFormatter
    )
    module.add_arguments(parser)
    _add_debug(parser)
    return parser


def _examples(text: str) -> str:
    return f"Examples:\n{textwrap.indent(text, '  ')}"


def _add_debug(parser: Parser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def parse(words: Sequence[str]) -> tuple[str | None, Any]:
    """The verb and its namespace; without a verb, None and the help text.

    Raises:
        UsageError: one sentence that says what is wrong.
        SystemExit: help or version was asked for, and printed.
    """
    words = list(words)
    at = next((i for i, word in enumerate(words) if not word.startswith("-")), None)
    verb = None if at is None else words[at]
    if verb is not None and verb not in VERBS:
        raise UsageError(str(_checks.unknown("verb", verb, VERBS)))
    if at is not None and hasattr(VERBS[verb], "prepare"):
        words[at + 1 :] = VERBS[verb].prepare(words[at + 1 :])
    root, parsers = build_parser()
    try:
        namespace = root.parse_args(words)
    except UsageError as error:
        who = _innermost(verb, words[(at or 0) + 1 :], parsers)
        raise UsageError(_sentence(str(error), who, parsers.get(who, root))) from None
    if verb is None:
        return None, root.format_help()
    args = namespace[verb]
    if hasattr(VERBS[verb], "VERBS") and args.verb is not None:
        # One flat namespace for `run`, with the name of the inner verb in it.
        inner, args = args.verb, args[args.verb]
        args.verb = inner
    return verb, args


def _innermost(verb: str | None, rest: Sequence[str], parsers: dict[str, Parser]) -> str | None:
    """The verb, with its inner verb where the words after it name one: `study correlation`."""
    below = next((word for word in rest if not word.startswith("-")), None)
    return f"{verb} {below}" if f"{verb} {below}" in parsers else verb


def _sentence(message: str, verb: str | None, parser: Parser) -> str:
    """argparse's and jsonargparse's complaints in our words."""
    message = " ".join(message.split())
    who = "dynaconv" if verb is None else f"dynaconv {verb}"
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        word = match.group(1)
        if not word.startswith("-"):
            return f"{who} does not expect {word!r} there; see `{who} --help`"
        known = [o for action in parser._actions for o in action.option_strings if o.startswith("--")]
        return str(_checks.unknown(f"option of {who}", word.partition("=")[0], known))
    if match := re.search(r'[Kk]ey "([\w.]+)".*?Expected an? (.+?)\. Got value: (.+)$', message):
        name, kind, got = match.groups()
        return f"--{name.replace('_', '-')} expects {_kind(kind)}, got {got!r}; see `{who} --help`"
    message = message.replace(f"{(verb or '').replace(' ', '.')}.", "").replace(
        "the following arguments are required:", "missing:"
    )
    return f"{who}: {message}; see `{who} --help`"


def _kind(kind: str) -> str:
    names = {"float": "a number", "int": "a whole number", "str": "text"}
    match = re.search(r"'(\w+)'", kind)
    return names.get(match.group(1), kind) if match else kind
