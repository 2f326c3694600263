"""Batches drawn on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import collective
from jaxdistill.data.device import check, divided, draw, resident, resident_shapes
from jaxdistill.errors import InputError
from jaxdistill.method import BatchSpec

COUNTS = (7, 4, 9)


def split():
    """Unequal classes in mixed order; every image is filled with its own position."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3, dtype=np.int32), COUNTS))
    images = np.zeros((len(labels), 4, 5, 3), np.uint8) + np.arange(len(labels))[
        :, None, None, None
    ].astype(np.uint8)
    return images, labels


def positions(batch):
    images = np.asarray(batch["images"])
    first = images[..., 0, 0, 0]
    assert (images == first[..., None, None, None]).all()
    return first


@pytest.fixture(scope="module")
def data():
    images, labels = split()
    return resident({"images": images}, labels, 3)


def test_images_come_back_with_their_shape():
    pixels = np.random.default_rng(1).integers(0, 256, (6, 4, 5, 3)).astype(np.uint8)
    data = resident({"images": pixels}, np.array([0, 0, 0, 1, 1, 1], np.int32), 2)
    batch = np.asarray(draw(BatchSpec("per_class", 3), data, jax.random.key(0))["images"])
    assert batch.dtype == np.uint8 and batch.shape == (2, 3, 4, 5, 3)
    for drawn, own in zip(batch, (pixels[:3], pixels[3:]), strict=True):
        assert {image.tobytes() for image in drawn} == {image.tobytes() for image in own}


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_class_gives_distinct_images_of_its_own(data, size):
    sample = jax.jit(lambda key: draw(BatchSpec("per_class", size), data, key))
    _, labels = split()
    for seed in range(20):
        drawn = positions(sample(jax.random.key(seed)))
        assert drawn.shape == (3, size)
        for label, row in enumerate(drawn):
            assert len(set(row)) == size
            assert (labels[row] == label).all()


def test_a_class_of_too_few_images_repeats_them_evenly(data):
    """Nine of classes of seven, four and nine; what there are enough of is drawn as ever."""
    drawn = positions(draw(BatchSpec("per_class", 9), data, jax.random.key(1)))
    _, labels = split()
    for label, (row, count) in enumerate(zip(drawn, COUNTS, strict=True)):
        assert len(set(row[:count])) == count and (labels[row] == label).all()
        np.testing.assert_array_equal(row, np.resize(row[:count], 9))
    fewer = positions(draw(BatchSpec("per_class", 4), data, jax.random.key(1)))
    np.testing.assert_array_equal(fewer, drawn[:, :4])


def test_the_images_of_a_class_are_equally_likely(data):
    keys = jax.random.split(jax.random.key(3), 4000)
    drawn = jax.jit(jax.vmap(lambda key: draw(BatchSpec("per_class", 3), data, key)))(keys)
    times = np.bincount(positions(drawn).ravel(), minlength=sum(COUNTS))
    expected = np.array([4000 * 3 / COUNTS[label] for label in split()[1]])
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
        drawn = positions(batch)
        assert batch["images"].shape == (8, 4, 5, 3) and batch["images"].dtype == jnp.uint8
        np.testing.assert_array_equal(batch["labels"], split()[1][drawn])
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
    data = resident({"images": images}, labels, 3)
    before = np.array(data.examples["images"])
    images[:], labels[:] = 0, 0
    np.testing.assert_array_equal(data.examples["images"], before)


@pytest.mark.parametrize(
    ("spec", "names", "message"),
    [
        (
            BatchSpec("per_class", 10),
            ("cat", "dog", "eel"),
            "class 'eel', the largest, has 9 examples, the batch ",
        ),
        (BatchSpec("per_class", 11), None, "class '2', .* asks for 11 .* lower it to 9 or less"),
        (BatchSpec("per_class", 0), None, "a per_class batch of 0 examples; ask for at least one"),
        (BatchSpec("uniform", 0), None, "a uniform batch of 0 examples"),
        (BatchSpec("keys", 0), None, "a keys batch of 0 examples"),
    ],
)
def test_batches_that_cannot_be_filled_are_refused(data, spec, names, message):
    with pytest.raises(InputError, match=message):
        check(spec, data, names)


def test_batches_that_can_be_filled_are_not(data):
    check(BatchSpec("per_class", 9), data, ("cat", "dog", "eel"))
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


