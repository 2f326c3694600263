"""A loss of one's own before the referee of losses across tokenizers."""

import jax
import jax.numpy as jnp

from jaxdistill.vlm import oracle
from jaxdistill.vlm.same_vocabulary import log_probs, of_tokens


def squared_gap(student_logits, text):
    """The squared gap between the log-probabilities that both models give a text."""
    tokens = text.teacher_tokens, text.student_tokens
    masks = text.teacher_mask, text.student_mask
    ours = of_tokens(log_probs(text.teacher_logits), tokens[0], masks[0]).sum()
    theirs = of_tokens(log_probs(student_logits), tokens[1], masks[1]).sum()
    return jnp.square(ours - theirs), jnp.ones(())


with jax.enable_x64(True):
    world = oracle.world(jax.random.key(0), length=4)
    truth = oracle.candidate(world, oracle.exact(world))
    judged = oracle.candidate(world, oracle.of_texts(world, squared_gap))
    gap = oracle.zero_gap(judged, jax.random.key(1))
    cosines = oracle.bias(judged, truth, jax.random.key(2))
    before, after = oracle.descent(judged, jax.random.key(3))
print(f"gradient at the perfect student: {gap.gradient:.1e}, drift: {gap.drift:.1e} nats")
print(f"cosine with the true gradient: {cosines[0]:.2f} far away, {cosines[1]:.2f} near")
print(f"divergence of a random student: {before:.2f} nats, after minimizing: {after:.2g}")
