"""Methods that learn from what the student writes: MiniLLM and DistiLLM, under one tokenizer."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdistill
from jaxdistill import config as configs
from jaxdistill import keywords, settings
from jaxdistill.data.device import draw
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.io import weights
from jaxdistill.task import Part
from jaxdistill.vlm import distillm, losses, minillm
from jaxdistill.vlm.decoding import Mixed
from jaxdistill.vlm.pairs import answer_logits, written
from tests.test_backends import differences, run_on
from tests.test_method_contract import together

# The programs are many and run for milliseconds.
# ---------------------------------------------------------------------------- numbers

EOS, VOCABULARY, LENGTH = 2, 3, 3


def answers(length=LENGTH):
    """All texts of three tokens that the last ends, or the room does."""
    return [
        y
        for n in range(1, length + 1)
        for y in itertools.product(range(VOCABULARY), repeat=n)
        if EOS not in y[:-1] and (y[-1] == EOS or n == length)
    ]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def row_of(before):
    """The row of a table of laws that says what follows a text: 1 + 3 + 9 of them."""
    return sum(VOCABULARY**i for i in range(len(before))) + sum(
        token * VOCABULARY**i for i, token in enumerate(before)
    )


class Laws(NamedTuple):
    """Probabilities (rows, v) of what follows each text, of the student and of the teacher."""

    q: np.ndarray
    p: np.ndarray


@pytest.fixture(scope="module")
def tables():
    numbers = np.random.default_rng(3)
    return [1.5 * numbers.normal(size=(13, VOCABULARY)) for _ in range(2)]


def chance(law, y):
    return np.prod([law[row_of(y[:t]), y[t]] for t in range(len(y))])


def score(law, y, t):
    """The gradient of the log-probability of token t, for the logits in the table."""
    found, row = np.zeros_like(law), row_of(y[:t])
    found[row] = -law[row]
    found[row, y[t]] += 1
    return found


def single_step(laws, y, t):
    """The gradient of the reverse KL in slot t."""
    found, row = np.zeros_like(laws.q), row_of(y[:t])
    q, gap = laws.q[row], np.log(laws.q[row] / laws.p[row])
    found[row] = q * (gap - (q * gap).sum())
    return found


def exact(laws):
    """The gradient of the reverse KL over whole answers; that of their number, 1, is 0."""
    total = np.zeros_like(laws.q)
    for y in answers():
        own = chance(laws.q, y)
        gap = np.log(own / chance(laws.p, y))
        total += own * gap * sum(score(laws.q, y, t) for t in range(len(y)))
    return total


def by_hand(laws, mix=0.0, discount=1.0, normalise=False, current=False, clip=np.inf):
    """The mean of the estimate over answers of the mixture, term by term."""
    total, mixture = np.zeros_like(laws.q), mix * laws.p + (1 - mix) * laws.q
    for y in answers():
        mine = np.zeros_like(laws.q)
        own = [[law[row_of(y[:t]), y[t]] for t in range(len(y))] for law in (*laws, mixture)]
        rewards = [np.clip(np.log(p / q), -clip, clip) for q, p, _ in zip(*own, strict=True)]
        for t in range(len(y)):
            terms = [
                discount ** (s - t) * rewards[s] for s in range(t if current else t + 1, len(y))
            ]
            later = sum(terms) / (max(len(terms), 1) if normalise else 1)
            weight = own[0][t] / own[2][t]
            mine += single_step(laws, y, t) - weight * later * score(laws.q, y, t)
        total += chance(mixture, y) * mine
    return total


def expected(tables, mix=0.0, **options):
    """The same from the library, on all answers at once."""
    with jax.enable_x64(True):
        texts = answers()
        there = jnp.array([[t < len(y) for t in range(LENGTH)] for y in texts])
        tokens = jnp.array([[*y, *[EOS] * (LENGTH - len(y))] for y in texts])
        rows = jnp.array([[row_of(y[: min(t, len(y) - 1)]) for t in range(LENGTH)] for y in texts])
        laws = Laws(*(softmax(x) for x in tables))
        often = jnp.array([chance(mix * laws.p + (1 - mix) * laws.q, y) for y in texts])

        def value(table):
            def one(rows, tokens, there):
                given = jnp.asarray(tables[1])[rows], table[rows], tokens, there
                return minillm.policy_gradient(
                    *(x[None] for x in given), teacher_mix=mix, **options
                )[0]

            return often @ jax.vmap(one)(rows, tokens, there)

        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(value))(tables[0]))


def test_the_expected_gradient_is_that_of_the_reverse_kl_of_answers(tables):
    laws = Laws(*(softmax(x) for x in tables))
    assert sum(chance(laws.q, y) for y in answers()) == pytest.approx(1)
    value, gradient = expected(tables)
    np.testing.assert_allclose(gradient, exact(laws), rtol=1e-12, atol=1e-14)
    whole = sum(
        chance(laws.q, y) * np.log(chance(laws.q, y) / chance(laws.p, y)) for y in answers()
    )
    np.testing.assert_allclose(value, whole, rtol=1e-12)
    # Which no single step alone is.
    alone = expected(tables, discount=0.0)[1]
    assert np.abs(alone - exact(laws)).max() > 0.01
    np.testing.assert_array_equal(alone, expected(tables, reward_scale=0.0)[1])


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"mix": 0.2}, {}),
        ({"normalise": True}, {"normalize_length": True}),
        ({"discount": 0.7, "current": True}, {"discount": 0.7, "count_current": True}),
        ({"mix": 0.4, "normalise": True, "current": True, "clip": 0.5},
         {"normalize_length": True, "count_current": True, "reward_clip": 0.5}),
    ],
)  # fmt: skip
def test_each_stabiliser_is_what_it_says(tables, options, given):
    laws = Laws(*(softmax(x) for x in tables))
    renamed = {n: v for n, v in options.items() if n in ("mix", "discount")}
    found = expected(tables, **renamed, **{n: v for n, v in given.items() if n != "discount"})[1]
    np.testing.assert_allclose(found, by_hand(laws, **options), rtol=1e-11, atol=1e-14)


def test_a_token_counted_twice_is_the_single_step_twice(tables):
    """Why a token's own reward is not in its sum by default."""
    laws = Laws(*(softmax(x) for x in tables))
    twice = expected(tables, count_current=True)[1] - exact(laws)
    np.testing.assert_allclose(twice, expected(tables, discount=0.0)[1], rtol=1e-10, atol=1e-13)


