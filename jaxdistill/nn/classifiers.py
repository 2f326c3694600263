"""The classifiers by name, as functions of their parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill.errors import InputError
from jaxdistill.nn.convnet import ConvNet
from jaxdistill.nn.mlp import MLP
from jaxdistill.nn.resnet import ResNet18
from jaxdistill.nn.vgg import VGG11
from jaxdistill.nn.wide_convnet import WideConvNet
from jaxdistill.task import Network

CLASSIFIERS = ("convnet", "convnet_wide", "resnet18", "resnet18_large", "vgg11", "mlp")


def classifier(
    name: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    *,
    depth: int = 3,
    width: int = 128,
    norm: str = "instance",
) -> Network:
    """A network for images of some shape.

    Args:
        name: One of `CLASSIFIERS`.
        num_classes: Number of logits.
        image_shape: (h, w, c).
        depth: Blocks of the ConvNet and the wide one; the others have what they were published
            with.
        width: Its channels.
        norm: Its normalization.

    Raises:
        InputError: If no network has that name.
    """
    if name == "convnet":
        return as_functions(ConvNet(num_classes, depth, width, norm), image_shape)
    modules = {
        "convnet_wide": WideConvNet(num_classes, depth, width, norm),
        "resnet18": ResNet18(num_classes),
        "resnet18_large": ResNet18(num_classes, large=True),
        "vgg11": VGG11(num_classes),
        "mlp": MLP(num_classes),
    }
    if name not in modules:
        raise InputError(f"unknown network {name!r}; choose from {', '.join(CLASSIFIERS)}")
    return as_functions(modules[name], image_shape)


def as_functions(module: Any, image_shape: tuple[int, int, int]) -> Network:
    """A linen module with a method `features` as functions of its parameters.

    Args:
        module: A module from images (n, h, w, c) to logits.
        image_shape: (h, w, c).
    """
    blank = jnp.zeros((1, *image_shape))

    def features(params, x):
        return module.apply({"params": params}, x, method="features")

    def init(key):
        return module.init(key, blank)["params"]

    return Network(
        init=init,
        logits=lambda params, x: module.apply({"params": params}, x),
        features=features,
        feature_dim=jax.eval_shape(lambda key: features(init(key), blank), jax.random.key(0)).shape[
            -1
        ],
    )
