"""The fastest dense engines there are, behind one interface: what a dynamic network has to beat."""

from dynaconv.measure.rivals.table import (
    RIVALS,
    DenseRivals,
    Rival,
    choose_rivals,
    deviation,
    rivals_available,
)

__all__ = ["RIVALS", "DenseRivals", "Rival", "choose_rivals", "deviation", "rivals_available"]
