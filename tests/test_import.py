"""`import dynaconv` costs torch and nothing else, in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

OPTIONAL = (
    "timm",
    "torchvision",
    "lightning",
    "pytorch_lightning",
    "torchmetrics",
    "tensorboard",
    "jsonargparse",
    "yaml",
    "PIL",
    "sklearn",
    "scipy",
    "matplotlib",
    "plotly",
    "jinja2",
    "rich",
    "tqdm",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
)

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
"""


def run_fresh(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_import_prints_nothing_and_loads_nothing_optional() -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import dynaconv
late = sorted((set(sys.modules) - before) & set({OPTIONAL!r}))
assert not late, late
"""
    done = run_fresh(code)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def test_import_works_without_the_optional_packages() -> None:
    # Pillow, YAML and the like are blocked for dynaconv only: torch may look for them itself.
    code = f"import torch\nBLOCKED = {OPTIONAL!r}\n{BLOCK}\nimport dynaconv\nprint(dynaconv.__version__)"
    done = run_fresh(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("name", ["nn", "ops", "budget", "convert", "cost", "integrations", "models"])
def test_core_rooms_import_alone(name: str) -> None:
    done = run_fresh(f"import torch\nBLOCKED = {OPTIONAL!r}\n{BLOCK}\nimport dynaconv.{name}")
    assert done.returncode == 0, done.stderr
