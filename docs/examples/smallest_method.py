"""The smallest method: images that have, class by class, the mean of the real ones."""

import jax
import jax.numpy as jnp
import optax

from jaxdistill import collective, runner
from jaxdistill.condense.synthetic import by_class
from jaxdistill.data import device, sources
from jaxdistill.method import BatchSpec, Method


def mean_matching(optimizer: optax.GradientTransformation, *, ipc: int, batch_real: int) -> Method:
    """Descends the squared distance of the class means, in pixels."""

    def init(key, frozen, batch):
        classes, _, *image_shape = batch["images"].shape
        keys = collective.class_keys(key, classes)  # a class's own, whichever device has it
        pixels = jax.vmap(lambda k: jax.random.uniform(k, (ipc, *image_shape)))(keys)
        return {"pixels": pixels, "opt": optimizer.init(pixels)}

    def step(state, frozen, batch, key):
        target = collective.mean(batch["images"].mean(1) / 255.0)

        def loss(pixels):
            return jnp.sum(jnp.square(pixels.mean(1) - target))

        value, grads = jax.value_and_grad(loss)(state["pixels"])
        updates, opt = optimizer.update(grads, state["opt"], state["pixels"])
        pixels = jnp.clip(optax.apply_updates(state["pixels"], updates), 0.0, 1.0)
        return {"pixels": pixels, "opt": opt}, {"distance": value / len(target)}

    def output(state):
        return {"images": state["pixels"]}

    def specs(state, mesh):
        return by_class(state, state["pixels"].shape)

    return Method(init, step, output, BatchSpec("per_class", batch_real), specs)


if __name__ == "__main__":
    digits = sources.load("digits")
    method = mean_matching(optax.adam(0.05), ipc=1, batch_real=128)
    data = device.resident({"images": digits.train.images}, digits.train.labels, digits.num_classes)
    state = runner.run(
        method, data=data, key=jax.random.key(0), steps=200, workdir="runs/means", progress="means"
    )
    print(method.output(state)["images"].shape)
