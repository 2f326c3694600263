"""What any viewer shows is what is read; what is left out is said; odd layouts are asked about."""

import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from jaxdistill.data import sources
from jaxdistill.data.dataset import from_arrays
from jaxdistill.errors import InputError
from tests.adversity.conftest import write

SHAPE = (10, 6, 3)  # not square: a picture that lies is another size
# Where the first pixel of an upright picture is stored, for each orientation of EXIF.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[::-1],
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: x.transpose(1, 0, 2)[:, ::-1],
}


def pixels(seed, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def folder(path, save, classes=("cat", "dog")):
    """An image folder whose files `save(path without suffix, number)` writes."""
    number = 0
    for split in ("train", "test"):
        for name in classes:
            inner = path / split / name
            inner.mkdir(parents=True)
            for i in range(2):
                save(inner / str(i), number)
                number += 1
    return path


def read(path, **options):
    return sources.load(path, **options)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("orientation", STORED)
def test_pictures_stand_upright(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation

    def save(path, number):
        stored = np.ascontiguousarray(STORED[orientation](pixels(number)))
        options = {"exif": exif} | ({"quality": 100, "subsampling": 0} if suffix == "jpg" else {})
        Image.fromarray(stored).save(path.with_suffix(f".{suffix}"), **options)

    found = read(folder(tmp_path / "x", save)).train.images
    assert found.shape[1:] == SHAPE
    wanted = np.stack([pixels(i) for i in range(4)])
    off = np.abs(found.astype(int) - wanted)
    assert off.max() == 0 if suffix == "png" else off.mean() < 3


def test_upright_sizes_are_compared(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6

    def save(path, number):
        stored = STORED[6](pixels(number)) if number % 2 else pixels(number)
        options = {"exif": exif} if number % 2 else {}
        Image.fromarray(np.ascontiguousarray(stored)).save(f"{path}.png", **options)

    found = read(folder(tmp_path / "x", save))
    np.testing.assert_array_equal(found.train.images, [pixels(i) for i in range(4)])


def _with_alpha(mode):
    def save(path, number):
        image = Image.fromarray(pixels(number)).convert("L" if "L" in mode else "RGB")
        alpha = np.full(SHAPE[:2], 255, np.uint8)
        alpha[:5], alpha[5] = 0, 128
        image.putalpha(Image.fromarray(alpha))
        image.save(f"{path}.png")

    return save


def _palette(path, number):
    image = Image.fromarray(pixels(number) // 86 * 86).quantize(64)
    image.info["transparency"] = 0
    image.save(f"{path}.png")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_shows_white(mode, tmp_path):
    found = read(folder(tmp_path / "x", _with_alpha(mode))).train.images
    assert found.shape[-1] == (1 if mode == "LA" else 3)
    assert (found[:, :5] == 255).all()
    plain = np.stack([pixels(i) for i in range(4)]).astype(float)
    if mode == "RGBA":
        np.testing.assert_array_equal(found[:, 6:], plain[:, 6:])
        half = plain[:, 5] * 128 / 255 + 255 * 127 / 255
        np.testing.assert_allclose(found[:, 5], half, atol=1)


def test_palettes_are_colours_and_may_be_transparent(tmp_path):
    path = folder(tmp_path / "x", _palette)
    found = read(path).train.images
    for image, file in zip(found, sorted((path / "train").rglob("*.png")), strict=True):
        shown = Image.open(file).convert("RGBA")
        above = np.asarray(shown)
        clear = above[..., 3] == 0
        assert clear.any() and (image[clear] == 255).all()
        np.testing.assert_array_equal(image[~clear], above[~clear][:, :3])


def test_what_is_left_out_is_counted_and_said(tmp_path):
    path = folder(tmp_path / "x", lambda p, n: Image.fromarray(pixels(n)).save(f"{p}.png"))
    inner = path / "train" / "cat"
    Image.fromarray(pixels(9)).save(inner / "b.gif")
    Image.fromarray(pixels(9)).save(inner / "c.webp")
    (inner / "nested").mkdir()
    os.mkfifo(inner / "pipe.png")
    (inner / ".hidden").touch()
    with pytest.warns(UserWarning, match=r"cat: 4 of 6 entries are left out.*b.gif, c.webp, nest"):
        found = read(path)
    assert len(found.train.images) == 4


def test_names_are_compared_as_people_read_them(tmp_path):
    def save(path, number):
        if "test" in path.parts:
            path = path.parents[1] / unicodedata.normalize("NFD", path.parent.name) / path.name
            path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels(number)).save(f"{path}.png")

    path = folder(tmp_path / "x", save, classes=("café", "thé"))
    for name in ("café", "thé"):
        (path / "test" / name).rmdir()
    found = read(path)
    assert found.class_names == ("café", "thé")
    assert found.test.labels.tolist() == [0, 0, 1, 1]
    (path / "train" / unicodedata.normalize("NFD", "café")).mkdir()
    with pytest.raises(InputError, match="two folders that read 'café'"):
        read(path)


LAYOUTS = {
    (40, 3, 16, 16): "seem to have their channels first.*np.moveaxis",
    (40, 1, 28, 28): "seem to have their channels first",
    (40, 16, 16, 3): None,
    (40, 16, 16): None,
    (40, 3, 16, 3): None,  # three pixels high
    (40, 16, 16, 5): None,
}


@pytest.mark.parametrize(("shape", "said"), LAYOUTS.items())
def test_channels_first_is_asked_about(shape, said):
    labels = np.arange(40) % 2
    arrays = (pixels(0, shape), labels, pixels(1, shape), labels)
    if said is None:
        assert from_arrays(*arrays, name="x").num_classes == 2
        return
    with pytest.raises(InputError, match=said):
        from_arrays(*arrays, name="x")


@pytest.mark.parametrize("form", ["keras", "medmnist"])
def test_files_of_other_libraries_are_read(form, tmp_path):
    wanted = read(write(tmp_path / "own.npz"))
    arrays = dict(np.load(tmp_path / "own.npz"))
    if form == "keras":
        names = {"images": "x", "labels": "y"}
        arrays = {f"{names[k[-6:]]}_{k[:-7]}": v for k, v in arrays.items()}
    else:
        arrays = {k: v[:, None] if "labels" in k else v for k, v in arrays.items()}
        arrays["val_images"] = arrays["test_images"]
    np.savez(tmp_path / "other.npz", **arrays)
    found = read(tmp_path / "other.npz")
    for a, b in zip((*found.train, *found.test), (*wanted.train, *wanted.test), strict=True):
        np.testing.assert_array_equal(a, b)


def _cifar(folder, labels, names):
    """Files of records as the authors of CIFAR describe them; returns images and fine labels."""
    folder.mkdir()
    images, fine = [], []
    for i, name in enumerate(names):
        image = pixels(i, (4, 32, 32, 3))
        label = np.arange(4 * labels).reshape(4, labels) % 4
        label[:, -1] = np.arange(4) % 2
        planes = image.transpose(0, 3, 1, 2).reshape(4, -1)
        (folder / name).write_bytes(np.hstack([label.astype(np.uint8), planes]).tobytes())
        images.append(image)
        fine.append(label[:, -1])
    return np.concatenate(images), np.concatenate(fine)


@pytest.mark.parametrize("form", ["cifar10", "cifar100"])
def test_cifar_is_read_in_its_binary_form_and_never_as_pickles(form, tmp_path):
    train = [f"data_batch_{i}.bin" for i in range(1, 6)] if form == "cifar10" else ["train.bin"]
    test = "test_batch.bin" if form == "cifar10" else "test.bin"
    images, labels = _cifar(tmp_path / "x", 1 if form == "cifar10" else 2, [*train, test])
    names = {"cifar10": "batches.meta.txt", "cifar100": "fine_label_names.txt"}[form]
    (tmp_path / "x" / names).write_text("apple\nbear\n\n")
    for found in (read(tmp_path / "x"), read(form, data_dir=tmp_path / "x")):
        np.testing.assert_array_equal(np.concatenate([found.train[0], found.test[0]]), images)
        np.testing.assert_array_equal(np.concatenate([found.train[1], found.test[1]]), labels)
        assert (found.name, found.class_names) == (form, ("apple", "bear"))
    (tmp_path / "x" / train[0]).write_bytes(b"x" * 100)
    with pytest.raises(InputError, match=f"{train[0]} does not consist of records"):
        read(tmp_path / "x")
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "meta").touch()
    with pytest.raises(InputError, match="holds CIFAR as pickles, which are never read; download"):
        read(tmp_path / "y")


def test_idx_files_are_found_under_any_name(tmp_path):
    for split, n in (("train", 4), ("t10k", 4)):
        header = (0x803).to_bytes(4, "big") + b"".join(x.to_bytes(4, "big") for x in (n, 5, 5))
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(header + pixels(0, (n, 25)).tobytes())
        header = (0x801).to_bytes(4, "big") + n.to_bytes(4, "big")
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(header + bytes([0, 1, 0, 1]))
    assert read("mnist", data_dir=tmp_path).name == "mnist"
    assert read("mnist", data_dir=tmp_path).image_shape == (5, 5, 1)
