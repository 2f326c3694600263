"""Data sources against real images: digits, Fashion-MNIST, and files written from the digits."""

import gzip
import io
import os
import struct
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from jaxdistill.data import device, idx, sources
from jaxdistill.data.dataset import Dataset
from jaxdistill.errors import InputError
from tests.data.test_dataset import assert_statistics


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_idx_folder(folder: Path, arrays, separator: str = "-", suffix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, images, labels in (("train", *arrays[:2]), ("t10k", *arrays[2:])):
        write_idx(folder / f"{prefix}-images{separator}idx3-ubyte{suffix}", images[..., 0])
        write_idx(folder / f"{prefix}-labels{separator}idx1-ubyte{suffix}", labels)
    return folder


def write_image_folder(folder: Path, arrays, test_name: str = "test") -> Path:
    """Classes are named so that sorted order is the reverse of the digit."""
    for part, images, labels in (("train", *arrays[:2]), (test_name, *arrays[2:])):
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / part / f"class{9 - label}" / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)
    return folder


def save_npz(path: Path, arrays, **extra) -> Path:
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez(path, **dict(zip(keys, arrays, strict=True)), **extra)
    return path


def assert_same(dataset: Dataset, arrays) -> None:
    for got, want in zip((*dataset.train, *dataset.test), arrays, strict=True):
        np.testing.assert_array_equal(got, want)
    assert dataset.train.images.dtype == dataset.test.images.dtype == np.uint8
    assert dataset.train.labels.dtype == dataset.test.labels.dtype == np.int32


# --- named sources ---


def test_digits(digits):
    raw = load_digits()
    assert digits.name == "digits"
    assert digits.class_names == tuple("0123456789")
    assert (digits.num_classes, digits.image_shape) == (10, (8, 8, 1))
    assert (len(digits.train.labels), len(digits.test.labels)) == (1437, 360)
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    np.testing.assert_array_equal(labels, raw.target)
    np.testing.assert_array_equal(
        digits.train.images[0, ..., 0], np.round(raw.images[0] * 255 / 16)
    )
    assert digits.train.images.max() == 255
    assert np.bincount(digits.train.labels).min() >= 100
    assert_statistics(digits, digits.train.images)


def test_fashion_mnist_of_debian():
    if not sources.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    data = sources.load("fashion_mnist", pad_to=32)
    assert data.train.images.shape == (60000, 32, 32, 1)
    assert data.test.images.shape == (10000, 32, 32, 1)
    assert np.all(np.bincount(data.train.labels) == 6000)
    assert np.all(np.bincount(data.test.labels) == 1000)
    np.testing.assert_allclose((*data.mean, *data.std), (0.2861, 0.3530), atol=1e-4)
    assert data.class_names[data.train.labels[0]] == "Ankle boot"
    assert not data.train.images[:, :2].any() and not data.train.images[:, :, -2:].any()


def test_fashion_mnist_in_a_folder_of_ones_own(few, tmp_path):
    write_idx_folder(tmp_path, few)
    data = sources.load("fashion_mnist", data_dir=tmp_path)
    assert_same(data, few)
    assert data.class_names[9] == "Ankle boot"


# --- files ---


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("separator", ["-", "."])
def test_idx_round_trip(few, tmp_path, separator, suffix):
    data = sources.load(str(write_idx_folder(tmp_path / "mine", few, separator, suffix)))
    assert data.name == "mine"
    assert_same(data, few)


def test_image_folder_round_trip(few, tmp_path):
    folder = write_image_folder(tmp_path / "pngs", few)
    (folder / "train" / "class0" / ".hidden.png").write_bytes(b"no image")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "notes.txt").write_text("not a class")
    data = sources.load(folder)
    assert data.name == "pngs"
    assert data.image_shape == (8, 8, 1)
    assert data.class_names == tuple(f"class{i}" for i in range(10))
    want = []
    for images, labels in (few[:2], few[2:]):
        order = np.argsort(9 - labels, kind="stable")
        want += [images[order], 9 - labels[order]]
    assert_same(data, want)


