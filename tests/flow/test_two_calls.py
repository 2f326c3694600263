"""PCM, DMD2 and their adversaries: against independent numbers, and what each player may move."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import keywords
from jaxdistill.errors import InputError
from jaxdistill.flow import dmd2 as dmd2s
from jaxdistill.flow import gan, meanflow, paths, pcm, samplers
from jaxdistill.flow.dmd2 import Game, Matching, Optimizers, Positives, Updates, dmd2
from jaxdistill.flow.gan import Adversary, Discriminator
from jaxdistill.flow.meanflow import Means
from jaxdistill.flow.pcm import Phases, draw_point
from jaxdistill.flow.policies import momentum_policy
from jaxdistill.flow.students import Student, ended, sample
from jaxdistill.flow.targets import gaussian_mixture, soft4
from jaxdistill.method import BatchSpec
from jaxdistill.nn.discriminator import by_block
from jaxdistill.nn.dit import DiT
from jaxdistill.nn.flow_mlp import FlowMLP
from jaxdistill.nn.unet import UNet
from jaxdistill.task import FlowTask, Part

SHAPE = (1, 1, 2)
N = 64


def line(params, frozen, x, t, label):
    """A straight student: an affine map of x and t, as outputs of one mode."""
    del frozen
    u = x @ params["w"] + t[:, None, None, None] * params["t"] + params["b"]
    return u[..., None], jnp.zeros((*x.shape[:3], 1)), jnp.zeros((*x.shape[:3], 0))


def affine(key, frozen=None):
    del frozen
    return {
        "w": 0.3 * jax.random.normal(key, (2, 2)),
        "t": jnp.array([0.2, -0.1]),
        "b": jnp.array([0.1, 0.3]),
    }


STUDENT = Student(affine, line, momentum_policy())


def velocity(params, frozen, x, t, label):
    return line(params, frozen, x, t, label)[0][..., 0]


def exact(frozen, x, t, label):
    return soft4().velocity(x, t)


def points(batch):
    keys = batch["keys"]
    return jax.vmap(soft4().sample)(keys), jnp.zeros(len(keys), jnp.int32)


def some(seed, number=N):
    k_x, k_e, k_t = jax.random.split(jax.random.key(seed), 3)
    x, noise = (jax.random.normal(k, (number, *SHAPE)) for k in (k_x, k_e))
    return x, noise, jax.random.uniform(k_t, (number,), minval=0.05, maxval=0.95)


KEYS = jax.random.split(jax.random.key(7), N)
LABEL = jnp.zeros(N, jnp.int32)

# Heads without layers: a linear one on the only "block" there is.
EYES = Discriminator(
    lambda key: {"d": jax.random.normal(key, (2,))},
    lambda params, blocks: (blocks @ params["d"])[-1].reshape(blocks.shape[1], -1),
    optax.sgd(0.1),
    "logistic",
)


def as_blocks(*args):
    """What a discriminator sees: the critic's velocity where it is told its parameters."""
    *params, _, x, t, label = args
    return (velocity(params[0], (), x, t, label) if params else jnp.tanh(x))[None]


# ---------------------------------------------------------------------------- phases


def test_points_of_a_grid_belong_to_the_phase_that_they_start():
    keys = jax.random.split(jax.random.key(0), 4000)
    at = jax.tree.map(np.asarray, draw_point(keys, 8, 2))
    place = np.round(8 * at.start).astype(int)
    assert set(place) == set(range(1, 9))
    counts = np.bincount(place)[1:]
    np.testing.assert_allclose(counts / 4000, 1 / 8, atol=0.02)
    np.testing.assert_allclose(at.start - at.after, 1 / 8, atol=1e-6)
    # A half is the start of the second phase and not the end of the first.
    np.testing.assert_array_equal(at.edge, np.where(place > 4, 0.5, 0.0))
    edges = set(np.asarray(paths.boundaries(2)[1:]).tolist())
    assert set(at.edge.tolist()) == edges
    noised = np.round(8 * at.re_noised).astype(int)
    assert {(p > 4, n) for p, n in zip(place, noised, strict=True)} == {
        (late, n) for late in (True, False) for n in range(4 * late, 4 * late + 4)
    }
    last = draw_point(keys, 8, 2, 1)
    assert (last.edge == 0.5).all() and (last.start > 0.5).all()


