"""One loss for three fields, against each field's own, in float64; and its sampler's order."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import config as configs
from jaxdistill import settings
from jaxdistill.errors import InputError
from jaxdistill.flow import samplers, transports
from jaxdistill.flow.adapt import fresh_trunk
from jaxdistill.flow.paths import AUTO, boundaries, expand, kumaraswamy
from jaxdistill.flow.samplers import ucgm_s
from jaxdistill.flow.targets import gaussian_mixture
from jaxdistill.flow.transports import (
    LINEAR,
    TRANSPORTS,
    answer,
    estimates,
    of_data,
    of_noise,
    of_output,
    of_velocity,
    point,
    speed,
)
from jaxdistill.flow.ucgm import Unified, distance, draw_times, enhanced, target, ucgm
from jaxdistill.method import BatchSpec

EXACT = {"weight": "uniform", "distance": "square", "bound": 1e9, "enhancement": 0.0}


@pytest.fixture
def precise():
    with jax.enable_x64(True):
        yield


def drawn(n=16, shape=(2, 2, 3)):
    numbers = np.random.default_rng(0)
    normal = lambda: jnp.asarray(numbers.normal(size=(n, *shape)))  # noqa: E731
    return normal(), normal(), normal(), jnp.asarray(numbers.uniform(0.05, 0.95, n))


def network(params, x, t):
    t = expand(t, x)
    return jnp.tanh(x * params["a"] + t * params["b"]) * params["c"] + params["a"] * x


PARAMS = {"a": np.array([0.3, -0.2, 0.5]), "b": np.array([0.1, 0.7, -0.4]), "c": np.ones(3)}


# ---------------------------------------------------------------------------- transports


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.usefixtures("precise")
def test_estimates_make_up_the_point_and_the_output_whatever_it_is(name):
    transport = TRANSPORTS[name]
    data, noise, output, t = drawn()
    x = point(transport, data, noise, t)
    made = estimates(transport, x, t, output)
    np.testing.assert_allclose(point(transport, *made, t), x, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(answer(transport, *made, t), output, rtol=1e-9, atol=1e-9)
    right = estimates(transport, x, t, answer(transport, data, noise, t))
    for found, wanted in zip(right, (data, noise), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.usefixtures("precise")
def test_all_kinds_of_networks_give_the_same_estimates(name):
    transport = TRANSPORTS[name]
    data, noise, _, t = drawn()
    x = point(transport, data, noise, t)
    for estimate in (
        of_output(transport, lambda x, t: answer(transport, data, noise, t)),
        of_data(lambda x, t: data, transport),
        of_noise(lambda x, t: noise, transport),
        of_velocity(lambda x, t: noise - data, transport),
    ):
        for found, wanted in zip(estimate(x, t), (data, noise), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("precise")
def test_the_speed_is_the_derivative_of_the_point():
    data, noise, _, t = drawn()
    for transport in TRANSPORTS.values():
        after, before = (point(transport, data, noise, t + s * 1e-6) for s in (1, -1))
        np.testing.assert_allclose(
            speed(transport, data, noise, t), (after - before) / 2e-6, rtol=1e-5, atol=1e-5
        )


def test_the_published_times():
    """Check values of the released code, for ten steps and for two."""
    wanted = [0.9999, 0.9529, 0.8844, 0.8029, 0.7103, 0.6068, 0.4915, 0.3622, 0.2123, 0.0050, 0]
    np.testing.assert_allclose(kumaraswamy(10, AUTO, (0.001, 0.001)), wanted, atol=1e-4)
    np.testing.assert_allclose(kumaraswamy(2, gaps=(0.001, 0.5)), [0.999, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(kumaraswamy(1, gaps=(0.001, 0.5)), [0.999, 0], atol=1e-6)
    np.testing.assert_allclose(kumaraswamy(4, gaps=(0.0, 0.0)), boundaries(4), atol=1e-6)


# ---------------------------------------------------------------------------- the sampler


def error(steps, **options):
    mean, std = np.array([1.0, -2.0]), 0.5
    velocity = gaussian_mixture(np.ones(1), mean[None], np.array([std])).velocity
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 1, 1, 2)))
    end = ucgm_s(of_velocity(velocity), x, jnp.linspace(1.0, 0.0, steps + 1), **options)
    return float(jnp.sqrt(jnp.square(end - (mean + std * x)).mean()))


@pytest.mark.usefixtures("precise")
def test_a_third_is_of_second_order_a_half_of_first_and_one_of_none():
    """The theory of the extrapolation, which is not that of the paper: see the sampler."""
    ratio = {k: error(128, kappa=k) / error(256, kappa=k) for k in (0.0, 1 / 3, 0.5, 0.99)}
    assert 1.8 < ratio[0.0] < 2.2 and 1.8 < ratio[0.5] < 2.2
    assert 3.4 < ratio[1 / 3] < 4.6
    assert ratio[0.99] < 1.3
    assert error(128, kappa=1 / 3) < 0.2 * min(error(128), error(128, kappa=0.5))


@pytest.mark.usefixtures("precise")
def test_two_calls_a_step_are_heuns_method_but_for_the_end():
    assert 3.5 < error(32, order=2) / error(64, order=2) < 8.5
    assert error(32, order=2) < 0.2 * error(63)


def test_without_extrapolation_it_is_eulers_on_the_straight_path():
    velocity = gaussian_mixture(np.ones(1), np.ones((1, 2)), np.array([0.4])).velocity
    x = jax.random.normal(jax.random.key(0), (8, 1, 1, 2))
    ends = (
        samplers.euler(velocity, x, boundaries(7)),
        ucgm_s(of_velocity(velocity), x, boundaries(7)),
    )
    np.testing.assert_allclose(*ends, atol=1e-5)


def test_a_sweep_of_settings_is_one_program():
    traces = []

    @jax.jit
    def run(x, times, kappa, rho):
        traces.append(1)
        estimate = of_velocity(lambda x, t: x)
        return ucgm_s(estimate, x, times, samplers.own_keys(x), kappa=kappa, rho=rho)

    x = jax.random.normal(jax.random.key(0), (4, 2, 2, 1))
    made = [
        run(x, kumaraswamy(6, shape), kappa, rho)
        for shape in (AUTO, (1.0, 1.0, 1.0))
        for kappa, rho in ((0.0, 0.0), (0.3, 0.0), (0.3, 0.5))
    ]
    assert len(traces) == 1
    assert all(np.abs(a - b).max() > 1e-5 for a, b in itertools.pairwise(made))


def test_noise_on_the_way_belongs_to_the_example():
    x = jax.random.normal(jax.random.key(0), (6, 2, 2, 1))
    run = lambda x: ucgm_s(  # noqa: E731
        of_velocity(lambda x, t: 0.3 * x), x, boundaries(3), samplers.own_keys(x), rho=1.0
    )
    whole = run(x)
    np.testing.assert_allclose(run(x[3:]), whole[3:], atol=1e-6)
    assert np.abs(run(x + 1e-3) - whole).max() > 0.1  # other noise, another way
    with pytest.raises(InputError, match="give a key for each example"):
        ucgm_s(of_velocity(lambda x, t: x), x, boundaries(3), rho=1.0)
    with pytest.raises(InputError, match="use rho=0 with it"):
        ucgm_s(
            of_velocity(lambda x, t: x), x, boundaries(3), samplers.own_keys(x), rho=1.0, order=2
        )


def test_nothing_is_drawn_on_the_way_to_the_end():
    """One call of a network that knows the data ends in them, whatever rho."""
    x = jax.random.normal(jax.random.key(0), (6, 2, 2, 1))
    end = ucgm_s(
        of_data(lambda x, t: jnp.ones_like(x)), x, boundaries(2), samplers.own_keys(x), rho=1.0
    )
    np.testing.assert_allclose(end, 1.0, atol=1e-6)


# ---------------------------------------------------------------------------- the loss


def gradient(transport, unified, params, data, noise, t):
    """Of the loss at given noise and times."""
    x = point(transport, data, noise, t)
    params = jax.tree.map(jnp.asarray, params)

    def estimate(x, t):
        return estimates(transport, x, t, network(params, x, t))

    def loss(p):
        output = network(p, x, t)
        still = jax.lax.stop_gradient(output)
        wanted = target(estimate, still, data, noise, t, transport=transport, unified=unified)
        weight = jnp.cos(jnp.pi / 2 * t) if unified.weight == "cosine" else 1.0
        return (weight * distance(output, jax.lax.stop_gradient(wanted), unified)).mean()

    return jax.grad(loss)(params)


def same(found, wanted, rtol):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12), found, wanted
    )


@pytest.mark.usefixtures("precise")
def test_a_ratio_of_zero_is_flow_matching():
    data, noise, _, t = drawn()

    def flow_matching(params):
        x = (1 - expand(t, data)) * data + expand(t, data) * noise
        return jnp.square(network(params, x, t) - (noise - data)).mean()

    found = gradient(LINEAR, Unified(0.0, **EXACT), PARAMS, data, noise, t)
    same(found, jax.grad(flow_matching)(jax.tree.map(jnp.asarray, PARAMS)), 1e-9)


@pytest.mark.usefixtures("precise")
def test_a_ratio_of_zero_is_edm():
    """Karras et al. 2022, with their preconditioning and weight written out; deviation 1/2."""
    data, noise, _, t = drawn()
    sigma = np.exp(4 * (2.68 * np.asarray(t) - 1.59)).reshape(-1, 1, 1, 1)
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / np.sqrt(sigma**2 + 0.25)
    c_in, weight = 1 / np.sqrt(sigma**2 + 0.25), (sigma**2 + 0.25) / (0.5 * sigma) ** 2

    def edm(params):
        noisy = data + sigma * noise
        denoised = c_skip * noisy + c_out * network(params, c_in * noisy, t)
        return (weight * jnp.square(denoised - data)).mean()

    # Our output is asked for what EDM's network is, up to the scale: both divide by c_out.
    found = gradient(TRANSPORTS["edm"], Unified(0.0, **EXACT), PARAMS, data, noise, t)
    same(found, jax.grad(edm)(jax.tree.map(jnp.asarray, PARAMS)), 1e-8)


@pytest.mark.usefixtures("precise")
def test_a_ratio_of_one_is_the_continuous_consistency_model():
    """Lu and Song 2024: the gradient of F times the derivative of f along the path, which TrigFlow
    turns into a target at a distance that no longer depends on the time."""
    data, noise, _, t = drawn()
    transport, params = TRANSPORTS["trigflow"], jax.tree.map(jnp.asarray, PARAMS)

    def end(angle):  # of the path through a point, in their angle
        a = expand(angle, data)
        x = jnp.cos(a) * data + jnp.sin(a) * noise
        return jnp.cos(a) * x - jnp.sin(a) * network(params, x, angle / (jnp.pi / 2))

    angle = jnp.pi / 2 * t
    tangent = jax.jvp(end, (angle,), (jnp.ones_like(angle),))[1] * jnp.pi / 2

    def consistency(p):
        x = point(transport, data, noise, t)
        weight = 4 * jnp.cos(expand(angle, data))
        # With their sign: F points away from the data.
        return -2 * (weight * network(p, x, t) * tangent).mean()

    unified = Unified(1.0, **EXACT | {"weight": "cosine", "derivative": "jvp"})
    found = gradient(transport, unified, PARAMS, data, noise, t)
    same(found, jax.grad(consistency)(params), 1e-8)


@pytest.mark.parametrize("name", ["linear", "trigflow", "triglinear", "random"])
@pytest.mark.usefixtures("precise")
def test_the_difference_is_the_derivative_and_the_limit_of_the_ratio(name):
    data, noise, _, t = drawn()
    ways = {
        "jvp": Unified(1.0, **EXACT, derivative="jvp"),
        "difference": Unified(1.0, **EXACT, epsilon=1e-5),
        "near": Unified(1 - 1e-6, **EXACT),
    }
    made = {n: gradient(TRANSPORTS[name], u, PARAMS, data, noise, t) for n, u in ways.items()}
    same(made["difference"], made["jvp"], 1e-6)
    same(made["near"], made["jvp"], 1e-3)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.usefixtures("precise")
def test_the_closed_form_of_a_gaussian_is_where_the_gradient_vanishes(ratio):
    """For data N(mean, 1) under TrigFlow the best estimate is mean + c (x - gamma mean).

    c is the product over t, ratio t, ratio^2 t, ... of what neighbours have in common (paper,
    D.1.5). A network whose c leaves that way, as time passes, is drawn back.
    """
    transport, mean, n = TRANSPORTS["trigflow"], 1.5, 100_000
    numbers = np.random.default_rng(1)
    data = jnp.asarray(mean + numbers.normal(size=(n, 1)))
    noise = jnp.asarray(numbers.normal(size=(n, 1)))
    gamma = lambda t: transport.gamma(t)[:, None]  # noqa: E731

    def best(t):
        if ratio in (0, 1):
            return gamma(t) if ratio == 0 else jnp.ones_like(t)[:, None]
        first = t[:1]  # they are all the same
        grid = first * ratio ** np.arange(200.0)
        return jnp.prod(jnp.cos(jnp.pi / 2 * (grid[:-1] - grid[1:])))[None, None]

    def pull(off):
        """What the residual says of c: its covariance with the point."""

        def network(x, t):
            estimate = mean + (1 + off * t[:, None]) * best(t) * (x - gamma(t) * mean)
            noise = (x - gamma(t) * estimate) / transport.alpha(t)[:, None]
            return answer(transport, estimate, noise, t)

        t = jnp.full(n, 0.6)
        x = point(transport, data, noise, t)
        wanted = target(
            of_output(transport, network),
            network(x, t),
            data,
            noise,
            t,
            transport=transport,
            unified=Unified(ratio, **EXACT, derivative="jvp"),
        )
        return float(((wanted - network(x, t)) * (x - gamma(t) * mean)).mean())

    right, high, low = (pull(d) for d in (0.0, 0.3, -0.3))
    assert abs(right) < 0.1 * min(abs(high), abs(low))
    assert high * low < 0


def test_enhancement_moves_the_direction_and_not_the_point():
    data, noise, output, t = drawn(200)
    x = point(LINEAR, data, noise, t)
    known = estimates(LINEAR, x, t, output)
    unified = Unified(1.0, enhancement=1.3)
    better = enhanced((data, noise), known, (data, noise), t, unified)
    np.testing.assert_allclose(point(LINEAR, *better, t), x, atol=1e-5)
    late = np.asarray(t) >= 0.75
    assert late.any() and not late.all()
    np.testing.assert_allclose(better[0][late], (data + known[0])[late] / 2, atol=1e-5)
    wanted = data + 1.3 * (known[0] - data)
    np.testing.assert_allclose(better[0][~late], wanted[~late], atol=1e-5)
    # With a factor of one it is the teacher's own path.
    alone = enhanced((data, noise), known, (data, noise), t, unified._replace(enhancement=1.0))
    np.testing.assert_allclose((alone[1] - alone[0])[~late], output[~late], atol=1e-4)


def test_the_own_guidance_is_that_of_a_scale():
    """Where the label says A and its absence B, what is learned is B + (A - B) / (1 - zeta)."""
    A, B, zeta = 1.0, 0.2, 1 / 3
    wanted = B + (A - B) / (1 - zeta)
    t = jnp.full(1, 0.5)
    pair = (jnp.full((1, 1), A), jnp.zeros((1, 1)))
    known = (jnp.full((1, 1), wanted), jnp.zeros((1, 1)))
    blank = (jnp.full((1, 1), B), jnp.zeros((1, 1)))
    better = enhanced(pair, known, blank, t, Unified(0.0, enhancement=zeta))
    np.testing.assert_allclose(better[0], wanted, rtol=1e-6)


def test_distances_and_times():
    far, near = jnp.full((1, 2, 2, 3), 3.0), jnp.zeros((1, 2, 2, 3))
    assert float(distance(far, near, Unified(distance="square"))[0]) == pytest.approx(9.0)
    assert float(distance(far, near, Unified(huber=0.0))[0]) == pytest.approx(3.0)
    assert float(distance(far, near, Unified(huber=4.0))[0]) == pytest.approx(1.0)
    assert float(distance(far, far, Unified(huber=0.0, cosine=True))[0]) == pytest.approx(
        0, abs=1e-5
    )
    opposite = distance(far, -far, Unified(distance="square", cosine=True))
    assert float(opposite[0]) == pytest.approx(36 + 2)
    keys = jax.random.split(jax.random.key(0), 4000)
    times = np.asarray(draw_times(keys, (2.0, 3.0, 1.0)))
    assert times.mean() == pytest.approx(0.4, abs=0.01) and 0 < times.min() < times.max() < 1
    assert (draw_times(keys, (2.0, 3.0, 2.0)) == 1.0).mean() > 0.1


# ---------------------------------------------------------------------------- the training


@functools.cache
def trained(ratio, name="linear", steps=2000):
    """A small network on two points' worth of data, N(1, 0.3^2) in two dimensions."""
    transport = TRANSPORTS[name]

    def init(key, frozen):
        del frozen
        k1, k2 = jax.random.split(key)
        return {
            "in": jax.random.normal(k1, (4, 48)) / 2,
            "mid": jax.random.normal(k2, (48, 48)) / 7,
            "out": jnp.zeros((48, 2)),
        }

    def apply(params, frozen, x, t, label):
        flat = jnp.concatenate([x.reshape(len(x), 2), t[:, None], jnp.cos(3 * t)[:, None]], 1)
        out = jnp.tanh(jnp.tanh(flat @ params["in"]) @ params["mid"]) @ params["out"]
        out = out.reshape(x.shape)
        return out, *estimates(transport, x, t, out)

    def data(batch):
        keys = jax.vmap(lambda k: jax.random.fold_in(k, 7))(batch["keys"])
        points = 1 + 0.3 * jax.vmap(lambda k: jax.random.normal(k, (1, 1, 2)))(keys)
        return points, jnp.zeros(len(points), jnp.int32)

    # Even weights, for the cosine leaves out the very start of the path, and no bound, which keeps
    # the spread under TrigFlow too wide.
    unified = Unified(ratio, times=(1.0, 1.0, 1.0), **EXACT)
    method = ucgm(
        init, apply, optax.adam(3e-3), batches=BatchSpec("keys", 128), data=data,
        transport=transport, unified=unified,
    )  # fmt: skip

    @jax.jit
    def run(key):
        state = method.init(key, (), {"keys": jax.random.split(key, 128)})

        def step(state, key):
            keys = {"keys": jax.random.split(key, 128)}
            return method.step(state, (), keys, key)

        return jax.lax.scan(step, state, jax.random.split(key, steps))

    state, metrics = run(jax.random.key(0))
    estimate = lambda x, t: apply(method.output(state), (), x, t, None)[1:]  # noqa: E731
    return estimate, transport, metrics


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "trigflow"])
def test_one_call_of_a_consistent_network_has_the_spread_of_the_data(name):
    noise = jax.random.normal(jax.random.key(5), (2000, 1, 1, 2))
    spread = {}
    for ratio in (0.0, 1.0):
        estimate, transport, _ = trained(ratio, name)
        end = ucgm_s(estimate, noise, kumaraswamy(1), transport=transport)
        np.testing.assert_allclose(end.mean((0, 1, 2)), 1.0, atol=0.15)
        spread[ratio] = float(end.std((0, 1, 2)).mean())
    # The mean of all data at a ratio of 0; their spread at 1.
    assert spread[0.0] < 0.18
    assert 0.24 < spread[1.0] < 0.42


