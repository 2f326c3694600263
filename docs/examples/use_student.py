"""Samples from a distilled student; run it in a work directory."""

import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxdistill import flow_build
from jaxdistill.flow.students import sample
from jaxdistill.io import weights

trained, card = weights.load("artifacts", "student")
teacher, _ = weights.load("teacher", "teacher")
config = ConfigDict(card["config"])
problem = flow_build.problem_shapes(config)
student = flow_build.student(config, problem, card["method"])
settings = {name: card[name] for name in ("calls", "shift", "last")}
generate = jax.jit(functools.partial(sample, student, **settings))

noise = jax.random.normal(jax.random.key(0), (16, *problem.shape))
label = jnp.arange(16) % max(problem.num_classes, 1)
examples = generate(trained, {"teacher": teacher}, noise, label)
print(card["dataset"], examples.shape, f"in {card['calls']} network calls")
