"""Reading files that anyone may have made: nothing is unpickled, nothing explodes.

`numpy.load` refuses pickles too, but believes an array's header and every kind of compression: a
kilobyte of bzip2 fills gigabytes, and a damaged file raises whatever zipfile, zlib or NumPy's
parser run into. `json.loads` takes constants that are no JSON, and breaks on deep nesting.
"""

import io
import json
import math
import os
import stat
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdistill.errors import InputError

MAX_HEADER = 10_000  # bytes; NumPy's own limit, which it checks only after reading them all
MAX_JSON = 64 << 20  # bytes; names of many classes and accuracies of many seeds fit

_HEADERS = {
    (1, 0): (2, np.lib.format.read_array_header_1_0),
    (2, 0): (4, np.lib.format.read_array_header_2_0),
}


def one_line(error: BaseException) -> str:
    """What an error says, as one line of 300 letters at most; its kind if it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def inflation_limit(size: int) -> int:
    """The bytes that a file of `size` bytes may hold once inflated.

    Images and parameters shrink a few times, not a hundred; small files are trusted with 1 GiB.
    """
    return max(1 << 30, 100 * size)


def read_npz(
    path: str | os.PathLike[str],
    keys: Sequence[str],
    *,
    optional: Sequence[str] = (),
    check: Callable[[str, np.dtype, tuple[int, ...]], None] | None = None,
    max_bytes: int | None = None,
) -> dict[str, np.ndarray]:
    """Reads named arrays; others in the file are left alone.

    Sizes are checked before memory is taken: those that the archive declares, and that they agree
    with the arrays' headers.

    Args:
        path: The file.
        keys: Arrays that must be there.
        optional: Arrays that may be.
        check: Called with the name, dtype and shape of each array before it is read; raises an
            `InputError` when they are not what is wanted.
        max_bytes: Refuse arrays that would take more memory than this together.

    Raises:
        InputError: if the file is not such an archive, or not a whole one. The line does not name
            the file: that is left to the caller.
    """
    try:
        size = _size(path)
        if size is None:
            raise InputError("it is not a regular file")
        limit = inflation_limit(size)
        if max_bytes is not None:
            limit = min(limit, max_bytes)
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, keys, optional, limit)
            return {key: _array(archive, key, member, check) for key, member in members.items()}
    except InputError:
        raise
    # Damaged archives raise many kinds of errors; to the reader they are all the same fact.
    except Exception as error:
        raise InputError(_without_file(error)) from error


def read_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads the array of a `.npy`.

    Raises:
        InputError: if the file is none, or not a whole one. The line does not name the file: that
            is left to the caller.
    """
    try:
        size = _size(path)
        if size is None:
            raise InputError("it is not a regular file")
        with open(path, "rb") as file:
            _checked_header("the numbers", file, size)
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)
    except InputError:
        raise
    except Exception as error:  # as of archives
        raise InputError(_without_file(error)) from error


def npz_names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the arrays in a file; none if it is no archive."""
    try:
        if _size(path) is None:
            return []
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except Exception:  # `read_npz` tells what is wrong
        return []


def read_json(path: str | os.PathLike[str], *, max_bytes: int = MAX_JSON) -> Any:
    """Reads what a JSON file holds.

    Args:
        path: The file, in UTF-8.
        max_bytes: Refuse files that are larger, before reading them.

    Raises:
        InputError: if the file cannot be read, is larger, or is not JSON; NaN and infinities are
            none. The line does not name the file: that is left to the caller.
    """
    try:
        size = _size(path)
        if size is None or size > max_bytes:
            raise InputError(f"it is not a file of at most {max_bytes / 2**20:g} MiB")
        with open(path, "rb") as file:
            content = file.read(size)
    except InputError:
        raise
    except (OSError, MemoryError, ValueError) as error:  # such as names that no system takes
        raise InputError(_without_file(error)) from error
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is not JSON: {one_line(error)}") from error


def _size(path: str | os.PathLike[str]) -> int | None:
    """Bytes of a regular file; None for others: a pipe would be waited for, for ever."""
    status = os.stat(path)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _without_file(error: BaseException) -> str:
    """What an error says; of one of the system what went wrong, without the number and the file."""
    said = error.strerror if isinstance(error, OSError) else None
    return said or one_line(error)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _members(
    archive: zipfile.ZipFile, keys: Sequence[str], optional: Sequence[str], limit: int
) -> dict[str, zipfile.ZipInfo]:
    names = archive.namelist()
    found = {
        key: archive.getinfo(f"{key}.npy") for key in (*keys, *optional) if f"{key}.npy" in names
    }
    missing = [key for key in keys if key not in found]
    if missing:
        held = " ".join(", ".join(name.removesuffix(".npy") for name in names[:20]).split())
        raise InputError(f"it lacks {', '.join(missing)[:200]}; it holds {held[:200] or 'nothing'}")
    for key, member in found.items():
        if names.count(member.filename) > 1:
            raise InputError(f"it has {key!r} twice")
        # Of the other methods zipfile inflates whole blocks, whatever size the archive declares.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(
                f"{key} are compressed in another way than NumPy does; "
                "write them with numpy.savez or numpy.savez_compressed"
            )
    if sum(member.file_size for member in found.values()) > limit:
        raise InputError(f"its arrays take more than {limit} bytes")
    return found


def _array(
    archive: zipfile.ZipFile, key: str, member: zipfile.ZipInfo, check: Callable | None
) -> np.ndarray:
    with archive.open(member) as file:
        _checked_header(key, file, member.file_size, check)
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _checked_header(
    key: str, file: io.BufferedIOBase, size: int, check: Callable | None = None
) -> None:
    """Makes sure that what is behind a header is what it says, before memory is taken for it."""
    dtype, shape = _header(key, file)
    if check is not None:
        check(key, dtype, shape)
    if dtype.hasobject:
        raise InputError(f"{key} hold Python objects, which are never unpickled")
    body = size - file.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != body:
        raise InputError(f"{key} of shape {shape} do not fill their {body} bytes")
    if dtype.itemsize == 0:
        raise InputError(f"{key} hold nothing: they are {dtype}")


def _header(key: str, file: io.BufferedIOBase) -> tuple[np.dtype, tuple[int, ...]]:
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise InputError(f"{key} are in version {version} of the npy format, not (1, 0) or (2, 0)")
    width, parse = _HEADERS[version]
    length = file.read(width)
    if int.from_bytes(length, "little") > MAX_HEADER:
        raise InputError(f"{key} have a header of more than {MAX_HEADER} bytes")
    shape, _, dtype = parse(io.BytesIO(length + file.read(int.from_bytes(length, "little"))))
    return dtype, shape
