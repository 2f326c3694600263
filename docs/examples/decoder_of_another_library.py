"""Takes the decoder of a PyTorch model into a VLM, and writes it back; run it beside the model."""

import jax
import jax.numpy as jnp

from jaxdistill.io.decoders import decoder_shape, load_decoder, save_decoder
from jaxdistill.nn.vlm import VLM

shape, depth, vocabulary, tied = decoder_shape("model")  # by model/config.json
decoder, rest = load_decoder("model", "auto", shape, depth, tied=tied)
print(len(rest), "tensors are no part of the decoder, such as", *rest[:1])

# Patches and their projector are ours, and new.
model = VLM(vocabulary, shape, depth, patch=8, image_shape=(16, 16, 3), tied=tied)
batch = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
params = jax.jit(model.init)(jax.random.key(0), *batch)["params"] | decoder
hidden = model.apply({"params": params}, *batch, method="encode")

left = save_decoder("out", params, "qwen2", shape)
print("out/model.safetensors has no", *left)
