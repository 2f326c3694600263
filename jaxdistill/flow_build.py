"""What a config of the flow family means: data, networks, teacher, students.

The counterpart of `jaxdistill.build`, which does this for data-set distillation.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, PyTree

from jaxdistill import collective, settings
from jaxdistill.data import sources
from jaxdistill.data.dataset import Dataset
from jaxdistill.errors import InputError
from jaxdistill.flow.arcflow import arcflow
from jaxdistill.flow.endpoint import endpoint_regression
from jaxdistill.flow.matching import flow_matching, uint8_data
from jaxdistill.flow.policies import UNITS, gaussian_policy, momentum_policy
from jaxdistill.flow.progressive import progressive
from jaxdistill.flow.samplers import SAMPLERS, guided
from jaxdistill.flow.students import (
    Student,
    Teacher,
    elastic,
    fixed,
    from_data,
    from_noise,
)
from jaxdistill.flow.targets import TARGETS, Target
from jaxdistill.interrupt import ShouldStop, never
from jaxdistill.method import Batch, BatchSpec, Method
from jaxdistill.nn import lora
from jaxdistill.nn.dit import DiT
from jaxdistill.nn.flow_mlp import FlowMLP
from jaxdistill.nn.momentum_head import GaussianHead, MomentumHead, from_output
from jaxdistill.nn.unet import UNet
from jaxdistill.parallel.mesh import fully_sharded

STUDENTS = (
    "arcflow",
    "linear",
    "straight",
    "gaussian",
    "endpoint",
    "endpoint_8x",
    "progressive",
)
NETWORKS = ("dit", "unet", "mlp")
# Shape and classes of what no data set here holds: latents of images of 256 and 1024 pixels.
_LATENTS = {"latents_imagenet": ((32, 32, 4), 1000), "latents_1mp": ((128, 128, 16), 0)}
_RANGES = {
    "shift": (1e-3, 1e3),
    "model.patch": (1, 256),
    "model.width": (4, 2**16),
    "model.depth": (1, 1000),
    "model.unroll": (1, 1000),
    "model.bands": (0, 16),
    "model.heads": (1, 1000),
    "teacher.rate": (0, 1e3),
    "teacher.decay": (0, 1),
    "teacher.steps": (1, 10**9),
    "teacher.batch": (1, 10**6),
    "teacher.label_drop": (0, 0.99),
    "teacher.guidance": (0, 100),
    "method.rate": (0, 1e3),
    "method.gamma_rate": (0, 1e3),
    "method.rate_decay": (0, 1),
    "method.alpha": (0, 1e6),
    "method.clip": (1e-6, 1e12),
    "method.ema_power": (0, 1e3),
    "method.last": (1e-3, 1),
    "method.window": (0, 0.99),
    "method.drop": (0, 0.99),
    "method.first_calls": (2, 10**6),
    "method.calls": (1, 1000),
    "method.modes": (1, 1000),
    "method.queries": (1, 1000),
    "method.teacher_share": (0, 1),
    "method.substeps": (1, 1000),
    "method.rank": (0, 2**14),
    "method.batch": (1, 10**6),
    "method.warmup": (0, 10**9),
    "run.steps": (1, 10**9),
    "run.chunk": (1, 10**6),
    "run.checkpoint_every": (0, 10**9),
    "eval.examples": (100, 10**7),
    "eval.paired": (1, 10**7),
    "eval.batch": (1, 10**6),
    "eval.reference_steps": (2, 10**6),
    "eval.judge_epochs": (1, 10**6),
}
# Groups of what a student trains.
_PLAIN, _SLOW = "plain", "gammas"


class Problem(NamedTuple):
    """What flows: points, images or latents.

    Attributes:
        name: Of the data.
        shape: (h, w, c) of an example.
        num_classes: 0 where there are no labels.
        target: The law of points, where these are points.
        dataset: The images, where these are at hand.
    """

    name: str
    shape: tuple[int, int, int]
    num_classes: int
    target: Target | None = None
    dataset: Dataset | None = None

    @property
    def null(self) -> int | None:
        """The label that says nothing; None where there are no labels."""
        return self.num_classes or None

    def batches(self, size: int) -> BatchSpec:
        """What a step that needs data is fed."""
        return BatchSpec("uniform" if self.target is None else "keys", size)

    def data(self, batch: Batch) -> tuple[Array, Array]:
        """Examples, in the units of the flow, and their labels."""
        if self.target is None:
            return uint8_data(batch)
        # A number that splitting the keys, as methods do, does not fold into them.
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 0x64617461))(batch["keys"])
        return jax.vmap(self.target.sample)(keys), jnp.zeros(keys.shape[0], jnp.int32)


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


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses what is wrong whatever the data.

    Raises:
        InputError: In these cases.
    """
    for name in settings.rows(config):
        if name not in STUDENTS:
            raise InputError(f"unknown student {name!r}; choose from {', '.join(STUDENTS)}")
    if config.model.network not in NETWORKS:
        raise InputError(
            f"unknown network {config.model.network!r}; choose from {', '.join(NETWORKS)}"
        )
    settings.check_ranges(config, _RANGES)
    if config.model.width % config.model.heads or config.model.width % 4:
        raise InputError(
            f"model.width is {config.model.width}; it must be a multiple of 4 and of "
            f"model.heads={config.model.heads}"
        )
    if config.method.unit not in UNITS:
        raise InputError(f"method.unit is {config.method.unit!r}; choose {' or '.join(UNITS)}")
    widths = config.model.widths
    if not widths or not all(isinstance(n, int) and n >= 1 for n in widths):
        raise InputError(f"model.widths is {tuple(widths)}; give whole numbers, one a level")
    settings.check_places(config)
    calls = (*config.eval.calls, *config.method.elastic)
    if not config.eval.calls or not all(isinstance(n, int) and n >= 1 for n in calls):
        raise InputError("eval.calls and method.elastic are whole numbers, at least 1 each")
    for row in config.eval.teacher_rows:
        teacher_row(row)
    settings.check_dtypes(config, ("model.dtype", "model.param_dtype"))
    spread = config.method.log_gamma
    if len(spread) != 2 or not all(isinstance(x, int | float) for x in spread):
        raise InputError(f"method.log_gamma is {tuple(spread)}; give the lowest and the highest")
    _check_method(config)
    if config.teacher.guidance != 1.0 and not config.teacher.label_drop:
        raise InputError(
            f"teacher.guidance={config.teacher.guidance} needs a teacher that knows the null "
            "label; set teacher.label_drop above 0"
        )


