"""Transformers of diffusers on disk: class-conditional ones, with `config.json` and a scheduler's.

Our side is the tree of `jaxdistill.nn.transformer2d.Transformer2D`. A linear layer there has its
weight as (out, in), here its kernel as (in, out); the convolution that cuts patches is a linear
layer here; blocks are stacked along a leading axis; and the output layer, where it says variances
too, is two. No number is changed on the way, and no type.
"""

import contextlib
import functools
import hashlib
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

from jaxdistill.errors import Diverged, InputError
from jaxdistill.io.files import dump, expanded, write_files
from jaxdistill.io.reading import read_json
from jaxdistill.io.shards import SHARD_BYTES, files_of, opened, sha256, some, write_tensors
from jaxdistill.nn.transformer2d import Shape

STEM = "diffusion_pytorch_model"
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
BLOCK = "transformer_blocks.{}."

# Theirs -> ours, each with a weight and a bias.
OUTER = {"pos_embed.proj": "embed", "proj_out_1": "modulation"}
LAST = "proj_out_2"
BLOCKS = {
    "norm1.emb.timestep_embedder.linear_1": "condition/up",
    "norm1.emb.timestep_embedder.linear_2": "condition/down",
    "norm1.linear": "blocks/modulation",
    "attn1.to_q": "blocks/q",
    "attn1.to_k": "blocks/k",
    "attn1.to_v": "blocks/v",
    "attn1.to_out.0": "blocks/o",
    "ff.net.0.proj": "blocks/up",
    "ff.net.2": "blocks/down",
}
_TABLE = ("norm1.emb.class_embedder.embedding_table.weight", "condition/label/embedding")
# Some files hold the codes of positions, which follow from the sizes.
_COMPUTED = ("pos_embed.pos_embed",)

_DTYPES = tuple(map(np.dtype, (jnp.bfloat16, np.float16, np.float32)))
_LARGEST = 10**6
# What other settings than these would make of the network is not here.
_FIXED = {
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "only_cross_attention": (False, None),
    "double_self_attention": (False, None),
    "cross_attention_dim": (None,),
    "num_vector_embeds": (None,),
    "caption_channels": (None,),
    "interpolation_scale": (None, 1, 1.0),
    "attention_type": ("default", None),
}
# Defaults of diffusers 0.42 for what a config leaves out.
_DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}


class Scheduler(NamedTuple):
    """What a scheduler's config says of how a network was trained.

    Attributes:
        steps: How many times there are.
        betas: Kind, first and last of the variances where the network says the noise; None where it
            says the velocity of the straight path.
    """

    steps: int
    betas: tuple[str, float, float] | None


