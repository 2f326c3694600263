"""The family that distils a flow teacher: many-step velocities in, students of a few steps out."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxdistill import collective, keywords
from jaxdistill.data import sources
from jaxdistill.errors import InputError
from jaxdistill.flow import adapt
from jaxdistill.flow.matching import examples_of, flow_matching
from jaxdistill.flow.samplers import guided
from jaxdistill.flow.targets import TARGETS, Target
from jaxdistill.interrupt import ShouldStop
from jaxdistill.io import weights
from jaxdistill.io.diffusers import (
    Checkpoint,
    fingerprint,
    load_transformer,
    read_checkpoint,
)
from jaxdistill.io.files import expanded
from jaxdistill.io.reading import one_line
from jaxdistill.keywords import Between, Count, Dtype, Folder, Fraction, Rate
from jaxdistill.method import Batch, BatchSpec, Method, replicated
from jaxdistill.nn.dit import DiT
from jaxdistill.nn.flow_mlp import FlowMLP
from jaxdistill.nn.transformer2d import Transformer2D
from jaxdistill.nn.unet import UNet
from jaxdistill.parallel import processes
from jaxdistill.parallel.mesh import fully_sharded
from jaxdistill.settings import Data, Experiment, Parallel, Row, Run, digest, resolve
from jaxdistill.task import FlowTask, Part, Stored
from jaxdistill.tasks import (
    Loaded,
    image_facts,
    load_images,
    mesh,
    placed,
    placed_shapes,
    published,
    source_of,
)
from jaxdistill.tasks.pretrained import Wanted, identity, pretrained

ROOM = "jaxdistill.flow"
ARTEFACT = "student.safetensors"
DATASETS = (*TARGETS, *sources.NAMES)

# Shape, classes and examples a class of what no data set here holds: latents of images of 256 and
# of 1024 pixels.
_LATENTS = {"latents_imagenet": ((32, 32, 4), 1000, 1300), "latents_1mp": ((128, 128, 16), 0, 1)}
# Settings that a teacher's parameters do not show, and that must be those it was trained with.
_OF_A_TEACHER = (
    ("data", "name"),
    ("data", "image_size"),
    ("data", "pad_to"),
    ("path", "shift"),
    ("model", "network"),
    ("model", "heads"),
    ("teacher", "label_drop"),
)
_NO_DATA = keywords.defaults(Data)
# A number that splitting the keys, as methods do, does not fold into them.
_DATA_KEY = 0x64617461


class FlowPath(NamedTuple):
    """The path from data to noise.

    Attributes:
        shift: The factor m that shifts even times r to noise levels `m r / (1 + (m - 1) r)`.
    """

    shift: Annotated[float, Between(1e-3, 1e3)] = 1.0


class Model(NamedTuple):
    """The teacher's network, which is the students' trunk.

    Attributes:
        network: `mlp` for points, `dit` or `unet` for images, `diffusers` for the transformer in
            the folder `teacher.dir`, which says its own sizes.
        patch: Side of a patch, in pixels.
        width: Channels, a multiple of 4 and of `heads`.
        depth: Blocks.
        heads: The number of heads of attention.
        bands: Octaves of sines and cosines of a point's place.
        widths: Channels of the UNet's levels.
        unroll: Blocks of the DiT compiled side by side.
        remat: Whether blocks are computed again for the gradient.
        dtype: The dtype of the activations.
        param_dtype: The dtype of the parameters.
    """

    network: Literal["dit", "unet", "mlp", "diffusers"] = "dit"
    patch: Annotated[int, Between(1, 256)] = 4
    width: Annotated[int, Between(4, 2**16)] = 128
    depth: Annotated[int, Between(1, 1000)] = 6
    heads: Annotated[int, Between(1, 1000)] = 4
    bands: Annotated[int, Between(0, 16)] = 0
    widths: tuple[Annotated[int, Between(1, 2**16)], ...] = (32, 64, 96)
    unroll: Annotated[int, Between(1, 1000)] = 1
    remat: bool = False
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"


class Teacher(NamedTuple):
    """The teacher: where it lies, or how it is trained.

    Attributes:
        dir: A folder with `teacher.safetensors`, or with a transformer of diffusers; by default
            `teacher` in the workdir, where it is trained.
        exact: Whether it learns from the exact velocity and is followed by it, where it is known.
        steps: Length of its training.
        batch_size: Examples a step.
        learning_rate: AdamW's learning rate.
        ema_decay: What the moving average, which is the teacher, keeps of itself each step.
        label_drop: Share of the labels that are left out, which guidance needs.
        guidance: Scale of classifier-free guidance. Above 1 a velocity takes two calls of its
            network, and the student learns it in one.
    """

    dir: Folder = None
    exact: bool = False
    steps: Count = 4000
    batch_size: Annotated[int, Between(1, 10**6)] = 64
    learning_rate: Rate = 1e-3
    ema_decay: Fraction = 0.999
    label_drop: Annotated[float, Between(0, 0.99)] = 0.0
    guidance: Annotated[float, Between(0, 100)] = 1.0


class Settings(NamedTuple):
    """The groups of a config of this family."""

    data: Data
    path: FlowPath
    model: Model
    teacher: Teacher
    parallel: Parallel
    run: Run


def load(experiment: Experiment, workdir: Path, should_stop: ShouldStop) -> Loaded:
    """Reads the data, and prepares the teacher to be read or trained when it is wanted.

    Raises:
        InputError: If the data cannot be read, or the settings do not fit them.
    """
    groups = experiment.groups
    name = groups.data.name
    if name in _LATENTS:
        _check_dataless(experiment, name)
        task, source, data = shapes(experiment), {}, None
        task = task._replace(examples=task.examples._replace(load=_no_data))
    elif name in TARGETS:
        strange = [n for n, v in groups.data._asdict().items() if n != "name" and v != _NO_DATA[n]]
        if strange:
            raise InputError(f"data.{strange[0]} means nothing for {name}, which is no images")
        target = TARGETS[name]()
        task, source = _points(groups, target), {}
        data: Any = target
    else:
        data = load_images(groups.data)
        examples = placed(groups.data, data)
        task = _images(groups, data.name, data.image_shape, data.num_classes, examples)
        source = source_of(data)
    read = functools.cache(lambda: _teacher(experiment, task, source, workdir, should_stop))
    return Loaded(
        task._replace(
            teacher=task.teacher._replace(load=lambda: {"teacher": read()[0]}),
            student=lambda *args: _student(*args, lambda: read()[1], workdir / "start"),
        ),
        data,
        source,
        lambda: {"teacher_sha256": read()[1]},
    )


def shapes(experiment: Experiment) -> FlowTask:
    """The task of data that need not be there: enough to compile a student for it.

    Raises:
        InputError: If nothing is known of the data.
    """
    groups = experiment.groups
    name = groups.data.name
    if name in TARGETS:
        return _points(groups, TARGETS[name]())
    if name in _LATENTS:
        shape, classes, largest = _LATENTS[name]
        count = max(classes, 1) * largest
        example, labelled = jax.ShapeDtypeStruct(shape, jnp.float32), classes > 0
    else:
        facts = image_facts(groups.data)
        shape, classes = facts.image_shape, facts.num_classes
        largest, count = facts.largest_class, facts.images
        example, labelled = jax.ShapeDtypeStruct(shape, jnp.uint8), True
    examples = placed_shapes(groups.data, example, max(classes, 1), largest, count, labelled)
    return _images(groups, name, shape, classes, examples)


def save(
    folder: Path, experiment: Experiment, loaded: Loaded, row: Row, output: PyTree, card: dict
) -> None:
    """Writes the student, `student.safetensors` and its card; see `jaxdistill.io.weights`."""
    del row
    where, task = experiment.groups.teacher.dir, loaded.task
    card = card | {
        "shape": task.shape,
        "num_classes": task.num_classes,
        "teacher": str(expanded(where).absolute()) if where else None,
        "config": experiment.stated(),
    }
    weights.save(folder, "student", output, card)


def read(folder: Path, shapes: PyTree) -> tuple[PyTree, dict]:
    """What the student of a folder has learned, and its card.

    Args:
        folder: Where it lies.
        shapes: What its method puts out.

    Raises:
        InputError: If there is none, or it is another's.
    """
    params, card = weights.load(folder, "student")
    weights.check_shapes(f"{folder / 'student.safetensors'}", params, shapes)
    return params, card


# ---------------------------------------------------------------------------- the task


def _points(groups: Settings, target: Target) -> FlowTask:
    def data(batch: Batch) -> tuple[Array, Array]:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, _DATA_KEY))(batch["keys"])
        return jax.vmap(target.sample)(keys), jnp.zeros(keys.shape[0], jnp.int32)

    batches = functools.partial(BatchSpec, "keys")
    return _task(groups, groups.data.name, (1, 1, 2), 0, batches, data, Part(), target)


def _images(groups, name, shape, num_classes, examples: Part) -> FlowTask:
    batches = functools.partial(BatchSpec, "uniform")
    return _task(groups, name, shape, num_classes, batches, examples_of, examples, None)


def _task(groups, name, shape, num_classes, batches, data, examples, target) -> FlowTask:
    _check(groups, name, shape, num_classes, target)
    read = groups.model.network == "diffusers"
    if read:
        trunk = published.network(
            read_checkpoint(groups.teacher.dir),
            dtype=jnp.dtype(groups.model.dtype),
            param_dtype=jnp.dtype(groups.model.param_dtype),
            remat=groups.model.remat,
            unroll=groups.model.unroll,
        )
        _check_published(trunk.shape, name, shape, num_classes)
    else:
        trunk = network(groups.model, shape[-1], num_classes)
    params = jax.eval_shape(functools.partial(adapt.fresh_trunk, trunk, shape), jax.random.key(0))
    velocity, plain, nfe = _velocities(groups.teacher, trunk, num_classes, target)
    sharded, null = groups.parallel.fully_sharded, read or groups.teacher.label_drop
    more = {"as_velocity": trunk.as_velocity} if read else {}
    return FlowTask(
        name=name,
        shape=shape,
        num_classes=num_classes,
        shift=groups.path.shift,
        batches=batches,
        data=data,
        trunk=trunk,
        velocity=velocity,
        nfe=nfe,
        plain=plain,
        guidance=groups.teacher.guidance,
        null=num_classes if num_classes and null else None,
        teacher=Part({"teacher": params}),
        examples=examples,
        student=lambda *args: _student(*args, None),
        specs=fully_sharded if sharded else replicated,
        **more,
    )


def _check_dataless(experiment: Experiment, name: str) -> None:
    """Refuses a run without data that needs some; students that start from noise do not."""
    if experiment.groups.model.network != "diffusers":
        raise InputError(f"{name} is a shape without data, to be compiled: use --mode=compile")
    if experiment.evals:
        raise InputError(f"{name} has no data to evaluate by; leave config.evals empty")


def _no_data() -> PyTree:
    raise InputError("this method takes real examples, and there are none; set data.name to data")


def _check(groups, name, shape, num_classes, target) -> None:
    """Refuses settings that do not go with each other, or with the data."""
    model, teacher = groups.model, groups.teacher
    if model.width % model.heads or model.width % 4:
        raise InputError(
            f"model.width is {model.width}; it must be a multiple of 4 and of "
            f"model.heads={model.heads}"
        )
    if not model.widths:
        raise InputError("model.widths is (); give whole numbers, one a level")
    if model.network == "diffusers":
        if teacher.dir is None:
            raise InputError(
                "model.network=diffusers is a transformer on disk; set teacher.dir to its folder"
            )
        if teacher.label_drop or teacher.exact:
            raise InputError(
                "teacher.label_drop and teacher.exact are of the training of a teacher, and a "
                "transformer of diffusers is read; leave them out"
            )
    elif teacher.guidance != 1.0 and not teacher.label_drop:
        raise InputError(
            f"teacher.guidance={teacher.guidance} needs a teacher that knows the null "
            "label; set teacher.label_drop above 0"
        )
    if teacher.exact and (target is None or target.velocity is None):
        raise InputError(f"the exact velocity of {name} is not known; set teacher.exact=False")
    if teacher.label_drop and not num_classes:
        raise InputError(f"{name} has no labels to drop; set teacher.label_drop=0.0")
    if model.network == "dit" and any(side % model.patch for side in shape[:2]):
        raise InputError(
            f"images of {shape[0]}x{shape[1]} pixels do not divide into patches of "
            f"{model.patch}; choose another model.patch, or data.pad_to"
        )
    if (model.network == "mlp") != (target is not None):
        raise InputError("model.network=mlp goes with points, dit and unet with images")


def network(model: Model, channels: int, num_classes: int) -> Any:
    """The module of the teacher, which is the student's trunk."""
    if model.network == "mlp":
        return FlowMLP(
            channels, num_classes, width=model.width, depth=model.depth, bands=model.bands
        )
    if model.network == "unet":
        return UNet(channels, num_classes, widths=model.widths)
    return DiT(
        channels,
        model.patch,
        model.width,
        model.depth,
        model.heads,
        num_classes,
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(model.param_dtype),
        remat=model.remat,
        unroll=model.unroll,
        place=collective.by_example,
        per_device=collective.per_device,
    )


