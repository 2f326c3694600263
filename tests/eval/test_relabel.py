"""The protocol that labels as it trains: views, rates, labels, and what they take."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.data.augment import normalizer
from jaxdistill.errors import InputError
from jaxdistill.eval import train_on
from jaxdistill.eval.bench import Bench, Made
from jaxdistill.eval.relabel import (
    Protocol,
    _stored,
    draw,
    image_labels,
    rate,
    stored_views,
    train,
    view,
)
from jaxdistill.io.artifact import Distilled
from jaxdistill.task import Recipe

SIDE, CLASSES = 4, 3
PLAIN = Protocol("hard", 4, 6, 0.05, 0.01, 20.0, True, False, 1, 2)
NORMALIZE = normalizer((0.0,), (1.0,))


@functools.cache
def network():
    def init(key):
        return {"w": 0.01 * jax.random.normal(key, (SIDE * SIDE, CLASSES)), "b": jnp.zeros(CLASSES)}

    return train_on.Network(init, lambda p, x: x.reshape(len(x), -1) @ p["w"] + p["b"])


def data(count=10):
    images = np.random.default_rng(0).uniform(0, 1, (count, SIDE, SIDE, 1)).astype(np.float32)
    return jnp.asarray(images), jnp.arange(count) % CLASSES


_W = np.random.default_rng(1).normal(size=(SIDE * SIDE, CLASSES))
TEACHER = {"w": jnp.asarray(_W, jnp.float32), "b": jnp.zeros(CLASSES)}


def seen_by(seed, images, protocol):
    return view(
        draw(jax.random.key(seed), len(images), images.shape[1:], protocol), images, NORMALIZE
    )


def stored(key, **changes):
    protocol = PLAIN._replace(labels="views", **changes)
    return stored_views(key, data()[0], (network().logits, TEACHER), NORMALIZE, protocol)


def trained(protocol, seed=0, views=None, **changes):
    images, labels = data()
    if protocol.labels == "soft":
        views = image_labels(images, (network().logits, TEACHER), NORMALIZE, protocol)
        assert views.dtype == np.float16
    return train(
        jax.random.key(seed),
        network(),
        images,
        labels,
        teacher=(network().logits, TEACHER),
        num_classes=CLASSES,
        normalize=NORMALIZE,
        protocol=protocol._replace(**changes),
        stored=views,
    )


def test_the_rate_falls_to_the_half_or_to_nothing():
    half, full = PLAIN, PLAIN._replace(half_cosine=False)
    for protocol, end in ((half, 0.5), (full, 0.0)):
        rates = [float(rate(protocol, jnp.float32(e))) for e in np.linspace(0, 4, 9)]
        assert rates[0] == pytest.approx(0.05)
        assert rates[-1] == pytest.approx(0.05 * end, abs=1e-7)
        assert (np.diff(rates) < 0).all()


def test_a_view_without_cutmix_is_the_image_or_its_mirror():
    images, _ = data(40)
    seen = seen_by(0, images, PLAIN)
    mirrored = np.array([(a == b[:, ::-1]).all() for a, b in zip(seen.images, images, strict=True)])
    same = np.array([(a == b).all() for a, b in zip(seen.images, images, strict=True)])
    assert (mirrored | same).all() and 8 < mirrored.sum() < 32
    assert float(seen.kept) == 1.0


def test_cutmix_takes_a_rectangle_from_the_partner_and_says_how_much_is_left():
    images = jnp.broadcast_to(jnp.arange(8.0)[:, None, None, None] / 10, (8, 20, 20, 1))
    kept = []
    for seed in range(60):
        drawn = draw(jax.random.key(seed), 8, images.shape[1:], PLAIN._replace(cutmix=True))
        seen = view(drawn, images, NORMALIZE)
        own = np.isclose(seen.images, images)
        partner = np.isclose(seen.images, images[drawn.partners])
        assert (own | partner).all()
        moved = np.asarray(drawn.partners) != np.arange(8)
        parts = own.reshape(8, -1).mean(1)[moved]
        np.testing.assert_allclose(parts, float(seen.kept), atol=1e-6)
        kept.append(float(seen.kept))
    assert min(kept) < 0.5 and max(kept) > 0.95


def test_crops_and_cells_come_with_the_factor():
    images, _ = data(40)
    seen = seen_by(0, images, PLAIN._replace(factor=2))
    same = [(a == b).all() or (a == b[:, ::-1]).all()
            for a, b in zip(seen.images, images, strict=True)]  # fmt: skip
    assert np.mean(same) < 0.5
    assert seen.images.min() >= images.min() - 1e-6 and seen.images.max() <= images.max() + 1e-6


def test_one_step_is_adamw_on_the_divergence_written_out():
    """The whole set in one batch: what the order is does not matter."""
    protocol = PLAIN._replace(labels="soft", epochs=1, batch_size=10)
    found = trained(protocol)
    k_init, k_train = jax.random.split(jax.random.key(0))
    start = jax.tree.map(np.float64, network().init(k_init))
    images, _ = data()
    # The labels are those of the image as it is; the network sees its mirror image.
    k_order, k_view = jax.random.split(jax.random.fold_in(k_train, 0))
    rows = jax.random.permutation(k_order, 10)
    drawn = draw(jax.random.fold_in(k_view, 0), 10, images.shape[1:], protocol)
    seen = view(drawn, images[rows], NORMALIZE).images
    x = np.float64(seen).reshape(10, -1)
    soft = _softmax(np.float64(images[rows]).reshape(10, -1) @ np.float64(TEACHER["w"]) / 20)
    own = _softmax((x @ start["w"] + start["b"]) / 20)
    gradient = {"w": x.T @ (own - soft) / 10 / 20, "b": (own - soft).mean(0) / 20}
    for name, g in gradient.items():
        step = g / (np.abs(g) + 1e-8)  # Adam's first
        decay = 0.01 * start[name] if name == "w" else 0.0
        np.testing.assert_allclose(found[name], start[name] - 0.05 * (step + decay), atol=2e-3)


def _softmax(x):
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


@pytest.mark.slow
def test_stored_views_that_all_differ_are_the_teachers_of_every_view():
    """Drawn by the key that a training draws its own by."""
    key = jax.random.split(jax.random.key(0))[1]
    changes = {"factor": 2, "cutmix": True}
    every = trained(PLAIN, labels="teacher", **changes)
    views = stored(key, views=4, **changes)
    as_many = trained(PLAIN, labels="views", views=views, **changes)
    few = trained(PLAIN, labels="views", views=stored(key, views=1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), every, as_many)
    assert np.abs(every["w"] - few["w"]).max() > 1e-4


def test_stored_views_are_what_a_reader_makes_of_their_parameters():
    """By NumPy alone, as another program would read the file; crops whole here."""
    images, _ = data()
    views = stored(jax.random.key(3), views=2, cutmix=True)
    assert views.order.shape == (2, 2, 6) and views.labels.dtype == np.float16
    assert all(isinstance(x, np.ndarray) for x in views)
    np.testing.assert_array_equal(views.boxes.reshape(-1, 4), np.tile([0, 0, SIDE, SIDE], (24, 1)))
    for number in range(2):
        assert sorted(views.order[number].reshape(-1)[:10]) == list(range(10))
        for batch in range(2):
            x = np.asarray(images)[views.order[number, batch]]
            flips = views.flips[number, batch]
            x = np.where(flips[:, None, None, None], x[:, :, ::-1], x)
            top, bottom, left, right = views.rectangle[number, batch]
            mixed = x.copy()
            mixed[:, top:bottom, left:right] = x[views.partners[number, batch]][
                :, top:bottom, left:right
            ]
            wanted = _softmax(mixed.reshape(6, -1).astype(np.float64) @ _W / 20)
            np.testing.assert_allclose(views.labels[number, batch], wanted, atol=1e-3)


def test_the_same_key_trains_the_same_network():
    first, again, other = trained(PLAIN), trained(PLAIN), trained(PLAIN, seed=1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.abs(first["w"] - other["w"]).max() > 1e-4


def test_a_network_learns_what_its_teacher_says():
    found = trained(PLAIN, labels="teacher", epochs=400, learning_rate=0.02, temperature=1.0)
    images, _ = data()
    mine, its = (network().logits(p, images).argmax(1) for p in (found, TEACHER))
    assert (mine == its).mean() >= 0.9


def test_labels_that_are_made_once_lie_beside_the_set(tmp_path, capsys):
    """A file for each kind, found again, and refused when it is damaged."""
    images, labels = data()
    card = {"content_sha256": "of these images"}
    made = Distilled(np.asarray(images), np.asarray(labels), None, card)
    row = Made("rded", tmp_path, Recipe(None, 1), lambda: made, dict, dict)
    task = SimpleNamespace(network=network(), normalize=NORMALIZE)
    bench = Bench("accuracy", task, None, {"rded": row}, tmp_path, None, {})
    for kind, rest in (("soft", ""), ("views", r", \d+ of views")):
        protocol = PLAIN._replace(labels=kind)
        first = _stored(bench, row, TEACHER, protocol, "protocol")
        (file,) = tmp_path.glob(f"{kind}-*.npz")
        # A row of three classes in 16 bits for each of ten images; twelve in two batches, twice.
        size = 2 * 3 * {"soft": 10, "views": 24}[kind]
        said = capsys.readouterr().out
        assert re.fullmatch(rf"rded: {file.name} has {size} bytes of labels{rest}\n", said)
        again = _stored(bench, row, TEACHER, protocol, "protocol")
        jax.tree.map(np.testing.assert_array_equal, first, again)
        assert capsys.readouterr().out == ""
        assert sum(x.nbytes for x in jax.tree.leaves(first)) >= size
        # Of other images, or another protocol, there are others.
        _stored(bench, row, TEACHER, protocol, "another")
        assert len(list(tmp_path.glob(f"{kind}-*.npz"))) == 2
        capsys.readouterr()
        file.write_bytes(b"no archive")
        with pytest.raises(InputError, match=f"{file.name} holds no {kind} labels"):
            _stored(bench, row, TEACHER, protocol, "protocol")