class Checkpoint(NamedTuple):
    """What lies in a folder, read but for its weights.

    Attributes:
        folder: Of the transformer.
        config: What its `config.json` holds.
        shape: What that means.
        scheduler_config: What the scheduler's holds.
        scheduler: What that means.
    """

    folder: Path
    config: dict[str, Any]
    shape: Shape
    scheduler_config: dict[str, Any]
    scheduler: Scheduler


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Reads what a transformer is.

    Args:
        folder: Of a pipeline, with `transformer/` and `scheduler/`; or of a transformer, whose
            `scheduler_config.json` lies in it or in `scheduler/` beside or in it.

    Raises:
        InputError: If a config is missing, or of something else.
    """
    folder = expanded(folder)
    where = folder / "transformer" if (folder / "transformer" / "config.json").is_file() else folder
    path, name = where / "config.json", "scheduler_config.json"
    places = (folder / "scheduler", folder, where, where.parent / "scheduler")
    schedule = next((place / name for place in places if (place / name).is_file()), None)
    if not path.is_file():
        raise InputError(f"{folder} holds no config.json; give the folder of a diffusers model")
    if schedule is None:
        raise InputError(
            f"{folder} holds no {name}, which says what the network predicts; copy the pipeline's "
            f"to {where / name}"
        )
    try:
        config = read_json(path)
        shape = shape_of(config)
    except InputError as error:
        raise InputError(f"{path} gives no transformer: {error}") from error
    try:
        scheduler_config = read_json(schedule)
        scheduler = scheduler_of(scheduler_config)
    except InputError as error:
        raise InputError(f"{schedule} gives no schedule: {error}") from error
    return Checkpoint(where, config, shape, scheduler_config, scheduler)


def shape_of(config: Any) -> Shape:
    """What a transformer is like, by what its `config.json` holds.

    Raises:
        InputError: If it is of another class, or asks for what the network here does not have.
    """
    if not isinstance(config, dict) or config.get("_class_name") not in CLASSES:
        kind = config.get("_class_name") if isinstance(config, dict) else None
        raise InputError(f"its _class_name is {kind!r:.80}; {' and '.join(CLASSES)} can be read")
    given = {
        **{k: v[0] for k, v in _FIXED.items() if config["_class_name"] == CLASSES[0]},
        **config,
    }
    for key, allowed in _FIXED.items():
        if given.get(key) not in allowed or isinstance(given.get(key), list):
            raise InputError(
                f"{key} is {given.get(key)!r:.80}; only {allowed[0]!r} can be computed here"
            )
    said = _DEFAULTS | {k: v for k, v in config.items() if k in _DEFAULTS}
    heads, head_dim, channels, depth, size, patch, classes = (
        _count(said, key) for key in list(_DEFAULTS)[:7]
    )
    epsilon = said["norm_eps"]
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise InputError(f"norm_eps is {epsilon!r:.80}; it must be between 0 and 1")
    outputs = config.get("out_channels")
    if outputs not in (None, channels, 2 * channels):
        raise InputError(
            f"out_channels is {outputs!r:.80}; it must be in_channels={channels}, or twice that"
        )
    if size % patch:
        raise InputError(f"sample_size={size} does not divide into patches of {patch}")
    if heads * head_dim % 4:
        raise InputError(f"{heads} heads of {head_dim} channels are no multiple of 4")
    variance = outputs == 2 * channels
    return Shape(size, channels, patch, heads, head_dim, depth, classes, variance, epsilon)


def scheduler_of(config: Any) -> Scheduler:
    """What a network predicts, by what its `scheduler_config.json` holds.

    `FlowMatchEulerDiscreteScheduler` means the velocity, noise minus data, of the straight path;
    one with `beta_schedule` the noise of a diffusion.

    Raises:
        InputError: If it is neither, or says something else of the prediction or the variances.
    """
    if not isinstance(config, dict):
        raise InputError("it is no dictionary")
    steps = _count({"num_train_timesteps": 1000} | config, "num_train_timesteps")
    if str(config.get("_class_name")).startswith("FlowMatch"):
        return Scheduler(steps, None)
    prediction, kind = config.get("prediction_type", "epsilon"), config.get("beta_schedule")
    if prediction != "epsilon" or kind not in ("linear", "scaled_linear"):
        raise InputError(
            f"prediction_type is {prediction!r:.80} and beta_schedule {kind!r:.80}; epsilon with "
            "linear or scaled_linear can be read, and FlowMatchEulerDiscreteScheduler"
        )
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        raise InputError("it has trained_betas or rescale_betas_zero_snr, which are not read here")
    ends = config.get("beta_start"), config.get("beta_end")
    if not all(isinstance(x, float) and 0 < x < 1 for x in ends) or ends[0] > ends[1]:
        raise InputError(f"beta_start and beta_end are {ends!r:.80}; they must rise within (0, 1)")
    return Scheduler(steps, (kind, *ends))


def config_of(shape: Shape) -> dict[str, Any]:
    """What `config.json` says of a transformer: `shape_of` turned round."""
    return {
        "_class_name": CLASSES[0],
        "num_attention_heads": shape.heads,
        "attention_head_dim": shape.head_dim,
        "in_channels": shape.channels,
        "out_channels": shape.channels * (2 if shape.variance else 1),
        "num_layers": shape.depth,
        "sample_size": shape.size,
        "patch_size": shape.patch,
        "num_embeds_ada_norm": shape.num_classes,
        "norm_eps": shape.epsilon,
    }


def load_transformer(folder: str | os.PathLike[str], shape: Shape) -> dict:
    """Reads the weights of a transformer.

    Args:
        folder: Where `diffusion_pytorch_model.safetensors` lies, or shards with their index.
        shape: As `read_checkpoint` has it.

    Returns:
        The parameters of `Transformer2D`, NumPy arrays in the types of the file.

    Raises:
        InputError: As `params_of`, and if files are missing or damaged.
    """
    with contextlib.ExitStack() as stack:
        tensors = opened(Path(folder), stack, STEM)
        try:
            return params_of(tensors, shape)
        except InputError as error:
            raise InputError(f"{folder} does not give this transformer: {error}") from error


def save_transformer(
    folder: str | os.PathLike[str], params: PyTree, shape: Shape, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the weights of a transformer as diffusers has them; no `config.json`.

    Raises:
        Diverged: If a parameter is not finite; nothing is written.
        InputError: As `tensors_of`, or if the folder cannot be written or holds other weights.
    """
    write_tensors(Path(folder), tensors_of(params, shape), STEM, shard_bytes=shard_bytes)


