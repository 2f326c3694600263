"""How good few-step students are: samples of every row, measures, pictures, a table.

All rows start from the same noise and labels. A teacher's row counts the calls of its network,
guidance included; a student's is what its sampler calls.
"""

import functools
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from PIL import Image

from jaxdistill import flow_build, pool, settings
from jaxdistill.data.augment import normalizer
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval import generative, train_on
from jaxdistill.flow import samplers
from jaxdistill.flow.paths import boundaries, shifted
from jaxdistill.flow.students import sample
from jaxdistill.flow_build import Setup
from jaxdistill.io import pictures
from jaxdistill.io.files import dump, write_files
from jaxdistill.io.reading import read_json, read_npz
from jaxdistill.io.writers import Progress
from jaxdistill.nn.judge import Judge
from jaxdistill.parallel import processes

_SHOWN = 20  # examples of each row in the picture
_REAL = "real, training images"
# What integrates the teacher's paths. Of images not Heun's method: its last step asks for the
# velocity at t = 0, where a teacher is hardly trained.
_REFERENCES = {"points": "rk4", "images": "midpoint"}


class Generator(NamedTuple):
    """A row of the table.

    Attributes:
        sample: `(noise, label) -> examples`, compiled.
        calls: Network calls for an example.
    """

    sample: Callable[[Any, Any], Any]
    calls: int


def evaluate(
    setup: Setup, frozen: PyTree, students: Mapping[str, PyTree], teacher_hash: str
) -> list[dict]:
    """Measures every row that is not measured yet, draws the pictures and prints the table.

    Of several processes the first does it.

    Args:
        setup: What the stages share.
        frozen: What the students' methods were given.
        students: Name -> what it has learned.
        teacher_hash: Of the teacher that they follow.

    Returns:
        A record for each row.

    Raises:
        Interrupted: If it is stopped; what is measured by then is kept.
    """
    config, problem = setup.config, setup.problem
    frozen, students = jax.device_put((frozen, students))
    generators = _generators(setup, frozen, students)
    path, protocol = setup.workdir / "results.json", _protocol(config, teacher_hash)
    measured = _read(path, protocol)
    names = list(generators) if problem.target is not None else [_REAL, *generators]
    missing = [name for name in names if name not in measured]
    # In all processes, each of which waits for the others in it.
    judge = _judge(setup) if missing and problem.target is None else None
    failure = None
    try:
        if processes.is_first():
            if missing:
                measure = (
                    _Points(setup, frozen)
                    if judge is None
                    else _Images(setup, judge, *_teachers_images(setup, frozen, teacher_hash))
                )
                _measure(setup, measure, generators, missing, measured, path, protocol)
            if missing or not (setup.workdir / "artifacts" / "samples.png").is_file():
                _draw(setup, frozen, students, generators)
            print(f"{problem.name}: {config.eval.examples} examples a row, one seed")
            print(table({name: measured[name] for name in names}))
    except (InputError, Interrupted, OSError) as error:
        failure = error
    # The others wait here, and must not for ever.
    if processes.any_says(failure is not None):
        raise failure or Interrupted("the evaluation in the first process ended")
    measured = _read(path, protocol)
    return [{"row": name} | measured[name] for name in names]


