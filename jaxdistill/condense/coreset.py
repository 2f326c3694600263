"""Coresets: real images chosen per class by their features, as methods of the common contract.

Each step picks one more image of every class, so `ipc` steps make the set; a class must have as
many as it is to give. `frozen` is the `Table` that the choice is made from. Where classes have
budgets of their own, the longest decides how many steps there are, and what goes beyond the budget
of another class is left out in the end.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.condense.synthetic import Budget, by_classes, longest, present
from jaxdistill.errors import InputError
from jaxdistill.method import BatchSpec, Method
from jaxdistill.task import CondenseTask, Part, Recipe


class Table(NamedTuple):
    """What a coreset is chosen from.

    Attributes:
        images: uint8 images (n, H, W, C).
        index: Row numbers of each class (classes, n_max), filled up by repeating.
        counts: Images of each class (classes,).
        features: Features of every image (n, d); may have d = 0 for `random`.
    """

    images: Array
    index: Int[Array, "classes n"]
    counts: Int[Array, " classes"]
    features: Float[Array, "n d"]


class CoresetState(NamedTuple):
    """The images chosen so far.

    Attributes:
        step: Images chosen of each class.
        chosen: Columns of the class table, (classes, ipc).
        taken: Columns that are gone, or only repeat an image (classes, n_max).
        summary: What the rule remembers: a sum of features, or distances to the nearest choice.
        images: float32 images (classes, ipc, H, W, C) in [0, 1].
    """

    step: Array
    chosen: Int[Array, "classes ipc"]
    taken: Bool[Array, "classes n"]
    summary: Any
    images: Float[Array, "classes ipc h w c"]


def feature_table(
    features: Callable[[Any, Float[Array, "b h w c"]], Float[Array, "b d"]],
    params: Any,
    images: Array,
    *,
    normalize: Callable[[Array], Array],
    microbatch: int = 128,
) -> Float[Array, "n d"]:
    """Features of all images, `microbatch` at a time, without augmentation.

    Args:
        features: `(params, normalized images) -> features`.
        params: Parameters of a network trained on the training set.
        images: uint8 images (n, H, W, C).
        normalize: uint8 images to normalized images.
        microbatch: Images in one pass.
    """
    n = images.shape[0]
    parts = -(-n // microbatch)
    index = (jnp.arange(parts * microbatch) % n).reshape(parts, microbatch)
    out = lax.map(lambda i: features(params, normalize(images[i])), index)
    return out.reshape(parts * microbatch, -1)[:n]


def greedy(ipc: Budget, summarise: Callable, score: Callable, update: Callable) -> Method:
    """A greedy choice: the highest score among the images not taken, `ipc` times.

    Args:
        ipc: Images of every class, or of each. Then the output says which are `present`.
        summarise: `rows -> summary`, what the rule remembers before the first choice.
        score: `(rows, summary, step, key) -> scores` (n_max,).
        update: `(rows, summary, pick) -> summary`, after a choice.
    """
    most = longest(ipc)

    def init(key, frozen, batch):
        del key, batch
        classes, columns = frozen.index.shape
        repeats = jnp.arange(columns) >= frozen.counts[:, None]
        return CoresetState(
            step=jnp.zeros((), jnp.int32),
            chosen=jnp.zeros((classes, most), jnp.int32),
            taken=repeats,
            summary=lax.map(lambda c: summarise(_rows(frozen, c)), jnp.arange(classes)),
            images=jnp.zeros((classes, most, *frozen.images.shape[1:]), jnp.float32),
        )

    def step(state, frozen, batch, key):
        del batch
        classes = state.chosen.shape[0]

        def choose(args):
            c, summary, taken, key = args
            rows = _rows(frozen, c)
            scores = score(rows, summary, state.step, key)
            pick = jnp.argmax(jnp.where(taken, -jnp.inf, scores))
            return pick, update(rows, summary, pick)

        keys = jax.random.split(key, classes)
        pick, summary = lax.map(choose, (jnp.arange(classes), state.summary, state.taken, keys))
        each = jnp.arange(classes)
        images = frozen.images[frozen.index[each, pick]].astype(jnp.float32) / 255.0
        state = CoresetState(
            step=state.step + 1,
            chosen=state.chosen.at[:, state.step].set(pick.astype(jnp.int32)),
            taken=state.taken.at[each, pick].set(True),
            summary=summary,
            images=state.images.at[:, state.step].set(images),
        )
        return state, {"chosen": state.step.astype(jnp.float32)}

    def output(state):
        made = {"images": state.images, "chosen": state.chosen}
        there = present(ipc)
        return made if there is None else made | {"present": jnp.asarray(there)}

    return Method(init, step, output, BatchSpec("none"))


class Rows(NamedTuple):
    """The features of one class, the repeats among them, and the mean of the real ones."""

    features: Array
    mean: Array


def _rows(table: Table, c: Array) -> Rows:
    features = table.features[table.index[c]]
    real = (jnp.arange(features.shape[0]) < table.counts[c])[:, None]
    return Rows(features, jnp.sum(features * real, 0) / table.counts[c])


def coreset(task: CondenseTask, method: Method, ipc: Budget, *, features: bool = True) -> Recipe:
    """The recipe of a coreset.

    Args:
        task: What it is for.
        method: The rule.
        ipc: Images of every class, or of each.
        features: Whether the rule looks at features, those of the first trained extractor.

    Raises:
        InputError: If a class has too few images, or there are not as many budgets as classes.
    """
    wanted = by_classes(task, ipc)
    lacking = [(size, n) for size, n in zip(task.class_sizes, wanted, strict=True) if size[0] < n]
    if lacking:
        (count, name), asked = min(lacking)
        raise InputError(
            f"class {name!r} has {count} training images, but ipc={asked} asks for {asked}; "
            "lower it"
        )
    return Recipe(method, steps=longest(ipc), frozen=_table(task, features), rates=())


def _table(task: CondenseTask, wanted: bool) -> Part:
    train = task.train.shapes
    dim = task.network.feature_dim if wanted else 0
    features = jax.ShapeDtypeStruct((train["images"].shape[0], dim), jnp.float32)

    def load():
        train = jax.tree.map(jnp.asarray, task.train.load())
        features = jnp.zeros((train["images"].shape[0], 0))
        if wanted:
            params = jax.tree.map(lambda x: x[0], task.extractors.load()["trained"])
            look = functools.partial(
                feature_table,
                task.network.features,
                normalize=task.normalize,
                microbatch=task.microbatch,
            )
            features = jax.jit(look)(params, train["images"])
        return Table(train["images"], train["index"], train["counts"], features)

    return Part(Table(train["images"], train["index"], train["counts"], features), load)
