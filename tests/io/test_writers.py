"""Metrics files, TensorBoard events and the progress display."""

import json
import math
import os
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.io.writers import JsonlWriter, Progress, TensorBoardWriter


def _records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path, steps, **options):
    writer = JsonlWriter(path, **options)
    for step in steps:
        writer.write(step, {"loss": step / 10})
    writer.close()


# --- JSON lines -----------------------------------------------------------------------------


def test_values_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    before = time.time()
    values = {
        "float": 0.1,
        "float32": np.float32(0.1),
        "jax": jnp.float32(1e-9),
        "bfloat16": jnp.bfloat16(0.3),
        "array": np.array(2.5),
        "whole": 7,
        "int32": np.int32(-3),
        "bool": True,
    }
    writer.write(5, values)
    (record,) = _records(path)  # before close: each record is flushed
    writer.close()
    assert list(record) == ["step", "time", *values]
    assert record.pop("step") == 5
    assert abs(record["time"] - before) < 5 and record["time"] == round(record.pop("time"), 3)
    assert record == {
        "float": 0.1,
        "float32": 0.1,
        "jax": 1e-9,
        "bfloat16": 0.300781,
        "array": 2.5,
        "whole": 7,
        "int32": -3,
        "bool": 1,
    }


def test_float32_is_exact(tmp_path):
    values = np.random.default_rng(0).normal(size=200).astype(np.float32) ** 9
    writer = JsonlWriter(tmp_path / "m.jsonl")
    for step, value in enumerate(values):
        writer.write(step, {"x": value})
    writer.close()
    read = np.float32([record["x"] for record in _records(tmp_path / "m.jsonl")])
    np.testing.assert_array_equal(read, values)


def test_what_json_lacks_becomes_strings(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(0, {"a": math.nan, "b": np.float32("inf"), "c": jnp.float32(-jnp.inf)})
    writer.close()
    (record,) = _records(tmp_path / "m.jsonl")
    assert (record["a"], record["b"], record["c"]) == ("nan", "inf", "-inf")
    assert math.isnan(float(record["a"])) and float(record["c"]) == -math.inf


@pytest.mark.parametrize("value", ["0.5", None, [1.0], np.zeros(2), 1j, {}])
def test_only_numbers(tmp_path, value):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    with pytest.raises(InputError, match="metric 'loss' is not one number"):
        writer.write(0, {"loss": value})
    with pytest.raises(InputError, match="may not be named step, time"):
        writer.write(0, {"step": 1, "time": 2})
    writer.close()
    assert _records(tmp_path / "m.jsonl") == []


def test_without_resume_it_appends(tmp_path):
    path = tmp_path / "m.jsonl"
    _write(path, [1, 2, 3])
    _write(path, [1, 2])
    assert [r["step"] for r in _records(path)] == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("resume_step", [None, 0, 2, 9])
@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 4, "ti', b'{"step": 4, "x": 1}', b"\x00\x00", b"7"]
)
def test_resume_drops_later_and_torn_records(tmp_path, resume_step, torn):
    path = tmp_path / "m.jsonl"
    _write(path, [1, 2, 3])
    with open(path, "ab") as file:
        file.write(torn)
    _write(path, [10], resume_step=resume_step)
    # A record that lacks only its newline is whole.
    there = [1, 2, 3, 4] if torn.endswith(b"}") else [1, 2, 3]
    kept = [s for s in there if resume_step is None or s <= resume_step]
    assert [r["step"] for r in _records(path)] == [*kept, 10]
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_foreign_lines_stay(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('# a note\n{"step": 5}\n[1]\n')
    _write(path, [], resume_step=1)
    assert path.read_text() == "# a note\n[1]\n"


def test_every_cut_of_a_file_can_be_resumed(tmp_path):
    path = tmp_path / "m.jsonl"
    _write(path, [1, 2, 3])
    content = path.read_bytes()
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        _write(path, [3], resume_step=2)
        steps = [r["step"] for r in _records(path)]
        assert steps[-1] == 3 and steps[:-1] == [1, 2][: len(steps) - 1]


def test_unwritable_path(tmp_path):
    with pytest.raises(InputError, match=r"cannot write metrics to .*: No such file"):
        JsonlWriter(tmp_path / "nowhere" / "m.jsonl")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.jsonl")
    with pytest.raises(InputError, match=r"cannot write metrics to .*: it is not a regular file"):
        JsonlWriter(tmp_path / "m.jsonl", resume_step=1)


# --- TensorBoard ----------------------------------------------------------------------------


def test_tensorboard_events_hold_the_values(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    writer = TensorBoardWriter(tmp_path / "tb")
    for step in range(3):
        writer.write(step, {"loss": np.float32(step + 0.5), "lr": jnp.float32(0.25)})
    with pytest.raises(InputError, match="not one number"):
        writer.write(3, {"loss": "low"})
    writer.close()
    (file,) = (tmp_path / "tb").iterdir()
    content, points, position = file.read_bytes(), [], 0
    while position < len(content):
        # A record: 8 bytes length, 4 of checksum, the event, 4 of checksum.
        size = int.from_bytes(content[position : position + 8], "little")
        event = Event.FromString(content[position + 12 : position + 12 + size])
        points += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        position += 16 + size
    assert points == [p for s in range(3) for p in ((s, "loss", s + 0.5), (s, "lr", 0.25))]
    assert "tensorflow" not in sys.modules


def test_tensorboard_missing(tmp_path):
    (tmp_path / "tensorboardX.py").write_text("raise ImportError('not here')")
    code = (
        "from jaxdistill.errors import InputError\n"
        "from jaxdistill.io.writers import TensorBoardWriter\n"
        "try:\n    TensorBoardWriter('tb')\nexcept InputError as error:\n    print(error)"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip install jaxdistill[tensorboard]" in run.stdout


# --- progress -------------------------------------------------------------------------------

VALUES = {"loss": jnp.float32(0.123456), "psi": 2, "c": 3.0, "d": 4.0, "e": 5.0}


def test_plain_lines_when_not_a_terminal(capsys):
    progress = Progress(100, 20, "ncfm", keys=("psi", "loss", "absent"), every=0.0)
    progress.update(40, VALUES)
    progress.update(100, VALUES)
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    first, last = err.splitlines()
    assert first.startswith("ncfm  40/100  ") and first.endswith("left  psi 2 loss 0.1235")
    assert "steps/s" in first and "100/100" in last and "00:00 left" in last


def test_plain_lines_are_few(capsys):
    progress = Progress(1000, desc="ncfm")
    for step in range(1, 501):
        progress.update(step, VALUES)
    assert capsys.readouterr().err == ""
    progress.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert "500/1000" in line and line.endswith("loss 0.1235 psi 2 c 3 d 4")


def test_nothing_done_nothing_said(capsys):
    Progress(10).close()
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_bar_on_a_terminal(monkeypatch):
    import pty
    import select
    import termios

    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = Progress(100, 20, "ncfm")
        time.sleep(0.15)  # the bar redraws ten times a second at most
        progress.update(70, VALUES)
        progress.close()
        shown = b""
        while select.select([master], [], [], 0.5)[0]:
            shown += os.read(master, 10_000)
        shown = shown.decode()
    os.close(master)
    assert "ncfm:  20%" in shown and "70/100" in shown and "loss 0.1235 psi 2 c 3 d 4" in shown
