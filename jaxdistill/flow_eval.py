"""How good few-step students are: samples of every row, measures, pictures, a table.

All rows start from the same noise and labels. A teacher's row counts the calls of its network,
guidance included; a student's is what its sampler calls.
"""

import functools
import itertools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from PIL import Image

from jaxdistill import build, flow_build, pool
from jaxdistill.data.augment import normalizer
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval import generative, train_on
from jaxdistill.flow import samplers
from jaxdistill.flow.paths import boundaries, shifted
from jaxdistill.flow.students import sample
from jaxdistill.io import artifact, pictures
from jaxdistill.io.files import dump, write_files
from jaxdistill.io.writers import Progress
from jaxdistill.nn.judge import Judge
from jaxdistill.parallel import processes

_SHOWN = 20  # examples of each row in the picture


class Generator(NamedTuple):
    """A row of the table.

    Attributes:
        sample: `(noise, label) -> examples`, compiled.
        calls: Network calls for an example.
    """

    sample: Callable[[Any, Any], Any]
    calls: int


def evaluate(setup: Any, frozen: PyTree, students: Mapping[str, PyTree]) -> list[dict]:
    """Measures every row that is not measured yet, draws the pictures and prints the table.

    Args:
        setup: Of `flow_train`.
        frozen: What the students' methods were given.
        students: Name -> what it has learned.

    Returns:
        A record for each row.

    Raises:
        Interrupted: If it is stopped; what is measured by then is kept.
    """
    config, problem = setup.config, setup.problem
    generators = _generators(setup, frozen, students)
    protocol = _protocol(config)
    path = setup.workdir / "results.json"
    measured = _read(path, protocol)
    if processes.is_first():
        missing = [name for name in generators if name not in measured]
        if missing:
            measure = (_Points if problem.target is not None else _Images)(setup, frozen)
            bar = Progress(len(missing), 0, "evaluating")
            for done, name in enumerate(missing):
                if setup.should_stop():
                    raise Interrupted(
                        f"stopped while evaluating; {done} of {len(missing)} rows are measured"
                    )
                measured[name] = measure.row(generators[name])
                write_files({path: functools.partial(dump, _record(protocol, measured))})
                bar.update(done + 1, {k: v for k, v in measured[name].items() if k != "calls"})
            bar.close()
        if missing or not (setup.workdir / "artifacts" / "samples.png").is_file():
            _draw(setup, frozen, students, generators)
        rows = {name: measured[name] for name in generators}
        print(f"{problem.name}: {config.eval.examples} examples a row, one seed")
        print(table(rows))
    processes.wait("results are written")
    rows = _read(path, protocol)
    return [{"row": name} | rows[name] for name in generators]


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of the rows, with the columns of the first."""
    columns = list(next(iter(rows.values())))
    lines = [f"| row | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, values in rows.items():
        cells = ["–" if values.get(c) is None else f"{values[c]:.4g}" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _protocol(config) -> str:
    """Identifies what decides a row beside its generator."""
    names = ("examples", "paired", "reference_steps", "judge_epochs")
    same = {name: config.eval[name] for name in names}
    return build.digest([same, max(config.eval.teacher_calls), config.data.holdout_per_class])


def _read(path: Path, protocol: str) -> dict[str, dict]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text("utf-8"))
        return dict(record["rows"]) if record["protocol"] == protocol else {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path} is not a table of results ({error}); delete it") from error


def _record(protocol: str, rows: dict) -> dict:
    return {"protocol": protocol, "rows": rows}


# ---------------------------------------------------------------------------- rows


def _generators(setup: Any, frozen: PyTree, students: Mapping[str, PyTree]) -> dict[str, Generator]:
    config, problem = setup.config, setup.problem
    rows = {}
    for calls in config.eval.teacher_calls:
        rows[f"teacher, Euler, {calls}"] = teacher_sampler(setup, frozen, "euler", calls)
    for calls in config.eval.calls:
        if calls % 2 == 0:
            rows[f"teacher, midpoint, {calls}"] = teacher_sampler(
                setup, frozen, "midpoint", calls // 2
            )
    for name, trained in students.items():
        _, student = flow_build.build_method(config, problem, name)
        for calls in config.eval.calls:
            run = functools.partial(
                sample, student, calls=calls, shift=config.shift, last=config.method.last
            )
            compiled = jax.jit(lambda t, f, x, y, run=run: run(t, f, x, y))
            rows[f"{name}, {calls}"] = Generator(
                functools.partial(compiled, trained, frozen), calls
            )
    return rows


def teacher_sampler(setup: Any, frozen: PyTree, name: str, steps: int) -> Generator:
    """The teacher under a sampler with some steps, even in raw time."""
    velocity, calls = flow_build.teacher_velocity(setup.config, setup.problem)
    sampler, per_step = samplers.SAMPLERS[name]
    times = shifted(boundaries(steps), setup.config.shift)

    @jax.jit
    def run(frozen, x, label):
        return sampler(lambda x, t: velocity(frozen, x, t, label), x, times)

    return Generator(functools.partial(run, frozen), steps * per_step * calls)


def _noise(setup: Any, number: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise and labels that every row starts from, the classes one after another."""
    key = jax.random.fold_in(jax.random.key(0), stream)
    noise = jax.random.normal(key, (number, *setup.problem.shape))
    return np.asarray(noise), np.arange(number, dtype=np.int32) % max(setup.problem.num_classes, 1)


