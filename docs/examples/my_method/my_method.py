"""A method outside the package: images that have, class by class, the mean of the real ones."""

import jax
import jax.numpy as jnp
import optax

from jaxdistill import collective
from jaxdistill.condense.synthetic import ImagesPerClass, by_class
from jaxdistill.keywords import Count, Rate
from jaxdistill.method import BatchSpec, Method
from jaxdistill.task import CondenseTask, Recipe


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

    def specs(state, mesh):
        return by_class(state, state["pixels"].shape)

    batches = BatchSpec("per_class", batch_real)
    return Method(init, step, lambda state: {"images": state["pixels"]}, batches, specs)


def recipe(
    task: CondenseTask,
    *,
    ipc: ImagesPerClass = 1,
    steps: Count = 200,
    learning_rate: Rate = 0.05,
    batch_real: Count = 128,
) -> Recipe:
    """Mean matching with Adam.

    Args:
        task: What it is for; mean matching needs nothing of it.
        ipc: Images per class.
        steps: Length of the run.
        learning_rate: Of the pixels.
        batch_real: Real images of each class in a step.
    """
    method = mean_matching(optax.adam(learning_rate), ipc=ipc, batch_real=batch_real)
    return Recipe(method, steps)