def _check_published(network, name, shape, num_classes) -> None:
    """Refuses data that are not what a transformer was made for."""
    own = (network.size, network.size, network.channels)
    if shape != own or num_classes != network.num_classes:
        raise InputError(
            f"the transformer in teacher.dir is for images of shape {own} and "
            f"{network.num_classes} classes; {name} has {shape} and {num_classes}"
        )


def _velocities(teacher: Teacher, trunk: Any, num_classes: int, target: Target | None):
    """What students follow, the same without guidance, and the network calls of the first."""
    if teacher.exact:
        exact = lambda frozen, x, t, label: target.velocity(x, t)  # noqa: E731
        return exact, exact, 1

    def plain(frozen, x, t, label):
        return trunk.apply({"params": frozen["teacher"]}, x, t, label)

    def velocity(frozen, x, t, label):
        one = lambda x, t, label: plain(frozen, x, t, label)  # noqa: E731
        return guided(one, label, num_classes or None, teacher.guidance)(x, t)

    return velocity, plain, 1 if teacher.guidance == 1.0 else 2


def _student(
    folder: str,
    shapes: PyTree,
    alpha: float,
    teacher: Callable[[], str] | None,
    copies: Path | None = None,
) -> Stored:
    """A student on disk, to begin from.

    A run that has begun from it keeps a copy, with which it goes on where the folder is gone.

    Args:
        folder: Where it lies, as of `load_student`.
        shapes: Those of what it has learned.
        alpha: What its adapters are scaled by, times their rank.
        teacher: Gives the checksum of the teacher that it must be of; None where nothing is read.
        copies: Where the run keeps them; not used where nothing is read.

    Raises:
        InputError: If none lies there. Whose it is will be seen when it is read.
    """
    copy = f"student-{digest(str(expanded(folder).absolute()))}"
    where, name = _artefact(folder), "student"
    if teacher is not None and not (where / ARTEFACT).is_file():
        where, name = copies, copy
        if not (where / f"{name}.safetensors").is_file():
            raise InputError(
                f"method.start={folder} holds no student; give the workdir of a finished run"
            )

    @functools.cache
    def read():
        params, card = weights.load(where, name)
        if card.get("provenance", {}).get("teacher_sha256") != teacher():
            raise InputError(f"the student in {where} is of another teacher; give one of this one")
        weights.check_shapes(f"the student in {where}", params, shapes)
        _check_start(where, card, alpha)
        return params, card

    def load():
        params, card = read()
        missing = not (copies / f"{copy}.safetensors").is_file()
        if missing and processes.is_first():
            weights.save(copies, copy, params, card)
        return params

    return Stored(load, lambda: read()[1]["sha256"])