def pairs(count=11):
    """Examples of several kinds: images, captions as ids and a number, in trees of dicts."""
    rows = np.arange(count)
    return {
        "images": np.broadcast_to(rows[:, None, None, None], (count, 2, 3, 1)).astype(np.uint8),
        "text": {"short": rows[:, None].repeat(5, 1), "length": rows.astype(np.int32)},
    }


def told(batch):
    """Which examples a batch of `pairs` consists of; all parts of one say the same."""
    rows = np.asarray(batch["text"]["length"])
    np.testing.assert_array_equal(batch["images"][..., 0, 0, 0], rows)
    np.testing.assert_array_equal(batch["text"]["short"], rows[..., None].repeat(5, -1))
    return rows


def test_examples_are_any_tree_of_arrays_and_their_parts_stay_together():
    data, spec = resident(pairs()), BatchSpec("uniform", 6)
    check(spec, data)
    seen = set()
    for seed in range(20):
        batch = draw(spec, data, jax.random.key(seed))
        assert set(batch) == {"images", "text", "keys"}  # no classes, so no labels
        assert batch["images"].shape == (6, 2, 3, 1) and batch["text"]["short"].shape == (6, 5)
        seen |= set(told(batch).tolist())
    assert seen == set(range(11))


def test_trees_with_a_table_of_classes_are_drawn_by_class():
    labels = (np.arange(11) % 2).astype(np.int32)
    batch = draw(BatchSpec("per_class", 4), resident(pairs(), labels, 2), jax.random.key(0))
    assert "labels" not in batch
    np.testing.assert_array_equal(labels[told(batch)], [[0] * 4, [1] * 4])


def test_the_shapes_of_data_that_are_not_there():
    data = resident(pairs(), (np.arange(11) % 2).astype(np.int32), 2)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), pairs())
    shapes = resident_shapes(example, 2, 6, 11)
    assert jax.tree.structure(shapes) == jax.tree.structure(data)
    for one, other in zip(jax.tree.leaves(shapes), jax.tree.leaves(data), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize(
    ("examples", "labels", "classes", "message"),
    [
        (pairs(), np.arange(11, dtype=np.int32) % 3, 4, "class 3 has no images"),
        (pairs(), np.zeros(10, np.int32), 1, r"arrays of one length, not of \[10, 11\]"),
        ({"a": np.zeros(3), "b": np.zeros(4)}, None, None, r"of one length, not of \[3, 4\]"),
        ({}, None, None, "of one length, not of none"),
        ({"keys": np.zeros(3)}, None, None, "called keys, which batches have beside"),
    ],
)
def test_examples_that_do_not_fit_are_refused(examples, labels, classes, message):
    with pytest.raises(InputError, match=message):
        resident(examples, labels, classes)


def test_examples_of_no_class_are_not_drawn_by_class():
    with pytest.raises(InputError, match="takes examples of each class; give it data with labels"):
        check(BatchSpec("per_class", 1), resident(pairs()))


def unequal():
    """Images that tell their position, of classes of very different sizes."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), (40, 3, 5, 2)))
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return {"images": images}, labels.astype(np.int32)


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_hold_their_classes_and_give_the_same_draws(shards):
    examples, labels = unequal()
    whole = resident(examples, labels, 4)
    split = divided(whole, shards)
    per_shard = 4 // shards
    longest = max(whole.counts.reshape(shards, -1).sum(1))
    assert split.examples["images"].shape == (shards, longest, 1)
    spec, key = BatchSpec("per_class", 2), jax.random.key(5)
    wanted = positions(draw(spec, whole, key))
    assert (labels[wanted] == np.arange(4)[:, None]).all()
    keys = collective.class_keys(key, 4)
    for shard in range(shards):
        own = slice(shard * per_shard, (shard + 1) * per_shard)
        starts, counts = split.starts[own], split.counts[own]
        held = split.examples["images"][shard, :, 0]
        for label, begin, count in zip(range(own.start, own.stop), starts, counts, strict=True):
            assert (labels[held[begin : begin + count]] == label).all()
            marks = np.asarray(jax.random.uniform(keys[label], (whole.largest,)))[:count]
            chosen = held[begin + np.argsort(-marks)[:2]]
            np.testing.assert_array_equal(chosen, wanted[label])


def test_memory_follows_the_number_of_examples():
    labels = np.concatenate([np.zeros(20_000, np.int32), np.arange(1, 100).repeat(20)])
    images = np.zeros((len(labels), 4, 4, 1), np.uint8)
    data = resident({"images": images}, labels.astype(np.int32), 100)
    assert sum(np.asarray(x).nbytes for x in jax.tree.leaves(data)) < images.nbytes + 1000
