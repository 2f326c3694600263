"""Reads a distilled data set with NumPy alone; run it in a work directory."""

import json
from pathlib import Path

import numpy as np

with np.load("artifacts/distilled.npz") as arrays:
    images, labels = arrays["images"], arrays["labels"]
card = json.loads(Path("artifacts/distilled.json").read_text(encoding="utf-8"))
inputs = (images - np.float32(card["mean"])) / np.float32(card["std"])
print(card["dataset"], inputs.shape, inputs.dtype, np.bincount(labels))
