"""How an NCFM step grows with each of its sizes: time, memory, and the exponents.

    python benchmarks/scaling.py

One size at a time is multiplied by 2 and 4 from a small base. Time is the median CPU seconds of a
step, memory the compiler's figure for temporaries, each of a compiled step on one CPU device.
Writes `benchmarks/records/scaling.json` and `docs/images/scaling.png`; `--table` prints the record.
"""

import argparse
import functools
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import recording

from jaxdistill.condense import charfn
from jaxdistill.condense.ncfm import ncfm
from jaxdistill.data import device
from jaxdistill.data.augment import normalizer
from jaxdistill.io.versions import versions
from jaxdistill.nn.convnet import ConvNet

_ROOT = Path(__file__).parent.parent
_RECORD = recording.FOLDER / "scaling.json"
_PLOT = _ROOT / "docs" / "images" / "scaling.png"
_BASE = {"classes": 4, "ipc": 4, "real": 64, "freqs": 1024, "size": 16, "width": 64}


def measure(sizes: dict[str, int], steps: int) -> dict:
    """CPU seconds of a step, and bytes of temporaries and of arguments."""
    shape = (sizes["size"], sizes["size"], 3)
    net = ConvNet(sizes["classes"], 2, sizes["width"])
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (sizes["real"] * sizes["classes"], *shape), np.uint8)
    labels = np.repeat(np.arange(sizes["classes"], dtype=np.int32), sizes["real"])
    data = jax.device_put(device.resident({"images": images}, labels, sizes["classes"]))
    init = jax.jit(lambda key: net.init(key, jnp.zeros((1, *shape)))["params"])
    one = jax.tree.map(lambda x: x[None], init(jax.random.key(0)))
    pool = {"initial": one, "trained": one}
    method = ncfm(
        lambda p, x: net.apply({"params": p}, x, method="features"),
        lambda p, x: net.apply({"params": p}, x),
        optax.adam(1e-3),
        charfn.gaussian(),
        normalize=normalizer((0.5,) * 3, (0.25,) * 3),
        feature_dim=sizes["width"] * (sizes["size"] // 4) ** 2,
        ipc=sizes["ipc"],
        factor=2,
        batch_real=sizes["real"],
        num_freqs=sizes["freqs"],
        microbatch=16,
    )

    def step(state, pool, data, key):
        return method.step(state, pool, device.draw(method.batches, data, key), key)

    key = jax.random.key(1)
    state = jax.jit(lambda d: method.init(key, pool, device.draw(method.batches, d, key)))(data)
    compiled = jax.jit(step).lower(state, pool, data, key).compile()
    memory = compiled.memory_analysis()
    run = functools.partial(compiled, state, pool, data)
    jax.block_until_ready(run(key))
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        jax.block_until_ready(run(key))
        seconds.append(time.process_time() - start)
    return {
        "sizes": sizes,
        "cpu_seconds": seconds,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
    }


def curves(record: dict) -> dict[str, list[tuple[int, float, float]]]:
    """For each size its values, with CPU seconds and bytes."""
    base = record["base"]["sizes"]
    found = {name: [] for name in base}
    for point in [record["base"], *record["points"]]:
        for name in base:
            others = {k: v for k, v in point["sizes"].items() if k != name}
            if all(base[k] == v for k, v in others.items()):
                cost = statistics.median(point["cpu_seconds"]), point["temporary_bytes"]
                found[name].append((point["sizes"][name], *cost))
    return {name: sorted(values) for name, values in found.items()}


def _exponent(values: list[tuple[int, float]]) -> float:
    (x0, y0), (x1, y1) = values[-2], values[-1]
    return math.log(y1 / y0) / math.log(x1 / x0)


def table(record: dict) -> str:
    """Markdown: the exponents between the two largest values of each size."""
    lines = ["| grows with | from, to | time | memory |", "|---|---|---|---|"]
    for name, points in curves(record).items():
        time_, memory = (_exponent([(p[0], p[i]) for p in points]) for i in (1, 2))
        span = f"{points[0][0]}, {points[-1][0]}"
        lines.append(f"| {name} | {span} | {time_:.2f} | {memory:.2f} |")
    return "\n".join(lines)


def plot(record: dict) -> None:
    """Two panels, time and memory relative to the base, on logarithmic axes."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    for name, points in curves(record).items():
        factor = [p[0] / points[0][0] for p in points]
        for panel, index in ((axes[0], 1), (axes[1], 2)):
            panel.loglog(factor, [p[index] / points[0][index] for p in points], "o-", label=name)
    for panel, title in zip(axes, ("CPU time of a step", "temporary memory"), strict=True):
        panel.loglog([1, 4], [1, 4], ":", color="grey", label="linear")
        panel.set(title=title, xlabel="factor on the size", ylabel="relative to the base")
        panel.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    _PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(_PLOT, dpi=120)


def main() -> None:
    """Measures, writes record and plot, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        points = [
            measure({**_BASE, name: _BASE[name] * factor}, args.steps)
            for name in _BASE
            for factor in (2, 4)
        ]
        record = {
            "base": measure(_BASE, args.steps),
            "points": points,
            "versions": versions(),
            "platform": platform.platform(),
            "cores": os.cpu_count(),
        }
        recording.write(_RECORD, record)
    record = json.loads(_RECORD.read_text())
    plot(record)
    print(table(record))


if __name__ == "__main__":
    main()
