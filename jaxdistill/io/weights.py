"""Parameters of networks on disk: `NAME.safetensors`, and `NAME.json`, a card that describes them.

A `.safetensors` file holds named arrays and nothing that could be run. Names are the paths in the
tree of parameters, joined by slashes.
"""

import functools
import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from flax import traverse_util
from jaxtyping import PyTree

from jaxdistill.errors import Diverged, InputError
from jaxdistill.io.files import dump, write_files
from jaxdistill.io.reading import one_line, read_json

FORMAT = "jaxdistill.weights/1"
# NumPy has no bfloat16 of its own, and safetensors' reader for NumPy knows none.
_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I32": np.int32,
    "U32": np.uint32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
}


def save(
    folder: str | os.PathLike[str],
    name: str,
    params: PyTree,
    card: Mapping[str, Any],
) -> None:
    """Writes parameters and their card, each whole or not at all.

    Args:
        folder: Made if missing.
        name: The name of the files.
        params: Nested dictionaries of arrays.
        card: What JSON can hold; `format`, `sha256` and `parameters` are added.

    Raises:
        Diverged: If a parameter is not finite; nothing is written.
        InputError: If the files cannot be written.
    """
    folder = Path(folder)
    flat = traverse_util.flatten_dict(params, sep="/")
    for key, x in flat.items():
        if not _is_finite(x):
            raise Diverged(
                f"{key} of the {name} is not finite, so {folder} does not get it; lower the "
                "learning rates"
            )
    content = safetensors.flax.save({key: np.asarray(x) for key, x in flat.items()})
    card = dict(card) | {
        "format": FORMAT,
        "parameters": sum(math.prod(x.shape) for x in flat.values()),
        "sha256": hashlib.sha256(content).hexdigest(),
    }

    def write(file: BinaryIO) -> None:
        file.write(content)

    # The parameters come last: where they are, the card is.
    files = {
        folder / f"{name}.json": functools.partial(dump, card),
        folder / f"{name}.safetensors": write,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_files(files)
    except OSError as error:
        where = error.filename or folder
        raise InputError(f"cannot write {where}: {error.strerror or error}") from error


def load(folder: str | os.PathLike[str], name: str) -> tuple[dict, dict]:
    """Reads parameters and their card.

    Returns:
        Nested dictionaries of NumPy arrays, and the card.

    Raises:
        InputError: If there are none, they are damaged, or the card is that of others.
    """
    path, described = Path(folder) / f"{name}.safetensors", Path(folder) / f"{name}.json"
    for file in (path, described):
        if not file.is_file():
            raise InputError(f"{file} is no file; give the folder that a run wrote")
    try:
        card = read_json(described)
        if not isinstance(card, dict) or not {"format", "sha256"} <= card.keys():
            raise InputError("it lacks format or sha256")
    except InputError as error:
        raise InputError(f"{described} is no card of parameters ({error})") from error
    content = path.read_bytes()
    if (card["format"], card["sha256"]) != (FORMAT, hashlib.sha256(content).hexdigest()):
        raise InputError(
            f"{described} is not the card of {path.name}: their checksums differ; copy both again"
        )
    try:
        flat = {name: _array(record) for name, record in safetensors.deserialize(content)}
        if any(str(above) in flat for name in flat for above in PurePosixPath(name).parents):
            raise ValueError("its names are no tree")
        for key, x in flat.items():
            if not _is_finite(x):
                raise ValueError(f"{key} holds values that are not finite")
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} cannot be used ({one_line(error)})") from error
    return traverse_util.unflatten_dict(flat, sep="/"), card


def _is_finite(x: Any) -> bool:
    return not jnp.issubdtype(x.dtype, jnp.floating) or bool(np.isfinite(np.asarray(x)).all())


def _array(record: Mapping[str, Any]) -> np.ndarray:
    if record["dtype"] not in _DTYPES:
        raise ValueError(f"it holds {record['dtype']}, which no network here has")
    array = np.frombuffer(record["data"], _DTYPES[record["dtype"]])
    return array.reshape(record["shape"])


def check_shapes(what: str, params: PyTree, shapes: PyTree) -> None:
    """Makes sure that parameters are those of a network: numbers of its kind, of its shapes.

    Args:
        what: For the message: where they come from.
        params: Nested dictionaries of arrays.
        shapes: The same of `jax.ShapeDtypeStruct`, as the network wants them.

    Raises:
        InputError: If a parameter is missing, is one too many, or has another shape or kind.
    """
    have, want = (traverse_util.flatten_dict(tree, sep="/") for tree in (params, shapes))
    for key in sorted({*have, *want}):
        own, wanted = (tree[key].shape if key in tree else None for tree in (have, want))
        if own != wanted:
            raise InputError(
                f"{what} has {key} of shape {own}, the config's network {wanted}; "
                "use the config that it was made with"
            )
        own, wanted = (jnp.issubdtype(tree[key].dtype, jnp.floating) for tree in (have, want))
        if own != wanted:
            raise InputError(
                f"{what} has {key} as {have[key].dtype}, the config's network as "
                f"{want[key].dtype}; use the config that it was made with"
            )
