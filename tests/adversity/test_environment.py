"""Whatever a shell can have set: the run, or one line."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxdistill import main
from jaxdistill.errors import InputError
from jaxdistill.io import weights
from jaxdistill.parallel import processes
from tests.adversity.conftest import CONDENSE
from tests.conftest import flags_for

COMMAND = [sys.executable, "-m", "jaxdistill.main"]


def started(*flags, **environment):
    """A start of the command line with variables set, or, where they are None, not."""
    variables = {**os.environ, **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    pipe = subprocess.PIPE
    return subprocess.Popen([*COMMAND, *flags], stdout=pipe, stderr=pipe, text=True, env=variables)


@pytest.mark.parametrize("name", ["tpu", "no_such_thing"])
def test_a_platform_that_is_not_there_is_one_line(name, tmp_path):
    done = started(*CONDENSE, f"--workdir={tmp_path / 'run'}", JAX_PLATFORMS=name)
    printed, told = done.communicate()
    assert (done.returncode, printed) == (1, "")
    assert told.startswith("jaxdistill: JAX finds no devices: Unable to initialize backend")
    assert told.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("seconds", [0.15, 0.6, 1.2])
def test_ctrl_c_during_the_imports_is_one_line(seconds, tmp_path):
    process = started(*CONDENSE, f"--workdir={tmp_path / 'run'}")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    printed, told = process.communicate()
    if seconds < 0.3 and process.returncode == -signal.SIGINT:
        return  # Python itself had not begun
    assert (process.returncode, printed) == (main.EXIT_CTRL_C, "")
    assert told == "\njaxdistill: interrupted; the same command goes on\n"


@pytest.mark.slow
def test_a_run_is_the_same_in_64_bits_and_in_any_locale(tmp_path):

    plain = started(*CONDENSE, f"--workdir={tmp_path / 'a'}", XLA_FLAGS=flags_for(1))
    plain.communicate()
    other = started(
        *CONDENSE,
        f"--workdir={tmp_path / 'b'}",
        XLA_FLAGS=flags_for(1),
        JAX_ENABLE_X64="1",
        PYTHONIOENCODING="ascii",
        LC_ALL="C",
        HOME=None,
    )
    printed, told = other.communicate()
    assert (plain.returncode, other.returncode) == (0, 0), told
    assert "herding" in printed
    images = [np.load(tmp_path / x / "artifacts" / "distilled.npz")["images"] for x in "ab"]
    np.testing.assert_array_equal(*images)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("localhost:99999999,2,0", "the port is a number from 1 to 65535"),
        ("localhost:0,2,0", "the port is a number from 1 to 65535"),
        ("localhost:http,2,0", "the port is a number from 1 to 65535"),
        ("localhost:80,2,2", "the index is counted from 0 to 1"),
        ("localhost", "give auto, or HOST:PORT"),
    ],
)
def test_processes_that_cannot_be_joined_are_one_line(spec, said):
    with pytest.raises(InputError, match=said):
        processes.join(spec)


HOSTILE = {
    "a name that begins another": ({"a": np.ones(2), "a/b": np.ones(2)}, "its names are no tree"),
    "not finite": ({"a": np.array([np.inf])}, "a holds values that are not finite"),
}


def _written(folder, arrays):
    arrays = {name: x.astype(np.float32) if x.dtype == float else x for name, x in arrays.items()}
    weights.save(folder, "teacher", {"x": np.zeros(1, np.float32)}, {})
    content = safetensors.numpy.save(arrays)
    (folder / "teacher.safetensors").write_bytes(content)
    card = json.loads((folder / "teacher.json").read_text())
    card["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "teacher.json").write_text(json.dumps(card))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_parameters_are_refused(name, tmp_path):
    arrays, said = HOSTILE[name]
    _written(tmp_path, arrays)
    with pytest.raises(InputError, match=rf"teacher\.safetensors cannot be used \({said}"):
        weights.load(tmp_path, "teacher")


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.uint8])
def test_parameters_are_floating_point(dtype, tmp_path):
    _written(tmp_path, {"a": np.ones(2, dtype)})
    params, _ = weights.load(tmp_path, "teacher")
    with pytest.raises(
        InputError, match=f"has a as {np.dtype(dtype)}, the config's network as float32"
    ):
        weights.check_shapes("it", params, {"a": jax.ShapeDtypeStruct((2,), np.float32)})
