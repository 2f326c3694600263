"""What a config means: its groups, its rows and what identifies them.

A config has a `family`, a `seed`, the groups of settings of its family, the settings of its
`method`, those of each of its `baselines`, and those of each of its `evals`. Each is resolved
against the signature of what it is for; see `jaxdistill.keywords`. Where its data are to be
generated, it has the config of the run that does it as `generator`.
"""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple

from jaxdistill import keywords
from jaxdistill.errors import InputError
from jaxdistill.keywords import ASIDE, Between, Folder, Natural
from jaxdistill.task import Recipe

FAMILIES = "jaxdistill.tasks"
EVALS = "jaxdistill.eval"
_ROW = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")
#: The name of data that an experiment before this one generates, and of its evaluation for that.
GENERATED = "generated"
Config = Any
"""Nested dictionaries, or a `ConfigDict` of them."""


class Data(NamedTuple):
    """Where the training data come from.

    Attributes:
        name: A data set's name, or its path; see `jaxdistill.data.sources.load`.
        data_dir: Where a named data set lies.
        image_size: Pixels that images are brought to.
        pad_to: Pixels that images are padded to.
        placement: `resident` on the devices, or `streamed` from the host.
        holdout_per_class: Training images of each class that are judged by instead of the test
            split, for choosing settings.
    """

    name: str
    data_dir: Folder = None
    image_size: Annotated[int | None, Between(1, 10**5)] = None
    pad_to: Annotated[int | None, Between(1, 10**5)] = None
    placement: Annotated[Literal["resident", "streamed"], ASIDE] = "resident"
    holdout_per_class: Natural = 0


class Run(NamedTuple):
    """How the loop runs; it changes no result.

    Attributes:
        chunk: Steps in a launch.
        checkpoint_every: Steps between checkpoints; 0 for one at the end.
        tensorboard: Whether event files are written.
        tracker: A tracker of experiments that is told the metrics too; see
            `jaxdistill.io.trackers` for where it keeps them.
        restarts: How often a run that diverges goes back to its last checkpoint.
        restart_factor: What its learning rates are multiplied by each time.
        microbatch: Images in one pass of a classifier, on each device. Small passes stay in a
            CPU's cache; accelerators want large ones, as far as memory goes.
    """

    chunk: Annotated[int, Between(1, 10**6), ASIDE] = 10
    checkpoint_every: Annotated[int, Between(0, 10**9), ASIDE] = 100
    tensorboard: Annotated[bool, ASIDE] = False
    tracker: Annotated[Literal["wandb", "trackio"] | None, ASIDE] = None
    restarts: Annotated[int, Between(0, 1000), ASIDE] = 0
    restart_factor: Annotated[float, Between(1e-40, 0.999), ASIDE] = 0.3
    microbatch: Annotated[int, Between(1, 10**6), ASIDE] = 16


class Parallel(NamedTuple):
    """How a run is spread over devices; it changes results by rounding alone.

    Attributes:
        backend: `jit` or `pmap`.
        class_devices: Devices over which the classes are split, while the others share the batch;
            by default the most that divide the classes evenly.
        fully_sharded: Whether large parameters are split over all devices.
    """

    backend: Annotated[Literal["jit", "pmap"], ASIDE] = "jit"
    class_devices: Annotated[int | None, Between(1, 10**6), ASIDE] = None
    fully_sharded: Annotated[bool, ASIDE] = False


class Row(NamedTuple):
    """A method with its settings: one row of the tables.

    Attributes:
        name: What the row is called.
        method: The name of its module, as the config gives it.
        module: The module, which has `recipe`.
        settings: All keywords of its recipe.
    """

    name: str
    method: str
    module: ModuleType
    settings: dict[str, Any]

    def stated(self) -> dict[str, Any]:
        """The row as a config gives it, every setting said."""
        return {"name": self.method, **self.settings}

    def recipe(self, task: Any, rate_factor: float = 1.0) -> Recipe:
        """What its module makes of a task, with its learning rates times a factor."""
        made = self.module.recipe(task, **self.settings)
        if rate_factor == 1.0:
            return made
        slower = {name: self.settings[name] * rate_factor for name in made.rates}
        return self.module.recipe(task, **self.settings | slower)


