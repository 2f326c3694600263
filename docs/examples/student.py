"""Someone's own teacher, a closed-form velocity, and a student of two calls in plain JAX."""

import jax
import jax.numpy as jnp
import optax

from jaxdistill import runner
from jaxdistill.flow import samplers
from jaxdistill.flow.arcflow import arcflow
from jaxdistill.flow.paths import boundaries, shifted
from jaxdistill.flow.policies import momentum_policy
from jaxdistill.flow.students import Student, fixed, from_noise, sample

MODES, WIDTH, SHIFT, STD = 8, 64, 2.0, 0.3
corners = jnp.array([[1.0, 1.0], [-1.0, 1.0], [-1.2, -0.8], [0.9, -1.1]])


def teacher(frozen, x, t, label):
    """What (1 - t) data + t noise = x (n, 2) says of noise - data, with data around corners."""
    t = t[:, None, None]
    away, variance = x[:, None] - (1 - t) * corners, ((1 - t) * STD) ** 2 + t**2
    nearness = jax.nn.softmax(-jnp.sum(away**2, -1, keepdims=True) / (2 * variance), 1)
    return jnp.sum(nearness * ((t - (1 - t) * STD**2) / variance * away - corners), 1)


def init(key, frozen):
    """Two hidden layers; the gammas start between 0.2 and 4."""
    sizes = (4, WIDTH, WIDTH, 2 * MODES + MODES + MODES - 1)
    draws = zip(jax.random.split(key, 3), sizes[:-1], sizes[1:], strict=True)
    weights = [jax.random.normal(k, (a, b)) / jnp.sqrt(a) for k, a, b in draws]
    return {"weights": weights, "log_gammas": jnp.linspace(-1.6, 1.4, MODES - 1)}


def apply(trainable, frozen, x, t, label):
    """Velocities (n, 2, K), logits of their shares (n, K), logarithms of gammas (n, K - 1)."""
    first, second, last = trainable["weights"]
    inputs = jnp.concatenate([x, t[:, None], jnp.ones((len(x), 1))], 1)
    out = jnp.tanh(jnp.tanh(inputs @ first) @ second) @ last
    velocities, logits, log_gammas = jnp.split(out, [2 * MODES, 3 * MODES], 1)
    return velocities.reshape(-1, 2, MODES), logits, trainable["log_gammas"] + 0.1 * log_gammas


student = Student(init, apply, momentum_policy())
source = from_noise((2,), 256, fixed(2), num_classes=0)
optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 600))
method = arcflow(student, teacher, optimizer, source=source, shift=SHIFT, teacher_steps=200)
state = runner.run(method, key=jax.random.key(0), steps=600, chunk=100)

noise, label = jax.random.normal(jax.random.key(1), (2000, 2)), jnp.zeros(2000, jnp.int32)


def error(ends):
    """Root mean square distance from the ends of the teacher's exact paths, from one noise."""
    fine = shifted(boundaries(200), SHIFT)
    exact = samplers.rk4(lambda x, t: teacher((), x, t, label), noise, fine)
    return float(jnp.sqrt(jnp.sum((ends - exact) ** 2, 1).mean()))


coarse = shifted(boundaries(2), SHIFT)
euler = error(samplers.euler(lambda x, t: teacher((), x, t, label), noise, coarse))
ours = error(sample(student, method.output(state), (), noise, label, nfe=2, shift=SHIFT))
print(f"Euler with 2 calls: {euler:.3f}\nstudent with 2 calls: {ours:.3f}")