def teacher_row(row: str) -> tuple[str, int]:
    """The sampler and the steps of a row such as `heun:8`, of eight calls.

    Raises:
        InputError: If it is no such row.
    """
    name, _, calls = str(row).partition(":")
    if name in SAMPLERS and calls.isdecimal() and int(calls):
        steps, rest = divmod(int(calls), SAMPLERS[name][1])
        if not rest:
            return name, steps
    raise InputError(
        f"eval.teacher_rows has {row!r}; each is a sampler ({', '.join(SAMPLERS)}) and its calls, "
        "a multiple of those of one step: heun:8"
    )


def _check_method(config) -> None:
    """Refuses settings of the method that exclude each other."""
    method = config.method
    if not all(isinstance(target, str) for target in method.targets):
        raise InputError(
            f"method.targets is {tuple(method.targets)}; give regular expressions, as texts"
        )
    several = bool(method.elastic)
    if several and (method.from_data or method.unit == "step"):
        raise InputError(
            "method.elastic goes with segments from noise, and with gammas of a unit of time: one "
            "output serves segments of several lengths; set from_data=False and unit=time"
        )
    if several and "progressive" in settings.rows(config):
        raise InputError(
            "method.elastic does not go with the progressive student, whose segments are those of "
            "method.calls; leave one of them out"
        )
    if method.last != 1.0 and (several or "progressive" in settings.rows(config)):
        raise InputError(
            f"method.last={method.last}: elastic and progressive students have even segments; set "
            "method.last=1.0"
        )
    if config.model.network == "unet" and method.rank:
        raise InputError(
            "adapters go on dense layers, and a UNet does its work in others; set method.rank=0"
        )


def identity(stated: dict) -> dict:
    """The settings that decide what is trained; see `settings.identity`."""
    return settings.identity(stated, "teacher")


def load_problem(config: ml_collections.ConfigDict) -> Problem:
    """Reads the data that the config names.

    Raises:
        InputError: If there are none, or the config asks of them what they do not have.
    """
    name = config.data.name
    if name in TARGETS:
        problem = Problem(name, (1, 1, 2), 0, target=TARGETS[name]())
    elif name in _LATENTS:
        raise InputError(f"{name} is a shape without data, to be compiled: use --mode=compile")
    else:
        data = settings.load_dataset(config)
        problem = Problem(data.name, data.image_shape, data.num_classes, dataset=data)
    check_problem(config, problem)
    return problem


