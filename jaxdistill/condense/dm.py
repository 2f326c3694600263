"""DM: data-set distillation by matching the class means of random features.

Zhao and Bilen, "Dataset Condensation with Distribution Matching" (WACV 2023).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray

from jaxdistill import collective
from jaxdistill.condense.synthetic import (
    Features,
    Pixels,
    by_class,
    decoded,
    initial_pixels,
    real_needed,
    real_statistic,
    synthetic_outputs,
)
from jaxdistill.method import BatchSpec, Method


class DMState(NamedTuple):
    """Synthetic images (classes, ipc, H, W, C) and the state of their optimiser."""

    pixels: Pixels
    pixels_opt: Any


def dm(
    features: Features,
    network_init: Callable[[PRNGKeyArray], Any],
    images_tx: optax.GradientTransformation,
    *,
    prepare: Callable[[Array], Array],
    ipc: int,
    factor: int = 1,
    start: str = "random",
    pixels: Pixels | None = None,
    batch_real: int = 256,
    strategy: str = "color_crop_cutout_flip_scale_rotate",
    chunk: int = 128,
    real_dtype: DTypeLike = jnp.float32,
) -> Method:
    """Builds the DM method: every step draws a fresh random network. `frozen` is not used.

    Args:
        features: `(params, normalised images) -> penultimate features`.
        network_init: `key -> params` of a random network.
        images_tx: Optimiser of the pixels, acting image by image; see `ncfm`.
        prepare: uint8 or [0, 1] images to normalised images.
        ipc: Synthetic images per class.
        factor: Tiles per side stored in each synthetic image (1 in the paper).
        start: Initial images, see `initial_pixels`.
        pixels: Initial images given outright, instead of `start`.
        batch_real: Real images of each class per step.
        strategy: Siamese augmentation.
        chunk: Images in one pass of the network, on each device.
        real_dtype: Of the network on the real images, which takes no gradient; bfloat16 halves
            what its activations move. Features and all that follows are float32.

    Returns:
        A `Method`; its output is that of `ncfm`.
    """
    needed = 1 if pixels is not None else real_needed(start, ipc, factor)
    num_real = max(batch_real, needed)
    augmentation = {"prepare": prepare, "strategy": strategy}

    def init(key, frozen, batch):
        del frozen
        first = initial_pixels(key, batch, ipc=ipc, factor=factor, start=start, pixels=pixels)
        return DMState(first, images_tx.init(first))

    def step(state, frozen, batch, key):
        del frozen
        k_net, k_augment = jax.random.split(key)
        params = network_init(k_net)
        keys = collective.class_keys(k_augment, batch.shape[0])
        target = real_statistic(
            lambda real: real.mean(1),
            features,
            params,
            batch,
            keys,
            chunk=chunk,
            dtype=real_dtype,
            **augmentation,
        )
        target = collective.mean(target)

        def loss(pixels):
            out, rows = synthetic_outputs(
                features, params, pixels, keys, factor=factor, chunk=chunk, **augmentation
            )
            return jnp.sum(jnp.square(rows.class_means(out) - target))

        value, grads = jax.value_and_grad(loss)(state.pixels)
        updates, pixels_opt = images_tx.update(
            collective.mean(grads), state.pixels_opt, state.pixels
        )
        pixels = jnp.clip(optax.apply_updates(state.pixels, updates), 0.0, 1.0)
        return DMState(pixels, pixels_opt), {"match": value / batch.shape[0]}

    def output(state):
        # Bilinear weights may sum to a hair above one.
        images = jnp.clip(decoded(state.pixels, factor), 0.0, 1.0)
        return {"images": images, "pixels": state.pixels}

    def specs(state, mesh):
        del mesh
        return by_class(state, state.pixels.shape)

    return Method(init, step, output, BatchSpec("per_class", num_real), specs)
