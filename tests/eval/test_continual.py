"""Memories of classes gone by: what they are made of, and what is said of them."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxdistill
from jaxdistill import settings
from jaxdistill.data.augment import normalizer
from jaxdistill.data.dataset import Split
from jaxdistill.errors import InputError
from jaxdistill.eval import continual, train_on
from jaxdistill.io.artifact import Distilled, load
from jaxdistill.task import CondenseTask

ROOM = settings.family("condense").ROOM
COLUMNS = ("evaluation", "row", "metric", "seed", "protocol", "value", "classes")


def record(row, metric, seed, value, classes):
    return dict(zip(COLUMNS, ("c", row, metric, seed, "p", value, classes), strict=True))


def test_orders_divide_the_classes():
    orders = [continual.divided(7, 3, order) for order in range(3)]
    for groups in orders:
        assert sorted(np.concatenate(groups)) == list(range(7))
        assert [len(g) for g in groups] == [3, 2, 2]
    assert len({tuple(np.concatenate(groups)) for groups in orders}) == 3
    again = continual.divided(7, 3, 1)
    for group, same in zip(orders[1], again, strict=True):
        np.testing.assert_array_equal(group, same)


def test_the_average_and_what_is_forgotten():
    order = [np.array([1, 2]), np.array([0]), np.array([3])]
    first = [None, 0.9, 0.7, None]
    second = [0.4, 0.9, 0.8, None]
    third = [0.6, 0.5, 0.7, 1.0]
    records = [
        record("a", "2 classes", 0, 0.8, first),
        record("a", "3 classes", 0, 0.7, second),
        record("a", "4 classes", 0, 0.7, third),
    ]
    lost = [r | {"row": "b", "value": None if r["metric"] == "3 classes" else 0.5} for r in records]
    found = {
        (r["row"], r["metric"]): r["value"] for r in continual.summaries(records + lost, [order])
    }
    assert found["a", "average"] == pytest.approx(np.mean([0.8, 0.7, 0.7]))
    # The first group was best after the second, the second got better.
    assert found["a", "forgotten"] == pytest.approx(((0.85 - 0.6) + (0.4 - 0.6)) / 2)
    assert found["b", "average"] is None and found["b", "forgotten"] is None


def test_a_network_sees_the_memory_alone_and_is_asked_for_what_it_has_met():
    """A linear classifier of one-hot images, of which those of class 3 are called 0 in the test."""
    classes = 4
    images = np.eye(classes, dtype=np.float32).reshape(classes, 2, 2, 1)
    distilled = Distilled(images, np.arange(classes, dtype=np.int32), None, {})
    shown = np.repeat(images, 3, 0)
    labels = np.repeat(np.array([0, 1, 2, 0], np.int32), 3)
    test = Split((255 * shown).astype(np.uint8), labels)

    facts = {"num_classes": classes, "normalize": normalizer((0.0,), (1.0,)), "microbatch": 8}
    task = CondenseTask._make(facts.get(field) for field in CondenseTask._fields)
    network = train_on.Network(
        lambda key: jnp.zeros((classes, classes)), lambda w, x: x.reshape(len(x), -1) @ w
    )
    protocol = train_on.Protocol(30, 8, 1.0, strategy="none")
    found = continual.measure(task, test, distilled, np.array([2, 0]), network, protocol, seed=0)
    # Of class 0 half are images of class 3, of which the memory has none.
    assert found["images"] == 2
    assert found["classes"][1] is None and found["classes"][3] is None
    assert found["classes"][2] == 1.0
    assert found["value"] == pytest.approx((6 * found["classes"][0] + 3) / 9)
    assert 0.5 <= found["classes"][0] <= 1.0


SEPARATE = ("dm", "random", "released", "start")


def test_those_are_called_separate():
    separate = []
    for name in settings.modules(ROOM, "recipe"):
        spec = f"ncfm:dataset=digits,method={name},baselines=,smoke"
        resolved = settings.resolve(jaxdistill.load_config(spec))
        if resolved.rows[name].recipe(resolved.family.shapes(resolved)).separate:
            separate.append(name)
    assert sorted(separate) == sorted(SEPARATE)


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """Two data sets of equal statistics, which differ in the images of class 1."""
    folder = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 8, 8, 1), np.uint8)
    labels = np.arange(60) % 3
    other = images.copy()
    other[labels == 1] = images[labels == 1][:, ::-1, ::-1]
    for name, each in (("one", images), ("other", other)):
        arrays = {"train_images": each, "train_labels": labels}
        arrays |= {"test_images": images, "test_labels": labels}
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


@pytest.mark.parametrize("name", SEPARATE)
def test_images_of_a_class_do_not_depend_on_other_classes(two_sets, name, tmp_path):
    made = []
    for data in ("one", "other"):
        config = jaxdistill.load_config(
            f"ncfm:dataset={two_sets / data}.npz,method={name},baselines=,ipc=2,smoke",
            {"extractor.depth": "1"},
        ).unlock()
        config.evals = {}
        jaxdistill.train(config, tmp_path / data)
        made.append(load(tmp_path / data / "artifacts").images.reshape(3, -1, 8, 8, 1))
    for label in (0, 2):
        np.testing.assert_array_equal(made[0][label], made[1][label])
    assert not np.array_equal(made[0][1], made[1][1])


def test_more_groups_than_classes_are_refused(tmp_path):
    config = jaxdistill.load_config("continual:smoke", {"evals.continual.groups": "11"})
    with pytest.raises(InputError, match=r"has 10 classes, which do not come in .*groups=11"):
        jaxdistill.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "artifacts").exists()
