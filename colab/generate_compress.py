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
# # Generate images, then keep a few
#
# A flow learns to make images, a student of it makes many of them in two calls of its network, RDED
# keeps those that an observer finds easy, and fresh networks that have seen nothing else are tested
# on real images. You get, in one folder,
#
# - `generator/`, the teacher, its student and the data set that it made, an `.npz` with a picture;
# - `artifacts/`, the few images that are left, their card and their picture;
# - `results.json`, accuracies beside those of images drawn at random.
#
# On a CPU it takes scikit-learn's digits, which need no download; on an accelerator Fashion-MNIST.

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
    # %pip install -q -c keep-jax.txt {SOURCE}

# %% [markdown]
# ## Choose
#
# Let `FOLDER` lie on storage that stays, such as a mounted drive, for a run longer than a runtime.

# %%
import jax

import jaxdistill

FOLDER = Path("runs")

accelerated = jax.default_backend() != "cpu"
dataset = "fashion_mnist" if accelerated and not SMOKE else "digits"
preset = f"generate_compress:dataset={dataset},generator=arcflow{',smoke' if SMOKE else ',ipc=10'}"
config = jaxdistill.load_config(preset)
if not accelerated and not SMOKE:
    # Minutes on two cores: a short teacher, and fewer images of each class.
    config.generator.teacher.steps = 1500
    config.generator.method.steps = 200
    config.generator.evals.generated.per_class = 150
    config.evals.accuracy.seeds = 1
workdir = FOLDER / f"generated-{dataset}{'-smoke' if SMOKE else ''}"
print(preset, "in", workdir)

# %% [markdown]
# Settings of the generator lie under `config.generator`; `generator.evals.generated.filter` lets a
# classifier reject what it does not take for its class. A folder goes with the settings it was
# started with.
#
# ## Run
#
# One call for all stages. **To go on after an interruption, run the same cells again.**

# %%
records = jaxdistill.train(config, workdir)

# %% [markdown]
# ## Look
#
# What the flow made, a row a class:

# %%
from IPython.display import Image

Image(workdir / "generator" / "generated" / "generated.png")

# %% [markdown]
# And what is left of it:

# %%
Image(workdir / "artifacts" / "distilled.png")

# %% [markdown]
# ## Compare
#
# The same recipe on real images says what the detour costs.

# %%
real = config.copy_and_resolve_references().unlock()
del real.generator
real.data.name = dataset
jaxdistill.train(real, FOLDER / f"real-{dataset}{'-smoke' if SMOKE else ''}")