def test_image_folder_may_test_fewer_classes_and_call_the_split_val(few, tmp_path):
    keep = few[3] >= 5
    folder = write_image_folder(tmp_path, (*few[:2], few[2][keep], few[3][keep]), "val")
    data = sources.load(folder)
    assert data.num_classes == 10
    assert set(data.test.labels) == set(range(5))


def test_one_colour_image_makes_the_folder_rgb(few, tmp_path):
    folder = write_image_folder(tmp_path, few)
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(colour).save(folder / "test" / "class9" / "zz.PNG")
    data = sources.load(folder)
    assert data.image_shape == (8, 8, 3)
    np.testing.assert_array_equal(data.test.images[-1], colour)
    np.testing.assert_array_equal(data.train.images[..., 0], data.train.images[..., 2])


def test_npz_round_trip(few, tmp_path):
    names = np.array([f"digit {i}" for i in range(10)])
    data = sources.load(save_npz(tmp_path / "some.npz", few, class_names=names))
    assert data.name == "some"
    assert data.class_names == tuple(names)
    assert_same(data, few)
    flat = save_npz(tmp_path / "flat.npz", (few[0][..., 0], few[1], few[2][..., 0], few[3]))
    assert_same(sources.load(str(flat)), few)


def test_tiny_imagenet(few, tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for index, (image, label) in enumerate(zip(few[0], few[1], strict=True)):
        path = root / "train" / f"n{label}" / "images" / f"n{label}_{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for index, (image, label) in enumerate(zip(few[2], few[3], strict=True)):
        Image.fromarray(image[..., 0]).save(root / "val" / "images" / f"val_{index}.png")
        lines.append(f"val_{index}.png\tn{label}\t0\t0\t7\t7\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    for data_dir in (tmp_path, root):
        data = sources.load("tiny_imagenet", data_dir=data_dir)
        assert data.class_names[3] == "n3"
        np.testing.assert_array_equal(data.test.images, few[2])
        np.testing.assert_array_equal(data.test.labels, few[3])
        np.testing.assert_array_equal(data.train.labels, np.sort(few[1]))
    (root / "val" / "val_annotations.txt").write_text("../../secret.png\tn0\n")
    with pytest.raises(InputError, match="line 1 does not name a file of val/images"):
        sources.load("tiny_imagenet", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"no Tiny ImageNet .* expected data_dir/tiny-imagenet"):
        sources.load("tiny_imagenet", data_dir=tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"needs data.data_dir: expected"):
        sources.load("tiny_imagenet")


# --- TFDS ---


@pytest.fixture(scope="module")
def tfds():
    pytest.importorskip("array_record")
    return pytest.importorskip("tensorflow_datasets")


def make_builder(tfds, name, keys=("image", "label"), splits=None, failure=None):
    """A builder of real digits that needs neither the network nor TensorFlow."""
    splits = splits or {"train": range(60), "test": range(60, 90)}

    def info(self):
        # A raw tensor: encoding arrays as PNG is the part of TFDS that needs TensorFlow.
        image = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8)
        label = tfds.features.ClassLabel(names=[f"d{i}" for i in range(10)])
        features = tfds.features.FeaturesDict(dict(zip(keys, (image, label), strict=True)))
        return tfds.core.DatasetInfo(builder=self, features=features)

    def generate(rows):
        raw = load_digits()
        for row in rows:
            values = raw.images[row].astype(np.uint8)[..., None], int(raw.target[row])
            yield row, dict(zip(keys, values, strict=True))

    def split_generators(self, dl_manager):
        if failure:
            raise RuntimeError(failure)
        return {split: generate(rows) for split, rows in splits.items()}

    # The class registers itself with TFDS under its name in snake case.
    return type(
        name,
        (tfds.core.GeneratorBasedBuilder,),
        {
            "__module__": __name__,
            "VERSION": tfds.core.Version("1.0.0"),
            "pkg_dir_path": None,
            "_info": info,
            "_split_generators": split_generators,
            "_generate_examples": lambda self: None,
        },
    )


def prepare(tfds, data_dir, name, **kwargs):
    with tfds.core.registered.skip_registration():
        builder = make_builder(tfds, name, **kwargs)
        builder(data_dir=data_dir, file_format="array_record").download_and_prepare()


def test_tfds_prepared_on_disk(tfds, tmp_path):
    prepare(tfds, tmp_path, "TinyDisk")
    data = sources.load("tiny_disk", data_dir=tmp_path, image_size=16, pad_to=20)
    assert "tensorflow" not in sys.modules
    assert data.name == "tiny_disk"
    assert data.class_names == tuple(f"d{i}" for i in range(10))
    assert data.image_shape == (20, 20, 1)
    data = sources.load("tiny_disk", data_dir=tmp_path)
    raw = load_digits()
    # TFDS shuffles when it writes: compare as multisets.
    for split, rows in ((data.train, slice(60)), (data.test, slice(60, 90))):
        got = [(image.tobytes(), label) for image, label in zip(*split, strict=True)]
        want = zip(raw.images[rows].astype(np.uint8), raw.target[rows], strict=True)
        assert sorted(got) == sorted((image.tobytes(), label) for image, label in want)


def test_tfds_prepares_a_builder_that_needs_no_tensorflow(tfds, tmp_path):
    make_builder(tfds, "TinyFresh", splits={"train": range(60), "validation": range(60, 75)})
    data = sources.load("tiny_fresh", data_dir=tmp_path)
    assert (len(data.train.labels), len(data.test.labels)) == (60, 15)


def test_tfds_errors(tfds, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no data set is called no_such_thing, here or in TFDS"):
        sources.load("no_such_thing", data_dir=tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(InputError, match=r"for the folder of this name write \./folder"):
        sources.load("folder", data_dir=tmp_path)
    make_builder(tfds, "TinyBroken", failure="the source\nis gone")
    with pytest.raises(
        InputError, match=r"tiny_broken .* \(the source is gone.*`tfds build tiny_b"
    ):
        sources.load("tiny_broken", data_dir=tmp_path)
    prepare(tfds, tmp_path, "TinyKeys", keys=("picture", "label"))
    with pytest.raises(InputError, match="features label, picture; needed are image and label"):
        sources.load("tiny_keys", data_dir=tmp_path)
    prepare(tfds, tmp_path, "TinyTrain", splits={"train": range(60)})
    with pytest.raises(InputError, match="splits train; needed are train and test"):
        sources.load("tiny_train", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "imagenette/160px-v2", "fashion_mnist"])
def test_tfds_builtin_not_prepared(tfds, name, tmp_path):
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("with TensorFlow installed this would download")
    message = f"{name} was not found in .*`tfds build {name} --file_format=array_record --data_dir="
    with pytest.raises(InputError, match=message) as caught:
        sources.load(name, data_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert ("dataset-fashion-mnist" in str(caught.value)) == (name == "fashion_mnist")
    assert not list(tmp_path.iterdir())


# --- resizing and padding ---


def test_resize_takes_the_centre_square(tmp_path):
    # A wide picture of three flat thirds: the centre square is the middle third.
    wide = np.repeat(np.array([[10, 130, 250]], np.uint8), 16, 0).repeat(16, 1)
    tall = wide.T.copy()
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "b").mkdir()
        Image.fromarray(wide).save(tmp_path / part / "a" / "wide.png")
        Image.fromarray(tall).save(tmp_path / part / "b" / "tall.png")
    with pytest.raises(
        InputError,
        match=r"unequal size: .*wide.png is 16x48, .*tall.png is 48x16 .* set data.image_size",
    ):
        sources.load(tmp_path)
    data = sources.load(tmp_path, image_size=8)
    assert data.train.images.shape == (2, 8, 8, 1)
    assert np.all(data.train.images[:, 2:6, 2:6] == 130)
    np.testing.assert_array_equal(data.train.images[0, ..., 0], data.train.images[1, ..., 0].T)
    mirrored = 260 - data.train.images[0, :, ::-1].astype(int)
    np.testing.assert_allclose(data.train.images[0], mirrored, atol=1)


def test_resize_of_arrays_and_of_files_agree(few, tmp_path):
    rgb = (few[0].repeat(3, -1), few[1], few[2].repeat(3, -1), few[3])
    from_npz = sources.load(save_npz(tmp_path / "a.npz", rgb), image_size=5)
    folder = tmp_path / "f"
    for part, images, labels in (("train", *few[:2]), ("test", *few[2:])):
        for index, (image, label) in enumerate(zip(images.repeat(3, -1), labels, strict=True)):
            path = folder / part / str(label) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    from_files = sources.load(folder, image_size=5)
    order = np.argsort(few[1], kind="stable")
    np.testing.assert_array_equal(from_files.train.images, from_npz.train.images[order])
    assert_statistics(from_npz, from_npz.train.images)


def test_padding_is_black_and_leaves_the_statistics(digits):
    padded = sources.load("digits", pad_to=12)
    assert padded.image_shape == (12, 12, 1)
    np.testing.assert_array_equal(padded.train.images[:, 2:-2, 2:-2], digits.train.images)
    assert padded.train.images.sum(dtype=int) == digits.train.images.sum(dtype=int)
    assert (padded.mean, padded.std) == (digits.mean, digits.std)
    assert padded.test.images.shape == (360, 12, 12, 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pad_to": 6}, "pad_to=6 is smaller than the 8x8 images of digits"),
        ({"pad_to": 11}, "pad_to=11 cannot be reached from 8x8 images by equal borders"),
        ({"pad_to": 0}, "data.pad_to must be at least 1, not 0"),
        ({"image_size": -1}, "data.image_size must be at least 1, not -1"),
        ({"image_size": 10**6}, "exceeds 64 megapixels"),
    ],
)
def test_impossible_sizes(kwargs, message):
    with pytest.raises(InputError, match=message):
        sources.load("digits", **kwargs)


# --- facts ---


@pytest.mark.parametrize("name", ["digits", "fashion_mnist"])
def test_facts_are_those_of_the_data(name):
    if name == "fashion_mnist" and not sources.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    data = sources.load(name, pad_to=32)
    facts = sources.facts(name, pad_to=32)
    assert (facts.num_classes, facts.image_shape) == (data.num_classes, data.image_shape)
    resident = device.resident({"images": data.train.images}, data.train.labels, data.num_classes)
    example = jax.ShapeDtypeStruct(facts.image_shape, np.uint8)
    known = device.resident_shapes(
        {"images": example}, facts.num_classes, facts.largest_class, facts.images
    )
    assert known.largest == resident.largest
    assert known.examples["images"].shape == resident.examples["images"].shape


def test_facts_of_other_data_are_read_from_them(tmp_path):
    images = np.zeros((5, 6, 6, 1), np.uint8)
    images[::2] = 200
    labels = np.array([0, 1, 1, 1, 0])
    arrays = {f"{s}_{k}": v for s in ("train", "test") for k, v in
              (("images", images), ("labels", labels))}  # fmt: skip
    np.savez(tmp_path / "own.npz", **arrays)
    assert sources.facts(tmp_path / "own.npz") == sources.Facts(2, (6, 6, 1), 3, 5)
    with pytest.raises(InputError, match="no such folder"):
        sources.facts("./missing")


# --- bad files ---


def test_missing_paths(tmp_path):
    with pytest.raises(InputError, match=r"no such folder: .*gone"):
        sources.load(tmp_path / "gone")
    with pytest.raises(InputError, match=r"no such file: .*gone\.npz"):
        sources.load(str(tmp_path / "gone.npz"))
    with pytest.raises(InputError, match=r"is no data set: expected train/<class>"):
        sources.load(str(tmp_path))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path):
    path.write_bytes(path.read_bytes() + b"x")


