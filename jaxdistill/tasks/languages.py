"""The models of the family of vision-language models: their settings, and models by them."""

import functools
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp

from jaxdistill import collective
from jaxdistill.data.text import EOS
from jaxdistill.errors import InputError
from jaxdistill.keywords import ASIDE, Between, Count, Dtype, Folder, Natural, Rate
from jaxdistill.nn.decoder import BlockShape
from jaxdistill.nn.vlm import VLM, part_of
from jaxdistill.task import Language
from jaxdistill.vlm.decoding import generate, writer


class Teacher(NamedTuple):
    """The large model: where it lies, or how it is built and trained.

    Attributes:
        dir: A folder with `teacher.safetensors`; by default `teacher` in the workdir, where it is
            trained.
        tokenizer: How it reads; see `jaxdistill.data.text.tokenizer`.
        patch: Side of a square of pixels that becomes a token.
        width: Length of a token.
        depth: Decoder blocks.
        heads: Heads of queries.
        kv_heads: Heads of keys and values.
        hidden: Width inside a block's SwiGLU.
        steps: Length of its training.
        batch_size: Questions a step.
        learning_rate: AdamW's learning rate.
        cache: Whether what it makes of the students' examples is computed once and kept in the
            workdir. It takes a state for each token, and a step is spared the teacher.
    """

    dir: Folder = None
    tokenizer: str = "bpe:420"
    patch: Annotated[int, Between(1, 256)] = 14
    width: Annotated[int, Between(2, 2**16)] = 128
    depth: Annotated[int, Between(1, 1000)] = 4
    heads: Annotated[int, Between(1, 1000)] = 4
    kv_heads: Annotated[int, Between(1, 1000)] = 2
    hidden: Annotated[int, Between(1, 2**18)] = 384
    steps: Count = 8000
    batch_size: Annotated[int, Between(1, 10**6)] = 64
    learning_rate: Rate = 2e-3
    cache: Annotated[bool, ASIDE] = False


class Student(NamedTuple):
    """The small model, and where all students start: after a few steps of fine-tuning.

    Attributes:
        tokenizer: How it reads.
        patch: Side of a square of pixels that becomes a token.
        width: Length of a token.
        depth: Decoder blocks.
        heads: Heads of queries.
        kv_heads: Heads of keys and values.
        hidden: Width inside a block's SwiGLU.
        steps: Length of the fine-tuning that all students start from.
        batch_size: Questions a step of it.
        learning_rate: Its learning rate.
    """

    tokenizer: str = "characters"
    patch: Annotated[int, Between(1, 256)] = 28
    width: Annotated[int, Between(2, 2**16)] = 64
    depth: Annotated[int, Between(1, 1000)] = 2
    heads: Annotated[int, Between(1, 1000)] = 4
    kv_heads: Annotated[int, Between(1, 1000)] = 2
    hidden: Annotated[int, Between(1, 2**18)] = 192
    steps: Count = 1000
    batch_size: Annotated[int, Between(1, 10**6)] = 64
    learning_rate: Rate = 1e-3


class Model(NamedTuple):
    """What both models share.

    Attributes:
        rope_theta: Base of the rotary frequencies.
        final_norm: Whether hidden states are taken `before` or `after` a decoder's final norm,
            which is the head's in the first case (GenRecal's A1).
        remat: Whether blocks are computed again for the gradient.
        dtype: The dtype of the activations.
        param_dtype: The dtype of parameters that are frozen; what is trained has float32.
        slots: Tokens of an answer whose logits are there at a time, in plain fine-tuning and in
            GenRecal; 0 for all. Large vocabularies take less memory so.
    """

    rope_theta: Annotated[float, Between(1, 1e9)] = 10_000.0
    final_norm: Literal["before", "after"] = "after"
    remat: bool = False
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    slots: Annotated[Natural, ASIDE] = 0


def normalized(images: Any) -> Any:
    """Pixels of 0 to 255 as models see them."""
    return images.astype("float32") / 255 - 0.3


def language(model: Model, sizes: Teacher | Student, vocabulary: int, image_shape) -> Language:
    """A model of ours as functions.

    Args:
        model: What both models share.
        sizes: Its own.
        vocabulary: Number of tokens.
        image_shape: (h, w, c).

    Raises:
        InputError: If heads or patches do not divide.
    """
    block = BlockShape(
        sizes.width,
        sizes.heads,
        sizes.kv_heads,
        sizes.hidden,
        rope_theta=model.rope_theta,
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(model.param_dtype),
        remat=model.remat,
        place=collective.by_example,
    )
    block.length()
    net = VLM(
        vocabulary,
        block,
        sizes.depth,
        sizes.patch,
        tuple(image_shape),
        norm_in_head=model.final_norm == "before",
    )
    if any(side % sizes.patch for side in image_shape[:2]):
        raise InputError(
            f"images of {image_shape[0]}x{image_shape[1]} pixels do not divide into patches of "
            f"{sizes.patch}; choose another patch"
        )

    def init(key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        images = jnp.zeros((1, *image_shape))
        return net.init(key, images, tokens, jnp.ones((1, 1), bool))["params"]

    def method(name):
        return lambda params, *args: net.apply({"params": params}, *args, method=name)

    return Language(
        init,
        method("encode"),
        method("head"),
        method("embed"),
        functools.partial(generate, net, eos=EOS),
        functools.partial(writer, net),
        net.image_tokens,
        sizes.width,
        vocabulary,
        block,
        part_of,
        linear_head=model.final_norm == "after",
        slots=model.slots,
    )
