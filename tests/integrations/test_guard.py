"""The guarded imports, each in a fresh interpreter: what is imported here already would hide the question."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run_fresh(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.needs("torchvision")
def test_torchvision_models_and_transforms_run() -> None:
    out = run_fresh(
        """
import torch
from dynaconv.integrations import import_torchvision
torchvision = import_torchvision()
assert import_torchvision() is torchvision
model = torchvision.models.mobilenet_v2(num_classes=3).eval()
from torchvision.transforms import v2
x = v2.Resize((32, 32))(torch.zeros(2, 3, 40, 48))
print(tuple(model(x).shape))
"""
    )
    assert out == "(2, 3)"


@pytest.mark.needs("timm", "torchvision")
def test_timm_models_run() -> None:
    out = run_fresh(
        """
import torch
from dynaconv.integrations import import_timm
model = import_timm().create_model("resnet18", num_classes=3).eval()
print(tuple(model(torch.zeros(2, 3, 32, 32)).shape))
"""
    )
    assert out == "(2, 3)"


@pytest.mark.needs("lightning")
def test_lightning_imports() -> None:
    code = "from dynaconv.integrations import import_lightning; print(import_lightning().Trainer.__name__)"
    assert run_fresh(code) == "Trainer"


# A torchvision of our own making, first on the path, fails as it is told to.
FAKE = """
import sys, types
from importlib.machinery import ModuleSpec

class Fake:
    tries = 0
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name == "torchvision" else None
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        self.tries += 1
        fail(self.tries)

fake = Fake()
sys.meta_path.insert(0, fake)
from dynaconv.integrations import import_torchvision
"""


def test_only_the_known_message_is_mended() -> None:
    out = run_fresh(
        """
def fail(tries):
    raise RuntimeError("operator torchvision::roi_align does not exist")
"""
        + FAKE
        + """
try:
    import_torchvision()
except RuntimeError as error:
    print(fake.tries, error)
"""
    )
    assert out == "1 operator torchvision::roi_align does not exist"


def test_known_message_declares_the_operators_and_tries_again() -> None:
    out = run_fresh(
        """
import torch
def fail(tries):
    if tries == 1:
        raise RuntimeError("operator torchvision::nms does not exist")
    torch.ops.torchvision.nms, torch.ops.torchvision.qnms
"""
        + FAKE
        + """
import gc
import_torchvision()
gc.collect()
print(fake.tries, torch.ops.torchvision.nms)
"""
    )
    assert out == "2 torchvision.nms"


@pytest.mark.parametrize(
    ("function", "package", "extra"),
    [
        ("import_torchvision", "torchvision", "train"),
        ("import_timm", "timm", "timm"),
        ("import_lightning", "lightning", "train"),
    ],
)
def test_missing_package_names_its_extra(
    function: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynaconv import integrations
    from dynaconv.integrations import _optional

    def absent(name: str) -> None:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(_optional, "import_module", absent)
    with pytest.raises(ImportError) as caught:
        getattr(integrations, function)()
    assert (
        str(caught.value) == f'{package} is not installed; install it with: pip install "dynaconv[{extra}]"'
    )


def test_broken_package_keeps_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynaconv.integrations import _optional

    def broken(name: str) -> None:
        raise ModuleNotFoundError("No module named 'inner'", name="inner")

    monkeypatch.setattr(_optional, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="inner"):
        _optional.import_optional("timm", "timm")
