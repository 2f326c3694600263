"""Files made to hurt: each is refused in one line, in little time and memory."""

import io
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.io.reading import one_line, read_json, read_npz

MIB = 1 << 20


def npy(array: np.ndarray, **header) -> bytes:
    """An array file; its header may lie."""
    file = io.BytesIO()
    true = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, true | header)
    return file.getvalue() + array.tobytes()


def archive(path: Path, method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def test_what_numpy_writes_is_read(tmp_path):
    arrays = {
        "a": np.arange(12, dtype=np.int16).reshape(3, 4),
        "b": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "c": np.array(["ä", "bc"]),
        "d": np.float32(2.5),
        "e": np.zeros((0, 3), np.uint8),
        "f/g": np.array([True, False]),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays, other=np.ones(3))
        read = read_npz(tmp_path / "x.npz", list(arrays)[:-1], optional=("f/g", "absent"))
        assert list(read) == list(arrays)
        for name, array in arrays.items():
            assert read[name].dtype == array.dtype
            np.testing.assert_array_equal(read[name], array)


LIES = {
    "do not fill their 16 bytes": {"shape": (10**12,)},
    "of shape \\(-2, -2\\) do not fill": {"shape": (-2, -2)},
    "a hold nothing": {"shape": (10**12,), "descr": "<U0"},
    "a hold Python objects": {"descr": "|O", "shape": (2,)},
}


@pytest.mark.parametrize("message", LIES)
def test_headers_that_lie(tmp_path, message):
    body = np.zeros(0 if "nothing" in message else 4, np.float32)
    path = archive(tmp_path / "x.npz", a=npy(body, **LIES[message]))
    with pytest.raises(InputError, match=message) as error:
        read_npz(path, ["a"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path, method):
    path = archive(tmp_path / "x.npz", method, a=npy(np.zeros(4, np.float32)))
    with pytest.raises(InputError, match="compressed in another way than NumPy does"):
        read_npz(path, ["a"])


def test_an_encrypted_member_is_refused(tmp_path):
    path = archive(tmp_path / "x.npz", a=npy(np.zeros(4, np.float32)))
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.find(signature) + offset] |= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="encrypted"):
        read_npz(path, ["a"])


def test_names_from_the_file_stay_on_one_line(tmp_path):
    path = archive(tmp_path / "x.npz", **{"two\nlines": b"", "long" * 1000: b""})
    with pytest.raises(InputError, match="it lacks a; it holds two lines, long") as error:
        read_npz(path, ["a"])
    assert len(str(error.value)) < 300


# A child with little memory: what it asks for in vain ends in MemoryError, which is no InputError.
_READ = """
import resource, sys
from jaxdistill.errors import InputError
from jaxdistill.io.reading import read_npz
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
try:
    read_npz(sys.argv[1], ["a"])
except InputError as error:
    assert not isinstance(error.__cause__, MemoryError), "memory"
    print(error)
"""


@pytest.mark.parametrize("bomb", ["declared", "hidden", "header"])
def test_small_files_do_not_fill_the_memory(tmp_path, bomb):
    path = tmp_path / "x.npz"
    start = npy(np.zeros(4, np.float32))
    size = 1200 if bomb == "declared" else 600
    if bomb == "declared":
        start = npy(np.zeros(0, np.float32), shape=(size * MIB // 4,))
    elif bomb == "header":
        start = b"\x93NUMPY\x02\x00" + struct.pack("<I", size * MIB)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("a.npy", "w") as member,
    ):
        member.write(start)
        for _ in range(size):
            member.write(bytes(MIB))
    if bomb == "hidden":  # the archive declares the little that it does not hold
        content = bytearray(path.read_bytes())
        content[22:26] = struct.pack("<I", len(start))
        entry = content.find(b"PK\x01\x02")
        content[entry + 24 : entry + 28] = struct.pack("<I", len(start))
        path.write_bytes(content)
    run = subprocess.run(
        [sys.executable, "-c", _READ, path],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    assert {
        "declared": "its arrays take more than",
        "hidden": "Bad CRC-32",
        "header": "have a header of more than 10000 bytes",
    }[bomb] in run.stdout


# --- JSON -----------------------------------------------------------------------------------------


def test_json_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes('{"a": [1, 2.5, null, "ä"]}\n'.encode())
    assert read_json(path) == read_json(str(path)) == {"a": [1, 2.5, None, "ä"]}
    assert read_json(path, max_bytes=path.stat().st_size) == read_json(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is not JSON: Expecting value"),
        (b'{"a": ', "it is not JSON: Expecting value"),
        (b"\xff\xfe1\x00", "it is not JSON: 'utf-8' codec"),
        (b"[" * 100_000, "it is not JSON: maximum recursion depth"),
        (b"[NaN]", "it is not JSON: NaN is no JSON number"),
        (b"[-Infinity]", "it is not JSON: -Infinity is no JSON number"),
        (b"9" * 5000, "it is not JSON: Exceeds the limit"),
    ],
)
def test_what_is_no_json(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_json(path)
    assert "x.json" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "^No such file or directory$"),
        (os.mkdir, "^it is not a file of at most 64 MiB$"),
        (os.mkfifo, "^it is not a file of at most 64 MiB$"),
        (lambda path: path.touch() or os.truncate(path, 1 << 40), "not a file of at most 64 MiB"),
    ],
    ids=["nothing", "folder", "pipe", "huge"],
)
def test_what_is_no_file_of_json(tmp_path, make, message):
    make(tmp_path / "x.json")
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "x.json")


def test_a_name_that_no_system_takes():
    with pytest.raises(InputError, match="null byte"):
        read_json("a\0b")


def test_errors_become_one_line():
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(MemoryError()) == "MemoryError"
    assert len(one_line(ValueError("x" * 1000))) == 300
