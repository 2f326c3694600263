"""Normalization layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxdistill.errors import InputError

EPSILON = 1e-5
NORMS = ("instance", "layer", "group", "batch", "none")


def _normalize(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    mean = x.mean(axes, keepdims=True)
    inverse = lax.rsqrt(jnp.square(x - mean).mean(axes, keepdims=True) + EPSILON)
    return mean, inverse


@jax.custom_vjp
def instance_norm(
    x: Float[Array, "n h w c"], scale: Float[Array, " c"], bias: Float[Array, " c"]
) -> Float[Array, "n h w c"]:
    """Per image and channel: zero mean, unit (biased) variance, eps 1e-5; then scale and shift."""
    mean, inverse = _normalize(x, (1, 2))
    return (x - mean) * (inverse * scale) + bias


def _instance_norm_fwd(x, scale, bias):
    mean, inverse = _normalize(x, (1, 2))
    return (x - mean) * (inverse * scale) + bias, (x, mean, inverse, scale)


def _instance_norm_bwd(residuals, dy):
    # Written out so that the two sums per image serve all three gradients: reductions over
    # whole batches, which the automatic derivative asks for, are slow on CPU.
    x, mean, inverse, scale = residuals
    normed = (x - mean) * inverse
    dbias = dy.mean((1, 2), keepdims=True)
    dscale = (dy * normed).mean((1, 2), keepdims=True)
    pixels = x.shape[1] * x.shape[2]
    dx = (inverse * scale) * (dy - dbias - normed * dscale)
    return dx, dscale.sum((0, 1, 2)) * pixels, dbias.sum((0, 1, 2)) * pixels


instance_norm.defvjp(_instance_norm_fwd, _instance_norm_bwd)


class Norm(nn.Module):
    """The normalizations of the field's ConvNet, with a learned scale and shift, eps 1e-5.

    Attributes:
        kind: `instance` (per image and channel), `layer` (per image), `group` (four groups of
            channels), `batch` (over the images of the batch at hand, in training and in testing
            alike: no running statistics exist) or `none`.
    """

    kind: str = "instance"

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Normalizes, scales and shifts."""
        if self.kind == "none":
            return x
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        if self.kind == "instance":
            return instance_norm(x, scale, bias)
        shape, axes = x.shape, {"layer": (1, 2, 3), "batch": (0, 1, 2), "group": (1, 2, 4)}
        if self.kind not in axes:
            raise InputError(f"unknown norm {self.kind!r}; choose from {', '.join(NORMS)}")
        if self.kind == "group":
            x = x.reshape(*shape[:3], 4, channels // 4)
        mean, inverse = _normalize(x, axes[self.kind])
        return ((x - mean) * inverse).reshape(shape) * scale + bias
