# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Two calls by distribution matching: PCM, then DMD2, then a discriminator
#
# A student of few calls can learn where its teacher's paths end, as PCM does, or what the teacher's
# examples look like, as DMD2 does. Here one goes on where the other has ended:
#
# 1. **PCM** makes a student whose every call ends a phase of the way from noise to data;
# 2. **DMD2** moves what that student makes to where the teacher's examples are more likely, with a
#    critic that learns on the way what the student makes;
# 3. a **discriminator** on blocks of the teacher's network tells the student's examples from real
#    ones, and DMD2 goes on beside it.
#
# You get a folder for each stage, with the student, its pictures and its table. On a CPU the data
# are points in the plane, in 25 heaps that can be counted; on an accelerator Fashion-MNIST.

# %% [markdown]
# ## Install
#
# `SOURCE` is a checkout of jaxdistill, or a wheel made from one by `pip wheel --no-deps .`.
# The JAX that the machine came with fits its accelerator, so the installation may not replace it.

# %%
import os
from importlib.metadata import distributions
from pathlib import Path

SMOKE = os.environ.get("JAXDISTILL_SMOKE") == "1"  # a run of seconds, by what is installed
SOURCE = ".."

if not SMOKE:
    present = {d.name: d.version for d in distributions()}
    kept = [f"{name}=={present[name]}\n" for name in ("jax", "jaxlib") if name in present]
    Path("keep-jax.txt").write_text("".join(kept))
    # %pip install -q -c keep-jax.txt {SOURCE} matplotlib

# %% [markdown]
# ## Choose
#
# Let `FOLDER` lie on storage that stays, such as a mounted drive, for a run longer than a runtime.
# **To go on after an interruption, run the same cells again.**

# %%
import jax

import jaxdistill

FOLDER = Path("runs")

accelerated = jax.default_backend() != "cpu"
dataset = "fashion_mnist" if accelerated and not SMOKE else "grid25"
ending = ",smoke" if SMOKE else ""
place = FOLDER / f"two-steps-{dataset}{'-smoke' if SMOKE else ''}"


def fitted(config):
    """A config as it is, or longer where there is an accelerator: recipes are meant for CPUs."""
    if accelerated and not SMOKE:
        config.teacher.steps, config.teacher.batch_size = 20_000, 256
        for student in (config.method, *config.baselines.values()):
            student.batch_size = 256
    return config


# %% [markdown]
# ## First PCM
#
# This trains the teacher too. The row `linear` learns from the teacher's velocities alone and is
# what PCM is compared with.

# %%
pcm = place / "pcm"
config = fitted(jaxdistill.load_config(f"pcm:dataset={dataset},baselines=linear{ending}"))
records = {"PCM": jaxdistill.train(config, pcm)}

# %% [markdown]
# ## Then DMD2
#
# `start=` takes the folder of PCM's student; the teacher is that run's. The row `gan` has the
# discriminator alone, and begins at the same place.

# %%
dmd2 = place / "dmd2"
config = fitted(jaxdistill.load_config(f"dmd2:dataset={dataset},start={pcm},baselines=gan{ending}"))
config.evals.samples.teacher_rows = ()  # they are in PCM's table
records["PCM, DMD2"] = jaxdistill.train(config, dmd2)

# %% [markdown]
# Without PCM, DMD2 starts as the teacher, whose single step is a blur: the examples of a class
# begin at one place, and may never reach all that there are. This run shows what the start is
# worth.

# %%
alone = place / "dmd2-alone"
config = fitted(jaxdistill.load_config(f"dmd2:dataset={dataset},baselines={ending}"))
config.teacher.dir, config.evals.samples.teacher_rows = str(pcm / "teacher"), ()
records["DMD2"] = jaxdistill.train(config, alone)

# %% [markdown]
# ## Then a discriminator beside it

# %%
last = place / "adversarial"
config = fitted(jaxdistill.load_config(f"dmd2:dataset={dataset},start={dmd2},baselines={ending}"))
# The teacher lies where PCM was trained.
config.teacher.dir, config.evals.samples.teacher_rows = str(pcm / "teacher"), ()
config.method.adversarial = 0.1
records["PCM, DMD2, discriminator"] = jaxdistill.train(config, last)

# %% [markdown]
# ## Look
#
# The same noise through each stage. Of points, the teacher's are what all should look like.

# %%
from IPython.display import Image, Markdown, display

for folder in (pcm, alone, dmd2, last):
    display(Markdown(f"**{folder.name}**"), Image(folder / "artifacts" / "samples.png"))

# %% [markdown]
# The table once more. Of points in heaps, `modes` counts the heaps that are found and `mass
# off` how unevenly they are filled: distances alone do not see a heap that is missing.

# %%
from jaxdistill.eval import results

for name, found in records.items():
    shown = [record for record in found if record["metric"] not in ("wall s", "CPU s")]
    display(Markdown(f"**{name}**\n\n{results.table(shown)}"))

# %% [markdown]
# The critic's loss does not fall to nothing and need not: it is the spread of the noise, on what
# the student makes now. What should shrink is `matching`, the mean size of the gradient at the
# examples.

# %%
import json

import matplotlib.pyplot as plt

_, axes = plt.subplots(1, 3, figsize=(12, 3))
for axis, key in zip(axes, ("critic", "matching", "discriminator"), strict=True):
    for folder in (alone, dmd2, last):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        if key in lines[0]:
            axis.plot([x["step"] for x in lines], [x[key] for x in lines], label=folder.name)
    axis.set(xlabel="step", title=key)
    axis.legend()
plt.show()

# %% [markdown]
# ## Use
#
# A student of phases is trained for its own number of calls. With others it makes something, which
# may be worse: this is one call, two and four from one checkpoint.

# %%
import jax.numpy as jnp
import numpy as np

student = jaxdistill.load_student(last, pcm / "teacher")
label = jnp.arange(500) % max(student.num_classes, 1)
_, axes = plt.subplots(1, 3, figsize=(9, 3))
for axis, calls in zip(axes, (1, 2, 4), strict=True):
    made = np.asarray(student.sample(jax.random.key(1), label, calls))
    axis.set(title=f"{calls} calls", xticks=[], yticks=[])
    if made.shape[1:] == (1, 1, 2):
        axis.scatter(*made.reshape(-1, 2).T, s=3)
    else:
        rows = np.clip(made[:25, ..., 0].reshape(5, 5, *made.shape[1:3]), -1, 1)
        axis.imshow(rows.swapaxes(1, 2).reshape(5 * made.shape[1], -1), cmap="gray")
plt.show()
