"""The transformer of diffusers, held to what diffusers itself said of the same numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.flow import schedules
from jaxdistill.io import diffusers
from jaxdistill.nn.transformer2d import Transformer2D

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "dit"


@pytest.fixture(scope="module")
def stored():
    """The fixture: module, parameters, and inputs and outputs with channels last."""
    checkpoint = diffusers.read_checkpoint(FOLDER)
    params = diffusers.load_transformer(checkpoint.folder, checkpoint.shape)
    kind, *ends = checkpoint.scheduler.betas
    schedule = schedules.noise_predictor(schedules.betas(kind, *ends, checkpoint.scheduler.steps))
    arrays = dict(np.load(FOLDER / "outputs.npz", allow_pickle=False))
    arrays |= {name: arrays[name].transpose(0, 2, 3, 1) for name in ("x", "output")}
    arrays["label"] = arrays["label"].astype(np.int32)
    return Transformer2D(checkpoint.shape, *schedule), params, jax.device_put(arrays)


def test_it_says_what_diffusers_says(stored):
    network, params, arrays = stored
    args = arrays["x"], arrays["time"], arrays["label"]
    said = jax.jit(lambda p, *a: network.apply({"params": p}, *a, method="predictions"))
    found = np.asarray(said(params, *args))
    assert arrays["output"].std() > 0.1
    np.testing.assert_allclose(found, arrays["output"], rtol=0, atol=2e-5)


def test_its_velocity_is_its_noise_on_the_straight_path(stored):
    network, params, arrays = stored
    x, label = arrays["x"], arrays["label"]
    # The network's own step 411, and the point of the straight path with its ratio.
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[411]
    data_part, noise_part = np.sqrt(kept), np.sqrt(1 - kept)
    t = noise_part / (data_part + noise_part)
    time = jnp.full(4, 411.0)
    says = network.apply({"params": params}, x, time, label, method="predictions")
    noise = np.asarray(says, np.float64)[..., :3]
    wanted = noise - (np.asarray(x) - noise_part * noise) / data_part
    straight = x / np.float32(data_part + noise_part)
    found = network.apply({"params": params}, straight, jnp.full(4, t, jnp.float32), label)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-3)


def test_fresh_parameters_have_the_shapes_of_the_file(stored):
    network, params, _ = stored
    fresh = jax.eval_shape(
        network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), jnp.zeros(1, int)
    )["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, fresh)


def test_images_of_another_size_are_refused(stored):
    network, params, _ = stored
    at = jnp.zeros((1, 4, 4, 3)), jnp.ones(1), jnp.zeros(1, jnp.int32)
    with pytest.raises(InputError, match=r"\(4, 4, 3\); this network takes \(8, 8, 3\)"):
        network.apply({"params": params}, *at)