def test_many_calls_of_a_matched_flow_have_it_too():
    noise = jax.random.normal(jax.random.key(5), (2000, 1, 1, 2))
    estimate, transport, _ = trained(0.0)
    end = ucgm_s(estimate, noise, kumaraswamy(16), transport=transport, kappa=1 / 3)
    assert 0.25 < float(end.std((0, 1, 2)).mean()) < 0.36


def recipe_of(**changes):
    """The recipe of a config of points, its task, and parameters of a teacher."""
    config = configs.load("ucgm:smoke,baselines=", {f"method.{k}": v for k, v in changes.items()})
    resolved = settings.resolve(config)
    task = resolved.family.shapes(resolved)
    frozen = {"teacher": fresh_trunk(task.trunk, task.shape, jax.random.key(7))}
    return resolved.rows["ucgm"].recipe(task), frozen


def test_a_network_starts_from_the_teacher_or_fresh():
    keys = {"keys": jax.random.split(jax.random.key(1), 8)}
    starts = []
    for fresh in ("False", "True"):
        made, frozen = recipe_of(fresh=fresh)
        state = jax.jit(made.method.init)(jax.random.key(2), frozen, keys)
        starts.append(made.method.output(state)["trunk"])
    jax.tree.map(
        np.testing.assert_array_equal, starts[0], {k: frozen["teacher"][k] for k in starts[0]}
    )
    assert np.abs(starts[1]["embed"]["kernel"] - starts[0]["embed"]["kernel"]).max() > 1e-3
    with pytest.raises(InputError, match=r"method\.fresh trains the whole network; set"):
        recipe_of(fresh="True", rank="2")


