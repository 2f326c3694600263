"""What the configs of all families share: their checks, their identity, their data."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

from jaxdistill.data import device, sources, stream
from jaxdistill.data.dataset import Dataset, holdout
from jaxdistill.errors import InputError
from jaxdistill.parallel.backends import BACKENDS

PLACEMENTS = {"resident": device.resident, "streamed": stream.stream}
_DTYPES = ("float32", "bfloat16")
_Read = TypeVar("_Read", bound=Dataset | sources.Facts)


def rows(config: ml_collections.ConfigDict) -> list[str]:
    """The methods of a run, its own and the baselines: each becomes a row of the table."""
    names = [config.method.name, *config.eval.baselines]
    return list(dict.fromkeys(names))


def at(tree: Mapping | ml_collections.ConfigDict, path: str) -> Any:
    """The setting at a path such as `method.rate`."""
    return functools.reduce(lambda node, name: node[name], path.split("."), tree)


def check_ranges(config: ml_collections.ConfigDict, ranges: Mapping[str, tuple]) -> None:
    """Refuses numbers outside their ranges, and seeds that are none.

    Args:
        config: With a `seed`.
        ranges: Path of a setting -> least and largest value; None is always allowed.

    Raises:
        InputError: In these cases.
    """
    for path, (least, most) in {"seed": (0, 2**32 - 1), **ranges}.items():
        value = at(config, path)
        if value is not None and not least <= value <= most:
            raise InputError(f"{path} is {value}; it must be between {least} and {most}")


def check_dtypes(config: ml_collections.ConfigDict, paths: Sequence[str]) -> None:
    """Refuses settings that name no type to compute in.

    Raises:
        InputError: In this case.
    """
    for path in paths:
        if at(config, path) not in _DTYPES:
            raise InputError(f"{path} is {at(config, path)!r}; choose {' or '.join(_DTYPES)}")


def check_places(config: ml_collections.ConfigDict) -> None:
    """Refuses ways of carrying out a run that do not exist.

    Raises:
        InputError: In these cases.
    """
    if config.run.restarts < 0 or not 0 < config.run.restart_factor < 1:
        raise InputError(
            f"run.restarts is {config.run.restarts} and run.restart_factor "
            f"{config.run.restart_factor}; the first must not be negative, the second between "
            "0 and 1"
        )
    if config.parallel.backend not in BACKENDS:
        raise InputError(
            f"unknown backend {config.parallel.backend!r}; choose from {', '.join(BACKENDS)}"
        )
    if config.data.placement not in PLACEMENTS:
        raise InputError(
            f"data.placement is {config.data.placement!r}; choose {' or '.join(PLACEMENTS)}"
        )


def plain(config: ml_collections.ConfigDict) -> dict:
    """The settings as JSON has them."""
    return json.loads(json.dumps(config.to_dict(), default=list))


def identity(settings: dict, folder: str) -> dict:
    """The settings that decide what is made, of which a workdir holds one set.

    The evaluation may be repeated with others, and how a run is carried out (`parallel`, and
    `run` but for its length) and where things lie change nothing but the last bits.

    Args:
        settings: As JSON has them.
        folder: The group whose `dir` says where something lies.
    """
    kept = {k: v for k, v in settings.items() if k not in ("eval", "parallel")}
    there = {k: v for k, v in settings[folder].items() if k != "dir"}
    data = {k: v for k, v in settings["data"].items() if k != "placement"}
    return kept | {"data": data, folder: there, "run": {"steps": settings["run"]["steps"]}}


def digest(tree: Any) -> str:
    """A short hash of what JSON can hold."""
    text = json.dumps(tree, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_source(config: ml_collections.ConfigDict, read: Callable[..., _Read]) -> _Read:
    """What `sources.load`, or `sources.facts`, says of the config's data set."""
    data = config.data
    return read(data.name, data_dir=data.data_dir, image_size=data.image_size, pad_to=data.pad_to)


def load_dataset(config: ml_collections.ConfigDict) -> Dataset:
    """The config's data set; its test split is a part of the training set if some is held out."""
    dataset = read_source(config, sources.load)
    if config.data.holdout_per_class:
        return holdout(dataset, config.data.holdout_per_class, seed=0)
    return dataset
