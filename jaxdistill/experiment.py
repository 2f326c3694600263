"""From a config to a result, for every family: make each row, save it, evaluate them all.

`train` and `evaluate` are what the command line calls; a notebook calls them with the same config.
Every stage finds what an earlier start left in the workdir and goes on from there.
"""

import os
from pathlib import Path
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from jaxdistill import report, run_folder, settings, stage
from jaxdistill.errors import Diverged, InputError
from jaxdistill.eval import results
from jaxdistill.eval.bench import Bench, Made
from jaxdistill.interrupt import ShouldStop, never
from jaxdistill.io import weights
from jaxdistill.io.files import expanded
from jaxdistill.io.versions import versions
from jaxdistill.parallel import processes
from jaxdistill.settings import Config, Experiment, Row
from jaxdistill.task import Part, Recipe
from jaxdistill.tasks import Loaded

_ASIDE = "aside"  # the name of what a method keeps beside its artefact


@jax.enable_x64(False)  # a run is one of 32 bits, whatever the program around it computes in
def train(
    config: Config, workdir: str | os.PathLike[str], should_stop: ShouldStop = never
) -> list[dict]:
    """Makes every row, then evaluates them. An interrupted call with the same arguments goes on.

    Args:
        config: See `configs/`, or `jaxdistill.config.load`.
        workdir: Gets `config.json`, `versions.json`, `row.json`, `metrics.jsonl`, `checkpoints/`,
            `artifacts/`, the same of each baseline in `baselines/`, what is trained before any
            method, `results.json`, `report.html`, and the whole run of a generator in `generator/`.
        should_stop: Asked many times; when it says yes, what was done is kept.

    Returns:
        The records of `results.json`.

    Raises:
        InputError: If the config, the data or the workdir do not fit.
        Diverged: If a method, or something that measures it, did; what is whole is kept.
        Interrupted: If `should_stop` said yes.
        OSError: If a file cannot be written.
    """
    experiment = settings.resolve(config)
    if experiment.generator is not None:
        check_beforehand(experiment, expanded(workdir), should_stop)
        train(experiment.generator.stated(), expanded(workdir) / "generator", should_stop)
    ready = set_up(config, workdir, should_stop)
    with run_folder.opened(ready.workdir, ready.experiment.stated()):
        made = {name: _make(ready, row) for name, row in ready.experiment.rows.items()}
        records = _evaluate(ready, made)
        if processes.is_first():
            folders = {name: row.folder.parent for name, row in made.items()}
            report.write(ready.workdir, ready.experiment, folders, records)
    if lost := results.diverged(records):
        rows = ", ".join(dict.fromkeys(f"{r['evaluation']} of {r['row']}" for r in lost))
        raise Diverged(
            f"{len(lost)} of {len(records)} measurements diverged ({rows}); the others are in "
            f"{ready.workdir / 'results.json'}; lower the learning rates"
        )
    return records


def evaluate(
    config: Config, workdir: str | os.PathLike[str], should_stop: ShouldStop = never
) -> list[dict]:
    """Evaluates what `train` left in the workdir; only what is not measured yet is run.

    The settings under `evals` may differ from those of the training run, and baselines that are
    asked for anew are made.

    Raises:
        InputError: If the workdir holds no artefact, or other settings than `evals` differ.
        Interrupted: If `should_stop` said yes; what is measured by then is kept.
        OSError: If a file cannot be written.
    """
    artefact = expanded(workdir) / "artifacts" / settings.resolve(config).family.ARTEFACT
    if not artefact.is_file():
        raise InputError(
            f"{artefact.parent} holds no {artefact.name}; run --mode=train in this workdir first"
        )
    return train(config, workdir, should_stop)


def check_beforehand(experiment: Experiment, workdir: Path, should_stop: ShouldStop) -> None:
    """Checks what stands behind hours of a generator, with the data that it is trained on.

    Raises:
        InputError: As `set_up` does.
    """
    generator = experiment.generator
    if (generated(workdir) / "generated.npz").is_file():
        return  # what is there is checked itself
    groups = experiment.groups._replace(data=generator.groups.data)
    run_folder.check(workdir)
    _recipes(
        experiment,
        experiment.family.load(
            experiment._replace(groups=groups, generator=None), workdir, should_stop
        ),
    )


def generated(workdir: Path) -> Path:
    """The folder that a generator of this workdir leaves its data in."""
    return workdir / "generator" / "generated"


class Ready(NamedTuple):
    """An experiment that can begin: all that can be wrong beforehand is known to be right.

    Attributes:
        experiment: The config, resolved.
        workdir: Where everything goes.
        loaded: The task and its data.
        recipes: The rows' recipes, by name.
        should_stop: Asked by everything that takes long.
    """

    experiment: Experiment
    workdir: Path
    loaded: Loaded
    recipes: dict[str, Recipe]
    should_stop: ShouldStop


def set_up(
    config: Config, workdir: str | os.PathLike[str], should_stop: ShouldStop = never
) -> Ready:
    """Checks everything that can be wrong, and makes nothing.

    Raises:
        InputError: As `train` does.
    """
    workdir, experiment = expanded(workdir), settings.resolve(config)
    run_folder.check(workdir)
    groups = experiment.groups
    if experiment.generator is not None and groups.data.data_dir is None:
        groups = groups._replace(data=groups.data._replace(data_dir=str(generated(workdir))))
    loaded = experiment.family.load(experiment._replace(groups=groups), workdir, should_stop)
    recipes = _recipes(experiment, loaded)
    for row in experiment.rows.values():
        run_folder.compare(
            row_folder(workdir, experiment, row.name),
            experiment.identity(row) | loaded.source,
            experiment.default_identity(row),
        )
    return Ready(experiment, workdir, loaded, recipes, should_stop)


