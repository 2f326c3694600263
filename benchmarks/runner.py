"""What the loop itself costs, and how long a start takes.

    python benchmarks/runner.py

Overhead: `runner.run` (metrics to a file, progress, checks) against the same compiled chunk called
in a bare loop, alternated, for NCFM on the digits. Start: the README's digits demo from the
command to the end of its first chunk, with an empty and with a filled compilation cache, the
extractors there. Writes `benchmarks/records/runner.json`; `--table` prints that record.
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
import numpy as np
import recording

from jaxdistill import build, runner, train
from jaxdistill import config as configs
from jaxdistill.data import device
from jaxdistill.io.artifact import versions
from jaxdistill.io.writers import JsonlWriter
from jaxdistill.parallel.mesh import make_mesh, put

_RECORD = recording.FOLDER / "runner.json"
_CONFIG = "ncfm:dataset=digits,ipc=1"


def overhead(rounds: int, chunks: int) -> dict:
    """Seconds a chunk takes in the runner and in a bare loop."""
    config = configs.load(_CONFIG)
    size = config.run.chunk
    with tempfile.TemporaryDirectory() as folder:
        setup = train.set_up(config, folder)
        method = build.build_method(config, "ncfm", setup.dataset, setup.prepare)
        frozen = build.build_frozen(setup, "ncfm")
        data = device.resident(setup.dataset.train, setup.dataset.num_classes)
        key, mesh = jax.random.key(0), make_mesh(jax.devices()[:1])
        options = {"data": data, "frozen": frozen, "key": key, "chunk": size, "mesh": mesh}
        program = runner.programs(method, backend="jit", **options)
        placed = put((key, frozen, data), mesh)
        times = {"bare": [], "runner": []}
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
            "--config.run.steps=10",
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
    """Markdown: medians and ranges."""
    lines = ["| | seconds |", "|---|---|"]
    for name, values in record["seconds"].items():
        spread = f"({min(values):.2f} to {max(values):.2f})"
        lines.append(f"| {name} | {statistics.median(values):.2f} {spread} |")
    pairs = zip(record["seconds"]["chunk, runner"], record["seconds"]["chunk, bare"], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    return "\n".join(lines) + f"\n\nRunner over bare chunk, median of rounds: {ratio:.3f}"


def main() -> None:
    """Measures, writes the record and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=30)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        times = overhead(args.rounds, args.chunks)
        with tempfile.TemporaryDirectory() as cache:
            start(cache)  # trains the extractors
            subprocess.run(["rm", "-r", f"{cache}/compiled"], check=True)
            cold = [start(cache)]
            warm = [start(cache) for _ in range(args.rounds)]
        record = {
            "config": _CONFIG,
            "seconds": {
                "chunk, bare": times["bare"],
                "chunk, runner": times["runner"],
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