def test_weights_of_tokens():
    log_p, log_q = jnp.log(jnp.array([[0.9, 0.1], [1e-9, 0.5]]))
    np.testing.assert_array_equal(minillm.importance(log_p, log_q, 0.0), 1.0)
    found = minillm.importance(log_p, log_q, 0.2)
    np.testing.assert_allclose(found[1], 0.5 / (0.8 * 0.5 + 0.2 * 0.1), rtol=1e-6)
    assert (found <= 1 / 0.8).all() and found[0] < 1e-8


# ---------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    ("phi", "reference", "loss", "wanted"),
    [
        (0.0, np.inf, 3.0, (0.0, 3.0)),  # the first is what others are held against
        (0.0, 2.0, 1.0, (0.0, 2.0)),  # a lower one does not lower it
        (0.0, 2.0, 2.05, (0.0, 2.0)),
        (0.0, 2.0, 2.125, (0.1, 2.125)),
        (0.3, 2.125, 2.2, (0.3, 2.125)),
        (0.3, 2.125, 4.0, (0.4, 4.0)),  # by a tenth, however far
        (0.95, 2.0, 3.0, (1.0, 3.0)),
    ],
)
def test_phi_rises_with_the_validation_loss(phi, reference, loss, wanted):
    before = distillm.Policy(jnp.float32(phi), jnp.float32(reference))
    found = distillm.adapted(before, jnp.float32(loss), 0.1)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("u", "phi", "done", "full", "wanted"),
    [
        (0.0, 0.0, 0.0, False, distillm.DATA),  # at the start nothing is written
        (0.3, 0.4, 0.0, True, distillm.WRITE),
        (0.3, 0.4, 0.5, True, distillm.REUSE),  # 0.4 x 0.5 is less
        (0.1, 0.4, 0.5, True, distillm.WRITE),
        (0.3, 0.4, 0.5, False, distillm.WRITE),  # until the buffer is full
        (0.5, 0.4, 0.0, False, distillm.DATA),
        (0.5, 0.4, 0.0, True, distillm.DATA),
        (0.01, 1.0, 1.0, True, distillm.REUSE),  # at the end nothing is
    ],
)
def test_where_texts_come_from(u, phi, done, full, wanted):
    assert distillm.origin_of(*map(jnp.float32, (u, phi, done)), jnp.bool_(full)) == wanted


