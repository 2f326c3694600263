"""Copies are found, also mirrored and moved ones; blurred images are none; real sets fail."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from jaxdistill.data import dataset
from jaxdistill.data.augment import normalizer
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval import privacy
from jaxdistill.eval.bench import Bench
from jaxdistill.eval.results import Results
from jaxdistill.io.artifact import Distilled
from jaxdistill.task import CondenseTask, Network

SIDE, N = 10, 160


class Task(NamedTuple):
    """What the evaluation asks of a task."""

    network: Network
    normalize: object
    microbatch: int


class Row(NamedTuple):
    """What it asks of a row."""

    output: object


TASK = CondenseTask(*[None] * len(CondenseTask._fields))  # of which nothing is asked


def smooth(numbers, n):
    """Images with something to tell them apart, which a move by a pixel leaves recognizable."""
    coarse = numbers.random((n, 5, 5, 1))
    return np.uint8(255 * np.kron(coarse, np.ones((1, 2, 2, 1))))


@pytest.fixture(scope="module")
def data():
    numbers = np.random.default_rng(0)
    labels = np.arange(N) % 2
    return dataset.from_arrays(
        smooth(numbers, N), labels, smooth(numbers, N), labels, name="blocks"
    )


def rows(data):
    train = np.float32(data.train.images) / 255
    return {
        "real": train[:8],
        "mirrored": train[:8, :, ::-1],
        "moved": np.pad(train[:8], ((0, 0), (1, 0), (0, 0), (0, 0)), mode="edge")[:, :-1],
        "held out": np.float32(data.test.images[-8:]) / 255,
        "blurred": np.stack([train[i : i + 40].mean(0) for i in range(0, 32, 4)]),
    }


def bench(folder, data, sets):
    linear = lambda params, x: x.reshape(len(x), -1) @ params  # noqa: E731
    network = Network(lambda key: jax.random.normal(key, (SIDE * SIDE, 40)), linear, linear, 40)
    task = Task(network, normalizer((0.5,), (0.25,)), 32)
    labels = np.zeros(8, np.int32)
    made = {
        name: Row(lambda images=images: Distilled(images, labels, None, {}))
        for name, images in sets.items()
    }
    return Bench("copies", task, data, made, folder, Results(folder), {})


def test_copies_are_found_and_nothing_else_is(data, tmp_path, capsys):
    there = bench(tmp_path, data, rows(data))
    records = privacy.evaluate(there, held_out=80, neighbours=20, shown=3)
    said = {(r["row"], r["metric"]): r["value"] for r in records}
    for name in ("real", "mirrored", "moved"):
        assert said[name, "pixels, copies"] == 1
        assert said[name, "pixels, median"] < 0.5
    assert said["real", "features, copies"] == 1
    for name in ("held out", "blurred"):
        assert said[name, "pixels, copies"] <= 0.25
        assert said[name, "features, copies"] <= 0.25
    with Image.open(tmp_path / "copies" / "moved.png") as picture:
        assert picture.size[0] > 50
    assert "copies of training images" in capsys.readouterr().out
    # What is measured is not measured again.
    assert privacy.evaluate(there._replace(task=None), held_out=80, neighbours=20) == records


def test_a_stop_keeps_what_is_done(data, tmp_path):
    there = bench(tmp_path, data, rows(data))._replace(should_stop=lambda: True)
    with pytest.raises(Interrupted, match="looking for copies"):
        privacy.evaluate(there, held_out=80)


def test_too_few_held_out_images_are_told_beforehand(data):
    with pytest.raises(InputError, match=r"held_out=500; lower evals\.\*\.held_out"):
        privacy.check(TASK, data, held_out=500)
