"""Characteristic functions, their discrepancy and the laws of frequencies, against float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.condense import charfn
from jaxdistill.nn.frequency_net import ReleasedSampleNet, ScaleNet

# Inputs (float32, features not normalized) with losses and gradients computed once in float64 by
# automatic differentiation of the same formula, outside of this library. `A` has 64 real and 8
# synthetic features of length 32 and 16 frequencies, `B` 256, 4, 128 and 512. `ab{i}` is row i of
# `alpha_beta`; of the gradients by the frequencies, `gt`, the first 64 rows are kept.
FIXTURE = Path(__file__).parents[1] / "fixtures" / "charfn.npz"
WEIGHTS = [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.2, 0.8), (0.7, 0.1)]
DIM = 8


@pytest.fixture(scope="module")
def published():
    with np.load(FIXTURE, allow_pickle=False) as file:
        return dict(file)


def key(seed):
    """A key of the generator that compiles fastest; the laws are the same."""
    return jax.random.key(seed, impl="rbg")


def rng(seed=0):
    return np.random.default_rng(seed)


def normal(*shape, seed=0):
    return jnp.asarray(rng(seed).normal(size=shape), jnp.float32)


def ecf64(features, freqs):
    return np.exp(1j * (np.float64(features) @ np.float64(freqs).T)).mean(0)


def discrepancy64(real, syn, freqs, alpha, beta):
    real, syn = (x / np.linalg.norm(np.float64(x), axis=1, keepdims=True) for x in (real, syn))
    a, b = ecf64(real, freqs), ecf64(syn, freqs)
    amplitude = (np.abs(a) - np.abs(b)) ** 2
    phase = 2 * (np.abs(a) * np.abs(b) - (a * b.conj()).real)
    return np.sqrt(alpha * amplitude + beta * phase).mean()


def error(actual, desired):
    """Largest deviation, relative to the largest value."""
    desired = np.asarray(desired, np.float64)
    return np.abs(np.asarray(actual, np.float64) - desired).max() / np.abs(desired).max()


@pytest.mark.parametrize("shape", ["A", "B"])
def test_values_and_gradients_are_those_of_float64(published, shape):
    inputs = tuple(jnp.asarray(published[f"{shape}_{name}"]) for name in ("real", "syn", "t"))

    @jax.jit
    def run(real, syn, freqs):
        out, unit = [], (charfn.normalize_rows(real), charfn.normalize_rows(syn))
        for alpha, beta in published["alpha_beta"].tolist():
            weights = {"alpha": alpha, "beta": beta}
            raw = jax.value_and_grad(charfn.discrepancy, (1, 2))(real, syn, freqs, **weights)
            normed = jax.grad(charfn.discrepancy, 1)(*unit, freqs, normalize=False, **weights)
            out.append((raw, normed))
        return out

    for i, ((loss, (gsyn, gfreqs)), gsyn_normed) in enumerate(run(*inputs)):
        expected = {
            n: published[f"{shape}_ab{i}_{n}"] for n in ("loss", "gsyn_raw", "gsyn_normed", "gt")
        }
        assert error(loss, expected["loss"]) < 2e-6
        assert error(gsyn, expected["gsyn_raw"]) < 9e-5
        assert error(gsyn_normed, expected["gsyn_normed"]) < 9e-5
        assert error(gfreqs[:64], expected["gt"]) < 5e-4


def test_ecf_is_the_mean_of_complex_exponentials():
    features, freqs = normal(3, 20, DIM), 2 * normal(16, DIM, seed=1)
    real, imag = charfn.ecf(features, freqs)
    expected = np.stack([ecf64(f, freqs) for f in features])
    np.testing.assert_allclose(real, expected.real, atol=1e-6)
    np.testing.assert_allclose(imag, expected.imag, atol=1e-6)


@jax.jit
def discrepancies(real, syn, freqs):
    """With all weights, in one program."""
    return [charfn.discrepancy(real, syn, freqs, alpha=a, beta=b) for a, b in WEIGHTS]


def test_discrepancy_against_numpy():
    inputs = normal(20, DIM), normal(5, DIM, seed=1), 2 * normal(16, DIM, seed=2)
    expected = [discrepancy64(*inputs, alpha, beta) for alpha, beta in WEIGHTS]
    np.testing.assert_allclose(discrepancies(*inputs), expected, rtol=2e-6)


def test_equal_features_have_no_discrepancy():
    real, freqs = normal(20, DIM), 2 * normal(16, DIM, seed=2)
    np.testing.assert_allclose(discrepancies(real, real, freqs), 0, atol=1e-7)


def test_gradients_are_finite_at_singular_inputs():
    real, syn, freqs = normal(6, DIM), normal(6, DIM, seed=1), normal(16, DIM, seed=2)
    zero_row, zeros = syn * (np.arange(6) > 0)[:, None], np.zeros_like(syn)
    opposite = np.concatenate([syn[:3], -syn[:3]])  # the mean sine vanishes
    cases = [
        (real, real, freqs),
        (real, real[::-1], freqs),
        (real, zero_row, freqs),
        (real * (np.arange(6) > 0)[:, None], zero_row, freqs),
        (real, zeros, freqs),
        (zeros, zeros, freqs),
        (real, opposite, freqs),
        (real, syn, np.zeros_like(freqs)),
        (real, syn, 1e4 * freqs),
        (real, syn * 1e-20, freqs),
    ]

    @jax.jit
    @jax.vmap
    def run(real, syn, freqs):
        return [
            jax.value_and_grad(
                lambda *x, a=a, b=b: charfn.discrepancy(*x, alpha=a, beta=b), (0, 1, 2)
            )(real, syn, freqs)
            for a, b in WEIGHTS
        ]

    out = run(*(np.stack(x) for x in zip(*cases, strict=True)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


def test_gradients_are_finite_where_a_modulus_or_the_gap_is_zero():
    zero, one = jnp.zeros(1), jnp.ones(1)
    points = [zero, one, 0.6 * one, 0.8 * one]

    @jax.jit
    @jax.vmap
    def run(ar, ai, br, bi):
        gap = lambda a, b, w: charfn.discrepancy_at(  # noqa: E731
            charfn.ECF(*a), charfn.ECF(*b), alpha=w[0], beta=w[1]
        ).sum()
        return [jax.value_and_grad(gap, (0, 1))((ar, ai), (br, bi), w) for w in WEIGHTS]

    pairs = [(points[i], points[j]) for i, j in [(0, 0), (0, 1), (1, 0), (2, 3)]]
    cases = [(*a, *b) for a in pairs for b in pairs]
    out = run(*(jnp.stack(x) for x in zip(*cases, strict=True)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


def test_the_order_of_the_samples_does_not_matter():
    real, syn, freqs = normal(20, DIM), normal(6, DIM, seed=1), normal(16, DIM, seed=2)
    order = rng(3).permutation(6)
    run = jax.jit(jax.value_and_grad(charfn.discrepancy, 1))
    loss, grads = run(real, syn, freqs)
    permuted_loss, permuted_grads = run(real[rng(4).permutation(20)], syn[order], freqs)
    np.testing.assert_allclose(permuted_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(permuted_grads, grads[order], atol=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_sampling_floor_is_the_gap_of_two_samples_of_one_law(alpha):
    # A law on 64 points, whose characteristic function is known exactly.
    points, freqs = normal(64, 4), normal(8, 4, seed=1) * jnp.linspace(0.2, 2, 8)[:, None]
    waves = np.exp(1j * np.asarray(points @ freqs.T))
    numbers = rng(2)

    def sample(size):
        drawn = waves[numbers.integers(0, 64, (6000, size))].mean(1)
        return charfn.ECF(jnp.float32(drawn.real), jnp.float32(drawn.imag))

    gaps = charfn.discrepancy_at(sample(20), sample(5), alpha=alpha, beta=alpha)
    measured = np.sqrt(np.square(gaps).mean(0))
    truth = waves.mean(0)
    law = charfn.ECF(jnp.float32(truth.real), jnp.float32(truth.imag))
    np.testing.assert_allclose(charfn.sampling_floor(law, 20, 5, alpha=alpha), measured, rtol=0.05)


def net(module):
    """The two functions that a sampler takes."""
    init = lambda key, dim: module.init(key, jnp.zeros((2, dim)))["params"]  # noqa: E731
    return init, lambda params, noise: module.apply({"params": params}, noise)


def constant(rows):
    """A network with parameters that puts out `rows`, whatever the noise."""
    return (lambda key, dim: rows), lambda params, noise: params + 0 * noise


def assert_normal(freqs, std):
    freqs = np.asarray(freqs, np.float64)
    assert abs(freqs.mean()) < 5 * std / np.sqrt(freqs.size)
    np.testing.assert_allclose(freqs.std(), std, rtol=0.02)
    np.testing.assert_allclose((freqs**4).mean() / freqs.var() ** 2, 3, atol=0.15)
    assert np.abs(np.corrcoef(freqs.T) - np.eye(freqs.shape[1])).max() < 0.1


def test_gaussian_moments():
    sampler = charfn.gaussian(1.5)
    params = sampler.init(key(0), DIM)
    assert not jax.tree.leaves(params)
    assert_normal(sampler.draw(params, key(1), 8192, DIM), 1.5)


def test_scale_mixture_starts_as_the_gaussian():
    sampler = charfn.scale_mixture(*net(ScaleNet(16)), scale=1.5)

    @jax.jit
    def draw(k_init, k_draw):
        # The same normal numbers in both: only the scales are the network's.
        same = charfn.gaussian(1.5).draw({}, jax.random.split(k_draw)[1], 8192, DIM)
        return sampler.draw(sampler.init(k_init, DIM), k_draw, 8192, DIM), same

    freqs, same = draw(key(0), key(1))
    np.testing.assert_allclose(freqs, same, rtol=1e-6)
    assert_normal(freqs, 1.5)


def test_scale_mixture_scales_rows_in_groups_within_the_bound():
    outputs = 3 * np.asarray(normal(4, DIM))

    @jax.jit
    def draw(outputs):
        sampler = charfn.scale_mixture(*constant(outputs), scale=2.0, spread=3.0)
        return sampler.draw(outputs, key(1), 50, DIM)

    ratio = np.asarray(draw(outputs) / draw(jnp.zeros((4, DIM))))
    np.testing.assert_allclose(ratio, 3.0 ** np.tanh(outputs[np.arange(50) // 16]), rtol=1e-5)
    assert ratio.min() < 0.5 and ratio.max() > 2
    assert ratio.min() > 1 / 3 - 1e-6 and ratio.max() < 3 + 1e-5


SAMPLERS = {
    "gaussian": charfn.gaussian(),
    "scale_mixture": charfn.scale_mixture(*net(ScaleNet(16))),
    "direct": charfn.direct(*net(ReleasedSampleNet())),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_differ_by_key_and_learn(name):
    sampler = SAMPLERS[name]
    real, syn = normal(20, DIM), normal(5, DIM, seed=1)

    @jax.jit
    def run(k_init, k_draw):
        gap = lambda p: charfn.discrepancy(real, syn, sampler.draw(p, k_draw, 32, DIM))  # noqa: E731
        return jax.value_and_grad(gap)(sampler.init(k_init, DIM))

    values, grads = zip(*(run(key(0), key(i)) for i in (1, 1, 2)), strict=True)
    assert values[0] == values[1] != values[2]
    sizes = [float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[0])]
    assert all(np.isfinite(sizes))
    if name == "gaussian":
        assert not sizes
    else:
        assert max(sizes) > 1e-4


def test_scale_net_is_zero_at_the_start():
    init, apply = net(ScaleNet(16))
    assert not np.any(jax.jit(lambda k, noise: apply(init(k, DIM), noise))(key(0), normal(5, DIM)))


def test_released_sample_net_against_numpy():
    init, apply = net(ReleasedSampleNet())
    shapes = jax.eval_shape(lambda k: init(k, DIM), key(0))
    numbers = rng(1)
    params = jax.tree.map(lambda s: np.float32(numbers.normal(size=s.shape)), shapes)
    noise = normal(20, DIM)
    x = np.float64(noise)
    for i in range(3):
        kernel, bias, scale, shift = (
            params[f"{name}_{i}"] for name in ("kernel", "bias", "scale", "shift")
        )
        x = x @ kernel + bias
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * scale + shift
        x = np.tanh(x) if i == 2 else np.where(x > 0, x, 0.2 * x)
    np.testing.assert_allclose(jax.jit(apply)(params, noise), x, atol=1e-5)
