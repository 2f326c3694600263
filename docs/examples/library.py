"""Points descend towards a sample, and the frequencies that compare the two ascend."""

import jax
import optax

from jaxdistill.condense.charfn import discrepancy, gaussian

real = 1.0 + jax.random.normal(jax.random.key(0), (500, 16))
freqs, unseen = (gaussian(scale=2.0).draw({}, jax.random.key(i), 256, 16) for i in (1, 2))
players = {"points": jax.random.normal(jax.random.key(3), (50, 16)), "freqs": freqs}
rates = {"points": optax.adam(1e-2), "freqs": optax.adam(-1e-3)}  # a negative rate ascends
tx = optax.partition(rates, {name: name for name in players})
opt = tx.init(players)
gradient = jax.jit(jax.grad(lambda p: discrepancy(real, p["points"], p["freqs"])))
print(f"before: {discrepancy(real, players['points'], unseen):.3f}")
for _ in range(300):
    updates, opt = tx.update(gradient(players), opt)
    players = optax.apply_updates(players, updates)
print(f"after: {discrepancy(real, players['points'], unseen):.3f}")
