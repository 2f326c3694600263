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
# # Distil a flow model into two network calls with ArcFlow
#
# This notebook trains a flow model, which makes examples from noise in a hundred network calls, and
# students of it that take two. You get
#
# - `artifacts/student.safetensors`, what was trained, and `student.json`, which says what it is;
# - `artifacts/samples.png`, made by teacher and students from the same noise;
# - a table of how near the students come to the teacher, and how long each takes;
# - `metrics.jsonl`, the curves.
#
# On a CPU it takes points in the plane, whose exact paths are known; on an accelerator
# Fashion-MNIST.

# %% [markdown]
# ## Install
#
# `SOURCE` is a checkout of jaxdistill, or a wheel made from one by `pip wheel --no-deps .`.
# The JAX that the machine came with fits its accelerator, so the installation may not replace it:
# where it is too old or too new, pip says so and installs nothing.

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
# Everything of a run lies in its folder. A runtime that ends takes its disk along, so for a long
# run let `FOLDER` lie on storage that stays. On Colab:
#
# ```python
# from google.colab import drive
#
# drive.mount("/content/drive")
# FOLDER = Path("/content/drive/MyDrive/jaxdistill")
# ```

# %%
import jax

import jaxdistill

FOLDER = Path("runs")

accelerated = jax.default_backend() != "cpu"
print(jax.device_count(), "x", jax.devices()[0].device_kind)


def readable(name):
    """Whether a data set is here, or can be fetched."""
    try:
        jaxdistill.load_data(name)
    except jaxdistill.InputError as error:
        print(error)
        return False
    return True


dataset = "soft4"
if accelerated and not SMOKE:
    dataset = next(filter(readable, ("fashion_mnist", "digits")))
# What the method is compared with: one straight line a segment, trained in the same way; and
# straight lines that are drawn to the teacher's ends, for as many of its calls.
preset = f"flow:dataset={dataset},baselines=linear{',smoke' if SMOKE else '+endpoint'}"

config = jaxdistill.load_config(preset)
if accelerated and not SMOKE:
    # The recipes of the small data sets are written for CPUs.
    config.teacher.steps, config.teacher.batch_size = 20_000, 256
    for student in (config.method, *config.baselines.values()):
        student.steps, student.batch_size = 4000, 256
    config.run.chunk, config.run.checkpoint_every = 100, 1000
    config.evals.samples.batch_size = 1000
workdir = FOLDER / f"flow-{dataset}{'-smoke' if SMOKE else ''}"
print(preset, "in", workdir)

# %% [markdown]
# Any setting can be changed here, as in `config.method.modes = 8`; `print(config)` lists them all.
# A folder goes with the settings it was started with: give changed ones another folder.
# `config.teacher.guidance = 2.0` lets the student learn a guided teacher, where there are labels.
#
# ## Distil
#
# This trains the teacher, then the students, and measures them all from the same noise. **To go
# on after an interruption, run the same cells again:** what is trained and measured is found in the
# folder, and the run ends in the same student as one that was not interrupted.

# %%
records = jaxdistill.train(config, workdir)

# %% [markdown]
# ## Look
#
# `teacher, euler, 100` is what the student should come near to with two calls, and
# `teacher, euler, 2` what the same two calls give without distillation.

# %%
from IPython.display import Image, display

display(Image(workdir / "artifacts" / "samples.png"))

# %% [markdown]
# For points there is also the way of some of them, from noise in grey to data in red. The student's
# consists of two curves, each of which one network call describes.

# %%
ways = workdir / "artifacts" / "trajectories.png"
if ways.is_file():
    display(Image(ways))

# %% [markdown]
# The loss is the squared distance of student and teacher, each averaged over a chunk of steps. Only
# curves of the same training can be compared: endpoint regression measures another distance.

# %%
import json

import matplotlib.pyplot as plt


def curve(folder, key):
    """A column of `metrics.jsonl`, with its steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines], [line[key] for line in lines]


_, axes = plt.subplots(1, 2, figsize=(10, 3))
axes[0].plot(*curve(workdir / "teacher", "loss"))
axes[0].set(xlabel="step", title="loss of the teacher")
axes[1].plot(*curve(workdir, "loss"), label=config.method.name)
axes[1].plot(*curve(workdir / "baselines" / "linear", "loss"), label="linear")
axes[1].set(xlabel="step", title="loss of the students", yscale="log")
axes[1].legend()
plt.show()

# %% [markdown]
# The table once more. `endpoint RMSE` is the distance from where the teacher's exact path ends that
# starts from the same noise. For images the Fréchet distances (`FD`) are between features of a
# classifier that the run trained: they compare the rows of this table and nothing else.

# %%
from IPython.display import Markdown

from jaxdistill.eval import results

shown = [record for record in records if record["metric"] not in ("wall s", "CPU s")]
display(Markdown(results.table(shown)))

# %% [markdown]
# ## Use
#
# The student is what was trained, laid over the teacher it was trained for. Neither the config nor
# the data are needed.

# %%
import time

import jax.numpy as jnp

student = jaxdistill.load_student(workdir)
label = jnp.arange(100) % max(student.num_classes, 1)
examples = student.sample(jax.random.key(1), label)
print(student.card["dataset"], examples.shape, "in", student.card["nfe"], "calls")

# %% [markdown]
# And the teacher with a hundred. This is its network, even for points whose exact velocity the
# student followed.

# %%
from jaxdistill import settings
from jaxdistill.flow import samplers
from jaxdistill.flow.paths import boundaries, shifted
from jaxdistill.io import weights

experiment = settings.resolve(config)
task = experiment.family.shapes(experiment)
teacher = jax.device_put(weights.load(workdir / "teacher", "teacher")[0])
times = shifted(boundaries(100), task.shift)


@jax.jit
def many(teacher, key, label):
    """Euler's method."""

    def velocity(x, t, label):
        return task.trunk.apply({"params": teacher}, x, t, label)

    noise = jax.random.normal(key, (len(label), *task.shape))
    null = task.num_classes or None
    guided = samplers.guided(velocity, label, null, config.teacher.guidance)
    return samplers.euler(guided, noise, times)


def seconds(function, *arguments, repeats=5):
    """The shortest time of a call, compilation apart."""
    jax.block_until_ready(function(*arguments))
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        spent.append(time.perf_counter() - began)
    return min(spent)


key = jax.random.key(1)
short, long = seconds(student.sample, key, label), seconds(many, teacher, key, label)
print(f"{1e3 * short:.2f} ms against {1e3 * long:.2f} ms: {long / short:.0f} times faster")
