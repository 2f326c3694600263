"""From a config of the flow family to a result: teacher, students, artefacts, table.

`train` and `evaluate` are what the command line calls; a notebook calls them with the same
config. Every stage finds what an earlier start left in the workdir and goes on from there.
"""

import os
import time
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
from jaxtyping import PyTree

from jaxdistill import build, flow_build, flow_eval, run_folder, runner
from jaxdistill.errors import InputError
from jaxdistill.flow_build import Problem
from jaxdistill.interrupt import ShouldStop, never
from jaxdistill.io import weights
from jaxdistill.method import Method
from jaxdistill.nn import lora
from jaxdistill.parallel import processes
from jaxdistill.parallel.mesh import make_mesh


class Setup(NamedTuple):
    """What the stages share.

    Attributes:
        config: The resolved config.
        hash: Identifies it.
        workdir: Where everything goes.
        problem: What flows.
        should_stop: Asked by everything that takes long.
    """

    config: ml_collections.ConfigDict
    hash: str
    workdir: Path
    problem: Problem
    should_stop: ShouldStop = never


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
    students = {n: _student(setup, n, frozen, teacher_hash) for n in build.rows(config)}
    return flow_eval.evaluate(setup, frozen, students)


def evaluate(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    should_stop: ShouldStop = never,
) -> list[dict]:
    """Judges what `train` left in the workdir; only what is not measured yet is run.

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
    workdir, settings = Path(workdir), build.plain(config)
    run_folder.check(workdir, settings, flow_build.identity)
    problem = flow_build.load_problem(config)
    shapes = flow_build.teacher_shapes(config, problem)
    for name in build.rows(config):  # what is wrong is said before anything is run
        _, student = flow_build.build_method(config, problem, name)
        jax.eval_shape(student.init, jax.random.key(0), {"teacher": shapes})
    run_folder.make(workdir, settings)
    return Setup(config, build.digest(flow_build.identity(settings)), workdir, problem)


def _run(setup: Setup, name: str, method: Method, folder: Path, steps: int, frozen: PyTree):
    """One run of the loop, and what it cost."""
    config, data = setup.config, ()
    if method.batches.kind == "uniform":
        split = setup.problem.dataset.train
        data = build.PLACEMENTS[config.data.placement](split, setup.problem.num_classes)
    began = time.perf_counter(), time.process_time()
    state = runner.run(
        method,
        data=data,
        frozen=frozen,
        key=jax.random.key(config.seed),
        steps=steps,
        chunk=config.run.chunk,
        mesh=make_mesh(),
        backend=config.parallel.backend,
        workdir=folder,
        checkpoint_every=config.run.checkpoint_every,
        metadata={"config_hash": setup.hash, "method": name},
        tensorboard=config.run.tensorboard,
        progress=name,
        should_stop=setup.should_stop,
    )
    jax.block_until_ready(state)
    return state, {
        "steps": steps,
        # Of this process: a run that went on after an interruption shows its last part.
        "wall_seconds": round(time.perf_counter() - began[0], 2),
        "cpu_seconds": round(time.process_time() - began[1], 2),
    }


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
        method = flow_build.teacher_method(config, problem)
        state, cost = _run(setup, "teacher", method, folder, config.teacher.steps, ())
        params = jax.tree.map(processes.whole, method.output(state))
        if processes.is_first():
            weights.save(folder, "teacher", params, _card(setup, "teacher", cost))
        processes.wait("the teacher is trained")
    params, card = weights.load(folder, "teacher")
    shapes = flow_build.teacher_shapes(config, problem)
    weights.check_shapes(f"{folder / 'teacher.safetensors'}", params, shapes)
    return params, card["sha256"]


def folder_of(setup: Setup, name: str) -> Path:
    """Where a student lives."""
    main = name == setup.config.method.name
    return setup.workdir if main else setup.workdir / "baselines" / name


def _student(setup: Setup, name: str, frozen: PyTree, teacher_hash: str) -> PyTree:
    """What a student has learned: read, or trained first."""
    config, folder = setup.config, folder_of(setup, name)
    method, student = flow_build.build_method(config, setup.problem, name)
    artifacts = folder / "artifacts"
    done = (artifacts / "student.safetensors").is_file()
    processes.wait(f"{name} is looked for")
    shapes = jax.eval_shape(student.init, jax.random.key(0), frozen)
    if not done:
        trained, whole = lora.count(shapes), lora.count(frozen["teacher"])
        head = lora.count(shapes["head"])
        print(
            f"{name}: {trained:,} of {whole + head:,} parameters are trained, "
            f"{100 * trained / (whole + head):.1f} %"
        )
        state, cost = _run(setup, name, method, folder, config.run.steps, frozen)
        cost |= {"trained_parameters": trained, "teacher_queries": _queries(setup, state, name)}
        card = _card(setup, name, cost) | {
            "calls": config.method.calls,
            "shift": config.shift,
            "last": config.method.last,
            "teacher_sha256": teacher_hash,
            "licence": "that of the teacher and its data",
        }
        params = jax.tree.map(processes.whole, method.output(state))
        if processes.is_first():
            weights.save(artifacts, "student", params, card)
        processes.wait(f"{name} is distilled")
    params, card = weights.load(artifacts, "student")
    weights.check_shapes(f"{artifacts / 'student.safetensors'}", params, shapes)
    if card["teacher_sha256"] != teacher_hash:
        raise InputError(f"the student in {artifacts} is of another teacher; use another workdir")
    return params


def _queries(setup: Setup, state: PyTree, name: str) -> int:
    """Network calls of the teacher in all, as the program counted them for one example."""
    calls = flow_build.teacher_velocity(setup.config, setup.problem)[1]
    return int(state.queries) * setup.config.method.batch * calls


def _card(setup: Setup, name: str, cost: dict) -> dict:
    data = setup.problem.dataset
    return {
        "dataset": setup.problem.name,
        "method": name,
        "config_hash": setup.hash,
        "seed": setup.config.seed,
        "cost": cost,
        "provenance": {
            "source_sha256": None if data is None else data.fingerprint(),
            "versions": run_folder.versions(),
        },
        "config": build.plain(setup.config),
    }
