"""RDED: crops as Pillow makes them, the choice against one written out, stitching, observers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxdistill import config as configs
from jaxdistill import settings
from jaxdistill.condense import rded as module
from jaxdistill.condense.crops import boxes, cut, rearranged
from jaxdistill.condense.rded import rded, stitch
from jaxdistill.data.augment import normalizer
from jaxdistill.errors import InputError
from jaxdistill.task import Part

CLASSES, MIPC, CROPS, SIDE = 3, 12, 4, 8
NORMALIZE = normalizer((0.4,), (0.3,))


@pytest.mark.parametrize("shape", [(8, 8), (9, 14), (30, 10)])
def test_squares_lie_in_the_image_and_have_the_areas_asked_for(shape):
    found = np.asarray(boxes(jax.random.key(0), *shape, 4000))
    top, left, side, wide = found.T
    assert (side == wide).all()
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + side <= shape[0]).all() and (left + side <= shape[1]).all()
    parts = side**2 / np.prod(shape)
    most = min(shape) ** 2 / np.prod(shape)
    # The side is rounded to a pixel.
    slack = 2 * min(shape) / np.prod(shape)
    assert parts.min() < 0.08 + slack and parts.max() == pytest.approx(min(most, 1.0))
    if most == 1.0:
        assert parts.mean() == pytest.approx(0.54, abs=0.03)
        free = side < min(shape)
        places = top[free] / (shape[0] - side[free])
        assert places.mean() == pytest.approx(0.5, abs=0.03)


def test_rectangles_have_the_ratios_asked_for():
    found = np.asarray(boxes(jax.random.key(0), 40, 40, 2000, area=(0.5, 1.0), ratio=(0.75, 4 / 3)))
    top, left, tall, wide = found.T
    assert (top + tall <= 40).all() and (left + wide <= 40).all()
    ratios = wide / tall
    assert 0.7 < ratios.min() < 0.8 and 1.25 < ratios.max() < 1.4
    assert (tall * wide).min() > 0.45 * 1600
    # Of the whole area only the whole image fits, whatever the ratio.
    found = np.asarray(boxes(jax.random.key(1), 40, 40, 50, area=(1.0, 1.0), ratio=(0.75, 4 / 3)))
    np.testing.assert_array_equal(found, [[0, 0, 40, 40]] * 50)


def test_cells_change_places_as_columns_and_rows():
    image = jnp.arange(36.0).reshape(6, 6, 1)
    one = jnp.zeros(1, jnp.int32)
    assert (rearranged(image, one, one) == image).all()
    orders, seen = [jnp.array([0, 1]), jnp.array([1, 0])], set()
    for columns, rows in itertools.product(orders, orders):
        found = np.asarray(rearranged(image, columns, rows))[..., 0]
        corner = found[0, 0]
        assert corner in (0.0, 3.0, 18.0, 21.0)
        np.testing.assert_array_equal(np.sort(found.ravel()), np.arange(36))
        # A cell stays whole, and its neighbour in the row is that of before.
        np.testing.assert_array_equal(found[:3, :3] - corner, np.arange(36).reshape(6, 6)[:3, :3])
        assert abs(found[0, 3] - corner) == 3
        seen.add(corner)
    assert len(seen) == 4


@pytest.mark.parametrize("box", [(0, 0, 20), (3, 5, 13), (19, 2, 1), (4, 4, 6), (2, 7, 9)])
@pytest.mark.parametrize("out", [4, 10, 16])
def test_crops_are_those_of_pillow(box, out):
    image = np.random.default_rng(0).uniform(0, 255, (20, 20)).astype(np.float32)
    top, left, side = box
    crop = Image.fromarray(image).crop((left, top, left + side, top + side))
    wanted = np.asarray(crop.resize((out, out), Image.Resampling.BILINEAR))
    found = cut(jnp.asarray(image)[..., None], jnp.array([*box, side]), out, out)[..., 0]
    np.testing.assert_allclose(found, wanted, atol=2e-3)


def test_cells_hold_one_crop_of_each_block_of_ranks():
    ipc, factor = 3, 2
    ranks = np.arange(ipc * factor**2, dtype=np.uint8)
    crops = np.broadcast_to(ranks[:, None, None, None], (len(ranks), 2, 2, 1))
    images = np.asarray(stitch(jnp.asarray(crops), ipc, factor))
    assert images.shape == (ipc, 4, 4, 1)
    for j, image in enumerate(images):
        cells = image[::2, ::2, 0].reshape(-1)
        np.testing.assert_array_equal(cells, [q * ipc + j for q in range(factor**2)])


def logits(params, x):
    return jnp.tanh(x.reshape(len(x), -1)) @ params


@pytest.fixture(scope="module")
def given():
    numbers = np.random.default_rng(1)
    images = numbers.integers(0, 256, (CLASSES, MIPC, SIDE, SIDE, 1)).astype(np.uint8)
    observers = numbers.normal(size=(2, SIDE * SIDE, CLASSES)).astype(np.float32)
    return images, observers


def run(given, key=0, **options):
    images, observers = given
    options = {"ipc": 2, "image_shape": (SIDE, SIDE, 1), "mipc": MIPC, "num_crop": CROPS} | options
    method = rded(logits, normalize=NORMALIZE, **options)
    frozen, batch = {"observers": jnp.asarray(observers)}, {"images": jnp.asarray(images)}
    state = method.init(jax.random.key(9), frozen, batch)
    state, metrics = jax.jit(method.step)(state, frozen, batch, jax.random.key(key))
    return jax.device_get(method.output(state)), metrics


def written_out(given, choice, factor, padded, ipc=2, key=0):
    """The same by loops in NumPy, from the squares that the keys give."""
    images, observers = given
    part = SIDE // factor
    made = []
    for c in range(CLASSES):
        kept = []
        for i in range(MIPC):
            k = jax.random.fold_in(jax.random.fold_in(jax.random.key(key), c), i)
            tried = []
            for box in np.asarray(boxes(k, SIDE, SIDE, CROPS)):
                top, left, side, _ = box
                whole = images[c, i, :, :, 0].astype(np.float32)
                crop = Image.fromarray(whole).crop((left, top, left + side, top + side))
                crop = np.asarray(crop.resize((part, part), Image.Resampling.BILINEAR))
                crop = np.rint(np.clip(crop, 0, 255))
                x = (crop / 255 - 0.4) / 0.3
                if padded:
                    before = (SIDE - part) // 2
                    after = SIDE - part - before
                    x = np.pad(x, (before, after))
                scores = [np.tanh(x.reshape(-1)) @ w.astype(np.float64) for w in observers]
                each = [np.log(np.exp(s - s.max()).sum()) + s.max() - s[c] for s in scores]
                tried.append((float(np.mean(each)), crop))
            losses = np.array([loss for loss, _ in tried])
            kept.append(tried[_best(losses, choice)[0]])
        losses = np.array([loss for loss, _ in kept])
        chosen = [kept[i] for i in _best(losses, choice)[: ipc * factor**2]]
        image = np.zeros((ipc, SIDE, SIDE), np.float32)
        for rank, (_, crop) in enumerate(chosen):
            q, j = divmod(rank, ipc)
            row, column = divmod(q, factor)
            image[j, row * part : (row + 1) * part, column * part : (column + 1) * part] = crop
        made.append(image)
    return np.stack(made)[..., None] / 255


def _best(losses, choice):
    ranks = {
        "easiest": losses,
        "hardest": -losses,
        "medium": np.abs(losses - np.sort(losses)[(len(losses) - 1) // 2]),
        "random": np.arange(len(losses)),
    }[choice]
    return np.argsort(ranks, kind="stable")


@pytest.mark.parametrize("choice", ["easiest", "hardest", "medium", "random"])
@pytest.mark.parametrize(("factor", "padded"), [(1, True), (2, True)])
def test_the_choice_is_the_one_written_out(choice, factor, padded, given):
    found, metrics = run(given, choice=choice, factor=factor, padded=padded)
    wanted = written_out(given, choice, factor, padded)
    # A rounded level may differ, and with it nothing else.
    np.testing.assert_allclose(found["images"], wanted, atol=1.01 / 255)
    assert found["losses"].shape == (CLASSES, 2, factor**2)
    if choice == "easiest":
        assert metrics["chosen"] < metrics["crops"]
        assert (np.diff(found["losses"][:, :, 0], axis=1) >= 0).all()
    if choice == "hardest":
        assert metrics["chosen"] > metrics["crops"]


def test_observers_may_see_the_crop_alone(given):
    images, _ = given
    small = np.random.default_rng(2).normal(size=(1, SIDE * SIDE // 4, CLASSES)).astype(np.float32)
    found, _ = run((images, small), factor=2, padded=False)
    wanted = written_out((images, small), "easiest", 2, padded=False)
    np.testing.assert_allclose(found["images"], wanted, atol=1.01 / 255)


def test_the_same_key_gives_the_same_bytes_whatever_the_passes(given):
    plain = run(given)[0]["images"]
    for microbatch in (1, 7, 1000):
        np.testing.assert_array_equal(run(given, microbatch=microbatch)[0]["images"], plain)
    assert (run(given, key=1)[0]["images"] != plain).any()


def test_the_choice_does_not_depend_on_how_many_are_wanted(given):
    few, many = (run(given, ipc=ipc)[0]["images"] for ipc in (2, 5))
    np.testing.assert_array_equal(many[:, :2], few)


def test_images_may_go_through_a_jpeg_file(given):
    plain, jpeg = (run(given, jpeg=j)[0]["images"] for j in (False, True))
    assert 0 < np.abs(plain - jpeg).mean() < 0.2
    np.testing.assert_allclose(jpeg * 255, np.rint(jpeg * 255), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ipc": 4, "factor": 2}, "4 images of 2x2 crops take 16 images of each class, mipc=12"),
        ({"factor": 3}, "factor=3 does not divide images of 8x8"),
    ],
)
def test_what_cannot_be_made_is_refused(options, message, given):
    with pytest.raises(InputError, match=message):
        run(given, **options)


def _recipe(task, **settings):
    return module.recipe(task, **{"mipc": 20, **settings})


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The task of digits, with extractors that know them by their means."""
    experiment = settings.resolve(configs.load("ncfm:smoke"))
    loaded = experiment.family.load(experiment, tmp_path_factory.mktemp("rded"), lambda: False).task
    train = loaded.train.load()
    pixels = np.asarray(loaded.normalize(train["images"])).reshape(len(train["images"]), -1)
    means = np.stack([pixels[train["labels"] == c].mean(0) for c in range(10)])
    params = {"w": jnp.asarray(means.T)[None], "b": -0.5 * jnp.asarray((means**2).sum(1))[None]}
    network = loaded.network._replace(
        logits=lambda p, x: x.reshape(len(x), -1) @ p["w"] + p["b"], init=None
    )
    pool = {"initial": params, "trained": params}
    return loaded._replace(
        network=network, extractors=Part(jax.eval_shape(lambda: pool), lambda: pool)
    )


