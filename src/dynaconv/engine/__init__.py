"""The engine: a whole network as one flat plan of native steps, in which a MAC saved is time saved.

`compile` exports a network, folds and fuses it, and packs its weights; `CompiledModel` runs the plan, with the
compiled kernels (csrc/plan) or with PyTorch operations.
"""

from dynaconv.engine.compiled import CompiledModel, RunStats, load
from dynaconv.engine.compiler import compile
from dynaconv.engine.plan_table import PlanTable

__all__ = ["CompiledModel", "PlanTable", "RunStats", "compile", "load"]
