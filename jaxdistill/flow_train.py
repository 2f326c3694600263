"""From a config of the flow family to a result: teacher, students, artefacts, table.

`train` and `evaluate` are what the command line calls; a notebook calls them with the same
config. Every stage finds what an earlier start left in the workdir and goes on from there.
"""

import os
from collections.abc import Callable
from pathlib import Path

import jax
import ml_collections
from jaxtyping import PyTree

from jaxdistill import flow_build, flow_eval, run_folder, settings, stage
from jaxdistill.errors import InputError
from jaxdistill.flow_build import Setup
from jaxdistill.interrupt import ShouldStop, never
from jaxdistill.io import weights
from jaxdistill.method import Method
from jaxdistill.nn import lora
from jaxdistill.parallel import processes
from jaxdistill.parallel.mesh import make_mesh

# Settings that a teacher's parameters do not show, and that must be those it was trained with.
_OF_A_TEACHER = (
    "data.name",
    "data.image_size",
    "data.pad_to",
    "shift",
    "model.network",
    "model.heads",
    "teacher.label_drop",
)


def train(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    should_stop: ShouldStop = never,
) -> list[dict]:
    """Trains the teacher and the students, then judges them. The same call goes on with it.

    Args:
        config: See `configs/flow.py`.
        workdir: Gets `config.json`, `versions.json`, `metrics.jsonl`, `checkpoints/`, `teacher/`,
            `artifacts/`, `baselines/` and `results.json`.
        should_stop: Asked many times; when it says yes, what was done is kept.

    Returns:
        The rows of `results.json`.

    Raises:
        InputError: If the config, the data or the workdir do not fit.
        Interrupted: If `should_stop` said yes.
        OSError: If a file cannot be written.
    """
    setup = set_up(config, workdir)._replace(should_stop=should_stop)
    teacher, teacher_hash = _teacher(setup)
    frozen = {"teacher": teacher}
    students = {n: _student(setup, n, frozen, teacher_hash) for n in settings.rows(config)}
    return flow_eval.evaluate(setup, frozen, students, teacher_hash)


def evaluate(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    should_stop: ShouldStop = never,
) -> list[dict]:
    """Judges what `train` left in the workdir, and trains baselines that are asked for anew.

    Raises:
        InputError: If the workdir holds no student, or other settings than `eval` differ.
        Interrupted: If `should_stop` said yes; what is measured by then is kept.
        OSError: If a file cannot be written.
    """
    folder = Path(workdir) / "artifacts"
    if not (folder / "student.safetensors").is_file():
        raise InputError(
            f"{folder} holds no student.safetensors; run --mode=train in this workdir first"
        )
    return train(config, workdir, should_stop)


def set_up(config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]) -> Setup:
    """Checks everything that can be wrong, then makes the workdir.

    Raises:
        InputError: As `train` does.
    """
    flow_build.check(config)
    workdir, stated = Path(workdir), settings.plain(config)
    run_folder.check(workdir, stated, flow_build.identity)
    problem = flow_build.load_problem(config)
    shapes = flow_build.teacher_shapes(config, problem)
    for name in settings.rows(config):  # what is wrong is said before anything is run
        _, student = flow_build.build_method(config, problem, name)
        jax.eval_shape(student.init, jax.random.key(0), {"teacher": shapes})
    run_folder.make(workdir, stated)
    identity = settings.digest(flow_build.identity(stated))
    return Setup(config, identity, workdir, problem)


def _run(
    setup: Setup,
    name: str,
    build: Callable[[ml_collections.ConfigDict], Method],
    *,
    rate: str,
    folder: Path,
    identity: str,
    frozen: PyTree,
    steps: int,
) -> stage.Outcome:
    """A stage whose restarts lower one rate."""
    config, problem = setup.config, setup.problem
    placement = settings.PLACEMENTS[config.data.placement]
    return stage.run(
        name,
        build,
        config,
        rates=(rate,),
        folder=folder,
        identity=identity,
        place=lambda: placement(problem.dataset.train, problem.num_classes),
        frozen=frozen,
        steps=steps,
        mesh=make_mesh(),
        should_stop=setup.should_stop,
    )