def _check_start(folder: Path, card: dict, alpha: float) -> None:
    """Refuses a student whose parameters would be another function here.

    Raises:
        InputError: If its settings say so, or cannot be read.
    """
    try:
        settings = resolve(card["config"]).rows[card["method"]].settings
    except (KeyError, TypeError, InputError) as error:
        raise InputError(
            f"{folder / 'student.json'} is not the card of a student of this version "
            f"({one_line(error)}); train it again"
        ) from error
    known = settings["rank"] if settings["alpha"] is None else settings["alpha"]
    if settings["rank"] and known != alpha:
        raise InputError(
            f"the student in {folder} has adapters of method.alpha={known}, this run's have "
            f"{alpha}; give them the same"
        )
    if settings.get("unit", "time") != "time" or card.get("last", 1.0) != 1.0:
        raise InputError(
            f"the student in {folder} has gammas of a step, or a shorter last segment, which this "
            "method has not; begin from another"
        )


# ---------------------------------------------------------------------------- the teacher


def teacher_method(groups: Settings, task: FlowTask, rate_factor: float = 1.0) -> Method:
    """The training of the teacher, with its learning rate times a factor."""
    teacher, trunk = groups.teacher, task.trunk
    rate = teacher.learning_rate * rate_factor
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, rate, min(200, teacher.steps // 10), teacher.steps, 0.01 * rate
    )
    exact = TARGETS[task.name]().velocity if teacher.exact else None
    method = flow_matching(
        functools.partial(adapt.fresh_trunk, trunk, task.shape),
        lambda params, x, t, label: trunk.apply({"params": params}, x, t, label),
        optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.0)
        ),
        batches=task.batches(teacher.batch_size),
        data=task.data,
        shift=task.shift,
        null=task.num_classes or None,
        label_drop=teacher.label_drop,
        decay=teacher.ema_decay,
        exact=exact,
    )
    return method._replace(specs=task.specs, frozen_specs=task.specs)


