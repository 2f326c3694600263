"""Tensors of PyTorch models on disk: one `.safetensors` file, or shards and their index.

Libraries differ in the stem of the names: `model` in transformers, `diffusion_pytorch_model` in
diffusers.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.numpy

from jaxdistill.errors import InputError
from jaxdistill.io.files import dump, write_files
from jaxdistill.io.reading import one_line, read_json

SHARD_BYTES = 5 * 10**9
_NAMED = 4  # how many names an error lists


class Tensors(Mapping):
    """The tensors of open files, read when they are taken."""

    def __init__(self, files: Mapping[str, Any]):
        self._files = files

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._files[name]
        try:
            return file.get_tensor(name)
        # What NumPy has no type for ends as one of many errors.
        except Exception as error:
            raise InputError(f"{name} cannot be read ({one_line(error)})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def files_of(path: Path, stem: str) -> list[Path]:
    """The files that tensors lie in: `path` if it is a file, else those of a folder, index first.

    Raises:
        InputError: If there are none, or the index is none.
    """
    file, index = path / f"{stem}.safetensors", _index(path, stem)
    if path.is_file() or file.is_file():
        return [path if path.is_file() else file]
    if not index.is_file():
        raise InputError(f"{path} is no file, and no folder with {file.name} or {index.name}")
    return [index, *(path / name for name in sorted(set(_weight_map(index).values())))]


def opened(path: Path, stack: contextlib.ExitStack, stem: str) -> Tensors:
    """The tensors of a file or folder, open as long as the stack is.

    Args:
        path: A `.safetensors` file, or a folder.
        stack: Closes the files.
        stem: What the names of files in a folder begin with.

    Raises:
        InputError: If there are none, or they are damaged.
    """
    first, *shards = files_of(path, stem)
    if not shards and first.suffix != ".json":
        file = _open(first, stack)
        return Tensors(dict.fromkeys(file.keys(), file))
    where = _weight_map(first)
    files = {shard.name: _open(shard, stack) for shard in shards}
    held = {name: set(file.keys()) for name, file in files.items()}
    lost = sorted(key for key, name in where.items() if key not in held[name])
    if lost:
        raise InputError(f"{first} names {some(lost)}, and its shards lack them; copy all again")
    return Tensors({key: files[name] for key, name in where.items()})


def write_tensors(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    stem: str,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes tensors, every file whole or not at all.

    What takes no more than `shard_bytes` is one `STEM.safetensors`; else there are shards
    `STEM-00001-of-00003.safetensors` and so on, and `STEM.safetensors.index.json`, which is
    written last.

    Args:
        folder: Made if missing.
        tensors: name -> array.
        stem: What the names of the files begin with.
        shard_bytes: How many bytes of tensors a file holds at most; a tensor is never split.

    Raises:
        InputError: If the files cannot be written, or if the folder has other weights, which a
            reader could take for these.
    """
    shards = _shards(tensors, shard_bytes)
    files = {f"{stem}.safetensors": shards[0]}
    if len(shards) > 1:
        count = len(shards)
        files = {f"{stem}-{i:05}-of-{count:05}.safetensors": x for i, x in enumerate(shards, 1)}
    index = _index(folder, stem)
    others = {path.name for path in folder.glob(f"{stem}*.safetensors*")}
    others -= {*files, *((index.name,) if len(shards) > 1 else ())}
    if others:
        raise InputError(
            f"{folder} holds {some(sorted(others))} of other weights; give another folder"
        )
    writers = {
        folder / name: functools.partial(_write, {key: tensors[key] for key in keys})
        for name, keys in files.items()
    }
    if len(shards) > 1:
        size = sum(x.nbytes for x in tensors.values())
        where = {key: name for name, keys in files.items() for key in keys}
        writers[index] = functools.partial(
            dump, {"metadata": {"total_size": size}, "weight_map": where}
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_files(writers)
    except OSError as error:
        where = error.filename or folder
        raise InputError(f"cannot write {where}: {error.strerror or error}") from error


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def some(names: Sequence[str]) -> str:
    """The first few of some names, for a message."""
    return ", ".join(names[:_NAMED])[:300] + (" and more" if len(names) > _NAMED else "")


def _index(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.safetensors.index.json"


def _open(file: Path, stack: contextlib.ExitStack) -> Any:
    if not file.is_file():
        raise InputError(f"{file} is no file")
    try:
        return stack.enter_context(safetensors.safe_open(os.fspath(file), "np"))
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged ({one_line(error)}); copy it again") from error


def _weight_map(index: Path) -> dict[str, str]:
    try:
        read = read_json(index)
    except InputError as error:
        raise InputError(f"{index} is no index of shards ({error})") from error
    where = read.get("weight_map") if isinstance(read, dict) else None
    # A shard lies beside the index: a name is not a way to other folders.
    if not isinstance(where, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in where.values()
    ):
        raise InputError(f"{index} is no index of shards (weight_map must name files beside it)")
    return where


def _shards(tensors: Mapping[str, np.ndarray], limit: int) -> list[list[str]]:
    """The names of the tensors that come into each file, in their order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, x in tensors.items():
        if shards[-1] and size + x.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += x.nbytes
    return shards


def _write(tensors: Mapping[str, np.ndarray], file: BinaryIO) -> None:
    whole = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    # Readers of PyTorch's side ask whose layout it is.
    file.write(safetensors.numpy.save(whole, metadata={"format": "pt"}))
