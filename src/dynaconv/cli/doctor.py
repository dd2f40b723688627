"""`dynaconv doctor`: what is installed, what this machine can do, and whether skipping gives the right numbers."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from dynaconv._table import format_table
from dynaconv.cli.outcome import DONE, FAILED, Outcome

HELP = "check the installation and this machine"
DESCRIPTION = """
Shows the versions of Python and torch, what the processor can do, what our engine runs on, which dense
engines it can be compared with, which optional packages work (or why they do not), free disk and memory, and
checks in two seconds that a masked block gives the same numbers when it skips as when it computes everything.
Exit code 1 when that check fails. Put its output into a bug report."""
EXAMPLES = """\
dynaconv doctor
dynaconv doctor --json > machine.json"""

EXTRAS = {
    "timm": ("timm", "torchvision"),
    "train": ("lightning", "tensorboard", "yaml", "PIL", "sklearn", "rich", "tqdm", "jsonargparse"),
    "report": ("matplotlib", "plotly", "jinja2"),
}
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn"}
TOLERANCE = 1e-4


def add_arguments(parser: Any) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: Any) -> Outcome:
    """Look at everything; 1 when the self-check fails."""
    facts = _machine()
    packages = [
        {"package": name, "extra": extra, **_package(name)}
        for extra, names in EXTRAS.items()
        for name in names
    ]
    check = self_check()
    engines = _engines()
    data = {**facts, "engines": engines, "packages": packages, "self_check": check}
    table = format_table(
        ("package", "extra", "version", "state"),
        [(p["package"], p["extra"], p["version"] or "-", p["problem"] or "works") for p in packages],
    )
    lines = [f"{key.replace('_', ' '):<16} {value}" for key, value in facts.items()]
    rivals = format_table(
        ("dense engine", "version", "state"),
        [(e["title"], e["version"] or "-", e["problem"] or "works") for e in engines],
    )
    text = "\n".join([*lines, "", rivals, "", table, "", check["sentence"]])
    return Outcome(text, data, DONE if check["passed"] else FAILED)


def _engines() -> list[dict[str, Any]]:
    """The dense engines that `dynaconv bench` compares with: version, and why one cannot run (None when it can)."""
    from dynaconv.measure.rivals import RIVALS

    return [
        {"engine": name, "title": r.title, "version": _version(r.package), "problem": r.available()}
        for name, r in RIVALS.items()
    ]


def self_check() -> dict[str, Any]:
    """A small block, random masks: skipping against computing everything."""
    import torch

    import dynaconv as dc
    from dynaconv.measure.verify import compare_with_dense
    from dynaconv.testing import force_masks

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, x = dc.create_model("dynconv_resnet8_cifar").eval(), torch.randn(2, 3, 32, 32)
        with force_masks(model, 0.4):
            worst = max(compare_with_dense(model, x).values())
    except RuntimeError as error:
        sentence = f"self-check FAILED: {type(error).__name__}: {error}"
        return {"passed": False, "worst_deviation": None, "sentence": sentence}
    passed = worst <= TOLERANCE
    told = "passed" if passed else "FAILED"
    sentence = f"self-check {told}: skipping differs from computing everything by {worst:.1e} (allowed {TOLERANCE:.0e})"
    return {"passed": passed, "worst_deviation": worst, "sentence": sentence}


def _machine() -> dict[str, Any]:
    import torch

    from dynaconv import __version__
    from dynaconv.cost import machine_line
    from dynaconv.measure.roofline import engine_state
    from dynaconv.ops import _native
    from dynaconv.train.precision import native_bf16

    available, total = _memory()
    engine, bfloat16 = engine_state()
    return {
        "dynaconv": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": machine_line(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "native_bf16": native_bf16(),
        "compiled_kernels": _native.load()[1],
        "torch_operators": _native.load_operators() or "registered, for every torch from 2.11 on",
        "engine": engine,
        "engine_bfloat16": bfloat16,
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "free_disk_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "free_memory_gb": available,
        "memory_gb": total,
    }


def _memory() -> tuple[float | None, float | None]:
    """Available and total memory in GB, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None, None
    kilobytes = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
    gigabytes = [kilobytes.get(key) for key in ("MemAvailable", "MemTotal")]
    return tuple(None if v is None else round(v * 1024 / 1e9, 1) for v in gigabytes)


def _version(name: str) -> str | None:
    try:
        return metadata.version(DISTRIBUTIONS.get(name, name))
    except metadata.PackageNotFoundError:
        return None


def _package(name: str) -> dict[str, str | None]:
    """Version, and why it cannot be used (None when it can)."""
    from dynaconv import integrations

    version = _version(name)
    guarded = getattr(integrations, f"import_{name}", None)
    try:
        guarded() if guarded else import_module(name)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        return {"version": version, "problem": " ".join(str(error).split())}
    return {"version": version, "problem": None}
