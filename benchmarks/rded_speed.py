"""RDED's choice: crops a second against eager PyTorch, what it scales with, and decoding of JPEGs.

    python benchmarks/rded_speed.py --torch-python=path/to/python
    python benchmarks/rded_speed.py --table

`--torch-python` is an interpreter that has torch and NumPy. Each measurement is a process of its
own, the two sides take turns, and all use two threads. The pictures that are decoded are noise with
the spectrum of photographs, 500 x 375, at the quality that gives the 110 kB of an average file of
ImageNet. Writes `benchmarks/records/rded_speed.json`.
"""

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import recording
from PIL import Image

from jaxdistill.eval.results import markdown

_HERE = Path(__file__).parent
_RECORD = recording.FOLDER / "rded_speed.json"
# What is changed from 300 images, 5 crops of each and 10 kept.
_SCALING = (
    {},
    {"mipc": 150},
    {"mipc": 600},
    {"crops": 1},
    {"crops": 10},
    {"ipc": 1},
    {"ipc": 50},
)
_BYTES = 110_000


def _measure(python: str, script: str, rounds: int, changed: dict[str, int]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        more = [f"--{name}={value}" for name, value in changed.items()]
        command = [python, str(_HERE / script), f"--rounds={rounds}", f"--json={out}", *more]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text()) | {"changed": changed}


def _photograph(number: int) -> Image.Image:
    """Noise whose amplitude falls as one over the frequency, in three related channels."""
    numbers = np.random.default_rng(number)
    height, width = 375, 500
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1.0
    layers = [
        np.fft.irfft2(
            np.fft.rfft2(numbers.normal(size=(height, width))) / frequency, (height, width)
        )
        for _ in range(4)
    ]
    image = np.stack([layers[0] + 0.3 * layer for layer in layers[1:]], -1)
    image = 128 + 50 * (image - image.mean()) / image.std()
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


def _encoded(number: int) -> bytes:
    """A picture at the quality that comes nearest to the wanted size."""
    picture, files = _photograph(number), {}
    for quality in range(50, 100, 5):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        files[abs(len(file.getvalue()) - _BYTES)] = file.getvalue()
    return files[min(files)]


def decoding(count: int = 24, rounds: int = 5) -> dict:
    """Pictures a second of one core: decoded, brought to 224 pixels, the centre taken."""
    files = [_encoded(number) for number in range(count)]
    rates = []
    for _ in range(rounds):
        begun = time.process_time()
        for data in files:
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            scale = 224 / min(picture.size)
            size = tuple(round(scale * side) for side in picture.size)
            picture = picture.resize(size, Image.Resampling.BILINEAR)
            left, top = ((side - 224) // 2 for side in picture.size)
            np.asarray(picture.crop((left, top, left + 224, top + 224)))
        rates.append(count / (time.process_time() - begun))
    return {"bytes": [len(data) for data in files], "images_per_cpu_second": rates}


def table(record: dict) -> str:
    """Markdown: crops a second of both sides, the scaling, the decoding."""
    lines = [["", "crops a second of wall time", "crops a CPU second"]]
    rates: dict[str, list[float]] = {}
    for side, runs in record["sides"].items():
        cells = [side]
        for key in ("wall_seconds", "cpu_seconds"):
            values = [run["crops"] / s for run in runs for s in run[key]]
            rates.setdefault(key, []).append(statistics.median(values))
            cells.append(
                f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"
            )
        lines.append(cells)
    ratios = [f"{ours / theirs:.2f}" for ours, theirs in rates.values()]
    lines.append(["ratio of the medians", *ratios])
    scaling = [["changed", "crops", "CPU s", "CPU ms a crop"]]
    for run in record["scaling"]:
        changed = ", ".join(f"{n}={v}" for n, v in run["changed"].items()) or "nothing"
        seconds = statistics.median(run["cpu_seconds"])
        per_crop = f"{1000 * seconds / run['crops']:.2f}"
        scaling.append([changed, str(run["crops"]), f"{seconds:.1f}", per_crop])
    found = record["decoding"]
    rate = statistics.median(found["images_per_cpu_second"])
    low, high = min(found["images_per_cpu_second"]), max(found["images_per_cpu_second"])
    return (
        f"{markdown(lines)}\n\n{markdown(scaling)}\n\nOne core decodes {rate:.0f} pictures of "
        f"{np.mean(found['bytes']) / 1000:.0f} kB a second ({low:.0f} to {high:.0f})."
    )


def main() -> None:
    """Runs the rounds, writes the record and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        sides: dict[str, list[dict]] = {"jaxdistill": [], "PyTorch": []}
        for _ in range(args.rounds):
            sides["jaxdistill"].append(_measure(sys.executable, "rded_jax.py", 2, {}))
            sides["PyTorch"].append(_measure(args.torch_python, "rded_torch.py", 1, {}))
        recording.write(
            _RECORD,
            {
                "platform": platform.platform(),
                "cores": os.cpu_count(),
                "sides": sides,
                "scaling": [_measure(sys.executable, "rded_jax.py", 2, c) for c in _SCALING],
                "decoding": decoding(),
            },
        )
    print(table(json.loads(_RECORD.read_text())))


if __name__ == "__main__":
    main()
