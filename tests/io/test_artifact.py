"""The distilled set on disk: round trips, refusals, killed saves, damaged files."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from jaxdistill.errors import InputError
from jaxdistill.io.artifact import FORMAT, REQUIRED, Distilled, load, save
from jaxdistill.io.pictures import grid
from jaxdistill.io.versions import versions

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def _digits(per_class: int, *, soft: bool = False, first: int = 0, **fields) -> Distilled:
    bunch = load_digits()
    order = np.concatenate(
        [np.flatnonzero(bunch.target == c)[first : first + per_class] for c in range(10)]
    )
    images = (bunch.images[order, :, :, None] / 16).astype(np.float32)
    labels = bunch.target[order].astype(np.int32)
    soft_labels = learned = None
    if soft:
        soft_labels = np.full((len(labels), 10), 0.02, np.float32)
        soft_labels[np.arange(len(labels)), labels] = 0.82
        learned = 3 * soft_labels - 1
    card = {
        "format": FORMAT,
        "dataset": "digits",
        "class_names": [str(c) for c in range(10)],
        "mean": [0.3053],
        "std": [0.3760],
        "method": "random",
        "ipc": per_class,
        "factor": 1,
        "config_hash": "0" * 8,
        "seeds": {"distill": 0},
        "accuracies": [],
        "provenance": {"source_sha256": "ab", "versions": versions()},
    }
    return Distilled(images, labels, soft_labels, {**card, **fields}, learned)


ARRAYS = ("images", "labels", "soft_labels", "learned_labels")
OPTIONAL = {"soft_labels", "learned_labels"}


def _same(a: Distilled, b: Distilled) -> bool:
    return all(
        (x is None and y is None)
        or (x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y))
        for x, y in ((getattr(a, key), getattr(b, key)) for key in ARRAYS)
    )


def _with_arrays(directory: Path, **arrays) -> Path:
    directory.mkdir(exist_ok=True)
    np.savez(directory / "distilled.npz", **arrays)
    return directory


# --- round trips ----------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_round_trip(tmp_path, soft):
    written = _digits(3, soft=soft)
    save(tmp_path / "new" / "artifacts", written)
    directory = tmp_path / "new" / "artifacts"
    assert sorted(os.listdir(directory)) == ["distilled.json", "distilled.npz", "distilled.png"]
    for path in (directory, str(directory), directory / "distilled.npz"):
        read = load(path)
        assert _same(read, written)
        assert {k: v for k, v in read.card.items() if k != "content_sha256"} == written.card
    with np.load(directory / "distilled.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"images", "labels"} | (OPTIONAL if soft else set())
    picture = np.asarray(Image.open(directory / "distilled.png"))
    np.testing.assert_array_equal(
        picture, grid(written.images, written.labels, written.card["class_names"])
    )


def test_saving_what_was_loaded_changes_nothing(tmp_path):
    save(tmp_path / "a", _digits(2, soft=True))
    save(tmp_path / "b", load(tmp_path / "a"))
    assert _same(load(tmp_path / "a"), load(tmp_path / "b"))
    assert load(tmp_path / "a").card == load(tmp_path / "b").card


def test_content_hash_is_the_documented_one(tmp_path):
    written = _digits(2, soft=True)
    # Memory order is not content.
    save(tmp_path, written._replace(images=np.asfortranarray(written.images)))
    text = b"images <f4 20,8,8,1\n" + written.images.astype("<f4").tobytes()
    text += b"labels <i4 20\n" + written.labels.astype("<i4").tobytes()
    text += b"soft_labels <f4 20,10\n" + written.soft_labels.astype("<f4").tobytes()
    text += b"learned_labels <f4 20,10\n" + written.learned_labels.astype("<f4").tobytes()
    assert load(tmp_path).card["content_sha256"] == hashlib.sha256(text).hexdigest()


def test_arrays_load_without_a_card(tmp_path):
    written = _digits(2)
    save(tmp_path, written)
    (tmp_path / "distilled.json").unlink()
    read = load(tmp_path)
    assert _same(read, written) and read.card == {}


def test_card_takes_array_scalars_and_non_ascii_names(tmp_path):
    names = ("é", *"123456789")
    save(tmp_path, _digits(2, class_names=names, mean=np.float32([0.25]), ipc=np.int64(2)))
    card = load(tmp_path).card
    assert (card["class_names"], card["mean"], card["ipc"]) == (list(names), [0.25], 2)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_examples_read_it(tmp_path, library):
    pytest.importorskip(library)
    save(tmp_path / "artifacts", _digits(2))
    script = EXAMPLES / f"read_with_{library.replace('torch', 'pytorch')}.py"
    run = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("digits ")
    assert ("(20, 8, 8, 1) float32" if library == "numpy" else "[20, 1, 8, 8]") in run.stdout


# --- refusals -------------------------------------------------------------------------------

ARRAY_FAULTS = {
    "not finite": ("images", lambda a: np.where(a == a.max(), np.nan, a).astype(np.float32)),
    "not in [0, 1]": ("images", lambda a: a * 2),
    "[-1, 1]": ("images", lambda a: a * 2 - 1),
    "images are uint8, not float32": ("images", lambda a: a.astype(np.uint8)),
    "images are float64": ("images", lambda a: a.astype(np.float64)),
    "images are >f4": ("images", lambda a: a.astype(">f4")),
    "images have 3 dimensions, not 4": ("images", lambda a: a[..., 0]),
    "19 images but 20 labels": ("images", lambda a: a[1:]),
    "are empty": ("images", lambda a: a[:, :0]),
    "labels are int64, not int32": ("labels", lambda a: a.astype(np.int64)),
    "labels have 2 dimensions": ("labels", lambda a: a[:, None]),
    "class ids start at 0": ("labels", lambda a: a - 1),
    "labels hold 10 but soft_labels know 10": ("labels", lambda a: a + 1),
    "rows must be >= 0 and sum to 1": ("soft_labels", lambda a: a * 0.9),
    "soft_labels are not probabilities": ("soft_labels", lambda a: 2 * a - 0.1),
    "soft_labels hold values that are not finite": ("soft_labels", lambda a: a * np.float32("inf")),
    "labels hold 9 but learned_labels know 9": ("learned_labels", lambda a: a[:, 1:]),
    "20 images but 19 learned_labels": ("learned_labels", lambda a: a[1:]),
    "learned_labels hold values that are not": ("learned_labels", lambda a: a * np.float32("nan")),
}


@pytest.mark.parametrize("message", ARRAY_FAULTS)
def test_wrong_arrays_are_neither_saved_nor_loaded(tmp_path, message):
    key, spoil = ARRAY_FAULTS[message]
    good = _digits(2, soft=True)
    bad = good._replace(**{key: spoil(getattr(good, key))})
    with pytest.raises(InputError, match=re.escape(message)) as error:
        save(tmp_path / "saved", bad)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "saved").exists()
    path = _with_arrays(tmp_path / "forged", **{key: getattr(bad, key) for key in ARRAYS})
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load(path)
    assert str(error.value).startswith(f"not a jaxdistill artefact: {path}")
    assert str(error.value).endswith(
        "; expected distilled.npz with images and labels, as written by jaxdistill"
    )


CARD_FAULTS = {
    "format must be 'jaxdistill.distilled/1', not 'jaxdistill.distilled/2'": {
        "format": "jaxdistill.distilled/2"
    },
    "dataset must be a string": {"dataset": 3},
    "class_names must be a list of strings": {"class_names": [0, 1]},
    "labels hold 9 but class_names are 9": {"class_names": list("012345678")},
    "soft_labels know 10 classes but class_names are 11": {"class_names": list("0123456789a")},
    "mean must be 1 finite numbers": {"mean": [0.1, 0.2, 0.3]},
    "std must be 1 finite numbers above 0": {"std": [0]},
    "mean must be 1 finite numbers, not [1000": {"mean": [10**400]},
    "method must be a string": {"method": None},
    "ipc must be a whole number above 0": {"ipc": 0},
    "factor must be a whole number above 0": {"factor": True},
    "config_hash must be": {"config_hash": 1},
    "seeds must be an object": {"seeds": [1]},
    "accuracies must be a list or an object": {"accuracies": "0.9"},
    "provenance must be an object": {"provenance": []},
}


@pytest.mark.parametrize("message", CARD_FAULTS)
def test_wrong_cards_are_neither_saved_nor_loaded(tmp_path, message):
    good = _digits(2, soft=True)
    bad = good._replace(card={**good.card, **CARD_FAULTS[message]})
    with pytest.raises(InputError, match=re.escape(message)):
        save(tmp_path / "saved", bad)
    assert not (tmp_path / "saved").exists()
    save(tmp_path, good)
    card = {**load(tmp_path).card, **CARD_FAULTS[message]}
    (tmp_path / "distilled.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match=re.escape(message)):
        load(tmp_path)


@pytest.mark.parametrize("field", REQUIRED)
def test_a_card_without_a_required_field_is_refused(tmp_path, field):
    save(tmp_path, _digits(2))
    card = load(tmp_path).card
    del card[field]
    (tmp_path / "distilled.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match=f"the card lacks {field};"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"format": "jaxd', "is not JSON"),
        (b"\xff\xfe\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"ipc": NaN}', "NaN is no JSON number"),
        (b'{"ipc": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
def test_cards_that_are_no_cards(tmp_path, content, message):
    save(tmp_path, _digits(2))
    (tmp_path / "distilled.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), object(), "\ud800"])
def test_a_card_that_json_cannot_hold_is_not_saved(tmp_path, value):
    with pytest.raises(InputError, match="the card cannot be written as JSON"):
        save(tmp_path / "new", _digits(2, note=value))
    assert not (tmp_path / "new").exists()


def test_arrays_of_another_card_are_noticed(tmp_path):
    save(tmp_path / "a", _digits(2))
    save(tmp_path / "b", _digits(2, first=2))
    shutil.copy(tmp_path / "a" / "distilled.npz", tmp_path / "b" / "distilled.npz")
    with pytest.raises(InputError, match="content_sha256 differs"):
        load(tmp_path / "b")


def test_missing_files(tmp_path):
    for path in (tmp_path, tmp_path / "distilled.npz", tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"No such file.*expected distilled\.npz"):
            load(path)


def test_other_peoples_npz(tmp_path):
    with pytest.raises(InputError, match="it lacks images, labels; it holds x_train, y_train"):
        load(_with_arrays(tmp_path, x_train=np.zeros((2, 8, 8)), y_train=np.zeros(2)))
    with pytest.raises(InputError, match="it lacks labels; it holds images"):
        load(_with_arrays(tmp_path, images=np.zeros((2, 8, 8, 1), np.float32)))


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the distilled set"):
        save(tmp_path / "file" / "artifacts", _digits(2))


# --- hostile files --------------------------------------------------------------------------


class _Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_pickles_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = _with_arrays(tmp_path, images=np.array([_Bomb()]), labels=np.zeros(1, np.int32))
    with pytest.raises(InputError, match="images are object, not float32"):
        load(path)
    assert not (tmp_path / "exploded").exists()


def _npy(shape: tuple[int, ...], payload: bytes, descr: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + payload


def test_sizes_are_checked_before_memory_is_taken(tmp_path):
    labels = _npy((1,), bytes(4), "<i4")
    path = tmp_path / "distilled.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", _npy((1 << 40, 1, 1, 1), bytes(4)))
        archive.writestr("labels.npy", labels)
    with pytest.raises(InputError, match="do not fill their"):
        load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", _npy((1, 1 << 20, 1, 1), bytes(1 << 22)))
        archive.writestr("labels.npy", labels)
    assert path.stat().st_size < 10_000
    with pytest.raises(InputError, match="take more than 1000000 bytes"):
        load(path, max_bytes=1_000_000)
    assert load(path).images.shape == (1, 1 << 20, 1, 1)


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "distilled.npz")
    with pytest.raises(InputError, match="it is not a regular file"):
        load(tmp_path)
    (tmp_path / "distilled.npz").unlink()
    save(tmp_path, _digits(1))
    (tmp_path / "distilled.json").unlink()
    os.mkfifo(tmp_path / "distilled.json")
    with pytest.raises(InputError, match=r"distilled\.json .*is not a file of at most 64 MiB"):
        load(tmp_path)


def test_a_huge_card_is_not_read(tmp_path):
    save(tmp_path, _digits(1))
    os.truncate(tmp_path / "distilled.json", 1 << 40)  # sparse
    with pytest.raises(InputError, match=r"distilled\.json .*is not a file of at most 64 MiB"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "distilled.npz", "w") as archive:
        archive.writestr("labels.npy", _npy((1,), bytes(4), "<i4"))
        for _ in range(2):
            archive.writestr("images.npy", _npy((1, 1, 1, 1), bytes(4)))
    with pytest.raises(InputError, match="'images' twice"):
        load(tmp_path)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    directory = tmp_path_factory.mktemp("intact")
    save(directory, _digits(1, soft=True))
    (directory / "distilled.json").unlink()
    return load(directory), (directory / "distilled.npz").read_bytes()


def _refused_or(expected: Distilled | None, directory: Path, content: bytes) -> None:
    path = directory / "damaged.npz"
    path.write_bytes(content)
    try:
        read = load(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert expected is not None and _same(read, expected)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused(tmp_path_factory, content, like_zip):
    prefix = b"PK\x03\x04" if like_zip else b""
    _refused_or(None, tmp_path_factory.getbasetemp(), prefix + content)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_truncated_files_are_refused(tmp_path_factory, intact, data):
    _, content = intact
    cut = data.draw(st.integers(0, len(content) - 1))
    _refused_or(None, tmp_path_factory.getbasetemp(), content[:cut])


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_flipped_bytes_are_refused_or_harmless(tmp_path_factory, intact, data):
    expected, content = intact
    damaged = bytearray(content)
    flips = st.tuples(st.integers(0, len(content) - 1), st.integers(1, 255))
    for position, mask in data.draw(st.lists(flips, min_size=1, max_size=4)):
        damaged[position] ^= mask
    # A name that no longer reads soft_labels hides that array, and only a card can tell.
    hidden = [
        expected._replace(**dict.fromkeys(keys))
        for keys in ((), ("soft_labels",), ("learned_labels",), OPTIONAL)
    ]
    path = tmp_path_factory.getbasetemp() / "flipped.npz"
    path.write_bytes(damaged)
    try:
        read = load(path)
    except InputError:
        return
    assert any(_same(read, other) for other in hidden)


@settings(deadline=None, max_examples=150)
@given(header=st.binary(max_size=120), version=st.sampled_from([b"\x01\x00", b"\x02\x00"]))
def test_any_array_header_is_refused(tmp_path_factory, header, version):
    size = len(header).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    path = tmp_path_factory.getbasetemp() / "header.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY" + version + size + header + bytes(16))
        archive.writestr("labels.npy", _npy((1,), bytes(4), "<i4"))
    with pytest.raises(InputError):
        load(path)


# --- a killed save --------------------------------------------------------------------------

_KILLED_SAVE = """
import os, sys
from jaxdistill.io.artifact import load, save

