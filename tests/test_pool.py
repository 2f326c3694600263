"""Kept extractors: read back in the same bits, or refused when they are not this run's."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import pool
from jaxdistill.data import sources
from jaxdistill.errors import InputError
from jaxdistill.eval import train_on

NETWORK = train_on.Network(
    init=lambda key: {"head": {"w": jax.random.normal(key, (64, 10)), "b": jnp.zeros(10)}},
    logits=lambda params, x: x.reshape(len(x), -1) @ params["head"]["w"] + params["head"]["b"],
)


def load(folder):
    return pool.load_or_train(
        folder,
        2,
        NETWORK,
        sources.load("digits"),
        normalize=lambda x: x.astype(jnp.float32) / 255,
        protocol=train_on.Protocol(epochs=1, strategy="none"),
        microbatch=64,
        identity="linear",
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    return folder, load(folder)


@pytest.fixture
def folder(kept, tmp_path):
    shutil.copytree(kept[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_networks_are_trained_once(kept):
    tmp_path, first = kept
    assert first["trained"]["head"]["w"].shape == (2, 64, 10)
    assert not np.array_equal(first["initial"]["head"]["w"], first["trained"]["head"]["w"])
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), first)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())] == times


FORGERIES = {
    "it lacks trained/head/w": lambda a: {k: v for k, v in a.items() if k != "trained/head/w"},
    "initial/head/b is float64 of shape": lambda a: a | {"initial/head/b": np.zeros(10)},
    "initial/head/b is <U4 of shape": lambda a: a | {"initial/head/b": np.full(10, "zero")},
    "initial/head/b is object of shape": lambda a: a | {"initial/head/b": np.full(10, None)},
    "initial/head/b is float32 of shape \\(9,\\)": lambda a: (
        a | {"initial/head/b": np.zeros(9, np.float32)}
    ),
    "initial/head/b holds values that are not finite": lambda a: (
        a | {"initial/head/b": np.full(10, np.nan, np.float32)}
    ),
}


@pytest.mark.parametrize("message", FORGERIES)
def test_forged_networks_are_refused(folder, message):
    path = folder / "linear-1.npz"
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **FORGERIES[message](arrays))
    with pytest.raises(InputError, match=rf"linear-1\.npz is not a network .*{message}.*delete it"):
        load(folder)


def test_cut_networks_are_refused(folder):
    path = folder / "linear-0.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"linear-0\.npz is not a network of this run"):
        load(folder)
