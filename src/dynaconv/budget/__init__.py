"""Training under a budget, and exact budgets after training; independent of any training engine."""

from dynaconv.budget.calibration import CalibrationReport, calibrate_, calibrated_targets, set_budget_
from dynaconv.budget.losses import BudgetLoss, bounds, budget_loss
from dynaconv.budget.mac_budget import MacBudget, ObservedCost
from dynaconv.budget.schedules import GateSchedule

__all__ = [
    "BudgetLoss",
    "CalibrationReport",
    "GateSchedule",
    "MacBudget",
    "ObservedCost",
    "bounds",
    "budget_loss",
    "calibrate_",
    "calibrated_targets",
    "set_budget_",
]
