"""Other people's packages, imported on request and only there.

The core needs torch alone. Whatever wants timm, torchvision or Lightning asks here, because each of them
imports torchvision, and torchvision next to another build of torch needs the guard in
:mod:`dynaconv.integrations.torchvision`.
"""

from dynaconv.integrations.lightning import import_lightning
from dynaconv.integrations.timm import import_timm
from dynaconv.integrations.torchvision import import_torchvision

__all__ = ["import_lightning", "import_timm", "import_torchvision"]