def fingerprint(checkpoint: Checkpoint) -> str:
    """A checksum of weights, sizes and schedule: each decides what the velocity is.

    Raises:
        InputError: If there are no weights.
    """
    files = files_of(checkpoint.folder, STEM)
    lost = [path.name for path in files if not path.is_file()]
    if lost:
        raise InputError(f"{checkpoint.folder} lacks {some(lost)}; copy all again")
    known = *map(sha256, files), repr(checkpoint.shape), repr(checkpoint.scheduler)
    return hashlib.sha256("\n".join(known).encode()).hexdigest()


def save_adapters(
    folder: str | os.PathLike[str],
    adapters: PyTree,
    alpha: float,
    base: str,
    shape: Shape,
    last: PyTree | None = None,
) -> None:
    """Writes adapters as PEFT has them: `adapter_model.safetensors`, `adapter_config.json`.

    Args:
        folder: Made if missing.
        adapters: `lora_a` (..., in, rank) and `lora_b` (..., rank, out) beside layers of
            `Transformer2D`, of one rank.
        alpha: Their scale times their rank.
        base: What they stand on, for the config.
        shape: What the transformer is like.
        last: Parameters with the output layer, where that is another than the base's; PEFT has it
            as a module to save.

    Raises:
        InputError: If they are of other layers or of several ranks, or cannot be written.
    """
    flat = {k: np.asarray(x) for k, x in traverse_util.flatten_dict(adapters, sep="/").items()}
    outer = {ours: (theirs,) for theirs, ours in OUTER.items()}
    layers = outer | {ours: ("", theirs) for theirs, ours in BLOCKS.items()}
    tensors, targets, ranks = {}, set(), set()
    for path, x in flat.items():
        layer, _, kind = path.rpartition("/")
        if layer not in layers or kind not in ("lora_a", "lora_b"):
            raise InputError(f"{path} is no adapter on a layer that diffusers has")
        if layer == "embed":
            raise InputError("adapters on the layer of patches, a convolution there, have no file")
        end = layers[layer][-1]
        stacked = {end: x} if x.ndim == 2 else {BLOCK.format(i) + end: y for i, y in enumerate(x)}
        for name, y in stacked.items():
            letter = "A" if kind == "lora_a" else "B"
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = y.T
            targets.add(name)
        ranks.add(x.shape[-1] if kind == "lora_a" else x.shape[-2])
    if len(ranks) != 1:
        raise InputError(f"adapters of the ranks {sorted(ranks)}; PEFT's config says one")
    if last is not None:
        leaves = {k: np.asarray(x) for k, x in traverse_util.flatten_dict(last, sep="/").items()}
        for end, x in _last(leaves, shape).items():
            tensors[f"base_model.model.{LAST}.{end}"] = x
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "r": ranks.pop(),
        "modules_to_save": None if last is None else [LAST],
        "target_modules": sorted(targets),
        "task_type": None,
    }
    write_tensors(Path(folder), tensors, "adapter_model")
    write_files({Path(folder) / "adapter_config.json": functools.partial(dump, config)})


