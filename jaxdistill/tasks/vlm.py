"""The family that distils vision-language models: a large one's answers into a small one."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxdistill import keywords
from jaxdistill.data import device, sources, text, vqa
from jaxdistill.data.text import ANSWER, EOS, Tokenizer
from jaxdistill.errors import InputError
from jaxdistill.interrupt import ShouldStop
from jaxdistill.io import weights
from jaxdistill.io.files import expanded, write_files
from jaxdistill.keywords import Between, Count, Folder, Natural
from jaxdistill.method import BatchSpec, replicated
from jaxdistill.parallel import processes
from jaxdistill.parallel.mesh import fully_sharded
from jaxdistill.settings import Experiment, Parallel, Row, Run
from jaxdistill.task import Part, VLMTask
from jaxdistill.tasks import Loaded, answering, mesh, readings
from jaxdistill.tasks.languages import Model, Student, Teacher, language, normalized
from jaxdistill.tasks.pretrained import Wanted, identity, pretrained
from jaxdistill.vlm import supervised
from jaxdistill.vlm.align import align, partners
from jaxdistill.vlm.groups import Groups
from jaxdistill.vlm.pairs import Side, TokenisedPair, encoded

ROOM = "jaxdistill.vlm"
ARTEFACT = answering.ARTEFACT
DATASETS = sources.NAMES

load_student = answering.load_student
export_student = answering.export_student

_SIDES = ("teacher", "student")
_AT_A_TIME = 250  # examples that the teacher reads or answers
# What parameters do not show, and must be as it was when they were trained.
_OF_A_TEACHER = (
    ("data", "name"),
    ("model", "rope_theta"),
    ("teacher", "heads"),
    ("teacher", "kv_heads"),
)
# Shape of an image, tokens of a question and of an answer, of what no data set here holds.
_SHAPES = {"pairs_448": ((448, 448, 3), 256, 256)}


class Data(NamedTuple):
    """Where the questions come from.

    Attributes:
        name: A labelled data set, of whose images grids are made, or a folder with questions; see
            `jaxdistill.data.vqa.grid` and `folder`.
        data_dir: Where a named data set lies.
        image_size: Pixels that a folder's images are brought to.
        kinds: Kinds of questions that are asked about grids.
        train: Questions that students learn from; of a folder, at most so many, as for the others.
        teacher_train: Questions that the teacher learns from, of which those are the first.
        validation: Questions that settings are chosen on.
        test: Questions that models are measured on.
        seed: Decides the questions about grids.
        judge_by_validation: Whether models are measured on the validation split instead, for
            choosing settings.
    """

    name: str
    data_dir: Folder = None
    image_size: Annotated[int | None, Between(1, 10**5)] = None
    kinds: tuple[str, ...] = vqa.KINDS
    train: Count = 10_000
    teacher_train: Count = 50_000
    validation: Count = 1000
    test: Count = 2000
    seed: Natural = 0
    judge_by_validation: bool = False


class Settings(NamedTuple):
    """The groups of a config of this family."""

    data: Data
    model: Model
    teacher: Teacher
    student: Student
    parallel: Parallel
    run: Run


class Asked(NamedTuple):
    """What evaluations look at.

    Attributes:
        questions: The questions that models are measured on.
        train: Those that students learn from.
        kinds: Names of the kinds of questions.
        pair: The same questions as both models read them, on the host.
        tokenizers: Both tokenizers.
    """

    questions: vqa.Questions
    train: vqa.Questions
    kinds: tuple[str, ...]
    pair: TokenisedPair
    tokenizers: dict[str, Tokenizer]


def load(experiment: Experiment, workdir: Path, should_stop: ShouldStop) -> Loaded:
    """Makes the questions, and prepares both models to be read or trained when they are wanted.

    Raises:
        InputError: If the data cannot be read, or the settings do not fit them.
    """
    groups, settings = experiment.groups, experiment.groups.data
    if settings.name in _SHAPES:
        raise InputError(f"{settings.name} is a shape without data: use --mode=compile")
    data, named, lengths = _texts(groups)
    judged = data.validation if settings.judge_by_validation else data.test
    known = vqa.Questions(*(x[: settings.train] for x in data.train))
    whole = _arrays(data.train, named, lengths)
    few = {name: array[: settings.train] for name, array in whole.items()}
    counts = settings.train, len(data.validation.answers)
    task = _task(groups, data.name, named, lengths, _one(few), *counts)
    source = {
        "source_sha256": data.train.fingerprint(data.kinds),
        "validation_sha256": data.validation.fingerprint(data.kinds),
        "test_sha256": judged.fingerprint(data.kinds),
        "tokenizers": {side: by.fingerprint() for side, by in named.items()},
    }
    examples = {"teacher": _resident(whole), "student": _resident(few)}
    read = functools.cache(
        lambda: _models(experiment, task, examples, source, workdir, should_stop)
    )
    reading = _Reading(experiment, task, few, source, read, workdir / "readings", should_stop)

    def with_hidden():
        return device.resident(few | {"hidden": _hidden(reading)})

    def answered():
        return device.resident(_arrays(_answered(reading, known, named), named, lengths))

    def held_out():
        return {"validation": _arrays(data.validation, named, lengths)}

    plain = examples["student"].load
    taught = task._replace(
        teacher=task.teacher._replace(load=lambda: {"teacher": read()[0]["teacher"]}),
        start=task.start._replace(load=lambda: read()[0]),
        examples=task.examples._replace(load=plain),
        read=task.read._replace(
            load=functools.cache(with_hidden) if groups.teacher.cache else plain
        ),
        answered=task.answered._replace(load=functools.cache(answered)),
        validation=task.validation._replace(load=held_out),
    )
    pair = _pair_of(_arrays(judged, named, lengths))
    asked = Asked(judged, known, data.kinds, pair, named)
    return Loaded(taught, asked, source, lambda: read()[1])


def shapes(experiment: Experiment) -> VLMTask:
    """The task without its models: enough to compile a student for it.

    The questions are made, for their lengths and vocabularies follow from them, unless the data are
    known by their shapes alone.

    Raises:
        InputError: If the data cannot be read.
    """
    groups = experiment.groups
    if groups.data.name in _SHAPES:
        image, question, answer = _SHAPES[groups.data.name]
        named = {side: _unknown(getattr(groups, side).tokenizer) for side in _SIDES}
        lengths = dict.fromkeys(_SIDES, (question, answer))
        one = {"images": jax.ShapeDtypeStruct(image, jnp.uint8)}
        for side in _SIDES:
            parts = {"question": question, "answer": answer, "groups": answer}
            one |= {
                f"{side}_{part}": jax.ShapeDtypeStruct((length,), jnp.int32)
                for part, length in parts.items()
            }
        one["partners"] = one["student_answer"]
        counts = groups.data.train, groups.data.validation
        return _task(groups, groups.data.name, named, lengths, one, *counts)
    data, named, lengths = _texts(groups)
    # Of one question: all have its shapes.
    first = vqa.Questions(*(x[:1] for x in data.train))
    one = _one(_arrays(first, named, lengths))
    counts = groups.data.train, len(data.validation.answers)
    return _task(groups, data.name, named, lengths, one, *counts)


def save(
    folder: Path, experiment: Experiment, loaded: Loaded, row: Row, output: PyTree, card: dict
) -> None:
    """Writes the student alone: `student.safetensors`, its card, and `tokenizer.json`."""
    del row
    by = loaded.data.tokenizers["student"]
    card = card | {
        "config": experiment.stated(),
        "tokenizer_sha256": by.fingerprint(),
        "image_shape": loaded.data.pair.images.shape[1:],
        "answer_length": loaded.task.answer_length[1],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_files({folder / answering.TOKENIZER: lambda file: file.write(by.stored.encode())})
    weights.save(folder, "student", output, card)


def read(folder: Path, shapes: PyTree) -> tuple[PyTree, dict]:
    """What the student of a folder has learned, and its card.

    Raises:
        InputError: If there is none, or it is another's.
    """
    params, card = weights.load(folder, "student")
    weights.check_shapes(f"{folder / 'student.safetensors'}", params, shapes)
    return params, card


# ---------------------------------------------------------------------------- the task


class _Texts(NamedTuple):
    """Questions, both tokenizers, and the lengths of questions and answers under each."""

    data: vqa.VQA
    named: dict[str, Tokenizer]
    lengths: dict[str, tuple[int, int]]


def _texts(groups: Settings) -> _Texts:
    """The questions of a config, and the tokenizers that are made for them."""
    settings = groups.data
    if settings.train > settings.teacher_train:
        raise InputError(
            f"data.train={settings.train} are the first of data.teacher_train="
            f"{settings.teacher_train}; give the teacher as many or more"
        )
    numbers = {
        "train": settings.teacher_train,
        "validation": settings.validation,
        "test": settings.test,
    }
    own = expanded(settings.name)
    if (own / "train.jsonl").is_file():
        for name in ("kinds", "seed", "data_dir"):
            if getattr(settings, name) != Data._field_defaults[name]:
                raise InputError(f"data.{name} means nothing for questions of a folder; leave it")
        data = vqa.folder(own, **numbers, image_size=settings.image_size)
    else:
        images = sources.load(
            settings.name, data_dir=settings.data_dir, image_size=settings.image_size
        )
        data = vqa.grid(images, **numbers, seed=settings.seed, kinds=settings.kinds)
    corpus = sorted({*data.train.questions, *data.train.answers})
    named = {side: text.tokenizer(getattr(groups, side).tokenizer, corpus) for side in _SIDES}
    return _Texts(data, named, {side: _lengths(by, data) for side, by in named.items()})


def _unknown(kind: str) -> Tokenizer:
    """A tokenizer of which the size alone is known."""
    name, _, size = kind.partition(":")
    if name != "ids" or not size.isdigit():
        raise InputError(
            f"data without texts go with tokenizers known by their size, such as ids:32000, not "
            f"with {kind}"
        )
    return Tokenizer(kind, (b"",) * int(size), lambda text: [])


def _lengths(by: Tokenizer, data: vqa.VQA) -> tuple[int, int]:
    """Tokens of the longest question and of the longest answer of all splits."""
    splits = data.train, data.validation, data.test
    texts = ({x for s in splits for x in s.questions}, {x for s in splits for x in s.answers})
    question, answer = (
        text.tokens(by, sorted(own), end).ids.shape[1]
        for own, end in zip(texts, (ANSWER, EOS), strict=True)
    )
    return question, answer


def _arrays(asked: vqa.Questions, named: dict, lengths: dict) -> dict[str, np.ndarray]:
    """Images and both sides' ids by name, as examples are held."""
    arrays = {"images": asked.images}
    for side in _SIDES:
        long, short = lengths[side]
        questions = text.tokens(named[side], asked.questions, ANSWER, long)
        answers = text.tokens(named[side], asked.answers, EOS, short)
        arrays |= {f"{side}_question": questions.ids, f"{side}_answer": answers.ids}
    # Answers come again and again, and are aligned once.
    found: dict[str, tuple[np.ndarray, ...]] = {}
    pieces = [_pieces(named[side]) for side in _SIDES]
    for answer, *ids in zip(asked.answers, *(arrays[f"{s}_answer"] for s in _SIDES), strict=True):
        if answer not in found:
            found[answer] = _aligned(pieces, ids)
    aligned = zip(*(found[answer] for answer in asked.answers), strict=True)
    names = (*(f"{side}_groups" for side in _SIDES), "partners")
    return arrays | {name: np.stack(own) for name, own in zip(names, aligned, strict=True)}


