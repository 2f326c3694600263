"""Every operation against plain numpy, with its parameters recovered from its output."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.data import augment as ops
from jaxdistill.data.augment import OPS, augment, normalizer, parse
from jaxdistill.errors import InputError

N, H, W = 40, 12, 10
ALL = "color_crop_cutout_flip_scale_rotate"


def key(seed):
    """A key of the generator that compiles fastest."""
    return jax.random.key(seed, impl="rbg")


def images(n=N, channels=3, seed=0, h=H, w=W):
    numbers = np.random.default_rng(seed)
    return jnp.asarray(numbers.normal(size=(n, h, w, channels)), jnp.float32)


def apply(op, x, seed=0):
    """One draw per image."""
    return np.asarray(jax.jit(lambda k, x: op(k, x, x.shape[:1]))(key(seed), x))


def assert_uniform(values, low, high):
    """Inside the bounds, and spread over them."""
    values = np.asarray(values)
    assert values.min() >= low - 1e-4 and values.max() <= high + 1e-4
    assert values.min() < low + 0.15 * (high - low) and values.max() > high - 0.15 * (high - low)
    assert abs(values.mean() - (low + high) / 2) < 5 * (high - low) / np.sqrt(12 * values.size)


def factors(out, x, mean):
    """The factor of each image by which the distance from `mean` was multiplied."""
    a, b = (np.reshape(np.asarray(y) - mean, (len(x), -1)) for y in (out, x))
    found = (a * b).sum(1) / (b * b).sum(1)
    np.testing.assert_allclose(a, found[:, None] * b, atol=1e-4)
    return found


def test_brightness_adds_a_number():
    x = images()
    added = apply(ops.brightness, x) - np.asarray(x)
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1, :1], x.shape), atol=1e-5)
    assert_uniform(added[:, 0, 0, 0], -0.5, 0.5)


def test_contrast_scales_about_the_mean_of_the_image():
    x = images()
    mean = np.asarray(x).mean((1, 2, 3), keepdims=True)
    assert_uniform(factors(apply(ops.contrast, x), x, mean), 0.5, 1.5)


def test_saturation_scales_about_the_mean_of_the_channels():
    x = images()
    mean = np.asarray(x).mean(-1, keepdims=True)
    assert_uniform(factors(apply(ops.saturation, x), x, mean), 0.0, 2.0)


def test_colour_of_grey_images_is_brightness_and_contrast():
    x = images(channels=1)
    out = apply(ops.colour, x)
    mean = lambda y: np.asarray(y).mean((1, 2, 3), keepdims=True)  # noqa: E731
    assert_uniform(mean(out) - mean(x), -0.5, 0.5)
    assert_uniform(factors(out - mean(out) + mean(x), x, mean(x)), 0.5, 1.5)


def test_crop_is_a_shift_by_whole_pixels_with_zeros():
    n = 300
    x = images(n, channels=1)
    reach = 2, 1  # an eighth of 12 and of 10, rounded
    padded = np.pad(np.asarray(x), ((0, 0), (reach[0],) * 2, (reach[1],) * 2, (0, 0)))
    out, times = apply(ops.crop, x), np.zeros((2 * reach[0] + 1, 2 * reach[1] + 1))
    for i, j in np.ndindex(*times.shape):
        shifted = padded[:, i : i + H, j : j + W]
        times[i, j] = (out == shifted).all((1, 2, 3)).sum()
    assert times.sum() == n
    assert times.min() > 0.4 * n / times.size and times.max() < 2 * n / times.size


@pytest.mark.parametrize("size", [8, 10, 6])
def test_cutout_is_a_square_clamped_to_the_image(size):
    n = 400
    out = apply(ops.cutout, jnp.ones((n, size, size, 1)))[..., 0]
    side = int(size * 0.5 + 0.5)
    centres = range(size + 1 - side % 2)
    spans = [np.unique(np.clip(c - side // 2 + np.arange(side), 0, size - 1)) for c in centres]
    spans = [(int(s[0]), int(s[-1])) for s in spans]
    seen = []
    for image in out:
        rows, columns = (np.flatnonzero((image == 0).any(axis)) for axis in (1, 0))
        hole = np.ones((size, size))
        hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 0
        np.testing.assert_array_equal(image, hole)
        seen += [(int(s[0]), int(s[-1])) for s in (rows, columns)]
    assert set(seen) == set(spans)
    for span in set(spans):
        assert seen.count(span) > 0.5 * 2 * n * spans.count(span) / len(spans)


def test_flip_mirrors_half_of_the_images():
    n = 400
    x = images(n, channels=1)
    out = apply(ops.flip, x)
    same = (out == np.asarray(x)).all((1, 2, 3))
    mirrored = (out == np.asarray(x)[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / np.sqrt(n)


def grid():
    """Positions of the pixels as (x, y), where -1 and 1 are the outer edges of the image."""
    ys, xs = (np.arange(H) + 0.5) / H * 2 - 1, (np.arange(W) + 0.5) / W * 2 - 1
    return np.stack(np.meshgrid(xs, ys), -1)


def sampled(image, matrix):
    """Bilinear sampling at `matrix @ p`, zero outside of the image."""
    out = np.zeros(image.shape)
    for i, j in np.ndindex(H, W):
        x, y = matrix @ grid()[i, j]
        column, row = (x + 1) / 2 * W - 0.5, (y + 1) / 2 * H - 0.5
        for a in (int(np.floor(row)), int(np.floor(row)) + 1):
            for b in (int(np.floor(column)), int(np.floor(column)) + 1):
                if 0 <= a < H and 0 <= b < W:
                    out[i, j] += (1 - abs(row - a)) * (1 - abs(column - b)) * image[a, b]
    return out


@pytest.mark.parametrize("name", ["scale", "rotate"])
def test_warps_against_a_plain_sampler(name):
    # Two channels hold the positions, so their output tells where each pixel was taken from.
    ramps = np.broadcast_to(grid(), (N, H, W, 2))
    x = jnp.asarray(np.concatenate([images(channels=2), ramps], -1), jnp.float32)
    out = apply(OPS[name], x)
    middle = np.s_[H // 2 - 2 : H // 2 + 2, W // 2 - 2 : W // 2 + 2]
    matrices = []
    for image, original in zip(out, np.asarray(x), strict=True):
        where, source = grid()[middle].reshape(-1, 2), image[middle][..., 2:].reshape(-1, 2)
        matrix = np.linalg.lstsq(where, source, rcond=None)[0].T
        np.testing.assert_allclose(where @ matrix.T, source, atol=1e-4)
        matrices.append(matrix)
        np.testing.assert_allclose(image, sampled(original, matrix), atol=1e-3)
    a, b, c, d = np.reshape(matrices, (N, 4)).T
    if name == "scale":
        np.testing.assert_allclose([b, c], 0, atol=1e-4)
        assert_uniform(a, 1 / 1.2, 1.2)
        assert_uniform(d, 1 / 1.2, 1.2)
        assert abs(np.corrcoef(a, d)[0, 1]) < 0.6
    else:
        np.testing.assert_allclose([a - d, b + c, a * a + c * c - 1], 0, atol=1e-3)
        assert_uniform(np.degrees(np.arctan2(c, a)), -15, 15)


@pytest.fixture(scope="module")
def siamese():
    """All operations, one draw for the batch; the strategy's two modes in one program."""

    @jax.jit
    def run(k, x):
        return [augment(k, x, ALL, compose=c, siamese=True) for c in (False, True)]

    return run