def test_a_buffer_forgets_the_oldest():
    def texts(*numbers):
        x = jnp.array(numbers)
        return distillm.Texts({"images": x[:, None]}, x[:, None], x[:, None] > 0)

    buffer = distillm.Buffer(texts(0, 0, 0, 0, 0), jnp.int32(0))
    push = jax.jit(distillm.pushed)
    last = []
    for first in range(1, 30, 3):
        numbers = range(first, first + 3)
        buffer = push(buffer, texts(*numbers))
        last = [*last, *numbers][-5:]
        assert sorted(buffer.texts.answer[:, 0].tolist()) == [*[0] * (5 - len(last)), *last]
        assert min(int(buffer.written), 5) == len(last) and buffer.written < 10
    keys = jax.random.split(jax.random.key(0), 64)
    found = distillm.drawn(buffer, keys)
    assert set(found.answer[:, 0].tolist()) == set(last)
    np.testing.assert_array_equal(found.answer, found.rows["images"])
    # A key draws the same whatever stands beside it.
    np.testing.assert_array_equal(distillm.drawn(buffer, keys[5:7]).answer, found.answer[5:7])


# ---------------------------------------------------------------------------- models


class Ready(NamedTuple):
    """A task of one tokenizer, both models, fresh, and a batch."""

    task: Any
    pair: Any
    frozen: Any
    batch: Any


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    resolved = settings.resolve(configs.load("genrecal:smoke,baselines=,tokenizers=one"))
    task = resolved.family.load(resolved, tmp_path_factory.mktemp("task"), lambda: False).task
    batch = draw(task.batches(8), task.examples.load(), jax.random.key(0))
    keys = dict(zip(("teacher", "student"), jax.random.split(jax.random.key(1)), strict=True))
    # Away from the start, where a model hardly looks at its images.
    frozen = {
        side: jax.tree.map(
            lambda x: 6 * x if x.ndim > 1 else x, jax.jit(getattr(task, f"{side}_model").init)(key)
        )
        for side, key in keys.items()
    }
    return Ready(task, task.pair(batch), frozen, batch)


@pytest.mark.slow
def test_two_models_write_one_text(ready):
    """Each token is drawn from the mixture of what both say of it, read with caches apart."""
    task, pair, frozen, _ = ready

    def write(keys):
        return task.student_model.generate(
            frozen["student"],
            pair.images,
            *pair.student[:2],
            length=pair.student.answer.shape[1],
            keys=keys,
            mixed=Mixed(task.teacher_model.writer(frozen["teacher"]), 0.3),
        )

    made = jax.jit(write)(pair.keys)
    side = pair.student._replace(answer=made.tokens, answer_there=made.there)
    q, p = (
        np.asarray(
            jax.nn.softmax(
                answer_logits(getattr(task, f"{name}_model"), frozen[name], pair.images, side)
            ),
            np.float64,
        )
        for name in ("student", "teacher")
    )
    there = np.asarray(made.there)
    ids = np.asarray(made.tokens)[..., None]
    said = np.log(np.take_along_axis(0.3 * p + 0.7 * q, ids, -1)[..., 0])
    np.testing.assert_allclose(np.asarray(made.log_probs)[there], said[there], atol=1e-4)
    apart = np.log(np.take_along_axis(q, ids, -1)[..., 0])
    assert np.abs(said - apart)[there].max() > 0.05
    alone = written(task.student_model, frozen["student"], pair.images, pair.student, pair.keys)
    assert (alone.answer != side.answer).any()


