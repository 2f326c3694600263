"""Batches drawn on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.data.dataset import Split
from jaxdistill.data.device import check, draw, resident
from jaxdistill.errors import InputError
from jaxdistill.method import BatchSpec

COUNTS = (7, 4, 9)


def split():
    """Unequal classes in mixed order; every image is filled with its own position."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3, dtype=np.int32), COUNTS))
    images = np.zeros((len(labels), 4, 5, 3), np.uint8) + np.arange(len(labels))[
        :, None, None, None
    ].astype(np.uint8)
    return Split(images, labels)


def positions(images):
    images = np.asarray(images)
    first = images[..., 0, 0, 0]
    assert (images == first[..., None, None, None]).all()
    return first


@pytest.fixture(scope="module")
def data():
    return resident(split(), 3)


def test_images_come_back_with_their_shape():
    pixels = np.random.default_rng(1).integers(0, 256, (6, 4, 5, 3)).astype(np.uint8)
    data = resident(Split(pixels, np.array([0, 0, 0, 1, 1, 1], np.int32)), 2)
    batch = np.asarray(draw(BatchSpec("per_class", 3), data, jax.random.key(0)))
    assert batch.dtype == np.uint8 and batch.shape == (2, 3, 4, 5, 3)
    for drawn, own in zip(batch, (pixels[:3], pixels[3:]), strict=True):
        assert {image.tobytes() for image in drawn} == {image.tobytes() for image in own}


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_class_gives_distinct_images_of_its_own(data, size):
    sample = jax.jit(lambda key: draw(BatchSpec("per_class", size), data, key))
    labels = split().labels
    for seed in range(20):
        drawn = positions(sample(jax.random.key(seed)))
        assert drawn.shape == (3, size)
        for label, row in enumerate(drawn):
            assert len(set(row)) == size
            assert (labels[row] == label).all()


def test_the_images_of_a_class_are_equally_likely(data):
    keys = jax.random.split(jax.random.key(3), 4000)
    drawn = jax.jit(jax.vmap(lambda key: draw(BatchSpec("per_class", 3), data, key)))(keys)
    times = np.bincount(np.asarray(drawn)[..., 0, 0, 0].ravel(), minlength=sum(COUNTS))
    expected = np.array([4000 * 3 / COUNTS[label] for label in split().labels])
    assert np.abs(times / expected - 1).max() < 0.08  # five standard deviations of the rarest


@pytest.mark.parametrize("kind", ["per_class", "uniform"])
def test_parts_make_up_the_whole(data, kind):
    spec, key = BatchSpec(kind, 4), jax.random.key(5)
    whole = draw(spec, data, key)
    parts = [draw(spec, data, key, (jnp.int32(index), 2)) for index in range(2)]
    axis = 1 if kind == "per_class" else 0
    joined = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis), *parts)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), joined, whole))


def test_a_uniform_draw_reaches_every_image_with_its_label(data):
    sample = jax.jit(lambda key: draw(BatchSpec("uniform", 8), data, key))
    seen = set()
    for seed in range(30):
        batch = sample(jax.random.key(seed))
        drawn = positions(batch["images"])
        assert batch["images"].shape == (8, 4, 5, 3) and batch["images"].dtype == jnp.uint8
        np.testing.assert_array_equal(batch["labels"], split().labels[drawn])
        seen |= set(drawn)
    assert len(seen) == sum(COUNTS)


def test_the_key_decides(data):
    spec = BatchSpec("per_class", 4)
    first, again, other = (positions(draw(spec, data, jax.random.key(s))) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_method_without_data_gets_an_empty_batch():
    check(BatchSpec("none"), ())
    assert draw(BatchSpec("none"), (), jax.random.key(0)) == ()


def test_the_data_do_not_follow_the_callers_memory():
    images, labels = split()
    data = resident(Split(images, labels), 3)
    before = np.array(data.pixels)
    images[:], labels[:] = 0, 0
    np.testing.assert_array_equal(data.pixels, before)


@pytest.mark.parametrize(
    ("spec", "names", "message"),
    [
        (BatchSpec("per_class", 5), ("cat", "dog", "eel"), "class 'dog' has 4 images, the batch "),
        (BatchSpec("per_class", 5), None, "class '1' has 4 .* asks for 5 .* lower it to 4 or less"),
        (BatchSpec("per_class", 0), None, "a per_class batch of 0 examples; ask for at least one"),
        (BatchSpec("uniform", 0), None, "a uniform batch of 0 examples"),
        (BatchSpec("keys", 0), None, "a keys batch of 0 examples"),
    ],
)
def test_batches_that_cannot_be_filled_are_refused(data, spec, names, message):
    with pytest.raises(InputError, match=message):
        check(spec, data, names)


def test_batches_that_can_be_filled_are_not(data):
    check(BatchSpec("per_class", 4), data, ("cat", "dog", "eel"))
    check(BatchSpec("uniform", 100), data)


def test_missing_data_are_noticed():
    with pytest.raises(InputError, match="takes uniform batches; give it the data"):
        check(BatchSpec("uniform", 4), ())


@pytest.mark.parametrize("kind", ["uniform", "keys"])
def test_the_keys_of_the_examples_differ_and_follow_from_the_key(data, kind):
    spec = BatchSpec(kind, 12)
    check(spec, data)
    rows = lambda seed: jax.random.key_data(draw(spec, data, jax.random.key(seed))["keys"])  # noqa: E731
    assert len({tuple(row) for row in (*rows(0).tolist(), *rows(1).tolist())}) == 24
    np.testing.assert_array_equal(rows(0), rows(0))
    parts = [draw(spec, data, jax.random.key(0), (i, 3))["keys"] for i in range(3)]
    np.testing.assert_array_equal(jax.random.key_data(jnp.concatenate(parts)), rows(0))


def test_other_images_are_refused():
    images, labels = split()
    with pytest.raises(InputError, match=r"uint8 .N, H, W, C., not float32 of shape"):
        resident(Split(images.astype(np.float32), labels), 3)
    with pytest.raises(InputError, match="class 3 has no images"):
        resident(Split(images, labels), 4)
