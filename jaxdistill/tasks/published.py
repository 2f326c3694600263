"""Transformers of diffusers as teachers of flows, and their students in the same files."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxdistill import collective
from jaxdistill.errors import InputError
from jaxdistill.flow import schedules
from jaxdistill.flow.paths import boundaries, shifted
from jaxdistill.io import weights
from jaxdistill.io.diffusers import Checkpoint, save_adapters, save_transformer
from jaxdistill.io.files import dump, write_files
from jaxdistill.nn import lora
from jaxdistill.nn.transformer2d import Transformer2D

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def schedule_of(checkpoint: Checkpoint) -> schedules.Schedule:
    """How a transformer sees the straight path, and what it says of it."""
    steps, variances = checkpoint.scheduler
    if variances is None:
        return schedules.straight(steps)
    return schedules.noise_predictor(schedules.betas(*variances, steps))


def network(checkpoint: Checkpoint, **settings: Any) -> Transformer2D:
    """The module of a transformer, as a velocity of the straight path.

    Args:
        checkpoint: What lies in its folder.
        **settings: Attributes of the module that do not change what it computes, but for rounding.
    """
    return Transformer2D(
        checkpoint.shape,
        *schedule_of(checkpoint),
        place=collective.by_example,
        per_device=collective.per_device,
        **settings,
    )


def export(
    out: Path, checkpoint: Checkpoint, base: PyTree, student: PyTree, card: dict, alpha: float
) -> None:
    """Writes a student beside its teacher's kind.

    Args:
        out: Made if missing.
        checkpoint: The teacher's folder.
        base: The teacher's parameters.
        student: What it has learned: `trunk` and `head`.
        card: What it says of itself.
        alpha: Scale of its adapters times their rank.

    Raises:
        InputError: If it has parts that no file of diffusers or PEFT has, or `out` cannot be
            written or holds other weights.
    """
    trunk, head = student["trunk"], student["head"]
    if set(student) != {"trunk", "head"} or "span" in trunk:
        raise InputError("this student has layers beside trunk and head, which diffusers has not")
    output = _line(head, base)
    adapters = {k: v for k, v in _flat(trunk).items() if k.endswith(("lora_a", "lora_b"))}
    if output is None and not adapters:
        raise InputError(
            "this student follows curves and was trained whole: diffusers has no place for its "
            "head, and PEFT none for its trunk; train it with adapters, or take method=linear"
        )
    _check_free(out)
    # What is given away names no folder of this machine.
    said, key = dict(checkpoint.config), "_name_or_path"
    if not _REPOSITORY.fullmatch(str(said.get(key))):
        said.pop(key, None)
    name = str(said.get(key) or checkpoint.folder.absolute().parent.name)
    config = card["config"] | {"teacher": card["config"]["teacher"] | {"dir": None}}
    card = card | {"teacher": name, "config": config}
    if adapters:
        rank = next(x.shape[-1] for k, x in adapters.items() if k.endswith("lora_a"))
        last = None if output is None else base | {"output": output}
        save_adapters(out / "adapter", trunk, alpha, name, checkpoint.shape, last)
        scale = alpha / rank
    if output is None:
        weights.save(out, "head", head, {"of": card["method"]})
    else:
        whole = lora.overlay(base, trunk)
        whole = lora.merge(whole, scale) if adapters else whole
        whole = jax.tree.map(np.asarray, whole | {"output": output})
        save_transformer(out / "transformer", whole, checkpoint.shape)
    (out / "scheduler").mkdir(parents=True, exist_ok=True)
    text = readme(checkpoint, name, card, bool(adapters), output is not None)
    files = {
        out / "scheduler" / "scheduler_config.json": checkpoint.scheduler_config,
        out / "student.json": card,
    }
    if output is not None:
        files[out / "transformer" / "config.json"] = said
    writers = {path: functools.partial(dump, tree) for path, tree in files.items()}
    write_files(writers | {out / "README.md": lambda file: file.write(text.encode())})


def readme(checkpoint: Checkpoint, base: str, card: dict, adapters: bool, merged: bool) -> str:
    """The card of a student for people and for the Hub.

    Args:
        checkpoint: The teacher's folder.
        base: The teacher's name.
        card: What the student says of itself.
        adapters: Whether `adapter/` is there.
        merged: Whether `transformer/` is.
    """
    nfe, shift = card["nfe"], card["shift"]
    levels = np.asarray(shifted(boundaries(nfe, card.get("last", 1.0)), shift))[:-1]
    ones = jnp.ones((nfe, 1))
    scale, times = schedule_of(checkpoint).enter(ones, jnp.asarray(levels))
    rows = zip(levels, np.asarray(times), np.asarray(scale)[:, 0], strict=True)
    head = ["---", "library_name: diffusers", "license: other"]
    head += [f"base_model: {base}"] if _REPOSITORY.fullmatch(base) else []
    head += ["tags: [distillation, jaxdistill]", "---"]
    says = "the noise e; the velocity is (e - x) / (1 - t), and see below at the noisiest level"
    if checkpoint.scheduler.betas is None:
        says = "the velocity, noise minus data"
    lines = [
        *head,
        f"# A student of {base} with {nfe} calls",
        "",
        f"Made by jaxdistill, method `{card['method']}`; its licence is {card['licence']}. "
        "`student.json` has all settings and what it was made from.",
        "",
        *(["- `transformer/`: the student as `DiTTransformer2DModel`"] if merged else []),
        *(["- `adapter/`: what it differs by, for PEFT, on the base model"] if adapters else []),
        *([] if merged else ["- `head.safetensors`: its output layer, which takes jaxdistill"]),
        "- `scheduler/`: the base model's; the student's own times are these",
        "",
        f"At noise level t a state is x = (1 - t) data + t noise. The network says {says}.",
        "",
        "| call | t | timestep | the network sees x times |",
        "|---|---|---|---|",
        *(f"| {i} | {t:.6g} | {n:.6g} | {s:.6g} |" for i, (t, n, s) in enumerate(rows, 1)),
        "",
        "At t = 1, which a diffusion does not reach, the data are read off at its last step: "
        "data = (x - sigma e) / alpha with that step's alpha and sigma, and the velocity is x - "
        "data."
        if checkpoint.scheduler.betas
        else "",
    ]
    return "\n".join(lines).rstrip() + "\n"


def _check_free(out: Path) -> None:
    """Refuses a folder in which something else would be written over."""
    if (out / "student.safetensors").is_file():
        raise InputError(f"{out} holds a student of a run; give another folder")
    parts = ("transformer", "adapter", "head.safetensors", "config.json")
    there = [part for part in parts if (out / part).exists()]
    if there:
        raise InputError(f"{out} holds {', '.join(there)} already; give another folder")


def _flat(tree: PyTree) -> dict[str, Any]:
    return {"/".join(str(p.key) for p in path): x for path, x in jax.tree.leaves_with_path(tree)}


def _line(head: PyTree, base: PyTree) -> PyTree | None:
    """The output layer of a student of one straight line; None of others."""
    same = set(head) == {"velocities", "gates"}
    if not same or head["velocities"]["kernel"].shape != base["output"]["kernel"].shape:
        return None
    return {k: np.asarray(x).astype(base["output"][k].dtype) for k, x in head["velocities"].items()}
