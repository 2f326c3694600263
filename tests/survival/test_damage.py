"""Every kind of damage to every file of a checkpoint: noticed, or without effect."""

import faulthandler
import os
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.io import checkpoint
from jaxdistill.parallel.mesh import make_mesh, put
from tests.io.test_checkpoint import assert_same, state_on, target_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with two checkpoints, and their states."""
    folder = tmp_path_factory.mktemp("damage") / "checkpoints"
    first = {"run": state_on(1), "noise": jax.random.normal(jax.random.key(8), (400, 9))}
    second = {"run": state_on(1), "noise": first["noise"] + 1}
    with checkpoint.manager(folder) as manager:
        checkpoint.save(manager, 5, first, {"config_hash": "a"})
        checkpoint.save(manager, 10, second, {"config_hash": "a"})
    return folder, {5: first, 10: second}


def flip(content, numbers):
    place = numbers.integers(len(content))
    return (
        content[:place] + bytes([content[place] ^ 1 << numbers.integers(8)]) + content[place + 1 :]
    )


def scramble(content, numbers):
    return numbers.bytes(len(content))


DAMAGE = {
    "one bit flipped": flip,
    "overwritten": scramble,
    "cut in half": lambda content, numbers: content[: len(content) // 2],
    "emptied": lambda content, numbers: b"",
    "longer": lambda content, numbers: content + content,
    "missing": lambda content, numbers: None,
}


def restored(folder, states):
    """The step that is read, after a look at its values."""
    with warnings.catch_warnings(record=True) as told, checkpoint.manager(folder) as manager:
        warnings.simplefilter("always")
        step, state = checkpoint.restore(manager, target_of(states[5]), {"config_hash": "a"})
    assert_same(state, states[step])
    said = [str(warning.message) for warning in told if "damaged" in str(warning.message)]
    assert len(said) == (step == 5), said
    assert "\n" not in "".join(said)
    return step


# What JAX's version could change shows with any kind.
_KINDS = [
    kind if kind == "one bit flipped" else pytest.param(kind, marks=pytest.mark.slow)
    for kind in DAMAGE
]


@pytest.mark.parametrize("kind", _KINDS)
def test_damage_is_noticed_wherever_it_is(saved, tmp_path, kind, capfd):
    folder, states = saved
    files = sorted(p.relative_to(folder) for p in (folder / "10").rglob("*") if p.is_file())
    assert len(files) > 8
    numbers = np.random.default_rng(0)
    steps = {}
    for number, name in enumerate(files):
        shutil.copytree(folder, copy := tmp_path / str(number))
        content = DAMAGE[kind]((copy / name).read_bytes(), numbers)
        if content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)
        steps[str(name)] = restored(copy, states)
    assert capfd.readouterr() == ("", "")
    fallen = {name for name, step in steps.items() if step == 5}
    largest = max(files, key=lambda name: (folder / name).stat().st_size)
    harmless = {"longer"} if kind == "longer" else set()
    assert harmless or {"10/metadata/metadata", str(largest)} <= fallen


@pytest.mark.parametrize("name", ["10", "10/state", "10/metadata", "10/state/ocdbt.process_0"])
def test_a_missing_folder_is_noticed(saved, tmp_path, name):
    folder, states = saved
    shutil.copytree(folder, copy := tmp_path / "copy")
    shutil.rmtree(copy / name)
    if name == "10":
        with checkpoint.manager(copy) as manager:
            step, _ = checkpoint.restore(manager, target_of(states[5]), {"config_hash": "a"})
        assert step == 5
    else:
        assert restored(copy, states) == 5


# --- hostile folders ------------------------------------------------------------------------


@pytest.fixture
def no_hang():
    """A reader of a pipe cannot be interrupted: the test's process ends instead."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def become_pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def become_link(path):
    """The folder goes on elsewhere, damaged."""
    path.rename(elsewhere := path.parents[1] / "elsewhere")
    (elsewhere / "metadata" / "metadata").write_text("{")
    path.symlink_to(elsewhere)


def nest_deeply(path):
    path.write_text("[" * 200_000)


