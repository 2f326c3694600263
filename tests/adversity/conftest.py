"""One finished run of each family, and data that can be replaced behind a path."""

import shutil

import numpy as np
import pytest

from jaxdistill import main

CONDENSE = ["--config=ncfm:dataset=digits,ipc=1,smoke", "--config.evals.accuracy.epochs=2"]
FLOW = ["--config=flow:dataset=soft4,smoke", "--config.evals.samples.teacher_rows=('euler:2',)"]
RUNS = {"condense": CONDENSE, "flow": FLOW}
PICTURES = ("ncfm:dataset={},smoke,baselines=", "method.factor=1", "method.batch_real=8")


def command(data, *flags):
    """The flags of a small run on the data at a path."""
    spec, *settings = PICTURES
    return [f"--config={spec.format(data)}", *(f"--config.{s}" for s in settings), *flags]


def write(path, seed=0, classes=2, per_class=8, side=8):
    """An `.npz` of noise whose classes differ in brightness; other seeds, other pixels."""
    draw = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    bright = 60 * labels[:, None, None] + draw.integers(0, 80, (len(labels), side, side))
    images = bright.clip(0, 255).astype(np.uint8)
    arrays = {"train_images": images, "train_labels": labels}
    arrays |= {"test_images": images[::-1].copy(), "test_labels": labels[::-1].copy()}
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session", params=sorted(RUNS))
def finished(request, tmp_path_factory):
    """The flags of a run that is finished, and its workdir, which is not to be written to."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    main.run([*RUNS[request.param], f"--workdir={workdir}"])
    return RUNS[request.param], workdir


@pytest.fixture
def copied(finished, tmp_path):
    """The flags of a finished run, and a workdir of one's own with it."""
    flags, workdir = finished
    return flags, shutil.copytree(workdir, tmp_path / "copied")


def contents(folder):
    """Every file of a folder, but the lock, with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