def problem_shapes(config: ml_collections.ConfigDict) -> Problem:
    """As `load_problem`, but of a data set that need not be there.

    Raises:
        InputError: As there.
    """
    name = config.data.name
    if name in TARGETS:
        return load_problem(config)
    if name in _LATENTS:
        problem = Problem(name, *_LATENTS[name])
    else:
        facts = settings.read_source(config, sources.facts)
        problem = Problem(name, facts.image_shape, facts.num_classes)
    check_problem(config, problem)
    return problem


def check_problem(config: ml_collections.ConfigDict, problem: Problem) -> None:
    """Refuses settings that do not go with the data.

    Raises:
        InputError: In these cases.
    """
    if config.teacher.exact and (problem.target is None or problem.target.velocity is None):
        raise InputError(
            f"the exact velocity of {problem.name} is not known; set teacher.exact=False"
        )
    if config.teacher.label_drop and problem.null is None:
        raise InputError(f"{problem.name} has no labels to drop; set teacher.label_drop=0.0")
    patch = config.model.patch
    if config.model.network == "dit" and any(side % patch for side in problem.shape[:2]):
        raise InputError(
            f"images of {problem.shape[0]}x{problem.shape[1]} pixels do not divide into patches of "
            f"{patch}; choose another model.patch, or data.pad_to"
        )
    if (config.model.network == "mlp") != (problem.target is not None):
        raise InputError("model.network=mlp goes with points, dit and unet with images")


# ---------------------------------------------------------------------------- networks


def network(config: ml_collections.ConfigDict, problem: Problem) -> Any:
    """The module of the teacher, which is the student's trunk."""
    model, channels, classes = config.model, problem.shape[-1], problem.num_classes
    if model.network == "mlp":
        return FlowMLP(channels, classes, width=model.width, depth=model.depth, bands=model.bands)
    if model.network == "unet":
        return UNet(channels, classes, widths=tuple(model.widths))
    return DiT(
        channels,
        model.patch,
        model.width,
        model.depth,
        model.heads,
        classes,
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.dtype(model.param_dtype),
        remat=model.remat,
        unroll=model.unroll,
        place=collective.by_example,
        per_device=collective.per_device,
    )


def init_network(module: Any, problem: Problem, key: Array) -> PyTree:
    """Fresh parameters."""
    x = jnp.zeros((1, *problem.shape))
    return module.init(key, x, jnp.zeros(1), jnp.zeros(1, jnp.int32))["params"]


def teacher_shapes(config: ml_collections.ConfigDict, problem: Problem) -> PyTree:
    """What the teacher's parameters look like."""
    init = functools.partial(init_network, network(config, problem), problem)
    return jax.eval_shape(init, jax.random.key(0))


def teacher_method(config: ml_collections.ConfigDict, problem: Problem) -> Method:
    """The training of the teacher."""
    module, teacher = network(config, problem), config.teacher
    rate = optax.warmup_cosine_decay_schedule(
        0.0, teacher.rate, min(200, teacher.steps // 10), teacher.steps, 0.01 * teacher.rate
    )
    method = flow_matching(
        functools.partial(init_network, module, problem),
        lambda params, x, t, label: module.apply({"params": params}, x, t, label),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.0)),
        batches=problem.batches(teacher.batch),
        data=problem.data,
        shift=config.shift,
        null=problem.null,
        label_drop=teacher.label_drop,
        decay=teacher.decay,
        exact=problem.target.velocity if teacher.exact else None,
    )
    return _placed(config, method)


def teacher_velocity(config: ml_collections.ConfigDict, problem: Problem) -> tuple[Teacher, int]:
    """What students follow, and how many network calls it takes.

    Returns:
        `(frozen, x, t, label) -> u`, where `frozen["teacher"]` has the parameters.
    """
    if config.teacher.exact:
        return lambda frozen, x, t, label: problem.target.velocity(x, t), 1
    module, scale = network(config, problem), config.teacher.guidance

    def velocity(frozen, x, t, label):
        def plain(x, t, label):
            return module.apply({"params": frozen["teacher"]}, x, t, label)

        return guided(plain, label, problem.null, scale)(x, t)

    return velocity, 1 if scale == 1.0 else 2


# ---------------------------------------------------------------------------- students


