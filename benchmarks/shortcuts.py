"""What each statistical shortcut of an NCFM step saves, and the accuracy that it costs.

    python benchmarks/shortcuts.py --workdir=runs/shortcuts

Every row is the first with one thing changed: fewer frequencies, fewer real images, bfloat16 on
the real path, and frequencies that each class draws for itself instead of one set for all. Each is
distilled and judged for every seed, and its step is timed in rounds, in a process of its own. All
use Gaussian frequencies and no calibration: what is left is the match.

Interrupted, the same command goes on. Writes `benchmarks/records/shortcuts_<data set>.json`, which
`--table` prints. Fashion-MNIST must be there (Debian: dataset-fashion-mnist); `--dataset=digits`
needs nothing.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import recording

from jaxdistill import config as configs
from jaxdistill import experiment, run_folder, runner
from jaxdistill.condense import charfn
from jaxdistill.condense.ncfm import ncfm
from jaxdistill.io.versions import versions
from jaxdistill.method import Method
from jaxdistill.parallel.mesh import make_mesh, put

_OWN = "frequencies of each class's own"
# Row -> numbers that are divided, and other settings.
_ROWS = {
    "NCFM": {},
    "a quarter of the frequencies": {"num_freqs": 4},
    "a sixteenth of the frequencies": {"num_freqs": 16},
    "half the real images": {"batch_real": 2},
    "a quarter of the real images": {"batch_real": 4},
    "bfloat16 on the real path": {"real_dtype": "bfloat16"},
    _OWN: {},
}
# The rate that was chosen for this loss on images held out of the training set.
_RATES = {"fashion_mnist": 0.1}


def _config(row: str, seed: int, args: argparse.Namespace) -> ml_collections.ConfigDict:
    spec = f"ncfm:dataset={args.dataset},ipc={args.ipc},baselines=,seed={seed}"
    config = configs.load(spec)
    config.method.calibration = 0.0
    config.method.learning_rate = _RATES.get(args.dataset, config.method.learning_rate)
    config.method.steps = args.steps
    config.pool.dir = str(args.workdir / "pool")
    for setting in args.set:
        configs.override(config, *setting.split("=", 1))
    for name, value in _ROWS[row].items():
        config.method[name] = value if isinstance(value, str) else config.method[name] // value
    return config


def _own_frequencies(make: Callable[[charfn.FrequencySampler], Method], scale: float) -> Method:
    """One class at a time, each with frequencies that no other class sees.

    The classes share the network, as in the plain method, and what is drawn for augmentation.
    """
    law = charfn.gaussian(scale)
    plain = make(law)

    def alone(label: jax.Array) -> Method:
        def draw(params, key, num, dim):
            return law.draw(params, jax.random.fold_in(key, label), num, dim)

        return make(law._replace(draw=draw))

    def init(key, frozen, batch):
        one = lambda x: alone(x[0]).init(key, frozen, {"images": x[1][None]})  # noqa: E731
        return jax.lax.map(one, (jnp.arange(len(batch["images"])), batch["images"]))

    def step(state, frozen, batch, key):
        one = lambda x: alone(x[0]).step(x[1], frozen, {"images": x[2][None]}, key)  # noqa: E731
        state, metrics = jax.lax.map(
            one, (jnp.arange(len(batch["images"])), state, batch["images"])
        )
        return state, jax.tree.map(jnp.mean, metrics)

    def output(state):
        return jax.tree.map(lambda x: x[:, 0], jax.vmap(plain.output)(state))

    return Method(init, step, output, plain.batches)


def _method(row: str, ready: experiment.Ready) -> Method:
    if row != _OWN:
        return ready.recipes["ncfm"].method
    task, settings = ready.loaded.task, ready.experiment.rows["ncfm"].settings
    rate, steps, decay = (settings[n] for n in ("learning_rate", "steps", "learning_rate_decay"))
    same = ("ipc", "factor", "start", "batch_real", "strategy", "real_dtype", "num_freqs")
    make = functools.partial(
        ncfm,
        task.network.features,
        task.network.logits,
        optax.adam(optax.cosine_decay_schedule(rate, steps, decay)),
        normalize=task.normalize,
        feature_dim=task.network.feature_dim,
        microbatch=task.microbatch,
        **{name: settings[name] for name in same},
    )
    return _own_frequencies(lambda law: make(sampler=law), settings["freq_scale"])


def _workdir(row: str, seed: int, args: argparse.Namespace) -> Path:
    return args.workdir / f"{args.dataset}-{list(_ROWS).index(row)}-{seed}"


def _judged(row: str, seed: int, args: argparse.Namespace) -> dict:
    """Distils, trains on it, and returns the accuracies."""
    config, workdir = _config(row, seed, args), _workdir(row, seed, args)
    if row == _OWN:
        _distil_own(config, workdir)
    records = experiment.train(config, workdir)
    settings = {key: config.method[key] for key in ("num_freqs", "batch_real")}
    return {
        "seed": seed,
        "accuracies": [record["value"] for record in records],
        "epochs": config.evals.accuracy.epochs,
        "rate": config.method.learning_rate,
        **settings,
    }


def _distil_own(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """The row that no recipe makes, run by the loop alone and left where a row's artefact lies."""
    ready = experiment.set_up(config, workdir)
    if (workdir / "artifacts" / "distilled.npz").is_file():
        return
    first = ready.experiment.rows["ncfm"]
    identity = run_folder.claim(
        workdir,
        ready.experiment.identity(first) | ready.loaded.source,
        ready.experiment.default_identity(first),
    )
    method = _method(_OWN, ready)
    state = runner.run(
        method,
        data=ready.loaded.task.examples.load(),
        frozen=ready.recipes["ncfm"].frozen.load(),
        key=jax.random.key(config.seed),
        steps=config.method.steps,
        chunk=config.run.chunk,
        mesh=make_mesh(jax.devices()[:1]),
        workdir=workdir,
        checkpoint_every=config.run.checkpoint_every,
        metadata={"config_hash": f"{identity}, {_OWN}"},
        progress=_OWN,
    )
    card = {"dataset": ready.loaded.task.name, "method": _OWN, "config_hash": identity}
    card |= {"provenance": ready.loaded.source}
    output = jax.device_get(method.output(state))
    family = ready.experiment.family
    family.save(workdir / "artifacts", ready.experiment, ready.loaded, first, output, card)


