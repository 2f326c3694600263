"""Decoders of PyTorch models on disk, as Hugging Face stores them: weights and `config.json`.

Which tensor is which of our parameters is in `jaxdistill.io.layouts`.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from jaxdistill.errors import InputError
from jaxdistill.io.layouts import Layout, params_of, tensors_of
from jaxdistill.io.reading import read_json
from jaxdistill.io.shards import SHARD_BYTES, opened, write_tensors
from jaxdistill.nn.decoder import BlockShape

STEM = "model"
WEIGHTS = f"{STEM}.safetensors"

_QWEN2 = ("qwen2", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text")
_INTERNLM2 = "internlm2"
_LLAMA = "llama"
# `mrope` gives texts the positions that they have here, `dynamic` is the default for texts no
# longer than `max_position_embeddings`.
_ROPES = ("default", "mrope", "dynamic")
_LARGEST = 1e18
_BIASES = ("bias", "mlp_bias", "lm_head_bias", "head_bias")


def decoder_shape(folder: str | os.PathLike[str]) -> tuple[BlockShape, int, int, bool]:
    """What the decoder of a PyTorch model is like, by the `config.json` in its folder.

    Args:
        folder: Where it lies.

    Returns:
        As `shape_of`.

    Raises:
        InputError: As `shape_of`, and if there is no such file.
    """
    path = Path(folder) / "config.json"
    try:
        return shape_of(read_json(path))
    except InputError as error:
        raise InputError(f"{path} gives no decoder: {error}") from error


def shape_of(config: Any) -> tuple[BlockShape, int, int, bool]:
    """What a decoder is like, by what its `config.json` holds.

    It may be that of a `qwen2`, `qwen2_vl`, `qwen2_5_vl`, `internlm2` or `llama`, or have one in it
    as `llm_config`, as InternVL's does, or as `text_config`.

    The multimodal positions of Qwen2-VL (`mrope`) and the `dynamic` ones of InternLM2 are taken for
    plain ones. They are the same for texts, the latter up to `max_position_embeddings` tokens;
    Qwen2-VL gives the tokens of images positions in three directions, which blocks here do not.

    Args:
        config: Nested dictionaries.

    Returns:
        What a block is like, with the default types; the number of blocks; the length of the
        vocabulary, padding included; whether the head is the table of embeddings.

    Raises:
        InputError: If it is no such config, lacks something, or asks for what blocks here do not
            have: other rotary positions, sliding windows, other activations, other biases than
            those of queries, keys and values.
    """
    if not isinstance(config, dict):
        raise InputError("it is no dictionary")
    inner = next((config[key] for key in ("llm_config", "text_config") if key in config), config)
    kind = inner.get("model_type") if isinstance(inner, dict) else None
    if kind not in (*_QWEN2, _INTERNLM2, _LLAMA):
        raise InputError(
            f"its decoder has the model_type {kind!r:.80}; qwen2, qwen2_vl, qwen2_5_vl, internlm2 "
            "and llama can be read"
        )
    rope = inner.get("rope_parameters") or inner.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError("what it says of rotary positions is no dictionary")
    _check_supported(inner, kind, rope)
    width, heads, kv_heads, hidden, depth, vocabulary = (
        _number(inner, key, int)
        for key in (
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "num_hidden_layers",
            "vocab_size",
        )
    )
    shape = BlockShape(
        width,
        heads,
        kv_heads,
        hidden,
        head_dim=_number(inner, "head_dim", int) if inner.get("head_dim") is not None else None,
        qkv_bias=kind in _QWEN2,
        # Llama's first configs leave out what was the same for all.
        rope_theta=_number(
            ({"rope_theta": 1e4} if kind == _LLAMA else {}) | inner | rope, "rope_theta", float
        ),
        epsilon=_number(inner, "rms_norm_eps", float),
    )
    shape.length()
    tied = inner.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    if not isinstance(tied, bool):
        raise InputError(f"tie_word_embeddings is {tied!r:.80}, not true or false")
    return shape, depth, vocabulary, tied


def config_of(shape: BlockShape, depth: int, vocabulary: int, *, tied: bool = False) -> dict:
    """What `config.json` says of a decoder: `shape_of` turned round.

    With biases of queries, keys and values it is a `qwen2`, without them a `llama`; both have the
    layout `qwen2`.

    Args:
        shape: What a block is like.
        depth: Number of blocks.
        vocabulary: Number of tokens.
        tied: Whether the head is the table of embeddings.
    """
    kind, architecture = ("qwen2", "Qwen2") if shape.qkv_bias else (_LLAMA, "Llama")
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": kind,
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.length(),
        "intermediate_size": shape.hidden,
        "num_hidden_layers": depth,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": shape.epsilon,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": tied,
    }


def load_decoder(
    path: str | os.PathLike[str],
    layout: str | Layout,
    shape: BlockShape,
    depth: int,
    *,
    tied: bool = False,
) -> tuple[dict, tuple[str, ...]]:
    """Reads the decoder of a PyTorch model.

    Tensors are read one at a time, so little is in memory beside the parameters.

    Args:
        path: A `.safetensors` file, or a folder with `model.safetensors` or with shards and
            their `model.safetensors.index.json`.
        layout: As of `params_of`, with `auto`.
        shape: What a block is like, for example by `decoder_shape`.
        depth: Number of blocks.
        tied: Whether the head is the table of embeddings.

    Returns:
        As `params_of`: the parameters, and the names in the file that are no part of them.

    Raises:
        InputError: As `params_of`, and if there is no such file, or it is damaged.
    """
    with contextlib.ExitStack() as stack:
        tensors = opened(Path(path), stack, STEM)
        try:
            return params_of(tensors, layout, shape, depth, tied=tied)
        except InputError as error:
            raise InputError(f"{path} does not give this decoder: {error}") from error


def save_decoder(
    folder: str | os.PathLike[str],
    params: PyTree,
    layout: str | Layout,
    shape: BlockShape,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[str, ...]:
    """Writes a decoder as a PyTorch model has it, every file whole or not at all.

    What takes no more than `shard_bytes` is one `model.safetensors`; else there are shards
    `model-00001-of-00003.safetensors` and so on, and `model.safetensors.index.json`, which is
    written last. No `config.json` is written.

    Args:
        folder: Made if missing.
        params: As of `tensors_of`.
        layout: As of `tensors_of`.
        shape: As of `tensors_of`.
        shard_bytes: How many bytes of tensors a file holds at most; a tensor is never split.

    Returns:
        The paths of the parameters that are not the decoder's, and not written.

    Raises:
        Diverged: If a parameter is not finite; nothing is written.
        InputError: As `tensors_of`, if the files cannot be written, or if the folder has other
            weights, which a reader could take for these.
    """
    tensors, left = tensors_of(params, layout, shape)
    write_tensors(Path(folder), tensors, STEM, shard_bytes=shard_bytes)
    return left


# ------------------------------------------------------------------------------------- config.json


def _check_supported(inner: Mapping[str, Any], kind: str, rope: Mapping[str, Any]) -> None:
    """Refuses what would make the decoder compute something else than blocks here do."""
    scaling = rope.get("rope_type", rope.get("type", "default"))
    windows = inner.get("use_sliding_window") or "sliding_attention" in str(
        inner.get("layer_types")
    )
    activation = inner.get("hidden_act", "silu")
    # Llama's would have one behind the attention too.
    keys = (*_BIASES, "attention_bias") if kind == _LLAMA else _BIASES
    biases = [key for key in keys if inner.get(key, (kind, key) == (_INTERNLM2, "bias"))]
    wrong = {
        f"rotary positions of the kind {scaling!r:.80}": scaling not in _ROPES,
        "rotary positions of a part of a head": rope.get("partial_rotary_factor", 1) != 1,
        "sliding windows": windows,
        f"the activation {activation!r:.80}": activation != "silu",
        f"biases ({', '.join(biases)})": biases,
    }
    found = [what for what, is_so in wrong.items() if is_so]
    if found:
        raise InputError(f"it asks for {', '.join(found)}, which decoder blocks here do not have")


def _number(config: Mapping[str, Any], key: str, kind: type) -> Any:
    value = config.get(key)
    good = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not good or not 0 < value < _LARGEST:
        raise InputError(f"{key} is {value!r:.80}; it must be a positive number")
    return kind(value)
