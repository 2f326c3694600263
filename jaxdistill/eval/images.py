"""Students of flows on images, by the features of networks that are trained on the real ones.

One tells classes, and one how images were turned: two networks of other aims that no student was
trained by. Where they rank students differently, it is the judge that is measured.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import pool
from jaxdistill.data.augment import normalizer
from jaxdistill.data.dataset import Dataset
from jaxdistill.errors import InputError
from jaxdistill.eval import generative, sampling, train_on
from jaxdistill.eval.bench import Bench
from jaxdistill.eval.sampling import MAIN, OTHER, PAIRED, Generator, Rows
from jaxdistill.io import pictures
from jaxdistill.io.files import expanded, write_files
from jaxdistill.io.reading import read_npz
from jaxdistill.keywords import Between, Count, Folder
from jaxdistill.nn.judge import Judge
from jaxdistill.parallel import processes
from jaxdistill.settings import digest
from jaxdistill.task import FlowTask

FAMILY = "flow"

_BLOCKS = 10  # of the kernel distance
_SHOWN = 20  # examples of each row in the picture
_REAL = "real, training images"
# What no measure may take for good: the mean of each class, and a tenth of the images repeated.
_MEANS = "means of the classes"
_REPEATED = "training images, each ten times"
_SANITY = (_REAL, _MEANS, _REPEATED)
# What integrates the teacher's paths. Not Heun's method: its last step asks for the velocity at
# t = 0, where a teacher is hardly trained.
_REFERENCE = "midpoint"


def check(task: FlowTask, data: Dataset, *, examples: int, **others: Any) -> None:
    """Refuses rows that are none, and data too few to be compared with.

    Raises:
        InputError: In these cases.
    """
    sampling.check(task, data, examples=examples, **others)
    least = max(_BLOCKS * 2, Judge.num_features + 1)
    compared = data.test.labels[_compared(len(data.test.labels), examples)]
    if len(compared) < least:
        raise InputError(
            f"evals.*: {len(compared)} test images are compared with, at least {least} are needed "
            "for their moments; take another evaluation, or data with more test images"
        )
    drawn = np.arange(examples) % data.num_classes
    for what, labels in (("test images compared with", compared), ("examples of a row", drawn)):
        counts = np.bincount(labels, minlength=data.num_classes)
        if counts.min() < 2:
            raise InputError(
                f"class '{data.class_names[counts.argmin()]}' has {counts.min()} of the {what}, "
                "and its diversity takes 2; raise evals.*.examples, or take other data"
            )


def _compared(number: int, examples: int) -> np.ndarray:
    """Which test images are compared with: they may lie class by class, and only some are used."""
    return np.random.default_rng(0).permutation(number)[:examples]


def evaluate(
    bench: Bench,
    *,
    nfe: tuple[Annotated[int, Between(1, 10**6)], ...] = (2,),
    teacher_rows: tuple[str, ...] = ("euler:2", "euler:4", "euler:8", "euler:16", "euler:100"),
    examples: Annotated[int, Between(100, 10**7)] = 10_000,
    paired: Count = 1000,
    reference_steps: Annotated[int, Between(2, 10**6)] = 64,
    batch_size: Count = 250,
    judge_epochs: Count = 5,
    judge_dir: Folder = None,
) -> list[dict]:
    """Measures every row that is not measured yet, draws the pictures and prints the table.

    Of several processes the first does it.

    Args:
        bench: What is measured.
        nfe: Network calls of the students; others than they were trained for show how elastic they
            are.
        teacher_rows: Samplers of the teacher, and their network calls, guidance left out.
        examples: Images of a row.
        paired: Images that are compared with what the teacher makes of the same noise.
        reference_steps: The steps of the midpoint method that makes the teacher's images.
        batch_size: Images made at a time.
        judge_epochs: How long the classifier is trained.
        judge_dir: Where the classifier and the teacher's images are kept; by default `judge` in the
            workdir.

    Returns:
        A record for each row and measure.

    Raises:
        Interrupted: If it is stopped; what is measured by then is kept.
    """
    rows = sampling.rows(bench, nfe, teacher_rows, batch_size)
    folder = expanded(judge_dir) if judge_dir else bench.workdir / "judge"
    protocol = digest(
        [examples, paired, reference_steps, judge_epochs, _REFERENCE, _SANITY, bench.identity]
    )
    names = [*_SANITY, *rows.generators]
    missing = sampling.is_missing(bench, names, protocol)
    # In all processes, each of which waits for the others in it.
    judges = None
    if missing:
        judge, turns = classifier(bench, folder, judge_epochs), _turned(bench.data)
        judges = judge, classifier(bench._replace(data=turns), folder, judge_epochs)

    def work():
        if missing:
            made = _teachers_images(rows, folder, examples, paired, reference_steps)
            measures = _Measures(rows, judges, *made)
            sampling.measure(bench, names, protocol, measures.row)
        if missing or not (bench.workdir / "artifacts" / "samples.png").is_file():
            _draw(rows)
        sampling.show(bench, names, protocol, examples)

    processes.in_the_first(work)
    bench.results.gather()
    return sampling.records(bench, names, protocol)


def classifier(bench: Bench, folder: Path, epochs: int) -> Callable[[Any], tuple[Any, Any]]:
    """Images in [0, 1] to features and logits, by a network trained on the real ones.

    Args:
        bench: What it is for. Of several processes all must call this.
        folder: Where the network is kept.
        epochs: How long it is trained.
    """
    data = bench.data
    module, normalize = Judge(data.num_classes), normalizer(data.mean, data.std)
    blank = jnp.zeros((1, *data.image_shape))
    network = train_on.Network(
        lambda key: module.init(key, blank)["params"],
        lambda params, x: module.apply({"params": params}, x),
    )
    protocol = train_on.Protocol(epochs, 128, 0.05, strategy="none", decay_at=(0.6,))
    many = pool.load_or_train(
        folder,
        1,
        network,
        data,
        normalize=normalize,
        protocol=protocol,
        microbatch=128,
        identity=digest([*protocol, data.fingerprint()]),
        should_stop=bench.should_stop,
    )

    @jax.jit
    def judge(params, images):
        features = module.apply({"params": params}, normalize(images), method="features")
        return features, module.apply({"params": params}, features, method="classify")

    return functools.partial(judge, jax.tree.map(lambda x: x[0], many["trained"]))


def _turned(data: Dataset) -> Dataset:
    """Training images turned by a drawn quarter, or mirrored if they are not square; that is asked.

    Labels are not needed for it, and what it teaches is another thing than classes.
    """
    rng = np.random.default_rng(2)
    ways = rng.integers(0, 4, len(data.train.labels)).astype(np.int32)
    square = data.image_shape[0] == data.image_shape[1]
    images = data.train.images.copy()
    for way in range(1, 4):
        own = images[ways == way]
        if square:
            own = np.rot90(own, way, (1, 2))
        else:
            own = own[:, :: -1 if way % 2 else 1, :: -1 if way > 1 else 1]
        images[ways == way] = own
    train = data.train._replace(images=images, labels=ways)
    return dataclasses.replace(data, train=train, class_names=("0", "1", "2", "3"))


def _teachers_images(
    rows: Rows, folder: Path, number: int, paired: int, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's own images, and where its paths from the noise of the pairs end.

    They take longer than all students' together, so they are kept beside the judge.

    Returns:
        uint8 (examples, h, w, c), and float32 (paired, h, w, c) in [-1, 1].
    """
    bench = rows.bench
    asked = [bench.identity, bench.task.nfe, bench.task.shift, _REFERENCE, number, paired, steps]
    path = folder / f"teacher-{digest(asked)}.npz"
    if not path.is_file():
        reference = sampling.teacher_sampler(bench.task, rows.frozen, _REFERENCE, steps)
        images = sampling.generate(rows, reference, number, OTHER, "the teacher's images")
        made = {
            "images": np.rint(255 * pixels(images)).astype(np.uint8),
            "ends": sampling.generate(rows, reference, paired, PAIRED, "ends of its paths"),
        }
        write_files({path: lambda file: np.savez(file, **made)})

    def check(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        wanted = {"images": (np.uint8, number), "ends": (np.float32, paired)}[name]
        if (dtype, *shape) != (*wanted, *bench.task.shape):
            raise InputError(f"{name} is {dtype} of shape {shape}")

    try:
        read = read_npz(path, ["images", "ends"], check=check)
    except InputError as error:
        raise InputError(f"{path} are not this teacher's images ({error}); delete it") from error
    return read["images"], read["ends"]


class _Measures:
    """What images are compared with, and the comparison."""

    def __init__(
        self, rows: Rows, judges: tuple[Callable, Callable], teachers: np.ndarray, ends: np.ndarray
    ):
        data = rows.bench.data
        self.rows, (self.judge, self.turns), self.ends = rows, judges, ends
        self.examples, self.paired = len(teachers), len(ends)
        order = _compared(len(data.test.labels), self.examples)
        self.labels = data.test.labels[order]
        self.features, _ = self._judged(data.test.images[order])
        self.moments = generative.moments(self.features)
        self.diversity = generative.diversity(self.features, self.labels)
        # The training images as the nearest ones are looked for among, and a part as a row.
        mixed = np.random.default_rng(1).permutation(len(data.train.labels))
        self.train = data.train.images[mixed], data.train.labels[mixed]
        few = data.test.images[order[: self.paired]]
        self.test_distances = self._nearest(few / np.float32(255))
        self.teacher_moments = generative.moments(self._judged(teachers / np.float32(255))[0])
        real = data.test.images[order], teachers / np.float32(255)
        self.turns_moments = [self._turned(images) for images in real]
        self.ends_features, _ = self._judged(pixels(ends))

    def _nearest(self, images: np.ndarray) -> np.ndarray:
        return generative.nearest(images, self.train[0] / np.float32(255))

    def _judged(
        self, images: np.ndarray, judge: Callable | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features and logits, by the network that tells classes if no other is given."""
        judge = self.judge if judge is None else judge
        parts = [jax.device_get(judge(images[i])) for i in sampling.batches(len(images), 500)]
        return tuple(np.concatenate(x)[: len(images)] for x in zip(*parts, strict=True))

    def _turned(self, images: np.ndarray) -> generative.Moments:
        """Moments by the network that was asked how images are turned."""
        return generative.moments(self._judged(images, self.turns)[0])

    def row(self, name: str) -> dict[str, Any]:
        """The measures of a row."""
        if name in _SANITY:
            return {"nfe": 0} | self._against(*self._known(name))
        return self._generated(self.rows.generators[name])

    def _known(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Images that nobody generated, and their labels."""
        images, labels = self.train
        if name == _REAL:  # in the place of generated ones: hard to beat
            return images[: self.examples], labels[: self.examples]
        if name == _REPEATED:
            few = np.arange(self.examples) % max(min(self.examples, len(images)) // 10, 1)
            return images[few], labels[few]
        wanted = np.arange(self.examples, dtype=np.int32) % self.rows.bench.data.num_classes
        means = [images[labels == c].mean(0) for c in range(self.rows.bench.data.num_classes)]
        return np.rint(np.stack(means)).astype(np.uint8)[wanted], wanted

    def _generated(self, generator: Generator) -> dict[str, Any]:
        rows = self.rows
        made, cost = sampling.timed(rows, generator, self.examples, MAIN)
        labels = sampling.noise(rows.bench.task, self.examples, MAIN)[1]
        paired = sampling.finite(sampling.generate(rows, generator, self.paired, PAIRED))
        distances = self._nearest(pixels(made[: self.paired]))
        return {
            "nfe": generator.nfe,
            **self._against(pixels(made), labels),
            "endpoint RMSE": generative.endpoint_rmse(paired, self.ends),
            "endpoint cosine": generative.endpoint_cosine(
                self._judged(pixels(paired))[0], self.ends_features
            ),
            "copies": generative.leakage(distances, self.test_distances).copies,
            **cost,
        }

    def _against(self, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        features, logits = self._judged(images)
        moments = generative.moments(features)
        turned = self._turned(images)
        some = min(len(features), len(self.features), 5000)
        support = generative.precision_recall(self.features[:some], features[:some])
        block = min(1000, some // _BLOCKS)
        kernel = generative.kid(
            self.features, features, jax.random.key(3), blocks=_BLOCKS, block_size=block
        )
        return {
            "FD to data": generative.frechet(moments, self.moments),
            "FD to teacher": generative.frechet(moments, self.teacher_moments),
            "FD to data, by turns": generative.frechet(turned, self.turns_moments[0]),
            "FD to teacher, by turns": generative.frechet(turned, self.turns_moments[1]),
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


def _draw(rows: Rows) -> None:
    """Samples of the rows from the same noise."""
    few = sampling.shown_rows(rows)
    made = [np.nan_to_num(sampling.generate(rows, g, _SHOWN, MAIN)) for g in few.values()]
    labels = np.repeat(np.arange(len(few), dtype=np.int32), _SHOWN)
    picture = pictures.grid(pixels(np.concatenate(made)), labels, list(few))
    sampling.write_picture(rows.bench.workdir / "artifacts" / "samples.png", picture)
