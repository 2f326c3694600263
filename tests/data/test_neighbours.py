"""Nearest neighbours against brute force, and copies that were planted."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from jaxdistill.data import neighbours
from jaxdistill.data.neighbours import copies, near_copies, nearest, unit


def rng(seed=0):
    return np.random.default_rng(seed)


def digits(count=600):
    return np.round(load_digits().images[:count, ..., None] * 255 / 16).astype(np.uint8)


@pytest.mark.parametrize("mirrored", [False, True])
def test_neighbours_against_brute_force(mirrored, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK", 16)  # several blocks, the last of them short
    rows, other = (unit(jnp.asarray(rng(s).normal(size=(37, 5)), jnp.float32)) for s in (0, 1))
    told = []
    places, distances = nearest(rows, 4, other if mirrored else None, told.append)
    exact = np.asarray(rows, np.float64)
    between = np.linalg.norm(exact[:, None] - exact, axis=-1)
    if mirrored:
        seen = np.asarray(other, np.float64)
        between = np.minimum(between, np.linalg.norm(seen[:, None] - exact, axis=-1))
    np.fill_diagonal(between, np.inf)
    order = np.argsort(between, axis=1)[:, :4]
    np.testing.assert_array_equal(places, order)
    np.testing.assert_allclose(distances, np.take_along_axis(between, order, 1), atol=2e-6)
    assert told == sorted(told) and told[-1] == 1 and len(told) == 3


def test_rows_of_no_length_stay():
    rows = unit(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]], rtol=1e-6)


def test_equal_images_are_found_in_a_mirror_too():
    images = digits(50)
    again = np.concatenate([images, images[[3, 7]], images[[7, 9]][:, :, ::-1]])
    expected = [*range(50), 3, 7, 7, 9]
    np.testing.assert_array_equal(copies(again), expected)
    changed = images[3].copy()
    changed[0, 0] += 1
    assert copies(np.stack([images[3], changed])).tolist() == [0, 1]


def test_near_copies_are_found_and_nothing_else():
    """Twenty images with noise, twenty darker ones in a mirror, among 600 without copies."""
    images = digits()
    noisy, dark = rng().choice(600, (2, 20), replace=False)
    noise = rng(1).integers(-8, 9, (20, 8, 8, 1))
    planted = np.clip(images[noisy].astype(int) + noise, 0, 255).astype(np.uint8)
    darker = (images[dark][:, :, ::-1] * 0.7).astype(np.uint8)
    pairs, part = near_copies(np.concatenate([images, planted, darker]))
    expected = {*zip(noisy.tolist(), range(600, 620), strict=True)}
    expected |= {*zip(dark.tolist(), range(620, 640), strict=True)}
    assert {tuple(pair) for pair in pairs.tolist()} == expected
    assert (np.diff(part) >= 0).all() and part.max() < 0.3


def test_few_or_empty_images_have_no_near_copies():
    for images in (digits(2), np.zeros((5, 8, 8, 3), np.uint8)):
        pairs, part = near_copies(images)
        assert pairs.shape == (0, 2) and part.shape == (0,)


def test_large_images_are_compared_small():
    """Stripes of one pixel are gone at 16 by 16; what is left is the picture under them."""
    pictures = np.kron(rng(2).integers(0, 200, (30, 6, 6, 1)), np.ones((1, 7, 7, 1)))
    striped = pictures[4] + 40 * (np.arange(42) % 2)[:, None]
    images = np.concatenate([pictures, striped[None]]).astype(np.uint8)
    assert near_copies(images)[0].tolist() == [[4, 30]]
