"""DM on the features of a Flax NNX network: a method takes functions of parameters, no module."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxdistill
from jaxdistill.condense.dm import dm


def network(key):
    """A hidden layer of features."""
    return nnx.Linear(64, 128, rngs=nnx.Rngs(key))


graph, _ = nnx.split(network(jax.random.key(0)))


def init(key):
    """The parameters of a fresh network."""
    return nnx.split(network(key))[1]


def features(params, images):
    """Features (n, 128) of normalized images (n, 8, 8, 1)."""
    return jax.nn.relu(nnx.merge(graph, params)(images.reshape(len(images), -1)))


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
