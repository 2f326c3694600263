"""What trackers are told, read back from what they keep: each step once, whatever happens."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from jaxdistill.io import trackers
from jaxdistill.settings import Run

ROOT = Path(__file__).resolve().parents[2]
TRACKERS = [
    pytest.param(name, marks=pytest.mark.skipif(not find_spec(name), reason=f"needs {name}"))
    for name in trackers.TRACKERS
]

WRITE = """
import sys
from jaxdistill.io.trackers import TrackerWriter

def told(steps, **options):
    writer = TrackerWriter(sys.argv[1], "run", name="ncfm", settings={"ipc": 10}, **options)
    for step in steps:
        writer.write(step, {"loss": 1 / step})
    writer.close()

told([2, 4, 6])
told([4, 6, 8])  # as from the checkpoint of step 2
told([4, 6], restarts=1)
"""

# A process that is killed after three launches, with no checkpoint, and one that does all.
RUN = """
import os, sys
from jaxdistill import config, experiment

asked = []

def killed():
    asked.append(1)
    if len(asked) == 3 and sys.argv[2] == "killed":
        os._exit(9)
    return False

overrides = {"run.tracker": sys.argv[1], "run.chunk": "2", "run.checkpoint_every": "0"}
overrides |= {"method.steps": "10", "method.batch_real": "4", "evals.accuracy.epochs": "1"}
loaded = config.load("ncfm:method=dm,smoke,baselines=", overrides)
experiment.train(loaded, "run", killed)
"""


def python(code, folder, *arguments):
    own = {"TRACKIO_DIR": str(folder / "trackio"), "PYTHONPATH": os.pathsep.join(map(str, PATH))}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True)


PATH = [ROOT, *filter(None, sys.path)]


def steps_of_wandb(folder):
    """Id -> the steps that its files of offline runs hold, in the form of LevelDB's logs."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for path in sorted((folder / "run" / "wandb").glob("offline-run-*/*.wandb")):
        content, at, parts = path.read_bytes(), 7, b""
        while at + 7 <= len(content):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, size, kind = struct.unpack("<IHB", content[at : at + 7])
            parts += content[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # a whole record, or the last part of one
                record = wandb_internal_pb2.Record.FromString(parts)
                items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
                if items:
                    found.setdefault(path.stem, []).append(int(items["_step"]))
                parts = b""
    return list(found.values())


def steps_of_trackio(folder):
    """The steps of each run in its database."""
    with sqlite3.connect(folder / "trackio" / "jaxdistill.db") as database:
        rows = database.execute("SELECT run_name, step FROM metrics ORDER BY id").fetchall()
    return [
        [step for name, step in rows if name == own] for own in dict.fromkeys(n for n, _ in rows)
    ]


READ = {"wandb": steps_of_wandb, "trackio": steps_of_trackio}


@pytest.mark.parametrize("tracker", TRACKERS)
def test_no_step_is_told_twice_and_other_rates_are_another_run(tracker, tmp_path):
    (tmp_path / "run").mkdir()
    done = python(WRITE, tmp_path, tracker)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # where tables are printed
    assert sorted(READ[tracker](tmp_path)) == [[2, 4, 6, 8], [4, 6]]


@pytest.mark.slow
@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_killed_run_that_goes_on_tells_each_step_once(tracker, tmp_path):
    assert python(RUN, tmp_path, tracker, "killed").returncode == 9
    told = json.loads((tmp_path / "run" / "tracker.json").read_text())
    assert told["tracker"] == tracker and told["step"] == 4
    done = python(RUN, tmp_path, tracker, "whole")
    assert done.returncode == 0, done.stderr
    (steps,) = READ[tracker](tmp_path)
    # What it had not stored when it was killed is lost to it, and to it alone.
    assert steps[-3:] == [6, 8, 10] and len(steps) == len(set(steps))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8, 10]
    assert json.loads((tmp_path / "run" / "tracker.json").read_text())["id"] == told["id"]


@pytest.mark.parametrize("tracker", trackers.TRACKERS)
def test_a_tracker_that_is_not_installed_is_one_line(tracker, tmp_path):
    (tmp_path / f"{tracker}.py").write_text("raise ImportError('not here')")
    code = (
        "import sys\nfrom jaxdistill.io.trackers import TrackerWriter\n"
        f"sys.path.insert(0, '.')\nTrackerWriter('{tracker}', '.', name='a', settings={{}})"
    )
    last = python(code, tmp_path).stderr.splitlines()[-1]
    wanted = f"run.tracker={tracker} needs {tracker}: pip install jaxdistill[{tracker}]"
    assert last == f"jaxdistill.errors.InputError: {wanted}"
    assert not (tmp_path / "tracker.json").exists()


@pytest.mark.parametrize("tracker", TRACKERS[:1])
def test_what_does_not_say_what_was_told_is_refused(tracker, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tracker.json").write_text('{"id": 3}')
    last = python(WRITE, tmp_path, tracker).stderr.splitlines()[-1]
    assert "does not say what a tracker was told (it lacks id and step); delete it" in last


def test_settings_name_the_trackers_that_there_are():
    from jaxdistill import keywords

    known = keywords.table(Run)["tracker"]
    assert known.kind.__args__ == trackers.TRACKERS and known.optional and known.aside