class Evaluation(NamedTuple):
    """An evaluation with its settings.

    Attributes:
        name: What it is called in results.
        given: The name of its module, as the config gives it.
        module: The module, which has `evaluate` and perhaps `check`.
        settings: All keywords of `evaluate`.
    """

    name: str
    given: str
    module: ModuleType
    settings: dict[str, Any]

    def stated(self) -> dict[str, Any]:
        """The evaluation as a config gives it, every setting said."""
        return {"name": self.given, **self.settings}


class Experiment(NamedTuple):
    """A config, resolved.

    Attributes:
        family: The module of `jaxdistill.tasks`.
        seed: The seed from which every draw of the run follows.
        groups: The family's `Settings`: a named tuple of groups.
        rows: The method and its baselines, by name; the first is the method.
        evals: The evaluations, by name.
        generator: The experiment that makes the data, which then are called `generated`.
    """

    family: ModuleType
    seed: int
    groups: Any
    rows: dict[str, Row]
    evals: dict[str, Evaluation]
    generator: "Experiment | None" = None

    def stated(self) -> dict[str, Any]:
        """The whole config, every setting said, as JSON has it."""
        first, *others = self.rows.values()
        stated = {
            "family": family_name(self.family),
            "seed": self.seed,
            **{name: group._asdict() for name, group in self.groups._asdict().items()},
            "method": first.stated(),
            "baselines": {row.name: row.stated() for row in others},
            "evals": {name: e.stated() for name, e in self.evals.items()},
        }
        if self.generator is not None:
            stated["generator"] = self.generator.stated()
        return json.loads(json.dumps(stated))

    def identity(self, row: Row) -> dict[str, Any]:
        """What decides what a row is: seed, data, networks and the row's own settings.

        How a run is carried out and where things lie are not among them, nor is any other row.
        """
        groups = self.groups._asdict().items()
        settings = keywords.identifying(row.module.recipe, row.settings)
        identity = {
            "family": family_name(self.family),
            "seed": self.seed,
            **{n: keywords.identifying(type(g), g._asdict()) for n, g in groups},
            "method": {"name": row.method, **settings},
        }
        return json.loads(json.dumps({n: v for n, v in identity.items() if v != {}}))

    def default_identity(self, row: Row) -> dict[str, Any]:
        """The settings of `identity` as they are where nothing is said."""
        groups = {n: keywords.defaults(type(g)) for n, g in self.groups._asdict().items()}
        method = {"method": keywords.defaults(row.module.recipe)}
        return json.loads(json.dumps(groups | method))


# ---------------------------------------------------------------------------- modules by name


def family(name: Any) -> ModuleType:
    """The module of a family: one of `jaxdistill.tasks`, or a dotted path.

    Raises:
        InputError: If there is none.
    """
    if not isinstance(name, str) or not name:
        raise InputError(
            f"the config does not say its family; set config.family to "
            f"{' or '.join(modules(FAMILIES, 'ROOM'))}"
        )
    return _module(name, FAMILIES, "ROOM", "family")


def family_name(module: ModuleType) -> str:
    """What a config calls the family of a module."""
    return module.__name__.removeprefix(f"{FAMILIES}.")


def method(name: Any, room: str) -> ModuleType:
    """The module of a method: one of the family's room, or a dotted path.

    Raises:
        InputError: If there is none, or it has no `recipe`.
    """
    return _module(name, room, "recipe", "method")


def evaluation(name: Any) -> ModuleType:
    """The module of an evaluation: one of `jaxdistill.eval`, or a dotted path.

    Raises:
        InputError: If there is none, or it has no `evaluate`.
    """
    return _module(name, EVALS, "evaluate", "evaluation")


def modules(room: str, attribute: str) -> list[str]:
    """The modules of a package that have an attribute."""
    package = importlib.import_module(room)
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return [n for n in names if hasattr(importlib.import_module(f"{room}.{n}"), attribute)]


