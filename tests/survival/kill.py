"""Kills runs again and again, at random moments, and compares what comes out bit by bit.

    python tests/survival/kill.py --kills=100 --record=benchmarks/records/kills.json

A small run of each family, started by the command line, is killed with SIGKILL and started again by
the same command, until it ends. An undisturbed run of the same settings tells what must come out:
every array of every artefact, teacher and student, every line of the metrics but for the time, and
every measurement. When a run ends before there were enough kills, another begins in a new workdir.

Each start is aimed at a phase, so that the short ones (a save, an artefact) are hit too. What is
counted is the phase that was hit, as the files show it at the kill.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdistill.io import artifact
from jaxdistill.io.files import write_files
from jaxdistill.io.versions import versions

EXTRACTORS = 2


class Run(NamedTuple):
    """A run to be killed.

    Attributes:
        flags: Of the command line.
        artefact: What stands at the end of what is trained.
        targets: What a round of kills is aimed at, in the order in which a run comes by. Restoring
            and compiling take longest, so `anything` mostly hits those.
    """

    flags: tuple[str, ...]
    artefact: str
    targets: tuple[str, ...]


RUNS = {
    "condense": Run(
        (
            "--config=ncfm:dataset=digits,ipc=1,baselines=random,smoke",
            "--config.method.steps=800",
            "--config.run.chunk=5",
            "--config.run.checkpoint_every=20",
            f"--config.pool.size={EXTRACTORS}",
            "--config.method.sampler=learned",
            "--config.method.warmup=1",
            "--config.evals.accuracy.epochs=300",
            "--config.evals.accuracy.seeds=8",
        ),
        "artifacts/distilled.npz",
        ("extractors", *("training", "save") * 6, "anything", "artefact", *("evaluation",) * 4),
    ),
    "flow": Run(
        (
            "--config=flow:dataset=digits,baselines=linear,smoke",
            "--config.teacher.steps=200",
            "--config.method.steps=200",
            "--config.run.chunk=4",
            "--config.run.checkpoint_every=20",
            "--config.evals.samples.judge_epochs=60",
            "--config.evals.samples.teacher_rows=('euler:2','euler:4')",
        ),
        "artifacts/student.safetensors",
        (
            "anything",
            *("teacher", "save") * 2,
            *("training", "save") * 3,
            "artefact",
            *("judge",) * 2,
            *("evaluation",) * 3,
        ),
    ),
}
PATIENCE = 300.0  # seconds for one start


class Folder:
    """What the files of a workdir tell about the process at work in it since this was made."""

    def __init__(self, workdir: Path, artefact: str):
        self.workdir, self.artefact = workdir, artefact
        self.left = self._files()
        self.fewest_metrics: int | None = None

    def _files(self) -> dict[Path, tuple[int, int]]:
        """Every file and folder, by a number that is new when it was replaced, and its size."""
        found = {}
        for folder, folders, files in os.walk(self.workdir):  # passes over what vanishes
            for path in (Path(folder, name) for name in (*folders, *files)):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    found[path.relative_to(self.workdir)] = status.st_ino, status.st_size
        return found

    def phase(self) -> str:
        """Which part of the run is under way."""
        files = self._files()
        new = {str(path): mark[1] for path, mark in files.items() if self.left.get(path) != mark}
        if any("checkpoints/" in name and "tmp" in name for name in new):
            return "save"
        if Path(self.artefact) in files:
            judge = [path for path in files if path.parts[0] == "judge"]
            if judge and not any(path.suffix == ".npz" for path in judge):
                return "judge"
            return "evaluation" if "results.json" in new else "start of an evaluation"
        if any(name.startswith("artifacts/") for name in new):
            return "artefact"
        if "metrics.jsonl" in new:
            # It is opened, and freed of records after the checkpoint, before anything is run.
            size = new["metrics.jsonl"]
            least = size if self.fewest_metrics is None else self.fewest_metrics
            self.fewest_metrics = min(size, least)
            return "training" if size > self.fewest_metrics else "start of a training"
        if "teacher/metrics.jsonl" in new and Path("teacher/teacher.safetensors") not in files:
            return "teacher"
        trained = sum(path.parts[0] == "pool" and path.suffix == ".npz" for path in files)
        ready = trained == EXTRACTORS or Path("teacher/teacher.safetensors") in files
        return "start of a training" if ready else "start or before any method"


def environment(scratch: Path) -> dict[str, str]:
    """Programs are compiled once and for all, or most of the time would go there."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(workdir: Path, scratch: Path, run: Run) -> subprocess.Popen:
    """Starts the run in a workdir, or goes on with it."""
    command = [sys.executable, "-m", "jaxdistill.main", *run.flags, f"--workdir={workdir}"]
    with open(scratch / "output.txt", "ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment(scratch))


def aim(target: str, numbers: random.Random) -> tuple[tuple[str, ...], float]:
    """The phases that a start aimed at one must reach, and seconds from there to the kill."""
    return {
        "extractors": ((), numbers.uniform(0, 15)),
        "teacher": (("teacher", "save"), numbers.uniform(0, 1.0)),
        "training": (("training", "save"), numbers.uniform(0, 1.5)),
        "save": (("save",), numbers.uniform(0, 0.1)),
        "anything": ((), numbers.uniform(0, 10)),
        "artefact": (("artefact",), numbers.uniform(0, 0.05)),
        "judge": (("judge",), numbers.uniform(0, 1.5)),
        "evaluation": (("evaluation",), numbers.uniform(0, 1)),
    }[target]


def kill_once(
    target: str, workdir: Path, scratch: Path, run: Run, numbers: random.Random
) -> str | None:
    """One start that is killed; the phase that was hit, or None if the run ended before."""
    folder = Folder(workdir, run.artefact)
    phases, delay = aim(target, numbers)
    process, began = start(workdir, scratch, run), time.monotonic()
    moment = None
    while process.poll() is None:
        now, phase = time.monotonic(), folder.phase()
        if now - began > PATIENCE:
            process.kill()
            raise RuntimeError(f"no end of a start aimed at {target} after {PATIENCE:.0f} s")
        if moment is None and (not phases or phase in phases):
            moment = now + delay
        if moment is not None and now >= moment:
            process.kill()
            process.wait()
            return folder.phase()
        time.sleep(0.002)
    if process.returncode:
        raise RuntimeError(f"a start failed, see {scratch / 'output.txt'}")
    return None


def finish(workdir: Path, scratch: Path, run: Run) -> None:
    """Runs to the end."""
    if start(workdir, scratch, run).wait(PATIENCE):
        raise RuntimeError(f"a start failed, see {scratch / 'output.txt'}")


def outcome(workdir: Path) -> dict:
    """All that must not depend on kills, with arrays as bytes."""
    found = {}
    for path in sorted(workdir.glob("**/distilled.npz")):
        distilled = artifact.load(path)  # checks the card against the arrays
        with np.load(path) as arrays:
            for name in arrays.files:
                found[f"{path.relative_to(workdir)}:{name}"] = arrays[name].tobytes()
        found[f"{path.relative_to(workdir)}:card"] = [
            record["value"] for record in distilled.card["accuracies"]
        ]
    for path in sorted(workdir.glob("**/*.safetensors")):
        found[str(path.relative_to(workdir))] = path.read_bytes()
    for path in sorted(workdir.glob("**/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(workdir))] = [
            {name: value for name, value in line.items() if name != "time"} for line in lines
        ]
    records = json.loads((workdir / "results.json").read_text())
    found["results.json"] = [
        [record[key] for key in ("row", "metric", "seed", "value")]
        for record in records
        if record["metric"] not in ("wall s", "CPU s")
    ]
    return found


def litter(workdir: Path) -> list[str]:
    """Unfinished files and checkpoints."""
    return [str(path.relative_to(workdir)) for path in workdir.glob("**/*tmp*")]


def undisturbed(scratch: Path, run: Run) -> dict:
    """The outcome of a run that is left alone."""
    finish(scratch / "undisturbed", scratch, run)
    return outcome(scratch / "undisturbed")


def campaign(wanted: dict, kills: int, seed: int, scratch: Path, run: Run) -> dict:
    """Rounds of kills until there were enough; raises on the first bit that is not as wanted."""
    numbers = random.Random(seed)
    began = time.monotonic()
    hit, rounds = collections.Counter(), 0
    while hit.total() < kills:
        workdir = scratch / f"killed-{rounds}"
        before = hit.total()
        for target in run.targets[: kills - before]:
            phase = kill_once(target, workdir, scratch, run, numbers)
            if phase is None:
                break
            hit[phase] += 1
            print(f"kill {hit.total()}: aimed at {target}, hit {phase}", flush=True)
        finish(workdir, scratch, run)
        found = outcome(workdir)
        differ = [key for key in {*wanted, *found} if wanted.get(key) != found.get(key)]
        if differ:
            raise RuntimeError(f"{workdir} differs from the undisturbed run: {sorted(differ)}")
        if left := litter(workdir):
            raise RuntimeError(f"{workdir} has leftovers: {left}")
        if hit.total() == before:
            raise RuntimeError("a whole round without a kill")
        rounds += 1
        print(f"round {rounds}: every bit is that of the undisturbed run", flush=True)
    return {
        "run": "jaxdistill " + " ".join(run.flags),
        "kills": hit.total(),
        "kills_by_phase": dict(sorted(hit.items())),
        "runs_ended": rounds,
        "bitwise_equal": rounds,
        "compared": sorted(wanted),
        "wall_seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """Parses the arguments, runs, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="of all families together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--record", type=Path, help="file for the counts")
    options = parser.parse_args()
    shares = [options.kills * (i + 1) // len(RUNS) for i in range(len(RUNS))]
    kills = [b - a for a, b in itertools.pairwise([0, *shares])]
    record: dict = {
        "command": f"python tests/survival/kill.py --kills={options.kills} --seed={options.seed}",
        "seed": options.seed,
        "versions": versions(),
        "runs": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        for (name, run), count in zip(RUNS.items(), kills, strict=True):
            scratch = ((options.scratch or Path(temporary)) / name).resolve()
            scratch.mkdir(parents=True, exist_ok=True)
            wanted = undisturbed(scratch, run)
            record["runs"][name] = campaign(wanted, count, options.seed, scratch, run)
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if options.record:
        write_files({options.record: lambda file: file.write(text.encode())})


if __name__ == "__main__":
    main()
