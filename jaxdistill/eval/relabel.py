"""Accuracy on real test images of fresh networks that a teacher labels as they are trained.

The protocol of RDED (Sun, Shi, Yu and Lin, CVPR 2024): cells change places, crop, flip, CutMix, and
the Kullback-Leibler divergence at a temperature of 20 from what the teacher says of the very view;
AdamW, whose learning rate falls by a cosine to half of what it was. The last epoch counts.

What the labels are is a setting, for they are worth more than the images: hard ones, one soft label
an image, those of some views that are drawn once and kept, or the teacher's for every view.
"""

import functools
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array

from jaxdistill.condense.crops import boxes, cut, rearranged
from jaxdistill.data.dataset import Dataset
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval import classify, results, train_on
from jaxdistill.eval.bench import Bench, Made
from jaxdistill.eval.results import Cell
from jaxdistill.interrupt import ShouldStop, never, wait
from jaxdistill.io.files import write_files
from jaxdistill.io.reading import read_npz
from jaxdistill.io.writers import Progress
from jaxdistill.keywords import Between, Count, Fraction, Rate
from jaxdistill.parallel import processes
from jaxdistill.settings import digest
from jaxdistill.task import CondenseTask

FAMILY = "condense"

Labels = Literal["hard", "soft", "views", "teacher"]
"""Hard ones; the teacher's of each image as it is; the teacher's of a number of views, which come
back; the teacher's of every view anew."""

_RATIO = (3 / 4, 4 / 3)  # of crops
_BLOCKS = 20  # launches of a training
_VIEWS = 0x76696577  # the seed of stored views, which belong to the set and to no network


class Protocol(NamedTuple):
    """How a network is trained; see `evaluate`."""

    labels: Labels
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    temperature: float
    half_cosine: bool
    cutmix: bool
    factor: int
    views: int


def check(
    task: CondenseTask, data: Dataset, *, networks: tuple[str, ...], factor: int, **others: Any
) -> None:
    """Refuses settings that would fail in the end.

    Raises:
        InputError: If a network is unknown or cannot be built, or the factor does not divide the
            images.
    """
    shape = {name: others[name] for name in ("depth", "width", "norm")}
    classify.check(task, data, networks=networks, strategy="none", **shape)
    if any(side % factor for side in task.image_shape[:2]):
        raise InputError(
            f"evals.*.factor={factor} does not divide images of {task.image_shape[:2]}"
        )


