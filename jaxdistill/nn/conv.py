"""Convolutions, alone or with the instance norm that follows, fast on every platform.

XLA's convolution is the right choice on GPU and TPU. On CPU it is not: its gradients are many
times slower inside `lax.scan` than outside, and no Winograd form is used. Here 3x3 convolutions
run on CPU as Winograd F(4x4, 3x3) (Lavin and Gray 2016, arXiv:1509.09308), a quarter of the
multiplications of the direct form, in plain matrix products that cost the same in and out of
a loop. The parameters are the same on every platform and results agree to float32 rounding.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxdistill.nn.init import torch_bias_init, torch_kernel_init
from jaxdistill.nn.norm import EPSILON, instance_norm

# Transforms of F(4x4, 3x3) at the interpolation points 0, 1, -1, 2, -2, infinity.
_TILE = 4
_PATCH = _TILE + 2
_INPUT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float32,
)
_KERNEL = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    np.float32,
)
_KERNEL_2D = np.kron(_KERNEL, _KERNEL)  # both axes at once, (36, 9)
_OUTPUT = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    np.float32,
)
# With fewer input channels or smaller maps the transforms cost more than they save (measured).
_WINOGRAD_MIN_CHANNELS = 8
_WINOGRAD_MIN_PIXELS = 144


def _combine(matrix: np.ndarray, terms: list[Array]) -> list[Array]:
    """Applies a small constant matrix to a list of arrays, leaving out its zeros."""
    return [
        sum(float(a) * term for a, term in zip(row, terms, strict=True) if a != 0) for row in matrix
    ]


def _tiles(size: int) -> int:
    return -(-size // _TILE)


def _pad_to_tiles(x: Array, before: int, extra: int) -> Array:
    """Zero-pads H and W to whole tiles; `extra` columns more than tiles times tile size."""
    pads = [(before, _tiles(n) * _TILE + extra - before - n) for n in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), *pads, (0, 0)))


def _transform_input(x: Array) -> list[Array]:
    """The 36 transformed patch entries, each (tiles, channels)."""
    n, h, w, c = x.shape
    th, tw = _tiles(h), _tiles(w)
    x = _pad_to_tiles(x, 1, 2)
    span_h, span_w = _TILE * (th - 1) + 1, _TILE * (tw - 1) + 1
    rows = _combine(_INPUT, [x[:, i : i + span_h : _TILE] for i in range(_PATCH)])
    return [
        entry.reshape(n * th * tw, c)
        for row in rows
        for entry in _combine(_INPUT, [row[:, :, j : j + span_w : _TILE] for j in range(_PATCH)])
    ]


def _in_float32(form: Callable[..., Array]) -> Callable[..., Array]:
    """For forms that lose digits on the way, of which smaller types have none to spare."""

    @functools.wraps(form)
    def wide(x, *args, **options):
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        args = [array.astype(dtype) for array in args]
        return form(x.astype(dtype), *args, **options).astype(x.dtype)

    return wide


@_in_float32
def _winograd(x: Array, kernel: Array) -> Array:
    n, h, w, _ = x.shape
    th, tw = _tiles(h), _tiles(w)
    # One small matrix product; an einsum over both axes is ten times slower here.
    kernels = (_KERNEL_2D @ kernel.reshape(9, -1)).reshape(-1, *kernel.shape[2:])
    products = [(v @ kernels[k]).reshape(n, th, tw, -1) for k, v in enumerate(_transform_input(x))]
    # rows[j][a]: the output transform along the second axis, then along the first.
    partial = [_combine(_OUTPUT, products[a * _PATCH : (a + 1) * _PATCH]) for a in range(_PATCH)]
    columns = [_combine(_OUTPUT, [p[j] for p in partial]) for j in range(_TILE)]
    rows = [jnp.stack([columns[j][i] for j in range(_TILE)], axis=3) for i in range(_TILE)]
    out = jnp.stack(rows, axis=2)  # (n, th, tile, tw, tile, c)
    return out.reshape(n, th * _TILE, tw * _TILE, -1)[:, :h, :w]


@_in_float32
def _winograd_kernel_gradient(x: Array, dy: Array) -> Array:
    n, h, w, out_channels = dy.shape
    th, tw = _tiles(h), _tiles(w)
    dy = _pad_to_tiles(dy, 0, 0)
    rows = _combine(_OUTPUT.T, [dy[:, i::_TILE] for i in range(_TILE)])
    entries = [
        entry.reshape(n * th * tw, out_channels)
        for row in rows
        for entry in _combine(_OUTPUT.T, [row[:, :, j::_TILE] for j in range(_TILE)])
    ]
    grads = [v.T @ d for v, d in zip(_transform_input(x), entries, strict=True)]
    grads = _KERNEL_2D.T @ jnp.stack(grads).reshape(_PATCH**2, -1)
    return grads.reshape(3, 3, x.shape[-1], out_channels)


def _direct(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _direct_kernel_gradient(x: Array, dy: Array) -> Array:
    # The convolution is linear in its kernel, so its transpose is the gradient.
    shape = jax.ShapeDtypeStruct((3, 3, x.shape[-1], dy.shape[-1]), dy.dtype)
    return jax.linear_transpose(lambda kernel: _direct(x, kernel, 1, 1), shape)(dy)[0]


def _flip(kernel: Array) -> Array:
    return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


# The two products below are bilinear and closed under differentiation: each gradient is one of
# them again. Stating that keeps the residuals to the inputs, lets the gradient use Winograd too,
# and allows second derivatives.
@jax.custom_vjp
def _conv3x3(x: Array, kernel: Array) -> Array:
    return lax.platform_dependent(
        x, kernel, cpu=_winograd, default=functools.partial(_direct, stride=1, padding=1)
    )


@jax.custom_vjp
def _conv3x3_kernel_gradient(x: Array, dy: Array) -> Array:
    return lax.platform_dependent(
        x, dy, cpu=_winograd_kernel_gradient, default=_direct_kernel_gradient
    )


def _conv3x3_bwd(residuals, dy):
    x, kernel = residuals
    return _conv3x3(dy, _flip(kernel)), _conv3x3_kernel_gradient(x, dy)


def _conv3x3_kernel_gradient_bwd(residuals, dkernel):
    x, dy = residuals
    return _conv3x3(dy, _flip(dkernel)), _conv3x3(x, dkernel)


_conv3x3.defvjp(lambda x, k: (_conv3x3(x, k), (x, k)), _conv3x3_bwd)
_conv3x3_kernel_gradient.defvjp(
    lambda x, dy: (_conv3x3_kernel_gradient(x, dy), (x, dy)), _conv3x3_kernel_gradient_bwd
)


def _patches(x: Array, size: int, stride: int, padding: int) -> Array:
    """All windows of the padded input, flattened: (n, h2, w2, size * size * c)."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    span_h, span_w = x.shape[1] - size + 1, x.shape[2] - size + 1
    shifts = [
        x[:, i : i + span_h : stride, j : j + span_w : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(shifts, axis=-1)


def _as_matrix_product(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Patch extraction and one matrix product: no penalty inside a loop on CPU."""
    patches = _patches(x, kernel.shape[0], stride, padding)
    out = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return out.reshape(*patches.shape[:3], -1)


@_in_float32
def _folded_conv_norm(x: Array, kernel: Array, scale: Array, bias: Array, padding: int) -> Array:
    """Convolution and instance norm in one matrix product per image.

    The output of a convolution is linear in the input windows, so its mean and variance follow
    from the mean and covariance of the windows, which are small when there are few input
    channels. The normalization then goes into the kernel, and the large output is written once.
    """
    patches = _patches(x, kernel.shape[0], 1, padding)
    n, h, w, k = patches.shape
    patches = patches.reshape(n, h * w, k)
    centred = patches - patches.mean(1, keepdims=True)
    kernel = kernel.reshape(k, -1)
    covariance = jnp.einsum("nsk,nsl->nkl", centred, centred) / (h * w)
    variance = jnp.einsum("ko,nkl,lo->no", kernel, covariance, kernel)
    kernels = kernel * (scale * lax.rsqrt(variance + EPSILON))[:, None]
    # A constant input carries the bias through the same product.
    kernels = jnp.concatenate([kernels, jnp.broadcast_to(bias, (n, 1, bias.size))], axis=1)
    centred = jnp.concatenate([centred, jnp.ones((n, h * w, 1), x.dtype)], axis=-1)
    return jnp.einsum("nsk,nko->nso", centred, kernels).reshape(n, h, w, -1)


def _conv_then_norm(x: Array, kernel: Array, scale: Array, bias: Array, padding: int) -> Array:
    return instance_norm(_direct(x, kernel, 1, padding), scale, bias)


def conv_instance_norm(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "k k c o"],
    scale: Float[Array, " o"],
    bias: Float[Array, " o"],
    padding: int = 1,
) -> Float[Array, "n h2 w2 o"]:
    """Convolution followed by instance norm.

    A bias of the convolution would be removed by the norm, so there is none.

    Args:
        x: Images or activations, channels last.
        kernel: Square kernel, applied with stride 1.
        scale: Scale of the norm.
        bias: Shift of the norm.
        padding: Zeros added on every side.

    Returns:
        Normalized, scaled and shifted activations.
    """
    if x.shape[-1] >= _WINOGRAD_MIN_CHANNELS:
        return instance_norm(conv2d(x, kernel, 1, padding), scale, bias)
    return lax.platform_dependent(
        x,
        kernel,
        scale,
        bias,
        cpu=functools.partial(_folded_conv_norm, padding=padding),
        default=functools.partial(_conv_then_norm, padding=padding),
    )


def conv2d(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "k k c o"],
    stride: int = 1,
    padding: int = 1,
) -> Float[Array, "n h2 w2 o"]:
    """Cross-correlation with symmetric zero padding, the fastest form of the platform.

    Args:
        x: Images or activations, channels last.
        kernel: Square kernel.
        stride: Step in both axes.
        padding: Zeros added on every side.

    Returns:
        Activations with spatial size `(h + 2 * padding - k) // stride + 1`.
    """
    winograd = kernel.shape[0] == 3 and stride == 1 and padding == 1
    large = x.shape[1] * x.shape[2] >= _WINOGRAD_MIN_PIXELS
    if winograd and large and x.shape[-1] >= _WINOGRAD_MIN_CHANNELS:
        return _conv3x3(x, kernel)
    options = {"stride": stride, "padding": padding}
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_as_matrix_product, **options),
        default=functools.partial(_direct, **options),
    )


class Conv(nn.Module):
    """Square convolution with PyTorch's default initialization.

    Attributes:
        features: Output channels.
        kernel_size: Side of the kernel in pixels.
        stride: Step in both axes.
        padding: Zeros added on every side.
        use_bias: Whether a bias is added.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 o"]:
        """Applies the convolution."""
        size, channels = self.kernel_size, x.shape[-1]
        kernel = self.param("kernel", torch_kernel_init, (size, size, channels, self.features))
        y = conv2d(x, kernel, self.stride, self.padding)
        if self.use_bias:
            fan_in = size * size * channels
            y = y + self.param("bias", torch_bias_init(fan_in), (self.features,))
        return y