def generate(setup: Any, generator: Generator, number: int, stream: int) -> np.ndarray:
    """Examples of a row, in batches of one shape, so that each row is compiled once."""
    noise, label = _noise(setup, number, stream)
    size, parts = setup.config.eval.batch, []
    for first in range(0, number, size):
        if setup.should_stop():
            raise Interrupted("stopped while evaluating; rows already measured are kept")
        index = np.arange(first, first + size) % number
        parts.append(np.asarray(generator.sample(jnp.asarray(noise[index]), label[index])))
    return np.concatenate(parts)[:number]


def _timed(setup: Any, generator: Generator, number: int, stream: int) -> tuple[np.ndarray, dict]:
    generate(setup, generator, 1, stream)  # compiles
    began = time.perf_counter(), time.process_time()
    made = generate(setup, generator, number, stream)
    return made, {
        "wall s": round(time.perf_counter() - began[0], 2),
        "CPU s": round(time.process_time() - began[1], 2),
    }


_MAIN, _OTHER, _PAIRED = 1, 2, 3  # streams of noise


class _Points:
    """Points in the plane: against the ends of the teacher's exact paths, and the law itself."""

    def __init__(self, setup: Any, frozen: PyTree):
        config = setup.config
        self.setup = setup
        reference = teacher_sampler(setup, frozen, "rk4", config.eval.reference_steps)
        self.ends = generate(setup, reference, config.eval.examples, _MAIN).reshape(-1, 2)
        keys = jax.random.split(jax.random.key(1), config.eval.examples)
        self.data = np.asarray(jax.jit(jax.vmap(setup.problem.target.sample))(keys)).reshape(-1, 2)

    def row(self, generator: Generator) -> dict:
        made, cost = _timed(self.setup, generator, self.setup.config.eval.examples, _MAIN)
        made = made.reshape(-1, 2)
        error = np.linalg.norm(made - self.ends, axis=1)
        sliced = functools.partial(generative.sliced_wasserstein, key=jax.random.key(2))
        return {
            "calls": generator.calls,
            "endpoint RMSE": float(np.sqrt(np.square(error).mean())),
            "median": float(np.median(error)),
            "p90": float(np.quantile(error, 0.9)),
            "sliced W2 to data": sliced(made, self.data),
            "to exact ends": sliced(made, self.ends),
            **cost,
        }