# ----------------------------------------------------------------------- one tensor and our leaves


def params_of(tensors: Mapping[str, Any], shape: Shape) -> dict:
    """The parameters of a transformer, of tensors as diffusers has them.

    Args:
        tensors: name -> array of bfloat16, float16 or float32.
        shape: What the transformer is like.

    Raises:
        InputError: If tensors are missing, have no place here, or are of another shape or type or
            not finite. The names are listed.
    """
    wanted = _shapes(shape)
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise InputError(f"it lacks {len(missing)} tensors: {some(missing)}")
    strange = sorted(set(tensors) - set(wanted) - set(_COMPUTED))
    if strange:
        raise InputError(f"{len(strange)} tensors have no place: {some(strange)}")
    flat: dict[str, np.ndarray] = {}
    for theirs, ours in OUTER.items():
        flat[f"{ours}/kernel"] = _kernel(_tensor(tensors, f"{theirs}.weight", wanted))
        flat[f"{ours}/bias"] = _tensor(tensors, f"{theirs}.bias", wanted)
    for end in ("weight", "bias"):
        leaf = "kernel" if end == "weight" else "bias"
        for name, x in _split(_tensor(tensors, f"{LAST}.{end}", wanted), shape).items():
            flat[f"{name}/{leaf}"] = x.T
    for i, (end, path) in itertools.product(range(shape.depth), _block_tensors().items()):
        name = BLOCK.format(i) + end
        leaf = _tensor(tensors, name, wanted)
        leaf = leaf.T if path.endswith("/kernel") else leaf
        stacked = flat.setdefault(path, np.empty((shape.depth, *leaf.shape), leaf.dtype))
        if stacked.dtype != leaf.dtype:
            raise InputError(
                f"{name} is {leaf.dtype}, the same of the first block {stacked.dtype}; convert "
                "the file to one type"
            )
        stacked[i] = leaf
    return traverse_util.unflatten_dict(flat, sep="/")


def tensors_of(params: PyTree, shape: Shape) -> dict[str, np.ndarray]:
    """The inverse of `params_of`.

    Args:
        params: Of `Transformer2D`.
        shape: What the transformer is like.

    Returns:
        name -> array in the type of the parameters.

    Raises:
        Diverged: If a parameter is not finite.
        InputError: If parameters are missing, one too many, or of another shape or type.
    """
    flat = {k: np.asarray(x) for k, x in traverse_util.flatten_dict(params, sep="/").items()}
    layers = [*OUTER.values(), *_parts(shape)]
    paths = [f"{layer}/{leaf}" for layer in layers for leaf in ("kernel", "bias")]
    paths += list(_block_tensors().values())
    for what, names in (("lack", set(paths) - set(flat)), ("have also", set(flat) - set(paths))):
        if names:
            raise InputError(f"the parameters {what} {some(sorted(names))}")
    for path, x in flat.items():
        if not np.isfinite(x).all():
            raise Diverged(f"{path} is not finite, so it is not written")
    wanted, tensors = _shapes(shape), {}
    for theirs, ours in OUTER.items():
        kernel = flat[f"{ours}/kernel"].T
        if ours == "embed":
            kernel = kernel.reshape(-1, shape.patch, shape.patch, shape.channels)
            kernel = kernel.transpose(0, 3, 1, 2)
        tensors |= {f"{theirs}.weight": kernel, f"{theirs}.bias": flat[f"{ours}/bias"]}
    tensors |= {f"{LAST}.{end}": x for end, x in _last(flat, shape).items()}
    for i, (end, path) in itertools.product(range(shape.depth), _block_tensors().items()):
        leaf = flat[path][i]
        tensors[BLOCK.format(i) + end] = leaf.T if path.endswith("/kernel") else leaf
    for name, x in tensors.items():
        _check(name, x, wanted[name])
    return tensors