def test_what_is_asked_at_a_point_is_what_numpy_finds():
    """One step of the teacher's, then the student's own end of the phase; float64."""
    phases, shift = Phases(grid=8, huber=0.05), 2.0
    params = affine(jax.random.key(3))
    x, noise, _ = some(1)
    at = draw_point(KEYS, 8, 2)
    pair = pcm.consistency(STUDENT, exact, params, (), x, noise, at, LABEL, phases, shift)
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    shifted = lambda r: 2 * np.asarray(r, np.float64) / (1 + np.asarray(r, np.float64))  # noqa: E731
    t, after, edge = (shifted(r)[:, None] for r in at[:3])
    flat, grain = (np.asarray(v, np.float64).reshape(N, 2) for v in (x, noise))
    now = (1 - t) * flat + t * grain
    u = np.asarray(exact((), jnp.asarray(now, jnp.float32).reshape(N, *SHAPE), shifted_(at), LABEL))
    there = now + (after - t) * u.reshape(N, 2)
    end = lambda x, t: x + (edge - t) * (x @ p["w"] + t * p["t"] + p["b"])  # noqa: E731
    wanted, made = end(there, after), end(now, t)
    far = np.sqrt((made - wanted) ** 2 + 0.05**2) - 0.05
    np.testing.assert_allclose(pair.made.reshape(N, 2), made, atol=2e-5)
    np.testing.assert_allclose(pair.wanted.reshape(N, 2), wanted, atol=2e-5)
    np.testing.assert_allclose(pair.loss, far.mean(1), atol=2e-5)
    square = pcm.consistency(
        STUDENT, exact, params, (), x, noise, at, LABEL, phases._replace(distance="square"), shift
    )
    np.testing.assert_allclose(square.loss, ((made - wanted) ** 2).mean(1), atol=1e-4)
    # Before an edge what is wanted is the teacher's next point alone.
    ends = np.asarray(at.after) == np.asarray(at.edge)
    assert ends.any()
    np.testing.assert_allclose(wanted[ends], there[ends], atol=1e-12)


def shifted_(at):
    return paths.shifted(at.start, 2.0)


def test_the_gradient_of_a_step_is_that_of_the_mean_over_examples():
    params = affine(jax.random.key(3))
    phases = Phases(grid=8, distance="square")
    method = pcm.pcm(
        STUDENT, exact, optax.sgd(1.0),
        batches=BatchSpec("keys", N), data=points, nfe=2, phases=phases, shift=2.0, teacher_nfe=2,
    )  # fmt: skip
    state = method.init(jax.random.key(0), (), {"keys": KEYS})._replace(trainable=params)
    after, metrics = method.step(state, (), {"keys": KEYS}, jax.random.key(0))
    x, _ = points({"keys": KEYS})
    k_noise, k_place = pcm.streams(KEYS, 4)[:2]
    noise, at = pcm.noise_like(x, k_noise), draw_point(k_place, 8, 2)

    def value(params):
        # Without the stop: what is wanted is held by hand.
        held = pcm.consistency(
            STUDENT, exact, state.trainable, (), x, noise, at, LABEL, phases, 2.0
        )
        start = paths.interpolate(x, noise, paths.shifted(at.start, 2.0))
        t, edge = (paths.shifted(raw, 2.0) for raw in (at.start, at.edge))
        made = ended(STUDENT, params, (), start, LABEL, t, edge)
        return jnp.square(made - held.wanted).mean()

    for name, slope in jax.grad(value)(params).items():
        np.testing.assert_allclose(params[name] - after.trainable[name], slope, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], value(params), rtol=1e-5)
    assert int(after.queries) == 2 and metrics["queries"] == 2


