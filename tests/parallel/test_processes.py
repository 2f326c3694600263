"""Several processes with collectives between them, on one machine."""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxdistill import runner
from jaxdistill.parallel.mesh import make_mesh
from tests.test_backends import differences, min_max, toy_data

_SCRIPT = Path(__file__).parent / "process.py"


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