def _forge(path):
    data = bytearray(path.read_bytes())
    data[4:16] = b"\xff" * 12
    path.write_bytes(data)


def _signed(path):
    data = bytearray(path.read_bytes())
    data[2] = 9
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train-images-idx3-ubyte", _truncate, r"fewer bytes than its header announces \(2560"),
        ("train-images-idx3-ubyte", _lengthen, "more bytes than its header announces"),
        ("train-images-idx3-ubyte", _forge, "fewer bytes than its header announces"),
        ("t10k-images-idx3-ubyte", _signed, "is not an IDX file of 3-dimensional unsigned"),
        ("t10k-labels-idx1-ubyte", lambda p: p.write_bytes(b""), "is not an IDX file of 1-dim"),
        ("t10k-labels-idx1-ubyte", Path.unlink, r"missing file t10k-labels-idx1-ubyte\[.gz\]"),
        (
            "t10k-images-idx3-ubyte",
            lambda p: p.write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", 0, 2**31, 2**31)),
            "is empty: its header announces",
        ),
        (
            "train-labels-idx1-ubyte",
            lambda p: write_idx(p, np.zeros(39)),
            "holds 40 images but train-labels-idx1-ubyte 39 labels",
        ),
    ],
)
def test_damaged_idx(few, tmp_path, monkeypatch, file, damage, message):
    monkeypatch.setattr(idx, "_CHUNK", 256)  # several chunks, the last one full
    damage(write_idx_folder(tmp_path, few) / file)
    with pytest.raises(InputError, match=message):
        sources.load(tmp_path)


