"""Training against a plain loop, and measuring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxdistill.data.augment import normalizer
from jaxdistill.data.sources import load
from jaxdistill.errors import Interrupted
from jaxdistill.eval.train_on import (
    Accuracy,
    Network,
    Protocol,
    accuracy,
    as_record,
    calibration_error,
    one_hot,
    train,
    train_many,
)

CLASSES, SIDE = 4, 4
PLAIN = Protocol(epochs=8, batch=16, rate=0.3, weight_decay=0.1, strategy="none")


def linear(side=SIDE, classes=CLASSES):
    pixels = side * side
    return Network(
        init=lambda k: {"w": jax.random.normal(k, (pixels, classes)) / 9, "b": jnp.zeros(classes)},
        logits=lambda p, x: x.reshape(x.shape[0], -1) @ p["w"] + p["b"],
    )


LINEAR = linear()
NORMALIZE = normalizer((0.5,), (0.25,))


def some_data(n, seed=0):
    numbers = np.random.default_rng(seed)
    images = numbers.integers(0, 256, (n, SIDE, SIDE, 1)).astype(np.uint8)
    targets = numbers.dirichlet(np.ones(CLASSES), n).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(targets)


def fit(images, targets, protocol, seed=0, **options):
    options = {"normalize": NORMALIZE, **options}
    return train(jax.random.key(seed), LINEAR, images, targets, protocol=protocol, **options)


def start(seed=3):
    weights = np.random.default_rng(seed).normal(size=(SIDE * SIDE, CLASSES)).astype(np.float32)
    return {"w": jnp.asarray(weights), "b": jnp.zeros(CLASSES)}


class Loop:
    """SGD with momentum in float64, as one writes it down."""

    def __init__(self, images, targets, protocol, params):
        self.x = (np.float64(images).reshape(len(images), -1) / 255 - 0.5) / 0.25
        self.y, self.protocol = np.float64(targets), protocol
        self.w, self.b = np.float64(params["w"]), np.float64(params["b"])
        self.forget()

    def forget(self):
        self.vw, self.vb = np.zeros_like(self.w), np.zeros_like(self.b)

    def step(self, rate, rows=slice(None)):
        x, y = self.x[rows], self.y[rows]
        out = x @ self.w + self.b
        odds = np.exp(out - out.max(1, keepdims=True))
        error = (odds / odds.sum(1, keepdims=True) - y) / len(x)
        decay, momentum = self.protocol.weight_decay, self.protocol.momentum
        self.vw = momentum * self.vw + x.T @ error + decay * self.w
        self.vb = momentum * self.vb + error.sum(0) + decay * self.b
        self.w, self.b = self.w - rate * self.vw, self.b - rate * self.vb

    def is_near(self, params):
        near = lambda a, b: np.allclose(a, b, atol=1e-4, rtol=1e-4)  # noqa: E731
        return near(params["w"], self.w) and near(params["b"], self.b)


@pytest.mark.parametrize("decay_at", [(0.5,), (2 / 3, 5 / 6)])
def test_a_single_epoch_has_the_full_rate(decay_at):
    images, targets = some_data(10)
    one = PLAIN._replace(epochs=1, batch=2, decay_at=decay_at)
    found = fit(images, targets, one, params=start())
    wanted = fit(images, targets, one._replace(decay_at=()), params=start())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


def test_training_is_that_of_a_plain_loop_and_the_decay_forgets_the_momentum():
    images, targets = some_data(10)
    params = fit(images, targets, PLAIN, params=start())
    right, kept = (Loop(images, targets, PLAIN, start()) for _ in range(2))
    for epoch in range(PLAIN.epochs):
        if epoch == PLAIN.epochs // 2:
            right.forget()
        rate = PLAIN.rate * (0.1 if epoch >= PLAIN.epochs // 2 else 1)
        right.step(rate)
        kept.step(rate)
    assert right.is_near(params)
    assert not kept.is_near(params)


def test_the_rate_falls_at_every_given_fraction():
    images, targets = some_data(10)
    protocol = PLAIN._replace(decay_at=(0.25, 0.75))
    params = fit(images, targets, protocol, params=start())
    loop = Loop(images, targets, protocol, start())
    for steps, rate in ((2, 0.3), (4, 0.03), (2, 0.003)):
        loop.forget()
        for _ in range(steps):
            loop.step(rate)
    assert loop.is_near(params)


def test_the_last_batch_of_an_epoch_is_short():
    images, targets = some_data(3)
    protocol = PLAIN._replace(epochs=1, batch=2, decay_at=())
    params = fit(images, targets, protocol, params=start())
    matches = 0
    for last in range(3):
        loop = Loop(images, targets, protocol, start())
        loop.step(protocol.rate, [i for i in range(3) if i != last])
        loop.step(protocol.rate, [last])
        matches += loop.is_near(params)
    assert matches == 1


def test_gradients_accumulated_over_chunks_are_those_of_the_batch():
    images, targets = some_data(10)
    for protocol in (PLAIN, PLAIN._replace(batch=7, strategy="color_flip")):
        whole, parts = (fit(images, targets, protocol, microbatch=c) for c in (256, 3))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), parts, whole)


def test_the_key_decides_the_training():
    images, targets = some_data(10)
    protocol = PLAIN._replace(batch=7, strategy="color_flip")
    a, b, c = (fit(images, targets, protocol, seed)["w"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert jnp.abs(a - c).max() > 0.05


@pytest.mark.parametrize("count", [3, 11])  # fewer and more than there are devices
def test_networks_trained_together_are_those_trained_alone(count):
    images, targets = some_data(10)
    protocol = PLAIN._replace(batch=7, strategy="color_flip")
    keys = jax.vmap(jax.random.key)(jnp.arange(count))
    options = {"normalize": NORMALIZE, "protocol": protocol}
    many = train_many(keys, LINEAR, images, targets, **options)
    for i in range(count):
        one = fit(images, targets, protocol, seed=i)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-5), many, one)


def test_the_fraction_done_is_told_and_training_can_be_stopped():
    images, targets = some_data(10)
    told = []
    fit(images, targets, PLAIN._replace(epochs=50, batch=4), on_block=told.append)
    assert told == sorted(told) and told[-1] == 1 and 15 <= len(told) <= 30

    told.clear()
    with pytest.raises(Interrupted, match="stopped while training networks"):
        fit(images, targets, PLAIN, on_block=told.append, should_stop=lambda: len(told) == 3)
    assert len(told) == 3


def test_soft_targets_are_learned_as_they_are():
    images, _ = some_data(1)
    targets = jnp.asarray([[0.1, 0.2, 0.3, 0.4]], jnp.float32)
    protocol = PLAIN._replace(epochs=300, rate=0.01, weight_decay=0.0)
    params = fit(images, targets, protocol)
    out = LINEAR.logits(params, NORMALIZE(images))
    np.testing.assert_allclose(jax.nn.softmax(out), targets, atol=0.01)


def test_images_in_fractions_train_like_bytes():
    images, targets = some_data(10)
    a = fit(images, targets, PLAIN, params=start())
    b = fit(images.astype(jnp.float32) / 255, targets, PLAIN, params=start())
    np.testing.assert_allclose(a["w"], b["w"], atol=1e-5)


@pytest.mark.parametrize("microbatch", [4, 11, 64])
def test_accuracy_counts_a_ragged_last_chunk(microbatch):
    images, _ = some_data(11)
    guesses = (np.float64(images).reshape(11, -1) / 255 - 0.5) / 0.25 @ np.float64(start()["w"])
    labels = guesses.argmax(1)
    # The first image fills up the last microbatch: it must count once, right or wrong.
    labels[[0, 5, 10]] = (labels[[0, 5, 10]] + 1) % CLASSES
    labels = jnp.asarray(labels, jnp.int32)
    options = {"normalize": NORMALIZE, "microbatch": microbatch}
    # One class more than there are images of.
    measured = accuracy(LINEAR, start(), images, labels, num_classes=CLASSES + 1, **options)
    assert measured.value == 8 / 11
    right = guesses.argmax(1) == np.asarray(labels)
    own = [right[np.asarray(labels) == c] for c in range(CLASSES + 1)]
    assert measured.classes == tuple(r.mean() if len(r) else None for r in own)
    said = scipy.special.softmax(guesses, axis=1)
    one_hot = np.eye(CLASSES)[np.asarray(labels)]
    np.testing.assert_allclose(measured.brier, np.square(said - one_hot).sum(1).mean(), rtol=1e-5)
    # Fewer images than bins, so that each has its own.
    excess = np.abs(said.max(1) - right).mean()
    np.testing.assert_allclose(measured.calibration_error, excess, rtol=1e-5)


def test_the_calibration_error_is_that_of_bins_of_equal_mass():
    # Two bins: sure in 0.9 and 0.7 and right once, sure in 0.6 and 0.5 and never right.
    confidence, right = np.array([0.6, 0.9, 0.5, 0.7]), np.array([False, True, False, False])
    error = calibration_error(confidence, right, bins=2)
    assert error == pytest.approx((abs(0.9 + 0.7 - 1) + abs(0.6 + 0.5)) / 4)
    rng = np.random.default_rng(0)
    confidence = rng.uniform(size=60_000)
    assert calibration_error(confidence, rng.uniform(size=60_000) < confidence) < 0.01
    assert calibration_error(confidence, rng.uniform(size=60_000) < confidence**2) == pytest.approx(
        1 / 6, abs=0.01
    )


def test_nothing_is_said_of_what_a_lost_network_thinks_it_knows():
    found = Accuracy(0.5, (1.0, None), 0.1, 0.7)
    assert as_record(found, False) == {
        "value": 0.5,
        "classes": [1.0, None],
        "calibration_error": 0.1,
        "brier": 0.7,
    }
    assert as_record(found, False, probabilities=False).keys() == {"value", "classes"}
    lost = as_record(found, True)
    assert np.isnan(lost["value"]) and lost.keys() == {"value", "classes"}


def test_a_linear_model_learns_the_digits():
    data = load("digits")
    network, normalize = linear(8, 10), normalizer(data.mean, data.std)
    params = train(
        jax.random.key(0),
        network,
        jnp.asarray(data.train.images),
        one_hot(data.train.labels, data.num_classes),
        normalize=normalize,
        protocol=Protocol(epochs=30, rate=0.05, strategy="none"),
    )
    images, labels = (jnp.asarray(x) for x in data.test)
    options = {"num_classes": data.num_classes, "normalize": normalize}
    assert accuracy(network, params, images, labels, **options).value > 0.85
