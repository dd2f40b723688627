"""What a training step of a masked network costs beside the static network's: milliseconds, interleaved, and memory.

    python benchmarks/training_step.py                  ResNet-18 and MobileNetV2, batch 32
    python benchmarks/training_step.py --networks timm:resnet50 --gates spatial layer channels halting
    python benchmarks/training_step.py --check         exit code 1 above 1.2 x time or 1.25 x memory

A step is the whole one: forward, cross-entropy, budget loss, backward, SGD. The ratio of times is the median of the
rounds' ratios. Memory is what torch's allocator holds at most during a step (in a process of its own): the
same quantity on a CPU and on a CUDA device, and the one that the limit is about. The resident size of the process
(Linux, highest of five steps above what it had before) is told as well: malloc leaves holes between maps of different
sizes, whose amount changes with the sizes and from step to step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import dynaconv as dc
from dynaconv.cost import machine_line

GATES = {
    "spatial": dc.SpatialMasking(),
    "paper": dc.SpatialMasking(preset="paper"),
    "layer": dc.LayerGate(),
    "halting": dc.Halting(),
    "channels": dc.ChannelGate(),
}
MOST_TIME, MOST_MEMORY = 1.2, 1.25


def main() -> int:
    """Print a line for each network and gate."""
    args = parse()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.memory_of:
        print(json.dumps(peak_megabytes(args, *args.memory_of)))
        return 0
    print(machine_line())
    print("| network | gate | static ms | masked ms | time | static MB | masked MB | memory | resident |")
    print("|---|---|---|---|---|---|---|---|---|")
    worst = False
    for name in args.networks:
        base = None if args.no_memory else ask(args, name, "static")
        for kind in args.gates:
            row = [name, kind]
            if args.no_times:
                row += ["", "", ""]
            else:
                static, masked, ratio = times(args, name, kind)
                row += [f"{static:.0f}", f"{masked:.0f}", f"{ratio:.3f}"]
                worst |= ratio > MOST_TIME
            if base is not None:
                peak = ask(args, name, kind)
                ratios = {key: peak[key] / base[key] for key in peak if base[key]}
                row += [f"{base['held']:.0f}", f"{peak['held']:.0f}", f"{ratios['held']:.3f}"]
                row += [f"{ratios['resident']:.3f}" if "resident" in ratios else ""]
                worst |= ratios["held"] > MOST_MEMORY
            print("| " + " | ".join(row) + " |", flush=True)
    return int(worst and args.check)


def parse() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["timm:resnet18", "timm:mobilenetv2_100"])
    parser.add_argument("--gates", nargs="+", default=["spatial"], choices=list(GATES))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--no-times", action="store_true", help="memory only")
    parser.add_argument("--check", action="store_true", help="exit code 1 above the limits")
    parser.add_argument("--memory-of", nargs=2, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def steps(args: argparse.Namespace, name: str, kind: str) -> Callable[[], None]:
    """A function that does one training step."""
    torch.manual_seed(0)
    model = dc.create_model(name, num_classes=100)
    budget = None
    if kind != "static":
        dc.dynamize_(model, GATES[kind])
        budget = dc.MacBudget(model, 0.5, total_steps=1000)
    model = model.to(args.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.arange(args.batch, device=args.device) % 100

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        if budget is None:
            loss = F.cross_entropy(model(x), y)
        else:
            with budget.observe() as cost:
                logits = model(x)
            loss = F.cross_entropy(logits, y) + cost.loss
        loss.backward()
        optimizer.step()
        if budget is not None:
            budget.step()
        if args.device != "cpu":
            torch.cuda.synchronize()

    return step


def times(args: argparse.Namespace, name: str, kind: str) -> tuple[float, float, float]:
    """Milliseconds of the static and of the masked step (medians), and the median of the rounds' ratios."""
    static, masked = steps(args, name, "static"), steps(args, name, kind)
    static(), masked()
    rows = []
    for i in range(args.rounds):
        pair = {}
        for step in (static, masked) if i % 2 else (masked, static):
            start = time.perf_counter()
            step()
            pair[step] = (time.perf_counter() - start) * 1e3
        rows.append((pair[static], pair[masked]))
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    return *medians, statistics.median(b / a for a, b in rows)


def ask(args: argparse.Namespace, name: str, kind: str) -> dict[str, float]:
    """Peak memory from a process of its own."""
    words = [sys.executable, __file__, "--memory-of", name, kind, "--batch", str(args.batch)]
    words += ["--size", str(args.size), "--device", args.device]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_megabytes(args: argparse.Namespace, name: str, kind: str) -> dict[str, float]:
    """held: by torch's allocator during one step; resident: by the process during five, 0 where that is not known."""
    step = steps(args, name, kind)
    if args.device != "cpu":
        step(), step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return {"held": (torch.cuda.max_memory_allocated() - before) / 2**20, "resident": 0.0}
    before = resident("VmRSS")
    for _ in range(5):
        step()
    highest = resident("VmHWM") - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return {"held": max(held) / 2**20, "resident": highest}


def resident(key: str) -> float:
    """A line of /proc/self/status, in megabytes; 0 where there is no such file."""
    if not os.path.exists("/proc/self/status"):
        return 0.0
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024


if __name__ == "__main__":
    sys.exit(main())
