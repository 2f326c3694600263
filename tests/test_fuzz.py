"""Whatever a file or a flag says ends in a result that holds together, or in one clear line.

Any other exception, a warning of this package among them, fails a test; so does a hang.
"""

import gzip
import io
import json
import shutil
import struct
import tarfile
import zlib

import ml_collections
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from sklearn.datasets import load_digits

from jaxdistill import config as configs
from jaxdistill import settings
from jaxdistill.data import sources
from jaxdistill.errors import InputError
from jaxdistill.eval import results
from jaxdistill.io import artifact
from jaxdistill.io.writers import JsonlWriter


def fuzz(examples):
    return hypothesis_settings(
        max_examples=examples,
        derandomize=True,
        deadline=10_000,
        # One folder for all examples of a test: each overwrites the file of the one before.
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


def outcome(call, *args, **kwargs):
    """What a call returns, or None when it refuses its input in one line."""
    try:
        return call(*args, **kwargs)
    except InputError as error:
        assert str(error).isprintable(), repr(str(error))
        assert 0 < len(str(error)) < 1500
        return None


NUMBERS = [0, 1, 2, 7, 28, 0x7FFFFFFF, 0xFFFFFFFF, 0x10000, 0xFF]


@st.composite
def damaged(draw, content):
    """The content with a few bytes changed, cut away, put in twice, or numbers written over it."""
    out = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(out)))
        kind = draw(st.sampled_from(["flip", "number", "cut", "drop", "repeat", "insert"]))
        if kind == "flip":
            out[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "number":
            order = draw(st.sampled_from("<>"))
            out[at : at + 4] = struct.pack(f"{order}I", draw(st.sampled_from(NUMBERS)))
        elif kind == "cut":
            del out[at:]
        elif kind == "drop":
            del out[at : at + draw(st.integers(1, 16))]
        elif kind == "repeat":
            out[at:at] = out[at : at + draw(st.integers(1, 64))]
        else:
            out[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(out)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**300, 10**320)
    | st.floats()
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


# --- config strings -------------------------------------------------------------------------------

NAMES = ["dataset", "ipc", "method", "baselines", "sampler", "seed", "smoke", "learned", "dm+start"]
NAMES += ["digits", "10", "-1"]
ARGUMENT = st.lists(
    st.sampled_from([*NAMES, "=", ",", ":", " ", "\u0661", "\n", "1e9"]), max_size=9
).map("".join) | st.text(max_size=30)


@fuzz(150)
@given(ARGUMENT)
def test_config_arguments(argument):
    config = outcome(configs.load, f"ncfm:{argument}")
    if config is not None:
        assert type(config.seed) is int and type(config.method.ipc) is int
        json.dumps(config.to_dict(), default=list)


@fuzz(200)
@given(st.text(max_size=300) | st.sampled_from(["a" * 300, ".", "/", "README.md", "/dev/null"]))
def test_config_names(name):
    if name.partition(":")[0] not in configs.shipped():
        assert outcome(configs.load, name) is None


CONFIG = configs.load("ncfm")


def settings_of(node, prefix=""):
    for name, value in node.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield prefix + name
            yield from settings_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name


SETTINGS = list(settings_of(CONFIG))
VALUES = st.one_of(
    st.text(max_size=20),
    JSON.map(repr),
    st.lists(st.sampled_from(["random", "start", 1, None, ("a",)]), max_size=3).map(
        lambda x: repr(tuple(x))
    ),
    st.sampled_from(
        ["true", "None", "1e999", "-1", "1_000", "0x10", "b''", "{1, 2}", "...", "1+2j"]
    ),
    st.sampled_from(["{[]: 1}", "{{}}", "{'.': 1}", "lambda: 1", "f'{1}'", "\0", "\ud800"]),
    st.sampled_from(["__import__('os')", "open('/etc/passwd')", "().__class__", "9" * 30]),
    st.sampled_from(["(" * 3000, "-" * 5000 + "1", "[" * 90 + "]" * 90, "9" * 5000]),
)


@fuzz(300)
@given(st.sampled_from(SETTINGS), VALUES)
def test_overrides(path, text):
    config = configs.load("ncfm")
    outcome(configs.override, config, path, text)
    *groups, name = path.split(".")
    before, after = CONFIG, config
    for group in groups:
        before, after = before[group], after[group]
    like = {list: tuple}.get(type(before[name]), type(before[name]))
    known = lambda: settings.keyword(CONFIG.to_dict(), path.split("."))  # noqa: E731
    assert (
        {list: tuple}.get(type(after[name]), type(after[name])) is like
        or None in (after[name], before[name])
        or (isinstance(after[name], tuple) and after[name] and known().or_many)
    )
    if after[name] is None:
        assert known().optional
    if isinstance(after[name], tuple):
        assert all(isinstance(x, str | int | float) for x in after[name])
    json.dumps(config.to_dict(), default=list)


@fuzz(200)
@given(st.sampled_from(SETTINGS), st.text(max_size=10) | st.sampled_from([".", "..", ".x", "_"]))
def test_settings_that_there_are_not(path, more):
    if path + more not in SETTINGS:
        assert outcome(configs.override, configs.load("ncfm"), path + more, "1") is None


# --- artefacts ------------------------------------------------------------------------------------

DIGITS = load_digits()
ORDER = np.argsort(DIGITS.target, kind="stable")[::60]
IMAGES = DIGITS.images[ORDER, :, :, None]
LABELS = DIGITS.target[ORDER].astype(np.int32)
CARD = {
    "dataset": "digits",
    "class_names": [str(c) for c in range(10)],
    "mean": [0.3053],
    "std": [0.3760],
    "method": "random",
    "ipc": 3,
    "factor": 1,
    "config_hash": "0" * 8,
    "seeds": {"condense": 0},
    "accuracies": [],
    "provenance": {},
}


@pytest.fixture
def saved(tmp_path):
    soft = np.full((len(LABELS), 10), 0.1, np.float32)
    images = (IMAGES / 16).astype(np.float32)
    artifact.save(tmp_path, artifact.Distilled(images, LABELS, soft, dict(CARD)))
    return tmp_path


def same_arrays(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


@fuzz(150)
@given(data=st.data())
def test_damaged_artefacts(saved, data):
    intact = artifact.load(saved / "distilled.npz")
    name = data.draw(st.sampled_from(["distilled.npz", "distilled.json"]))
    content = (saved / name).read_bytes()
    try:
        (saved / name).write_bytes(data.draw(damaged(content)))
        read = outcome(artifact.load, saved)
        # The card carries the hash of the arrays: what is read is what was written.
        assert read is None or same_arrays(read, intact)
    finally:
        (saved / name).write_bytes(content)


@fuzz(100)
@given(field=st.sampled_from([*artifact.REQUIRED, "content_sha256", "note"]), value=JSON)
def test_forged_cards(saved, field, value):
    path = saved / "distilled.json"
    content = path.read_bytes()
    try:
        path.write_text(json.dumps(json.loads(content) | {field: value}))
        read = outcome(artifact.load, saved)
        if read is not None:
            assert read.card[field] == value
            outcome(artifact.save, saved / "again", read)
    finally:
        path.write_bytes(content)


# --- data sets ------------------------------------------------------------------------------------


def check(dataset):
    """What every later stage relies on."""
    for images, labels in (dataset.train, dataset.test):
        assert images.dtype == np.uint8 and images.ndim == 4 and images.size > 0
        assert labels.dtype == np.int32 and labels.shape == images.shape[:1]
        assert 0 <= labels.min() <= labels.max() < dataset.num_classes
    assert set(dataset.train.labels.tolist()) == set(range(dataset.num_classes))
    assert np.isfinite(dataset.mean).all() and min(dataset.std) > 0


SMALL = (IMAGES.astype(np.uint8), LABELS, IMAGES[::3].astype(np.uint8), LABELS[::3])
IDX = {}
for prefix, images, labels in (("train", *SMALL[:2]), ("t10k", *SMALL[2:])):
    for kind, array in (("images-idx3", images[..., 0]), ("labels-idx1", labels)):
        shape = struct.pack(f">{array.ndim}I", *array.shape)
        IDX[f"{prefix}-{kind}-ubyte"] = (
            bytes((0, 0, 8, array.ndim)) + shape + array.astype(np.uint8).tobytes()
        )


@fuzz(200)
@given(
    name=st.sampled_from(list(IDX)),
    packed=st.sampled_from(["no", "outside", "inside"]),
    data=st.data(),
)
def test_damaged_idx_files(tmp_path, name, packed, data):
    shutil.rmtree(tmp_path / "idx", ignore_errors=True)
    (tmp_path / "idx").mkdir()
    for other, content in IDX.items():
        (tmp_path / "idx" / other).write_bytes(content)
    path = tmp_path / "idx" / name
    if packed == "no":
        path.write_bytes(data.draw(damaged(IDX[name])))
    else:
        path.unlink()
        inner = data.draw(damaged(IDX[name])) if packed == "inside" else IDX[name]
        content = gzip.compress(inner, mtime=0)
        if packed == "outside":
            content = data.draw(damaged(content))
        path.with_name(f"{name}.gz").write_bytes(content)
    dataset = outcome(sources.load, tmp_path / "idx")
    if dataset is not None:
        check(dataset)


@fuzz(100)
@given(st.lists(st.sampled_from(NUMBERS), min_size=3, max_size=3), st.integers(0, 16))
def test_forged_idx_headers(tmp_path, sizes, magic):
    for other, content in IDX.items():
        (tmp_path / other).write_bytes(content)
    body = IDX["train-images-idx3-ubyte"][16:]
    forged = bytes((0, 0, 8 if magic else 9, magic % 5)) + struct.pack(">3I", *sizes) + body
    (tmp_path / "train-images-idx3-ubyte").write_bytes(forged)
    assert outcome(sources.load, tmp_path) is None


KEYS = ("train_images", "train_labels", "test_images", "test_labels")


@fuzz(200)
@given(data=st.data(), save=st.sampled_from([np.savez, np.savez_compressed]))
def test_damaged_npz_data_sets(tmp_path, data, save):
    file = io.BytesIO()
    save(file, **dict(zip(KEYS, SMALL, strict=True)), class_names=np.array(list("abcdefghij")))
    (tmp_path / "x.npz").write_bytes(data.draw(damaged(file.getvalue())))
    dataset = outcome(sources.load, tmp_path / "x.npz")
    if dataset is not None:
        check(dataset)


ANY_ARRAY = arrays.arrays(
    st.one_of(
        arrays.unsigned_integer_dtypes(),
        arrays.integer_dtypes(),
        arrays.floating_dtypes(),
        arrays.boolean_dtypes(),
        arrays.complex_number_dtypes(),
        arrays.datetime64_dtypes(),
        arrays.unicode_string_dtypes(max_len=4),
        arrays.byte_string_dtypes(max_len=4),
        arrays.nested_dtypes(),
    ),
    arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
)


@fuzz(100)
@given(key=st.sampled_from([*KEYS, "class_names"]), array=ANY_ARRAY)
@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
def test_npz_data_sets_of_other_arrays(tmp_path, key, array):
    np.savez(tmp_path / "x.npz", **dict(zip(KEYS, SMALL, strict=True)) | {key: array})
    dataset = outcome(sources.load, tmp_path / "x.npz")
    if dataset is not None:
        check(dataset)


@fuzz(50)
@given(st.lists(st.integers(0, 0xFFFFFFFF), min_size=10, max_size=10))
def test_class_names_that_are_no_text(tmp_path, points):
    names = np.array(points, np.uint32).view("<U1")
    np.savez(tmp_path / "x.npz", **dict(zip(KEYS, SMALL, strict=True)), class_names=names)
    outcome(sources.load, tmp_path / "x.npz")


def encoded(mode, kind):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def with_checksums(content):
    """Checksums that fit the chunks of a PNG: else nothing behind them would ever be tried."""
    out, at = bytearray(content[:8]), 8
    while at + 12 <= len(content):
        end = at + 8 + struct.unpack(">I", content[at : at + 4])[0]
        if end + 4 > len(content):
            break
        out += content[at:end] + struct.pack(">I", zlib.crc32(content[at + 4 : end]))
        at = end + 4
    return bytes(out + content[at:])


PICTURES = [encoded(mode, "PNG") for mode in ("RGB", "L", "P", "RGBA", "1")]
PICTURES += [encoded(mode, "JPEG") for mode in ("RGB", "L", "CMYK")]


@fuzz(120)
@given(data=st.data(), sealed=st.booleans(), image_size=st.sampled_from([None, 8]))
@pytest.mark.filterwarnings("ignore")  # of Pillow, on what it repairs
def test_damaged_pictures(tmp_path, data, sealed, image_size):
    for split in ("train", "test"):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / split / label / "0.png").write_bytes(PICTURES[0])
    content = data.draw(st.sampled_from(PICTURES).flatmap(damaged))
    if sealed and content.startswith(b"\x89PNG"):
        content = with_checksums(content)
    (tmp_path / "train" / "a" / "1.png").write_bytes(content)
    dataset = outcome(sources.load, tmp_path, image_size=image_size)
    if dataset is not None:
        check(dataset)


def packed(form):
    """A training and a test file of a form, with the pictures and the digits."""
    for images, labels in (SMALL[:2], SMALL[2:]):
        files = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image[..., 0]).save(file, "PNG")
            files.append(file.getvalue())
        out = io.BytesIO()
        if form == "tar":
            with tarfile.open(fileobj=out, mode="w") as archive:
                for i, (content, label) in enumerate(zip(files, labels, strict=True)):
                    for kind, said in (("png", content), ("cls", b"%d" % label)):
                        member = tarfile.TarInfo(f"{i}.{kind}")
                        member.size = len(said)
                        archive.addfile(member, io.BytesIO(said))
        else:
            table = pyarrow.table({"image": files, "label": labels.tolist()})
            if form == "parquet":
                pyarrow.parquet.write_table(table, out)
            else:
                with pyarrow.ipc.new_stream(out, table.schema) as writer:
                    writer.write_table(table)
        yield out.getvalue()