def _time(row: str, args: argparse.Namespace) -> dict:
    """Seconds of steps of a method whose extractors are there, and the peak of the memory."""
    config = _config(row, args.seeds[0], args)
    ready = experiment.set_up(config, _workdir(row, args.seeds[0], args))
    data = ready.loaded.task.examples.load()
    mesh = make_mesh(jax.devices()[:1])
    arguments = jax.random.key(0), ready.loaded.task.extractors.load(), data
    program = runner.programs(
        _method(row, ready),
        data=data,
        frozen=arguments[1],
        key=arguments[0],
        chunk=args.timed,
        mesh=mesh,
        backend="jit",
    )
    placed = put(arguments, mesh)
    state = program.init(*placed)
    record = {"wall_seconds": [], "cpu_seconds": []}
    for i in range(args.timed + 1):
        start = time.perf_counter(), time.process_time()
        state, _ = jax.block_until_ready(program.chunk(state, np.int32(1), *placed[1:]))
        if i:  # the first compiles
            record["wall_seconds"].append(time.perf_counter() - start[0])
            record["cpu_seconds"].append(time.process_time() - start[1])
    # Not getrusage: what it says of a process is at least what its parent had.
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return record | {"peak_rss_bytes": int(status["VmHWM"].split()[0]) * 1024}


def _timed_alone(row: str, args: argparse.Namespace) -> dict:
    """`_time` in a process of its own, whose memory is its own too."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--time={row}"]
    return json.loads(subprocess.check_output(command, text=True).splitlines()[-1])


def table(record: dict) -> str:
    """Markdown: accuracy over all seeds; medians of a step over all rounds; the range of wall."""
    lines = [
        "| row | frequencies | real images | accuracy % | step, wall s | step, CPU s | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, found in record["rows"].items():
        runs, timed = found["runs"], found["timed"]
        values = [100 * a for run in runs for a in run["accuracies"]]
        wall, cpu = ([x for t in timed for x in t[f"{k}_seconds"]] for k in ("wall", "cpu"))
        cells = [f"{np.mean(values):.1f} ± {np.std(values):.1f}", "–", "–", "–"]
        if timed:
            peak = statistics.median(t["peak_rss_bytes"] for t in timed)
            middle = statistics.median(wall)
            cells[1] = f"{middle:.3f} ({min(wall):.3f} to {max(wall):.3f})"
            cells[2:] = f"{statistics.median(cpu):.3f}", f"{peak / 1e9:.2f}"
        sizes = runs[0]["num_freqs"], runs[0]["batch_real"]
        lines.append("| " + " | ".join(map(str, [row, *sizes, *cells])) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, writes the record after each part, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("fashion_mnist", "digits"), default="fashion_mnist")
    parser.add_argument("--ipc", type=int, default=1)
    parser.add_argument("--workdir", type=Path, default=Path("runs/shortcuts"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timed", type=int, default=10, help="steps timed in a round")
    parser.add_argument("--set", nargs="*", default=[], help="config overrides, a.b=value")
    parser.add_argument("--record", type=Path, help="instead of the one in records/")
    parser.add_argument("--table", action="store_true", help="print and run nothing")
    parser.add_argument("--time", choices=_ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.time:
        print(json.dumps(_time(args.time, args)))
        return
    path = args.record or recording.FOLDER / f"shortcuts_{args.dataset}.json"
    asked = {"dataset": args.dataset, "ipc": args.ipc, "steps": args.steps}
    record = json.loads(path.read_text()) if path.is_file() else {**asked, "rows": {}}
    if asked != {key: record[key] for key in asked}:
        parser.error(f"{path} is of another data set, ipc or number of steps; give --record")

    def write():
        record.update(platform=platform.platform(), cores=os.cpu_count())
        record["versions"] = versions()
        recording.write(path, record)

    if not args.table:
        for seed, row in itertools.product(args.seeds, _ROWS):
            runs = record["rows"].setdefault(row, {"runs": [], "timed": []})["runs"]
            if seed not in [run["seed"] for run in runs]:
                runs.append(_judged(row, seed, args))
                write()
        for number, row in itertools.product(range(args.rounds), _ROWS):  # alternated
            timed = record["rows"][row]["timed"]
            if len(timed) <= number:
                timed.append(_timed_alone(row, args))
                write()
    print(table(record))


if __name__ == "__main__":
    main()