def _pieces(by: Tokenizer) -> tuple[bytes | str, ...]:
    """The pieces of a vocabulary, ours by their names."""
    return (*text.SPECIALS, *by.pieces[len(text.SPECIALS) :])


def _encode(by: Tokenizer, piece: bytes) -> list[int]:
    """The ids of some bytes; none where they are no text that it can write."""
    try:
        return by.split(piece.decode())
    except (UnicodeDecodeError, InputError):
        return []


def _aligned(
    pieces: Sequence[tuple[bytes | str, ...]], ids: Sequence[np.ndarray]
) -> tuple[np.ndarray, ...]:
    """The groups of one answer on both sides, and the student's partners; padding has none."""
    texts = [
        [known[i] for i in own.tolist() if i != text.PAD]
        for known, own in zip(pieces, ids, strict=True)
    ]
    lengths = [len(own) for own in ids]
    groups = align(*texts, teacher_length=lengths[0], student_length=lengths[1])
    return (*groups, partners(*texts, student_length=lengths[1]))


def _one(arrays: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one example."""
    return {n: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for n, x in arrays.items()}


def _examples(one: dict[str, jax.ShapeDtypeStruct], count: int) -> Part:
    """Examples that steps draw from, by their shapes."""
    return Part(device.resident_shapes(one, 1, count, count, labelled=False))


def _resident(arrays: dict[str, np.ndarray]) -> Part:
    """Examples that steps draw from."""
    part = _examples(_one(arrays), len(arrays["images"]))
    return part._replace(load=functools.cache(lambda: device.resident(arrays)))


def _stacked(one: dict[str, jax.ShapeDtypeStruct], count: int) -> dict[str, Any]:
    """The shapes of some examples, from those of one."""
    return {name: jax.ShapeDtypeStruct((count, *x.shape), x.dtype) for name, x in one.items()}


def _image_shape(examples: Part) -> tuple[int, int, int]:
    """(h, w, c) of the images of examples."""
    resident = examples.shapes
    return dict(zip(sorted(resident.examples), resident.shapes, strict=True))["images"]


def _pair_of(arrays: dict[str, Any]) -> TokenisedPair:
    """The arrays of some examples as both models read them; padding is id 0."""

    def side(name):
        question, answer = arrays[f"{name}_question"], arrays[f"{name}_answer"]
        return Side(question, question != text.PAD, answer, answer != text.PAD)

    images = normalized(arrays["images"])
    groups = Groups(arrays["teacher_groups"], arrays["student_groups"])
    sides, aside = (side("teacher"), side("student")), (arrays.get("keys"), arrays.get("hidden"))
    return TokenisedPair(images, *sides, groups, arrays["partners"], *aside)


def _task(groups, name, named, lengths, one, count: int, held_out: int) -> VLMTask:
    """The task for some examples of these shapes, nothing of which is there yet."""
    image_shape = one["images"].shape
    models = {
        side: language(groups.model, getattr(groups, side), named[side].size, image_shape)
        for side in _SIDES
    }
    made = {side: jax.eval_shape(models[side].init, jax.random.key(0)) for side in _SIDES}
    fed = dict(one)
    if groups.teacher.cache:
        shape = (models["teacher"].image_tokens + sum(lengths["teacher"]), groups.teacher.width)
        fed["hidden"] = jax.ShapeDtypeStruct(shape, jnp.dtype(groups.model.dtype))
    return VLMTask(
        name,
        models["teacher"],
        models["student"],
        _pair_of,
        functools.partial(BatchSpec, "uniform"),
        Part({"teacher": made["teacher"]}),
        Part(made),
        _examples(one, count),
        _examples(fed, count),
        _examples(one, count),
        Part({"validation": _stacked(one, held_out)}),
        (lengths["teacher"][1], lengths["student"][1]),
        {side: _pieces(named[side]) for side in _SIDES},
        {side: functools.partial(_encode, named[side]) for side in _SIDES},
        {side: named[side].fingerprint() for side in _SIDES},
        fully_sharded if groups.parallel.fully_sharded else replicated,
    )


# ---------------------------------------------------------------------------- what comes first


def _models(experiment, task, examples, source, workdir, should_stop) -> tuple[PyTree, dict]:
    """Teacher and start of the students, read or trained first, and their checksums."""
    params, sums = {}, {}
    for side in _SIDES:
        wanted = _wanted(experiment, side, examples[side], task, source, workdir)
        made, card = pretrained(experiment, wanted, should_stop)
        if card.get("tokenizer_sha256") != source["tokenizers"][side]:
            raise InputError(
                f"the {side} reads by another tokenizer than {side}.tokenizer of these questions; "
                "give the questions that it was trained on"
            )
        shapes = task.start.shapes[side]
        params[side] = jax.tree.map(lambda x, shape: x.astype(shape.dtype), made, shapes)
        sums[side] = card["sha256"]
    return params, {"teacher_sha256": sums["teacher"], "start_sha256": sums["student"]}


def _wanted(experiment, side, examples, task, source, workdir) -> Wanted:
    """One of both models, fine-tuned on the answers, in float32 whatever is frozen later."""
    groups = experiment.groups
    sizes, read = getattr(groups, side), source["tokenizers"][side]
    image_shape = _image_shape(task.examples)
    model = language(
        groups.model._replace(param_dtype="float32"), sizes, len(task.pieces[side]), image_shape
    )
    training = supervised.Training(sizes.steps, sizes.batch_size, sizes.learning_rate)

    def build(rate_factor):
        rate = training.learning_rate * rate_factor
        return supervised.trained(
            lambda key, frozen: model.init(key),
            supervised.supervised_loss(model, side),
            supervised.optimizer(training._replace(learning_rate=rate)),
            batches=task.batches(sizes.batch_size),
            pair=task.pair,
        )._replace(specs=task.specs)

    known = {"source_sha256": source["source_sha256"], "tokenizer_sha256": read}
    decided, defaults = identity(experiment, ("data", "model", side), **known)
    # What is trained has float32, and is one function wherever its states are taken.
    del decided["model"]["param_dtype"], decided["model"]["final_norm"]
    teacher = side == "teacher"
    return Wanted(
        side,
        "teacher" if teacher else "start of the students",
        groups.teacher.dir if teacher else None,
        workdir / ("teacher" if teacher else "start"),
        (decided, defaults),
        build,
        sizes.steps,
        examples,
        mesh(experiment, task),
        task.start.shapes[side],
        _OF_A_TEACHER if teacher else (),
        task.name,
        source,
        {"tokenizer_sha256": read},
    )


# ---------------------------------------------------------------------------- what a teacher reads


class _Reading(NamedTuple):
    """What it takes to have the teacher read the students' examples once."""

    experiment: Experiment
    task: VLMTask
    arrays: dict[str, np.ndarray]
    source: dict[str, Any]
    models: Callable[[], tuple[PyTree, dict]]
    folder: Path
    should_stop: ShouldStop

    def kept(self, name: str, program: Callable[[PyTree, Any], Any], title: str) -> np.ndarray:
        """What a program makes of teacher and examples."""
        params, sums = self.models()
        model = self.experiment.groups.model
        identity = {
            "teacher_sha256": sums["teacher_sha256"],
            "source_sha256": self.source["source_sha256"],
            "shapes": {name: x.shape for name, x in self.arrays.items()},
            "model": keywords.identifying(type(model), model._asdict()),
        }

        def make():
            return readings.passed(
                program,
                jax.device_put(params["teacher"]),
                self.arrays,
                batch_size=_AT_A_TIME,
                title=title,
                should_stop=self.should_stop,
            )

        return readings.kept(self.folder, name, identity, make)


def _hidden(reading: _Reading) -> np.ndarray:
    """The teacher's hidden states of all examples."""
    task = reading.task

    def program(params, batch):
        pair = _pair_of(batch)
        return encoded(task.teacher_model, params, pair.images, pair.teacher)

    return reading.kept("hidden", program, "the teacher reads")


def _answered(
    reading: _Reading, known: vqa.Questions, named: dict[str, Tokenizer]
) -> vqa.Questions:
    """The questions with the teacher's answers, where both models can write them."""
    task = reading.task

    def program(params, batch):
        pair = _pair_of(batch)
        side = pair.teacher
        return task.teacher_model.generate(
            params, pair.images, side.question, side.question_there, length=task.answer_length[0]
        ).tokens

    rows = reading.kept("answers", program, "the teacher answers")
    # Answers come again and again.
    room = dict(zip(_SIDES, task.answer_length, strict=True))

    @functools.cache
    def writable(answer: str) -> bool:
        if "\ufffd" in answer:  # bytes that are no character
            return False
        try:
            return all(len(named[side].split(answer)) < room[side] for side in _SIDES)
        except InputError:
            return False

    answers, left = [], 0
    for row, given in zip(rows, known.answers, strict=True):
        said = text.answer_text(named["teacher"], row)
        fits = text.EOS in row and writable(said)
        answers.append(said if fits else given)
        left += not fits
    if left and processes.is_first():
        print(
            f"{left} of {len(answers)} answers of the teacher have no end, or the student cannot "
            "write them: those of the data stay"
        )
    return known._replace(answers=tuple(answers))
