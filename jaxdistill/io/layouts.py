"""Decoders as PyTorch models have them, in names and layouts of Hugging Face, and as we have them.

Our side is the tree of `jaxdistill.nn.vlm.VLM`: `embedding`, `body`, `norm` and, unless the head is
tied, `output`. Beside the names three things differ: a linear layer there has its weight as
(out, in), here its kernel as (in, out); blocks here are stacked along a leading axis; and InternLM2
has queries, keys and values in one tensor. Rotary positions are the same: both architectures turn
the pairs (i, i + d/2) of a head, as `jaxdistill.nn.decoder.rotated` does, so no head is permuted.
No number is changed on the way, and no type. `jaxdistill.io.decoders` reads and writes the files.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

from jaxdistill.errors import Diverged, InputError
from jaxdistill.io.shards import some
from jaxdistill.nn.decoder import BlockShape

_DTYPES = tuple(map(np.dtype, (jnp.bfloat16, np.float16, np.float32)))
_EMBEDDING = "embedding/embedding"
_NORM = "norm/scale"
_HEAD = "output/kernel"
_STACK = "body/stack/"
# Old files hold the frequencies of the rotary positions, which follow from `rope_theta`.
_COMPUTED = "rotary_emb.inv_freq"
_NAMED = 4  # how many names an error lists


class Layout(NamedTuple):
    """What an architecture calls the tensors of its decoder.

    Attributes:
        embedding: The table of embeddings (vocabulary, width).
        norm: The scale of the final norm (width,).
        head: The weight of the head (vocabulary, width), which files of tied heads do not have.
        block: What the names of a block's tensors begin with, `{}` standing for its number.
        tensors: What they end in, and of which of our leaves each is made: of one, or of the
            kernels of queries, keys and values, fused as `attention.wqkv` of InternLM2 is.
    """

    embedding: str
    norm: str
    head: str
    block: str
    tensors: Mapping[str, tuple[str, ...]]


_QWEN2 = {
    "input_layernorm.weight": ("attention_norm/scale",),
    **{
        f"self_attn.{name}_proj.{theirs}": (f"{name}/{ours}",)
        for name in "qkv"
        for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
    },
    "self_attn.o_proj.weight": ("o/kernel",),
    "post_attention_layernorm.weight": ("mlp_norm/scale",),
    **{f"mlp.{name}_proj.weight": (f"{name}/kernel",) for name in ("gate", "up", "down")},
}
_INTERNLM2 = {
    "attention_norm.weight": ("attention_norm/scale",),
    "attention.wqkv.weight": ("q/kernel", "k/kernel", "v/kernel"),
    "attention.wo.weight": ("o/kernel",),
    "ffn_norm.weight": ("mlp_norm/scale",),
    "feed_forward.w1.weight": ("gate/kernel",),
    "feed_forward.w3.weight": ("up/kernel",),
    "feed_forward.w2.weight": ("down/kernel",),
}


def _qwen2(body: str, head: str) -> Layout:
    embedding, norm = f"{body}embed_tokens.weight", f"{body}norm.weight"
    return Layout(embedding, norm, f"{head}lm_head.weight", f"{body}layers.{{}}.", _QWEN2)


def _internlm2(where: str) -> Layout:
    body, head = f"{where}model.", f"{where}output.weight"
    embedding, norm = f"{body}tok_embeddings.weight", f"{body}norm.weight"
    return Layout(embedding, norm, head, f"{body}layers.{{}}.", _INTERNLM2)


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "qwen2": _qwen2("model.", ""),
        "qwen2_in_internvl": _qwen2("language_model.model.", "language_model."),
        "qwen2_in_vlm": _qwen2("model.language_model.", ""),
        "internlm2": _internlm2(""),
        "internlm2_in_internvl": _internlm2("language_model."),
    }
)
"""The layouts by name.