class _Images:
    """Images: by features of a classifier trained on the real ones."""

    def __init__(self, setup: Any, frozen: PyTree):
        config, data = setup.config, setup.problem.dataset
        self.setup, self.data = setup, data
        self.prepare = normalizer(data.mean, data.std)
        module = Judge(data.num_classes)
        blank = jnp.zeros((1, *data.image_shape))
        network = train_on.Network(
            lambda key: module.init(key, blank)["params"],
            lambda params, x: module.apply({"params": params}, x),
        )
        protocol = train_on.Protocol(
            config.eval.judge_epochs, 128, 0.05, strategy="none", decay_at=(0.6,)
        )
        many = pool.load_or_train(
            Path(config.eval.judge_dir) if config.eval.judge_dir else setup.workdir / "judge",
            1,
            network,
            data,
            prepare=self.prepare,
            protocol=protocol,
            chunk=128,
            identity=build.digest([*protocol, data.fingerprint()]),
            should_stop=setup.should_stop,
        )
        params = jax.tree.map(lambda x: x[0], many["trained"])

        @jax.jit
        def judge(params, images):
            features = module.apply({"params": params}, self.prepare(images), method="features")
            return features, module.apply({"params": params}, features, method="classify")

        self.judge = functools.partial(judge, params)
        self.real, _ = self.judged(data.test.images[: config.eval.examples])
        self.real_labels = data.test.labels[: config.eval.examples]
        self.real_moments = generative.moments(self.real)
        self.real_diversity = generative.diversity(self.real, self.real_labels)
        self.train = self.judged(data.train.images[: config.eval.examples])
        calls = max(config.eval.teacher_calls)
        teacher = teacher_sampler(setup, frozen, "euler", calls)
        other = generate(setup, teacher, config.eval.examples, _OTHER)
        self.teacher_moments = generative.moments(self.judged(pixels(other))[0])
        reference = teacher_sampler(setup, frozen, "heun", config.eval.reference_steps)
        self.ends = generate(setup, reference, config.eval.paired, _PAIRED)

    def judged(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features and logits."""
        size = 500
        parts = []
        for first in range(0, len(images), size):
            index = np.arange(first, first + size) % len(images)
            parts.append(jax.device_get(self.judge(images[index])))
        return tuple(np.concatenate(x)[: len(images)] for x in zip(*parts, strict=True))

    def row(self, generator: Generator) -> dict:
        config = self.setup.config.eval
        made, cost = _timed(self.setup, generator, config.examples, _MAIN)
        features, logits = self.judged(pixels(made))
        labels = _noise(self.setup, config.examples, _MAIN)[1]
        moments = generative.moments(features)
        some = min(config.examples, 5000)
        support = generative.precision_recall(self.real[:some], features[:some])
        paired = generate(self.setup, generator, config.paired, _PAIRED)
        return {
            "calls": generator.calls,
            "FD to data": generative.frechet(moments, self.real_moments),
            "FD to teacher": generative.frechet(moments, self.teacher_moments),
            "precision": support.precision,
            "recall": support.recall,
            "class accuracy": generative.class_accuracy(logits, labels),
            "diversity": generative.diversity(features, labels) / self.real_diversity,
            "endpoint RMSE": generative.endpoint_rmse(paired, self.ends),
            **cost,
        }


def pixels(examples: np.ndarray) -> np.ndarray:
    """Examples in [-1, 1] as images in [0, 1], rounded to the 256 levels that real ones have."""
    return np.rint(np.clip(examples + 1.0, 0.0, 2.0) * 127.5).astype(np.float32) / 255.0


# ---------------------------------------------------------------------------- pictures


def _draw(setup: Any, frozen: PyTree, students: Mapping[str, PyTree], generators: dict) -> None:
    """Samples of all rows from the same noise, and for points the ways there."""
    folder = setup.workdir / "artifacts"
    few = {name: g for name, g in generators.items() if "midpoint" not in name}
    if setup.problem.target is None:
        made = [generate(setup, g, _SHOWN, _MAIN) for g in few.values()]
        labels = np.repeat(np.arange(len(few), dtype=np.int32), _SHOWN)
        images = pixels(np.concatenate(made))
        picture = artifact.grid(images, labels, list(few))
    else:
        made = {n: generate(setup, g, 2000, _MAIN).reshape(-1, 2) for n, g in few.items()}
        picture = pictures.scatter(made)
        name = setup.config.method.name
        _, student = flow_build.build_method(setup.config, setup.problem, name)
        ways = trajectories(setup, frozen, students[name], student)
        _write(folder / "trajectories.png", pictures.curves(ways))
    _write(folder / "samples.png", picture)


def trajectories(setup: Any, frozen: PyTree, trained: PyTree, student: Any) -> dict:
    """The ways of some points under the teacher and under a student, (times, points, 2)."""
    noise, label = (jnp.asarray(x) for x in _noise(setup, 40, _MAIN))
    config, parts = setup.config, 16
    velocity, _ = flow_build.teacher_velocity(config, setup.problem)
    raw = np.asarray(boundaries(config.method.calls, config.method.last))
    teacher, own, x, y = [noise], [noise], noise, noise
    for start, end in itertools.pairwise(raw):
        fine = shifted(jnp.linspace(start, end, parts + 1), config.shift)
        at = lambda t: jnp.full(len(noise), t)  # noqa: E731
        outputs = student.apply(trained, frozen, y, at(fine[0]), label)
        field = student.policy.begin(outputs, y, at(fine[0]), at(fine[-1]))
        own += [student.policy.transition(field, y, at(fine[0]), at(t)) for t in fine[1:]]
        y = own[-1]
        for pair in itertools.pairwise(fine):
            u = lambda x, t: velocity(frozen, x, t, label)  # noqa: E731
            x = samplers.rk4(u, x, jnp.stack(pair))
            teacher.append(x)
    both = {"teacher": teacher, f"student, {config.method.calls} calls": own}
    return {name: np.stack(way).reshape(len(way), -1, 2) for name, way in both.items()}


def _write(path: Path, picture: np.ndarray) -> None:
    write_files({path: lambda file: Image.fromarray(picture).save(file, "PNG")})
