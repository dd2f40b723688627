"""Import Lightning, whose metrics import torchvision wherever it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

from dynaconv.integrations._optional import import_optional
from dynaconv.integrations.torchvision import import_torchvision


def import_lightning() -> ModuleType:
    """Import ``lightning`` and return it, with torchvision imported first where there is one.

    Raises:
        ImportError: lightning is not installed.

    Example:
        >>> lightning = import_lightning()
        >>> lightning.Trainer.__name__
        'Trainer'
    """
    if find_spec("torchvision") is not None:
        import_torchvision()
    return import_optional("lightning", "train")
