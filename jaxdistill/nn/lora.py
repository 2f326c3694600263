"""Low-rank adapters (LoRA) for the dense layers of any linen module, with its code untouched.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022). An adapted layer
computes `x @ kernel + scale * (x @ lora_a) @ lora_b`. The two factors lie beside the kernel in the
tree of parameters; `adapt` makes the layers use them. Kernels of scanned layers have leading axes,
and so have their factors. Parameters are nested dictionaries throughout.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Key

from jaxdistill.errors import InputError

_A, _B = "lora_a", "lora_b"


def _flatten(params: Mapping) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep="/")


def _unflatten(flat: Mapping[str, Any]) -> dict:
    return traverse_util.unflatten_dict(flat, sep="/")


def _layer(path: str) -> str:
    return path.rpartition("/")[0]


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _in(layer: str, name: str) -> str:
    return f"{layer}/{name}" if layer else name


def add(key: Key[Array, ""], params: Mapping, *, rank: int, targets: Sequence[str]) -> dict:
    """Puts adapters beside kernels. They change nothing yet: every `lora_b` is zero.

    `lora_a` is normal with standard deviation 1 / rank, the `gaussian` rule of the PEFT library.

    Args:
        key: Draws the factors `lora_a`.
        params: Parameters of a module; kernels are (..., in, out).
        rank: Inner size of the factors, `lora_a` (..., in, rank) and `lora_b` (..., rank, out).
        targets: Regular expressions, looked for anywhere in the paths of layers such as
            `blocks/up`. A layer gets one adapter if any of them fits.

    Returns:
        New parameters; the leaves that were there are shared, not copied.

    Raises:
        InputError: for a rank below 1, no expression, one that is none or fits no layer with a
            kernel, and a layer that has an adapter already.
    """
    if rank < 1:
        raise InputError(f"rank {rank} of adapters: choose 1 or more")
    if not targets:
        raise InputError("adapters without targets; name the layers that get them")
    flat = _flatten(params)
    layers = [_layer(path) for path in flat if _name(path) == "kernel"]
    chosen: set[str] = set()
    for target in targets:
        try:
            fits = {layer for layer in layers if re.search(target, layer)}
        except re.error as error:
            raise InputError(f"target {target!r} is no regular expression: {error}") from None
        if not fits:
            names = ", ".join(sorted(layers)) or "none"
            raise InputError(f"target {target!r} fits no layer with a kernel; there are: {names}")
        chosen |= fits
    for layer, layer_key in zip(sorted(chosen), jax.random.split(key, len(chosen)), strict=True):
        kernel = flat[_in(layer, "kernel")]
        if _in(layer, _A) in flat:
            raise InputError(f"layer {layer!r} has an adapter already: merge it first")
        *stack, inputs, outputs = kernel.shape
        a = jax.random.normal(layer_key, (*stack, inputs, rank), kernel.dtype) / rank
        flat[_in(layer, _A)] = a
        flat[_in(layer, _B)] = jnp.zeros((*stack, rank, outputs), kernel.dtype)
    return _unflatten(flat)


def adapt(apply: Callable, scale: float) -> Callable:
    """Makes a function see the adapters in the parameters it is given.

    The kernels stay as they are, so that a gradient with respect to the adapters forms nothing of
    their size.

    Args:
        apply: A function that calls linen modules, such as `module.apply`; not yet jitted, since a
            program that is compiled already cannot be changed. Jit the result.
        scale: Factor of the adapters' contribution, alpha / rank in the usual notation.

    Returns:
        A function with the same arguments. It raises `InputError` where an adapter lies in a
        layer other than `flax.linen.Dense`.
    """

    def interceptor(call, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or not module.has_variable("params", _A):
            return call(*args, **kwargs)
        if not isinstance(module, nn.Dense):
            raise InputError(
                f"layer {'/'.join(module.path)} is a {type(module).__name__}: adapters go with "
                "flax.linen.Dense only, choose targets that leave it out"
            )
        params = module.variables["params"]
        (x,) = (*args, *kwargs.values())
        x, a, b = promote_dtype(x, params[_A], params[_B], dtype=module.dtype)
        return call(*args, **kwargs) + (x @ a) @ b * scale

    def adapted(*args, **kwargs):
        with nn.intercept_methods(interceptor):
            return apply(*args, **kwargs)

    return adapted


def _shift_kernels(flat: dict[str, Any], adapters: Mapping[str, Any], scale: float) -> dict:
    for path, a in adapters.items():
        if _name(path) == _A:
            layer = _layer(path)
            kernel, b = flat[_in(layer, "kernel")], adapters[_in(layer, _B)]
            product = jnp.matmul(
                a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
            )
            merged = kernel.astype(jnp.float32) + scale * product
            flat[_in(layer, "kernel")] = merged.astype(kernel.dtype)
    return flat


def _is_adapter(path: str) -> bool:
    return _name(path) in (_A, _B)


def merge(params: Mapping, scale: float) -> dict:
    """Works the adapters into the kernels.

    Args:
        params: Parameters with adapters.
        scale: That of `adapt`.

    Returns:
        Parameters without adapters for the plain module.
    """
    plain, adapters = split(params, _is_adapter)
    return _unflatten(_shift_kernels(_flatten(plain), _flatten(adapters), scale))


def unmerge(merged: Mapping, adapted_params: Mapping, scale: float) -> dict:
    """Takes adapters out of merged kernels again, up to rounding.

    Args:
        merged: What `merge` returned.
        adapted_params: Parameters with the adapters that were merged; nothing else of them is used.
        scale: That of `merge`.

    Returns:
        Parameters with adapters.

    Raises:
        InputError: for an adapter without a kernel in `merged`.
    """
    flat, adapters = _flatten(merged), _flatten(split(adapted_params, _is_adapter)[1])
    for path in adapters:
        if _in(_layer(path), "kernel") not in flat:
            raise InputError(
                f"adapter {path} has no kernel in the merged parameters: they are of another module"
            )
    return _unflatten({**_shift_kernels(flat, adapters, -scale), **adapters})


def split(params: Mapping, trainable: Callable[[str], bool]) -> tuple[dict, dict]:
    """Divides parameters in two; `overlay` puts them together again.

    Args:
        params: Parameters.
        trainable: Told a path such as `blocks/up/lora_a`, says whether that leaf is trained.

    Returns:
        The frozen and the trainable parameters, without empty branches.
    """
    parts: tuple[dict, dict] = ({}, {})
    for path, leaf in _flatten(params).items():
        parts[bool(trainable(path))][path] = leaf
    return _unflatten(parts[0]), _unflatten(parts[1])


def overlay(frozen: Mapping, trainable: Mapping) -> dict:
    """The parameters of two trees in one; a leaf that both have is taken from `trainable`."""
    return _unflatten({**_flatten(frozen), **_flatten(trainable)})


def count(params: Any) -> int:
    """The number of parameters, of arrays or of their shapes (`jax.eval_shape`)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
