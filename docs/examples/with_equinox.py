"""DM on the features of an Equinox network: a method takes functions of parameters, no module."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import jaxdistill
from jaxdistill.condense.dm import dm


def network(key):
    """A hidden layer of features."""
    return eqx.nn.Linear(64, 128, key=key)


_, static = eqx.partition(network(jax.random.key(0)), eqx.is_array)


def init(key):
    """The parameters of a fresh network."""
    return eqx.filter(network(key), eqx.is_array)


def features(params, images):
    """Features (n, 128) of normalized images (n, 8, 8, 1)."""
    linear = eqx.combine(params, static)
    return jax.nn.relu(jax.vmap(linear)(images.reshape(len(images), -1)))


digits = jaxdistill.load_data("digits")
method = dm(
    features,
    init,
    optax.adam(0.02),
    normalize=lambda images: (images / 255.0 if images.dtype == jnp.uint8 else images) - 0.3,
    ipc=1,
    batch_real=64,
    strategy="crop",
)
data = jaxdistill.resident({"images": digits.train.images}, digits.train.labels, 10)
matches = []
state = jaxdistill.run(
    method,
    data=data,
    key=jax.random.key(0),
    steps=50,
    on_chunk=lambda step, state: matches.append(method.output(state)["images"]),
)
images = method.output(state)["images"]
print(images.shape, f"{float(jnp.abs(images - matches[0]).mean()):.3f} from its first chunk")
