"""The contract, asked of every method of condensation: in a loop of one's own, and on devices."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.condense import charfn
from jaxdistill.condense.coreset import CORESETS, Table
from jaxdistill.condense.dm import dm
from jaxdistill.condense.ncfm import OBJECTIVES, ncfm
from jaxdistill.data.augment import normalizer
from jaxdistill.data.device import draw
from jaxdistill.method import Method
from jaxdistill.nn.frequency_net import ScaleNet
from tests.test_backends import CLASSES, SIDE, assert_backends_agree, toy_data

DIM, IPC, REAL = 6, 2, 16
PREPARE = normalizer((0.3,), (0.3,))

fast_jit = jax.jit(compiler_options={"xla_backend_optimization_level": 0})


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
    net = ScaleNet(8)
    sampler = charfn.scale_mixture(
        lambda k, dim: net.init(k, jnp.zeros((2, dim)))["params"],
        lambda params, noise: net.apply({"params": params}, noise),
    )
    method = ncfm(
        features,
        logits,
        optax.sgd(1e-3, momentum=0.5),
        sampler if learned else charfn.gaussian(),
        optax.adam(1e-2) if learned else None,
        prepare=PREPARE,
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

    options = {"prepare": PREPARE, "ipc": IPC, "batch_real": REAL, "strategy": strategy}
    return Case(dm(features, network_init, optax.sgd(0.1), **options), (), IPC)


def coreset_case(name):
    data, _ = toy_data()
    images = data.pixels.reshape(-1, *data.image_shape)
    table = Table(images, data.table, data.counts, features(network(0), PREPARE(images)))
    return Case(CORESETS[name](IPC), table, IPC)


CASES = {
    "ncfm, gaussian": ncfm_case,
    "ncfm, learned": partial(ncfm_case, learned=True, warmup=1),
    "ncfm, fine-tuned": partial(ncfm_case, finetune_rate=0.01, calibration=1.0),
    "dm": dm_case,
    **{name: partial(coreset_case, name) for name in CORESETS},
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """A case, a batch for it, and its init and three scanned steps as compiled functions."""
    built = CASES[request.param]()
    batch = draw(built.method.batches, toy_data()[0], jax.random.key(0))

    @fast_jit
    def three_steps(state, frozen, key):
        step = lambda state, key: built.method.step(state, frozen, batch, key)  # noqa: E731
        return jax.lax.scan(step, state, jax.random.split(key, 3))

    init = fast_jit(lambda frozen, key: built.method.init(key, frozen, batch))
    return built, batch, init(built.frozen, jax.random.key(1)), three_steps


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), jax.tree.leaves(tree))


def test_a_step_keeps_structure_shapes_and_types(case):
    (method, frozen, _), batch, state, _ = case
    abstract = jax.eval_shape(method.init, jax.random.key(1), frozen, batch)
    after, metrics = jax.eval_shape(method.step, abstract, frozen, batch, jax.random.key(2))
    for other in (abstract, after):
        assert jax.tree.structure(other) == jax.tree.structure(state)
        assert shapes(other) == shapes(state)
    assert metrics and all(m.shape == () and m.dtype == jnp.float32 for m in metrics.values())


def test_steps_can_be_scanned_and_follow_from_their_key(case, request):
    (_, frozen, _), _, state, three_steps = case
    first, metrics = three_steps(state, frozen, jax.random.key(3))
    again, _ = three_steps(state, frozen, jax.random.key(3))
    other, _ = three_steps(state, frozen, jax.random.key(4))
    assert all(np.isfinite(m).all() for m in metrics.values())
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), first, again))
    same = jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), first, other))
    greedy = "herding" in request.node.name or "k_center" in request.node.name
    assert same == greedy


def test_a_bare_loop_gives_images(case):
    (method, frozen, count), batch, state, _ = case
    step = fast_jit(method.step)
    for key in jax.random.split(jax.random.key(3), 3)[:IPC]:
        state, _ = step(state, frozen, batch, key)
    images = method.output(state)["images"]
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

    (batches,) = {m.batches for m in methods.values()}
    return Method(init, step, lambda state: state, batches)


@pytest.fixture
def quick_compilation():
    """The programs are large and run for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick_compilation")
def test_any_number_of_devices_gives_the_same():
    cases = {
        "gaussian": ncfm_case(strategy="flip"),
        **{o: ncfm_case(learned=True, objective=o, strategy="crop") for o in OBJECTIVES},
        "fine-tuned": ncfm_case(finetune_rate=0.01, calibration=1.0, strategy="none"),
        "dm": dm_case(strategy="cutout"),
    }
    tested = together({name: case.method for name, case in cases.items()})
    frozen = {name: case.frozen for name, case in cases.items()}
    assert_backends_agree(tested, toy_data()[0], frozen)
