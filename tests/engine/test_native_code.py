"""A share of the C++ tests and of fuzzing, against the library that Python loads.

`make sanitize` and `make fuzz` run all of it under sanitizers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dynaconv.ops import _native

SOURCES = Path(__file__).parents[2] / "csrc" / "tests"
COMPILER = os.environ.get("CXX", "g++")
TESTS = sorted(path.stem for path in SOURCES.glob("*_test.cpp"))

pytestmark = pytest.mark.skipif(
    not TESTS or not shutil.which(COMPILER) or not _native.LIBRARY.is_file(),
    reason="no sources or no compiler",
)


def run(name: str, folder: Path, *arguments: str, **environment: str) -> str:
    """Compile a program, link it with the kernels and run it."""
    program = folder / name
    library = _native.LIBRARY
    build = [COMPILER, "-std=c++17", "-O1", "-fopenmp", str(SOURCES / f"{name}.cpp"), str(library)]
    subprocess.run([*build, f"-Wl,-rpath,{library.parent}", "-o", str(program)], check=True, timeout=600)
    # Threads that wait asleep leave the cores to other tests.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"} | environment
    result = subprocess.run(
        [str(program), *arguments], env=environment, timeout=600, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("name", TESTS)
def test_kernels(name: str, tmp_path: Path) -> None:
    run(name, tmp_path, DYNACONV_TEST_SHARE="5")


def test_random_plans(tmp_path: Path) -> None:
    assert "plans; of the damaged ones" in run("plan_fuzz", tmp_path, "1", "1")
