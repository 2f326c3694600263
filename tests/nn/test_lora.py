"""Low-rank adapters on modules that know nothing of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.nn import lora
from jaxdistill.nn.dense import Dense
from jaxdistill.nn.dit import DiT

SCALE = 0.7


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


class Plain(nn.Module):
    """A stranger's module: a plain layer, a repeated one, and a layer that is not dense."""

    @nn.compact
    def __call__(self, x):
        first = nn.Dense(7, name="first")
        x = nn.relu(first(x))
        x = nn.Dense(5, use_bias=False, name="second")(x) + first(jnp.ones_like(x[:, :6])).sum()
        return Dense(3, name="ours")(x)


def noisy(params):
    """Every leaf away from zero, so that every layer and adapter counts."""
    leaves, tree = jax.tree.flatten(params)
    values = [normal(*leaf.shape, seed=i, scale=0.3) for i, leaf in enumerate(leaves)]
    return tree.unflatten(values)


def add(params, rank, targets):
    key = jax.random.key(1, impl="rbg")
    return jax.jit(lambda key, params: lora.add(key, params, rank=rank, targets=targets))(
        key, params
    )


def merge(params):
    return jax.jit(lambda params: lora.merge(params, SCALE))(params)


def plain_case():
    module, x = Plain(), normal(4, 6)
    params = noisy(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    return params, ["first", "second"], lambda p: module.apply({"params": p}, x)


def dit_case(**options):
    module = DiT(channels=2, patch=2, width=8, depth=3, heads=2, num_classes=3, **options)
    t, label = jnp.asarray(np.float32([0.2, 0.9])), jnp.asarray(np.int32([0, 3]))
    x = normal(2, 4, 6, 2)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, t, label)["params"]
    targets = [r"blocks/(up|down|qkv)$", "condition/up", "^embed$"]
    return noisy(shapes), targets, lambda p: module.apply({"params": p}, x, t, label)


CASES = {
    "plain": plain_case,
    "scan": dit_case,
    "remat": lambda: dit_case(remat=True),
    "unroll": lambda: dit_case(unroll=3),
}