def test_the_way_of_a_student_leads_to_its_samples():
    made, frozen = recipe_of()
    keys = {"keys": jax.random.split(jax.random.key(1), 8)}
    output = made.method.output(jax.jit(made.method.init)(jax.random.key(2), frozen, keys))
    noise = jax.random.normal(jax.random.key(3), (5, 1, 1, 2))
    label = jnp.zeros(5, jnp.int32)
    end = made.sample(output, frozen, noise, label, nfe=3)
    way = made.trace(output, frozen, noise, label, nfe=3, parts=4)
    assert way.shape == (13, *noise.shape)
    np.testing.assert_array_equal(way[0], noise)
    np.testing.assert_allclose(way[-1], end, atol=1e-5)
    # Straight from call to call.
    np.testing.assert_allclose(way[2], (way[0] + way[4]) / 2, atol=1e-5)


def test_guidance_without_anybody_to_guide_is_refused():
    options = {"batches": BatchSpec("keys", 4), "data": lambda batch: batch}
    make = functools.partial(ucgm, lambda k, f: f, lambda *a: a, optax.adam(1.0), **options)
    with pytest.raises(InputError, match="needs labels, a label_drop above 0"):
        make(unified=Unified(0.0, enhancement=0.5))
    with pytest.raises(InputError, match="enhancement below 1"):
        make(unified=Unified(0.0, enhancement=1.0), null=3)
    with pytest.raises(InputError, match="needs a teacher"):
        make(unified=Unified(0.5, enhancement=1.0))
    with pytest.raises(InputError, match="give three numbers"):
        make(unified=Unified(1.0, enhancement=0.0, times=(1.0, 1.0)))


def test_transports_are_those_of_the_paper():
    """At the ends: data at 0 and noise at 1, and a denominator that keeps its sign."""
    t = jnp.linspace(0.01, 0.99, 50)
    for name, transport in TRANSPORTS.items():
        below = transports.denominator(transport, t)
        assert (jnp.sign(below) == jnp.sign(below[0])).all() and jnp.abs(below).min() > 0.5, name
        ends = [[float(c(jnp.full(1, t))[0]) for c in transport[:2]] for t in (0.0, 1.0)]
        scale = 2.0 if name == "edm" else 1.0  # its data have deviation one half
        np.testing.assert_allclose(ends, [[0, scale], [1, 0]], atol=0.02)
