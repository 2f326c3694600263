"""Stopped by a function, by SIGTERM or by SIGKILL: what was done is kept, and gone on with."""

import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import interrupt, main, pool
from jaxdistill.data.dataset import from_arrays
from jaxdistill.errors import Interrupted
from jaxdistill.eval import train_on
from tests.survival import kill
from tests.test_backends import min_max, toy_data
from tests.test_runner import assert_same_bits, checkpoints, records, run, walk

RUN = kill.RUNS["condense"]


def after(times):
    """A `should_stop` that says yes when it is asked for the last of some times, and later."""
    asked = []

    def should_stop():
        asked.append(None)
        return len(asked) >= times

    return should_stop


# --- by a function --------------------------------------------------------------------------


def test_a_stopped_run_saves_and_goes_on_to_the_same_bits(tmp_path):
    data, frozen = toy_data()
    options = {"data": data, "frozen": frozen, "chunk": 3, "checkpoint_every": 8}
    straight = run(min_max(), 17, workdir=tmp_path / "straight", **options)
    options["workdir"] = tmp_path / "cut"
    for launches, step in ((2, 6), (1, 8), (3, 15)):
        with pytest.raises(Interrupted, match=f"after step {step} of 17, which is saved"):
            run(min_max(), 17, should_stop=after(launches), **options)
        assert checkpoints(tmp_path / "cut")[-1] == step
    assert_same_bits(run(min_max(), 17, should_stop=after(9), **options), straight)
    assert records(tmp_path / "cut") == records(tmp_path / "straight")


def test_without_a_workdir_nothing_is_kept_and_said_so():
    with pytest.raises(Interrupted, match="after step 4 of 9, and nothing is kept"):
        run(walk(), 9, chunk=2, should_stop=after(2))


def test_a_run_that_is_done_is_not_stopped(tmp_path):
    asked = after(10)
    run(walk(), 6, chunk=2, workdir=tmp_path, should_stop=asked)
    run(walk(), 6, chunk=2, workdir=tmp_path, should_stop=after(1))
    assert checkpoints(tmp_path) == [6]


def test_a_bad_state_is_not_saved_on_the_way_out(tmp_path):
    spoilt = walk(lambda n, x: jnp.where(n == 3, jnp.nan, x))
    with pytest.raises(ValueError, match="step 4: the state is nan; there is no checkpoint yet"):
        run(spoilt, 20, workdir=tmp_path, chunk=2, should_stop=after(2))
    assert checkpoints(tmp_path) == []


def test_waiting_ends_with_the_work_or_with_a_stop():
    done = jnp.zeros(3)
    interrupt.wait({"x": done}, interrupt.never, "stopped")
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 1_000, lambda _, x: jnp.sin(x) @ x / 300, x))
    slow = slow.lower(jnp.eye(300)).compile()
    began = time.monotonic()
    product = slow(jnp.eye(300))
    with pytest.raises(Interrupted, match="stopped"):
        interrupt.wait(product, lambda: time.monotonic() - began > 0.1, "stopped")
    assert not product.is_ready()
    assert time.monotonic() - began < 1.0


def test_extractors_already_trained_stay(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (24, 4, 4, 1), np.uint8)
    labels = np.arange(24, dtype=np.int32) % 2
    data = from_arrays(images, labels, images, labels, name="noise")
    network = train_on.Network(
        lambda key: {"w": jax.random.normal(key, (16, 2))},
        lambda params, x: x.reshape(x.shape[0], -1) @ params["w"],
    )

    def load(should_stop):
        protocol = train_on.Protocol(epochs=2, strategy="none")
        normalize = lambda x: x.astype(jnp.float32) / 255  # noqa: E731
        options = {"normalize": normalize, "protocol": protocol, "identity": "a"}
        options["microbatch"] = 8
        return pool.load_or_train(tmp_path, 11, network, data, should_stop=should_stop, **options)

    def a_second_round_is_due():  # each of the eight devices has trained one
        return (tmp_path / "a-7.npz").exists()

    with pytest.raises(Interrupted, match="training extractors; 8 of 11 are kept"):
        load(a_second_round_is_due)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"a-{i}.npz" for i in range(8)]
    assert load(interrupt.never)["trained"]["w"].shape == (11, 16, 2)


# --- from outside --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outcome of the condensing run of `kill.py` left alone, and where its programs are."""
    scratch = tmp_path_factory.mktemp("undisturbed")
    return kill.undisturbed(scratch, RUN), scratch


def terminate(workdir, scratch, phase):
    """Starts the run, sends SIGTERM in a phase; the exit code, the seconds, and the last line."""
    folder = kill.Folder(workdir, RUN.artefact)
    process = kill.start(workdir, scratch, RUN)
    # The first extractor is begun once there is a folder for it.
    while not (workdir / "pool").is_dir() or folder.phase() != phase:
        assert process.poll() is None, "it ended before"
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)  # as `timeout` does; the second changes nothing
    code = process.wait(120)
    return code, time.monotonic() - began, (scratch / "output.txt").read_text().splitlines()[-1]


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(undisturbed):
    wanted, scratch = undisturbed
    workdir = scratch / "stopped"
    for phase, told in (
        ("start or before any method", "stopped while training extractors; 0 of 2 are kept"),
        ("training", "of 800, which is saved; the same command goes on"),
        ("evaluation", "networks are measured; the same command goes on"),
    ):
        code, seconds, line = terminate(workdir, scratch, phase)
        assert code == main.EXIT_INTERRUPTED == 75
        assert told in line
        assert seconds < 90  # a few when nothing else runs; tracing a program cannot be cut
    kill.finish(workdir, scratch, RUN)
    assert kill.outcome(workdir) == wanted


@pytest.mark.slow
def test_a_killed_run_ends_in_the_bits_of_an_undisturbed_one(undisturbed):
    """A few kills; `kill.py` does as many as one likes."""
    wanted, scratch = undisturbed
    run = RUN._replace(targets=("training", "save", "evaluation"))
    record = kill.campaign(wanted, kills=3, seed=1, scratch=scratch, run=run)
    assert record["kills"] == 3
    assert record["bitwise_equal"] == 1
    assert len(record["compared"]) > 5


def test_sigterm_before_there_is_a_run_ends_it_at_once(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from jaxdistill import main\n"
        "from jaxdistill.errors import Interrupted\n"
        "def run(argv, should_stop):\n"
        "    assert not should_stop()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    if should_stop():\n"
        "        raise Interrupted('stopped after step 3 of 9, which is saved')\n"
        "main.run = run\n"
        "main.cli()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == main.EXIT_INTERRUPTED
    assert done.stderr.splitlines() == [
        "jaxdistill: SIGTERM, stopping",
        "jaxdistill: stopped after step 3 of 9, which is saved; the same command goes on",
    ]
    assert os.EX_TEMPFAIL == main.EXIT_INTERRUPTED
