from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, os, sys
import torch
from dynaconv.train import fit
from tests.train.synthetic import Bundle, recipe

torch.set_num_threads(1)
made = recipe(trainer={"epochs": 6}, optim={"lr": 0.05}, calibrate=[0.5])
result = fit(made, sys.argv[1], bundle=Bundle(), progress=False)
total = sum(float(v.double().sum()) for v in result.model.state_dict().values())
facts = {"history": result.history, "total": total}
with open(f"{sys.argv[1]}/rank{os.environ['RANK']}.json", "w") as file:
    json.dump(facts, file)
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
    assert one == two
    assert abs(one["history"][-1]["ratio"] - 0.5) < 0.2
    lines = (run / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + 6 * (3 + 1)
    assert len(list((run / "tensorboard").iterdir())) == 1