- `qwen2`: Qwen2 and Qwen2.5, and Qwen2-VL and Qwen2.5-VL as they were published.
- `qwen2_in_internvl`: the same names behind `language_model.`, as in InternVL2.5 of 1B and 4B.
- `qwen2_in_vlm`: behind `model.language_model.`, as the modules of Qwen2-VL are named today.
- `internlm2`: InternLM2 and InternLM2.5.
- `internlm2_in_internvl`: behind `language_model.`, as in InternVL2.5 of 8B.
"""


def recognized(names: Iterable[str]) -> str:
    """The layout of a file, by the names of its tensors.

    Args:
        names: Names of tensors.

    Returns:
        A key of `LAYOUTS`.

    Raises:
        InputError: If the names are of none of the layouts, or of several.
    """
    there = set(names)
    # Embedding and first norm tell the layouts apart and are in every file, tied or not.
    found = [
        name
        for name, layout in LAYOUTS.items()
        if {layout.embedding, layout.block.format(0) + next(iter(layout.tensors))} <= there
    ]
    if len(found) != 1:
        raise InputError(
            f"{'several layouts have' if found else 'no layout has'} names such as "
            f"{some(sorted(there))}; say which it is: {', '.join(found or LAYOUTS)}"
        )
    return found[0]


def params_of(
    tensors: Mapping[str, Any],
    layout: str | Layout,
    shape: BlockShape,
    depth: int,
    *,
    tied: bool = False,
) -> tuple[dict, tuple[str, ...]]:
    """The parameters of a decoder, of tensors as PyTorch has them.

    Args:
        tensors: name -> array of bfloat16, float16 or float32; each is taken once, so they may
            be read on the way.
        layout: A key of `LAYOUTS`, a layout of one's own, or `auto`, by the names.
        shape: What a block is like; its types play no part.
        depth: Number of blocks.
        tied: Whether the head is the table of embeddings.

    Returns:
        Nested dictionaries of NumPy arrays in the types of the tensors: `embedding`, `body`,
        `norm` and, unless tied, `output`. The vocabulary is as long as the table of embeddings,
        padding included. And the sorted names that no part of the decoder is made of, such as
        those of a vision tower.

    Raises:
        InputError: If the layout is not known; if tensors are missing, of another shape, of
            another type or not finite; if the blocks differ in their types; if there are tensors
            of the decoder for which shape and depth leave no place, such as further blocks or a
            bias of the head; if `tied` and there is a head other than the table.
    """
    layout = _layout(layout, tensors)
    outer = (layout.embedding, layout.norm, *(() if tied else (layout.head,)))
    own = _block_tensors(layout, shape)
    blocks = (layout.block.format(i) + end for i in range(depth) for end in own)
    # Lazily: a depth may be any number that somebody wrote.
    absent = (name for name in itertools.chain(outer, blocks) if name not in tensors)
    missing = list(itertools.islice(absent, _NAMED + 1))
    if missing:
        hint = "; if the head is tied, say tied=True" if layout.head in missing else ""
        raise InputError(f"it lacks {some(missing)}{hint}")
    used = {*outer, *(layout.block.format(i) + end for i in range(depth) for end in own)}
    _check_nothing_lost(sorted(tensors.keys() - used), layout)

    table = _tensor(tensors, layout.embedding, (None, shape.width))
    flat = {_EMBEDDING: table, _NORM: _tensor(tensors, layout.norm, (shape.width,))}
    if not tied:
        flat[_HEAD] = _tensor(tensors, layout.head, table.shape).T
    elif layout.head in tensors:
        head = _tensor(tensors, layout.head, table.shape)
        if head.dtype != table.dtype or not np.array_equal(head, table):
            raise InputError(
                f"{layout.head} is not {layout.embedding}: the head is not tied; say tied=False"
            )
    for i, (end, paths) in itertools.product(range(depth), own.items()):
        name = layout.block.format(i) + end
        x = _tensor(tensors, name, _torch_shape(paths, shape))
        for path, leaf in zip(paths, _to_leaves(x, paths, shape), strict=True):
            stacked = flat.get(_STACK + path)
            if stacked is None:
                stacked = flat[_STACK + path] = np.empty((depth, *leaf.shape), leaf.dtype)
            if stacked.dtype != leaf.dtype:
                raise InputError(
                    f"{name} is {leaf.dtype}, the same of the first block {stacked.dtype}; "
                    "convert the file to one type"
                )
            stacked[i] = leaf
    return traverse_util.unflatten_dict(flat, sep="/"), tuple(sorted(tensors.keys() - used))


def tensors_of(
    params: PyTree, layout: str | Layout, shape: BlockShape
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The tensors as PyTorch has them, of the parameters of a decoder.

    Args:
        params: Nested dictionaries of arrays, `embedding`, `body`, `norm` and, unless the head is
            tied, `output`; others beside them are left out.
        layout: A key of `LAYOUTS`, or a layout of one's own.
        shape: What a block is like; its types play no part.

    Returns:
        name -> array in the type of the parameters, some of them views. And the sorted paths of
        the parameters that were left out.

    Raises:
        Diverged: If a parameter is not finite.
        InputError: If the layout is not known; if parameters are missing, or of another shape or
            type; if the decoder has parameters for which layout and shape have no place.
    """
    layout = _layout(layout, None)
    flat = traverse_util.flatten_dict(params, sep="/")
    own = _block_tensors(layout, shape)
    paths = [path for made_of in own.values() for path in made_of]
    wanted = [_EMBEDDING, _NORM, *(_STACK + path for path in paths)]
    missing = [path for path in wanted if path not in flat]
    if missing:
        raise InputError(f"the parameters lack {some(missing)}")
    wanted += [_HEAD] if _HEAD in flat else []
    left = sorted(flat.keys() - set(wanted))
    roots = {path.partition("/")[0] for path in (*wanted, _HEAD)}
    lost = [path for path in left if path.partition("/")[0] in roots]
    if lost:
        raise InputError(f"the layout with this shape has no place for {some(lost)}")

    vocabulary, depth = (flat[path].shape[:1] for path in (_EMBEDDING, _STACK + paths[0]))
    shapes = {_EMBEDDING: (*vocabulary, shape.width), _NORM: (shape.width,)}
    shapes |= {_HEAD: (shape.width, *vocabulary)}
    shapes |= {_STACK + path: (*depth, *_leaf_shape(path, shape)) for path in paths}
    arrays = {}
    for path in wanted:
        x = arrays[path] = np.asarray(flat[path])
        _check(path, x, shapes[path])
        if not np.isfinite(x).all():
            raise Diverged(f"{path} is not finite, so it is not written")

    tensors = {layout.embedding: arrays[_EMBEDDING]}
    for i, (end, made_of) in itertools.product(range(*depth), own.items()):
        leaves = [arrays[_STACK + path][i] for path in made_of]
        tensors[layout.block.format(i) + end] = _from_leaves(leaves, made_of, shape)
    tensors[layout.norm] = arrays[_NORM]
    if _HEAD in arrays:
        tensors[layout.head] = arrays[_HEAD].T
    return tensors, tuple(left)


