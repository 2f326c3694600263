"""What reaches a student through a Recalibrator, in worlds known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.vlm import oracle_recalibrated as through

WIDTH = 4


@pytest.fixture(scope="module")
def made():
    return through.contexts(jax.random.key(0), count=2, length=2)


def students(made):
    keys = jax.random.split(jax.random.key(1))
    return {
        "perfect": through.perfect_student(made, keys[0], WIDTH),
        "random": through.random_student(made, keys[1], WIDTH),
    }


def copying(params, prefix, prefix_there, answer, answer_there, *, prefix_from_teacher):
    """Passes the teacher's answer on, and says of the first token what the prefix says."""
    return prefix @ params, answer


def knowing(made, prefixes):
    """Tells the contexts apart by the prefix, and passes the answer on."""

    def recalibrate(params, prefix, prefix_there, answer, answer_there, *, prefix_from_teacher):
        far = jnp.square(prefix - prefixes).sum(-1)
        return made.prefix[jnp.argmin(far)][None], answer

    return recalibrate


def test_perfect_students_write_the_laws_and_others_do_not(made):
    found = {name: through.divergence(made, s) for name, s in students(made).items()}
    assert abs(found["perfect"]) < 1e-5 and found["random"] > 0.1
    near = through.perfect_student(made, jax.random.key(1), WIDTH, astray=0.1)
    assert 1e-3 < through.divergence(made, near) < found["random"]
    with pytest.raises(InputError, match="2 contexts need prefixes of 2 numbers, not 1"):
        through.perfect_student(made, jax.random.key(1), 1)
    np.testing.assert_allclose(made.laws.sum(1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(made.others.sum(1), 1.0, rtol=1e-5)
    assert jnp.abs(made.laws - made.others).max() > 0.01


@pytest.mark.parametrize("student", ["perfect", "random"])
def test_a_copying_recalibrator_has_no_loss_behind_the_first_token(made, student):
    """And nothing reaches any student when the first token is left out."""
    prefix = students(made)[student].prefix
    params = jax.random.normal(jax.random.key(2), (WIDTH, made.prefix.shape[-1]))
    kl = {}
    for boundary in ("include", "exclude"):

        def loss(prefix, boundary=boundary):
            return through.losses(made, copying, params, prefix, made.laws, boundary=boundary)

        kl[boundary] = loss(prefix)[1]
        reached = jnp.abs(jax.grad(lambda z, of=loss: sum(of(z)))(prefix)).max()
        assert (reached == 0) == (boundary == "exclude")
    assert abs(kl["exclude"]) < 1e-6 and kl["include"] > 0.01


@pytest.mark.parametrize("student", ["perfect", "random"])
def test_a_recalibrator_that_tells_contexts_apart_has_no_loss_at_all(made, student):
    prefix = students(made)[student].prefix
    ce, kl = through.losses(made, knowing(made, prefix), (), prefix, made.laws)
    assert abs(kl) < 1e-6
    # What is left is the entropy of the laws, whose texts the teacher writes in one way each.
    tokens = jnp.sum(made.laws * made.world.texts.teacher_mask.sum(1))
    np.testing.assert_allclose(ce, -jnp.sum(made.laws * jnp.log(made.laws)) / tokens, rtol=1e-3)
    mixed = through.losses(made, knowing(made, prefix), (), prefix[::-1], made.laws)
    assert mixed[0] > ce and mixed[1] > 0.01


def test_prefixes_that_are_alike_cost_what_the_first_token_says_of_the_context(made):
    """The best that is left is the mixture, and its loss the mutual information."""
    first = jax.nn.softmax(made.prefix[:, 0])
    mixture = jnp.log(first.mean(0))
    information = jnp.sum(first * (jnp.log(first) - mixture)) / len(first)
    tokens = jnp.sum(made.laws * made.world.texts.teacher_mask.sum(1))  # of all contexts

    def kl(logits):
        recalibrate = lambda params, prefix, *rest, **_: (logits[None, None], rest[1])  # noqa: E731
        prefix = jnp.zeros((len(made.laws), WIDTH))
        return through.losses(made, recalibrate, (), prefix, made.laws)[1]

    np.testing.assert_allclose(kl(mixture), information * len(first) / tokens, rtol=1e-4)
    off = jax.random.normal(jax.random.key(3), mixture.shape) / 4
    assert kl(mixture + off) > kl(mixture)


@pytest.mark.slow  # programs with a Recalibrator in a loop
def test_stages_train_what_is_theirs(made):
    module = through.recalibrator(made, WIDTH)
    student, key = students(made)["random"], jax.random.key(4)
    begun = through.begun(module, made, WIDTH, key)
    params = jax.jit(
        lambda key: through.aligned(made, module, student, key, boundary="include", steps=3)
    )(key)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), begun, params)
    assert min(jax.tree.leaves(moved)) > 0
    start = through.Learned(student, params)

    def end(**weights):
        of = lambda start: through.distilled(  # noqa: E731
            made, module, start, boundary="include", steps=3, **weights
        )
        return jax.jit(of)(start).student

    alone, tuned = end(sft=0.0), end(genrecal=0.0)
    assert (alone.maps == student.maps).all() and (alone.prefix != student.prefix).all()
    assert (tuned.maps != student.maps).any()
    assert through.divergence(made, tuned) < through.divergence(made, student)
