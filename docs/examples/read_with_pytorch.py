"""Reads a distilled data set as a PyTorch data set of normalized NCHW images."""

import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

arrays = np.load("artifacts/distilled.npz")
card = json.loads(Path("artifacts/distilled.json").read_text(encoding="utf-8"))
images = torch.from_numpy((arrays["images"] - card["mean"]) / card["std"]).permute(0, 3, 1, 2)
dataset = TensorDataset(images.float(), torch.from_numpy(arrays["labels"]).long())
print(card["dataset"], *[batch.shape for batch in next(iter(DataLoader(dataset, batch_size=32)))])
