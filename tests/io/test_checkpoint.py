"""Checkpoints: everything comes back, on any mesh, and damage is survived."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill.errors import InputError
from jaxdistill.io import checkpoint
from jaxdistill.method import DATA_AXIS
from jaxdistill.parallel.mesh import make_mesh

WHOLE, SPLIT = PartitionSpec(), PartitionSpec(DATA_AXIS)


def state_on(devices, spec=WHOLE):
    """A tree with every kind of leaf a state has; the images follow the spec."""
    mesh = make_mesh(jax.devices()[:devices])
    images = jax.random.normal(jax.random.key(0), (8, 3))
    tree = {
        "images": images,
        "opt": optax.adam(0.1).init(images),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4), 2),
        "low": jnp.arange(5, dtype=jnp.bfloat16) / 3,
        "count": jnp.int32(9),
        "flags": jnp.array([True, False]),
        "nothing": (),
        "nested": [{"a": jnp.float32(np.nan)}, None],
    }
    layout = jax.tree.map(lambda _: NamedSharding(mesh, WHOLE), tree)
    layout["images"] = NamedSharding(mesh, spec)
    return jax.device_put(tree, layout)


def target_of(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(actual, desired):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert got.dtype == want.dtype
        if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        np.testing.assert_array_equal(got, want)


def test_of_what_all_devices_have_a_small_array_is_saved_as_one_has_it(tmp_path, monkeypatch):
    """Else Orbax compiles a program for each shape and device, which cuts what each writes."""
    state = state_on(8, SPLIT)
    for name, leaf in state.items():
        for x in jax.tree.leaves(leaf):
            devices = checkpoint._copy_to_save(x).sharding.device_set
            assert len(devices) == (8 if name == "images" else 1), name
    # Large ones are cut, and come back as well.
    monkeypatch.setattr(checkpoint, "_LEAST_TO_CUT", 0)
    with checkpoint.manager(tmp_path, 9) as manager:
        checkpoint.save(manager, 1, state)
    with checkpoint.manager(tmp_path, 9) as manager:
        assert_same(checkpoint.restore(manager, target_of(state))[1], state)


def write(folder, *steps, metadata=None, keep=9):
    with checkpoint.manager(folder, keep) as manager:
        for step in steps:
            checkpoint.save(manager, step, {"x": jnp.full(1000, step)}, metadata)


def read(folder, metadata=None):
    target = target_of({"x": jnp.zeros(1000, jnp.int32)})
    with checkpoint.manager(folder, 9) as manager:
        restored = checkpoint.restore(manager, target, metadata)
    if restored is None:
        return None
    assert (restored[1]["x"] == restored[0]).all()
    return restored[0]


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, WHOLE), (1, WHOLE)), ((8, SPLIT), (1, WHOLE)), ((1, WHOLE), (8, SPLIT))],
)
def test_a_state_comes_back_on_any_mesh(tmp_path, before, after):
    with checkpoint.manager(tmp_path) as manager:
        checkpoint.save(manager, 12, state_on(*before))
    wanted = state_on(*after)
    with checkpoint.manager(tmp_path) as manager:
        step, state = checkpoint.restore(manager, target_of(wanted))
    assert step == 12
    assert_same(state, wanted)
    assert state["images"].sharding == wanted["images"].sharding


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    x = jax.random.normal(jax.random.key(0), (4_000_000,))
    expected = np.array(x)
    with checkpoint.manager(tmp_path) as manager:
        checkpoint.save(manager, 1, {"x": x})
        overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
        for _ in range(5):
            x = overwrite(x)
        x.block_until_ready()
        _, state = checkpoint.restore(manager, target_of({"x": x}))
    np.testing.assert_array_equal(state["x"], expected)


def test_the_newest_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    assert read(tmp_path) == 3


def test_an_empty_directory_has_nothing_to_restore(tmp_path):
    assert read(tmp_path / "new") is None


def _remove(folder):
    shutil.rmtree(folder / "state")


def _truncate(folder):
    for path in (folder / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _forget(folder):
    (folder / "metadata" / "metadata").write_bytes(b"")


@pytest.mark.parametrize("damage", [_remove, _truncate, _forget])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    write(tmp_path, 5, 10)
    damage(tmp_path / "10")
    with pytest.warns(UserWarning, match="step 10 in .* is damaged .* going on from step 5"):
        assert read(tmp_path) == 5
    write(tmp_path, 10)  # the run gets there again
    assert read(tmp_path) == 10


def test_nothing_but_damage_is_an_error_that_deletes_nothing(tmp_path):
    write(tmp_path, 5, 10)
    for step in ("5", "10"):
        _truncate(tmp_path / step)
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read .* use another workdir"):
        read(tmp_path)
    assert (tmp_path / "5").is_dir() and (tmp_path / "10").is_dir()


def test_another_shape_is_an_error(tmp_path):
    write(tmp_path, 5)
    target = target_of({"x": jnp.zeros(999, jnp.int32)})
    with (
        checkpoint.manager(tmp_path) as manager,
        pytest.raises(InputError, match=r"can be read .* or of another method or version"),
    ):
        checkpoint.restore(manager, target)


@pytest.mark.parametrize("other", [None, {}, {"config_hash": "b"}])
def test_another_config_is_refused(tmp_path, other):
    folder = tmp_path / "run" / "checkpoints"
    write(folder, 5, metadata={"config_hash": "a", "seed": 1})
    with pytest.raises(InputError, match=r"workdir .*run holds a run with another config; use"):
        read(folder, metadata=other)
    assert read(folder, metadata={"config_hash": "a", "seed": 2}) == 5


def test_a_step_is_saved_once(tmp_path):
    with pytest.raises(ValueError, match="already exists"):
        write(tmp_path, 5, 5)


def test_saving_is_quiet(tmp_path):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity("info")  # as in a program run by absl
    absl_logging.get_absl_logger().addHandler(handler)
    try:
        write(tmp_path, 1, 2)
        absl_logging.info("another's")
    finally:
        absl_logging.get_absl_logger().removeHandler(handler)
        absl_logging.set_verbosity(before)
    assert [record.getMessage() for record in records] == ["another's"]


def test_impossible_directories_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot keep checkpoints in .*file"):
        checkpoint.manager(tmp_path / "file")
    with pytest.raises(InputError, match="0 checkpoints cannot be kept; keep at least 1"):
        checkpoint.manager(tmp_path, keep=0)
