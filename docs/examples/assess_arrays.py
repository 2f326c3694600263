"""Finds copies among images, and shares out a budget over classes."""

import numpy as np

from jaxdistill.data.neighbours import near_copies
from jaxdistill.eval.scores import budgets

images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1)).astype(np.uint8)
pairs, nearness = near_copies(np.concatenate([images, images[:2, :, ::-1]]))
print(pairs.tolist())

spread, counts = np.array([1.0, 2.0, 4.0]), np.array([500, 500, 500])
print(budgets(counts * spread, counts, total=30).tolist())
