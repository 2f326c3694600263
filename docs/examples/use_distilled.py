"""Reads a distilled set; run it in a work directory."""

import jaxdistill

distilled = jaxdistill.load_distilled(".")
print(distilled.card["dataset"], distilled.images.shape, distilled.labels.shape)