def _teacher(experiment, task, source, workdir, should_stop) -> tuple[PyTree, str]:
    """The teacher's parameters, read or trained first, and their checksum."""
    groups = experiment.groups
    if groups.model.network == "diffusers":
        return _published(read_checkpoint(groups.teacher.dir))

    def build(rate_factor):
        if groups.model.param_dtype != "float32":
            raise InputError(
                "a teacher is trained with model.param_dtype=float32, or its moving average would "
                "stand still; give the folder of a trained one as teacher.dir"
            )
        return teacher_method(groups, task, rate_factor)

    wanted = Wanted(
        "teacher",
        "teacher",
        groups.teacher.dir,
        workdir / "teacher",
        identity(experiment, ("data", "path", "model", "teacher"), **source),
        build,
        groups.teacher.steps,
        task.examples,
        mesh(experiment, task),
        task.teacher.shapes["teacher"],
        _OF_A_TEACHER,
        task.name,
        source,
    )
    params, card = pretrained(experiment, wanted, should_stop)
    return params, card["sha256"]


def _published(checkpoint: Checkpoint) -> tuple[PyTree, str]:
    """The parameters of a transformer of diffusers, and its checksum."""
    return load_transformer(checkpoint.folder, checkpoint.shape), fingerprint(checkpoint)