def test_noise_that_is_added_makes_the_level():
    """Not the deviation of the released code, which is too small unless it starts from data."""
    noise = jax.random.normal(jax.random.key(0), (2, 200_000, 1))
    start, end = jnp.full(200_000, 0.5), jnp.full(200_000, 0.75)
    x = paths.interpolate(jnp.full((200_000, 1), 3.0), noise[0], start)
    made = np.asarray(gan.renoised(x, noise[1], start, end), np.float64)
    np.testing.assert_allclose(made.mean(), 0.25 * 3, atol=0.01)
    np.testing.assert_allclose(made.std(), 0.75, atol=0.005)  # theirs has 0.559
    same = gan.renoised(x, noise[1], start, start)
    np.testing.assert_allclose(same, x, atol=1e-6)
    np.testing.assert_allclose(
        gan.renoised(x, noise[1], jnp.zeros(200_000), end),
        paths.interpolate(x, noise[1], end), atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("grid", [9, 1])
def test_phases_that_do_not_end_on_the_grid_are_refused(grid):
    with pytest.raises(InputError, match=f"grid={grid} steps do not divide into .*nfe=2 phases"):
        pcm.pcm(
            STUDENT, exact, optax.sgd(1.0),
            batches=BatchSpec("keys", 4), data=points, phases=Phases(grid=grid),
        )  # fmt: skip


# ---------------------------------------------------------------------------- matching


def test_the_gradient_is_that_of_data_estimates():
    """In velocities as in DMD2's own terms, where the noise level cancels; float64."""
    x, noise, t = some(2)
    c, blank, critic = (some(seed)[0] for seed in (3, 4, 5))
    found = dmd2s.matching_gradient(x, noise, c, blank, critic, guidance=1.7)
    f = lambda v: np.asarray(v, np.float64).reshape(N, 2)  # noqa: E731
    level = np.asarray(t, np.float64)[:, None]
    there = (1 - level) * f(x) + level * f(noise)
    data = lambda u: there - level * u  # noqa: E731
    guided = f(blank) + 1.7 * (f(c) - f(blank))
    wanted = data(f(critic)) - data(guided)
    wanted /= np.abs(f(x) - data(guided)).mean(1, keepdims=True)
    np.testing.assert_allclose(found.reshape(N, 2), wanted, rtol=2e-5, atol=1e-6)
    # Its two parts add up, and each has its weight.
    parts = [
        dmd2s.matching_gradient(
            x, noise, c, blank, critic, guidance=1.7, match=match, augment=augment
        )
        for match, augment in ((1.0, 0.0), (0.0, 2.0))
    ]
    np.testing.assert_allclose(parts[0] + parts[1] / 2, found, rtol=1e-4, atol=1e-6)
    plain = dmd2s.matching_gradient(x, noise, c, None, critic, normalize=False)
    np.testing.assert_allclose(plain, c - critic, rtol=1e-6)


def game(**given):
    return Game(STUDENT, exact, exact, affine, velocity, SHAPE, data=points, **given)


def test_a_critic_that_is_the_teacher_moves_nothing():
    one = Game(STUDENT, velocity_, velocity_, affine, velocity, SHAPE)
    params = affine(jax.random.key(3))
    x, *_ = some(1)
    push, metrics = dmd2s.pushed(one, params, (), params, x, LABEL, KEYS)
    assert not push.any() and metrics["matching"] == 0
    other = jax.tree.map(lambda v: 1.1 * v, params)
    assert dmd2s.pushed(one, other, (), params, x, LABEL, KEYS)[0].any()


def velocity_(frozen, x, t, label):
    return velocity(frozen, (), x, t, label)


def test_the_push_is_the_gradient_of_half_the_square_distance_to_where_it_points():
    critic, x = affine(jax.random.key(3)), some(1)[0]
    push, _ = dmd2s.pushed(game(), critic, (), (), x, LABEL, KEYS)
    gradient = dmd2s.matched(game(), critic, (), x, LABEL, dmd2s.streams(KEYS, 2)[0])
    slope = jax.grad(lambda y: 0.5 * jnp.square(y - (x - gradient)).mean())(x)
    np.testing.assert_allclose(push, slope, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("matches", [True, False])
def test_the_adversary_pushes_as_hard_as_its_weight_says(matches):
    critic, x = affine(jax.random.key(3)), some(1)[0]
    heads = EYES.init(jax.random.key(1))
    options = {"matching": Matching(match=float(matches)), "discriminator": EYES}
    alone, _ = dmd2s.pushed(game(**options), critic, heads, (), x, LABEL, KEYS)
    both, said = dmd2s.pushed(
        game(**options, adversarial=0.3, blocks=as_blocks), critic, heads, (), x, LABEL, KEYS
    )
    more = np.asarray(both - alone, np.float64)

    def fooled(x):
        t, noise = dmd2s.noised(x, dmd2s.streams(KEYS, 2)[1], (0.0, 1.0), 1.0)[1:]
        shown = as_blocks(critic, (), paths.interpolate(x, noise, t), t, LABEL)
        return jax.nn.softplus(-EYES.apply(heads, shown)).mean()

    np.testing.assert_allclose(said["generator"], fooled(x), rtol=1e-5)
    slope = np.asarray(jax.grad(fooled)(x), np.float64)
    if matches:
        slope *= np.linalg.norm(alone) / np.linalg.norm(slope)
    np.testing.assert_allclose(more, 0.3 * slope, rtol=1e-3, atol=1e-8)


def test_the_way_of_a_student_is_that_of_its_sampling():
    """Euler's steps; and no way at all before the first call."""
    params, (noise, *_) = affine(jax.random.key(3)), some(1)
    one = game(nfe=3, shift=2.0)
    way = jax.jit(functools.partial(dmd2s.rollout, one, stop=3))(params, (), noise, LABEL, KEYS)
    ends = jax.jit(functools.partial(sample, STUDENT, nfe=3, shift=2.0))(params, (), noise, LABEL)
    # But for rounding: one is a loop of any length, the other of a known one.
    np.testing.assert_allclose(way, ends, rtol=1e-6, atol=1e-6)
    u = lambda x, t: velocity(params, (), x, t, LABEL)  # noqa: E731
    euler = samplers.euler(u, noise, paths.shifted(paths.boundaries(3), 2.0))
    np.testing.assert_allclose(way, euler, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(dmd2s.rollout(one, params, (), noise, LABEL, KEYS, 0), noise)
    fresh = one._replace(matching=Matching(transition="sde"))
    middle = dmd2s.rollout(fresh, params, (), noise, LABEL, KEYS, 1)
    data = ended(STUDENT, params, (), noise, LABEL, jnp.ones(N), jnp.zeros(N))
    t = float(paths.shifted(jnp.float32(2 / 3), 2.0))
    grain = (middle - (1 - t) * data) / t
    assert abs(grain.mean()) < 0.3 and 0.8 < grain.std() < 1.2
    assert np.abs(np.corrcoef(grain.ravel(), noise.ravel())[0, 1]) < 0.3


def test_calls_that_are_trained_are_drawn_for_all_examples_alike():
    params = affine(jax.random.key(3))
    levels = paths.shifted(paths.boundaries(3), 2.0)
    seen = set()
    for number in range(30):
        start = dmd2s.begun(game(nfe=3, shift=2.0), params, (), KEYS, jax.random.key(number))
        assert (start.t == start.t[0]).all()
        seen.add(int(np.argmin(np.abs(levels - start.t[0]))))
    assert seen == {0, 1, 2}
    last = game(nfe=3, shift=2.0, matching=Matching(train_calls="last"))
    np.testing.assert_allclose(
        dmd2s.begun(last, params, (), KEYS, jax.random.key(0)).t, levels[2], rtol=1e-6
    )


def played(rates=(0.1, 0.1), **given):
    """The whole game, and its state at the start."""
    positives = Positives(sees="critic", real=0.5, teacher_steps=2)
    whole = game(
        adversarial=0.3, discriminator=EYES, blocks=as_blocks, positives=positives,
        matching=Matching(anchor=0.5), updates=Updates(critic_updates=2), phases=Phases(grid=4),
    )  # fmt: skip
    whole = whole._replace(**given)
    method = dmd2(whole, Optimizers(*map(optax.sgd, rates)), batches=BatchSpec("keys", 2 * N))
    batch = {"keys": jax.random.split(jax.random.key(5), 2 * N)}
    return method, method.init(jax.random.key(0), (), batch), batch


@pytest.mark.slow
def test_each_player_moves_itself_alone():
    _, state, batch = played()

    @jax.jit
    def step(rates):
        return played(rates)[0].step(state, (), batch, jax.random.key(0))

    for rates, moves in (((0.1, 0.0), (True, False)), ((0.0, 0.1), (False, True))):
        after, metrics = step(rates)
        moved = [
            jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), *pair))
            for pair in ((state.trainable, after.trainable), (state.critic, after.critic))
        ]
        assert tuple(all(m) for m in moved) == tuple(any(m) for m in moved) == moves
        assert (after.heads["d"] != state.heads["d"]).all()
        assert {"critic", "discriminator", "generator", "matching", "anchor"} <= set(metrics)
    # The teacher is frozen: nothing that a step finds has a slope in it.
    one = Game(STUDENT, velocity_, velocity_, affine, velocity, SHAPE, data=points)
    method = dmd2(one, Optimizers(*map(optax.sgd, rates)), batches=BatchSpec("keys", 5 * 8))
    params, batch = affine(jax.random.key(1)), {"keys": KEYS[:40]}
    state = method.init(jax.random.key(0), params, batch)

    def found(frozen):
        after, metrics = method.step(state, frozen, batch, jax.random.key(0))
        return sum(jnp.sum(x) for x in jax.tree.leaves((after.trainable, after.critic, metrics)))

    slope = jax.grad(found, allow_int=True)(params)
    assert not any(jnp.any(x) for x in jax.tree.leaves(slope))