def _recipes(experiment: Experiment, loaded: Loaded) -> dict[str, Recipe]:
    """The recipes of all rows, once the evaluations have agreed."""
    recipes = {n: row.recipe(loaded.task) for n, row in experiment.rows.items()}
    for evaluation in experiment.evals.values():
        if hasattr(evaluation.module, "check"):
            evaluation.module.check(loaded.task, loaded.data, **evaluation.settings)
    return recipes


def row_folder(workdir: Path, experiment: Experiment, name: str) -> Path:
    """Where a row lives: the method in the workdir, a baseline below it."""
    main = name == next(iter(experiment.rows))
    return workdir if main else workdir / "baselines" / name


def _make(ready: Ready, row: Row) -> Made:
    """Runs one row to its artefact; nothing is run when the artefact is there."""
    experiment, loaded, made = ready.experiment, ready.loaded, ready.recipes[row.name]
    family, folder = experiment.family, row_folder(ready.workdir, experiment, row.name)
    artefact = folder / "artifacts" / family.ARTEFACT
    done = artefact.is_file()
    processes.wait(f"{row.name} is looked for")
    # Of a row with a guarantee nothing that leaves the workdir may depend on the data otherwise.
    withheld = tuple(loaded.source) if made.withholds else ()
    identity = run_folder.claim(
        folder,
        experiment.identity(row) | loaded.source | loaded.made() | made.source(),
        experiment.default_identity(row),
        withheld,
    )
    examples = made.examples or loaded.task.examples
    shapes = stage.output_shapes(made, examples)
    if not done:
        if made.note and processes.is_first():
            print(f"{row.name}: {made.note}")
        frozen = made.frozen.load()
        ended = stage.run(
            row.name,
            lambda rate_factor: row.recipe(loaded.task, rate_factor).method,
            seed=experiment.seed,
            run=experiment.groups.run,
            backend=experiment.groups.parallel.backend,
            folder=folder,
            identity=identity,
            settings=run_folder.identity(folder, withheld),
            examples=examples,
            frozen=frozen,
            steps=made.steps,
            mesh=family.mesh(experiment, loaded.task),
            should_stop=ready.should_stop,
        )
        output = jax.tree.map(processes.whole, ended.method.output(ended.state))
        card = {
            "dataset": loaded.task.name,
            "method": row.name,
            "config_hash": identity,
            "seed": experiment.seed,
            "cost": ended.cost | made.cost(ended.state),
            "rate_factor": ended.rate_factor,
            "provenance": {
                **{name: known for name, known in loaded.source.items() if name not in withheld},
                **loaded.made(),
                **made.source(),
                "versions": versions(),
            },
            "settings": run_folder.identity(folder, withheld),
            **made.card,
        }
        aside = made.aside and jax.tree.map(processes.whole, made.aside.keep(ended.state))
        if processes.is_first():
            # Before the artefact: where that is, all is.
            if aside is not None:
                weights.save(folder / "artifacts", _ASIDE, aside, {"config_hash": identity})
            family.save(folder / "artifacts", experiment, loaded, row, output, card)
        processes.wait(f"{row.name} is made")
    try:
        _, card = family.read(folder / "artifacts", shapes)
    except InputError as error:
        raise InputError(
            f"{error}; delete {folder / 'artifacts'}, and the same command makes it again"
        ) from error
    if card.get("config_hash") != identity:
        raise InputError(
            f"{artefact} has no card of the run in {folder}, whose settings are in row.json; "
            f"put the run's own back, or delete {folder / 'artifacts'}, and the same command makes "
            "it again"
        )
    return Made(
        row.name,
        folder / "artifacts",
        made,
        lambda: family.read(folder / "artifacts", shapes)[0],
        made.frozen.load,
        lambda: _aside(folder / "artifacts", identity, made, examples),
    )


def _aside(folder: Path, identity: str, recipe: Recipe, examples: Part) -> PyTree:
    """What a row's method keeps beside its artefact."""
    again = f"delete {folder}, and the same command makes it again"
    try:
        tree, card = weights.load(folder, _ASIDE)
        weights.check_shapes(
            f"{folder / _ASIDE}.safetensors",
            tree,
            stage.shapes_of(recipe, examples, recipe.aside.keep),
        )
    except InputError as error:
        raise InputError(f"{error}; {again}") from error
    if card.get("config_hash") != identity:
        raise InputError(f"{folder / _ASIDE}.safetensors is of another run; {again}")
    return tree


def _evaluate(ready: Ready, made: dict[str, Made]) -> list[dict]:
    """Every evaluation of every row."""
    measured, records = results.Results(ready.workdir), []
    stored = run_folder.identity(ready.workdir)
    bench = Bench(
        "",
        ready.loaded.task,
        ready.loaded.data,
        made,
        ready.workdir,
        measured,
        # Other rows may have other settings; what they share decides how all are measured.
        {name: value for name, value in stored.items() if name != "method"},
        ready.should_stop,
    )
    for name, evaluation in ready.experiment.evals.items():
        records += evaluation.module.evaluate(bench._replace(name=name), **evaluation.settings)
    return records
