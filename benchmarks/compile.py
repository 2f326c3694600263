"""Compiles runs for TPU slices, with no TPU and no data, and tables what a device would need.

    python benchmarks/compile.py [--only=cifar100:v5e:4x4] [--table]

Needs the TPU compiler, `pip install 'jaxdistill[tpu]'`. A row takes minutes, so each is a process
of its own and is added to `benchmarks/records/compile.json` when it is done; `--only` makes the
rows of a data set and a slice, and `--table` prints the record without compiling.
"""

import argparse
import fcntl
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import recording

_RECORD = recording.FOLDER / "compile.json"
_SLICES = ("v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16")
# A config, with overrides behind it as on the command line, and a slice.
ROWS = [
    ("ncfm:dataset=cifar10,ipc=10", "v5e:1x1"),
    ("ncfm:dataset=cifar10,ipc=10 --config.method.real_dtype=float32", "v5e:1x1"),
    *(("ncfm:dataset=cifar100,ipc=50", name) for name in _SLICES),
    ("ncfm:dataset=tiny_imagenet,ipc=10", "v5e:1x1"),
    ("ncfm:dataset=imagenette,ipc=10", "v5e:1x1"),
    ("gradient:dataset=cifar10,ipc=50,baselines=", "v5e:2x4"),
    (
        "trajectory:dataset=cifar10,ipc=50,baselines= --config.method.batch_experts=8",
        "v5e:2x4",
    ),
    ("kernel:dataset=cifar10,ipc=50,baselines=", "v5e:2x4"),
    ("flow:dataset=latents_1mp", "v5e:8x8"),
    # One step is all of it: 300 images of each of 1,000 classes, 5 crops of each.
    ("rded:dataset=imagenet,ipc=10", "v5e:2x4"),
    ("rded:dataset=imagenet,ipc=10", "v5e:4x4"),
    # The whole network of 675 million parameters, tuned from a teacher of its own size.
    (
        "ucgm:dataset=latents_imagenet,baselines= --config.data.placement=streamed "
        "--config.method.rank=0 --config.run.chunk=1",
        "v5e:4x4",
    ),
    # Student and critic are adapters on one teacher; a step is five of the critic and one of the
    # student. The second is as large as Qwen-Image, 20 billion parameters.
    ("dmd2:dataset=latents_1mp,baselines= --config.method.adversarial=0.1", "v5e:8x8"),
    (
        "dmd2:dataset=latents_1mp,baselines= --config.method.adversarial=0.1 "
        "--config.model.depth=120",
        "v5e:8x8",
    ),
    (
        "dmd2:dataset=latents_1mp,baselines= --config.method.adversarial=0.1 "
        "--config.model.depth=120",
        "v5p:4x4x4",
    ),
    # All three stages of 8 billion parameters that 78 teach, 64 questions a step.
    ("genrecal:dataset=pairs_448,baselines=", "v5p:2x2x4"),
    ("genrecal:dataset=pairs_448,baselines=", "v5p:2x2x2"),
]


def _compile(config: str, topology: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jaxdistill.main", *f"--config={config}".split()]
        command += ["--mode=compile", f"--topology={topology}", f"--workdir={folder}"]
        subprocess.run(command, check=True)
        record = json.loads((Path(folder) / "compile.json").read_text())
    return record | {"config": config, "libtpu": importlib.metadata.version("libtpu")}


def _add(row: dict) -> None:
    """Puts a row into the record, which other processes may be writing too."""
    with open(_RECORD.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = recording.read(_RECORD)
        kept = [r for r in rows if (r["config"], r["topology"]) != (row["config"], row["topology"])]
        order = {key: i for i, key in enumerate(ROWS)}
        kept = sorted([*kept, row], key=lambda r: order[r["config"], r["topology"]])
        recording.write(_RECORD, kept)
    _RECORD.with_suffix(".lock").unlink(missing_ok=True)


def table(rows: list[dict]) -> str:
    """Markdown: what one device needs, and the work of all relative to that of one."""
    lines = [
        "| config | slice | class x data | memory GB | arguments + temporaries | TFLOP a step "
        "| all devices, relative | HBM traffic GB | collectives: count, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    one = {r["config"]: r["cost"]["flops"] for r in rows if r["devices"] == 1}
    for r in rows:
        start = f"| `{r['config']}` | {r['topology']} | {' x '.join(map(str, r['mesh'].values()))} "
        if not r["peak"]:  # the compiler has refused it
            lines.append(start + f"| does not fit: {r['refusal']} | | | | | |")
            continue
        cost = r["cost"]
        total = cost["flops"] * r["devices"] / one[r["config"]] if r["config"] in one else None
        kinds = cost["collectives"].items()
        found = "; ".join(f"{kind} {c['count']}, {c['bytes'] / 1e6:.1f}" for kind, c in kinds)
        beside = f" and {cost['custom_kernels']} custom kernels" if cost["custom_kernels"] else ""
        small = "" if r["fits"] else ", does not fit"
        lines.append(
            start + f"| {r['peak'] / 1e9:.2f}{small} | {r['arguments'] / 1e9:.2f} + "
            f"{r['temporaries'] / 1e9:.2f} | {cost['flops'] / 1e12:.3f}{beside} "
            f"| {'' if total is None else f'{total:.2f}'} | {cost['bytes'] / 1e9:.1f} "
            f"| {found or 'none'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compiles the rows that are asked for, and prints the table of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a data set's name, then a slice")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    dataset, _, topology = args.only.partition(":")
    if not args.table:
        for config, name in ROWS:
            if dataset in config and topology in ("", name):
                _add(_compile(config, name))
    print(table(json.loads(_RECORD.read_text())))


if __name__ == "__main__":
    main()
