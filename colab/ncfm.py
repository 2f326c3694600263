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
# # Distil an image data set with NCFM
#
# This notebook learns a few images per class that a network can be trained on in place of the
# whole training set. You get
#
# - `artifacts/distilled.npz`, the images and their labels, readable with NumPy alone,
#   `distilled.json`, which says what they are, and `distilled.png`, a picture of them;
# - the accuracy of fresh networks trained on them, beside random and herded real images;
# - `metrics.jsonl`, the curves.
#
# On a CPU it takes scikit-learn's digits, which need no download; on an accelerator Fashion-MNIST.

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


if SMOKE:
    preset = "ncfm:smoke"
elif accelerated:
    names = ("fashion_mnist", "cifar10", "digits")
    preset = f"ncfm:dataset={next(filter(readable, names))},ipc=1"
else:
    preset = "ncfm:dataset=digits,ipc=1"

config = jaxdistill.load_config(preset)
if accelerated:
    config.run.microbatch = 512  # the recipes of the small data sets are written for CPUs
workdir = FOLDER / f"{config.data.name}-{config.method.ipc}{'-smoke' if SMOKE else ''}"
print(preset, "in", workdir)

# %% [markdown]
# Any setting can be changed here, as in `config.method.steps = 2000`; `print(config)` lists all.
# A folder goes with the settings it was started with: give changed ones another folder.
# CIFAR-10 has a much longer recipe than the others.
#
# ## Distil
#
# This trains the feature extractors, distils, makes the baselines and evaluates them all. **To go
# on after an interruption, run the same cells again:** trained extractors, checkpoints and
# measured accuracies are found in the folder, and the run ends in the same images as one that was
# not interrupted.

# %%
records = jaxdistill.train(config, workdir)

# %% [markdown]
# ## Look
#
# One row a class. The curve is the discrepancy that the images descend, averaged over each chunk
# of steps.

# %%
from IPython.display import Image

Image(workdir / "artifacts" / "distilled.png")

# %%
import json

import matplotlib.pyplot as plt

lines = (workdir / "metrics.jsonl").read_text().splitlines()
metrics = [json.loads(line) for line in lines]
_, axes = plt.subplots(figsize=(6, 3))
axes.plot([m["step"] for m in metrics], [m["match"] for m in metrics])
axes.set(xlabel="step", ylabel="300 times the discrepancy, per class")
plt.show()

# %% [markdown]
# ## Use
#
# The file needs nothing of this library. The images lie in [0, 1]; `mean` and `std` are those of
# the training data, which the networks were normalized with.

# %%
import numpy as np

with np.load(workdir / "artifacts" / "distilled.npz") as arrays:
    images, labels = arrays["images"], arrays["labels"]
card = json.loads((workdir / "artifacts" / "distilled.json").read_text())
print(images.shape, images.dtype, np.bincount(labels), card["class_names"])

# %% [markdown]
# A network narrower than those of the table above, trained on the images alone and measured on
# the real test set:

# %%
import jax.numpy as jnp

from jaxdistill.data.augment import normalizer
from jaxdistill.eval import train_on
from jaxdistill.nn.convnet import ConvNet

module = ConvNet(len(card["class_names"]), depth=config.extractor.depth, width=32)
network = train_on.Network(
    init=lambda key: module.init(key, jnp.zeros((1, *images.shape[1:])))["params"],
    logits=lambda params, x: module.apply({"params": params}, x),
)
normalize = normalizer(tuple(card["mean"]), tuple(card["std"]))
params = train_on.train(
    jax.random.key(0),
    network,
    jnp.asarray(images),
    train_on.one_hot(labels, len(card["class_names"])),
    normalize=normalize,
    protocol=train_on.Protocol(
        epochs=20 if SMOKE else 300, strategy=config.evals.accuracy.strategy
    ),
)
test = jaxdistill.load_data(
    config.data.name,
    data_dir=config.data.data_dir,
    image_size=config.data.image_size,
    pad_to=config.data.pad_to,
).test
accuracy = train_on.accuracy(
    network,
    params,
    jnp.asarray(test.images),
    jnp.asarray(test.labels),
    num_classes=len(card["class_names"]),
    normalize=normalize,
)
print(f"{100 * accuracy.value:.1f} % of {len(test.labels)} test images, from {len(labels)} images")
