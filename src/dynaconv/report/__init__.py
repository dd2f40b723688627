"""Reports: what a run reached, at how many multiply-adds and milliseconds, as one self-contained HTML file and PNGs.

>>> from dynaconv import report
>>> report.write_report("runs/demo")                                   # doctest: +SKIP
PosixPath('runs/demo/report.html')
"""

from dynaconv.report.comparison import write_comparison
from dynaconv.report.explanation import write_explanation
from dynaconv.report.run_report import write_report

__all__ = ["write_comparison", "write_explanation", "write_report"]
