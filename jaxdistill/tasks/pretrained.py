"""Networks that are trained before any method: a teacher, or what all students start from."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxdistill import keywords, run_folder, stage
from jaxdistill.errors import InputError
from jaxdistill.interrupt import ShouldStop
from jaxdistill.io import weights
from jaxdistill.io.files import expanded
from jaxdistill.io.versions import versions
from jaxdistill.method import Method
from jaxdistill.parallel import processes
from jaxdistill.settings import Experiment, family_name
from jaxdistill.task import Part


class Wanted(NamedTuple):
    """What is wanted, and how it is trained where it is not there.

    Attributes:
        name: What its file and its settings are called: `teacher`.
        title: What it is called while it is trained.
        dir: The folder that it is read from, or None where it is trained in `folder`.
        folder: Where it is trained.
        identity: What decides what it is, and its defaults; see `identity`.
        build: Its training, with the learning rates times a factor.
        steps: Length of the training.
        examples: What batches are drawn from.
        mesh: The devices.
        shapes: Its parameters.
        decisive: Group and name of each setting that the parameters do not show, and that must be
            as it was in training.
        dataset: The name of the data.
        source: What identifies them, for the card.
        card: What else the card says.
    """

    name: str
    title: str
    dir: str | None
    folder: Path
    identity: tuple[dict, dict]
    build: Callable[[float], Method]
    steps: int
    examples: Part
    mesh: Mesh
    shapes: PyTree
    decisive: Sequence[tuple[str, str]]
    dataset: str
    source: dict[str, Any]
    card: Mapping[str, Any] = {}


def identity(experiment: Experiment, names: Sequence[str], **more: Any) -> tuple[dict, dict]:
    """What decides what is trained, and the defaults of its settings; see `run_folder.claim`.

    Args:
        experiment: The run's.
        names: The groups of settings that decide it.
        **more: What else does, such as checksums of the data.
    """
    groups = {n: getattr(experiment.groups, n) for n in names}
    own = {n: keywords.identifying(type(g), g._asdict()) for n, g in groups.items()}
    defaults = {n: keywords.defaults(type(g)) for n, g in groups.items()}
    decided = {"family": family_name(experiment.family), "seed": experiment.seed, **own, **more}
    return json.loads(json.dumps(decided)), json.loads(json.dumps(defaults))


def pretrained(
    experiment: Experiment, wanted: Wanted, should_stop: ShouldStop
) -> tuple[PyTree, dict[str, Any]]:
    """The parameters that are wanted and their card, read, or trained and written first.

    Raises:
        InputError: If there are none where they should be, or they are of other settings.
        Interrupted: If it is stopped while they are trained.
    """
    name, groups = wanted.name, experiment.groups
    folder = expanded(wanted.dir) if wanted.dir else wanted.folder
    done = (folder / f"{name}.safetensors").is_file()
    processes.wait(f"the {name} is looked for")
    if wanted.dir and not done:
        raise InputError(f"{folder} holds no {name}.safetensors; leave {name}.dir out to train")
    if not wanted.dir:
        claimed = run_folder.claim(folder, *wanted.identity)
    if not done:
        ended = stage.run(
            wanted.title,
            wanted.build,
            seed=experiment.seed,
            run=groups.run,
            backend=groups.parallel.backend,
            folder=folder,
            identity=claimed,
            settings=wanted.identity[0],
            examples=wanted.examples,
            frozen=(),
            steps=wanted.steps,
            mesh=wanted.mesh,
            should_stop=should_stop,
        )
        output = jax.tree.map(processes.whole, ended.method.output(ended.state))
        if processes.is_first():
            card = {
                "dataset": wanted.dataset,
                "method": name,
                "config_hash": claimed,
                "seed": experiment.seed,
                "cost": ended.cost,
                "rate_factor": ended.rate_factor,
                "provenance": wanted.source | {"versions": versions()},
                "config": experiment.stated(),
                **wanted.card,
            }
            weights.save(folder, name, output, card)
        processes.wait(f"the {name} is trained")
    params, card = weights.load(folder, name)
    weights.check_shapes(f"{folder / f'{name}.safetensors'}", params, wanted.shapes)
    _check(experiment, folder, card, wanted)
    return params, card


def _check(experiment: Experiment, folder: Path, card: dict[str, Any], wanted: Wanted) -> None:
    """Refuses what was trained with other settings: its parameters may fit all the same."""
    name = wanted.name
    for group, setting in wanted.decisive:
        try:
            known = card["config"][group][setting]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{folder / name}.json does not say how it was trained; train it with this "
                "version, or add its settings to the card as config"
            ) from error
        own = getattr(getattr(experiment.groups, group), setting)
        if own != known:
            raise InputError(
                f"the {name} in {folder} was trained with {group}.{setting}={known}, this run has "
                f"{own}; use the same, or another {name}"
            )
