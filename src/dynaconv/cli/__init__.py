"""The command line: `dynaconv VERB`, a file a verb.

A verb is a module with HELP (one line), DESCRIPTION, EXAMPLES, `add_arguments(parser)` and
`run(args) -> Outcome`, and a line in `parser.VERBS`. What it needs beyond torch it imports inside `run`, so that
`dynaconv --help` stays quick.
"""

from dynaconv.cli.main import main

__all__ = ["main"]
