"""ResNet-18, VGG-11, an MLP: their sizes, their initialization, and that they see their input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxdistill.nn.mlp import MLP
from jaxdistill.nn.resnet import ResNet18
from jaxdistill.nn.vgg import VGG11

# Width 16 keeps the ResNet cheap to run; the full one is only counted, by shapes.
NETWORKS = {
    "resnet": ResNet18(num_classes=7, width=16),
    "vgg": VGG11(num_classes=7),
    "mlp": MLP(num_classes=7),
}


def shapes(network, image_shape):
    variables = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    return variables["params"]


def count(network, image_shape):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(network, image_shape)))


@pytest.fixture(scope="module", params=NETWORKS)
def grey(request):
    """A network, its parameters for grey images, and a compiled (features, logits) function."""
    net = NETWORKS[request.param]
    # The rbg generator compiles in a fraction of the time; the distribution is the same.
    key = jax.random.key(0, impl="rbg")
    params = jax.jit(net.init)(key, jnp.zeros((1, 8, 8, 1)))["params"]

    @jax.jit
    def run(images):
        features = net.apply({"params": params}, images, method="features")
        return features, net.apply({"params": params}, images)

    return net, params, run


def images_of(size):
    return jax.random.normal(jax.random.key(1), (4, size, size, 1))


def basic_block(c_in, c):
    convs = 9 * c_in * c + 9 * c * c
    norms = 2 * c + 2 * c
    projection = c_in * c + 2 * c if c_in != c else 0
    return convs + norms + projection


@pytest.mark.parametrize(("channels", "num_classes"), [(1, 10), (3, 10), (3, 100)])
def test_resnet_parameter_count(channels, num_classes):
    stem = 9 * channels * 64 + 2 * 64
    stage1 = basic_block(64, 64) + basic_block(64, 64)
    stage2 = basic_block(64, 128) + basic_block(128, 128)
    stage3 = basic_block(128, 256) + basic_block(256, 256)
    stage4 = basic_block(256, 512) + basic_block(512, 512)
    expected = stem + stage1 + stage2 + stage3 + stage4 + 512 * num_classes + num_classes
    if (channels, num_classes) == (3, 10):
        assert expected == 11_173_962  # the known size of the CIFAR ResNet-18
    assert count(ResNet18(num_classes), (32, 32, channels)) == expected


@pytest.mark.parametrize("image_shape", [(8, 8, 1), (28, 28, 1), (28, 28, 3), (32, 32, 3)], ids=str)
def test_vgg_parameter_count(image_shape):
    convs = 9 * (64 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 3 * 512 * 512)
    first = 9 * 64 * image_shape[-1]
    channels = 64 + 128 + 256 + 256 + 4 * 512  # one bias, one scale and one offset each
    expected = first + convs + 3 * channels + 512 * 10 + 10
    if image_shape[-1] == 3:
        assert expected == 9_231_114
    assert count(VGG11(), image_shape) == expected


def test_mlp_parameter_count():
    expected = (28 * 28 + 1) * 128 + 129 * 128 + 129 * 10
    assert expected == 118_282
    assert count(MLP(), (28, 28, 1)) == expected


@pytest.mark.parametrize("net", [ResNet18(num_classes=100), VGG11(num_classes=100)])
@pytest.mark.parametrize("image_shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)], ids=str)
def test_output_shapes(net, image_shape):
    variables = {"params": shapes(net, image_shape)}
    images = jax.ShapeDtypeStruct((5, *image_shape), jnp.float32)
    features = jax.eval_shape(lambda v, x: net.apply(v, x, method="features"), variables, images)
    logits = jax.eval_shape(net.apply, variables, images)
    assert (features.shape, features.dtype) == ((5, 512), jnp.float32)
    assert (logits.shape, logits.dtype) == ((5, 100), jnp.float32)


def test_the_resnet_for_large_images_is_the_published_one():
    """11.69 million parameters (torchvision), and 7x7 places before the mean at 224 pixels."""
    net = ResNet18(num_classes=1000, large=True)
    assert count(net, (224, 224, 3)) == 11_689_512
    params = {"params": shapes(net, (224, 224, 3))}
    image = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    _, seen = jax.eval_shape(
        lambda p, x: net.apply(p, x, capture_intermediates=True, mutable=["intermediates"]),
        params,
        image,
    )
    (last,) = seen["intermediates"]["blocks_7"]["__call__"]
    assert last.shape == (2, 7, 7, 512)


def test_large_images_are_flattened_by_vgg_and_averaged_by_resnet():
    for net, width in ((VGG11(), 2 * 2 * 512), (ResNet18(), 512)):
        assert shapes(net, (64, 64, 3))["classifier"]["kernel"].shape == (width, 10)


@pytest.mark.slow
def test_logits_are_the_classifier_applied_to_the_features(grey):
    _, params, run = grey
    features, logits = (np.asarray(out, np.float64) for out in run(images_of(8)))
    kernel = np.asarray(params["classifier"]["kernel"], np.float64)
    bias = np.asarray(params["classifier"]["bias"], np.float64)
    np.testing.assert_allclose(logits, features @ kernel + bias, rtol=1e-5, atol=1e-5)


def test_features_depend_on_the_image(grey):
    """Instance norm makes 1x1 maps constant: no stage may shrink a small image that far."""
    features = np.asarray(grey[2](images_of(8))[0])
    assert features.std(axis=0).mean() > 0.05 * np.abs(features).mean()


def test_a_sample_does_not_see_its_batch(grey):
    run = grey[2]
    images = images_of(8)
    logits = run(images)[1]
    other = run(images.at[1:].set(5 * images[1:] + 1))[1]
    np.testing.assert_allclose(other[0], logits[0], rtol=1e-5, atol=1e-6)
    assert not np.allclose(other[1:], logits[1:], rtol=1e-2)


@pytest.mark.slow
def test_every_parameter_gets_a_gradient(grey):
    """What the smallest images would lose first, if a stage ended in constants."""
    net, params, _ = grey
    labels = jnp.arange(4)

    @jax.jit
    @jax.grad
    def gradient(params):
        logits = net.apply({"params": params}, images_of(8))
        return -jax.nn.log_softmax(logits)[labels, labels].mean()

    for path, grad in flatten_dict(gradient(params)).items():
        assert np.isfinite(grad).all(), path
        if path[-1] == "bias" and path[0].startswith("convs"):
            continue  # the norm that follows removes a constant
        assert np.abs(grad).max() > 1e-6, path


def test_initialization_is_that_of_pytorch(grey):
    params = flatten_dict(grey[1])
    for path, kernel in params.items():
        if path[-1] != "kernel":
            continue
        bound = 1 / math.sqrt(math.prod(kernel.shape[:-1]))
        leaves = [kernel, *(params[p] for p in [(*path[:-1], "bias")] if p in params)]
        for leaf in map(np.asarray, leaves):
            assert np.abs(leaf).max() <= bound * (1 + 1e-6), path
            # Root mean square of U(-b, b): b / sqrt(3), with relative error 0.45 / sqrt(size).
            rms = math.sqrt((leaf**2).mean() * 3) / bound
            assert abs(rms - 1) < 5 * 0.45 / math.sqrt(leaf.size), path
    norms = [path for path in params if path[-1] == "scale"]
    assert bool(norms) != isinstance(grey[0], MLP)
    for path in norms:
        assert (params[path] == 1).all()
        assert (params[(*path[:-1], "bias")] == 0).all()


@pytest.mark.parametrize(("net", "has_bias"), [(ResNet18(), False), (VGG11(), True)])
def test_bias_of_convolutions(net, has_bias):
    params = flatten_dict(shapes(net, (8, 8, 1)))
    convs = [path[:-1] for path, leaf in params.items() if len(leaf.shape) == 4]
    assert len(convs) == (8 if has_bias else 1 + 16 + 3)
    assert all(((*path, "bias") in params) == has_bias for path in convs)


@pytest.mark.slow
@pytest.mark.parametrize("grey", ["vgg"], indirect=True)
def test_vgg_pads_grey_28_pixel_images_with_zeros_to_32(grey):
    run = grey[2]
    images = images_of(28)
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    np.testing.assert_allclose(run(images)[1], run(padded)[1], rtol=1e-5, atol=1e-6)