PACKED = {form: list(packed(form)) for form in ("tar", "parquet", "arrow")}


@pytest.mark.parametrize("form", PACKED)
@fuzz(150)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")  # of Pillow, on what it repairs
def test_damaged_shards_and_tables(tmp_path, form, data):
    train, test = PACKED[form]
    (tmp_path / f"train-0.{form}").write_bytes(data.draw(damaged(train)))
    (tmp_path / f"test-0.{form}").write_bytes(test)
    dataset = outcome(sources.load, tmp_path, image_size=8)
    if dataset is not None:
        check(dataset)


# --- records --------------------------------------------------------------------------------------

RECORD = {"evaluation": "accuracy", "row": "ncfm", "metric": "convnet", "seed": 0}
RECORD |= {"protocol": "ab", "value": 0.5, "images": 10}


@fuzz(200)
@given(key=st.sampled_from([*RECORD, "note"]), value=JSON, whole=st.none() | JSON)
def test_forged_results(tmp_path, key, value, whole):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([RECORD | {key: value}] if whole is None else whole))
    measured = outcome(results.read, path)
    if measured is not None:
        results.table([cell._asdict() | values for cell, values in measured.items()])
        results.write(path, measured)
        assert results.read(path) == measured


@fuzz(150)
@given(data=st.data())
def test_damaged_results(tmp_path, data):
    path = tmp_path / "results.json"
    path.write_bytes(data.draw(damaged(json.dumps([RECORD, RECORD | {"seed": 1}]).encode())))
    outcome(results.read, path)


@fuzz(100)
@given(data=st.data(), resume=st.none() | st.integers(0, 4))
def test_damaged_metrics_can_be_gone_on_with(tmp_path, data, resume):
    path = tmp_path / "metrics.jsonl"
    lines = b"".join(b'{"step": %d, "time": 1.5, "loss": "nan"}\n' % step for step in range(4))
    path.write_bytes(data.draw(damaged(lines) | st.binary(max_size=40)))
    writer = JsonlWriter(path, resume_step=resume)
    writer.write(9, {"loss": 1})
    writer.close()
    assert json.loads(path.read_bytes().splitlines()[-1])["step"] == 9