@pytest.mark.parametrize("method", [minillm, distillm])
def test_two_tokenizers_are_refused(ready, method):
    prints = {"teacher": "one", "student": "other"}
    with pytest.raises(InputError, match="under which one id is two things; give student"):
        method.recipe(
            ready.task._replace(tokenizer_sha256=prints), **keywords.defaults(method.recipe)
        )
    with pytest.raises(InputError, match=r"method\.weight and method\.sft are both 0"):
        method.recipe(ready.task, weight=0.0, sft=0.0)


def test_minillm_comes_to_rest_at_the_teacher(ready):
    """Its expected gradient is 0 there, and with no rewards each of its draws' is."""
    task, pair, frozen, batch = ready
    task = task._replace(student_model=task.teacher_model)
    recipe = minillm.recipe(task, sft=0.0, steps=4)
    step = jax.jit(recipe.method.step)
    given = {side: frozen["teacher"] for side in ("teacher", "student")}
    state = recipe.method.init(jax.random.key(0), given, batch)
    _, same = step(state, given, batch, jax.random.key(0))
    other = state._replace(params=jax.tree.map(lambda x: 0.9 * x, state.params))
    after, apart = step(other, given, batch, jax.random.key(0))
    assert abs(same["reverse_kl"]) < 1e-6 < apart["reverse_kl"]
    assert same["grad_norm"] < 1e-2 * apart["grad_norm"]
    assert 1 <= apart["written_tokens"] <= pair.student.answer.shape[1]
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, other)


@pytest.fixture(scope="module")
def stepped(ready):
    """DistiLLM's method with its compiled step, its first state, and what is frozen."""
    task = ready.task._replace(start=Part(ready.task.start.shapes, lambda: ready.frozen))
    recipe = distillm.recipe(
        task, steps=4, batch_size=8, capacity=12, own_texts=0.5, validate_every=2, validate_on=8,
    )  # fmt: skip
    frozen = jax.tree.map(jnp.asarray, recipe.frozen.load())
    assert jax.tree.map(jnp.shape, frozen) == jax.tree.map(jnp.shape, recipe.frozen.shapes)
    state = jax.jit(recipe.method.init)(jax.random.key(0), frozen, ready.batch)
    return jax.jit(recipe.method.step), state, frozen


def key_with(low, high):
    """A step's key whose draw lies between."""
    keys = (jax.random.key(i) for i in range(1000))
    return next(key for key in keys if low < jax.random.uniform(key) < high)


