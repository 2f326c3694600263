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
# # Teach a small vision-language model by one with another tokenizer
#
# This notebook trains a model that answers questions about pictures, and students of it that read
# other tokens and larger patches. You get
#
# - `artifacts/student.safetensors`, the student of GenRecal, with its tokenizer;
# - `artifacts/answers.png`, questions, and what teacher and students answer;
# - a table of right answers by kind of question, and a look into the Recalibrator;
# - `metrics.jsonl`, the curves.
#
# Pictures are grids of four images: of the digits on a CPU, of Fashion-MNIST on an accelerator.

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
    # %pip install -q -c keep-jax.txt "{SOURCE}[vlm]" matplotlib

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


dataset = "digits"
if accelerated and not SMOKE:
    dataset = next(filter(readable, ("fashion_mnist", "digits")))
# Rows: plain fine-tuning, the teacher's answers in place of the data's, and a loss that sorts both
# vocabularies' probabilities.
preset = f"genrecal:dataset={dataset},baselines=sft{',smoke' if SMOKE else '+sequence_kd+uld'}"

config = jaxdistill.load_config(preset)
config.teacher.cache = True
if not SMOKE and not accelerated:
    # Two cores: a smaller teacher, and all shorter.
    config.teacher.width, config.teacher.hidden, config.teacher.depth = 64, 192, 2
    config.teacher.steps, config.student.steps = 3000, 500
    config.method.align, config.method.distil, config.method.tune = 300, 500, 300
    for row in config.baselines.values():
        row.steps = 800
if not SMOKE:
    config.run.chunk = 50
workdir = FOLDER / f"genrecal-{dataset}{'-smoke' if SMOKE else ''}"
print(preset, "in", workdir)

# %% [markdown]
# Any setting can be changed here, as in `config.method.regularizer = "none"`; `print(config)` lists
# them all. A folder goes with the settings it was started with: give changed ones another folder.
# Questions of your own stand in a folder with images and `train.jsonl`; see the page on GenRecal.
#
# ## Distil
#
# This trains the teacher, what all students start from, and the students. **To go on after an
# interruption, run the same cells again.**

# %%
records = jaxdistill.train(config, workdir)

# %% [markdown]
# ## Look
#
# Two questions of every kind, what was wanted, and what each row answers.

# %%
from IPython.display import Image, display

display(Image(workdir / "artifacts" / "answers.png"))

# %% [markdown]
# Each row has the state behind one student's prefix, each column that behind the teacher's prefix
# of a question, both through the Recalibrator. A diagonal that stands out means that the student's
# view of a picture lands where the teacher's does.

# %%
display(Image(workdir / "artifacts" / "recalibration-genrecal.png"))

# %% [markdown]
# The three stages: the Recalibrator alone, the student through it, the student alone. `ce` is the
# cross-entropy of the answer in the teacher's tokens, `sft` in the student's own.

# %%
import json

import matplotlib.pyplot as plt

lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
_, axes = plt.subplots(figsize=(8, 3))
for key in ("ce", "kl", "sft"):
    # A loss that a stage does not have stands there as 0.
    shown = [(line["step"], line[key]) for line in lines if line[key]]
    axes.plot(*zip(*shown, strict=True), label=key)
axes.set(xlabel="step", yscale="log")
axes.legend()
plt.show()

# %% [markdown]
# ## Use
#
# The student alone: neither config, data, teacher nor Recalibrator are needed.

# %%
student = jaxdistill.load_student(workdir)

from jaxdistill.data import sources, vqa

asked = vqa.grid(sources.load(dataset), train=10, validation=10, test=10).test
for question, wanted, said in zip(
    asked.questions, asked.answers, student.answer(asked.images, asked.questions), strict=True
):
    print(f"{question}  {wanted}  ->  {said}")

# %% [markdown]
# And in the files of other libraries: its decoder is a Llama's.

# %%
jaxdistill.export_student(workdir, workdir / "exported")
print(*sorted(path.name for path in (workdir / "exported").iterdir()))