# ----------------------------------------------------------------------- one tensor and our leaves


def _block_tensors(layout: Layout, shape: BlockShape) -> dict[str, tuple[str, ...]]:
    """The tensors of a block that there are with this shape."""
    shape.length()
    biased = {"q/bias", "k/bias", "v/bias"}
    own = {
        end: paths
        for end, paths in layout.tensors.items()
        if shape.qkv_bias or not biased & set(paths)
    }
    if shape.qkv_bias and not any(biased & set(paths) for paths in own.values()):
        raise InputError("the layout has no biases of queries, keys and values; this shape has")
    return own


def _leaf_shape(path: str, shape: BlockShape) -> tuple[int, ...]:
    """The shape of one of our leaves, in one block."""
    name, kind = path.split("/")
    if kind == "scale":
        return (shape.width,)
    queries, keys = shape.heads * shape.length(), shape.kv_heads * shape.length()
    kernel = {
        "q": (shape.width, queries),
        "k": (shape.width, keys),
        "v": (shape.width, keys),
        "o": (queries, shape.width),
        "gate": (shape.width, shape.hidden),
        "up": (shape.width, shape.hidden),
        "down": (shape.hidden, shape.width),
    }[name]
    return kernel if kind == "kernel" else kernel[1:]


def _torch_shape(paths: tuple[str, ...], shape: BlockShape) -> tuple[int, ...]:
    """The shape of the tensor that is made of some leaves."""
    shapes = [_leaf_shape(path, shape)[::-1] for path in paths]
    return (sum(own[0] for own in shapes), *shapes[0][1:])