def evaluate(
    bench: Bench,
    *,
    networks: tuple[str, ...] = ("convnet",),
    depth: Annotated[int, Between(1, 16)] = 3,
    width: Annotated[int, Between(1, 2**14)] = 128,
    norm: str = "instance",
    seeds: Annotated[int, Between(1, 1000)] = 3,
    labels: tuple[Labels, ...] = ("hard", "teacher"),
    epochs: Count = 300,
    batch_size: Count = 50,
    learning_rate: Rate = 1e-3,
    weight_decay: Fraction = 0.01,
    temperature: Annotated[float, Between(1e-3, 1e3)] = 20.0,
    cosine: Literal["half", "full"] = "half",
    cutmix: bool = True,
    factor: Annotated[int, Between(1, 64)] = 1,
    views: Annotated[int, Between(1, 10**5)] = 30,
) -> list[dict]:
    """Trains fresh networks on every row under every kind of label, and prints the table.

    Args:
        bench: What is measured. The teacher is the first trained extractor.
        networks: Any of `jaxdistill.nn.classifiers.CLASSIFIERS`.
        depth: Blocks of the ConvNet.
        width: Its channels.
        norm: Its normalization.
        seeds: Networks of each kind.
        labels: Kinds of labels, a column each; see `Labels`.
        epochs: Passes over the set; the network is measured after the last.
        batch_size: Images a step.
        learning_rate: AdamW's at the start.
        weight_decay: AdamW's, of parameters with two axes or more.
        temperature: The temperature of soft labels and of the network that learns them.
        cosine: Whether the learning rate falls to half of what it was, or to nothing.
        cutmix: Whether a rectangle of each image comes from another image of the batch.
        factor: Cells per side that change places; crops take at least a part `1 / factor` of the
            area, so that with one there are no crops.
        views: Views of the set that come back, for the labels `views`. They are drawn once for all
            networks, and written beside the artefact with their labels; see `Views`.

    Returns:
        A record for each row, network, kind of label and seed; accuracies are fractions, beside
        them those of the `classes`. Records of soft labels say how many `label_bytes` they take in
        16 bits, views included.

    Raises:
        InputError: If an artefact is none.
        Interrupted: If it is stopped; what is measured by then is kept.
    """
    task, data = bench.task, bench.data
    shared = (epochs, batch_size, learning_rate, weight_decay, temperature, cosine == "half")
    protocols = {kind: Protocol(kind, *shared, cutmix, factor, views) for kind in labels}
    judges = {
        name: classify.judge(name, task.num_classes, task.image_shape, depth, width, norm)
        for name in networks
    }
    own = {
        kind: digest([*protocol, depth, width, norm, bench.identity])
        for kind, protocol in protocols.items()
    }
    metrics = {f"{n}, {k} labels": (n, k) for n in networks for k in labels}
    wanted = [
        Cell(bench.name, row, metric, seed, own[kind])
        for metric, (_, kind) in metrics.items()
        for row in bench.rows
        for seed in range(seeds)
    ]
    missing = bench.results.missing(wanted)
    # In all processes, each of which waits for the others in it.
    pool = task.extractors.load()["trained"] if missing else None
    teacher = jax.tree.map(lambda x: x[0], pool)
    stored = {}
    for cell in missing:
        kind = metrics[cell.metric][1]
        if kind in ("soft", "views") and (cell.row, kind) not in stored:
            row = bench.rows[cell.row]
            stored[cell.row, kind] = _stored(bench, row, teacher, protocols[kind], cell.protocol)
    todo = processes.mine(missing)
    bar = Progress(len(todo), 0, "evaluating") if todo else None
    for done, cell in enumerate(todo):
        name, kind = metrics[cell.metric]
        row, said = bench.rows[cell.row], stored.get((cell.row, kind))
        with bench.results.counted(wanted, "evaluating", "networks are measured"):
            measured = _measure(bench, row, judges[name], teacher, protocols[kind], cell.seed, said)
        bench.results.keep({cell: measured})
        bar.update(done + 1, {"accuracy": measured["value"]})
    if bar is not None:
        bar.close()
    bench.results.gather()
    records = bench.results.records(wanted)
    if processes.is_first():
        print(
            f"{data.name}, {epochs} epochs, {cosine} cosine, {len(data.test.labels)} test images: "
            f"accuracy in %, mean ± std over {seeds} seeds, last epoch"
        )
        print(results.table(records, results.percent))
        rarest = results.rarest_third(np.bincount(data.train.labels, minlength=task.num_classes))
        print(f"\nby class, in %\n{results.by_class(records, rarest)}")
    return records


def _measure(
    bench: Bench,
    row: Made,
    network: train_on.Network,
    teacher: Any,
    protocol: Protocol,
    seed: int,
    stored: "StoredLabels | None",
) -> dict[str, Any]:
    """The accuracy of one fresh network, and what it took."""
    task, distilled = bench.task, row.output()
    images, hard = jnp.asarray(distilled.images), jnp.asarray(distilled.labels)
    start = time.perf_counter(), time.process_time()
    params = train(
        jax.random.key(seed),
        network,
        images,
        hard,
        teacher=(task.network.logits, teacher),
        num_classes=task.num_classes,
        normalize=task.normalize,
        protocol=protocol,
        stored=stored,
        should_stop=bench.should_stop,
    )
    test, labels = (jnp.asarray(x) for x in bench.data.test)
    one_hot = train_on.one_hot(distilled.labels, task.num_classes)
    one = jax.tree.map(lambda x: x[None], params)
    (lost,) = train_on.have_diverged(one, network, images, one_hot, normalize=task.normalize)
    found = train_on.accuracy(
        network,
        params,
        test,
        labels,
        num_classes=task.num_classes,
        normalize=task.normalize,
        microbatch=task.microbatch,
    )
    label_bytes = sum(x.nbytes for x in jax.tree.leaves(stored))
    if protocol.labels == "teacher":  # if they were kept
        label_bytes = 2 * protocol.epochs * len(hard) * task.num_classes
    return {
        **train_on.as_record(found, bool(lost)),
        "images": len(hard),
        "epochs": protocol.epochs,
        "label_bytes": label_bytes,
        "wall_seconds": round(time.perf_counter() - start[0], 2),
        "cpu_seconds": round(time.process_time() - start[1], 2),
    }


# ---------------------------------------------------------------------------- training


