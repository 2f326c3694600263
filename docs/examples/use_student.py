"""Draws from a distilled student; run it in a work directory."""

import jax

import jaxdistill

student = jaxdistill.load_student(".")
label = jax.numpy.arange(16) % max(student.num_classes, 1)
examples = student.sample(jax.random.key(0), label, nfe=2)
print(student.card["dataset"], examples.shape, "in 2 network calls")
