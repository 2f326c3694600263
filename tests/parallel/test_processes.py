"""Several processes with collectives between them, on one machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxdistill import runner
from jaxdistill.errors import InputError
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.parallel.processes import join
from tests.conftest import flags_for
from tests.test_backends import differences, min_max, toy_data

_SCRIPT = Path(__file__).parent / "process.py"
_ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
_ONE_DEVICE = _ENVIRONMENT | {"XLA_FLAGS": flags_for(1)}
_FOUR_DEVICES = _ENVIRONMENT | {"XLA_FLAGS": flags_for(4)}


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def train_together(processes, workdir, steps):
    """Runs the script in several processes; all must end well."""
    address = free_address()
    started = [
        subprocess.Popen(
            [sys.executable, _SCRIPT, address, str(processes), str(i), workdir, str(steps)],
            env=_FOUR_DEVICES,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    for process, error in zip(started, errors, strict=True):
        assert process.returncode == 0, error


def train_alone(workdir, steps, by_class=1, devices=1):
    data, frozen = toy_data()
    return runner.run(
        min_max(),
        data=data,
        frozen=frozen,
        key=jax.random.key(7),
        steps=steps,
        chunk=2,
        mesh=make_mesh(jax.devices()[:devices], by_class),
        workdir=workdir,
        checkpoint_every=2,
    )


@pytest.mark.slow
def test_two_processes_train_save_and_one_goes_on(tmp_path):
    train_together(2, tmp_path / "together", 2)
    train_together(2, tmp_path / "together", 4)  # the two go on with what they saved
    resumed = train_alone(tmp_path / "together", 6)
    undisturbed = train_alone(tmp_path / "alone", 6)
    assert not differences(resumed, undisturbed, 1e-4)
    ours, theirs = (
        (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        for name in ("together", "alone")
    )
    assert len(ours) == len(theirs) == 3  # one process wrote


def command_in_two_processes(command):
    """What each of them prints."""
    address = free_address()
    started = [
        subprocess.Popen(
            [*command, f"--distributed={address},2,{i}"],
            env=_ONE_DEVICE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=400) for process in started]
    for process, (_, error) in zip(started, outputs, strict=True):
        assert process.returncode == 0, error
    return [out for out, _ in outputs]


@pytest.mark.slow
def test_the_command_line_runs_in_two_processes(tmp_path):
    command = [sys.executable, "-m", "jaxdistill.main", "--config=ncfm:baselines=random,smoke"]
    command += ["--config.evals.accuracy.depth=1", f"--workdir={tmp_path / 'run'}"]
    command += ["--config.pool.size=2", "--config.pool.epochs=1", "--config.extractor.depth=1"]
    outputs = command_in_two_processes(command)
    tables = [out.count("by class, in %") for out in outputs]
    assert tables == [1, 0]  # the first process prints
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not {name for name in names if name.startswith("results-")}
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())) == 4
    alone = subprocess.run(command, env=_ONE_DEVICE, capture_output=True, text=True, timeout=300)
    assert alone.returncode == 0, alone.stderr
    # One process finds everything done. What connects the two prints as well.
    assert outputs[0].endswith(alone.stdout)


@pytest.mark.slow
def test_flows_run_in_two_processes(tmp_path):
    command = [
        sys.executable,
        "-m",
        "jaxdistill.main",
        "--config=flow:dataset=digits,baselines=,smoke",
    ]
    command += [f"--workdir={tmp_path / 'run'}"]
    first, second = command_in_two_processes(command)
    assert first.count("| arcflow, 2 ") == 1 and "arcflow" not in second  # the first prints
    folder = tmp_path / "run"
    assert (folder / "artifacts" / "samples.png").is_file()
    student = (folder / "artifacts" / "student.safetensors").read_bytes()
    alone = subprocess.run(command, env=_ONE_DEVICE, capture_output=True, text=True, timeout=300)
    assert alone.returncode == 0, alone.stderr
    assert first.endswith(alone.stdout)  # which finds everything done
    assert (folder / "artifacts" / "student.safetensors").read_bytes() == student


@pytest.mark.parametrize("spec", ["10.0.0.1", "a:1,2", "a:1,2,2", "a:1,two,0", "a,2,0"])
def test_other_descriptions_of_the_processes_are_refused(spec):
    with pytest.raises(InputError, match=r"HOST:PORT,PROCESSES,INDEX|counted from 0"):
        join(spec)
