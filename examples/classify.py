"""Classify pictures with an exported network. Needs onnxruntime, numpy and Pillow; no torch, no dynaconv.

    python classify.py model.onnx picture.png ... [--budget 0.5]

One line of JSON for each picture: its class, the probability, and the share of positions that the network computed.
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image

parser = argparse.ArgumentParser(
    description="Classify pictures with a file that `dynaconv export RUN` wrote."
)
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
    short, (wide, high) = min(picture.size), picture.size
    picture = picture.resize(
        (round(wide * size / short), round(high * size / short)), Image.Resampling.BILINEAR
    )
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)), np.float32) / 255
    feed["images"] = ((pixels - np.float32(facts["mean"])) / np.float32(facts["std"])).transpose(2, 0, 1)[
        None
    ]
    logits, *densities = session.run(None, feed)
    weights = np.exp(logits[0] - logits.max())
    best, density = int(weights.argmax()), float(np.mean(densities)) if densities else None
    probability = float(weights[best] / weights.sum())
    print(
        json.dumps(
            {"picture": path, "class": facts["classes"][best], "probability": probability, "density": density}
        )
    )
