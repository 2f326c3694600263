"""No room left: one line that says so, what was there stays, and nothing half done."""

import json
import os
import resource
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import runner
from jaxdistill.errors import InputError
from jaxdistill.eval import results
from jaxdistill.io import artifact, checkpoint
from jaxdistill.io.writers import JsonlWriter
from jaxdistill.method import Method
from jaxdistill.parallel.mesh import make_mesh
from tests.io.test_artifact import _digits

VALUES = 50_000


class Disk:
    """A folder that can be out of room: `fill` leaves some bytes, `free` gives all back."""

    def __init__(self, folder, fill, free, reason):
        self.folder, self.fill, self.free, self.reason = folder, fill, free, reason


@pytest.fixture(params=["a full file system", "a limit on the size of files"])
def disk(request, tmp_path):
    """Two ways to run out of room; the first needs the right to mount."""
    if request.param.startswith("a limit"):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit = lambda left: resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))  # noqa: E731
        free = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)  # noqa: E731
        yield Disk(tmp_path, limit, free, "File too large")
        free()
        return
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system")

    def fill(left):
        with open(folder / "filler", "wb") as file:
            file.write(b"x" * (os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize - left))

    try:
        yield Disk(folder, fill, (folder / "filler").unlink, "No space left on device")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def one_line(caught, reason):
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_room_leaves_the_one_before(disk, capfd):
    def step(state, frozen, batch, key):
        return state + jax.random.normal(key, state.shape), {"first": state[0]}

    walk = Method(lambda *_: jnp.zeros(VALUES), step, lambda state: state)
    options = {"key": jax.random.key(0), "steps": 8, "chunk": 2, "checkpoint_every": 2}
    options["mesh"] = make_mesh(jax.devices()[:1])
    straight = runner.run(walk, workdir=disk.folder / "straight", **options)
    workdir = disk.folder / "run"

    def squeeze(done, state):
        if done == 4:
            disk.fill(left=20_000)

    with pytest.raises(
        InputError, match=r"cannot save a checkpoint in .*run/checkpoints"
    ) as caught:
        # One checkpoint is kept: that of step 2 may only go when the next one is whole.
        runner.run(walk, workdir=workdir, keep=1, on_chunk=squeeze, **options)
    disk.free()
    one_line(caught, disk.reason)
    assert "earlier ones are kept" in str(caught.value)
    whole = [p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert whole in (["2"], ["4"])
    assert capfd.readouterr().err == ""
    resumed = runner.run(walk, workdir=workdir, **options)
    np.testing.assert_array_equal(resumed, straight)
    assert all(p.name.isdigit() for p in (workdir / "checkpoints").iterdir())
    both = [(p / "metrics.jsonl").read_text() for p in (workdir, disk.folder / "straight")]
    seen = [[json.loads(line)["first"] for line in text.splitlines()] for text in both]
    assert seen[0] == seen[1]


def test_metrics_without_room(disk):
    path = disk.folder / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, {"loss": 0.5})
    disk.fill(left=8_000)
    with pytest.raises(InputError, match=r"cannot write metrics to .*metrics.jsonl") as caught:
        for step in range(2, 10_000):
            writer.write(step, {"loss": 0.5})
    one_line(caught, disk.reason)
    writer.close()
    disk.free()
    resumed = JsonlWriter(path, resume_step=step - 1)  # the line cut short goes
    resumed.write(step, {"loss": 0.25})
    resumed.close()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == list(range(1, step + 1))


def test_an_artefact_without_room_leaves_the_one_before(disk):
    numbers = np.random.default_rng(0)
    first = _digits(2)
    artifact.save(disk.folder / "artifacts", first)
    before = {p.name: p.read_bytes() for p in (disk.folder / "artifacts").iterdir()}
    images = numbers.random((50, 32, 32, 3), np.float32)
    labels = np.zeros(50, np.int32)
    large = first._replace(images=images, labels=labels, soft_labels=None)
    large.card["mean"] = large.card["std"] = [0.5, 0.5, 0.5]
    disk.fill(left=60_000)
    with pytest.raises(InputError, match="cannot write the distilled set") as caught:
        artifact.save(disk.folder / "artifacts", large)
    one_line(caught, disk.reason)
    assert {p.name: p.read_bytes() for p in (disk.folder / "artifacts").iterdir()} == before


def test_results_without_room_leave_those_before(disk):
    path = disk.folder / "results.json"
    cell = results.Cell("convnet", "ncfm", "hard", 0, "abc")
    results.write(path, {cell: {"value": 0.5}})
    before = path.read_bytes()
    many = {cell._replace(seed=seed): {"value": 0.5} for seed in range(500)}
    disk.fill(left=4096)
    with pytest.raises(OSError, match=disk.reason) as caught:
        results.write(path, many)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    disk.free()
    assert [p.name for p in disk.folder.iterdir()] == ["results.json"]
    results.write(path, many)
    assert len(results.read(path)) == 500


@pytest.mark.parametrize("notes", ["", """ [tensorstore_spec='{"a": {"sync":true}}']"""])
def test_the_reason_is_found_in_long_messages(notes):
    text = f'UNKNOWN: Error writing "/a/x.__lock": No room{notes} [os_error_code=28]'
    assert checkpoint._reason(ValueError(text)) == "No room"


def test_no_room_for_the_first_checkpoint(disk):
    state = {"x": jax.random.normal(jax.random.key(0), (VALUES,))}
    disk.fill(left=20_000)
    with (
        pytest.raises(InputError, match="cannot save a checkpoint") as caught,
        checkpoint.manager(disk.folder / "checkpoints") as manager,
    ):
        checkpoint.save(manager, 1, state)
    one_line(caught, disk.reason)
    disk.free()
    with checkpoint.manager(disk.folder / "checkpoints") as manager:
        assert checkpoint.restore(manager, state) is None