def _f(x):
    return np.asarray(x, np.float64).reshape(len(x), -1)


@pytest.mark.parametrize(("sees", "share"), [("teacher", 0.5), ("critic", 0.5), ("critic", 0.0)])
def test_what_critic_and_discriminator_descend(sees, share):
    """Noise minus example for the one; real ones large and the student's small for the other."""
    one = game(
        adversarial=0.3, discriminator=EYES,
        blocks=lambda p, f, x, t, label: (x * (p["t"] if sees == "critic" else 1.0))[None],
        positives=Positives(share=share, sees=sees), shift=2.0,
    )  # fmt: skip
    params, heads = affine(jax.random.key(3)), {"d": jnp.array([0.7, -0.4])}
    x, real, _ = some(4)
    begin = dmd2s.Begun(x, jnp.ones(N), LABEL, KEYS)
    (value, said), slopes = jax.value_and_grad(
        lambda p, h: dmd2s.critic_loss(one, p, h, (), begin, x, (real, LABEL)), (0, 1), has_aux=True
    )(params, heads)
    k_critic, k_blur = pcm.streams(KEYS, 2)

    def drawn(keys):
        k_noise, k_time = pcm.streams(keys, 2)
        raw = _f(jax.vmap(jax.random.uniform)(k_time))
        return 2 * raw / (1 + raw), _f(pcm.noise_like(x, k_noise))

    t, noise = drawn(k_critic)
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    there = (1 - t) * _f(x) + t * noise
    gap = there @ p["w"] + t * p["t"] + p["b"] - (noise - _f(x))
    np.testing.assert_allclose(said["critic"], (gap**2).mean(), rtol=1e-4)
    own = (2 * gap * t).mean(0) / gap.shape[1]
    t, noise = drawn(k_blur)
    d = np.array([0.7, -0.4])
    scale = p["t"] if sees == "critic" else np.ones(2)
    noisy = [(1 - t) * _f(v) + t * noise for v in (real, x)]
    looks = [v * scale @ d for v in noisy]
    wanted = np.log1p(np.exp(-looks[0])).mean() + np.log1p(np.exp(looks[1])).mean()
    np.testing.assert_allclose(said["discriminator"], wanted, rtol=1e-4)
    added = share * wanted if sees == "critic" else 0.0
    np.testing.assert_allclose(value, said["critic"] + wanted + added, rtol=1e-4)
    # Heads learn from all of it, whatever the critic's share, and the critic from its share.
    signs = -1 / (1 + np.exp(looks[0])), 1 / (1 + np.exp(-looks[1]))
    pull = sum((s[:, None] * v).mean(0) for s, v in zip(signs, noisy, strict=True))
    np.testing.assert_allclose(slopes[1]["d"], pull * scale, rtol=1e-3, atol=1e-6)
    taught = share * pull * d if sees == "critic" else 0.0
    np.testing.assert_allclose(slopes[0]["t"], own + taught, rtol=1e-3, atol=1e-5)