def _to_leaves(x: np.ndarray, paths: tuple[str, ...], shape: BlockShape) -> tuple[np.ndarray, ...]:
    """What a tensor is in our layout."""
    if len(paths) == 1:
        return (x.T,)
    # For each head of keys the queries that share it, then itself, then its values.
    d, group = shape.length(), shape.heads // shape.kv_heads
    x = x.reshape(shape.kv_heads, group + 2, d, shape.width)
    parts = x[:, :group], x[:, group], x[:, group + 1]
    return tuple(part.reshape(-1, shape.width).T for part in parts)


def _from_leaves(
    leaves: Sequence[np.ndarray], paths: tuple[str, ...], shape: BlockShape
) -> np.ndarray:
    """The inverse of `_to_leaves`."""
    if len(paths) == 1:
        return leaves[0].T
    d, width = shape.length(), shape.width
    if len({leaf.dtype for leaf in leaves}) > 1:
        raise InputError(f"{', '.join(paths)} become one tensor, and differ in their types")
    parts = [leaf.T.reshape(shape.kv_heads, -1, d, width) for leaf in leaves]
    return np.concatenate(parts, axis=1).reshape(-1, width)


# -------------------------------------------------------------------------------- checks and names


def _layout(layout: str | Layout, tensors: Mapping[str, Any] | None) -> Layout:
    if isinstance(layout, Layout):
        return layout
    if layout == "auto" and tensors is not None:
        layout = recognized(tensors)
    if layout not in LAYOUTS:
        raise InputError(f"there is no layout {layout!r}; choose from {', '.join(LAYOUTS)}")
    return LAYOUTS[layout]


def _check_nothing_lost(rest: Sequence[str], layout: Layout) -> None:
    """Refuses tensors without a place that would change what the decoder computes."""
    outer = layout.embedding, layout.norm, layout.head
    parts = (layout.block.partition("{}")[0], *(name.removesuffix("weight") for name in outer))
    # A tied head may be there; it is compared with the table.
    lost = [n for n in rest if n.startswith(parts) and n != outer[2] and not n.endswith(_COMPUTED)]
    if lost:
        raise InputError(
            f"it has {some(lost)}, for which a decoder of this shape and depth has no place"
        )


def _tensor(tensors: Mapping[str, Any], name: str, wanted: tuple[int | None, ...]) -> np.ndarray:
    x = np.asarray(tensors[name])
    _check(name, x, wanted)
    if not np.isfinite(x).all():
        raise InputError(f"{name} holds values that are not finite")
    return x


def _check(name: str, x: np.ndarray, wanted: tuple[int | None, ...]) -> None:
    fits = (want in (None, have) for have, want in zip(x.shape, wanted, strict=False))
    if x.ndim != len(wanted) or not all(fits):
        said = str(wanted).replace("None", "any")
        raise InputError(f"{name} has the shape {x.shape}, the decoder wants {said}")
    if x.dtype not in _DTYPES:
        raise InputError(f"{name} is {x.dtype}; it must be bfloat16, float16 or float32")
