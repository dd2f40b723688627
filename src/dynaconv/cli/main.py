"""`main`: parse, run one verb, print its outcome or one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence

from dynaconv.cli.outcome import BAD_INPUT, DONE, FAILED, INTERRUPTED, CommandFailed, Outcome, to_json

# What a user can mend: bad values, files that are missing or unwritable, an extra that is not installed.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dynaconv` with these words (default: the process's) and return the exit code.

    0 done, 1 a check or a run failed, 2 bad input, 130 interrupted. Errors are one sentence on stderr; `--debug` adds
    the traceback.

    >>> main(["models", "resnet8_cifar", "--json"])  # doctest: +ELLIPSIS
    [
      {
        "name": "resnet8_cifar",
    ...
    0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else DONE
    except BrokenPipeError:
        # The reader went away (`dynaconv models | head`); what is left must not be flushed into the closed pipe.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt as stop:
        return _complain(words, str(stop) or "interrupted", INTERRUPTED)
    except CommandFailed as error:
        return _complain(words, str(error), error.code)
    except USER_ERRORS as error:
        return _complain(words, describe(error), BAD_INPUT)
    except Exception as error:  # noqa: BLE001 - the last resort: a bug still ends in one sentence, never in a wall of text
        return _complain(words, _unexpected(error), FAILED)


def _run(words: list[str]) -> int:
    from dynaconv.cli.parser import VERBS, UsageError, parse

    try:
        verb, args = parse(words)
    except UsageError as error:
        raise CommandFailed(str(error), BAD_INPUT) from error
    if verb is None:
        print(args, file=sys.stderr)
        return BAD_INPUT
    # Whatever a library prints on the way goes to stderr: stdout holds the outcome and nothing else.
    with contextlib.redirect_stdout(sys.stderr):
        outcome: Outcome = VERBS[verb].run(args)
    text = (
        to_json(outcome.data) if getattr(args, "json", False) and outcome.data is not None else outcome.text
    )
    if text:
        print(text, flush=True)
    return outcome.code


def _complain(words: Sequence[str], sentence: str, code: int) -> int:
    if "--debug" in words:
        traceback.print_exc()
    print(f"dynaconv: {' '.join(sentence.split())}", file=sys.stderr)
    return code


def describe(error: BaseException) -> str:
    """The sentence for an error; the operating system's get what to do.

    >>> describe(OSError(28, "No space left on device", "runs/a"))
    "cannot write 'runs/a': the disk is full; free some space or name another folder"
    """
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return _operating_system(error, str(error.filename))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            str(error.strerror)
            if "free some space" in str(error.strerror)
            else ("the disk is full; free some space or name another folder")
        )
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return str(error.strerror)
    if isinstance(error, ImportError) and error.name and "install" not in str(error):
        return f"cannot import {error.name}: {error}; `dynaconv doctor` shows what is installed"
    return str(error) or type(error).__name__


def _operating_system(error: OSError, path: str) -> str:
    reasons = {
        errno.ENOSPC: f"cannot write {path!r}: the disk is full; free some space or name another folder",
        errno.EDQUOT: f"cannot write {path!r}: the disk quota is used up; free some space or name another folder",
        errno.EACCES: f"no permission for {path!r}; name a file or folder that is yours",
        errno.EPERM: f"no permission for {path!r}; name a file or folder that is yours",
        errno.EROFS: f"cannot write {path!r}: that disk is read-only; name another folder",
        errno.EEXIST: f"{path!r} is in the way: it exists and is not a folder; name another one",
        errno.ENOTDIR: f"{path!r} cannot be a folder: a part of the path is a file; name another one",
        errno.EISDIR: f"{path!r} is a folder; name a file",
        errno.ENOENT: f"there is no {path!r}; check the spelling",
    }
    return reasons.get(error.errno, f"{path!r}: {error.strerror}")


def _unexpected(error: Exception) -> str:
    return f"unexpected {type(error).__name__}: {error}; run again with --debug and report what it shows"