def _measure(setup, measure, generators, missing, measured, path, protocol) -> None:
    bar = Progress(len(missing), 0, "evaluating")
    for done, name in enumerate(missing):
        if setup.should_stop():
            raise Interrupted(
                f"stopped while evaluating; {done} of {len(missing)} rows are measured"
            )
        measured[name] = measure.real() if name == _REAL else measure.row(generators[name])
        write_files({path: functools.partial(dump, {"protocol": protocol, "rows": measured})})
        bar.update(done + 1, {k: v for k, v in measured[name].items() if k != "calls" and v})
    bar.close()


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of the rows, with the columns of all."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| row | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, values in rows.items():
        cells = ["–" if values.get(c) is None else f"{values[c]:.4g}" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _protocol(config, teacher_hash: str) -> str:
    """Identifies what decides a row beside its generator."""
    names = ("examples", "paired", "reference_steps", "judge_epochs")
    same = {name: config.eval[name] for name in names}
    return settings.digest([same, _REFERENCES, teacher_hash, config.data.holdout_per_class])


def _read(path: Path, protocol: str) -> dict[str, dict]:
    if not path.is_file():
        return {}
    try:
        record = read_json(path)
        return dict(record["rows"]) if record["protocol"] == protocol else {}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not a table of results ({error}); delete it") from error


# ---------------------------------------------------------------------------- rows


def _generators(
    setup: Setup, frozen: PyTree, students: Mapping[str, PyTree]
) -> dict[str, Generator]:
    config, problem = setup.config, setup.problem
    rows = {}
    for row in config.eval.teacher_rows:
        name = f"teacher, {row.replace(':', ', ')}"
        rows[name] = teacher_sampler(setup, frozen, *flow_build.teacher_row(row))
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


def teacher_sampler(setup: Setup, frozen: PyTree, name: str, steps: int) -> Generator:
    """The teacher under a sampler with some steps, even in raw time."""
    velocity, calls = flow_build.teacher_velocity(setup.config, setup.problem)
    sampler, per_step = samplers.SAMPLERS[name]
    times = shifted(boundaries(steps), setup.config.shift)

    @jax.jit
    def run(frozen, x, label):
        return sampler(lambda x, t: velocity(frozen, x, t, label), x, times)

    return Generator(functools.partial(run, frozen), steps * per_step * calls)


def _noise(setup: Setup, number: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise and labels that every row starts from, the classes one after another."""
    key = jax.random.fold_in(jax.random.key(0), stream)
    noise = jax.random.normal(key, (number, *setup.problem.shape))
    return np.asarray(noise), np.arange(number, dtype=np.int32) % max(setup.problem.num_classes, 1)


def _batches(number: int, size: int) -> list[np.ndarray]:
    """Indices in batches of one size; the last starts over where there are no more."""
    return [np.arange(first, first + size) % number for first in range(0, number, size)]


def generate(
    setup: Setup, generator: Generator, number: int, stream: int, shown: str = ""
) -> np.ndarray:
    """Examples of a row, in batches of one shape, so that each row is compiled once.

    Under a name to show, with a progress bar.
    """
    noise, label = _noise(setup, number, stream)
    batches, parts = _batches(number, setup.config.eval.batch), []
    bar = Progress(len(batches), 0, shown) if shown else None
    for index in batches:
        if setup.should_stop():
            raise Interrupted("stopped while evaluating; rows already measured are kept")
        parts.append(np.asarray(generator.sample(jnp.asarray(noise[index]), label[index])))
        if bar:
            bar.update(len(parts), {})
    if bar:
        bar.close()
    return np.concatenate(parts)[:number]


def _timed(setup: Setup, generator: Generator, number: int, stream: int) -> tuple[np.ndarray, dict]:
    generate(setup, generator, 1, stream)  # compiles
    began = time.perf_counter(), time.process_time()
    made = generate(setup, generator, number, stream)
    return made, {
        "wall s": round(time.perf_counter() - began[0], 2),
        "CPU s": round(time.process_time() - began[1], 2),
    }


# Streams of noise, far from the numbers that splitting a key folds into it.
_MAIN, _OTHER, _PAIRED = 0x6D61696E, 0x6F746865, 0x70616972


class _Points:
    """Points in the plane: against the ends of the teacher's exact paths, and the law itself."""

    def __init__(self, setup: Setup, frozen: PyTree):
        config = setup.config
        self.setup = setup
        reference = teacher_sampler(
            setup, frozen, _REFERENCES["points"], config.eval.reference_steps
        )
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


def _judge(setup: Setup) -> Callable[[Any], tuple[Any, Any]]:
    """Images in [0, 1] to features and logits, by a classifier trained on the real ones."""
    config, data = setup.config, setup.problem.dataset
    module, prepare = Judge(data.num_classes), normalizer(data.mean, data.std)
    blank = jnp.zeros((1, *data.image_shape))
    network = train_on.Network(
        lambda key: module.init(key, blank)["params"],
        lambda params, x: module.apply({"params": params}, x),
    )
    protocol = train_on.Protocol(
        config.eval.judge_epochs, 128, 0.05, strategy="none", decay_at=(0.6,)
    )
    many = pool.load_or_train(
        _judge_folder(setup),
        1,
        network,
        data,
        prepare=prepare,
        protocol=protocol,
        chunk=128,
        identity=settings.digest([*protocol, data.fingerprint()]),
        should_stop=setup.should_stop,
    )

    @jax.jit
    def judge(params, images):
        features = module.apply({"params": params}, prepare(images), method="features")
        return features, module.apply({"params": params}, features, method="classify")

    return functools.partial(judge, jax.tree.map(lambda x: x[0], many["trained"]))


def _judge_folder(setup: Setup) -> Path:
    folder = setup.config.eval.judge_dir
    return Path(folder) if folder else setup.workdir / "judge"


def _teachers_images(
    setup: Setup, frozen: PyTree, teacher_hash: str
) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's own images, and where its paths from the noise of the pairs end.

    They take longer than all students' together, so they are kept beside the judge.

    Returns:
        uint8 (examples, h, w, c), and float32 (paired, h, w, c) in [-1, 1].
    """
    config, sampler = setup.config, _REFERENCES["images"]
    number, paired, steps = (
        config.eval[name] for name in ("examples", "paired", "reference_steps")
    )
    asked = [teacher_hash, config.teacher.guidance, config.shift, sampler, number, paired, steps]
    path = _judge_folder(setup) / f"teacher-{settings.digest(asked)}.npz"
    if not path.is_file():
        reference = teacher_sampler(setup, frozen, sampler, steps)
        made = {
            "images": generate(setup, reference, number, _OTHER, "the teacher's images"),
            "ends": generate(setup, reference, paired, _PAIRED, "ends of its paths"),
        }
        made["images"] = np.rint(255 * pixels(made["images"])).astype(np.uint8)
        write_files({path: lambda file: np.savez(file, **made)})

    def check(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        wanted = {"images": (np.uint8, number), "ends": (np.float32, paired)}[name]
        if (dtype, *shape) != (*wanted, *setup.problem.shape):
            raise InputError(f"{name} is {dtype} of shape {shape}")

    try:
        read = read_npz(path, ["images", "ends"], check=check)
    except InputError as error:
        raise InputError(f"{path} are not this teacher's images ({error}); delete it") from error
    return read["images"], read["ends"]


class _Images:
    """Images: by the features of a judge."""

    def __init__(self, setup: Setup, judge: Callable, teachers: np.ndarray, ends: np.ndarray):
        config, data = setup.config.eval, setup.problem.dataset
        self.setup, self.judge = setup, judge
        # Test images may lie class by class, and only some are used.
        order = np.random.default_rng(0).permutation(len(data.test.labels))[: config.examples]
        self.labels = data.test.labels[order]
        self.features, _ = self.judged(data.test.images[order])
        self.moments = generative.moments(self.features)
        self.diversity = generative.diversity(self.features, self.labels)
        # The training images as the nearest ones are looked for among, and a part as a row.
        mixed = np.random.default_rng(1).permutation(len(data.train.labels))
        self.train = data.train.images[mixed], data.train.labels[mixed]
        few = data.test.images[order[: config.paired]]
        self.test_distances = self._nearest(few / np.float32(255))
        self.teacher_moments = generative.moments(self.judged(teachers / np.float32(255))[0])
        self.ends = ends
        self.ends_features, _ = self.judged(pixels(ends))

    def _nearest(self, images: np.ndarray) -> np.ndarray:
        return generative.nearest(images, self.train[0] / np.float32(255))

    def judged(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features and logits."""
        parts = [jax.device_get(self.judge(images[i])) for i in _batches(len(images), 500)]
        return tuple(np.concatenate(x)[: len(images)] for x in zip(*parts, strict=True))

    def real(self) -> dict:
        """Training images in the place of generated ones: what no generator can beat by much."""
        number = self.setup.config.eval.examples
        images, labels = (x[:number] for x in self.train)
        return {"calls": 0} | self._against(images, labels)

    def row(self, generator: Generator) -> dict:
        config = self.setup.config.eval
        made, cost = _timed(self.setup, generator, config.examples, _MAIN)
        labels = _noise(self.setup, config.examples, _MAIN)[1]
        paired = generate(self.setup, generator, config.paired, _PAIRED)
        distances = self._nearest(pixels(made[: config.paired]))
        return {
            "calls": generator.calls,
            **self._against(pixels(made), labels),
            "endpoint RMSE": generative.endpoint_rmse(paired, self.ends),
            "endpoint cosine": generative.endpoint_cosine(
                self.judged(pixels(paired))[0], self.ends_features
            ),
            "copies": generative.leakage(distances, self.test_distances).copies,
            **cost,
        }

    def _against(self, images: np.ndarray, labels: np.ndarray) -> dict:
        features, logits = self.judged(images)
        moments = generative.moments(features)
        some = min(len(features), len(self.features), 5000)
        support = generative.precision_recall(self.features[:some], features[:some])
        block = min(1000, some // 10)
        kernel = generative.kid(
            self.features, features, jax.random.key(3), blocks=10, block_size=block
        )
        return {
            "FD to data": generative.frechet(moments, self.moments),
            "FD to teacher": generative.frechet(moments, self.teacher_moments),
            "KID to data": kernel.mean,
            "precision": support.precision,
            "recall": support.recall,
            "class accuracy": generative.class_accuracy(logits, labels),
            "least class accuracy": min(
                generative.class_accuracy(logits[labels == c], labels[labels == c])
                for c in np.unique(labels)
            ),
            "diversity": generative.diversity(features, labels) / self.diversity,
        }


def pixels(examples: np.ndarray) -> np.ndarray:
    """Examples in [-1, 1] as images in [0, 1], rounded to the 256 levels that real ones have."""
    return np.rint(np.clip(examples + 1.0, 0.0, 2.0) * 127.5).astype(np.float32) / 255.0


# ---------------------------------------------------------------------------- pictures


def _draw(setup: Setup, frozen: PyTree, students: Mapping[str, PyTree], generators: dict) -> None:
    """Samples of all rows from the same noise, and for points the ways there."""
    folder = setup.workdir / "artifacts"
    few = {n: g for n, g in generators.items() if not n.startswith("teacher") or "euler" in n}
    if not any(n.startswith("teacher") for n in few):
        few = {"teacher, euler, 16": teacher_sampler(setup, frozen, "euler", 16)} | few
    if setup.problem.target is None:
        made = [generate(setup, g, _SHOWN, _MAIN) for g in few.values()]
        labels = np.repeat(np.arange(len(few), dtype=np.int32), _SHOWN)
        images = pixels(np.concatenate(made))
        picture = pictures.grid(images, labels, list(few))
    else:
        number = min(2000, setup.config.eval.examples)
        made = {n: generate(setup, g, number, _MAIN).reshape(-1, 2) for n, g in few.items()}
        picture = pictures.scatter(made)
        name = setup.config.method.name
        _, student = flow_build.build_method(setup.config, setup.problem, name)
        ways = trajectories(setup, frozen, students[name], student)
        _write(folder / "trajectories.png", pictures.curves(ways))
    _write(folder / "samples.png", picture)


def trajectories(setup: Setup, frozen: PyTree, trained: PyTree, student: Any) -> dict:
    """The ways of some points under the teacher and under a student, (times, points, 2)."""
    noise, label = (jnp.asarray(x) for x in _noise(setup, 40, _MAIN))
    config, parts = setup.config, 16
    velocity, _ = flow_build.teacher_velocity(config, setup.problem)
    raw = np.asarray(boundaries(config.method.calls, config.method.last))
    teacher, own, x, y = [noise], [noise], noise, noise
    at = functools.partial(jnp.full, len(noise))
    for start, end in itertools.pairwise(raw):
        fine = shifted(jnp.linspace(start, end, parts + 1), config.shift)
        outputs = student.apply(trained, frozen, y, at(fine[0]), label)
        field = student.policy.begin(outputs, y, at(fine[0]), at(fine[-1]))
        own += [student.policy.transition(field, y, at(fine[0]), at(t)) for t in fine[1:]]
        y = own[-1]
        for pair in itertools.pairwise(fine):
            x = samplers.rk4(lambda x, t: velocity(frozen, x, t, label), x, jnp.stack(pair))
            teacher.append(x)
    both = {"teacher": teacher, f"student, {config.method.calls} calls": own}
    return {name: np.stack(way).reshape(len(way), -1, 2) for name, way in both.items()}


def _write(path: Path, picture: np.ndarray) -> None:
    write_files({path: lambda file: Image.fromarray(picture).save(file, "PNG")})
