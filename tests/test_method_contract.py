"""The contract, asked of every method of condensation: in a loop of one's own, and on devices."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.condense import charfn
from jaxdistill.condense.coreset import Table
from jaxdistill.condense.dm import dm
from jaxdistill.condense.gradient import gradient_matching
from jaxdistill.condense.herding import herding
from jaxdistill.condense.k_center import k_center
from jaxdistill.condense.ncfm import OBJECTIVES, ncfm
from jaxdistill.condense.random import random_subset
from jaxdistill.condense.rded import rded
from jaxdistill.condense.released import characteristic, matching
from jaxdistill.data.augment import normalizer
from jaxdistill.data.device import draw
from jaxdistill.method import Method
from jaxdistill.task import Network
from tests.test_backends import CLASSES, SIDE, assert_backends_agree, toy_data

DIM, IPC, REAL = 6, 2, 16
CORESETS = {"random": random_subset, "herding": herding, "k_center": k_center}
NORMALIZE = normalizer((0.3,), (0.3,))


class Case(NamedTuple):
    """A method, what it is given frozen, and how many images of each class it puts out."""

    method: Method
    frozen: object
    images: int


def features(params, images):
    return images.reshape(images.shape[0], -1) @ params["w"]


def logits(params, images):
    return features(params, images) @ params["head"]


def network(seed, *leading):
    numbers = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(numbers.normal(size=(*leading, *shape)), jnp.float32)  # noqa: E731
    return {"w": normal(SIDE * SIDE, DIM) / SIDE, "head": normal(DIM, CLASSES)}


POOL = {"initial": network(0, 3), "trained": network(1, 3)}


def ncfm_case(learned=False, strategy="flip_crop", **options):
    # A linear network keeps the programs small; it starts as the plain Gaussian, like ScaleNet.
    sampler = charfn.scale_mixture(
        lambda key, dim: jnp.zeros((dim, dim)), lambda params, noise: noise @ params
    )
    method = ncfm(
        features,
        logits,
        optax.sgd(1e-3, momentum=0.5),
        sampler if learned else charfn.gaussian(),
        optax.adam(1e-2) if learned else None,
        normalize=NORMALIZE,
        feature_dim=DIM,
        ipc=IPC,
        batch_real=REAL,
        num_freqs=16,
        strategy=strategy,
        **options,
    )
    return Case(method, POOL, 4 * IPC)


def dm_case(strategy="flip_crop"):
    def network_init(key):
        return {"w": jax.random.normal(key, (SIDE * SIDE, DIM)) / SIDE}

    options = {"normalize": NORMALIZE, "ipc": IPC, "batch_real": REAL, "strategy": strategy}
    return Case(dm(features, network_init, optax.sgd(0.1), **options), (), IPC)


def gradient_case(strategy="flip_crop", **options):
    # Two steps a network, so that one is trained between.
    method = gradient_matching(
        logits,
        lambda key: jax.tree.map(lambda x: x * jax.random.uniform(key), network(0)),
        optax.sgd(1e-2, momentum=0.5),
        normalize=NORMALIZE,
        ipc=IPC,
        batch_real=REAL,
        outer_steps=2,
        inner_epochs=2,
        strategy=strategy,
        **options,
    )
    return Case(method, (), IPC)


def coreset_case(name):
    data, _ = toy_data()
    images = jnp.asarray(data.examples["images"].reshape(-1, *data.shapes[0]))
    index = jnp.arange(len(images), dtype=jnp.int32).reshape(CLASSES, -1)
    counts = jnp.asarray(data.counts)
    table = Table(images, index, counts, features(network(0), NORMALIZE(images)))
    return Case(CORESETS[name](IPC), table, IPC)


def rded_case():
    # A batch of the size that the others take, so that all can be fed together.
    method = rded(
        logits, normalize=NORMALIZE, ipc=1, image_shape=(SIDE, SIDE, 1), mipc=REAL, factor=2
    )
    return Case(method, {"observers": POOL["trained"]}, 1)


def released_case():
    shape = SIDE, SIDE, 1
    linear = Network(
        lambda key: {"w": jax.random.normal(key, (SIDE**2, DIM))}, logits, features, DIM
    )
    embedding = characteristic(linear, 1, num_freqs=8, scale=1.0)
    means = np.random.default_rng(2).normal(size=(8, CLASSES, embedding.dim)) / embedding.dim**0.5
    method = matching(
        embedding, optax.sgd(1.0), num_classes=CLASSES, image_shape=shape, releases=8, ipc=IPC
    )
    return Case(method, {"means": jnp.asarray(means, jnp.float32)}, IPC)


CASES = {
    "ncfm, gaussian": ncfm_case,
    "ncfm, learned": partial(ncfm_case, learned=True, warmup=1),
    "ncfm, fine-tuned": partial(ncfm_case, finetune_learning_rate=0.01, calibration=1.0),
    "dm": dm_case,
    "gradient": gradient_case,
    "rded": rded_case,
    "released": released_case,
    **{name: partial(coreset_case, name) for name in CORESETS},
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """A case, a batch for it, its state at the start, and its compiled step."""
    built = CASES[request.param]()
    batch = draw(built.method.batches, toy_data()[0], jax.random.key(0))
    init = jax.jit(lambda frozen, key: built.method.init(key, frozen, batch))
    return built, batch, init(built.frozen, jax.random.key(1)), jax.jit(built.method.step)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), jax.tree.leaves(tree))


def test_steps_keep_structure_shapes_and_types_so_they_can_be_scanned(case):
    (method, frozen, _), batch, state, _ = case

    def steps(keys):
        first = method.init(jax.random.key(1), frozen, batch)
        return first, *jax.lax.scan(lambda s, k: method.step(s, frozen, batch, k), first, keys)

    *states, metrics = jax.eval_shape(steps, jax.random.split(jax.random.key(2), 5))
    for other in states:
        assert jax.tree.structure(other) == jax.tree.structure(state)
        assert shapes(other) == shapes(state)
    assert metrics and all(m.shape == (5,) and m.dtype == jnp.float32 for m in metrics.values())


def test_a_bare_loop_gives_images_that_follow_from_the_keys(case, request):
    (method, frozen, count), batch, state, step = case

    def loop(seed):
        last = state
        for key in jax.random.split(jax.random.key(seed), IPC):
            last, metrics = step(last, frozen, batch, key)
            assert all(np.isfinite(m) for m in metrics.values())
        return last

    first, again, other = (loop(seed) for seed in (3, 3, 4))
    same = lambda a, b: jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), a, b))  # noqa: E731
    assert same(first, again)
    greedy = any(name in request.node.name for name in ("herding", "k_center"))
    assert same(first, other) == greedy
    images = method.output(first)["images"]
    assert images.shape == (CLASSES, count, SIDE, SIDE, 1)
    assert images.dtype == jnp.float32
    assert images.min() >= 0 and images.max() <= 1
    assert images.std() > 0.01


def together(methods):
    """Several methods as one that feeds them the same batches: one program for all of them."""

    def init(key, frozen, batch):
        return {name: m.init(key, frozen[name], batch) for name, m in methods.items()}

    def step(state, frozen, batch, key):
        states, log = {}, {}
        for name, method in methods.items():
            states[name], metrics = method.step(state[name], frozen[name], batch, key)
            log |= {f"{name}/{metric}": value for metric, value in metrics.items()}
        return states, log

    def specs(state, mesh):
        return {name: m.specs(state[name], mesh) for name, m in methods.items()}

    (batches,) = {m.batches for m in methods.values()}
    return Method(init, step, lambda state: state, batches, specs)


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same():
    cases = {
        "gaussian": ncfm_case(strategy="crop"),
        **{o: ncfm_case(learned=True, objective=o, strategy="none") for o in OBJECTIVES},
        "fine-tuned": ncfm_case(finetune_learning_rate=0.01, calibration=1.0, strategy="none"),
        "dm": dm_case(strategy="flip"),
        "gradient": gradient_case(strategy="flip"),
        "rded": rded_case(),
    }
    tested = together({name: case.method for name, case in cases.items()})
    frozen = {name: case.frozen for name, case in cases.items()}
    assert_backends_agree(tested, toy_data()[0], frozen)