@pytest.mark.parametrize("damage", [_truncate, lambda p: p.write_bytes(b"not gzip at all")])
def test_damaged_gzip(few, tmp_path, damage):
    damage(write_idx_folder(tmp_path, few, suffix=".gz") / "train-images-idx3-ubyte.gz")
    with pytest.raises(InputError, match=r"cannot read .*train-images-idx3-ubyte.gz: "):
        sources.load(tmp_path)


def test_bad_npz(few, tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, train_images=few[0], extra=few[1])
    with pytest.raises(
        InputError, match="lacks train_labels, test_images, test_labels; it holds train_images, ext"
    ):
        sources.load(path)
    save_npz(path, few, class_names=np.array([f"{i}" for i in range(10)], object))
    with pytest.raises(InputError, match=r"cannot read .*class_names hold Python objects"):
        sources.load(path)
    save_npz(path, few, class_names=np.arange(10))
    with pytest.raises(
        InputError, match=r"class_names in .* must be a one-dimensional array of st"
    ):
        sources.load(path)
    save_npz(path, few)
    _truncate(path)
    with pytest.raises(InputError, match=r"cannot read .*bad\.npz as an \.npz"):
        sources.load(path)
    with path.open("wb") as file:
        np.save(file, few[0])
    with pytest.raises(InputError, match=r"cannot read .*bad\.npz as an \.npz"):
        sources.load(path)


