"""Makes the digits tables: the README's first command, then other networks on what it made.

    python benchmarks/digits.py --workdir=runs/digits

Interrupted, the same command goes on. Writes `benchmarks/records/digits.json`; `--table` prints it.
"""

import argparse
import json
from pathlib import Path

import recording

import jaxdistill
from jaxdistill.eval import results

_RECORD = recording.FOLDER / "digits.json"
_CONFIG = "ncfm:dataset=digits,ipc=1"
_OTHERS = {"evals.accuracy.networks": "('convnet', 'resnet18', 'vgg11')"}


def _run(workdir: Path, overrides: dict[str, str]) -> dict:
    found = jaxdistill.train(jaxdistill.load_config(_CONFIG, overrides), workdir)
    card = json.loads((workdir / "artifacts" / "distilled.json").read_text())
    return {
        "command": " ".join(
            [
                f"jaxdistill --config={_CONFIG} --workdir=runs/digits",
                *(f'--config.{path}="{text}"' for path, text in overrides.items()),
            ]
        ),
        "cost": card["cost"],
        "results": recording.accuracies(found),
        "versions": json.loads((workdir / "versions.json").read_text()),
    }


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/digits"))
    parser.add_argument("--epochs", type=int, default=200, help="of the other networks")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        record = {
            "first command": _run(args.workdir, {}),
            "networks": _run(args.workdir, _OTHERS | {"evals.accuracy.epochs": str(args.epochs)}),
        }
        recording.write(_RECORD, record)
    for name, run in json.loads(_RECORD.read_text()).items():
        rows = [
            {
                "row": r["method"],
                "metric": f"{r['network']}, {r['labels']} labels",
                "value": r["accuracy"],
            }
            for r in run["results"]
        ]
        print(f"\n{name}: {run['command']}\n{results.table(rows, results.percent)}")


if __name__ == "__main__":
    main()