def test_noise_is_drawn_between_the_bounds():
    x, *_ = some(4)
    shown, t, noise = dmd2s.noised(x, KEYS, (0.4, 0.6), 2.0)
    low, high = (2 * r / (1 + r) for r in (0.4, 0.6))
    assert low <= t.min() < low + 0.05 and high - 0.05 < t.max() <= high
    np.testing.assert_allclose(shown, paths.interpolate(x, noise, t), rtol=1e-6)


def test_what_passes_for_real_is_shared_as_said():
    """Data with labels of their own; the teacher's examples with those that were asked for."""
    far = lambda batch: (jnp.full((len(batch["keys"]), *SHAPE), 50.0), LABEL + 7)  # noqa: E731
    shares = {}
    for real in (0.0, 0.25, 1.0):
        one = game(positives=Positives(real=real, teacher_steps=4))._replace(data=far)
        made, label = dmd2s.real_examples(one, (), {"keys": KEYS}, LABEL + 3, KEYS)
        data = np.asarray(made[:, 0, 0, 0] == 50)
        np.testing.assert_array_equal(label, np.where(data, 7, 3))
        assert np.abs(np.asarray(made)[~data]).max(initial=0) < 10
        shares[real] = data.mean()
    assert shares[0.0] == 0 and shares[1.0] == 1 and 0.1 < shares[0.25] < 0.4


def test_a_student_steps_against_its_push():
    one = game(updates=Updates(critic_updates=2), shift=2.0)
    optimizers = Optimizers(optax.sgd(1.0), optax.sgd(0.0))
    method = dmd2(one, optimizers, batches=BatchSpec("keys", 2 * N))
    batch = {"keys": jax.random.split(jax.random.key(5), 2 * N)}
    state = method.init(jax.random.key(0), (), batch)
    key = jax.random.key(4)
    after, _ = jax.jit(method.step)(state, (), batch, key)
    own = jax.vmap(lambda k: jax.random.fold_in(k, dmd2s._STUDENT))(batch["keys"][::2])
    begin = dmd2s.begun(one, state.trainable, (), own, jax.random.split(key)[1])
    x = dmd2s.generated(one, state.trainable, (), begin)
    keys = pcm.streams(pcm.streams(begin.keys, 2)[0], 2)[0]
    g = dmd2s.matched(one, state.critic, (), x, begin.label, keys)

    def distance(params):
        return jnp.square(dmd2s.generated(one, params, (), begin) - (x - g)).mean() / 2

    slope = jax.grad(distance)(state.trainable)
    for name, wanted in slope.items():
        moved = state.trainable[name] - after.trainable[name]
        np.testing.assert_allclose(moved, wanted, rtol=1e-3, atol=1e-6)


