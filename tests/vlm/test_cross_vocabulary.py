"""Losses across tokenizers against loops in NumPy, in float64, and what each promises."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.vlm import losses, vocabularies
from jaxdistill.vlm.align import align
from jaxdistill.vlm.groups import Groups, whole_text

# A text with a character that both sides split, and a BOS of the teacher alone.
TEACHER = [None, b"a", b"b", b"\xc3", b"\xa9", b" ", b" a", "eos"]
STUDENT = [b"ab", b"\xc3\xa9", b"a", b" ", b"b", b" a", "eos"]
ONE = [0, 1, 2, 3, 4, 6, 2, 7]  # <bos> a b Ã © " a" b EOS
OTHER = [0, 1, 5, 4, 6]  # ab é " a" b EOS


# The programs are many and run for milliseconds.


@pytest.fixture(autouse=True)
def precise():
    with jax.enable_x64(True):
        yield


def projection():
    """Three of the teacher's tokens for each of the student's, twice the same in one row."""
    numbers = np.random.default_rng(9)
    ids = np.stack([numbers.permutation(8)[:3] for _ in range(7)])
    ids[2, 1] = ids[2, 0]
    return losses.Projection(jnp.asarray(ids), jnp.asarray(numbers.dirichlet(np.ones(3), 7)))


def drawn(seed=0):
    """Logits of a text on both sides, and all that losses need to know of it."""
    numbers = np.random.default_rng(seed)
    pieces = [TEACHER[t] for t in ONE], [STUDENT[t] for t in OTHER]
    of = lambda ids: jnp.asarray(np.array(ids, np.int32))  # noqa: E731
    match = vocabularies.same_pieces(TEACHER, STUDENT)
    return types.SimpleNamespace(
        teacher=jnp.asarray(numbers.normal(size=(8, 8))),
        student=jnp.asarray(numbers.normal(size=(5, 7))),
        teacher_tokens=of(ONE),
        student_tokens=of(OTHER),
        teacher_mask=of(ONE) > 0,
        student_mask=of(OTHER) >= 0,
        groups=Groups(*map(of, align(*pieces))),
        spelling=Groups(*map(of, align(*pieces, specials=False))),
        match=tuple(map(of, match)),
        starts=[jnp.asarray(vocabularies.starts_with(p, b" ")) for p in (TEACHER, STUDENT)],
        heads=[of(vocabularies.first_bytes(p, ["eos"])) for p in (TEACHER, STUDENT)],
        projection=projection(),
        partners=of([-1, -1, 5, 6, 7]),
        nearest=of(vocabularies.nearest_pieces(TEACHER, STUDENT)),
    )


def call(name, text, student=None, **options):
    student = text.student if student is None else student
    tokens = text.teacher_tokens, text.student_tokens
    if name in ("uld", "multilevel_ot"):
        arguments = text.teacher_mask, text.student_mask
    elif name == "mined":
        own = text.student_tokens, text.student_mask
        arguments = (*own, text.partners, text.nearest)
    elif name == "xtoken_pkl":
        arguments = text.groups, text.projection
    elif name == "next_byte_kl":
        arguments = (text.groups, *text.heads)
    elif name == "gold":
        arguments = (*tokens, text.spelling)
        options.setdefault("match", text.match)
    else:
        arguments = (*tokens, text.groups)
        if options.get("ends", "none") != "none":
            options |= {"teacher_boundary": text.starts[0], "student_boundary": text.starts[1]}
    return getattr(losses, name)(text.teacher, student, *arguments, **options)


def result(name, text, student=None, **options):
    """The same, compiled as a whole, which takes less time than operation by operation."""
    return jax.jit(lambda: call(name, text, student, **options))()


CALLS = [
    ("uld", {}),
    ("multilevel_ot", {}),
    ("mined", {}),
    ("gold", {}),
    ("gold", {"match": None}),
    ("gold", {"merge": "observed"}),
    ("xtoken_pkl", {}),
    ("next_byte_kl", {}),
    ("alm", {}),
    ("alm", {"ends": "after"}),
    ("alm", {"ends": "both"}),
]
EVERY = pytest.mark.parametrize(("name", "options"), CALLS)


def probabilities(logits, temperature=1.0):
    e = np.exp(np.asarray(logits) / temperature)
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def l1_of_sorted(p, q):
    wide = max(len(p), len(q))
    p, q = (sorted([*x, *[0.0] * (wide - len(x))], reverse=True) for x in (p, q))
    return sum(abs(a - b) for a, b in zip(p, q, strict=True))


def slots(ids, group):
    return [t for t, g in enumerate(np.asarray(ids)) if g == group]


def test_the_text_has_the_groups_that_it_should():
    text = drawn()
    assert text.groups.teacher.tolist() == [-1, 0, 0, 1, 1, 2, 3, 4]
    assert text.groups.student.tolist() == [0, 1, 2, 3, 4]
    assert text.spelling.teacher.tolist() == [-1, 0, 0, 1, 1, 2, 3, -1]


def test_uld_pairs_valid_slots_in_order():
    text = drawn()
    p, q = probabilities(text.teacher)[1:6], probabilities(text.student)
    total, count = result("uld", text)
    wanted = sum(l1_of_sorted(*rows) for rows in zip(p, q, strict=True))
    np.testing.assert_allclose([total, count], [wanted, 5], rtol=1e-12)


def test_multilevel_ot_is_its_three_terms():
    text = drawn()

    def rows(x):
        x = np.asarray(x)
        p = probabilities(x / (x.std(-1, ddof=1, keepdims=True) + 1e-4))
        return p[:, np.argsort(-p.sum(0))]

    p, q = rows(text.teacher[1:6]), rows(text.student)
    by_slot = np.abs(p - np.pad(q, ((0, 0), (0, 1)))).sum()
    p2, q2 = probabilities(p[:, :7]), probabilities(q)
    crossed = -(p2 * np.log(q2)).sum()
    a, b = (probabilities(x[:, :7], 2.0) for x in (q, p))
    cost = np.abs(a[:, None] - b[None]).sum(-1)
    plan = np.exp(-cost / 0.1)
    for _ in range(10):
        plan = plan / plan.sum(1, keepdims=True)
        plan = plan / plan.sum(0, keepdims=True)
    total, count = result("multilevel_ot", text, entropy_weight=0.3, sequence_weight=0.7)
    wanted = by_slot + 0.3 * crossed + 0.7 * (plan * cost).sum()
    np.testing.assert_allclose([total, count], [wanted, 5], rtol=1e-10)
    few = result("multilevel_ot", text, ranks=2, entropy_weight=0.0, sequence_weight=0.0)[0]
    np.testing.assert_allclose(few, np.abs(p[:, :2] - q[:, :2]).sum(), rtol=1e-10)


def test_mined_moves_what_the_teacher_says_to_the_nearest_tokens():
    text = drawn()
    total, count = result("mined", text, temperature=2.0)
    q = probabilities(text.student, 2.0)
    wanted = -math.log(q[0, OTHER[0]]) - math.log(q[1, OTHER[1]])
    nearest = text.nearest.tolist()
    for j, i in ((2, 5), (3, 6), (4, 7)):
        logits = [
            max([float(text.teacher[i, a]) for a in range(8) if nearest[a] == b], default=-1e5)
            for b in range(7)
        ]
        wanted += kl(probabilities(logits, 2.0), q[j])
    np.testing.assert_allclose([total, count], [wanted, 5], rtol=1e-10)


@pytest.mark.parametrize("merge", ["bayesian", "observed"])
@pytest.mark.parametrize("hybrid", [True, False])
def test_gold_merges_groups_as_it_says(merge, hybrid):
    text = drawn()

    def merged(logits, tokens, ids, group):
        p, own = probabilities(logits), slots(ids, group)
        if merge == "bayesian":
            return p[own[-1]] * math.prod(p[t, tokens[t]] for t in own[:-1])
        return p[own[0] + 1] * math.prod(p[t + 1, tokens[t]] for t in own[1:])

    wanted, ours, theirs = 0.0, *(ids.tolist() for ids in text.match)
    assert len(ours) == 5  # a, b, space, " a", EOS
    for group in range(4):
        p = merged(text.teacher, ONE, text.spelling.teacher, group)
        q = merged(text.student, OTHER, text.spelling.student, group)
        if not hybrid:
            wanted += l1_of_sorted(p, q)
            continue
        common = 0.0
        for i, j in zip(ours, theirs, strict=True):
            m = (p[i] + q[j]) / 2
            common += (p[i] * math.log(p[i] / m) + q[j] * math.log(q[j] / m)) / 2
        share = 5 / 8
        rest = l1_of_sorted(np.delete(p, ours), np.delete(q, theirs))
        wanted += share * common + (1 - share) * rest
    options = {} if hybrid else {"match": None}
    total, count = result("gold", text, merge=merge, **options)
    np.testing.assert_allclose([total, count], [wanted, 4], rtol=1e-10)


def test_gold_knows_the_size_of_a_padded_vocabulary():
    text = drawn()
    wanted = result("gold", text)[0]
    text.teacher = jnp.pad(text.teacher, ((0, 0), (0, 4)), constant_values=-jnp.inf)
    np.testing.assert_allclose(result("gold", text, teacher_size=8)[0], wanted, rtol=1e-12)
    # The weight of the common part is a share of the width otherwise, as in the released code.
    assert abs(result("gold", text)[0] - wanted) > 1e-3 * wanted


def test_pkl_compares_projected_means():
    text = drawn()
    p, q = probabilities(text.teacher, 2.0), probabilities(text.student, 2.0)
    columns, spread = [0, 2, 5], np.zeros((7, 8))
    for row, ids, weights in zip(spread, *map(np.asarray, text.projection), strict=True):
        np.add.at(row, ids, weights)
    for chosen in (list(range(8)), columns):
        wanted = 0.0
        for group in range(5):
            own = slots(text.groups.teacher, group)
            log_t = np.log(p[own]).mean(0)[chosen]
            s = (q[slots(text.groups.student, group)] @ spread).mean(0)[chosen]
            wanted += (np.exp(log_t) * (log_t - np.log(s / s.sum() + 1e-10))).sum()
        options = {} if len(chosen) == 8 else {"columns": jnp.asarray(columns)}
        total, count = result("xtoken_pkl", text, temperature=2.0, **options)
        np.testing.assert_allclose([total, count], [wanted, 5], rtol=1e-10)


def test_next_bytes_are_sums_over_tokens():
    text, wanted = text_for("next_byte_kl"), 0.0
    sides = (
        (probabilities(text.teacher), text.groups.teacher, np.asarray(text.heads[0])),
        (probabilities(text.student), text.groups.student, np.asarray(text.heads[1])),
    )
    for group in range(5):
        p, q = (
            [rows[slots(ids, group)[0]][heads == byte].sum() for byte in (32, 97, 98, 195, 256)]
            for rows, ids, heads in sides
        )
        wanted += kl(p, q)
    total, count = result("next_byte_kl", text)
    np.testing.assert_allclose([total, count], [wanted, 5], rtol=1e-10)


FORMS = {
    "naive": ({}, [[0], [1], [2], [3], [4]]),
    "after": ({"ends": "after"}, [[0, 1], [2, 3], [4]]),
    "both": ({"ends": "both"}, [[0, 1], [2, 3], [4]]),
    "whole": ({}, [[0, 1, 2, 3, 4]]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tau", [100.0, 1.0])
def test_alm_is_the_cross_entropy_of_chunks(form, tau):
    text = drawn()
    options, chunks = FORMS[form]
    sides = [
        (probabilities(text.teacher), ONE, text.groups.teacher, np.asarray(text.starts[0])),
        (probabilities(text.student), OTHER, text.groups.student, np.asarray(text.starts[1])),
    ]
    wanted = 0.0
    for number, chunk in enumerate(chunks):
        logs = []
        for p, tokens, ids, starts in sides:
            own = [t for g in chunk for t in slots(ids, g)]
            value = sum(math.log(p[t, tokens[t]]) for t in own)
            if "ends" in options and number + 1 < len(chunks):
                value += math.log(p[own[-1] + 1][starts].sum())
            if options.get("ends") == "both" and number:
                value -= math.log(p[own[0]][starts].sum())
            logs.append(value / tau - 1e-6)
        u, v = logs
        wanted -= math.exp(u) * v + (1 - math.exp(u)) * math.log(1 - math.exp(v))
    if form == "whole":
        text.groups = whole_text(text.groups)
    elif form != "naive":
        text.groups = losses.by_boundary(text.groups, text.student_tokens, text.starts[1])
    total, count = result("alm", text, tau=tau, **options)
    np.testing.assert_allclose([total, count], [wanted, len(chunks)], rtol=1e-8)


def test_chunks_end_where_the_teacher_says_that_a_boundary_is_likely():
    text = drawn()
    p = probabilities(text.teacher)[:, np.asarray(text.starts[0])].sum(1)
    likely = p[[3, 5, 6, 7]]  # before groups 1 to 4
    threshold = float(np.sort(likely)[1:3].mean())
    found = losses.by_teacher_boundary(text.groups, text.teacher, text.starts[0], threshold)
    number = np.concatenate([[0], np.cumsum(likely > threshold)])
    assert found.student.tolist() == number.tolist()
    assert found.teacher.tolist() == [-1, *number[[0, 0, 1, 1, 2, 3, 4]].tolist()]


def test_another_divergence_can_be_plugged_in():
    text = drawn()
    total, _ = result("alm", text, divergence=lambda u, v: jnp.abs(u - v))
    p, q = probabilities(text.teacher), probabilities(text.student)
    wanted = sum(
        abs(
            sum(math.log(p[t, ONE[t]]) for t in slots(text.groups.teacher, g))
            - sum(math.log(q[t, OTHER[t]]) for t in slots(text.groups.student, g))
        )
        for g in range(5)
    )
    np.testing.assert_allclose(100 * total, wanted, rtol=1e-9)


def dskd_side(seed, n, d, v, tokens):
    numbers = np.random.default_rng(seed)
    of = lambda *shape: jnp.asarray(numbers.normal(size=shape))  # noqa: E731
    mask = jnp.arange(n) < len(tokens)
    tokens = jnp.asarray([*tokens, *[0] * (n - len(tokens))])
    return losses.States(of(n, d), of(n, d), of(n, d), tokens, mask, of(d, v))


def dskd_text():
    numbers = np.random.default_rng(5)
    of = lambda *shape: jnp.asarray(numbers.normal(size=shape) / 2)  # noqa: E731
    maps = losses.Projections(of(4, 6), of(3, 2), of(2, 3))
    teacher = dskd_side(1, 5, 3, 6, [1, 2, 5, 0])
    return teacher, dskd_side(2, 4, 2, 4, [1, 3, 0]), maps


def test_dskd_is_its_three_terms():
    teacher, student, maps = dskd_text()
    t = losses.States(*(np.asarray(x)[:4] for x in teacher[:5]), np.asarray(teacher.head))
    s = losses.States(*(np.asarray(x)[:3] for x in student[:5]), np.asarray(student.head))
    keys = np.concatenate([t.inputs, t.targets], 1)
    scores = np.concatenate([s.inputs, s.targets], 1) @ np.asarray(maps.query)
    scores = scores @ (keys / keys.std()).T / math.sqrt(6)
    values = (t.hidden / t.hidden.std() + t.targets / t.targets.std()) @ np.asarray(maps.to_student)
    read = probabilities(scores) @ values @ s.head
    own, wanted, known = s.hidden @ s.head, 0.0, 0
    for j, token in enumerate(s.tokens):
        wanted -= math.log(probabilities(read[j])[token])
        if np.argmax(read[j]) == token:
            known += 1
            wanted += kl(probabilities(read[j], 2.0), probabilities(own[j], 2.0))
    assert 0 < known < 3
    back = probabilities(scores.T) @ (s.hidden @ np.asarray(maps.to_teacher)) @ t.head
    for i in range(4):
        wanted += kl(probabilities(t.hidden[i] @ t.head, 2.0), probabilities(back[i], 2.0))
    total, count = jax.jit(losses.dskd_cma)(teacher, student, maps)
    np.testing.assert_allclose([total, count], [wanted, 3], rtol=1e-10)


def test_dskd_trains_hidden_states_and_maps_alone():
    teacher, student, maps = dskd_text()
    loss = jax.jit(lambda *a: losses.dskd_cma(*a)[0])
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2), allow_int=True))(teacher, student, maps)
    size = lambda x: 0.0 if x.dtype == jax.dtypes.float0 else np.abs(x).max()  # noqa: E731
    assert not any(map(size, gradients[0]))
    assert [name for name, x in gradients[1]._asdict().items() if size(x)] == ["hidden"]
    assert all(map(size, gradients[2]))
    np.testing.assert_array_equal(gradients[1].hidden[3], 0.0)  # padding
    other = loss(
        teacher._replace(hidden=teacher.hidden.at[4].set(9.0)),
        student._replace(targets=student.targets.at[3].set(9.0)),
        maps,
    )
    np.testing.assert_allclose(other, loss(teacher, student, maps), rtol=1e-12)


# ------------------------------------------------------------------ what all of them promise


def text_for(name, seed=0):
    """A text on which the loss is finite."""
    text = drawn(seed)
    if name == "next_byte_kl":  # the teacher's split character is infinitely unlikely elsewhere
        text.teacher = text.teacher.at[:, jnp.array([0, 4])].set(-jnp.inf)
    return text


def compiled(name, text, **options):
    """`(teacher, student) -> ((value, count), gradients)` with all else of a text."""

    def of(teacher, student):
        given = types.SimpleNamespace(**{**vars(text), "teacher": teacher})
        return call(name, given, student, **options)

    return jax.jit(jax.value_and_grad(of, argnums=(0, 1), has_aux=True))


@pytest.fixture(scope="module")
def functions():
    """The losses on the text of seed 0, each compiled once."""
    made = {}

    def get(name, options):
        key = name, str(options)
        if key not in made:
            made[key] = compiled(name, text_for(name), **options)
        return made[key]

    return get


@EVERY
def test_gradients_are_those_of_differences(functions, name, options):
    text, of = text_for(name), functions(name, options)
    _, (into_teacher, gradient) = of(text.teacher, text.student)
    np.testing.assert_array_equal(into_teacher, 0.0)
    assert np.abs(gradient).max() > 1e-5
    for place in ((0, 0), (1, 4), (3, 2), (4, 6)):
        step = np.zeros(text.student.shape)
        step[place] = 1e-6
        after, before = (of(text.teacher, text.student + s * step)[0][0] for s in (1, -1))
        wanted = (after - before) / 2e-6
        np.testing.assert_allclose(gradient[place], wanted, rtol=1e-5, atol=1e-8)


@EVERY
def test_padding_of_text_and_vocabularies_changes_nothing(functions, name, options):
    text = text_for(name)
    (wanted, count), (_, gradient) = functions(name, options)(text.teacher, text.student)
    if name == "gold":
        options = {**options, "teacher_size": 8}
    longer = types.SimpleNamespace(**vars(text))
    for side in ("teacher", "student"):
        x = np.pad(getattr(text, side), ((0, 3), (0, 0)), constant_values=5.0)
        x = np.pad(x, ((0, 0), (0, 2)), constant_values=-np.inf)
        setattr(longer, side, jnp.asarray(x))
        for suffix in ("tokens", "mask"):
            x = getattr(text, f"{side}_{suffix}")
            setattr(longer, f"{side}_{suffix}", jnp.asarray(np.pad(x, (0, 3))))
    grow = lambda x, n, v: jnp.asarray(np.pad(x, (0, n), constant_values=v))  # noqa: E731
    longer.groups, longer.spelling = (
        Groups(*(grow(ids, 3, -1) for ids in groups)) for groups in (text.groups, text.spelling)
    )
    longer.partners, longer.nearest = grow(text.partners, 3, -1), grow(text.nearest, 2, -1)
    longer.starts = [grow(x, 2, False) for x in text.starts]
    longer.heads = [grow(x, 2, 511) for x in text.heads]
    longer.projection = losses.Projection(*(np.pad(x, ((0, 2), (0, 1))) for x in text.projection))
    found, (_, grown) = compiled(name, longer, **options)(longer.teacher, longer.student)
    np.testing.assert_allclose(found, (wanted, count), rtol=1e-12)
    np.testing.assert_allclose(grown[:5, :7], gradient, rtol=1e-9, atol=1e-13)
    outside = np.array(grown)
    outside[:5, :7] = 0.0
    np.testing.assert_array_equal(outside, 0.0)


@EVERY
def test_other_ids_for_the_same_tokens_change_nothing(functions, name, options):
    text = text_for(name)
    wanted, _ = functions(name, options)(text.teacher, text.student)
    orders = [np.random.default_rng(i).permutation(n) for i, n in enumerate((8, 7))]
    places = [np.argsort(order) for order in orders]  # where a token went
    of = lambda x, i: jnp.asarray(np.asarray(x)[..., orders[i]])  # noqa: E731
    text.teacher, text.student = of(text.teacher, 0), of(text.student, 1)
    text.teacher_tokens = jnp.asarray(places[0][text.teacher_tokens])
    text.student_tokens = jnp.asarray(places[1][text.student_tokens])
    text.starts = [of(x, i) for i, x in enumerate(text.starts)]
    text.heads = [of(x, i) for i, x in enumerate(text.heads)]
    ids, weights = (np.asarray(x)[orders[1]] for x in text.projection)
    text.projection = losses.Projection(jnp.asarray(places[0][ids]), jnp.asarray(weights))
    nearest = np.asarray(text.nearest)[orders[0]]
    text.nearest = jnp.asarray(np.where(nearest < 0, -1, places[1][nearest]))
    text.match = tuple(jnp.asarray(places[i][x]) for i, x in enumerate(text.match))
    found = jax.jit(lambda: call(name, text, **options))()
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize(("name", "options"), [("uld", {}), ("gold", {"match": None})])
def test_what_sorts_does_not_see_which_token_it_is(name, options):
    """Any permutation of the student's probabilities, with no other change: the loss is blind."""
    text = drawn()
    rows = jnp.stack([row[np.random.default_rng(i).permutation(7)]
                      for i, row in enumerate(np.asarray(text.student))])  # fmt: skip
    found, wanted = result("uld", text, rows)[0], result("uld", text)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    text.groups = text.spelling = Groups(jnp.arange(8), jnp.arange(5))  # one token a group
    found, wanted = result(name, text, rows, **options)[0], result(name, text, **options)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [("uld", {}), ("gold", {}), ("xtoken_pkl", {}), ("mined", {}), ("alm", {"ends": "both"})],
)
def test_a_batch_is_the_sum_of_its_texts(functions, name, options):
    texts = [text_for(name, seed) for seed in range(3)]
    each = [functions(name, options)(text.teacher, text.student)[0] for text in texts]

    def one(teacher, student):
        changed = types.SimpleNamespace(**{**vars(texts[0]), "teacher": teacher})
        return call(name, changed, student, **options)

    stacked = [jnp.stack([getattr(t, side) for t in texts]) for side in ("teacher", "student")]
    found = jax.jit(losses.over_texts(one))(*stacked, weights=jnp.array([0.5, 0.0, 2.0]))
    np.testing.assert_allclose(found, np.array([0.5, 0.0, 2.0]) @ np.array(each), rtol=1e-12)
    if name == "alm":
        found = jax.jit(losses.over_texts(one))(*stacked)
        np.testing.assert_allclose(found, np.sum(each, 0), rtol=1e-12)


@EVERY
def test_half_precision_becomes_float32(name, options):
    text = drawn()
    text.teacher, text.student = (x.astype(jnp.bfloat16) for x in (text.teacher, text.student))
    found = jax.eval_shape(lambda: call(name, text, **options))
    assert [x.dtype for x in found] == [jnp.float32] * 2


def test_what_is_missing_or_unknown_is_refused():
    text = drawn()
    with pytest.raises(InputError, match="boundaries"):
        losses.alm(
            *(text.teacher, text.student, text.teacher_tokens, text.student_tokens, text.groups),
            ends="both",
        )
    with pytest.raises(InputError, match="beta"):
        call("gold", text, beta=0.0)
