"""Times one NCFM iteration of jaxdistill in the configuration of `ncfm_torch.py`.

python benchmarks/ncfm_jax.py --json out.json
"""

import argparse
import functools
import json
import os
import platform
import resource
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.condense import charfn
from jaxdistill.condense.ncfm import ncfm
from jaxdistill.data import device
from jaxdistill.data.augment import normalizer
from jaxdistill.io.versions import versions
from jaxdistill.nn.convnet import ConvNet

# As many random images as CIFAR has, so that the resident data weigh what they do in practice.
_RANDOM_IMAGES = 50_000


def _summary(seconds: list[float]) -> dict:
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "all": seconds,
    }


def measure(args: argparse.Namespace) -> dict:
    """Runs the warm-up and the timed iterations and returns the record."""
    shape = (args.size, args.size, args.channels)
    net = ConvNet(args.classes, args.depth, args.width)
    per_class = max(args.real, _RANDOM_IMAGES // args.classes)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (per_class * args.classes, *shape), np.uint8)
    labels = np.repeat(np.arange(args.classes, dtype=np.int32), per_class)
    data = jax.device_put(device.resident({"images": images}, labels, args.classes))
    del images

    def parameters(seed):
        return jax.jit(net.init)(jax.random.key(seed), jnp.zeros((1, *shape)))["params"]

    stack = lambda tree: jax.tree.map(lambda x: x[None], tree)  # noqa: E731
    pool = {"initial": stack(parameters(0)), "trained": stack(parameters(1))}
    features = lambda p, x: net.apply({"params": p}, x, method="features")  # noqa: E731
    method = ncfm(
        features,
        lambda p, x: net.apply({"params": p}, x),
        optax.adam(1e-3),
        charfn.gaussian(),
        normalize=normalizer((0.5,) * args.channels, (0.25,) * args.channels),
        feature_dim=args.width * (args.size // 2**args.depth) ** 2,
        ipc=args.ipc,
        factor=args.factor,
        batch_real=args.real,
        num_freqs=args.freqs,
        calibration=args.calibration,
        microbatch=args.pass_size,
    )

    def batch(data, key):
        return device.draw(method.batches, data, key)

    @jax.jit
    def init(pool, data, key):
        return method.init(key, pool, batch(data, key))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, pool, data, key):
        return method.step(state, pool, batch(data, key), key)

    state = init(pool, data, jax.random.key(2))
    wall, cpu, losses = [], [], []
    start = time.perf_counter()
    for i in range(args.warmup + args.iterations):
        times = time.perf_counter(), time.process_time()
        state, metrics = step(state, pool, data, jax.random.key(100 + i))
        losses.append(float(metrics["match"]))
        if i == 0:
            first = time.perf_counter() - start
        if i >= args.warmup:
            wall.append(time.perf_counter() - times[0])
            cpu.append(time.process_time() - times[1])
    return {
        "benchmark": "ncfm_jax",
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "wall_seconds": _summary(wall),
        "cpu_seconds": _summary(cpu),
        "first_iteration_seconds": first,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "match_loss": losses,
        "versions": versions(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }


def main() -> None:
    """Prints the record as JSON and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    integers = {
        "classes": 10,
        "real": 1024,
        "freqs": 4096,
        "width": 128,
        "depth": 3,
        "factor": 2,
        "ipc": 10,
        "size": 32,
        "channels": 3,
        "iterations": 3,
        "warmup": 1,
        "pass-size": 16,
    }
    for name, default in integers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--calibration", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    text = json.dumps(measure(args), indent=2) + "\n"
    print(text, end="")
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