def _teacher(setup: Setup) -> tuple[PyTree, str]:
    """The teacher's parameters, read or trained first, and their checksum."""
    config, problem = setup.config, setup.problem
    folder = Path(config.teacher.dir) if config.teacher.dir else setup.workdir / "teacher"
    done = (folder / "teacher.safetensors").is_file()
    processes.wait("the teacher is looked for")
    if not done:
        if config.teacher.dir:
            raise InputError(
                f"{folder} holds no teacher.safetensors; leave teacher.dir out to train"
            )
        if config.model.param_dtype != "float32":
            raise InputError(
                "a teacher is trained with model.param_dtype=float32, or its moving average would "
                "stand still; give the folder of a trained one as teacher.dir"
            )
        ended = _run(
            setup,
            "teacher",
            lambda config: flow_build.teacher_method(config, problem),
            rate="teacher.rate",
            folder=folder,
            identity=setup.hash,
            frozen=(),
            steps=config.teacher.steps,
        )
        params = jax.tree.map(processes.whole, ended.method.output(ended.state))
        if processes.is_first():
            weights.save(folder, "teacher", params, _card(setup, "teacher", ended, {}))
        processes.wait("the teacher is trained")
    params, card = weights.load(folder, "teacher")
    shapes = flow_build.teacher_shapes(config, problem)
    weights.check_shapes(f"{folder / 'teacher.safetensors'}", params, shapes)
    _check_teacher(setup, folder, card)
    return params, card["sha256"]


def _check_teacher(setup: Setup, folder: Path, card: dict) -> None:
    """Refuses a teacher of other data or times: its parameters may fit all the same."""
    try:
        known = {path: settings.at(card["config"], path) for path in _OF_A_TEACHER}
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'teacher.json'} does not say how it was trained") from error
    for path, value in known.items():
        own = settings.at(setup.config, path)
        if own != value:
            raise InputError(
                f"the teacher in {folder} was trained with {path}={value}, this run has {own}; "
                "use the same, or another teacher"
            )


def _student(setup: Setup, name: str, frozen: PyTree, teacher_hash: str) -> PyTree:
    """What a student has learned: read, or trained first."""
    config, folder = setup.config, run_folder.of(setup, name)
    _, student = flow_build.build_method(config, setup.problem, name)
    artifacts = folder / "artifacts"
    done = (artifacts / "student.safetensors").is_file()
    processes.wait(f"{name} is looked for")
    shapes = jax.eval_shape(student.init, jax.random.key(0), frozen)
    if not done:
        trained, whole = lora.count(shapes), lora.count(frozen["teacher"])
        whole += lora.count(shapes["head"])
        if processes.is_first():
            share = f"{100 * trained / whole:.1f} %"
            print(f"{name}: {trained:,} of {whole:,} parameters are trained, {share}")
        # Half trained it goes on under the same teacher only.
        identity = settings.digest([setup.hash, teacher_hash])
        ended = _run(
            setup,
            name,
            lambda config: flow_build.build_method(config, setup.problem, name)[0],
            rate="method.rate",
            folder=folder,
            identity=identity,
            frozen=frozen,
            steps=config.run.steps,
        )
        queries = int(ended.state.queries) * config.method.batch
        cost = {"trained_parameters": trained, "teacher_queries": queries}
        card = _card(setup, name, ended, cost) | {
            "calls": config.method.calls,
            "shift": config.shift,
            "last": config.method.last,
            "teacher_sha256": teacher_hash,
            "licence": "that of the teacher and its data",
        }
        params = jax.tree.map(processes.whole, ended.method.output(ended.state))
        if processes.is_first():
            weights.save(artifacts, "student", params, card)
        processes.wait(f"{name} is distilled")
    params, card = weights.load(artifacts, "student")
    weights.check_shapes(f"{artifacts / 'student.safetensors'}", params, shapes)
    if card.get("teacher_sha256") != teacher_hash:
        raise InputError(f"the student in {artifacts} is of another teacher; use another workdir")
    return params


def _card(setup: Setup, name: str, ended: stage.Outcome, cost: dict) -> dict:
    data = setup.problem.dataset
    return {
        "dataset": setup.problem.name,
        "method": name,
        "config_hash": setup.hash,
        "seed": setup.config.seed,
        "cost": ended.cost | cost,
        "rate_factor": ended.rate_factor,
        "provenance": {
            "source_sha256": None if data is None else data.fingerprint(),
            "versions": run_folder.versions(),
        },
        "config": settings.plain(setup.config),
    }