def test_both_players_of_pcm():
    """What tells the ends apart, and what the student descends beside consistency."""
    method = pcm.pcm(
        STUDENT, exact, optax.sgd(1.0),
        batches=BatchSpec("keys", N), data=points, phases=Phases(grid=8), shift=2.0,
        adversarial=0.5, discriminator=EYES, blocks=lambda f, x, t, label: (
            x + t[:, None, None, None]
        )[None],
    )  # fmt: skip
    state = method.init(jax.random.key(0), (), {"keys": KEYS})
    after, said = method.step(state, (), {"keys": KEYS}, jax.random.key(0))
    assert int(after.queries) == 3  # one step of the teacher's, and its blocks twice
    x, _ = points({"keys": KEYS})
    k_noise, k_place, *k_blur = pcm.streams(KEYS, 4)
    at = draw_point(k_place, 8, 2)
    args = x, pcm.noise_like(x, k_noise), at, LABEL, Phases(grid=8), 2.0
    pair = pcm.consistency(STUDENT, exact, state.trainable, (), *args)
    edge, level = (_f(paths.shifted(v, 2.0)) for v in (at.edge, at.re_noised))
    keep = (1 - level) / (1 - edge)
    std = np.sqrt(np.maximum(level**2 - (keep * edge) ** 2, 0))
    d = np.asarray(state.heads["d"], np.float64)
    fake, real = (
        (keep * _f(end) + std * _f(pcm.noise_like(x, k)) + level) @ d
        for end, k in zip((pair.made, pair.wanted), k_blur, strict=True)
    )
    fooled = np.log1p(np.exp(-fake)).mean()
    np.testing.assert_allclose(said["generator"], fooled, rtol=1e-4)
    apart = np.log1p(np.exp(-real)).mean() + np.log1p(np.exp(fake)).mean()
    np.testing.assert_allclose(said["discriminator"], apart, rtol=1e-4)
    np.testing.assert_allclose(said["loss"], said["consistency"] + fooled / 2, rtol=1e-4)


def test_a_critic_takes_over_a_part_of_the_student():
    updates = Updates(critic_updates=2, blend=0.25)
    method, state, batch = played((0.1, 0.0), updates=updates)
    after, _ = jax.jit(method.step)(state, (), batch, jax.random.key(0))
    for name, critic in after.critic.items():
        wanted = 0.75 * state.critic[name] + 0.25 * after.trainable[name]
        np.testing.assert_allclose(critic, wanted, rtol=1e-5)


def test_calls_of_the_teacher_are_counted():
    calls = []

    def counted(frozen, x, t, label):
        jax.debug.callback(lambda: calls.append(1))
        return exact(frozen, x, t, label)

    # Two calls under guidance; as `plain` one.
    def guided(frozen, x, t, label):
        return counted(frozen, x, t, label) + 0 * counted(frozen, x, t, label)

    for more in ({}, {"matching": Matching(augment_times=(0.5, 0.9))}):
        whole = {"teacher": guided, "plain": counted, "guidance": 1.5, "num_classes": 3} | more
        method, state, batch = played(**whole)
        method = dmd2(
            game()._replace(
                adversarial=0.3, discriminator=EYES, blocks=as_blocks,
                positives=Positives(sees="critic", real=0.5, teacher_steps=2),
                updates=Updates(critic_updates=2), **whole,
            ),
            Optimizers(*map(optax.sgd, (0.1, 0.1))),
            batches=BatchSpec("keys", 2 * N), teacher_nfe=2,
        )  # fmt: skip
        calls.clear()
        after, metrics = method.step(state, (), batch, jax.random.key(0))
        jax.effects_barrier()
        assert len(calls) == int(after.queries) == metrics["queries"]


@pytest.mark.slow
def test_a_linear_student_of_a_gaussian_becomes_it():
    """The critic is exact, being the velocity of what an affine student makes of noise."""
    mean, std = np.array([[1.0, -0.5]]), np.array([0.6])
    target = gaussian_mixture(np.ones(1), mean, std)

    # One call from noise to data: x - u, with u = x w + t + b.
    def law(params):
        scale = jnp.eye(2) - params["w"]
        return -(params["t"] + params["b"]), scale.T @ scale

    def of_student(params, frozen, x, t, label):
        """The velocity of a Gaussian of any covariance."""
        centre, cov = law(params)
        t = t[:, None]
        flat = x.reshape(len(x), 2)
        whole = jnp.square(1 - t)[..., None] * cov + jnp.square(t)[..., None] * jnp.eye(2)
        away = jnp.linalg.solve(whole, (flat - (1 - t) * centre)[..., None])[..., 0]
        noise = t * away
        data = (flat - t * noise) / jnp.maximum(1 - t, 1e-3)
        return (noise - data).reshape(x.shape)

    for normalize in (True, False):
        one = Game(
            STUDENT, lambda f, x, t, label: target.velocity(x, t),
            lambda f, x, t, label: target.velocity(x, t), affine, of_student, SHAPE, nfe=1,
            matching=Matching(normalize=normalize, match_times=(0.02, 0.9)),
        )  # fmt: skip

        @jax.jit
        def descend(params, keys, one=one):
            def step(params, key):
                keys = jax.random.split(key, 256)
                start = dmd2s.begun(one, params, (), keys, key)
                x, back = jax.vjp(lambda p: dmd2s.generated(one, p, (), start), params)
                push, _ = dmd2s.pushed(one, params, (), (), x, start.label, start.keys)
                (grads,) = back(push)
                return jax.tree.map(lambda p, g: p - 0.3 * g, params, grads), None

            return jax.lax.scan(step, params, keys)[0]

        params = descend(affine(jax.random.key(3)), jax.random.split(jax.random.key(0), 1500))
        centre, cov = law(params)
        np.testing.assert_allclose(centre, mean[0], atol=0.05)
        np.testing.assert_allclose(cov, 0.36 * np.eye(2), atol=0.06)


