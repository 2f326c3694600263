"""Distilled pairs on disk: `pairs.safetensors`, and its card `pairs.json`.

| name | dtype, shape | meaning |
|---|---|---|
| `images` | float32 (N, H, W, C) | values in [0, 1] |
| `texts` | float32 (N, D) | vectors of the encoder that the card names; not of length one |
| `similarity` | float32 (N, N) | how far each text matches each image; missing for the identity |

The card says in `encoder` what texts must be encoded with to be read beside these, in `captions`
the training sentence nearest to each text, for display alone, and `mean` and `std` of the
training images.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from jaxdistill.errors import InputError
from jaxdistill.io import weights
from jaxdistill.io.files import expanded

NAME = "pairs"


class DistilledPairs(NamedTuple):
    """A distilled set of pairs.

    Attributes:
        images: float32 in [0, 1].
        texts: A vector for each.
        similarity: How far each text matches each image, or None: each its own alone.
        card: What the set is and where it comes from.
    """

    images: Float32[np.ndarray, "n h w c"]
    texts: Float32[np.ndarray, "n d"]
    similarity: Float32[np.ndarray, "n n"] | None
    card: dict


def save(folder: Path, pairs: DistilledPairs) -> None:
    """Writes the arrays and their card, each whole or not at all.

    Args:
        folder: Made if missing.
        pairs: The set.

    Raises:
        Diverged: If a value is not finite; nothing is written.
        InputError: If the files cannot be written.
    """
    arrays = {name: x for name, x in pairs._asdict().items() if name != "card" and x is not None}
    weights.save(folder, NAME, arrays, pairs.card)


def load(path: str | os.PathLike[str]) -> DistilledPairs:
    """Reads distilled pairs. Safe on untrusted files: nothing is unpickled.

    Args:
        path: The folder, or a workdir that has it as `artifacts`.

    Raises:
        InputError: If there are none, or they are damaged or no pairs.
    """
    folder = expanded(path)
    if (folder / "artifacts").is_dir():
        folder = folder / "artifacts"
    arrays, card = weights.load(folder, NAME)
    where = folder / f"{NAME}.safetensors"
    if not {"images", "texts"} <= arrays.keys() <= {"images", "texts", "similarity"}:
        raise InputError(f"{where} holds {', '.join(sorted(arrays))[:200]}, not images and texts")
    images, texts, similarity = (arrays.get(n) for n in ("images", "texts", "similarity"))
    shapes = [None if x is None else x.shape for x in (images, texts, similarity)]
    count = len(images)
    good = (images.ndim, texts.ndim) == (4, 2) and len(texts) == count > 0
    if not good or shapes[2] not in (None, (count, count)):
        raise InputError(f"{where} holds arrays of shapes {shapes}, which are no pairs")
    if any(x is not None and x.dtype != np.float32 for x in (images, texts, similarity)):
        raise InputError(f"{where} holds numbers that are not float32")
    if images.min() < 0 or images.max() > 1:
        raise InputError(f"{where} has images outside of [0, 1]")
    return DistilledPairs(images, texts, similarity, card)