def test_small_files_do_not_fill_the_memory(few, tmp_path):
    write_idx_folder(tmp_path, few, suffix=".gz")
    header = bytes((0, 0, 8, 3)) + struct.pack(">3I", 2000, 1000, 1000)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header + bytes(1 << 20))
    with pytest.raises(InputError, match=r"announces 2000000000 bytes .* more than a file of its"):
        sources.load(tmp_path)


def test_small_pictures_do_not_fill_the_memory_together(few, tmp_path):
    folder = write_image_folder(tmp_path, few)
    for path in folder.rglob("*.png"):
        path.unlink()
        path.write_bytes(_png_header(8000, 8000))
    with pytest.raises(InputError, match=r"are 3840 megapixels in \d+ bytes of files; set data.im"):
        sources.load(folder)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "a" * 300}, "a{100}"),
        ({"name": "./" + "a" * 300}, "a{100}"),
        ({"name": "a" * 300 + ".npz"}, "a{100}"),
        ({"name": "a\0b"}, r"no data set is called 'a\\x00b'"),
        ({"name": "./a\nb"}, r"no data set is called './a\\nb'"),
        ({"name": "~no-such-user/x"}, "no such folder: '~no-such-user/x'"),
        ({"name": "digits", "pad_to": 10**6}, "cannot read data set 'digits': Unable to allocate"),
    ],
)
def test_names_and_sizes_that_no_system_takes(kwargs, message):
    with pytest.raises(InputError, match=message) as error:
        sources.load(**kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_what_is_no_file_is_not_opened(few, tmp_path, kind):
    make = {"fifo": os.mkfifo, "folder": os.mkdir}[kind]
    write_image_folder(tmp_path / "images", few)
    make(tmp_path / "images" / "train" / "class0" / "z.png")
    assert len(sources.load(tmp_path / "images").train.labels) == 40
    make(tmp_path / "x.npz")
    with pytest.raises(InputError, match="no such file"):
        sources.load(tmp_path / "x.npz")
    (write_idx_folder(tmp_path / "idx", few) / "t10k-labels-idx1-ubyte").unlink()
    make(tmp_path / "idx" / "t10k-labels-idx1-ubyte")
    with pytest.raises(InputError, match="missing file t10k-labels"):
        sources.load(tmp_path / "idx")


def _gif() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file, "GIF")
    return file.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds no pixels."""
    out = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        out += struct.pack(">I", len(data)) + kind + data
        out += struct.pack(">I", zlib.crc32(kind + data))
    return out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("z.png", b"\x89PNG nothing", "z.png is not a readable png or jpeg"),
        ("z.png", _gif(), "z.png is not a readable png or jpeg"),
        ("z.png", _png_header(8, 8), "cannot decode .*z.png"),
        ("z.png", _png_header(8001, 8000), "z.png is empty or exceeds 64 megapixels"),
        ("z.png", _png_header(10000, 10000), "z.png is empty or exceeds 64 megapixels"),
        ("z.jpg", _png_header(60000, 60000), "z.jpg is empty or exceeds 64 megapixels"),
    ],
)
def test_bad_image_files(few, tmp_path, name, content, message):
    folder = write_image_folder(tmp_path, few)
    (folder / "test" / "class9" / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        sources.load(folder)


def test_sliver_is_refused_before_it_is_enlarged(few, tmp_path):
    folder = write_image_folder(tmp_path, few)
    Image.fromarray(np.zeros((1, 60000), np.uint8)).save(folder / "train" / "class0" / "z.png")
    with pytest.raises(InputError, match=r"z.png is empty or exceeds 64 megapixels"):
        sources.load(folder, image_size=64)


def test_sixteen_bit_image_is_refused(few, tmp_path):
    folder = write_image_folder(tmp_path, few)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "train" / "class0" / "z.png")
    with pytest.raises(InputError, match=r"z.png has more than 8 bits per channel"):
        sources.load(folder)


def test_bad_image_folders(few, tmp_path):
    folder = write_image_folder(tmp_path / "a", few)
    (folder / "test" / "zebra").mkdir()
    with pytest.raises(InputError, match=r"class 'zebra' is in .*test but not in .*train"):
        sources.load(folder)
    (folder / "test" / "zebra").rmdir()
    (folder / "train" / "zebra").mkdir()
    with pytest.raises(InputError, match="zebra holds no png, jpg or jpeg image"):
        sources.load(folder)
    (tmp_path / "b" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match="has no class folders"):
        sources.load(tmp_path / "b")
    (tmp_path / "b" / "train" / "x").mkdir()
    with pytest.raises(InputError, match="has no test folder"):
        sources.load(tmp_path / "b")


@pytest.mark.parametrize("what", ["file", "class", "split", "loop", "broken"])
def test_links_out_of_the_folder_are_refused(few, tmp_path, what):
    folder = write_image_folder(tmp_path / "data", few)
    outside = write_image_folder(tmp_path / "outside", few) / "test"
    link = {
        "file": folder / "train" / "class0" / "z.png",
        "class": folder / "train" / "class00",
        "split": folder / "test",
        "loop": folder / "train" / "class0" / "z.png",
        "broken": folder / "train" / "class0" / "z.png",
    }[what]
    if what == "split":
        os.rename(link, folder / "unused")
    target = {
        "file": next((outside / "class0").iterdir()),
        "class": outside / "class0",
        "split": outside,
        "loop": link,
        "broken": folder / "nothing.png",
    }[what]
    link.symlink_to(target)
    with pytest.raises(InputError, match=f"{link.name} links to nothing inside"):
        sources.load(folder)


def test_links_within_the_folder_are_followed(few, tmp_path):
    folder = write_image_folder(tmp_path / "data", few)
    original = next((folder / "train" / "class0").iterdir())
    (folder / "train" / "class0" / "z.png").symlink_to(original)
    (tmp_path / "alias").symlink_to(folder)
    assert len(sources.load(tmp_path / "alias").train.labels) == 41