def test_the_same_key_gives_the_same_siamese_transformation(siamese):
    x = images(8)
    for seed in range(12):
        for large, small in zip(siamese(key(seed), x), siamese(key(seed), x[2:5]), strict=True):
            np.testing.assert_allclose(large[2:5], small, atol=1e-5)


def test_images_are_transformed_alike_when_siamese_and_apart_otherwise(siamese):
    x = jnp.tile(images(1), (8, 1, 1, 1))
    apart = jax.jit(lambda k, x: augment(k, x, ALL, compose=True))
    for out in siamese(key(0), x):
        np.testing.assert_allclose(out, jnp.tile(out[:1], (8, 1, 1, 1)), atol=1e-6)
    assert jnp.abs(jnp.diff(apart(key(0), x), axis=0)).max((1, 2, 3)).min() > 0.01


def test_gradients_flow():
    x = images(3)

    @jax.jit
    def slopes(k):
        modes = [partial(augment, k, strategy=ALL, siamese=True, compose=c) for c in (False, True)]
        return [jax.grad(lambda x, f=f: jnp.sum(jnp.square(f(x))))(x) for f in modes]

    for seed in range(6):
        for grads in slopes(key(seed)):
            assert np.isfinite(grads).all()
            # A hole covers at most a quarter, a shift a few lines more.
            assert (grads != 0).mean() > 0.5


def test_plain_augmentation_applies_one_operation():
    x = images(4, channels=1)
    run = jax.jit(lambda k, x: augment(k, x, "flip_cutout", siamese=True))
    seen = set()
    for seed in range(20):
        out = run(key(seed), x)
        if (out == 0).any():
            assert ((out == x) | (out == 0)).all()
            seen.add("hole")
        else:
            assert (out == x).all() or (out == x[:, :, ::-1]).all()
            seen.add("flip")
    assert seen == {"hole", "flip"}


def test_composed_augmentation_ends_with_the_hole():
    x = jnp.ones((4, 8, 8, 1))
    run = jax.jit(lambda k, x: augment(k, x, "cutout_color_crop_scale_flip", compose=True))
    out = np.stack([run(key(seed), x) for seed in range(10)])
    assert (out == 0).any((2, 3, 4)).all()
    # Colour changed the ones before the hole was cut.
    assert (np.abs(out - 1)[out != 0] > 1e-6).mean() > 0.9


def test_no_strategy_is_no_augmentation():
    x = images(2)
    for strategy in ("", "none"):
        assert augment(key(0), x, strategy, compose=True) is x


def test_an_unknown_operation_is_refused():
    assert parse("color_crop") == ("color", "crop")
    with pytest.raises(InputError, match="unknown augmentation 'blur'; choose from color, crop"):
        augment(key(0), images(2), "flip_blur")


def test_bytes_and_fractions_are_normalized_alike():
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)), jnp.uint8)
    prepare = normalizer((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    expected = (np.float64(pixels) / 255 - [0.1, 0.2, 0.3]) / [0.5, 1.0, 2.0]
    np.testing.assert_allclose(prepare(pixels), expected, atol=1e-6)
    np.testing.assert_allclose(prepare(pixels.astype(jnp.float32) / 255), expected, atol=1e-6)