def _block_tensors() -> dict[str, str]:
    """What the tensors of a block are called behind its number -> our leaf."""
    both = (("weight", "kernel"), ("bias", "bias"))
    layers = {f"{t}.{end}": f"{o}/{leaf}" for t, o in BLOCKS.items() for end, leaf in both}
    return layers | dict((_TABLE,))


def _shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor there is."""
    width, patch = shape.width, shape.patch
    outputs = patch**2 * shape.channels * (2 if shape.variance else 1)
    sizes = {
        "pos_embed.proj": (width, shape.channels, patch, patch),
        "proj_out_1": (2 * width, width),
        LAST: (outputs, width),
    }
    own = dict.fromkeys(BLOCKS, (width, width)) | {
        "norm1.emb.timestep_embedder.linear_1": (width, 256),
        "norm1.linear": (6 * width, width),
        "ff.net.0.proj": (4 * width, width),
        "ff.net.2": (width, 4 * width),
    }
    blocks = range(shape.depth)
    sizes |= {BLOCK.format(i) + name: size for i in blocks for name, size in own.items()}
    tensors = {f"{name}.weight": size for name, size in sizes.items()}
    tensors |= {f"{name}.bias": size[:1] for name, size in sizes.items()}
    return tensors | {BLOCK.format(i) + _TABLE[0]: (shape.num_classes + 1, width) for i in blocks}


def _kernel(weight: np.ndarray) -> np.ndarray:
    """Ours of a linear layer, or of a convolution that cuts patches."""
    if weight.ndim == 2:
        return weight.T
    # Patches here are flattened in the order (row, column, channel).
    return weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))


def _split(x: np.ndarray, shape: Shape) -> dict[str, np.ndarray]:
    """The rows of the output layer that are the prediction, and those of the variances."""
    if not shape.variance:
        return {"output": x}
    pixels = x.reshape(shape.patch**2, 2, shape.channels, *x.shape[1:])
    rest = x.shape[1:]
    return {"output": pixels[:, 0].reshape(-1, *rest), "variance": pixels[:, 1].reshape(-1, *rest)}


def _last(flat: Mapping[str, np.ndarray], shape: Shape) -> dict[str, np.ndarray]:
    """The output layer as it is there."""
    parts, ends = _parts(shape), (("weight", "kernel"), ("bias", "bias"))
    return {end: _joined([flat[f"{p}/{leaf}"].T for p in parts], shape) for end, leaf in ends}


def _parts(shape: Shape) -> tuple[str, ...]:
    """The layers here that are the output layer there."""
    return ("output", "variance") if shape.variance else ("output",)


def _joined(parts: list[np.ndarray], shape: Shape) -> np.ndarray:
    """The inverse of `_split`."""
    if len({x.dtype for x in parts}) > 1:
        raise InputError("output and variance become one tensor, and differ in their types")
    pixels = [x.reshape(shape.patch**2, 1, -1, *x.shape[1:]) for x in parts]
    return np.concatenate(pixels, axis=1).reshape(-1, *parts[0].shape[1:])


def _tensor(tensors: Mapping[str, Any], name: str, wanted: Mapping[str, Any]) -> np.ndarray:
    x = np.asarray(tensors[name])
    _check(name, x, wanted[name])
    if not np.isfinite(x).all():
        raise InputError(f"{name} holds values that are not finite")
    return x


def _check(name: str, x: np.ndarray, wanted: tuple[int, ...]) -> None:
    if x.shape != wanted:
        raise InputError(f"{name} has the shape {x.shape}, the transformer wants {wanted}")
    if x.dtype not in _DTYPES:
        raise InputError(f"{name} is {x.dtype}; it must be bfloat16, float16 or float32")


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _LARGEST:
        raise InputError(f"{key} is {value!r:.80}; it must be a whole number above 0")
    return value