# ---------------------------------------------------------------------------- mean velocities


def test_the_mean_velocity_of_a_known_flow_is_what_it_is_drawn_to():
    """Of dx/dt = a x, whose ways and means are known."""
    x, _, t = some(1)
    r = 0.4 * t
    u = lambda x, t: paths.expand((1 - jnp.exp(-0.7 * (t - r))) / (t - r), x) * x  # noqa: E731
    wanted = meanflow.mean_target(u, x, t, r, 0.7 * x)
    np.testing.assert_allclose(wanted, u(x, t), rtol=1e-3, atol=1e-5)
    # And only it: not the velocity itself.
    other = meanflow.mean_target(lambda x, t: 0.7 * x, x, t, r, 0.7 * x)
    assert np.abs(other - 0.7 * x).max() > 1e-2


def test_times_of_means_are_those_of_the_paper():
    means = Means(apart=0.25, centre=-0.4, spread=1.0)
    t, r = (np.asarray(v) for v in meanflow.draw_times(jax.random.split(KEYS[0], 8000), means))
    assert (r <= t).all() and abs((r < t).mean() - 0.25) < 0.02
    draws = np.random.default_rng(0).normal(-0.4, 1.0, (100_000, 2)).max(1)
    np.testing.assert_allclose(t.mean(), (1 / (1 + np.exp(-draws))).mean(), atol=0.01)


def _mean_of(params, frozen, x, t, r, label):
    """A network of mean velocities; a label moves it, and the span does."""
    more = (t - r) * params["s"] + 0.1 * label
    return velocity(params, frozen, x, t, label) + more[:, None, None, None]


@pytest.mark.parametrize("follows", [True, False])
def test_a_step_of_meanflow_is_that_of_numpy(follows):
    params = affine(jax.random.key(3)) | {"s": jnp.float32(0.4)}
    means = Means(apart=0.5, velocity="teacher" if follows else "data")
    guided = means if follows else means._replace(guidance=2.0, label_drop=0.3)
    method = meanflow.meanflow(
        lambda key, frozen: params, _mean_of, optax.sgd(1.0),
        batches=BatchSpec("keys", N), data=points, teacher=exact, teacher_nfe=2, means=guided,
        shift=2.0, null=5,
    )  # fmt: skip
    state = method.init(jax.random.key(0), (), {"keys": KEYS})
    after, metrics = method.step(state, (), {"keys": KEYS}, jax.random.key(0))
    assert int(after.queries) == (2 if follows else 0)
    x0, label = points({"keys": KEYS})
    k_noise, k_times, k_drop = pcm.streams(KEYS, 3)
    noise = pcm.noise_like(x0, k_noise)
    t, r = (paths.shifted(v, 2.0) for v in meanflow.draw_times(k_times, means))
    x = paths.interpolate(x0, noise, t)
    f = lambda v: np.asarray(v, np.float64).reshape(N, -1)  # noqa: E731
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    u = np.asarray(exact((), x, t, label)) if follows else noise - x0
    v, label = f(u), np.zeros((N, 1))
    if not follows:
        blank = f(x) @ p["w"] + f(t) * p["t"] + p["b"] + 0.5
        dropped = f(jax.vmap(jax.random.uniform)(k_drop)) < 0.3
        assert dropped.any() and not dropped.all()
        v = np.where(dropped, v, blank + 2 * (v - blank))
        label = np.where(dropped, 5, 0)
    span = f(t) - f(r)
    said = f(x) @ p["w"] + f(t) * p["t"] + p["b"] + span * p["s"] + 0.1 * label
    change = v @ p["w"] + p["t"] + p["s"]  # along (v, 1), r held
    gap = said - (v - span * change)
    square = (gap**2).mean(1)
    np.testing.assert_allclose(metrics["square"], square.mean(), rtol=1e-3)
    weight = 1 / (square + 0.01)
    np.testing.assert_allclose(metrics["loss"], (weight * square).mean(), rtol=1e-3)
    slope = (weight[:, None] * gap).mean(0)  # by b: two numbers an example
    np.testing.assert_allclose(params["b"] - after.trainable["b"], slope, rtol=2e-3)
    slope = (weight * span[:, 0] * gap.sum(1)).mean()
    np.testing.assert_allclose(params["s"] - after.trainable["s"], slope, rtol=2e-3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"teacher": None}, "velocity=teacher needs a teacher"),
        ({"means": Means(guidance=2.0)}, r"guidance=2.0 is learned from data"),
        ({"means": Means(velocity="data", guidance=2.0)}, r"guidance=2.0 needs labels"),
    ],
)
def test_means_that_cannot_be_learned_are_refused(given, said):
    options = {"batches": BatchSpec("keys", 4), "data": points, "teacher": exact}
    with pytest.raises(InputError, match=said):
        meanflow.meanflow(affine, _mean_of, optax.sgd(1.0), **options | given)


