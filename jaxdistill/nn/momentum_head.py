"""Output layers that predict a path instead of a velocity.

They take the features that the last layer of a teacher sees, and start from that layer.
"""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxdistill.errors import InputError
from jaxdistill.nn.patches import unpatchify


def _per_pixel(flat: Array, patch: int, modes: int) -> Array:
    """Tokens of (row, column, channel, mode) to (n, h, w, channel, mode)."""
    pixels = unpatchify(flat, patch)
    return pixels.reshape(*pixels.shape[:3], -1, modes)


def _gated_velocities(
    features: Array, modes: int, channels: int, patch: int
) -> tuple[Array, Array]:
    """The layers that both heads have: velocities of the modes, and logits of their gates."""
    if modes < 1:
        raise InputError(f"{modes} modes: a path needs at least one")
    zeros, pixels = nn.initializers.zeros, patch**2
    velocities = nn.Dense(pixels * channels * modes, name="velocities")(features)
    gates = nn.Dense(pixels * modes, kernel_init=zeros, name="gates")(features)
    return _per_pixel(velocities, patch, modes), _per_pixel(gates, patch, modes)[..., 0, :]


def _spread(low: float, high: float, patch: int) -> nn.initializers.Initializer:
    """Evenly spaced values, the same for every pixel of a patch."""

    def init(key, shape, dtype=jnp.float32):
        del key
        return jnp.asarray(np.tile(np.linspace(low, high, shape[0] // patch**2), patch**2), dtype)

    return init


class MomentumHead(nn.Module):
    """Features to the modes of a momentum path (ArcFlow, arXiv:2602.09014).

    The first mode has gamma = 1, so there are K - 1 logarithms. Gates and gammas belong to a
    pixel and are shared by its channels. All computation is float32.

    Attributes:
        modes: Number of modes K.
        channels: Channels of the images.
        patch: Side of a patch in pixels.
        log_range: First and last logarithm of gamma at the start, evenly spaced in between.
        curved: Whether gammas are learned. Without, all are 1: the same head, but straight paths.
    """

    modes: int
    channels: int
    patch: int
    log_range: tuple[float, float] = (math.log(0.2), math.log(4.0))
    curved: bool = True

    @nn.compact
    def __call__(
        self, features: Float[Array, "n gh gw d"]
    ) -> tuple[Float[Array, "n h w c k"], Float[Array, "n h w k"], Float[Array, "n h w k1"]]:
        """Predicts the modes.

        Args:
            features: What the teacher's output layer sees.

        Returns:
            The velocities of the modes, the logits of their gates and the logarithms of the
            gammas of all modes but the first.

        Raises:
            InputError: for fewer than one mode.
        """
        features = features.astype(jnp.float32)
        velocities, logits = _gated_velocities(features, self.modes, self.channels, self.patch)
        if not self.curved or self.modes == 1:
            return velocities, logits, jnp.zeros((*logits.shape[:-1], self.modes - 1))
        spread = _spread(*self.log_range, self.patch)
        log_gammas = nn.Dense(
            self.patch**2 * (self.modes - 1),
            kernel_init=nn.initializers.zeros,
            bias_init=spread,
            name="log_gammas",
        )(features)
        return velocities, logits, _per_pixel(log_gammas, self.patch, self.modes - 1)[..., 0, :]


class GaussianHead(nn.Module):
    """Features to a Gaussian mixture over the data, the policy of pi-Flow (arXiv:2510.14974).

    Attributes:
        modes: Number of components K.
        channels: Channels of the images.
        patch: Side of a patch in pixels.
        log_std: Logarithm of the standard deviation at the start. The default is that of the
            released code for heads made from a teacher: with wide components, K equal ones would
            pull the path away from the teacher's velocity at once.
    """

    modes: int
    channels: int
    patch: int
    log_std: float = math.log(0.05)

    @nn.compact
    def __call__(
        self, features: Float[Array, "n gh gw d"]
    ) -> tuple[Float[Array, "n h w c k"], Float[Array, "n h w k"], Float[Array, " n"]]:
        """Predicts the mixture.

        Args:
            features: What the teacher's output layer sees.

        Returns:
            The means as velocities u (the data is `x - t u`), the logits of the weights, and one
            logarithm of the standard deviation of the data per example, over t, from the mean of
            the features over the image.

        Raises:
            InputError: for fewer than one component.
        """
        features = features.astype(jnp.float32)
        velocities, logits = _gated_velocities(features, self.modes, self.channels, self.patch)
        start = nn.initializers.constant(self.log_std)
        log_std = nn.Dense(1, kernel_init=nn.initializers.zeros, bias_init=start, name="log_std")(
            features.mean((1, 2))
        )
        return velocities, logits, log_std[:, 0]


def from_output(
    key: Key[Array, ""],
    head_params: Mapping,
    output_params: Mapping,
    modes: int,
    noise: float = 0.05,
) -> dict:
    """Puts a copy of a teacher's output layer into every mode of a head.

    With the gates equal, as they are at the start, the mean over the modes is the velocity of the
    teacher, up to the noise that tells the modes apart.

    Args:
        key: Draws the noise.
        head_params: Parameters of a `MomentumHead` or `GaussianHead`.
        output_params: `kernel` (d, patch * patch * channels) and `bias` of the teacher's layer.
        modes: Number of modes of the head.
        noise: Standard deviation of what is added to the biases, one value per channel and mode.

    Returns:
        The parameters of the head with new `velocities`.

    Raises:
        InputError: when the head does not fit the layer.
    """
    kernel, bias = output_params["kernel"], output_params["bias"]
    want = (kernel.shape[0], kernel.shape[1] * modes)
    have = head_params["velocities"]["kernel"].shape
    if have != want:
        raise InputError(
            f"a head of {modes} modes on an output layer of shape {kernel.shape} needs velocities "
            f"of shape {want}, these have {have}: make both for one teacher"
        )
    pixels = head_params["gates"]["bias"].size // modes
    shifts = noise * jax.random.normal(key, (bias.size // pixels, modes))
    velocities = {
        "kernel": jnp.repeat(kernel.astype(jnp.float32), modes, axis=1),
        "bias": jnp.repeat(bias.astype(jnp.float32), modes) + jnp.tile(shifts.ravel(), pixels),
    }
    return {**head_params, "velocities": velocities}
