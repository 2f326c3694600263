"""Losses of one vocabulary against sums written out in NumPy, in float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.vlm import losses

KL = (losses.forward_kl, losses.reverse_kl)
ALL = (*KL, losses.jsd, losses.skew_kl, losses.skew_reverse_kl, losses.total_variation)


# The programs are many and run for milliseconds.


@pytest.fixture(autouse=True)
def precise():
    with jax.enable_x64(True):
        yield


def drawn(seed=0, shape=(2, 3, 5)):
    numbers = np.random.default_rng(seed)
    teacher, student = (jnp.asarray(numbers.normal(size=shape) * 2) for _ in range(2))
    return teacher, student, jnp.asarray(numbers.uniform(size=shape[:-1]) < 0.7)


def softmax(x):
    e = np.exp(np.asarray(x) - np.max(x))
    return e / e.sum()


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mixed(p, q, a):
    return a * p + (1 - a) * q


REFERENCES = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": lambda p, q: 0.3 * kl(p, mixed(p, q, 0.3)) + 0.7 * kl(q, mixed(p, q, 0.3)),
    "skew_kl": lambda p, q: kl(p, mixed(p, q, 0.2)),
    "skew_reverse_kl": lambda p, q: kl(q, mixed(q, p, 0.2)),
    "total_variation": lambda p, q: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
    "cross_entropy": lambda p, q: -sum(a * math.log(b) for a, b in zip(p, q, strict=True)),
}
OPTIONS = {"jsd": {"beta": 0.3}, "skew_kl": {"alpha": 0.2}, "skew_reverse_kl": {"alpha": 0.2}}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sums_and_counts_are_those_of_numpy(name, temperature):
    teacher, student, mask = drawn()
    total, count = getattr(losses, name)(
        teacher, student, mask, temperature, **OPTIONS.get(name, {})
    )
    wanted = sum(
        REFERENCES[name](softmax(p / temperature), softmax(q / temperature))
        for p, q in zip(np.asarray(teacher[mask]), np.asarray(student[mask]), strict=True)
    )
    assert count == mask.sum() and total.dtype == jnp.float64
    np.testing.assert_allclose(total, wanted, rtol=1e-12)


def test_the_cross_entropy_of_tokens():
    _, student, mask = drawn()
    tokens = jnp.where(mask, 3, -100)
    total, count = losses.cross_entropy(tokens, student, mask)
    wanted = -sum(math.log(softmax(q)[3]) for q in np.asarray(student[mask]))
    np.testing.assert_allclose(total, wanted, rtol=1e-12)
    assert count == mask.sum()


@pytest.mark.parametrize("loss", ALL)
def test_nothing_is_lost_between_equal_models(loss):
    teacher, _, mask = drawn()
    value, gradient = jax.value_and_grad(lambda q: loss(teacher, q, mask)[0])(teacher)
    np.testing.assert_allclose(value, 0.0, atol=1e-12)
    # Total variation has a kink there.
    if loss is not losses.total_variation:
        np.testing.assert_allclose(gradient, 0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("skewed", "plain"),
    [(losses.skew_kl, losses.forward_kl), (losses.skew_reverse_kl, losses.reverse_kl)],
)
def test_skew_divergences_tend_to_the_plain_ones(skewed, plain):
    given = drawn()
    wanted = plain(*given)[0]
    gaps = [abs(skewed(*given, alpha=a)[0] - wanted) for a in (0.1, 1e-4, 1e-6)]
    assert gaps[0] > 10 * gaps[1] > 500 * gaps[2] and gaps[2] < 1e-4 * wanted
    np.testing.assert_allclose(skewed(*given, alpha=0.0)[0], wanted, rtol=1e-14)


def test_the_jsd_is_symmetric_in_the_middle_and_bounded_there():
    teacher, student, mask = drawn()
    one = losses.jsd(teacher, student, mask)[0]
    np.testing.assert_allclose(one, losses.jsd(student, teacher, mask)[0], rtol=1e-12)
    far = jnp.eye(5)[jnp.arange(3)] * 200.0
    total, count = losses.jsd(far, jnp.roll(far, 1, axis=1), jnp.ones(3, bool))
    np.testing.assert_allclose(total / count, math.log(2), rtol=1e-9)
    assert 0 < one / mask.sum() < math.log(2)


@pytest.mark.parametrize(("weight", "plain"), [(1e-6, KL[0]), (1 - 1e-6, KL[1])])
def test_the_ends_of_the_jsd_are_the_two_kl(weight, plain):
    given = drawn()
    scale = min(weight, 1 - weight)
    found = losses.jsd(*given, beta=weight)[0] / scale
    np.testing.assert_allclose(found, plain(*given)[0], rtol=1e-4)


@pytest.mark.parametrize("loss", [*ALL, losses.cross_entropy])
def test_gradients_are_those_of_differences(loss):
    teacher, student, mask = drawn()
    of = lambda q: loss(teacher, q, mask)[0]  # noqa: E731
    gradient = jax.grad(of)(student)
    for place in ((0, 0, 1), (1, 2, 4), (0, 2, 0)):
        step = jnp.zeros_like(student).at[place].set(1e-6)
        wanted = (of(student + step) - of(student - step)) / 2e-6
        np.testing.assert_allclose(gradient[place], wanted, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(jax.grad(lambda p: loss(p, student, mask)[0])(teacher), 0.0)


@pytest.mark.parametrize("loss", [*ALL, losses.cross_entropy])
def test_padding_changes_nothing_and_has_no_gradient(loss):
    teacher, student, mask = drawn()
    wanted, gradient = jax.value_and_grad(lambda q: loss(teacher, q, mask)[0])(student)

    def padded(x, fill):
        x = jnp.pad(x, ((0, 1), (0, 2), (0, 0)), constant_values=7.0)  # batch and sequence
        return jnp.pad(x, ((0, 0), (0, 0), (0, 3)), constant_values=fill)  # vocabulary

    longer = jnp.pad(mask, ((0, 1), (0, 2)))
    found, grown = jax.jit(
        jax.value_and_grad(lambda q: loss(padded(teacher, -jnp.inf), q, longer)[0])
    )(padded(student, -jnp.inf))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    np.testing.assert_allclose(grown[:2, :3, :5], gradient, rtol=1e-10, atol=1e-14)
    np.testing.assert_array_equal(grown.at[:2, :3, :5].set(0.0), 0.0)


@pytest.mark.parametrize("loss", ALL)
def test_tokens_in_another_order_change_nothing_if_both_are(loss):
    teacher, student, mask = drawn()
    order = jnp.array([3, 0, 4, 1, 2])
    found = loss(teacher[..., order], student[..., order], mask)[0]
    np.testing.assert_allclose(found, loss(teacher, student, mask)[0], rtol=1e-12)


@pytest.mark.parametrize("loss", [*ALL, losses.cross_entropy])
def test_other_vocabularies_are_refused_with_the_reason(loss):
    teacher, student, mask = drawn()
    with pytest.raises(InputError, match="mean different things"):
        loss(teacher[..., :4], student, mask)
    with pytest.raises(InputError, match="mask"):
        loss(teacher, student, mask[:, :2])
    with pytest.raises(InputError, match="same slots"):
        loss(teacher[:1], student, mask)


@pytest.mark.parametrize(
    ("loss", "option", "value"),
    [
        *itertools.product([losses.jsd], ["beta"], [0.0, 1.0, -0.1]),
        *itertools.product([losses.skew_kl, losses.skew_reverse_kl], ["alpha"], [1.0, -0.1]),
    ],
)
def test_weights_out_of_range_are_refused(loss, option, value):
    with pytest.raises(InputError, match=option):
        loss(*drawn(), **{option: value})


def test_half_precision_is_added_up_in_float32():
    teacher, student, mask = (x.astype(jnp.bfloat16) for x in drawn())
    total, count = losses.forward_kl(teacher, student, mask)
    assert total.dtype == count.dtype == jnp.float32
    exact = losses.forward_kl(teacher.astype(float), student.astype(float), mask)[0]
    np.testing.assert_allclose(total, exact, rtol=1e-5)


def test_sums_over_parts_give_the_mean_over_all():
    teacher, student, mask = drawn()
    parts = [losses.forward_kl(teacher[i], student[i], mask[i]) for i in range(2)]
    total, count = (sum(part) for part in zip(*parts, strict=True))
    whole = losses.forward_kl(teacher, student, mask)
    np.testing.assert_allclose(total / count, whole[0] / whole[1], rtol=1e-14)