# ---------------------------------------------------------------------------- discriminators


def test_what_players_descend():
    real, fake = (np.random.default_rng(i).normal(size=(5, 3)) for i in range(2))
    softplus = lambda v: np.log1p(np.exp(v))  # noqa: E731
    hinge = np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean()
    wanted = {
        "logistic": (softplus(-real).mean() + softplus(fake).mean(), softplus(-fake).mean()),
        "hinge": (hinge, -fake.mean()),
        "saturating": (hinge, np.maximum(1 - fake, 0).mean()),
    }
    single = [jnp.asarray(v, jnp.float32) for v in (real, fake)]
    for kind, (both, one) in wanted.items():
        np.testing.assert_allclose(gan.discriminator_loss(kind, *single), both, rtol=1e-5)
        np.testing.assert_allclose(gan.generator_loss(kind, single[1]), one, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trunk", "shape", "grid"),
    [
        (DiT(1, 4, 32, 3, 2, 10), (8, 8, 1), (2, 2)),
        (FlowMLP(2, width=32, depth=3), SHAPE, (1, 1)),
    ],
)
def test_blocks_of_a_trunk_and_heads_on_them(trunk, shape, grid):
    x, t, label = jnp.ones((5, *shape)), jnp.full(5, 0.3), jnp.zeros(5, jnp.int32)
    params = trunk.init(jax.random.key(0), x, t, label)["params"]
    blocks = by_block(trunk, params, x, t, label)
    assert blocks.shape == (3, 5, *grid, 32)
    # The last block is all that the features depend on.
    plain = trunk.apply({"params": params}, x, t, label, method="features")
    assert plain.shape == blocks.shape[1:]
    ends = (
        jax.nn.standardize(blocks[-1], epsilon=1e-6) if grid == (2, 2) else jax.nn.silu(blocks[-1])
    )
    np.testing.assert_allclose(plain, ends, rtol=1e-4, atol=1e-5)
    made = gan.discriminator(_task(trunk, params, shape), Adversary(heads_at=(0.4, 1.0)), "hinge")
    heads = made.init(jax.random.key(1))
    assert {name for name in heads if name.startswith("conv")} == {"conv_0", "conv_1"}
    said = made.apply(heads, blocks)
    assert said.shape == (5, 2)
    unread = made.apply(heads, blocks.at[1].set(0.0))
    np.testing.assert_array_equal(said, unread)
    assert (said != made.apply(heads, blocks.at[0].multiply(2.0))).any()


def _task(trunk, params, shape):
    fields = dict.fromkeys(FlowTask._fields)
    fields |= {"trunk": trunk, "shape": shape, "teacher": Part({"teacher": params})}
    return FlowTask(**fields)


def test_discriminators_that_cannot_be_are_refused():
    trunk, shape = UNet(1, 10), (8, 8, 1)
    x, t, label = jnp.ones((1, *shape)), jnp.ones(1), jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(trunk.init, jax.random.key(0), x, t, label)["params"]
    with pytest.raises(InputError, match="a UNet has none of one shape"):
        gan.discriminator(_task(trunk, params, shape), Adversary(), "hinge")
    with pytest.raises(InputError, match=r"heads_at is \(\); name a block"):
        gan.discriminator(_task(trunk, params, shape), Adversary(heads_at=()), "hinge")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"matching": Matching(match=0.0)}, "nothing is learned: method.match and"),
        ({"matching": Matching(match_times=(0.5,))}, r"match_times is \(0.5,\); give the lowest"),
        ({"matching": Matching(augment_times=(0.9, 0.1))}, "augment_times is .*; give the lowest"),
        ({"guidance": 1.5}, r"guidance=1.5 needs a teacher that knows a label"),
        ({"adversarial": 1.0}, r"adversarial=1.0 needs a discriminator"),
        ({"matching": Matching(anchor=1.0), "data": None}, "need data; give it, or set"),
        ({"matching": Matching(anchor=1.0), "nfe": 5}, "do not divide into method.nfe=5 phases"),
        ({"updates": Updates(critic_updates=3)}, "16 examples is no multiple of critic_updates=3"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(given, said):
    with pytest.raises(InputError, match=said):
        dmd2(
            game()._replace(updates=Updates(critic_updates=2))._replace(**given),
            Optimizers(optax.sgd(1.0), optax.sgd(1.0)),
            batches=BatchSpec("keys", 16),
        )


def test_a_blend_of_unlike_networks_is_refused():
    task = _task(None, (), SHAPE)
    with pytest.raises(InputError, match="which are alike for modes=1 alone"):
        dmd2s.recipe(task, **keywords.defaults(dmd2s.recipe) | {"blend": 0.1, "modes": 4})