def train(
    key: Array,
    network: train_on.Network,
    images: Array,
    labels: Array,
    *,
    teacher: tuple[Any, Any],
    num_classes: int,
    normalize: Any,
    protocol: Protocol,
    stored: "StoredLabels | None" = None,
    should_stop: ShouldStop = never,
) -> Any:
    """Trains a fresh network and returns its parameters after the last epoch.

    Args:
        key: Decides initialization, order and views.
        network: What to train.
        images: float32 (n, h, w, c) in [0, 1].
        labels: Class ids (n,).
        teacher: `(params, normalized images) -> logits`, and the parameters.
        num_classes: Number of classes.
        normalize: Images to normalized images.
        protocol: How.
        stored: What `image_labels` gives where the labels are soft ones, and `stored_views` where
            they are those of views.
        should_stop: Whether to give up.

    Raises:
        Interrupted: If `should_stop` said yes.
    """
    k_init, k_train = jax.random.split(key)
    logits, known = teacher
    params = jax.jit(network.init)(k_init)
    carry = params, optimizer(protocol).init(params)
    beforehand = jax.tree.map(jnp.asarray, stored)
    steps = protocol.epochs * -(-len(images) // min(protocol.batch_size, len(images)))
    block = -(-steps // _BLOCKS)
    for first in range(0, steps, block):
        carry = _block(
            carry,
            k_train,
            images,
            labels,
            beforehand,
            known,
            jnp.int32(first),
            jnp.int32(min(block, steps - first)),
            network=network,
            teacher_logits=logits,
            normalize=normalize,
            protocol=protocol,
            classes=num_classes,
        )
        wait(carry, should_stop, "stopped while training a network")
    return carry[0]


def _short(labels: Array) -> Array:
    """Labels as 16 bits keep them; a compiler may leave out a conversion there and back."""
    return lax.reduce_precision(labels, exponent_bits=5, mantissa_bits=10)


def optimizer(protocol: Protocol) -> optax.GradientTransformation:
    """AdamW of rate one, which the caller multiplies by that of the epoch."""
    return optax.adamw(
        1.0,
        b1=0.9,
        b2=0.999,
        weight_decay=protocol.weight_decay,
        mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    )


def rate(protocol: Protocol, epoch: Array) -> Array:
    """The learning rate of an epoch: a cosine, of which the half is gone through, or all."""
    part = epoch / protocol.epochs
    angle = jnp.pi * (part / 2 if protocol.half_cosine else part)
    return protocol.learning_rate * 0.5 * (1 + jnp.cos(angle))


class Drawn(NamedTuple):
    """What makes a batch of b images a view: in this order, and normalized before the last.

    Attributes:
        columns: Which column of cells comes to each place (b, factor).
        rows: Which row does (b, factor).
        boxes: Top, left, height and width of what is cropped and brought back to size (b, 4).
        flips: Whether an image is mirrored (b,).
        partners: From which image of the batch the rectangle of each is (b,).
        rectangle: First and last row, first and last column of the rectangle, the last excluded.
    """

    columns: Array
    rows: Array
    boxes: Array
    flips: Array
    partners: Array
    rectangle: Array


class View(NamedTuple):
    """A batch as a network sees it.

    Attributes:
        images: Normalized images (b, h, w, c).
        kept: The part of the area that is the image's own, and not its partner's.
    """

    images: Array
    kept: Array


def draw(key: Array, count: int, shape: tuple[int, ...], protocol: Protocol) -> Drawn:
    """Draws how a batch is augmented.

    Args:
        key: Decides all of it.
        count: Images of the batch.
        shape: (h, w, c) of an image.
        protocol: What is done.
    """
    height, width, _ = shape
    factor = protocol.factor
    k_image, k_partner, k_part, k_centre = jax.random.split(key, 4)

    def one(key):
        k_cells, k_crop, k_flip = jax.random.split(key, 3)
        k_columns, k_rows = jax.random.split(k_cells)
        box = jnp.array([0, 0, height, width], jnp.int32)
        if factor > 1:
            area = (1 / factor, 1.0)
            (box,) = boxes(k_crop, height, width, 1, area=area, ratio=_RATIO)
        cells = (jax.random.permutation(k, factor) for k in (k_columns, k_rows))
        return *cells, box, jax.random.bernoulli(k_flip)

    each = jax.vmap(one)(jax.random.split(k_image, count))
    if not protocol.cutmix:
        return Drawn(*each, jnp.arange(count), jnp.zeros(4, jnp.int32))
    # One rectangle a batch, whose sides are that part of the image's.
    side = jnp.sqrt(1.0 - jax.random.uniform(k_part, (), jnp.float32))
    centres = jax.random.uniform(k_centre, (2,), jnp.float32)
    edges = []
    for size, centre in zip((height, width), centres, strict=True):
        half = jnp.floor(size * side).astype(jnp.int32) // 2
        middle = jnp.floor(centre * size).astype(jnp.int32)
        edges += [jnp.maximum(middle - half, 0), jnp.minimum(middle + half, size)]
    return Drawn(*each, jax.random.permutation(k_partner, count), jnp.stack(edges))


def view(drawn: Drawn, images: Array, normalize: Any) -> View:
    """Augments a batch as it was drawn: cells, crop, flip, normalization, CutMix.

    Args:
        drawn: How.
        images: (b, h, w, c) in [0, 1].
        normalize: Images to normalized images.
    """
    height, width = images.shape[1:3]

    def one(image, columns, rows, box, flip):
        if len(columns) > 1:
            image = cut(rearranged(image, columns, rows), box, height, width)
        return jnp.where(flip, image[:, ::-1], image)

    x = normalize(jax.vmap(one)(images, *drawn[:4]))
    top, bottom, left, right = drawn.rectangle
    places = jnp.arange(height)[:, None], jnp.arange(width)
    hole = (places[0] >= top) & (places[0] < bottom) & (places[1] >= left) & (places[1] < right)
    mixed = jnp.where(hole[None, :, :, None], x[drawn.partners], x)
    return View(mixed, 1.0 - hole.mean(dtype=jnp.float32))


class Views(NamedTuple):
    """Views of a set that are drawn once, and what a teacher says of them.

    After Shen and Xing's FKD (ECCV 2022). The leading axes are views of the set (m), batches (k)
    and images of a batch (b); the last batch of a view starts over with its first images, which
    count nothing there. In `views-*.npz` beside the artefact they have these names.

    Attributes:
        order: int32 (m, k, b). Which image of the set stands there.
        columns: int8 (m, k, b, factor). See `Drawn`, as for the next five.
        rows: int8 (m, k, b, factor).
        boxes: int16 (m, k, b, 4).
        flips: bool (m, k, b).
        partners: int32 (m, k, b).
        rectangle: int16 (m, k, 4).
        labels: float16 (m, k, b, classes). Probabilities at the protocol's temperature.
    """

    order: Any
    columns: Any
    rows: Any
    boxes: Any
    flips: Any
    partners: Any
    rectangle: Any
    labels: Any


StoredLabels = Views | Array | np.ndarray
"""Labels that were made before a training: those of views, or one of each image."""


def image_labels(
    images: Array, teacher: tuple[Any, Any], normalize: Any, protocol: Protocol
) -> np.ndarray:
    """What a teacher says of each image as it is.

    Args:
        images: float32 (n, h, w, c) in [0, 1].
        teacher: `(params, normalized images) -> logits`, and the parameters.
        normalize: Images to normalized images.
        protocol: Its temperature.

    Returns:
        Probabilities, float16 (n, classes).
    """
    logits, params = teacher
    said = jax.jit(lambda p, x: jax.nn.softmax(logits(p, normalize(x)) / protocol.temperature))
    return np.asarray(said(params, images).astype(jnp.float16))


def stored_views(
    key: Array,
    images: Array,
    teacher: tuple[Any, Any],
    normalize: Any,
    protocol: Protocol,
    on_view: Callable[[int], None] = lambda done: None,
) -> Views:
    """Draws the views of a set and asks the teacher for their labels.

    Args:
        key: Decides them.
        images: float32 (n, h, w, c) in [0, 1].
        teacher: `(params, normalized images) -> logits`, and the parameters.
        normalize: Images to normalized images.
        protocol: Views, batch size, temperature and what a view is.
        on_view: Called with the number of views of the set that are done, after each.
    """
    logits, params = teacher
    batch = min(protocol.batch_size, len(images))
    count = -(-len(images) // batch)

    @jax.jit
    def one(params, images, epoch, position):
        order, drawn, _ = _batch(key, epoch, position, len(images), images.shape[1:], protocol)
        seen = view(drawn, images[order], normalize).images
        said = jax.nn.softmax(logits(params, seen) / protocol.temperature)
        short = [jnp.int8, jnp.int8, jnp.int16, bool, jnp.int32, jnp.int16]
        return Views(
            order,
            *(x.astype(dtype) for x, dtype in zip(drawn, short, strict=True)),
            said.astype(jnp.float16),
        )

    made = []
    for epoch in range(protocol.views):
        made += [jax.device_get(one(params, images, epoch, p)) for p in range(count)]
        on_view(epoch + 1)
    flat = jax.tree.map(lambda *x: np.stack(x), *made)
    return jax.tree.map(lambda x: x.reshape(protocol.views, count, *x.shape[1:]), flat)


def _stored(bench: Bench, row: Made, teacher: Any, protocol: Protocol, own: str) -> StoredLabels:
    """The labels of a row's set, which are written beside it where they are not.

    Raises:
        InputError: If those that lie there are damaged.
        Interrupted: If it is stopped.
    """
    distilled, kind = row.output(), protocol.labels
    name = digest([own, distilled.card.get("content_sha256")])
    path = row.folder / f"{kind}-{name}.npz"
    if not path.is_file():
        known = bench.task.network.logits, teacher
        images = jnp.asarray(distilled.images)
        if kind == "soft":
            made = {"labels": image_labels(images, known, bench.task.normalize, protocol)}
        else:
            made = _views(bench, row, images, known, protocol)._asdict()
        if processes.is_first():
            write_files({path: lambda file: np.savez(file, **made)})
            labels = made["labels"].nbytes
            rest = sum(x.nbytes for x in made.values()) - labels
            said = f", {rest:,} of views" if rest else ""
            print(f"{row.name}: {path.name} has {labels:,} bytes of labels{said}")
    processes.wait(f"the {kind} labels of {row.name} are written")
    try:
        if kind == "soft":
            return read_npz(path, ["labels"])["labels"]
        return Views(**read_npz(path, Views._fields))
    except InputError as error:
        raise InputError(f"{path} holds no {kind} labels ({error}); delete it") from error


def _views(bench: Bench, row: Made, images: Array, known: tuple, protocol: Protocol) -> Views:
    bar = Progress(protocol.views, 0, f"views of {row.name}")

    def on_view(done):
        if bench.should_stop():
            raise Interrupted("stopped while labelling views")
        bar.update(done, {})

    key = jax.random.key(_VIEWS)
    views = stored_views(key, images, known, bench.task.normalize, protocol, on_view)
    bar.close()
    return views


def _batch(key, epoch, position, n, shape, protocol):
    """Which images a batch has, how they are augmented, and what each counts."""
    batch = min(protocol.batch_size, n)
    k_order, k_view = jax.random.split(jax.random.fold_in(key, epoch))
    index = position * batch + jnp.arange(batch)
    # The last batch of an epoch is short: absent images have weight zero.
    weight = (index < n).astype(jnp.float32)
    order = jax.random.permutation(k_order, n)[index % n]
    drawn = draw(jax.random.fold_in(k_view, position), batch, shape, protocol)
    return order, drawn, weight / weight.sum()


@functools.partial(
    jax.jit,
    static_argnames=("network", "teacher_logits", "normalize", "protocol", "classes"),
    donate_argnames="carry",
)
def _block(
    carry, key, images, hard, beforehand, teacher, first, count,
    *, network, teacher_logits, normalize, protocol, classes,
):  # fmt: skip
    """Some steps of the training; one program for all of them."""
    n = images.shape[0]
    batch = min(protocol.batch_size, n)
    per_epoch = -(-n // batch)
    tx = optimizer(protocol)

    def step(i, carry):
        params, state = carry
        epoch, position = i // per_epoch, i % per_epoch
        rows, drawn, weight = _batch(key, epoch, position, n, images.shape[1:], protocol)
        if protocol.labels == "views":
            number = epoch % len(beforehand.order)
            rows, *drawn, said = jax.tree.map(lambda x: x[number, position], beforehand)
            drawn = Drawn(*drawn)
        seen = view(drawn, images[rows], normalize)

        def mixed(labels):
            return seen.kept * labels + (1 - seen.kept) * labels[drawn.partners]

        warm = 1.0 if protocol.labels == "hard" else protocol.temperature
        if protocol.labels == "hard":
            target = mixed(jax.nn.one_hot(hard[rows], classes))
        elif protocol.labels == "soft":
            target = mixed(beforehand[rows].astype(jnp.float32))
        elif protocol.labels == "views":
            target = said.astype(jnp.float32)
        else:
            target = _short(jax.nn.softmax(teacher_logits(teacher, seen.images) / warm))

        def loss(params):
            logits = network.logits(params, seen.images) / warm
            return jnp.sum(weight * optax.softmax_cross_entropy(logits, target))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        updates = jax.tree.map(lambda u: rate(protocol, epoch) * u, updates)
        return optax.apply_updates(params, updates), state

    return lax.fori_loop(first, first + count, step, carry)
