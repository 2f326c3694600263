"""Parameters of a network of ours, from a plain safetensors file, as the teacher of a run."""

import safetensors.flax
from flax import traverse_util

import jaxdistill
from jaxdistill.io import weights

# Names in the file are paths, such as `output/kernel`; the run says which it lacks.
flat = safetensors.flax.load_file("network.safetensors")
config = jaxdistill.load_config("ucgm:dataset=soft4,baselines=,smoke")
config.unlock()
# Where they came from is a line of the card; what was trained, and how, is the config.
card = {"config": config.to_dict(), "provenance": {"file": "network.safetensors"}}
weights.save("teacher", "teacher", traverse_util.unflatten_dict(flat, sep="/"), card)

config.teacher.dir = "teacher"
records = jaxdistill.train(config, "runs/tuned")