def student(config: ml_collections.ConfigDict, problem: Problem, name: str) -> Student:
    """The student of that name: the teacher's trunk, adapters, and a head."""
    method, module = config.method, network(config, problem)
    channels, patch = problem.shape[-1], module.patch
    modes = method.modes if name in ("arcflow", "straight", "gaussian") else 1
    if name == "gaussian":
        policy, head = gaussian_policy(method.substeps), GaussianHead(modes, channels, patch)
    else:
        policy = momentum_policy(method.unit)
        head = MomentumHead(
            modes, channels, patch, tuple(method.log_gamma), curved=name == "arcflow"
        )
    scale = method.alpha / max(method.rank, 1)
    features = lora.adapt(functools.partial(module.apply, method="features"), scale)

    def trained(path):
        adapter = path.rpartition("/")[2] in ("lora_a", "lora_b")
        return adapter if method.rank else not path.startswith("output/")

    def init(key, frozen):
        k_head, k_noise, k_lora = jax.random.split(key, 3)
        params = frozen["teacher"]
        tokens = jnp.zeros((1, problem.shape[0] // patch, problem.shape[1] // patch))
        width = params["output"]["kernel"].shape[0]
        tokens = jnp.broadcast_to(tokens[..., None], (*tokens.shape, width))
        fresh = head.init(k_head, tokens)["params"]
        # One mode needs no noise to differ from others.
        heads = from_output(
            k_noise, fresh, params["output"], modes, noise=0.0 if modes == 1 else 0.05
        )
        if method.rank:
            # The head takes the place of the output layer.
            body = {name: layer for name, layer in params.items() if name != "output"}
            params = lora.add(k_lora, body, rank=method.rank, targets=method.targets)
        trunk = jax.tree.map(lambda x: x.astype(jnp.float32), lora.split(params, trained)[1])
        return {"trunk": trunk, "head": heads}

    def apply(trainable, frozen, x, t, label):
        params = lora.overlay(frozen["teacher"], trainable["trunk"])
        tokens = features({"params": params}, x, t, label)
        return head.apply({"params": trainable["head"]}, tokens)

    return Student(init, apply, policy)


def student_optimizer(
    config: ml_collections.ConfigDict, steps: int
) -> optax.GradientTransformation:
    """AdamW after clipping; the layer of the gammas, which is stiff, at a rate of its own."""
    method = config.method

    def adam(rate):
        schedule = optax.warmup_cosine_decay_schedule(
            1e-3 * rate, rate, _warmup(config, steps), steps, rate * method.rate_decay
        )
        return optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.0)

    def labels(trainable):
        return {
            part: {
                layer: jax.tree.map(lambda _, s=layer == "log_gammas": _SLOW if s else _PLAIN, leaf)
                for layer, leaf in layers.items()
            }
            for part, layers in trainable.items()
        }

    return optax.chain(
        optax.clip_by_global_norm(method.clip),
        optax.partition(
            {_PLAIN: adam(method.rate), _SLOW: adam(method.rate * method.gamma_rate)}, labels
        ),
    )


def _warmup(config, steps: int) -> int:
    """Steps in which the rate rises, and after which the moving average begins."""
    return min(config.method.warmup, steps // 2)


def build_method(
    config: ml_collections.ConfigDict, problem: Problem, name: str
) -> tuple[Method, Student]:
    """The training of a student, and the student.

    Raises:
        InputError: If the settings do not go together.
    """
    method = config.method
    made, (teacher, per_query) = student(config, problem, name), teacher_velocity(config, problem)
    steps = config.run.steps
    if name == "progressive":  # the rate falls in each round anew
        steps = -(-steps // max((method.first_calls // method.calls).bit_length() - 1, 1))
    tx = student_optimizer(config, steps)
    options = {
        "shift": config.shift,
        "teacher_calls": per_query,
        "ema_power": method.ema_power,
        "ema_from": _warmup(config, steps),
    }
    if name == "progressive":
        built = progressive(
            made,
            teacher,
            tx,
            batches=problem.batches(method.batch),
            data=problem.data,
            steps=config.run.steps,
            calls=method.calls,
            first_calls=method.first_calls,
            **options,
        )
        return _placed(config, built), made
    schedule = elastic(method.elastic) if method.elastic else fixed(method.calls, method.last)
    if method.from_data:
        source = from_data(problem.batches(method.batch), problem.data, schedule, config.shift)
    else:
        source = from_noise(problem.shape, method.batch, schedule, problem.num_classes)
    options |= {"source": source, "weight_by_length": not method.from_data}
    if name in ("endpoint", "endpoint_8x"):
        queries = method.queries * (8 if name == "endpoint_8x" else 1)
        built = endpoint_regression(made, teacher, tx, queries=queries, **options)
    else:
        built = arcflow(
            made,
            teacher,
            tx,
            queries=method.queries,
            window=method.window,
            teacher_steps=int(method.teacher_share * config.run.steps),
            drop=method.drop,
            **options,
        )
    return _placed(config, built), made


def _placed(config: ml_collections.ConfigDict, method: Method) -> Method:
    if not config.parallel.fully_sharded:
        return method
    return method._replace(specs=fully_sharded, frozen_specs=fully_sharded)
