"""A data set in memory: its statistics, its fingerprint, its parts, and arrays that are none."""

import os

import numpy as np
import pytest

from jaxdistill.data import dataset
from jaxdistill.errors import InputError


def assert_statistics(data: dataset.Dataset, images: np.ndarray) -> None:
    pixels = images.astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, pixels.std((0, 1, 2)), rtol=1e-12)


def test_statistics_of_many_chunks(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (50, 6, 4, 3), np.uint8)
    monkeypatch.setattr(dataset, "_CHUNK", 7 * 6 * 4 * 3)
    labels = np.arange(50) % 2
    data = dataset.from_arrays(images, labels, images, labels, name="noise")
    assert_statistics(data, images)
    assert data.class_names == ("0", "1")


def test_fingerprint_sees_images_labels_and_shapes(few):
    images, labels, test_images, test_labels = few

    def fingerprint(images, labels, test_images=test_images):
        data = dataset.from_arrays(images, labels, test_images, test_labels, name="x")
        return data.fingerprint()

    base = fingerprint(images, labels)
    assert len(base) == 64
    assert fingerprint(np.asfortranarray(images), labels.astype(np.int64)) == base
    changed = images.copy()
    changed[0, 0, 0, 0] += 1
    assert fingerprint(changed, labels) != base
    assert fingerprint(images, labels[::-1]) != base
    reshaped = images.reshape(-1, 4, 16, 1)
    assert fingerprint(reshaped, labels, test_images.reshape(-1, 4, 16, 1)) != base


# --- holdout and class table ---


def test_holdout_is_balanced_disjoint_and_repeatable(digits):
    held = dataset.holdout(digits, 20, seed=3)
    assert held.name == "digits/holdout"
    assert np.all(np.bincount(held.test.labels) == 20)
    assert len(held.train.labels) == 1437 - 200
    assert (held.mean, held.std) == (digits.mean, digits.std)
    # Tag every image by a number of its own in a corner pixel pair to follow it through.
    tagged = digits.train.images.copy()
    tagged[:, 0, 0, 0], tagged[:, 0, 1, 0] = np.divmod(np.arange(1437), 256)
    copy = dataset.from_arrays(tagged, digits.train.labels, *digits.test, name="tagged")

    def tags(split):
        return split.images[:, 0, 0, 0].astype(int) * 256 + split.images[:, 0, 1, 0]

    first, again, other = (dataset.holdout(copy, 20, seed=s) for s in (3, 3, 4))
    train, test = tags(first.train), tags(first.test)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(1437))
    np.testing.assert_array_equal(first.test.labels, digits.train.labels[test])
    np.testing.assert_array_equal(first.train.labels, digits.train.labels[train])
    np.testing.assert_array_equal(test, tags(again.test))
    assert set(test) != set(tags(other.test))


@pytest.mark.parametrize("per_class", [0, 10**6])
def test_holdout_refuses(digits, per_class):
    with pytest.raises(InputError, match=f"cannot hold out {per_class} images of each class"):
        dataset.holdout(digits, per_class, seed=0)


def test_per_class_table(digits):
    labels = digits.train.labels
    table, counts = dataset.per_class_table(labels, 10)
    np.testing.assert_array_equal(counts, np.bincount(labels))
    assert table.dtype == counts.dtype == np.int32
    assert table.shape == (10, counts.max())
    for label in range(10):
        own = np.flatnonzero(labels == label)
        np.testing.assert_array_equal(table[label], np.resize(own, counts.max()))
    with pytest.raises(InputError, match="class 10 has no images to draw from"):
        dataset.per_class_table(labels, 11)
    with pytest.raises(InputError, match="labels must lie between 0 and 8"):
        dataset.per_class_table(labels, 9)


# --- bad arrays ---


def _set(position, value):
    return lambda arrays: [value(a) if i == position else a for i, a in enumerate(arrays)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(0, lambda a: a / 255), r"training images must be uint8 .* not float64"),
        (_set(2, lambda a: a[0, 0]), r"test images must be uint8 of shape .* shape \(8, 1\)"),
        (_set(0, lambda a: a[:0]), "the training split is empty"),
        (_set(2, lambda a: a[:, :7]), "training images are 8x8x1, test images 7x8x1"),
        (_set(1, lambda a: a[1:]), "training labels must be 40 integers, one per image"),
        (_set(3, lambda a: a.astype(float)), "test labels must be 20 integers.* not float64"),
        (_set(1, lambda a: a.astype(int) - 1), "training labels must not be negative"),
        (_set(1, lambda a: a + 2**31), "training labels must not be negative or exceed 32 bits"),
        (_set(1, lambda a: a + 1), "no training image has label 0, but labels go up to 10"),
        (_set(1, lambda a: a * 2**27), "no training image has label 1, but labels go up to 12079"),
        (_set(3, lambda a: a + 1), "test label 10 does not occur in the training labels"),
        (_set(0, lambda a: a * 0), "channel 0 has the same value in every training image"),
    ],
)
def test_bad_arrays(few, change, message):
    arrays = [few[0], few[1].astype(np.int64), few[2], few[3].astype(np.int64)]
    with pytest.raises(InputError, match=message):
        dataset.from_arrays(*change(arrays), name="bad")


def test_wrong_number_of_class_names(few):
    with pytest.raises(InputError, match="2 class names for 10 classes"):
        dataset.from_arrays(*few, name="bad", class_names=["a", "b"])


@pytest.mark.parametrize("name", ["two\nlines", "\ud800", os.fsdecode(b"latin\xe9")])
def test_class_names_that_no_card_can_hold(few, name):
    names = [name, *"123456789"]
    with pytest.raises(InputError, match=r"class name '.*' is not plain text; rename it"):
        dataset.from_arrays(*few, name="bad", class_names=names)