# ---------------------------------------------------------------------------- a student alone


class Trained(NamedTuple):
    """A student that is ready for use.

    Attributes:
        sample: `(key, label, nfe=None) -> examples`. Labels are int32 (n,), zeros where there are
            none; the examples are float32 (n, h, w, c) in the units of the flow, images in
            [-1, 1]. It is compiled once for each number of calls and of examples.
        shape: (h, w, c) of an example.
        num_classes: 0 where there are no labels.
        card: What the student says of itself; `nfe` is what it was trained for.
    """

    sample: Callable[..., Array]
    shape: tuple[int, int, int]
    num_classes: int
    card: dict[str, Any]


def load_student(
    folder: str | os.PathLike[str], teacher: str | os.PathLike[str] | None = None
) -> Trained:
    """Reads a student that a run has made; it needs neither its config nor its data.

    Args:
        folder: A workdir, one of its `baselines/`, or the folder `artifacts` in either.
        teacher: The folder of the teacher that it stands on; by default the one that it was trained
            under, in the workdir or where `teacher.dir` was.

    Raises:
        InputError: If there is no student, or its teacher is not there or is another.
    """
    task, row, base, params, card = _stored(folder, teacher)
    recipe = row.module.recipe(task, **row.settings)
    frozen = jax.device_put({"teacher": base})
    params, shape, num_classes = jax.device_put(params), task.shape, task.num_classes
    compiled = functools.lru_cache(lambda nfe: jax.jit(functools.partial(recipe.sample, nfe=nfe)))

    def sample(key: Array, label: Any, nfe: int | None = None) -> Array:
        label = jnp.asarray(label)
        if label.ndim != 1 or not jnp.issubdtype(label.dtype, jnp.integer):
            raise InputError(f"labels are whole numbers (n,), not {label.dtype} {label.shape}")
        noise = jax.random.normal(key, (len(label), *shape), jnp.float32)
        return compiled(card["nfe"] if nfe is None else nfe)(params, frozen, noise, label)

    return Trained(sample, shape, num_classes, card)


