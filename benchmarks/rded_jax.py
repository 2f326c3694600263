"""Times the choice of crops here, in the configuration of `rded_torch.py`.

python benchmarks/rded_jax.py --json out.json
"""

import jax
import jax.numpy as jnp
import numpy as np
import rded_sides

from jaxdistill.condense.rded import rded
from jaxdistill.data.augment import normalizer
from jaxdistill.nn.classifiers import classifier


def main() -> None:
    """Prints the record as JSON and writes it where asked."""
    args = rded_sides.arguments(__doc__, at_once=60)
    shape = (args.size, args.size, 3)
    numbers = np.random.default_rng(0)
    images = numbers.integers(0, 256, (args.classes, args.mipc, *shape), np.uint8)
    network = classifier("convnet", args.classes, shape, depth=args.depth, width=args.width)
    params = jax.tree.map(lambda x: x[None], network.init(jax.random.key(0)))
    method = rded(
        network.logits,
        normalize=normalizer((0.5,) * 3, (0.25,) * 3),
        ipc=args.ipc,
        image_shape=shape,
        mipc=args.mipc,
        num_crop=args.crops,
        microbatch=args.at_once,
    )
    frozen, batch = {"observers": params}, {"images": jnp.asarray(images)}
    state = method.init(jax.random.key(0), frozen, batch)
    step = jax.jit(method.step)

    def choose(number):
        # The state of before is not looked at.
        return float(step(state, frozen, batch, jax.random.key(number))[1]["chosen"])

    rded_sides.measure(args, choose, jax=jax.__version__)


if __name__ == "__main__":
    main()
