"""Trajectories: a step against NumPy and against a plain loop, windows, experts on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxdistill import config as configs
from jaxdistill import experts, settings
from jaxdistill.condense.synthetic import loss_gradient
from jaxdistill.condense.trajectory import Window, distance, trajectory_matching, unrolled
from jaxdistill.data import sources
from jaxdistill.data.augment import augment
from jaxdistill.data.device import resident
from jaxdistill.errors import InputError
from jaxdistill.eval import classify, train_on
from jaxdistill.eval.bench import Made
from jaxdistill.io import artifact
from tests.condense.test_dm_coreset_labels import (
    CLASSES,
    linear,
    normalize,
    uint8_images,
    weights,
)
from tests.condense.test_gradient import slope
from tests.test_backends import assert_backends_agree

STEPS, RATE = 3, 0.4
WINDOW = Window(span=2, start_from=0, start_until=1)


def ways(number=2, seed=0):
    """Random walks of linear classifiers."""
    numbers = np.random.default_rng(seed)
    start = np.asarray(weights(outputs=CLASSES)).reshape(-1)
    walks = numbers.normal(size=(number, WINDOW.snapshots, start.size)).cumsum(1) / 20
    return jnp.asarray(start + walks, jnp.float32)


def make(rate=0.0, **options):
    defaults = {"normalize": normalize, "ipc": 2, "strategy": "none", "rate": RATE}
    return trajectory_matching(
        linear,
        jax.eval_shape(lambda: weights(outputs=CLASSES)),
        optax.sgd(rate),
        optax.sgd(1.0),
        window=WINDOW,
        unroll=STEPS,
        **defaults | options,
    )


REAL = {"real": (26 + 0.8 * uint8_images(CLASSES, 6)).astype(jnp.uint8)}


def test_a_step_against_numpy():
    method, batch = make(1e-2), {"trajectory": ways(), "keys": jax.random.split(jax.random.key(3))}
    state = method.init(jax.random.key(0), REAL, batch)
    after, metrics = jax.jit(method.step)(state, REAL, batch, jax.random.key(1))
    begin = [int(WINDOW.drawn(k, jnp.int32(0))) for k in batch["keys"]]
    assert set(begin) <= {0, 1}
    labels = np.repeat(np.arange(CLASSES), 2)

    def match(pixels, log_rate):
        x, found = (pixels - 0.5).reshape(CLASSES * 2, -1), []
        for way, i in zip(np.float64(batch["trajectory"]), begin, strict=True):
            w = way[i].reshape(-1, CLASSES)
            for _ in range(STEPS):
                w = w - np.exp(log_rate) * slope(w, x, labels)
            gap = np.square(w.reshape(-1) - way[i + 2]).sum()
            found.append(gap / np.square(way[i] - way[i + 2]).sum())
        return np.mean(found)

    pixels, log_rate = np.float64(state.pixels), np.log(RATE)
    np.testing.assert_allclose(metrics["match"], match(pixels, log_rate), rtol=1e-4)
    numbers = np.random.default_rng(1)
    moved = (pixels - np.float64(after.pixels)) / 1e-2
    for _ in range(4):
        way = numbers.normal(size=pixels.shape)
        by_difference = match(pixels + 1e-5 * way, log_rate) - match(pixels - 1e-5 * way, log_rate)
        np.testing.assert_allclose((moved * way).sum(), by_difference / 2e-5, rtol=5e-3, atol=1e-4)
    by_difference = (match(pixels, log_rate + 1e-5) - match(pixels, log_rate - 1e-5)) / 2e-5
    np.testing.assert_allclose(log_rate - after.log_rate, by_difference, rtol=1e-3)
    np.testing.assert_allclose(metrics["rate"], np.exp(after.log_rate), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "strategy"), [(256, "flip_crop"), (4, "crop")])
def test_the_gradient_goes_through_every_step(batch_size, strategy):
    """As in a loop of which everything is kept."""
    start, wanted = ways(1)[0, :2]
    images = normalize(uint8_images(6)) + 0.5
    labels = jnp.arange(6, dtype=jnp.int32) % CLASSES
    options = {"steps": 5, "batch_size": batch_size, "normalize": lambda x: x - 0.5}
    options |= {"strategy": strategy, "microbatch": 3}
    unravel = lambda v: v.reshape(-1, CLASSES)  # noqa: E731

    def there(images, rate):
        return unrolled(linear, unravel, start, images, labels, rate, jax.random.key(5), **options)

    def kept(images, rate):
        theta, size = start, min(batch_size, 6)
        for i in range(5):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(5), i // (6 // size)))
            order = jax.random.permutation(keys[0], 6) if size < 6 else jnp.arange(6)
            mine = order[i % (6 // size) * size :][:size]
            x = augment(jax.random.fold_in(keys[1], i), images[mine] - 0.5, strategy)
            own = jnp.full(size, 1 / size)
            grads = loss_gradient(linear, unravel(theta), x, labels[mine], own, microbatch=99)
            theta = theta - rate * grads.reshape(-1)
        return theta

    loss = lambda f: lambda *args: distance(f(*args), wanted, start)  # noqa: E731
    for own, other in zip(
        jax.grad(loss(there), (0, 1))(images, RATE),
        jax.grad(loss(kept), (0, 1))(images, RATE),
        strict=True,
    ):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-7)


def test_learned_labels_against_numpy():
    numbers = np.random.default_rng(2)
    logits = jnp.asarray(numbers.normal(size=(CLASSES, 6, CLASSES)), jnp.float32)
    frozen = REAL | {"logits": logits}
    method = make(0.0, label_optimizer=optax.sgd(1.0))
    batch = {"trajectory": ways(1), "keys": jax.random.split(jax.random.key(3), 1)}
    state = method.init(jax.random.key(0), frozen, batch)
    # Those of the very images that it starts from.
    real = np.float64(REAL["real"]) / 255
    for pixels, label, images, said in zip(*state[:1], state.labels, real, logits, strict=True):
        for image, own in zip(pixels, label, strict=True):
            [same] = [i for i in range(6) if np.allclose(image, images[i], atol=1e-6)]
            np.testing.assert_array_equal(own, said[same])
    after, metrics = jax.jit(method.step)(state, frozen, batch, jax.random.key(1))
    begin = int(WINDOW.drawn(batch["keys"][0], jnp.int32(0)))
    way = np.float64(batch["trajectory"][0])
    x = np.float64(state.pixels - 0.5).reshape(CLASSES * 2, -1)

    def softmax(z):
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def match(labels):
        w, target = way[begin].reshape(-1, CLASSES), softmax(labels.reshape(-1, CLASSES))
        for _ in range(STEPS):
            w = w - RATE * x.T @ (softmax(x @ w) - target) / len(x)
        gap = np.square(w.reshape(-1) - way[begin + 2]).sum()
        return gap / np.square(way[begin] - way[begin + 2]).sum()

    labels = np.float64(state.labels)
    np.testing.assert_allclose(metrics["match"], match(labels), rtol=1e-4)
    moved = labels - np.float64(after.labels)
    for _ in range(3):
        way_of = numbers.normal(size=labels.shape)
        wanted = (match(labels + 1e-4 * way_of) - match(labels - 1e-4 * way_of)) / 2e-4
        np.testing.assert_allclose((moved * way_of).sum(), wanted, rtol=1e-2, atol=1e-5)
    soft = method.output(after)["soft_labels"]
    np.testing.assert_allclose(soft, softmax(np.float64(after.labels)), rtol=1e-4)


def test_windows_grow():
    keys = jax.random.split(jax.random.key(0), 300)

    def drawn(window, step):
        return set(np.asarray(jax.vmap(lambda k: window.drawn(k, jnp.int32(step)))(keys)).tolist())

    plain = Window(span=3, start_from=2, start_until=5)
    assert plain.snapshots == 7 and drawn(plain, 0) == {0, 1, 2, 3}
    growing = plain._replace(grow_from=3, grow_steps=100)
    grown = {0: {0, 1}, 49: {0, 1}, 50: {0, 1, 2}, 100: {0, 1, 2, 3}, 9999: {0, 1, 2, 3}}
    assert {step: drawn(growing, step) for step in grown} == grown


def test_images_come_to_lead_where_experts_went():
    """A way that a network can go: that of its own training on other images."""
    real = normalize(uint8_images(CLASSES * 8, seed=4)).reshape(CLASSES * 8, -1)
    labels, w, way = np.repeat(np.arange(CLASSES), 8), weights(outputs=CLASSES), []
    for _ in range(WINDOW.snapshots):
        way.append(np.asarray(w).reshape(-1))
        w = w - 0.3 * slope(np.float64(w), np.float64(real), labels)
    batch = {"trajectory": jnp.asarray(np.stack(way), jnp.float32)[None]}
    method = trajectory_matching(
        linear,
        jax.eval_shape(lambda: weights(outputs=CLASSES)),
        optax.adam(0.02),
        optax.adam(0.02),
        normalize=normalize,
        ipc=2,
        start="noise",
        strategy="none",
        window=WINDOW,
        unroll=STEPS,
    )
    state = method.init(jax.random.key(0), REAL, batch)

    def step(state, key):
        return method.step(state, REAL, batch | {"keys": key[None]}, key)

    keys = jax.random.split(jax.random.key(1), 100)
    state, metrics = jax.jit(lambda s: jax.lax.scan(step, s, keys))(state)
    assert metrics["match"][-10:].mean() < 0.5 * metrics["match"][:5].mean()
    assert state.pixels.min() >= 0 and state.pixels.max() <= 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"start_until": "9"},
            "an expert of 10 epochs has no epoch 11, which method.start_until=9",
        ),
        ({"start_from": "3"}, "start_until=2 is before method.start_from=3"),
        ({"grow_from": "5"}, "grow_from=5 is outside of the epochs from 0 to 2"),
        ({"batch_experts": "11"}, "batch_experts=11 are more than method.experts=10"),
        ({"expert_strategy": "crop_blur"}, "unknown augmentation 'blur'"),
        ({"learn_labels": "True", "start": "noise"}, "method.start is noise; give tiled or random"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(given, said):
    overrides = {f"method.{name}": text for name, text in ({"experts": "10"} | given).items()}
    config = configs.load("ncfm:method=trajectory,baselines=", overrides)
    experiment = settings.resolve(config)
    with pytest.raises(InputError, match=said):
        experiment.rows["trajectory"].recipe(experiment.family.shapes(experiment))


# ---------------------------------------------------------------------------- experts

NETWORK = train_on.Network(
    init=lambda key: {"w": jax.random.normal(key, (64, 10)) / 8, "b": jnp.zeros(10)},
    logits=lambda params, x: x.reshape(len(x), -1) @ params["w"] + params["b"],
)


def trained(folder, number=2, **options):
    return experts.load_or_train(
        folder,
        number,
        NETWORK,
        sources.load("digits"),
        epochs=2,
        normalize=_scaled,
        protocol=train_on.Protocol(1, 64, 0.5, 0.0, 0.0, "none", ()),
        microbatch=256,
        identity="linear",
        **options,
    )


def _scaled(images):
    return images.astype(jnp.float32) / 255 - 0.3


def test_experts_are_trained_once_and_more_of_them_later(tmp_path):
    first = trained(tmp_path)
    assert (first.shape, len(first), first.dtype) == ((2, 3, 650), 2, np.float32)
    both = first[np.arange(2)]
    # Ever better, from another start each.
    data = sources.load("digits")
    x, labels = np.asarray(_scaled(data.train.images)).reshape(-1, 64), data.train.labels
    for way in both:
        right = [np.mean((x @ w[10:].reshape(64, 10) + w[:10]).argmax(1) == labels) for w in way]
        assert right[0] < right[1] < right[2] and right[2] > 0.6
    assert not np.array_equal(both[0, 0], both[1, 0])
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    more = trained(tmp_path, number=3)
    np.testing.assert_array_equal(more[np.arange(2)], both)
    assert [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())][:2] == times
    some = more.since(1, 2)
    assert some.shape == (3, 2, 650)
    np.testing.assert_array_equal(some[np.array([1, 0])], both[::-1, 1:])
    (tmp_path / "linear-1.f32").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match=r"linear-1.f32 is no expert of this run \(it has 100"):
        trained(tmp_path)


def test_labels_begin_as_what_experts_say_and_are_kept(tmp_path):
    """Images are those that experts know; no evaluation says something else of them."""
    flags = "ncfm:dataset=digits,method=datm,baselines=,smoke"
    experiment = settings.resolve(configs.load(flags, {"method.experts": "8"}))
    loaded = experiment.family.load(experiment, tmp_path, lambda: False)
    row = experiment.rows["trajectory"]  # as its module is called
    made = row.recipe(loaded.task)
    frozen = made.frozen.load()
    assert {k: (x.shape, x.dtype) for k, x in frozen.items()} == {
        k: (x.shape, x.dtype) for k, x in made.frozen.shapes.items()
    }
    net, files = loaded.task.network, sorted((tmp_path / "experts").iterdir())
    shape = jax.eval_shape(net.init, jax.random.key(0))
    unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(x.shape), shape))[1]
    images = loaded.task.normalize(frozen["real"].reshape(-1, 8, 8, 1))
    ends = [np.fromfile(f, np.float32).reshape(3, -1)[-1] for f in files]
    said = np.stack([jax.jit(net.logits)(unravel(jnp.asarray(e)), images) for e in ends])
    labels = np.repeat(np.arange(10), len(images) // 10)
    knows = said.argmax(-1) == labels
    for i in np.flatnonzero(knows.any(0)):
        own = frozen["logits"].reshape(-1, 10)[i]
        np.testing.assert_allclose(own, said[knows[:, i], i].mean(0), rtol=1e-3, atol=1e-4)
    assert knows.any(0).mean() > 0.5
    for i in np.flatnonzero(~knows.any(0)):
        assert frozen["logits"].reshape(-1, 10)[i].argmax() == labels[i]
    state = made.method.init(jax.random.key(0), frozen, ())
    output, card = made.method.output(state), {"method": "trajectory", "config_hash": "0"}
    card |= {"dataset": "digits", "provenance": {}}
    experiment.family.save(tmp_path, experiment, loaded, row, output, card)
    soft = artifact.load(tmp_path).soft_labels
    np.testing.assert_array_equal(soft, output["soft_labels"].reshape(-1, 10))
    kept = Made("datm", tmp_path, made, lambda: artifact.load(tmp_path), dict, dict)
    np.testing.assert_array_equal(classify._soft_labels(loaded.task, kept, 20.0), soft)


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same():
    method = make(1e-2, batch_experts=8, strategy="flip_crop")
    assert_backends_agree(method, resident({"trajectory": np.asarray(ways(12))}), REAL)