HOSTILE = {
    "a pipe for a file that is opened first": ("10/_CHECKPOINT_METADATA", become_pipe, "a pipe"),
    "a pipe for metadata": ("10/metadata/metadata", become_pipe, "a pipe"),
    "a pipe for arrays": ("5/state/manifest.ocdbt", become_pipe, "a pipe"),
    "a pipe for a step": ("15", become_pipe, "a pipe"),
    "a damaged step elsewhere": ("10", become_link, "a link"),
    "the next step leads nowhere": ("15", lambda p: p.symlink_to(p / "nowhere"), "a link"),
    "the next step leads to itself": ("15", lambda p: p.symlink_to(p), "a link"),
    "a link with a name of two lines": ("x\ny", lambda p: p.symlink_to(p.parent), "a link"),
    "deep nesting where it is read first": ("5/_CHECKPOINT_METADATA", nest_deeply, "recursion"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.usefixtures("no_hang")
def test_a_hostile_folder_is_refused_in_one_line(saved, tmp_path, name, capfd):
    folder, states = saved
    shutil.copytree(folder, copy := tmp_path / "copy")
    place, make, said = HOSTILE[name]
    make(copy / place)
    before = sorted(tmp_path.rglob("*"))
    readers = [lambda: restored(copy, states), lambda: checkpoint.newest_metadata(copy)]
    for reader in readers:
        with pytest.raises(InputError, match=said) as refused:
            reader()
        assert str(refused.value).isprintable()
        assert "use another workdir" in str(refused.value)
    assert capfd.readouterr() == ("", "")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("no_hang")
def test_deep_nesting_in_what_is_read_later_is_damage(saved, tmp_path):
    folder, states = saved
    for number, name in enumerate(("metadata/metadata", "state/_METADATA")):
        shutil.copytree(folder, copy := tmp_path / str(number))
        nest_deeply(copy / "10" / name)
        assert restored(copy, states) == 5


def test_a_file_named_like_the_next_step_gives_way(saved, tmp_path):
    folder, states = saved
    shutil.copytree(folder, copy := tmp_path / "copy")
    (copy / "15").write_text("no checkpoint")
    with checkpoint.manager(copy) as manager:
        checkpoint.save(manager, 15, states[10], {"config_hash": "a"})
    assert (copy / "15").is_dir()
    with checkpoint.manager(copy) as manager:
        step, state = checkpoint.restore(manager, target_of(states[5]), {"config_hash": "a"})
    assert step == 15
    assert_same(state, states[10])


def test_the_folder_itself_may_be_a_link(saved, tmp_path):
    folder, states = saved
    shutil.copytree(folder, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert restored(tmp_path / "link", states) == 10


# --- checksums ------------------------------------------------------------------------------


def test_every_bit_of_the_values_counts(saved, tmp_path):
    """Compression is no help to who looks: the values are read, and are not those saved."""
    folder, states = saved
    shutil.copytree(folder, copy := tmp_path / "copy")
    largest = max((p for p in (copy / "10").rglob("*")), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with (
        checkpoint.manager(copy) as manager,
        pytest.warns(UserWarning, match=r"the values of \['noise'\] are not those that were"),
    ):
        step, state = checkpoint.restore(manager, target_of(states[5]), {"config_hash": "a"})
    assert step == 5
    assert_same(state, states[5])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int32", "bool", "complex64"])
def test_a_checksum_sees_any_change_of_one_value_and_any_exchange(dtype):
    numbers = np.random.default_rng(1)
    values = jnp.asarray(numbers.integers(0, 2, (6, 5)) if dtype == "bool" else
                         numbers.normal(size=(6, 5)) * 50).astype(dtype)  # fmt: skip
    (sums,) = checkpoint._named_checksums([values]).values()
    for place in np.ndindex(values.shape):
        other = values.at[place].set(~values[place] if dtype == "bool" else values[place] + 1)
        assert checkpoint._named_checksums([other]) != {"[0]": sums}
    swapped = values[::-1]
    assert checkpoint._named_checksums([swapped]) != {"[0]": sums}


def test_signs_of_zero_and_kinds_of_nan_count():
    pairs = [np.float32([0.0, -0.0]), np.uint32([0x7FC00000, 0x7FC00001]).view(np.float32)]
    for pair in pairs:
        first, second = (checkpoint._named_checksums([jnp.asarray(pair[i])]) for i in (0, 1))
        assert first != second


def test_checksums_do_not_depend_on_the_mesh():
    numbers = np.random.default_rng(2).normal(size=(8, 6, 4)).astype(np.float32)
    one = checkpoint._named_checksums([put(numbers, make_mesh(jax.devices()[:1]))])
    for classes in (1, 4):
        mesh = make_mesh(class_devices=classes)
        axes = jax.sharding.PartitionSpec(mesh.axis_names)
        assert checkpoint._named_checksums([put(numbers, mesh, axes)]) == one