def export_student(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Writes a student of a transformer of diffusers in files of diffusers and PEFT.

    A student of one straight line is `transformer/`, as its teacher is, with the adapters worked
    into the weights. Adapters are `adapter/` as well, for PEFT. The head of one that follows curves
    is `head.safetensors`. `README.md` says at which times it is called.

    Args:
        folder: As of `load_student`.
        out: Made if missing.

    Raises:
        InputError: If there is no student, its teacher is none of diffusers or not there, or `out`
            cannot be written or holds other weights.
    """
    task, row, base, params, card = _stored(folder, None)
    if not isinstance(task.trunk, Transformer2D):
        raise InputError(f"the student in {folder} stands on a network that diffusers has not")
    alpha, checkpoint = row.settings["alpha"], read_checkpoint(card["teacher"])
    alpha = float(row.settings["rank"] if alpha is None else alpha)
    published.export(expanded(out), checkpoint, base, params, card, alpha)


def _stored(
    folder: str | os.PathLike[str], teacher: str | os.PathLike[str] | None
) -> tuple[FlowTask, Row, PyTree, PyTree, dict]:
    """The task of a stored student, its row, its teacher's parameters, its own, and its card."""
    folder = _artefact(folder)
    params, card = weights.load(folder, "student")
    try:
        experiment = resolve(card["config"])
        row = experiment.rows[card["method"]]
        shape, num_classes = tuple(card["shape"]), card["num_classes"]
        wanted, place = card["provenance"]["teacher_sha256"], card["teacher"]
    except (KeyError, TypeError, InputError) as error:
        raise InputError(
            f"{folder / 'student.json'} is not the card of a student of this version "
            f"({one_line(error)}); train it again, or use the version that made it"
        ) from error
    where = expanded(teacher or place or _beside(folder))
    groups = experiment.groups
    groups = groups._replace(teacher=groups.teacher._replace(dir=str(where)))
    if card["dataset"] in TARGETS:
        task = _points(groups, TARGETS[card["dataset"]]())
    else:
        task = _images(groups, card["dataset"], shape, num_classes, Part())
    if groups.model.network == "diffusers":
        base, known = _published(read_checkpoint(where))
    else:
        base, card_of_base = weights.load(where, "teacher")
        known = card_of_base["sha256"]
    if known != wanted:
        raise InputError(f"the teacher in {where} is not that of the student in {folder}")
    return task, row, base, params, card


def _artefact(folder: str | os.PathLike[str]) -> Path:
    """The folder with a student: `artifacts` of a run, or itself."""
    folder = expanded(folder)
    inner = folder / "artifacts"
    return inner if (inner / ARTEFACT).is_file() else folder


def _beside(folder: Path) -> Path:
    """The folder of the teacher in the workdir that an artefact lies in."""
    for above in folder.absolute().parents:
        if (above / "teacher" / "teacher.safetensors").is_file():
            return above / "teacher"
    raise InputError(f"no teacher lies beside the student in {folder}; give its folder as teacher")
