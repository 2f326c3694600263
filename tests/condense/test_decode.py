"""Tiles: their order, their enlargement, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.condense.decode import check_factor, decode, encode
from jaxdistill.errors import InputError


def images(n, h, w, c=2):
    numbers = np.random.default_rng(0)
    return jnp.asarray(numbers.uniform(size=(n, h, w, c)), jnp.float32)


def interpolation(small, large):
    """The matrix that enlarges a line: pixel centres at half-integers, clamped at the ends."""
    centres = (np.arange(large) + 0.5) * small / large - 0.5
    return np.stack([np.interp(centres, np.arange(small), e) for e in np.eye(small)], axis=1)


@pytest.mark.parametrize(("factor", "h", "w"), [(2, 8, 8), (3, 12, 6), (2, 4, 12)])
def test_tiles_are_enlarged_bilinearly_in_tile_major_order(factor, h, w):
    x = images(3, h, w)
    out = decode(x, factor)
    assert out.shape == (3 * factor**2, h, w, 2)
    th, tw = h // factor, w // factor
    up, right = interpolation(th, h), interpolation(tw, w)
    expected = [
        np.einsum("ai,bj,nijc->nabc", up, right, np.float64(x[:, i : i + th, j : j + tw]))
        for i in range(0, h, th)
        for j in range(0, w, tw)
    ]
    np.testing.assert_allclose(out, np.concatenate(expected), atol=1e-6)


def test_encode_stores_an_image_where_decode_finds_it():
    x = images(12, 8, 8)
    stored = encode(x, 2)
    assert stored.shape == (3, 8, 8, 2)
    # Block means survive the shrinking, and roughly the enlargement.
    means = lambda y: np.asarray(y).mean((1, 2))  # noqa: E731
    np.testing.assert_allclose(means(stored), means(x).reshape(4, 3, 2).mean(0), atol=0.02)
    flat = jnp.broadcast_to(jnp.arange(12.0)[:, None, None, None], (12, 8, 8, 2))
    np.testing.assert_allclose(decode(encode(flat, 2), 2), flat, rtol=1e-6)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_constant_images_are_fixed_points(factor):
    x = jnp.full((2, 8, 8, 1), 0.3)
    np.testing.assert_allclose(decode(x, factor), 0.3, rtol=1e-6)
    np.testing.assert_allclose(encode(decode(x, factor), factor), x, rtol=1e-6)


def test_factor_one_changes_nothing():
    x = images(3, 8, 8)
    np.testing.assert_array_equal(decode(x, 1), x)
    np.testing.assert_array_equal(encode(x, 1), x)


def test_every_stored_pixel_gets_a_gradient():
    grads = jax.grad(lambda x: jnp.sum(jnp.square(decode(x, 2))))(images(1, 8, 8))
    assert (grads > 0).all()


def test_values_stay_in_range():
    out = decode(jnp.round(images(2, 8, 8)), 2)
    assert out.min() >= 0 and out.max() <= 1


def test_a_factor_that_does_not_divide_is_refused_with_the_choices():
    check_factor((12, 12, 1), 3)
    with pytest.raises(
        ValueError, match=r"factor=3 .* 28x28; choose one of 1, 2, 4, 7, 14, or pad"
    ):
        check_factor((28, 28, 1), 3)
    with pytest.raises(InputError, match="choose one of 1, 2, 4"):
        check_factor((8, 12, 1), 3)
    with pytest.raises(InputError, match="factor=0 does not divide"):
        check_factor((8, 8, 1), 0)