def _module(name: Any, room: str, attribute: str, what: str) -> ModuleType:
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise _unknown(name, room, attribute, what)
    inside = "." not in name and importlib.util.find_spec(f"{room}.{name}") is not None
    path = f"{room}.{name}" if inside else name
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is not None and (path == error.name or path.startswith(f"{error.name}.")):
            raise _unknown(name, room, attribute, what) from error
        raise InputError(f"{what} {name} needs the module {error.name}; install it") from error
    except (ImportError, SyntaxError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{what} {name} cannot be imported: {reason}") from error
    if not hasattr(module, attribute):
        raise _unknown(name, room, attribute, what)
    return module


def _unknown(name: Any, room: str, attribute: str, what: str) -> InputError:
    known = ", ".join(modules(room, attribute))
    return InputError(
        f"unknown {what} {keywords.quoted(name)}; choose from {known}, or give the dotted path"
        f" of a module with {attribute}"
    )


# ---------------------------------------------------------------------------- a config


def resolve(config: Config) -> Experiment:
    """Holds a config against what it is for: every setting is said, and known to be right.

    Args:
        config: As `get_config` of a config file gives it.

    Raises:
        InputError: If a group or setting is unknown, missing or wrong: one line that names it.
    """
    if not isinstance(config, Mapping):
        config = config.to_dict()
    module = family(config.get("family"))
    known = tables(module)
    top = ["family", "seed", *known, "method", "baselines", "evals", "generator"]
    for name in config:
        if name not in top:
            raise keywords.unknown(name, top, renamed(name))
    groups = {
        name: group(**keywords.resolve(group, _group(config, name), name, renamed))
        for name, group in known.items()
    }
    seed = keywords.check("seed", _SEED, config.get("seed", 0))
    stated = _group(config, "method")
    first = _row(str(stated.get("name")).rpartition(".")[2], "method", stated, module)
    rows = {first.name: first}
    for name, given in _group(config, "baselines").items():
        if not _ROW.fullmatch(name):
            raise InputError(
                f"baselines has a row {keywords.quoted(name)}; a row's name is letters, "
                "digits and any of _ . + -, for it is the name of a folder"
            )
        if name in rows:
            raise InputError(f"baselines has a row {name}, as the method is called; rename it")
        rows[name] = _row(name, f"baselines.{name}", given, module)
    evals = {}
    for name, given in _group(config, "evals").items():
        evals[name] = _evaluation(name, given, family_name(module))
        for row in getattr(evals[name].module, "ROWS", ()):
            if row in rows:
                raise InputError(f"evals.{name} has a row {row} of its own; rename yours")
    generator = resolve(config["generator"]) if _group(config, "generator") else None
    generated = groups["data"].name == GENERATED
    if generator is not None and (not generated or GENERATED not in generator.evals):
        raise InputError(
            f"config.generator makes what data.name={GENERATED} reads, by its evaluation "
            f"{GENERATED}; set both, or leave the generator out"
        )
    return Experiment(module, seed, module.Settings(**groups), rows, evals, generator)


def tables(family: ModuleType) -> dict[str, type]:
    """The groups of a family: name -> the named tuple that has its settings."""
    return inspect.get_annotations(family.Settings, eval_str=True)


def keyword(config: Mapping[str, Any], names: Sequence[str]) -> keywords.Keyword:
    """What the setting at a path of a complete config may be.

    Args:
        config: Nested dictionaries.
        names: The path.

    Raises:
        InputError: If there is no such setting.
    """
    *groups, name = names
    if groups and groups[0] == "generator":
        return keyword(config["generator"], names[1:])
    module = family(config.get("family"))
    if not groups:
        return _SEED if name == "seed" else _NAME
    if name == "name" and groups != ["data"]:
        return _NAME
    node = functools.reduce(lambda node, group: node[group], groups, config)
    if groups[0] in ("method", "baselines"):
        function = method(node["name"], module.ROOM).recipe
    elif groups[0] == "evals":
        function = evaluation(node["name"]).evaluate
    else:
        function = tables(module)[groups[0]]
    return keywords.table(function)[name]


def _group(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    group = config.get(name, {})
    if not isinstance(group, Mapping):
        raise InputError(f"config.{name} is {keywords.shown(repr(group))}; it is a group, a dict")
    return group


def _named(given: Any, path: str) -> tuple[Any, dict[str, Any]]:
    """What a row or an evaluation calls its module, and its settings."""
    if not isinstance(given, Mapping) or "name" not in given:
        raise InputError(f"{path} has no name; give it a dict with name, the module's")
    settings = dict(given)
    return settings.pop("name"), settings


def _row(name: str, path: str, given: Mapping[str, Any], family: ModuleType) -> Row:
    module_name, settings = _named(given, path)
    module = method(module_name, family.ROOM)
    return Row(name, module_name, module, keywords.resolve(module.recipe, settings, path, renamed))


def _evaluation(name: str, given: Mapping[str, Any], family: str) -> Evaluation:
    module_name, settings = _named(given, f"evals.{name}")
    module = evaluation(module_name)
    measures = getattr(module, "FAMILY", family)
    if measures != family:
        raise InputError(
            f"evals.{name}: {module_name} measures runs of the family {measures}, and this is one "
            f"of {family}; take another evaluation"
        )
    resolved = keywords.resolve(module.evaluate, settings, f"evals.{name}", renamed)
    return Evaluation(name, module_name, module, resolved)


_NAME = keywords.Keyword(str, False, None, False, keywords.REQUIRED)
_SEED = keywords.Keyword(int, False, Between(0, 2**32 - 1), False, 0)

# Settings that had another name before version 0.2.
_RENAMED = {
    "shift": "path.shift",
    "eval": "evals, one group an evaluation",
    "eval.baselines": "baselines, one group a row",
    "eval.architectures": "evals.accuracy.networks",
    "eval.rate": "evals.accuracy.learning_rate",
    "eval.batch": "evals.accuracy.batch_size or evals.samples.batch_size",
    "eval.calls": "evals.samples.nfe",
    "method.rate": "method.learning_rate",
    "method.rate_decay": "method.learning_rate_decay",
    "method.sampler_rate": "method.sampler_learning_rate",
    "method.finetune_rate": "method.finetune_learning_rate",
    "method.gamma_rate": "method.gamma_rate_scale",
    "method.calls": "method.nfe",
    "method.first_calls": "method.first_nfe",
    "method.batch": "method.batch_size",
    "method.drop": "method.mode_dropout",
    "teacher.rate": "teacher.learning_rate",
    "teacher.batch": "teacher.batch_size",
    "teacher.decay": "teacher.ema_decay",
    "pool.rate": "pool.learning_rate",
    "pool.batch": "pool.batch_size",
    "pool.width": "extractor.width",
    "model": "extractor, and evals.accuracy",
    "model.width": "evals.accuracy.width",
    "model.depth": "extractor.depth, and evals.accuracy.depth",
    "model.norm": "extractor.norm, and evals.accuracy.norm",
    "run.steps": "method.steps",
    "run.pass_size": "run.microbatch",
}


def renamed(path: str) -> str | None:
    """What a setting of an older version is called today; None if it was none."""
    path = re.sub(r"^baselines\.[^.]+", "method", re.sub(r"^evals\.[^.]+", "eval", path))
    if path in _RENAMED:
        return _RENAMED[path]
    return None


# ---------------------------------------------------------------------------- identities


def digest(tree: Any) -> str:
    """A short hash of what JSON can hold."""
    text = json.dumps(tree, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def difference(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    defaults: Mapping[str, Any],
    prefix: str = "",
) -> str:
    """The settings that differ, as `a.b=1, now 2`; empty if none does.

    Args:
        before: As they were stored.
        now: As they are.
        defaults: What a setting is where nothing is said: it stands for one that was not there
            yet when the others were stored.
        prefix: What the names begin with.
    """
    found = []
    for key in sorted({*before, *now}):
        default = defaults.get(key)
        old, new = before.get(key, default), now.get(key)
        if isinstance(new, Mapping) and isinstance(old or {}, Mapping):
            inner = default if isinstance(default, Mapping) else {}
            found.append(difference(old or {}, new, inner, f"{prefix}{key}."))
        elif old != new:
            found.append(f"{prefix}{key}={old}, now {new}")
    return "; ".join(filter(None, found))
