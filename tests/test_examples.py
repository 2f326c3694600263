"""The programs that the documentation shows, run as they stand."""

import contextlib
import json
import runpy
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from jaxdistill import runner
from jaxdistill.data import device, sources
from jaxdistill.io import artifact

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


def run(name, folder, monkeypatch):
    """What a script leaves in its global names, run in a folder as a user does."""
    monkeypatch.chdir(folder)
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_smallest_method_finds_the_class_means(tmp_path, monkeypatch):
    names = run("smallest_method.py", tmp_path, monkeypatch)
    lines = (tmp_path / "runs" / "means" / "metrics.jsonl").read_text("utf-8").splitlines()
    distances = [json.loads(line)["distance"] for line in lines]
    assert distances[-1] < 0.01 * distances[0]
    images = np.asarray(names["method"].output(names["state"])["images"])
    train, classes = names["digits"].train, names["digits"].num_classes
    means = np.stack([train.images[train.labels == c].mean(0) / 255 for c in range(classes)])
    assert images.shape == (classes, 1, 8, 8, 1)
    np.testing.assert_allclose(images[:, 0], means, atol=0.04)


def test_the_smallest_method_runs_on_both_backends(tmp_path, monkeypatch):
    build = runpy.run_path(str(EXAMPLES / "smallest_method.py"))["mean_matching"]
    digits = sources.load("digits")
    data = device.resident(digits.train, digits.num_classes)
    states = [
        runner.run(
            build(optax.adam(0.05), ipc=2, batch_real=16),
            data=data,
            key=jax.random.key(1),
            steps=3,
            backend=backend,
        )
        for backend in ("jit", "pmap")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *states)


def test_the_library_example_closes_the_gap(tmp_path, monkeypatch, capsys):
    names = run("library.py", tmp_path, monkeypatch)
    before, after = (float(line.split()[1]) for line in capsys.readouterr().out.splitlines())
    assert after < before / 2
    moved = np.square(names["players"]["freqs"] - names["freqs"])
    assert moved.mean() > 1e-3


def test_the_library_example_is_short():
    lines = (EXAMPLES / "library.py").read_text("utf-8").splitlines()[1:]
    assert len([line for line in lines if line]) <= 15


@pytest.fixture(scope="module")
def student_example(tmp_path_factory):
    """The names that the example of a student leaves, and its folder."""
    folder = tmp_path_factory.mktemp("student")
    with contextlib.chdir(folder):
        return runpy.run_path(str(EXAMPLES / "student.py")), folder


def test_the_student_example_beats_euler(student_example):
    names, folder = student_example
    assert names["ours"] < 0.25 * names["euler"]
    assert int(names["state"].queries) == 600 * 2 * 4  # steps, segments, queries
    assert not list(folder.iterdir())


def test_the_teacher_of_the_student_example_is_the_velocity_of_its_data(student_example):
    names, _ = student_example

    def log_density(x, t):
        variance = ((1 - t) * names["STD"]) ** 2 + t**2
        away = x - (1 - t) * names["corners"]
        return jax.nn.logsumexp(-(away**2).sum(-1) / (2 * variance))

    x = jax.random.normal(jax.random.key(0), (50, 2))
    t = jax.random.uniform(jax.random.key(1), (50,), minval=0.1, maxval=0.9)
    noise = -t[:, None] * jax.vmap(jax.grad(log_density))(x, t)
    data = (x - t[:, None] * noise) / (1 - t[:, None])
    made = names["teacher"]((), x, t, np.zeros(50, np.int32))
    np.testing.assert_allclose(made, noise - data, rtol=1e-3, atol=1e-4)


@pytest.fixture
def workdir(tmp_path):
    """A work directory with an artefact in it."""
    rng = np.random.default_rng(0)
    card = {
        "dataset": "noise",
        "class_names": ["a", "b"],
        "mean": [0.4, 0.5, 0.6],
        "std": [0.1, 0.2, 0.3],
        "method": "random",
        "ipc": 3,
        "factor": 1,
        "config_hash": "0",
        "seeds": {},
        "accuracies": [],
        "provenance": {},
    }
    images = rng.random((6, 5, 4, 3), np.float32)
    labels = np.array([0, 0, 0, 1, 1, 1], np.int32)
    artifact.save(tmp_path / "artifacts", artifact.Distilled(images, labels, None, card))
    return tmp_path


def test_numpy_reads_an_artefact(workdir, monkeypatch, capsys):
    names = run("read_with_numpy.py", workdir, monkeypatch)
    distilled = artifact.load(workdir / "artifacts")
    wanted = (distilled.images.astype(np.float64) - [0.4, 0.5, 0.6]) / [0.1, 0.2, 0.3]
    assert names["inputs"].dtype == np.float32
    np.testing.assert_allclose(names["inputs"], wanted, rtol=1e-5, atol=1e-5)
    assert capsys.readouterr().out == "noise (6, 5, 4, 3) float32 [3 3]\n"


def test_pytorch_reads_an_artefact(workdir, monkeypatch):
    pytest.importorskip("torch")
    names = run("read_with_pytorch.py", workdir, monkeypatch)
    assert tuple(names["dataset"].tensors[0].shape) == (6, 3, 5, 4)


def test_the_readme_shows_the_library_example():
    code = (EXAMPLES / "library.py").read_text().split('"""\n\n', 1)[1]
    assert code in (EXAMPLES.parent.parent / "README.md").read_text()
