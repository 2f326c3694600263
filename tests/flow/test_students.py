"""The training of students: on one device and on eight, and that it reaches what it promises."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import config as configs
from jaxdistill import keywords, runner, settings, stage
from jaxdistill.errors import InputError
from jaxdistill.eval.generative import sliced_wasserstein
from jaxdistill.flow import adapt, paths, samplers, transports
from jaxdistill.flow.arcflow import _gaps, arcflow
from jaxdistill.flow.dmd2 import Game, Matching, Optimizers, Positives, Updates, dmd2
from jaxdistill.flow.endpoint import endpoint_regression
from jaxdistill.flow.gan import Discriminator
from jaxdistill.flow.matching import flow_matching
from jaxdistill.flow.meanflow import Means, meanflow
from jaxdistill.flow.pcm import Phases, pcm
from jaxdistill.flow.policies import gaussian_policy, momentum_policy
from jaxdistill.flow.progressive import progressive
from jaxdistill.flow.students import (
    Segment,
    Student,
    elastic,
    fixed,
    from_data,
    from_noise,
    power_average,
    sample,
    student_method,
)
from jaxdistill.flow.targets import soft4
from jaxdistill.flow.ucgm import Unified, ucgm
from jaxdistill.method import BatchSpec
from jaxdistill.nn.flow_mlp import FlowMLP
from jaxdistill.task import Part
from tests.test_backends import assert_backends_agree, run_on, toy_data
from tests.test_method_contract import together

MODES, WIDTH = 4, 24
SHAPE = (1, 1, 2)
KEY = jax.random.key(2)


def network(params, x, t):
    """A small network from (x, t) to hidden features."""
    flat = jnp.concatenate([x.reshape(len(x), -1), t[:, None], jnp.cos(3 * t)[:, None]], 1)
    return jnp.tanh(jnp.tanh(flat @ params["in"]) @ params["middle"])


def init_network(key, inputs=4):
    k_in, k_middle = jax.random.split(key)
    return {
        "in": jax.random.normal(k_in, (inputs, WIDTH)) / 2,
        "middle": jax.random.normal(k_middle, (WIDTH, WIDTH)) / np.sqrt(WIDTH),
    }


def heads(out, shape, modes=MODES):
    n, size = len(out), int(np.prod(shape))
    v, logits, rates = jnp.split(out, [size * modes, size * modes + modes], 1)
    grid = shape[:-1]
    spread = lambda x: jnp.broadcast_to(x[:, None, None], (n, *grid, x.shape[-1]))  # noqa: E731
    return v.reshape(n, *shape, modes), spread(logits), spread(rates)


def student(shape=SHAPE, curved=True, policy=None):
    size = int(np.prod(shape))
    width = size * MODES + 2 * MODES - 1

    def init(key, frozen):
        k_trunk, k_head = jax.random.split(key)
        return {
            "trunk": init_network(k_trunk, size + 2),
            "head": 0.1 * jax.random.normal(k_head, (WIDTH, width)),
        }

    def apply(trainable, frozen, x, t, label):
        v, logits, rates = heads(network(trainable["trunk"], x, t) @ trainable["head"], shape)
        if policy is not None:
            return v, logits, jnp.full(len(x), -3.0)
        return v, logits, rates if curved else jnp.zeros_like(rates)

    return Student(init, apply, momentum_policy() if policy is None else policy)


def exact(frozen, x, t, label):
    return soft4().velocity(x, t)


def noise_source(size=16, schedule=None):
    return from_noise(SHAPE, size, fixed(2) if schedule is None else schedule, 3)


def points(batch):
    """Points of the law that `exact` flows to, and labels that say nothing."""
    keys = batch["keys"]
    return jax.vmap(soft4().sample)(keys), jnp.zeros(keys.shape[0], jnp.int32)


OPTIONS = {"shift": 3.2, "teacher_steps": 4, "ema_from": 1}


def methods():
    optimizer = optax.adam(1e-2)
    uniform = BatchSpec("uniform", 16)
    image = (8, 8, 1)

    def images(batch):
        return batch["images"].astype(jnp.float32) / 127.5 - 1, batch["labels"]

    def straight(frozen, x, t, label):
        return x / (t[:, None, None, None] + 0.1) + label[:, None, None, None]

    def unified(**settings):
        def apply(params, frozen, x, t, label):
            out = (network(params, x, t) @ params["out"]).reshape(x.shape)
            out = out + params["label"][label][:, None, None, None]
            return out, *transports.estimates(transports.LINEAR, x, t, out)

        def init(key, frozen):
            more = {"out": jnp.zeros((WIDTH, 64)), "label": jnp.zeros(9)}
            return init_network(key, 66) | more

        return ucgm(
            init,
            apply,
            optimizer,
            batches=uniform,
            data=images,
            teacher=lambda frozen, x, t, label: (x - t[:, None, None, None], x),
            unified=Unified(**settings),
            null=8,
            ema_from=1,
        )

    def line(params, frozen, x, t, label):
        return (network(params, x, t) @ params["out"]).reshape(x.shape)

    def flat(key, frozen):
        return init_network(key, 66) | {"out": 0.1 * jnp.ones((WIDTH, 64))}

    eyes = Discriminator(
        lambda key: {"d": jax.random.normal(key, (64,))},
        lambda params, blocks: (blocks.reshape(*blocks.shape[:2], -1) @ params["d"]).T,
        optax.sgd(0.1),
        "hinge",
    )
    two = {
        "student": student(image, curved=False),
        "teacher": straight,
        "data": images,
        "discriminator": eyes,
        "adversarial": 0.3,
    }
    phases = Phases(grid=4)
    game = Game(
        plain=straight,
        critic_init=flat,
        critic=line,
        shape=image,
        num_classes=8,
        guidance=1.5,
        matching=Matching(augment_times=(0.5, 0.9), transition="sde", anchor=0.5),
        updates=Updates(critic_updates=2),
        phases=phases,
        positives=Positives(sees="critic", real=0.5, teacher_steps=2),
        blocks=lambda params, *args: line(params, *args)[None],
        **two,
    )
    seen = from_data(uniform, images, fixed(3, 0.5), 2.0)
    return {
        "pcm": pcm(
            optimizer=optimizer,
            batches=uniform,
            phases=phases,
            blocks=lambda frozen, x, t, label: x[None],
            ema_from=1,
            **two,
        ),
        "meanflow": meanflow(
            flat,
            lambda params, frozen, x, t, r, label: (
                (1 + (t - r)[:, None, None, None]) * line(params, frozen, x, t, label)
            ),
            optimizer,
            batches=uniform,
            data=images,
            means=Means(velocity="data", guidance=2.0, label_drop=0.5, apart=0.5),
            null=8,
            ema_from=1,
        ),
        "dmd2": dmd2(game, Optimizers(optimizer, optax.adam(1e-3)), batches=uniform, ema_from=1),
        "arcflow": arcflow(
            student(), exact, optimizer, source=noise_source(), mode_dropout=0.3, **OPTIONS
        ),
        "elastic": arcflow(
            student(), exact, optimizer, source=noise_source(schedule=elastic((1, 2, 4))), **OPTIONS
        ),
        "gaussian": arcflow(
            student(policy=gaussian_policy(4)), exact, optimizer, source=noise_source(), **OPTIONS
        ),
        "from data": arcflow(
            student(image), straight, optimizer, source=seen, weight_by_length=False, **OPTIONS
        ),
        "endpoint": endpoint_regression(
            student(), exact, optimizer, source=noise_source(), shift=3.2
        ),
        "progressive": progressive(
            student(image),
            straight,
            optimizer,
            batches=uniform,
            data=images,
            steps=4,
            nfe=2,
            first_nfe=8,
            ema_from=1,
        ),
        "consistent": unified(consistency=1.0, label_drop=0.5),
        "between": unified(consistency=0.5, derivative="jvp", cosine=True),
        "guided by itself": unified(consistency=0.0, enhancement=0.4, label_drop=0.5),
        "matching": flow_matching(
            lambda key: init_network(key, 66) | {"out": jnp.zeros((WIDTH, 64))},
            lambda p, x, t, label: (network(p, x, t) @ p["out"]).reshape(x.shape),
            optimizer,
            batches=uniform,
            data=images,
            null=8,
            label_drop=0.5,
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["keys", "uniform"])
def test_any_number_of_devices_gives_the_same(kind):
    fed = {name: m for name, m in methods().items() if m.batches.kind == kind}
    assert len(fed) >= 3
    options = {"steps": 2, "rtol": 3e-4, "arrangements": (("jit", 1), ("pmap", 1))}
    assert_backends_agree(together(fed), toy_data()[0], dict.fromkeys(fed, ()), **options)


def endpoint_error(trained, made, nfe=2, shift=3.2):
    z = jax.random.normal(jax.random.key(9), (512, *SHAPE))
    label = jnp.zeros(512, jnp.int32)
    fine = paths.shifted(paths.boundaries(256), shift)
    truth = samplers.rk4(soft4().velocity, z, fine)
    ends = sample(made, trained, (), z, label, nfe=nfe, shift=shift)
    return float(jnp.sqrt(jnp.square(ends - truth).mean()))


@functools.cache
def trained(curved, kind="arcflow", schedule=None, steps=1500):
    made = student(curved=curved)
    source = noise_source(256, elastic(schedule) if schedule else None)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    if kind == "arcflow":
        options = {"shift": 3.2, "teacher_steps": steps // 3}
        method = arcflow(made, exact, optimizer, source=source, **options)
    else:
        method = endpoint_regression(made, exact, optimizer, source=source, shift=3.2, queries=16)
    state = runner.run(method, key=jax.random.key(0), steps=steps, chunk=100)
    return method.output(state), made


@pytest.mark.slow
def test_curves_come_nearer_to_the_teachers_ends_than_lines():
    bent, straight = (endpoint_error(*trained(curved)) for curved in (True, False))
    times = paths.shifted(paths.boundaries(2), 3.2)
    z = jax.random.normal(jax.random.key(9), (512, *SHAPE))
    truth = samplers.rk4(soft4().velocity, z, paths.shifted(paths.boundaries(256), 3.2))
    untrained = jnp.sqrt(jnp.square(samplers.euler(soft4().velocity, z, times) - truth).mean())
    assert bent < 0.6 * straight < 0.6 * 0.5 * untrained


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pcm", "meanflow", "dmd2"])
def test_students_of_two_calls_are_nearer_to_the_data_than_euler(name):
    """From nothing, in a few seconds; a loss of the other sign or of other times would not."""
    keys, made = BatchSpec("keys", 256), student(curved=False)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, 800))

    def line(params, frozen, x, t, label):
        return made.apply(params, frozen, x, t, label)[0].mean(-1)

    fed = {"batches": keys, "data": points}

    def mean(params, frozen, x, t, r, label):
        more = (t - r)[:, None, None, None] * line(params[1], frozen, x, t, label)
        return line(params[0], frozen, x, t, label) + more

    method = {
        "pcm": lambda: pcm(made, exact, optimizer, shift=3.2, phases=Phases(grid=16), **fed),
        "meanflow": lambda: meanflow(
            lambda key, frozen: [made.init(k, ()) for k in jax.random.split(key)],
            mean, optimizer, teacher=exact, shift=3.2, means=Means(power=0.0, apart=0.75), **fed,
        ),
        "dmd2": lambda: dmd2(
            Game(made, exact, exact, made.init, line, SHAPE, shift=3.2,
                 updates=Updates(critic_updates=4)),
            Optimizers(optax.adam(optax.cosine_decay_schedule(2e-3, 800)), optax.adam(5e-3)),
            batches=BatchSpec("keys", 1024),
        ),
    }[name]()  # fmt: skip
    state = runner.run(method, key=jax.random.key(0), steps=800, chunk=100)
    params, label = method.output(state), jnp.zeros(2048, jnp.int32)
    z = jax.random.normal(jax.random.key(9), (2048, *SHAPE))
    times = paths.shifted(paths.boundaries(2), 3.2)
    if name == "meanflow":
        ends = z
        for t, r in itertools.pairwise(times):
            both = jnp.full(2048, t), jnp.full(2048, r)
            ends = ends - (t - r) * mean(params, (), ends, *both, label)
    else:
        ends = sample(made, params, (), z, label, nfe=2, shift=3.2)
    data, _ = points({"keys": jax.random.split(jax.random.key(10), 2048)})
    far = [
        sliced_wasserstein(np.asarray(x).reshape(-1, 2), np.asarray(data).reshape(-1, 2), KEY)
        for x in (ends, samplers.euler(soft4().velocity, z, times))
    ]
    assert far[0] < 0.6 * far[1]


@pytest.mark.slow
def test_endpoint_regression_with_many_queries_beats_lines_on_the_way():
    # A line may meet the ends exactly; what biases it is to match velocities on its own way.
    assert endpoint_error(*trained(False, "endpoint")) < 0.5 * endpoint_error(*trained(False))


@pytest.mark.slow
def test_an_elastic_student_serves_every_number_of_calls():
    elastic_one, rigid = trained(True, schedule=(1, 2, 4, 8)), trained(True)
    errors = [endpoint_error(*elastic_one, nfe=nfe) for nfe in (1, 2, 4, 8)]
    assert max(errors) < 0.7 * endpoint_error(*trained(False))
    # The other one is good at the number of calls it was trained for alone.
    assert errors[0] < 0.6 * endpoint_error(*rigid, nfe=1)
    assert errors[2] < 0.6 * endpoint_error(*rigid, nfe=4)


def test_a_sampler_calls_the_network_as_often_as_it_says():
    calls = []
    made = student()

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1))
        return made.apply(*args)

    params = made.init(jax.random.key(0), ())
    z, label = jnp.ones((3, *SHAPE)), jnp.zeros(3, jnp.int32)
    sample(made._replace(apply=counted), params, (), z, label, nfe=3).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 3


class _Counted(FlowMLP):
    """A trunk that says when it is called."""

    def features(self, *args):
        jax.debug.callback(lambda: CALLS.append(1))
        return super().features(*args)


CALLS = []


@pytest.mark.parametrize("name", settings.modules("jaxdistill.flow", "recipe"))
def test_every_recipe_samples_with_as_many_calls_as_it_is_asked(name):
    resolved = settings.resolve(configs.load("flow:baselines=,smoke"))
    trunk = _Counted(2, width=8, depth=1)
    params = adapt.fresh_trunk(trunk, SHAPE, jax.random.key(0))
    shapes = Part({"teacher": jax.eval_shape(lambda: params)})
    task = resolved.family.shapes(resolved)._replace(trunk=trunk, teacher=shapes)
    module = settings.method(name, "jaxdistill.flow")
    fresh = {"dmd2": {"transition": "sde"}, "pcm": {"whole": True}}
    for more in ({}, fresh.get(name, {})):
        recipe = module.recipe(task, **keywords.defaults(module.recipe) | more)
        made = stage.output_shapes(recipe, task.examples)
        student = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)
        noise, label = jnp.ones((3, *SHAPE)), jnp.zeros(3, jnp.int32)
        for nfe in (1, 3):
            jax.effects_barrier()
            CALLS.clear()
            recipe.sample(student, {"teacher": params}, noise, label, nfe=nfe).block_until_ready()
            jax.effects_barrier()
            assert len(CALLS) == nfe


def test_teacher_calls_are_counted_by_the_program():
    calls = []

    def counted(frozen, x, t, label):
        jax.debug.callback(lambda: calls.append(len(x)))
        return exact(frozen, x, t, label)

    for method, each in (
        (arcflow(student(), counted, optax.sgd(0.1), source=noise_source()), 2 * 4),
        (endpoint_regression(student(), counted, optax.sgd(0.1), source=noise_source()), 2 * 4),
    ):
        calls.clear()
        _, state = run_on(1, "jit", method, (), (), 3)
        jax.effects_barrier()
        assert len(calls) == int(state.queries) == 3 * each
        assert set(calls) == {16}


def test_progressive_counts_the_teacher_of_its_first_round_as_often_as_it_is_called():
    # Two rounds of two steps; two calls of a teacher that is the student of before.
    keys = BatchSpec("keys", 16)
    made = {"batches": keys, "data": points, "steps": 4, "nfe": 2, "first_nfe": 8}
    method = progressive(student(curved=False), exact, optax.sgd(0.1), teacher_nfe=2, **made)
    _, state = run_on(1, "jit", method, (), (), 4)
    assert int(state.queries) == 2 * (2 * 2) + 2 * 2


@pytest.mark.parametrize(
    ("source", "by_length", "weights"),
    [
        (noise_source(schedule=fixed(2, 0.5)), True, [2 / 3, 1 / 3]),
        (noise_source(schedule=fixed(2, 0.5)), False, [1, 1]),
        (noise_source(schedule=elastic((1,))), True, [1, 0]),
        (noise_source(schedule=elastic((1,))), False, [1, 0]),
        (from_data(BatchSpec("keys", 16), points, fixed(1), 1.0), False, [1]),
    ],
)
def test_a_segment_weighs_what_it_should(source, by_length, weights):
    """Loss and gradient are sums over segments: each by its length, and one of none not at all."""

    # What is asked of a segment differs with where it starts; a student of one number.
    def match(field, x, start, end, keys, query, step):
        return Segment(field * (1 + start), x, jnp.int32(0))

    passes = momentum_policy()._replace(begin=lambda outputs, x, start, end: outputs)
    made = Student(
        lambda key, frozen: {"a": jnp.float32(2)},
        lambda trainable, frozen, x, t, label: jnp.square(trainable["a"]) * jnp.ones(len(x)),
        passes,
    )
    method = student_method(
        match, made, exact, optax.sgd(1.0), source=source, weight_by_length=by_length
    )
    batch = {"keys": jax.random.split(jax.random.key(0), 16)}
    state = method.init(jax.random.key(1), (), batch)
    after, metrics = method.step(state, (), batch, jax.random.key(2))
    starts = source.start(batch).raw[:-1].mean(1)
    total = sum(w * (1 + float(s)) for w, s in zip(weights, starts, strict=True))
    np.testing.assert_allclose(metrics["loss"], 4 * total, rtol=1e-5)
    np.testing.assert_allclose(state.trainable["a"] - after.trainable["a"], 4 * total, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_teacher_and_the_student_share_the_way(share):
    keys = jax.random.split(jax.random.key(0), 500)
    own, teachers = (np.asarray(x) for x in _gaps(keys, 4, 0.5, share))
    assert own.shape == teachers.shape == (4, 500)
    assert (own >= 0).all() and (teachers >= 0).all()
    np.testing.assert_allclose(teachers.sum(0), 0.5 * share, atol=1e-6)
    # The largest of four even numbers lies at 4/5 on average; the student leaves the rest.
    np.testing.assert_allclose(own.sum(0).mean(), 0.8 * 0.5 * (1 - share), atol=0.01)
    assert (own.sum(0) <= 0.5 * (1 - share) + 1e-6).all()


@pytest.mark.slow
def test_the_teacher_leads_at_first_and_the_student_later():
    # On a field that is not the student's own, what is asked differs with who leads.
    def asked(step, teacher_steps):
        seen = []

        def spied(frozen, x, t, label):
            jax.debug.callback(lambda x, t: seen.append((np.array(x), np.array(t))), x, t)
            return jnp.ones_like(x)

        method = arcflow(
            student(), spied, optax.sgd(0.0), source=noise_source(), teacher_steps=teacher_steps
        )
        batch = {"keys": jax.random.split(jax.random.key(0), 16)}
        state = method.init(jax.random.key(1), (), batch)
        method.step(state._replace(step=jnp.int32(step)), (), batch, jax.random.key(2))
        jax.effects_barrier()
        return sorted(seen, key=lambda pair: -pair[1].mean())

    x, t = zip(*asked(0, 10)[:4], strict=True)  # of the first segment, which starts at 1
    # The teacher's velocity is 1 everywhere: states lie on its line from where all began.
    np.testing.assert_allclose(t[0], 1.0)
    for now, time in zip(x, t, strict=True):
        np.testing.assert_allclose(now, x[0] - (1 - time)[:, None, None, None], atol=1e-5)
    x, t = zip(*asked(10, 10)[:4], strict=True)
    assert t[0].max() < 1.0
    assert np.abs(x[3] - x[0] + (t[0] - t[3])[:, None, None, None]).max() > 1e-2


@pytest.mark.parametrize("output", ["less", "tuple"])
def test_a_teacher_that_makes_no_velocities_is_refused(output):
    def wrong(frozen, x, t, label):
        return x[..., :1] if output == "less" else (x, t)

    optimizer, keys = optax.sgd(0.1), BatchSpec("keys", 16)
    for method in (
        arcflow(student(), wrong, optimizer, source=noise_source()),
        progressive(student(), wrong, optimizer, batches=keys, data=points, steps=4),
    ):
        with pytest.raises(InputError, match="a velocity has their shape"):
            method.init(jax.random.key(0), (), {"keys": jax.random.split(jax.random.key(0), 16)})


@pytest.mark.slow
def test_the_loss_reaches_every_parameter_and_no_teacher():
    made = student()
    frozen = {"scale": jnp.float32(1.0)}
    method = arcflow(
        made,
        lambda frozen, x, t, label: frozen["scale"] * soft4().velocity(x, t),
        optax.sgd(1.0),
        source=noise_source(64),
    )
    batch = {"keys": jax.random.split(jax.random.key(0), 64)}
    state = method.init(jax.random.key(1), frozen, batch)
    after, _ = method.step(state, frozen, batch, jax.random.key(2))
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(0), after.trainable, state.trainable)
    assert all((leaf > 0).all() for leaf in jax.tree.leaves(moved))

    def change(scale):
        return method.step(state, {"scale": scale}, batch, jax.random.key(2))[1]["loss"]

    assert jax.grad(change)(1.0) == 0.0  # detached, though the value depends on it
    assert change(1.0) != change(1.5)


def test_segments_of_an_elastic_schedule_are_those_of_sampling():
    raw = np.asarray(elastic((1, 2, 4))(jax.random.split(jax.random.key(0), 2000)))
    assert (raw[0] == 1).all() and (np.diff(raw, axis=0) <= 0).all()
    lengths = np.round(1 / np.maximum(raw[1] - raw[2], 1e-9))
    whole = raw[1] == raw[2]  # one call: the second segment is none
    assert (raw[1][whole] == 0).all()
    assert set(lengths[~whole]) == {2, 4}
    starts = {(n, round(float(r), 3)) for n, r in zip(lengths[~whole], raw[1][~whole], strict=True)}
    assert starts == {(2, 0.5), (4, 0.75), (4, 0.5), (4, 0.25)}
    assert 0.25 < whole.mean() < 0.42


def test_starts_from_data_are_on_the_path_at_boundaries():
    spec = BatchSpec("uniform", 4000)
    x0 = jnp.ones((4000, 1, 1, 1))
    source = from_data(spec, lambda batch: (x0, jnp.zeros(4000, jnp.int32)), fixed(3, 0.5), 2.0)
    start = source.start({"keys": jax.random.split(jax.random.key(0), 4000)})
    rows, counts = np.unique(np.round(np.asarray(start.raw), 3), axis=1, return_counts=True)
    np.testing.assert_allclose(rows.T, [[0.2, 0.0], [0.6, 0.2], [1.0, 0.6]], atol=1e-3)
    np.testing.assert_allclose(counts / 4000, [0.2, 0.4, 0.4], atol=0.03)
    t = np.asarray(paths.shifted(start.raw[0], 2.0))
    for level in np.unique(t):
        mine = np.asarray(start.x)[t == level].ravel()
        np.testing.assert_allclose(mine.mean(), 1 - level, atol=0.12)
        np.testing.assert_allclose(mine.std(), level, atol=0.1)


def test_the_average_forgets_at_the_pace_of_its_power():
    # Of a constant 1 after zeros nothing of the start remains but prod (1 - 1/i) ** (power + 1).
    average = jnp.float32(0.0)
    for step in range(20):
        average = power_average(
            average, jnp.float32(step >= 10), jnp.int32(step), power=3.0, begin=0
        )
    kept = np.prod([(1 - 1 / i) ** 4 for i in range(11, 21)])
    np.testing.assert_allclose(average, 1 - kept, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: arcflow(student(), exact, optax.sgd(1.0), source=noise_source(),
                         queries=0), "queries=0"),
        (lambda: arcflow(student(), exact, optax.sgd(1.0), source=noise_source(),
                         mode_dropout=1.0), r"mode_dropout=1\.0"),
        (lambda: endpoint_regression(student(), exact, optax.sgd(1.0), source=noise_source(),
                                     queries=0), "at least once"),
        (lambda: elastic(()), "give some"),
        (lambda: elastic((2, 0)), "at least 1"),
        (lambda: momentum_policy("hour"), "unknown unit"),
        (lambda: gaussian_policy(0), "at least one"),
        (lambda: fixed(0), "at least one"),
        (lambda: flow_matching(exact, exact, optax.sgd(1.0), batches=BatchSpec("keys", 1),
                               data=exact, label_drop=0.1), "needs a null label"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"nfe": 2, "first_nfe": 6}, "power of two"),
        ({"nfe": 0, "first_nfe": 8}, "power of two"),
        ({"nfe": 2, "first_nfe": 2}, "power of two"),
        ({"nfe": 2, "first_nfe": 16, "steps": 2}, "2 steps for 3 rounds"),
    ],
)
def test_rounds_that_do_not_fit_are_refused(numbers, message):
    options = {"batches": BatchSpec("keys", 1), "data": lambda batch: batch, "steps": 8} | numbers
    with pytest.raises(InputError, match=message):
        progressive(student(), exact, optax.sgd(1.0), **options)


def test_a_teacher_of_another_shape_is_refused():
    method = arcflow(
        student(), lambda *_: jnp.zeros((16, 3)), optax.sgd(1.0), source=noise_source()
    )
    with pytest.raises(InputError, match=r"makes \(16, 3\) of examples \(16, 1, 1, 2\)"):
        run_on(1, "jit", method, (), (), 1)


@pytest.mark.parametrize("policy", [None, "step", "gaussian"])
def test_segments_of_no_length_count_for_nothing(policy):
    made = {"step": momentum_policy("step"), "gaussian": gaussian_policy(3)}.get(policy)
    built = student(policy=gaussian_policy(3)) if policy == "gaussian" else student()
    built = built._replace(policy=made or built.policy)
    for nfe in ((1,), (1, 2)):
        source = noise_source(8, elastic(nfe))
        method = arcflow(built, exact, optax.sgd(0.1), source=source, shift=3.2)
        batch = {"keys": jax.random.split(jax.random.key(0), 8)}
        state = method.init(jax.random.key(1), (), batch)
        after, metrics = method.step(state, (), batch, jax.random.key(2))
        assert all(np.isfinite(x) for x in metrics.values())
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.trainable))


@pytest.mark.parametrize(("steps", "rounds"), [(9, 4), (4, 3), (16, 5), (6, 1)])
def test_rounds_share_the_steps_evenly(steps, rounds):
    method = progressive(
        student((8, 8, 1)),
        lambda frozen, x, t, label: x,
        optax.sgd(0.0),
        batches=BatchSpec("uniform", 16),
        data=lambda b: (b["images"].astype(jnp.float32), b["labels"]),
        steps=steps,
        nfe=1,
        first_nfe=2**rounds,
    )
    records, _ = run_on(1, "jit", method, toy_data()[0], (), steps)
    calls = [int(values["nfe"]) for _, values in records]
    wanted = [2 ** (rounds - 1 - i) for i in range(rounds)]
    assert list(dict.fromkeys(calls)) == wanted
    assert max(map(calls.count, wanted)) - min(map(calls.count, wanted)) <= 1