def test_an_observer_that_does_not_know_the_data_is_refused(task):
    _recipe(task).frozen.load()
    order = np.roll(np.arange(10), 1)
    mixed = jax.tree.map(lambda x: x[..., order], task.extractors.load())
    other = task._replace(extractors=Part(task.extractors.shapes, lambda: mixed))
    with pytest.raises(InputError, match=r"right on \d\.\d % .* its classes are in the order of"):
        _recipe(other).frozen.load()
    _recipe(other, least_accuracy=0.0).frozen.load()


def test_observers_of_elsewhere_are_checked_alike(task):
    train = task.train.load()
    options = {"normalize": task.normalize, "least_accuracy": 0.5}
    known = task.extractors.load()["trained"]
    module.check_observers(task.network.logits, known, train["images"], train["labels"], **options)
    with pytest.raises(InputError, match="of other programs often have them in another"):
        module.check_observers(
            task.network.logits, known, train["images"], (train["labels"] + 1) % 10, **options
        )


def test_crops_alone_go_to_observers_that_take_them():
    """A ConvNet has a layer of the image's size, ResNets pool what is left."""
    for network, fits in (("convnet", False), ("resnet18", True)):
        config = configs.load(
            "rded:ipc=1,smoke", {"extractor.network": network, "method.factor": "2"}
        )
        config = configs.complete(config.unlock(), {"method.padded": "False"})
        experiment = settings.resolve(config)
        build = lambda e=experiment: e.rows["rded"].recipe(e.family.shapes(e))  # noqa: E731
        if fits:
            build()
            continue
        with pytest.raises(InputError, match=r"crops of 4x4 alone, and this network takes .* 8x8"):
            build()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mipc": 500}, r"mipc=500 images of each class are asked for, but class '\d' has 1"),
        ({"observers": 2}, "observers=2, but pool.size is 1"),
        ({"ipc": 30}, "30 images of 1x1 crops take 30 images of each class, mipc=20"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message, task):
    with pytest.raises(InputError, match=message):
        _recipe(task, **settings)
