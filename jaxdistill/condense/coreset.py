"""Coresets: real images chosen per class by their features, as methods of the common contract.

Each step picks one more image of every class, so `ipc` steps make the set; the smallest class must
have that many. `frozen` is the table
that the choice is made from, see `feature_table`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.method import BatchSpec, Method


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
    prepare: Callable[[Array], Array],
    chunk: int = 128,
) -> Float[Array, "n d"]:
    """Features of all images, `chunk` at a time, without augmentation.

    Args:
        features: `(params, normalised images) -> features`.
        params: Parameters of a network trained on the training set.
        images: uint8 images (n, H, W, C).
        prepare: uint8 images to normalised images.
        chunk: Images in one pass.
    """
    n = images.shape[0]
    parts = -(-n // chunk)
    index = (jnp.arange(parts * chunk) % n).reshape(parts, chunk)
    out = lax.map(lambda i: features(params, prepare(images[i])), index)
    return out.reshape(parts * chunk, -1)[:n]


def _coreset(ipc: int, summarise: Callable, score: Callable, update: Callable) -> Method:
    """A greedy choice: the highest score among the images not taken, `ipc` times."""

    def init(key, frozen, batch):
        del key, batch
        classes, columns = frozen.index.shape
        repeats = jnp.arange(columns) >= frozen.counts[:, None]
        return CoresetState(
            step=jnp.zeros((), jnp.int32),
            chosen=jnp.zeros((classes, ipc), jnp.int32),
            taken=repeats,
            summary=lax.map(lambda c: summarise(_rows(frozen, c)), jnp.arange(classes)),
            images=jnp.zeros((classes, ipc, *frozen.images.shape[1:]), jnp.float32),
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
        return {"images": state.images, "chosen": state.chosen}

    return Method(init, step, output, BatchSpec("none"))


class _Rows(NamedTuple):
    features: Array
    mean: Array


def _rows(table: Table, c: Array) -> _Rows:
    features = table.features[table.index[c]]
    real = (jnp.arange(features.shape[0]) < table.counts[c])[:, None]
    return _Rows(features, jnp.sum(features * real, 0) / table.counts[c])


def random_subset(ipc: int) -> Method:
    """Images drawn uniformly without replacement."""
    return _coreset(
        ipc,
        summarise=lambda rows: (),
        score=lambda rows, summary, step, key: jax.random.uniform(key, rows.features.shape[:1]),
        update=lambda rows, summary, pick: (),
    )


def herding(ipc: int) -> Method:
    """Greedily keeps the mean of the chosen features close to the class mean (Welling, 2009)."""

    def score(rows, chosen_sum, step, key):
        mean = (chosen_sum + rows.features) / (step + 1)
        return -jnp.sum(jnp.square(mean - rows.mean), -1)

    return _coreset(
        ipc,
        summarise=lambda rows: jnp.zeros_like(rows.mean),
        score=score,
        update=lambda rows, chosen_sum, pick: chosen_sum + rows.features[pick],
    )


def k_center(ipc: int) -> Method:
    """Farthest-first traversal from the image nearest to the class mean (Gonzalez, 1985)."""

    def distance(rows, point):
        return jnp.sum(jnp.square(rows.features - point), -1)

    def score(rows, nearest, step, key):
        return jnp.where(step == 0, -distance(rows, rows.mean), nearest)

    return _coreset(
        ipc,
        summarise=lambda rows: jnp.full(rows.features.shape[:1], jnp.inf),
        score=score,
        update=lambda rows, nearest, pick: jnp.minimum(
            nearest, distance(rows, rows.features[pick])
        ),
    )


CORESETS = {"random": random_subset, "herding": herding, "k_center": k_center}
