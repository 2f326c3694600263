"""Streamed batches are the resident ones."""

import jax
import numpy as np
import pytest

from jaxdistill import runner
from jaxdistill.data.device import resident
from jaxdistill.data.stream import stream
from jaxdistill.errors import InputError
from jaxdistill.method import BatchSpec, Method
from jaxdistill.parallel.mesh import make_mesh
from tests.test_backends import CLASSES, SIDE, differences, min_max, toy_data


def toy_split():
    """The images of `toy_data`, in another order than that of the classes."""
    data, frozen = toy_data()
    images = np.asarray(data.examples["images"]).reshape(-1, SIDE, SIDE, 1)
    labels = np.repeat(np.arange(CLASSES, dtype=np.int32), len(images) // CLASSES)
    order = np.random.default_rng(0).permutation(len(labels))
    return ({"images": images[order]}, labels[order]), frozen


def fingerprints(spec):
    """A method that keeps what it was fed at each of six steps."""

    def weigh(batch):
        images = batch["images"]
        flat = images.reshape(*images.shape[:-3], -1).astype(np.float32)
        total = (flat * np.arange(1, flat.shape[-1] + 1)).sum()
        return total if spec.kind == "per_class" else total + (batch["labels"] * 7).sum()

    def step(state, frozen, batch, key):
        return state, {"fed": weigh(batch), "noise": jax.random.uniform(key)}

    return Method(lambda key, frozen, batch: weigh(batch), step, lambda s: s, spec)


class Log:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.records = []

    def write(self, step, values):
        self.records.append((step, dict(values)))


@pytest.mark.parametrize("kind", ["per_class", "uniform"])
@pytest.mark.parametrize("devices", [1, 8])
def test_streamed_and_resident_batches_are_the_same(kind, devices):
    split, _ = toy_split()
    method = fingerprints(BatchSpec(kind, 16))
    logs = {}
    for place in (resident, stream):
        logs[place], mesh = Log(), make_mesh(jax.devices()[:devices])
        state = runner.run(
            method,
            data=place(*split, CLASSES),
            key=jax.random.key(3),
            steps=7,
            chunk=3,
            mesh=mesh,
            writers=[logs[place]],
        )
        logs[place].records.append(float(state))
    assert logs[stream].records == logs[resident].records


@pytest.mark.parametrize("devices", [1, 8])
def test_trees_without_classes_are_streamed_too(devices):
    rng = np.random.default_rng(1)
    examples = {
        "image": rng.integers(0, 256, (40, 3, 4, 1)).astype(np.uint8),
        "text": {"ids": rng.integers(0, 99, (40, 7)).astype(np.int32), "length": np.arange(40)},
    }

    def weigh(batch):
        assert set(batch) == {"image", "text", "keys"}
        parts = (batch["image"], batch["text"]["ids"], batch["text"]["length"])
        flat = [x.reshape(x.shape[0], -1).astype(np.float32) for x in parts]
        return sum((x * np.arange(1, x.shape[-1] + 1)).sum() for x in flat)

    spec, logs = BatchSpec("uniform", 16), {}
    step = lambda state, frozen, batch, key: (state, {"fed": weigh(batch)})  # noqa: E731
    method = Method(lambda key, frozen, batch: weigh(batch), step, lambda s: s, spec)
    for place in (resident, stream):
        logs[place], mesh = Log(), make_mesh(jax.devices()[:devices])
        options = {"key": jax.random.key(5), "chunk": 2, "mesh": mesh, "writers": [logs[place]]}
        state = runner.run(method, data=place(examples), steps=5, **options)
        logs[place].records.append(float(state))
    assert logs[stream].records == logs[resident].records


def test_a_streamed_run_goes_on_where_it_was_cut(tmp_path):
    split, frozen = toy_split()
    options = {
        "data": stream(*split, CLASSES),
        "frozen": frozen,
        "key": jax.random.key(7),
        "chunk": 2,
        "mesh": make_mesh(class_devices=4),
        "checkpoint_every": 3,
    }
    for steps in (3, 8):
        cut = runner.run(min_max(), steps=steps, workdir=tmp_path / "cut", **options)
    whole = runner.run(min_max(), steps=8, workdir=tmp_path / "whole", **options)
    assert not differences(cut, whole, 0)
    options["data"] = resident(*split, CLASSES)
    assert not differences(
        runner.run(min_max(), steps=8, workdir=tmp_path / "r", **options), cut, 0
    )


def test_pmap_is_refused():
    split, frozen = toy_split()
    data = stream(*split, CLASSES)
    with pytest.raises(InputError, match="does not take streamed data; use the jit backend"):
        options = {"data": data, "frozen": frozen, "key": jax.random.key(0), "backend": "pmap"}
        runner.run(min_max(), steps=1, **options)