@pytest.mark.slow
def test_a_step_of_distillm_learns_from_the_texts_it_chose(ready, stepped):
    task, pair, models, batch = ready
    step, state, frozen = stepped

    @jax.jit
    def found(side, images):
        said, own = (
            answer_logits(getattr(task, f"{n}_model"), models[n], images, side)
            for n in ("teacher", "student")
        )
        far = losses.skew_reverse_kl(said, own, side.answer_there)
        sft = losses.cross_entropy(side.answer, own, side.answer_there)
        return far[0] / far[1], sft[0] / sft[1]

    # The data: as if nothing were written.
    after, metrics = step(state, frozen, batch, key_with(0.6, 1.0))
    assert metrics["own_texts"] == 0 and after.buffer.written == 0 and after.step == 1
    plain, sft = found(pair.student, pair.images)
    np.testing.assert_allclose(metrics["skew_reverse_kl"], plain, rtol=1e-5)
    # The validation was before the step, on 8 of the 40 questions.
    asked = task.validation.load()["validation"]
    own = task.pair({name: jnp.asarray(x[:8]) for name, x in asked.items()})
    wanted = found(own.student, own.images)[1]
    np.testing.assert_allclose(metrics["validation_reference"], wanted, rtol=1e-5)
    # Written now: into the buffer, and learned from.
    after, metrics = step(state, frozen, batch, key_with(0.0, 0.4))
    assert metrics["own_texts"] == 1 and after.buffer.written == 8
    texts = after.buffer.texts
    assert texts.rows["images"].dtype == jnp.uint8 and not texts.there[8:].any()
    np.testing.assert_array_equal(texts.rows["images"][:8], batch["images"])
    side = pair.student._replace(answer=texts.answer[:8], answer_there=texts.there[:8])
    wrote, _ = found(side, pair.images)
    np.testing.assert_allclose(metrics["skew_reverse_kl"], wrote, rtol=1e-5)
    assert abs(wrote - plain) > 1e-4
    # And again: from a full buffer, whose questions are others than the batch's.
    first = lambda tree, n: jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (n, *x.shape[1:])), tree)  # noqa: E731
    full = distillm.Buffer(first(texts, 12), jnp.int32(12))
    again = state._replace(buffer=full, step=jnp.int32(3))
    after, metrics = step(again, frozen, batch, key_with(0.2, 0.45))
    assert metrics["own_texts"] == 1 and after.buffer.written == 12
    wanted, _ = found(first(side, 8), first(pair.images, 8))
    np.testing.assert_allclose(metrics["skew_reverse_kl"], wanted, rtol=1e-5)
    assert abs(wanted - wrote) > 1e-4
    # The cross-entropy is that of the batch, whatever is learned from beside it.
    np.testing.assert_allclose(metrics["sft"], sft, rtol=1e-5)


def test_a_buffer_holds_a_batch(ready):
    with pytest.raises(InputError, match=r"capacity=4 texts are less than method\.batch_size=8"):
        distillm.recipe(ready.task, capacity=4, batch_size=8)


@pytest.mark.slow
def test_eight_devices_write_what_one_does(ready):
    task = ready.task._replace(start=Part(ready.task.start.shapes, lambda: ready.frozen))
    options = {"batch_size": 8, "clip": 1e-6, "steps": 4}  # Adam is linear in gradients so small
    recipes = {
        "minillm": minillm.recipe(task, **options),
        "distillm": distillm.recipe(
            task, own_texts=1.0, capacity=8, validate_every=2, validate_on=8, **options
        ),
    }
    given = {name: made.frozen.load() for name, made in recipes.items()}
    tested = together({name: made.method for name, made in recipes.items()})
    data = task.examples.load()
    records, state = run_on(1, "jit", tested, data, given, 3)
    assert {r["distillm/own_texts"] for _, r in records} == {1.0}
    for backend in ("jit", "pmap"):
        others, other = run_on(8, backend, tested, data, given, 3)
        wrong = {
            **differences([v for _, v in others], [v for _, v in records], 2e-4),
            **differences(other, state, 2e-4),
        }
        assert not wrong, f"{backend}: {wrong}"


@pytest.mark.slow
def test_runs_that_are_stopped_end_with_the_same_bits(tmp_path):
    config = configs.load("genrecal:smoke,method=minillm,baselines=distillm")
    jaxdistill.train(config, tmp_path / "once")
    for left in itertools.chain([2, 3, 5, 4], itertools.repeat(6)):
        asked = itertools.count()
        try:
            jaxdistill.train(config, tmp_path / "stopped", lambda a=asked, n=left: next(a) >= n)
            break
        except Interrupted:
            continue
    for folder in ("artifacts", "baselines/distillm/artifacts"):
        one, two = (
            weights.load(tmp_path / where / folder, "student")[0] for where in ("once", "stopped")
        )
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), one, two))
