"""Compares one NCFM iteration here with eager PyTorch, alternated, each in a process of its own.

    python benchmarks/ncfm_speed.py --torch-python=path/to/python --rounds=2

`--torch-python` is an interpreter that has torch and NumPy. Both sides run the configuration of
`ncfm_torch.py`: 10 classes, 1024 real images each, 4096 frequencies, width 128, factor 2, ipc 10,
32x32x3, calibration on, float32, two threads. PyTorch is also run with huge pages, which its
allocator gains from. Each round also measures plain matrix products, for the arithmetic floor.
Writes `benchmarks/records/ncfm_speed.json`; `--table` prints that record.
"""

import argparse
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
import recording

_HERE = Path(__file__).parent
_RECORD = recording.FOLDER / "ncfm_speed.json"
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# Of one iteration with direct convolutions and nothing computed twice: 1.04 for the features of the
# real images, 0.17 for their frequencies, 0.18 for the synthetic images and their gradients.
_TERAFLOPS = 1.39


def _measure(python: str, script: str, extra: dict[str, str], iterations: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [python, str(_HERE / script), f"--iterations={iterations}", f"--json={out}"]
        subprocess.run(command, env=os.environ | extra, check=True, stdout=subprocess.DEVNULL)
        record = json.loads(out.read_text())
        record["config"].pop("json", None)  # a place on this machine
        return record


def _product_rate(side: int = 2048, seconds: float = 3.0) -> float:
    """GFLOP/s of square float32 matrix products, one after another."""
    product = jax.jit(jnp.matmul)
    x = jax.random.normal(jax.random.key(0), (side, side))
    product(x, x).block_until_ready()  # compiles
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        product(x, x).block_until_ready()
        done += 1
    return done * 2 * side**3 / (time.perf_counter() - begun) / 1e9


def table(record: dict) -> str:
    """Markdown: medians over rounds and iterations, with the range, and the ratio to ours."""
    lines = [
        "| | wall s | CPU s | peak memory GB | wall, relative | CPU, relative |",
        "|---|---|---|---|---|---|",
    ]
    pooled = {
        name: {
            key: [x for run in runs for x in run[key]["all"]]
            for key in ("wall_seconds", "cpu_seconds")
        }
        for name, runs in record["runs"].items()
    }
    ours = {key: statistics.median(values) for key, values in pooled["jaxdistill"].items()}
    for name, values in pooled.items():
        cells = [name]
        for key in ("wall_seconds", "cpu_seconds"):
            middle = statistics.median(values[key])
            cells.append(f"{middle:.1f} ({min(values[key]):.1f} to {max(values[key]):.1f})")
        memory = statistics.median(run["peak_rss_bytes"] for run in record["runs"][name])
        cells.append(f"{memory / 1e9:.2f}")
        cells += [f"{statistics.median(values[key]) / ours[key]:.2f}" for key in ours]
        lines.append("| " + " | ".join(cells) + " |")
    rate = statistics.median(record["product_gflops"])
    floor = 1000 * _TERAFLOPS / rate
    lines += [
        "",
        f"Matrix products here: {rate:.0f} GFLOP/s. At that rate the {_TERAFLOPS} TFLOP of an "
        f"iteration take {floor:.1f} s, of which jaxdistill takes "
        f"{ours['wall_seconds'] / floor:.2f} times.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs the rounds, writes the record and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        sides = {
            "jaxdistill": (sys.executable, "ncfm_jax.py", {}),
            "PyTorch": (args.torch_python, "ncfm_torch.py", {}),
            "PyTorch, huge pages": (args.torch_python, "ncfm_torch.py", _HUGE_PAGES),
        }
        runs, rates = {name: [] for name in sides}, []
        for _ in range(args.rounds):
            rates.append(_product_rate())
            for name, (python, script, extra) in sides.items():
                runs[name].append(_measure(python, script, extra, args.iterations))
                print(name, runs[name][-1]["wall_seconds"]["all"], file=sys.stderr)
        record = {"platform": platform.platform(), "cores": os.cpu_count(), "runs": runs}
        record["product_gflops"] = rates
        recording.write(_RECORD, record)
    print(table(json.loads(_RECORD.read_text())))


if __name__ == "__main__":
    main()
