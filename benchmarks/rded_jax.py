"""Times the choice of crops here, in the configuration of `rded_torch.py`.

python benchmarks/rded_jax.py --json out.json
"""

import argparse
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.condense.rded import rded
from jaxdistill.data.augment import normalizer
from jaxdistill.nn.classifiers import classifier


def main() -> None:
    """Prints the record as JSON and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {
        "classes": 10, "mipc": 300, "crops": 5, "ipc": 10, "size": 32, "width": 128, "depth": 3,
        "microbatch": 60, "rounds": 2,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
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
        microbatch=args.microbatch,
    )
    frozen, batch = {"observers": params}, {"images": jnp.asarray(images)}
    state = method.init(jax.random.key(0), frozen, batch)
    step = jax.jit(method.step)
    wall, cpu, losses = [], [], []
    for number in range(args.rounds + 1):
        begun = time.perf_counter(), time.process_time()
        state, metrics = step(state, frozen, batch, jax.random.key(number))
        losses.append(float(metrics["chosen"]))
        if number:  # the first compiles
            wall.append(time.perf_counter() - begun[0])
            cpu.append(time.process_time() - begun[1])
    record = {
        "crops": math.prod((args.classes, args.mipc, args.crops)),
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "losses": losses,
        "jax": jax.__version__,
    }
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
