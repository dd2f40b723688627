"""`dynaconv report`: the HTML report of a run, or a comparison of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynaconv import _checks
from dynaconv.cli.folders import output_folder
from dynaconv.cli.outcome import Outcome

HELP = "write the HTML report of a run, or compare several"
DESCRIPTION = """
With one run, writes report.html and figures/*.png into it from its results.json (which demo and eval
write), or with --out that page alone. With several, writes one page that compares them. The pages are
single files that open without a network. Nothing is measured here."""
EXAMPLES = """\
dynaconv report runs/demo
dynaconv report runs/a runs/b runs/c --out comparison.html"""


def add_arguments(parser: Any) -> None:
    """Runs and the output."""
    parser.add_argument("run", nargs="+", help="run folders")
    parser.add_argument(
        "--out",
        type=str,
        default=None,
        help="HTML file; left out, report.html in the run, or comparison.html for several runs",
    )
    parser.add_argument("--json", action="store_true", help="print the path as JSON")


def run(args: Any) -> Outcome:
    """Write the page and say where.

    Raises:
        FileNotFoundError: no such run, or it has no results yet.
        ValueError: damaged results, an output that is a folder.
    """
    from dynaconv.report import write_comparison, write_report

    folders = [Path(name) for name in args.run]
    for folder in folders:
        if not folder.is_dir():
            raise _checks.cli_no_folder(folder, [])
    out = None if args.out is None else Path(args.out)
    if out is not None:
        output_folder(out.parent)
    if len(folders) == 1:
        page = write_report(folders[0] if out else output_folder(folders[0]), out)
    else:
        page = write_comparison(folders, out or Path("comparison.html"))
    return Outcome(str(page), {"report": page, "runs": folders})
