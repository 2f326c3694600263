"""Chosen pairs: real images with one of their texts each, as methods of the common contract.

Each step picks one more image, so as many steps as pairs make the set. `frozen` is the `Table` that
the choice is made from. Rules look at where the first observer sees an image and reads its texts.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from jaxdistill.errors import InputError
from jaxdistill.keywords import Between
from jaxdistill.method import BatchSpec, Method
from jaxdistill.pairs.contrast import unit
from jaxdistill.task import PairsTask, Part, Recipe, Towers

Number = Annotated[int, Between(2, 100_000)]
"""How many pairs there are to be; one has nothing that it could be told from."""


class Table(NamedTuple):
    """What pairs are chosen from.

    Attributes:
        images: uint8 images.
        texts: Texts of each image, its own first.
        counts: How many are its own.
        features: What a rule looks at, for each image; d = 0 for none.
    """

    images: UInt8[Array, "n h w c"]
    texts: Float[Array, "n most t"]
    counts: Int[Array, " n"]
    features: Float[Array, "n d"]


class ChoiceState(NamedTuple):
    """The pairs chosen so far.

    Attributes:
        step: How many.
        chosen: Rows of the table.
        taken: Rows that are gone.
        summary: What the rule remembers.
        images: float32 in [0, 1].
        texts: Vectors of the texts.
    """

    step: Array
    chosen: Int[Array, " pairs"]
    taken: Bool[Array, " n"]
    summary: Any
    images: Float[Array, "pairs h w c"]
    texts: Float[Array, "pairs t"]


def greedy(pairs: int, summarise: Callable, score: Callable, update: Callable) -> Method:
    """A greedy choice: the highest score among the images not taken, with a text drawn at random.

    Args:
        pairs: How many.
        summarise: `features -> summary`, what the rule remembers before the first choice.
        score: `(features, summary, step, key) -> scores` (n,).
        update: `(features, summary, pick) -> summary`, after a choice.
    """

    def init(key, frozen, batch):
        del key, batch
        count, *shape = frozen.images.shape
        return ChoiceState(
            step=jnp.zeros((), jnp.int32),
            chosen=jnp.zeros(pairs, jnp.int32),
            taken=jnp.zeros(count, bool),
            summary=summarise(frozen.features),
            images=jnp.zeros((pairs, *shape), jnp.float32),
            texts=jnp.zeros((pairs, frozen.texts.shape[-1]), jnp.float32),
        )

    def step(state, frozen, batch, key):
        del batch
        k_score, k_text = jax.random.split(key)
        scores = score(frozen.features, state.summary, state.step, k_score)
        pick = jnp.argmax(jnp.where(state.taken, -jnp.inf, scores)).astype(jnp.int32)
        which = jax.random.randint(k_text, (), 0, frozen.counts[pick], jnp.int32)
        state = ChoiceState(
            step=state.step + 1,
            chosen=state.chosen.at[state.step].set(pick),
            taken=state.taken.at[pick].set(True),
            summary=update(frozen.features, state.summary, pick),
            images=state.images.at[state.step].set(frozen.images[pick].astype(jnp.float32) / 255),
            texts=state.texts.at[state.step].set(frozen.texts[pick, which]),
        )
        return state, {"chosen": state.step.astype(jnp.float32)}

    def output(state):
        return {"images": state.images, "texts": state.texts, "chosen": state.chosen}

    return Method(init, step, output, BatchSpec("none"))


def check(task: PairsTask, pairs: int) -> None:
    """Refuses more pairs than there are images.

    Raises:
        InputError: In this case.
    """
    if pairs > task.count:
        raise InputError(
            f"{task.name} has {task.count} training images, but pairs={pairs} asks for {pairs}; "
            "lower it"
        )


def choice(task: PairsTask, method: Method, pairs: int, *, features: bool = True) -> Recipe:
    """The recipe of a choice.

    Args:
        task: What it is for.
        method: The rule.
        pairs: How many.
        features: Whether the rule looks at features.

    Raises:
        InputError: If there are fewer images.
    """
    check(task, pairs)
    return Recipe(method, steps=pairs, frozen=_table(task, features), rates=())


def joint(
    towers: Towers,
    params: Any,
    images: UInt8[Array, "n h w c"],
    texts: Float[Array, "n most t"],
    counts: Int[Array, " n"],
    *,
    normalize: Callable[[Array], Array],
    microbatch: int,
) -> Float[Array, "n d"]:
    """Where an observer sees each image, and beside it where it reads its texts, on average.

    Args:
        towers: The observer.
        params: Its parameters.
        images: The images.
        texts: Their texts.
        counts: How many are their own.
        normalize: uint8 images to normalized images.
        microbatch: Images in one pass.
    """

    def one_pass(rows):
        own = (jnp.arange(texts.shape[1]) < counts[rows][:, None])[..., None]
        read = jnp.sum(towers.text(params, texts[rows]) * own, 1)
        return jnp.concatenate([towers.image(params, normalize(images[rows])), unit(read)], -1)

    return by_parts(one_pass, len(images), microbatch)


def by_parts(function: Callable[[Array], Array], count: int, size: int) -> Array:
    """A function of row numbers, for all rows, some at a time.

    Args:
        function: `rows -> values`, a value for each row.
        count: How many rows there are.
        size: How many at a time.
    """
    parts = -(-count // size)
    rows = (jnp.arange(parts * size) % count).reshape(parts, size)
    out = lax.map(function, rows)
    return out.reshape(parts * size, *out.shape[2:])[:count]


def _table(task: PairsTask, wanted: bool) -> Part:
    def seen(train, observers):
        first = jax.tree.map(lambda x: x[0], observers)
        look = functools.partial(joint, normalize=task.normalize, microbatch=task.microbatch)
        return Table(**train, features=look(task.towers, first, **train))

    train, observers = task.train, task.observers
    if not wanted:
        return Part(
            jax.eval_shape(unseen, train.shapes),
            lambda: unseen(jax.tree.map(jnp.asarray, train.load())),
        )
    return Part(
        jax.eval_shape(seen, train.shapes, observers.shapes),
        lambda: jax.jit(seen)(train.load(), observers.load()),
    )


def unseen(train: Mapping[str, Array]) -> Table:
    """The table of a training split that no observer has looked at."""
    return Table(**train, features=jnp.zeros((len(train["counts"]), 0)))


def drawn(
    key: PRNGKeyArray, table: Table, pairs: int
) -> tuple[Float[Array, "pairs h w c"], Float[Array, "pairs t"]]:
    """Distinct real images drawn at random, in [0, 1], each with one of its texts."""
    k_image, k_text = jax.random.split(key)
    rows = jax.random.permutation(k_image, table.images.shape[0])[:pairs]
    which = jax.random.randint(k_text, (pairs,), 0, table.counts[rows])
    return table.images[rows].astype(jnp.float32) / 255, table.texts[rows, which]