renames, replace = 0, os.replace

def replace_or_die(*names):
    global renames
    if renames == int(sys.argv[3]):
        os._exit(9)
    renames += 1
    replace(*names)

os.replace = replace_or_die
save(sys.argv[2], load(sys.argv[1]))
"""


@pytest.mark.parametrize("renames", range(4))
@pytest.mark.parametrize("over_an_old_one", [True, False])
def test_a_killed_save_leaves_no_mixture(tmp_path, renames, over_an_old_one):
    old, new = _digits(1), _digits(1, first=1, method="herding")
    save(tmp_path / "source", new)
    if over_an_old_one:
        save(tmp_path / "target", old)
    code = subprocess.run(
        [sys.executable, "-c", _KILLED_SAVE, tmp_path / "source", tmp_path / "target", str(renames)]
    ).returncode
    assert code == (9 if renames < 3 else 0)
    if renames == 0 and over_an_old_one:
        read = load(tmp_path / "target")
        assert _same(read, old) and read.card["method"] == "random"
    elif renames < 3:
        with pytest.raises(InputError):
            load(tmp_path / "target")
        save(tmp_path / "target", new)
    if renames > 0:
        read = load(tmp_path / "target")
        assert _same(read, new) and read.card["method"] == "herding"


def test_a_failed_save_changes_nothing(tmp_path):
    save(tmp_path, _digits(1))
    (tmp_path / "distilled.json").unlink()
    (tmp_path / "distilled.json").mkdir()  # cannot be replaced by a file
    before = (tmp_path / "distilled.npz").read_bytes()
    with pytest.raises(InputError, match="cannot write the distilled set"):
        save(tmp_path, _digits(2))
    assert (tmp_path / "distilled.npz").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["distilled.json", "distilled.npz", "distilled.png"]
