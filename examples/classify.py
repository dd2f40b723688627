"""Classify pictures with an exported network. Needs onnxruntime, numpy and Pillow; no torch, no dynaconv.

    python classify.py model.onnx picture.png ... [--budget 0.5]

One line of JSON for each picture: its class, the probability, and the share of positions that the network computed.
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image

parser = argparse.ArgumentParser(description="Classify pictures with a file of `dynaconv export RUN`.")
parser.add_argument("model")
parser.add_argument("pictures", nargs="+")
parser.add_argument("--budget", type=float, help="share of the masked work to spend, of those calibrated")
args = parser.parse_args()
session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
facts = json.loads(session.get_modelmeta().custom_metadata_map["dynaconv"])
size, feed = facts["image_size"], {}
if facts["dial"] == "budget":
    threshold = next(iter(facts["threshold"].values()))
    if args.budget is not None:
        _, threshold, _ = min(facts["budgets"], key=lambda row: abs(row[0] - args.budget))
    feed["budget_threshold"] = np.array(-np.inf if threshold is None else threshold, np.float32)
for path in args.pictures:
    picture = Image.open(path).convert("RGB")
    scale = size / min(picture.size)
    picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in picture.size)
    x = np.asarray(picture.crop((left, top, left + size, top + size)), np.float32) / 255
    x = (x - np.float32(facts["mean"])) / np.float32(facts["std"])
    logits, *densities = session.run(None, feed | {"images": x.transpose(2, 0, 1)[None]})
    weights = np.exp(logits[0] - logits.max())
    best, density = int(weights.argmax()), float(np.mean(densities)) if densities else None
    answer = {
        "picture": path,
        "class": facts["classes"][best],
        "probability": float(weights.max() / weights.sum()),
    }
    print(json.dumps(answer | {"density": density}))
