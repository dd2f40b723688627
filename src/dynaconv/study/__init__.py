"""Studies of dynamic kernels: how alike they are, what their attention does, what they give for their parameters.

The command line reaches them as `dynaconv study NAME`.
"""

from dynaconv.study.correlation import CorrelationResult, CorrelationTally, Thresholds, pearson

__all__ = ["CorrelationResult", "CorrelationTally", "Thresholds", "pearson"]
