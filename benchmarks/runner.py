"""What the loop itself costs, and how long a start takes.

    python benchmarks/runner.py

Overhead: `runner.run` (metrics to a file, progress, checks) against the same compiled chunk called
in a bare loop, alternated, for NCFM on the digits, and for a method that does nothing, since the
noise of the machine hides what the runner adds to a chunk of work. Start: the README's digits demo
from the command to the end of its first chunk, with an empty and with a filled compilation cache,
the extractors there. Writes `benchmarks/records/runner.json`; `--table` prints that record.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import recording
from jaxtyping import PyTree

from jaxdistill import config as configs
from jaxdistill import experiment, runner
from jaxdistill.io.versions import versions
from jaxdistill.io.writers import JsonlWriter
from jaxdistill.method import Method
from jaxdistill.parallel.mesh import make_mesh, put

_RECORD = recording.FOLDER / "runner.json"
_CONFIG = "ncfm:dataset=digits,ipc=1"


def _digits(folder: str) -> tuple[Method, dict]:
    config = configs.load(_CONFIG)
    ready = experiment.set_up(config, folder)
    recipe, examples = ready.recipes["ncfm"], ready.loaded.task.examples
    return recipe.method, {"data": examples.load(), "frozen": recipe.frozen.load()}


def _nothing() -> Method:
    """Two metrics and no work: what its chunk takes in the runner is the runner's own."""

    def step(state, frozen, batch, key):
        del frozen, batch, key
        return state + 1, {"loss": state, "other": -state}

    return Method(lambda *_: jnp.float32(0), step, lambda state: state)


def overhead(method: Method, rounds: int, chunks: int, **given: PyTree) -> dict:
    """Seconds that a chunk takes in a bare loop and in the runner, once for each round."""
    times = {"bare": [], "runner": []}
    key, mesh = jax.random.key(0), make_mesh(jax.devices()[:1])
    size = configs.load(_CONFIG).run.chunk
    options = {"data": (), "frozen": (), "key": key, "chunk": size, "mesh": mesh} | given
    program = runner.programs(method, backend="jit", **options)
    placed = put((key, options["frozen"], options["data"]), mesh)
    with tempfile.TemporaryDirectory() as folder:
        for r in range(rounds):
            state = program.init(*placed)
            jax.block_until_ready(program.chunk(state, np.int32(0), *placed[1:])[0])
            state = jax.block_until_ready(program.init(*placed))
            start = time.perf_counter()
            for _ in range(chunks):
                state, _ = jax.block_until_ready(program.chunk(state, np.int32(size), *placed[1:]))
            times["bare"].append((time.perf_counter() - start) / chunks)

            begun = []
            with contextlib.closing(JsonlWriter(Path(folder) / f"{r}.jsonl")) as writer:
                runner.run(
                    method,
                    steps=size * (chunks + 1),
                    writers=[writer],
                    progress="ncfm",
                    on_chunk=lambda done, state, begun=begun: begun.append(
                        _after_first(begun, state)
                    ),
                    **options,
                )
            times["runner"].append((time.perf_counter() - begun[0]) / chunks)
    return times


def _after_first(begun: list[float], state: object) -> float:
    """The time, for the first chunk that of its end, which has the compilation in it."""
    if not begun:
        jax.block_until_ready(state)
    return time.perf_counter()


def start(cache: str) -> float:
    """Seconds from the command to the end of the first chunk of the digits demo."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "jaxdistill.main",
            f"--config={_CONFIG}",
            f"--workdir={workdir}",
            "--config.method.steps=10",
            f"--config.pool.dir={cache}/pool",
        ]
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{cache}/compiled"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        metrics = workdir / "metrics.jsonl"
        while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.05)
        seconds = time.perf_counter() - began
        process.kill()
        process.wait()
        if not metrics.is_file():
            raise RuntimeError("the demo ended without a step")
        return seconds


def table(record: dict) -> str:
    """Markdown: medians and ranges, and the overhead of the runner in two ways."""
    lines = ["| | milliseconds |", "|---|---|"]
    seconds = record["seconds"]
    for name, values in seconds.items():
        low, middle, high = (
            1000 * x for x in (min(values), statistics.median(values), max(values))
        )
        lines.append(f"| {name} | {middle:.4g} ({low:.4g} to {high:.4g}) |")
    pairs = zip(seconds["digits, runner"], seconds["digits, bare"], strict=True)
    ratios = [runner / bare for runner, bare in pairs]
    added = statistics.median(seconds["nothing, runner"]) - statistics.median(
        seconds["nothing, bare"]
    )
    share = added / statistics.median(seconds["digits, bare"])
    return "\n".join(lines) + (
        f"\n\nRunner over bare chunk, median of {len(ratios)} rounds: "
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}). "
        f"Added to a chunk of nothing: {1000 * added:.2f} ms, {100 * share:.2f} % of the digits'."
    )


def main() -> None:
    """Measures, writes the record and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--chunks", type=int, default=30)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        with tempfile.TemporaryDirectory() as folder:
            method, given = _digits(folder)
            digits = overhead(method, args.rounds, args.chunks, **given)
        nothing = overhead(_nothing(), args.rounds, 10 * args.chunks)
        with tempfile.TemporaryDirectory() as cache:
            start(cache)  # trains the extractors
            subprocess.run(["rm", "-r", f"{cache}/compiled"], check=True)
            cold = [start(cache)]
            warm = [start(cache) for _ in range(3)]
        record = {
            "config": _CONFIG,
            "seconds": {
                "digits, bare": digits["bare"],
                "digits, runner": digits["runner"],
                "nothing, bare": nothing["bare"],
                "nothing, runner": nothing["runner"],
                "start, nothing compiled before": cold,
                "start, compiled before": warm,
            },
            "versions": versions(),
            "platform": platform.platform(),
            "cores": os.cpu_count(),
        }
        recording.write(_RECORD, record)
    print(table(json.loads(_RECORD.read_text())))


if __name__ == "__main__":
    main()