@pytest.mark.parametrize("case", CASES)
def test_adapted_layers_are_those_with_merged_kernels(case):
    params, targets, apply = CASES[case]()
    with_adapters = noisy(add(params, 2, targets))
    adapted = jax.jit(lora.adapt(apply, SCALE))(with_adapters)
    merged = merge(with_adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(adapted, jax.jit(apply)(merged), rtol=1e-4, atol=1e-4)
    assert np.abs(adapted - np.asarray(jax.jit(apply)(with_adapters))).max() > 0.01


@pytest.mark.parametrize("case", ["plain", "scan"])
def test_new_adapters_change_nothing(case):
    params, targets, apply = CASES[case]()
    with_adapters = add(params, 2, targets)
    adapted = jax.jit(lora.adapt(apply, SCALE))(with_adapters)
    np.testing.assert_allclose(adapted, jax.jit(apply)(params), atol=1e-6)


def test_factors_have_the_shapes_and_the_law_that_are_promised():
    params = {"blocks": {"up": {"kernel": jnp.ones((3, 200, 40)), "bias": jnp.ones((3, 40))}}}
    added = lora.add(jax.random.key(1), params, rank=4, targets=["up"])["blocks"]["up"]
    assert set(added) == {"kernel", "bias", "lora_a", "lora_b"}
    assert added["lora_a"].shape == (3, 200, 4) and added["lora_b"].shape == (3, 4, 40)
    assert added["kernel"] is params["blocks"]["up"]["kernel"]
    np.testing.assert_allclose(added["lora_a"].std(), 1 / 4, rtol=0.05)
    assert not np.array_equal(added["lora_a"][0], added["lora_a"][1])
    np.testing.assert_array_equal(added["lora_b"], 0)


def test_layers_draw_different_factors():
    params = {name: {"kernel": jnp.ones((5, 5))} for name in "pq"}
    added = lora.add(jax.random.key(1), params, rank=2, targets=["p", "q"])
    assert not np.array_equal(added["p"]["lora_a"], added["q"]["lora_a"])


def test_merging_is_undone():
    params, targets, _ = dit_case()
    with_adapters = noisy(add(params, 2, targets))
    merged = merge(with_adapters)
    back = jax.jit(lambda *trees: lora.unmerge(*trees, SCALE))(merged, with_adapters)
    kernels = [np.asarray(tree["blocks"]["up"]["kernel"]) for tree in (merged, with_adapters)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, with_adapters)


def products(jaxpr):
    """The shapes of all matrix products of a program, in loops and calls too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(equation.outvars[0].aval.shape)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("case", ["plain", "scan", "remat"])
def test_gradients_are_those_of_the_adapters_alone(case):
    params, targets, apply = CASES[case]()
    with_adapters = noisy(add(params, 2, targets))
    frozen, trainable = lora.split(with_adapters, lambda path: "lora_" in path)
    adapted = lora.adapt(apply, SCALE)

    def loss(trainable):
        return (adapted(lora.overlay(frozen, trainable)) ** 2).mean()

    def merged_loss(trainable):
        return (apply(lora.merge(lora.overlay(frozen, trainable), SCALE)) ** 2).mean()

    gradient, reference = (
        jax.jit(jax.grad(loss))(trainable),
        jax.jit(jax.grad(merged_loss))(trainable),
    )
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(gradient)]
    assert len(paths) == 2 * len(lora_layers(trainable)) and all("lora_" in path for path in paths)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max()),
        gradient,
        reference,
    )
    # The kernel of the last adapted layer: neither it nor its transpose comes out of a product.
    size = {5, 7} if case == "plain" else {8, 32}
    formed = [set(shape) for shape in products(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr)]
    assert formed and size not in formed
    full = jax.make_jaxpr(jax.grad(lambda p: (apply(p) ** 2).mean()))(params)
    assert size in [set(shape) for shape in products(full.jaxpr)]


def lora_layers(params):
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    return {path.rpartition("[")[0] for path in paths if "lora_" in path}


def test_splitting_and_overlaying_are_inverse():
    params = {"a": {"kernel": 1, "bias": 2}, "b": {"c": {"kernel": 3}}, "d": {"bias": 4}}
    frozen, trainable = lora.split(params, lambda path: path.endswith("kernel"))
    assert trainable == {"a": {"kernel": 1}, "b": {"c": {"kernel": 3}}}
    assert frozen == {"a": {"bias": 2}, "d": {"bias": 4}}
    assert lora.overlay(frozen, trainable) == params
    assert lora.split(params, lambda path: path == "b/c/kernel")[1] == {"b": {"c": {"kernel": 3}}}
    assert lora.split(params, lambda path: False) == (params, {})
    assert lora.overlay(params, {"d": {"bias": 5}})["d"] == {"bias": 5}


def test_the_share_of_adapters_can_be_counted():
    params = {"up": {"kernel": jnp.ones((6, 10)), "bias": jnp.ones(10)}}
    added = lora.add(jax.random.key(0), params, rank=2, targets=["up"])
    trainable = lora.split(added, lambda path: "lora_" in path)[1]
    assert (lora.count(params), lora.count(trainable), lora.count(added)) == (70, 32, 102)
    shapes = jax.eval_shape(lambda: added)
    assert lora.count(shapes) == 102


def test_adapters_compute_in_the_precision_of_their_layer():
    module, x = nn.Dense(4, dtype=jnp.bfloat16), normal(3, 5)
    params = noisy(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    added = noisy(add(params, 2, ["^$"]))
    y = lora.adapt(lambda p: module.apply({"params": p}, x), SCALE)(added)
    expected = x @ merge(added)["kernel"] + added["bias"]
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(y), expected, atol=0.05)


def test_bad_requests_are_refused():
    params, _, apply = plain_case()
    add = lambda **options: lora.add(jax.random.key(0), params, **{"rank": 1, **options})  # noqa: E731
    with pytest.raises(InputError, match="rank 0 of adapters"):
        add(rank=0, targets=["first"])
    with pytest.raises(InputError, match=r"'third' fits no layer .*: first, ours, second"):
        add(targets=["first", "third"])
    with pytest.raises(InputError, match="is no regular expression"):
        add(targets=["("])
    with pytest.raises(InputError, match="'first' has an adapter already"):
        lora.add(jax.random.key(0), add(targets=["first"]), rank=1, targets=["first"])
    with pytest.raises(InputError, match="layer ours is a Dense: adapters go with"):
        lora.adapt(apply, SCALE)(add(targets=["ours"]))
    with pytest.raises(InputError, match="first/lora_a has no kernel"):
        lora.unmerge({"second": params["second"]}, add(targets=["first"]), SCALE)
