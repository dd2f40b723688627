"""The machine line that stands beside every measured number."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch


def machine_line(with_commit: bool = True) -> str:
    """CPU, instruction set, threads, torch, commit: what a reader needs to place a measurement."""
    capability = torch.backends.cpu.get_cpu_capability()
    parts = [
        _cpu_name(),
        capability,
        f"{torch.get_num_threads()} threads",
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
    ]
    commit = source_commit() if with_commit else None
    if commit:
        parts.append(f"commit {commit}")
    return ", ".join(parts)


def source_commit() -> str | None:
    """Short commit of the source tree dynaconv runs from, or None when it is an installed package."""
    folder = Path(__file__).resolve().parent
    try:
        top = _git(folder, "rev-parse", "--show-toplevel")
        if not (Path(top) / "src" / "dynaconv" / "__init__.py").exists():
            return None
        return _git(folder, "rev-parse", "--short", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=5, check=True
    )
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
