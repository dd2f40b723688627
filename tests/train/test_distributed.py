from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, os, sys
import torch
import dynaconv as dc
from dynaconv.train import fit
from tests.train.synthetic import Bundle, lightning, recipe


class Count(lightning.Callback):
    # What this process alone executed, beside the ratio that the budget says.
    steps = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.context = dc.collect_masks(module.model)
        self.masks = self.context.__enter__()

    def on_train_batch_end(self, trainer, module, *args):
        self.context.__exit__(None, None, None)
        costs = self.masks.costs().values()
        executed = float(sum(c.executed_macs.sum() for c in costs))
        dense = sum(c.dense_macs * len(c.executed_macs) for c in costs)
        self.steps.append((executed, dense, module.last.ratio))


torch.set_num_threads(1)
made = recipe(trainer={"epochs": 16}, optim={"lr": 0.05, "warmup_epochs": 1}, calibrate=[0.5])
result = fit(made, sys.argv[1], bundle=Bundle(), progress=False, callbacks=[Count()])
total = sum(float(v.double().sum()) for v in result.model.state_dict().values())
facts = {"history": result.history, "total": total, "steps": Count.steps}
with open(f"{sys.argv[1]}/rank{os.environ['RANK']}.json", "w") as file:
    json.dump(facts, file)
# A thread of the process group that meets an interpreter on its way out aborts the process now and then.
os._exit(0)
"""


def test_two_processes_train_one_network_to_one_budget(tmp_path):
    root = Path(__file__).resolve().parents[2]
    script, run = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT)
    paths = [str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        script,
        run,
    ]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((run / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert (one["history"], one["total"]) == (two["history"], two["total"])
    for (executed, dense, ratio), (executed2, dense2, ratio2) in zip(one["steps"], two["steps"], strict=True):
        assert ratio == ratio2
        assert abs(ratio - (executed + executed2) / (dense + dense2)) < 1e-6
    assert one["steps"] != two["steps"]
    reached = [ratio for *_, ratio in one["steps"][24:36]]
    assert abs(sum(reached) / len(reached) - 0.5) < 0.05
    lines = (run / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + 16 * (3 + 1)
    assert len(list((run / "tensorboard").iterdir())) == 1
