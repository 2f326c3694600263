"""GenRecal: a teacher's head reads what a student makes of the question.

Lee et al., "GenRecal: Generation after Recalibration from Large to Small Vision-Language Models"
(arXiv 2506.15681). The student's states of image and question are followed by the teacher's states
of the answer; a small network brings both to where the teacher's frozen head can read them, and its
logits are held against the answer and against the teacher's own. Labels and logits are the
teacher's, so the tokenizers never have to be brought together.

What the paper leaves open is a setting with its default, or decided; `docs/genrecal.md` says which.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key, PRNGKeyArray, PyTree

from jaxdistill import collective
from jaxdistill.errors import InputError
from jaxdistill.keywords import Between, Fraction, Natural, Rate, Weight, grouped
from jaxdistill.method import Batch, BatchSpec, Frozen, Method
from jaxdistill.nn.recalibrator import Recalibrator
from jaxdistill.task import Aside, Language, Recipe, VLMTask
from jaxdistill.vlm import staged, supervised
from jaxdistill.vlm.diagnosis import diagnosis
from jaxdistill.vlm.losses import cross_entropy, forward_kl
from jaxdistill.vlm.pairs import (
    States,
    TokenisedPair,
    answer_entropy,
    by_slots,
    predicting,
    states,
    teacher_states,
)
from jaxdistill.vlm.staged import Pace, Stage
from jaxdistill.vlm.supervised import mean

_RECALIBRATOR = "recalibrator"  # a part beside those of the student
_HIDING = 0x68696465  # a number that splitting an example's key does not fold into it

Regularizer = Literal["both", "none", "kl", "ce", "mse"]
"""Cross-entropy and KL of the recalibrated teacher's prefix; nothing; one of the two; or the square
distance of recalibrated states from the teacher's (the paper's table 13)."""


class Recalibration(NamedTuple):
    """What is learned of the teacher.

    Attributes:
        depth: Blocks of the Recalibrator.
        norm: `layer` or `rms`, of what comes out of it, or `none` (A3).
        start: Whether its blocks start `fresh`, or as copies of the student's `last` (A2).
        positions: Whether states of the answer have `new` positions, behind the prefix that stands
            there, or have `kept` those that they had behind the teacher's.
        boundary: Whether the last state of the question predicts the first token of the answer
            (`include`), or nothing does (`exclude`) (A4). It alone has to come from the student.
        first: Weight of that first token over that of each later one, in `ce` and `kl`.
        reads: What the Recalibrator reads of an answer: the teacher's `states`, which have seen the
            question and can be copied, or embeddings of its `tokens` alone, so that all else has to
            come from the prefix.
        hide: Part of the teacher's states of an answer that the Recalibrator does not see, drawn
            anew at each step, so that it has to read the prefix.
        mean: Of `ce` and `kl`, over all `tokens` of a batch, or over the means of its `examples`
            (A5).
        regularizer: What else is learned while the Recalibrator is alone; see `Regularizer`.
        regularize_later: Whether that goes on while the student is trained (A8).
        ce: Weight of the cross-entropy of the recalibrated logits, in the regularizer too.
        kl: Weight of their divergence from the teacher's, in the regularizer too.
        sft: Weight of the student's own cross-entropy in the second stage.
        contrast: Weight of `contrast`, which tells the examples of a batch apart by their prefixes,
            in the first two stages.
        train_recalibrator: Whether the Recalibrator is trained in the second stage too (A6).
        train_embedding: Whether the student's embeddings and head are, in the second stage (A7).
        train_projector: Whether the student's projector is, in the second stage (A7).
        train_vision: Whether its image encoder is, in the second and the third (A7).
    """

    depth: Annotated[int, Between(1, 100)] = 2
    norm: Literal["layer", "rms", "none"] = "layer"
    start: Literal["fresh", "last"] = "fresh"
    positions: Literal["new", "kept"] = "new"
    boundary: Literal["include", "exclude"] = "include"
    first: Weight = 1.0
    reads: Literal["states", "tokens"] = "states"
    hide: Fraction = 0.0
    mean: Literal["tokens", "examples"] = "tokens"
    regularizer: Regularizer = "both"
    regularize_later: bool = False
    ce: Weight = 1.0
    kl: Weight = 1.0
    sft: Weight = 1.0
    contrast: Weight = 0.0
    train_recalibrator: bool = True
    train_embedding: bool = False
    train_projector: bool = False
    train_vision: bool = False


class Stages(NamedTuple):
    """The lengths and rates of the three stages: alignment, distillation, fine-tuning.

    Attributes:
        align: Steps in which the Recalibrator is trained alone.
        distil: Steps in which the student is trained through it.
        tune: Steps in which the student is trained without it.
        align_rate_scale: The learning rate of the first stage over that of the second, which is
            `Pace.learning_rate`.
        tune_rate_scale: That of the third stage over it.
    """

    align: Natural = 700
    distil: Natural = 1300
    tune: Natural = 700
    align_rate_scale: Rate = 2.0
    tune_rate_scale: Rate = 0.5


class GenRecalState(NamedTuple):
    """What changes.

    Attributes:
        student: The student's parameters.
        recalibrator: The Recalibrator's.
        opt: The optimizer's state, of both.
        step: Steps done, of all stages.
    """

    student: PyTree
    recalibrator: PyTree
    opt: PyTree
    step: Int32[Array, ""]


Recalibrate = Callable[..., tuple[Array, Array]]
"""`(params, prefix, prefix_there, answer, answer_there, *, prefix_from_teacher)`; see
`jaxdistill.nn.recalibrator.Recalibrator`."""


class Losses(NamedTuple):
    """What a recalibrated prefix is worth, each loss as a sum over tokens and their number.

    Attributes:
        ce: Cross-entropy of the answer in the teacher's tokens.
        kl: KL(teacher's own logits || recalibrated ones).
        mse: Square distance of the recalibrated states from the teacher's, a number a state.
        prefix: The mean recalibrated state of image and question (b, d).
    """

    ce: tuple[Array, Array]
    kl: tuple[Array, Array]
    mse: tuple[Array, Array]
    prefix: Float[Array, "b d"]


def recalibrated_losses(
    recalibrate: Recalibrate,
    params: PyTree,
    head: Callable[[Float[Array, "b a d"]], Float[Array, "b a v"]],
    student: States,
    teacher: States,
    answer: Any,
    *,
    own_prefix: bool,
    reads: Float[Array, "b a d"] | None = None,
    weights: Float[Array, "b a"] | None = None,
    slots: int = 0,
    **options: Any,
) -> Losses:
    """Algorithms 1 to 3 of the paper for one prefix.

    Args:
        recalibrate: The Recalibrator.
        params: Its parameters.
        head: The teacher's frozen head.
        student: The student's states.
        teacher: The teacher's.
        answer: Ids of the answer under the teacher's tokenizer (b, a).
        own_prefix: Whether the prefix is the teacher's own, as in the regularizer.
        reads: What the Recalibrator reads of the answer; by default the teacher's states.
        weights: Of each token of the answers; by default all that are there weigh alike.
        slots: Tokens of an answer whose logits are there at a time; 0 for all.
        **options: What else `recalibrate` is given.
    """
    source = teacher if own_prefix else student
    prefix, made = recalibrate(
        params,
        source.prefix,
        source.prefix_there,
        teacher.answer if reads is None else reads,
        teacher.answer_there,
        prefix_from_teacher=own_prefix,
        **options,
    )
    there = teacher.answer_there
    weights = there.astype(jnp.float32) if weights is None else weights

    def of_tokens(hidden, known, tokens, there):
        logits, own = head(hidden), head(known)
        each = lambda loss: jax.vmap(jax.vmap(loss))  # noqa: E731
        return each(cross_entropy)(tokens, logits, there)[0], each(forward_kl)(own, logits, there)[
            0
        ]

    by_token = by_slots(
        of_tokens,
        slots,
        predicting(prefix, source.prefix_there, made),
        predicting(teacher.prefix, teacher.prefix_there, teacher.answer),
        answer,
        there,
    )
    ce, kl = ((jnp.sum(x * weights), jnp.sum(weights)) for x in by_token)
    far = jnp.square(made - teacher.answer).mean(-1)
    if own_prefix:
        ends = jnp.square(prefix - teacher.prefix).mean(-1)
        far = jnp.concatenate([ends, far], axis=1)
        seen = jnp.concatenate([teacher.prefix_there, teacher.answer_there], axis=1)
    else:
        seen = teacher.answer_there
    square = jnp.sum(jnp.where(seen, far, 0.0)), jnp.sum(seen, dtype=jnp.float32)
    held = source.prefix_there[..., None]
    return Losses(ce, kl, square, jnp.where(held, prefix, 0.0).sum(1) / held.sum(1))


def contrast(
    student: Float[Array, "b d"], teacher: Float[Array, "b d"], temperature: float = 0.1
) -> tuple[Array, Array]:
    """InfoNCE of van den Oord et al. (arXiv 1807.03748), both ways, by the cosine.

    Args:
        student: A vector of each example; on several devices, of this one's.
        teacher: Vectors of the same examples.
        temperature: By which cosines are divided.

    Returns:
        The sum over the examples, and their number. Others are all those of the batch.
    """
    mine = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (student, teacher)]
    every = collective.whole_batch(mine, 0)
    places = collective.share()[0] * len(student) + jnp.arange(len(student))
    value = sum(
        -jnp.take_along_axis(
            jax.nn.log_softmax(own @ others.T / temperature), places[:, None], 1
        ).sum()
        for own, others in zip(mine, reversed(every), strict=True)
    )
    return value / 2, jnp.float32(len(student))


def genrecal(
    student: Language,
    teacher: Language,
    recalibrate: Recalibrate,
    init: Callable[[PRNGKeyArray, Frozen, TokenisedPair], tuple[PyTree, PyTree]],
    *,
    parts: Callable[[PyTree], PyTree],
    recalibration: Recalibration,
    stages: Stages,
    pace: Pace,
    batches: BatchSpec,
    pair: Callable[[Batch], TokenisedPair],
) -> Method:
    """The three stages as one run.

    Args:
        student: The small model.
        teacher: The large one, whose parameters are `frozen["teacher"]`.
        recalibrate: The Recalibrator.
        init: `(key, frozen, pair) -> (student's parameters, Recalibrator's)`.
        parts: The student's parameters -> a tree like them of `vision`, `projector`, `embedding`
            or `body`: what each belongs to.
        recalibration: What is learned.
        stages: How long, and how fast.
        pace: What the stages share; its warm-up and clipping are A9.
        batches: What a step is fed.
        pair: What is made of a batch.

    Raises:
        InputError: If all stages are empty, or nothing is learned of the teacher.
    """
    r, lengths = recalibration, {n: getattr(stages, n) for n in ("align", "distil", "tune")}
    staged.check_lengths(lengths)
    if stages.align + stages.distil and not (r.ce or r.kl):
        raise InputError("method.ce and method.kl are both 0; give one of them, or take supervised")
    if r.boundary == "exclude" and r.first != 1:
        raise InputError(
            "method.first weighs the first token, which method.boundary=exclude leaves out; leave "
            "it at 1"
        )
    later = [name for name in ("embedding", "projector", "vision") if getattr(r, f"train_{name}")]
    if r.train_recalibrator:
        later.append(_RECALIBRATOR)
    tuned = ("body", "embedding", "projector", *(["vision"] if r.train_vision else []))
    scales = (stages.align_rate_scale, 1.0, stages.tune_rate_scale)
    trained = ((_RECALIBRATOR,), ("body", *later), tuned)
    plan = [Stage(*one) for one in zip(lengths.values(), scales, trained, strict=True)]

    def make(key, frozen, batch):
        params = init(key, frozen, pair(batch))
        return GenRecalState(*params, staged.optimizer(pace).init(params), jnp.int32(0))

    def step(state, frozen, batch, key):
        del key
        examples = collective.by_example(pair(batch))
        params = state.student, state.recalibrator
        branches = [_stage(i, frozen, examples) for i in range(3)]
        params, opt, metrics = staged.advance(plan, pace, branches, params, state.opt, state.step)
        return GenRecalState(*params, opt, state.step + 1), metrics

    def _held(number, params):
        small, recalibrator = params
        of_recalibrator = jax.tree.map(lambda _: _RECALIBRATOR, recalibrator)
        return staged.held(params, (parts(small), of_recalibrator), plan[number])

    def _stage(number, frozen, examples):
        def loss(params, nudge):
            small, recalibrator = _held(number, params)
            names = ("ce", "kl", "sft", "regularizer", *(["contrast"] if r.contrast else []))
            metrics = dict.fromkeys(names, jnp.float32(0))
            value = jnp.float32(0)
            own = states(student, small, examples.images, examples.student)
            if number > 0:
                predicted = predicting(own.prefix, own.prefix_there, own.answer)
                entropy = answer_entropy(student, small, predicted + nudge.answer, examples.student)
                metrics["sft"] = mean(entropy)
                value += metrics["sft"] * (r.sft if number == 1 else 1.0)
            if number < 2:
                base = jax.lax.stop_gradient(frozen["teacher"])
                theirs = teacher_states(teacher, base, examples)
                own = own._replace(prefix=own.prefix + nudge.prefix)

                def behind(own_prefix):
                    return recalibrated_losses(
                        recalibrate,
                        recalibrator,
                        lambda hidden: teacher.head(base, hidden),
                        own,
                        theirs,
                        examples.teacher.answer,
                        own_prefix=own_prefix,
                        reads=_read(teacher, base, theirs, examples, r),
                        weights=_weights(theirs.answer_there, r),
                        slots=teacher.slots,
                        **_seen(theirs, examples.keys, r),
                    )

                found = behind(False)
                metrics["ce"], metrics["kl"] = mean(found.ce), mean(found.kl)
                value += r.ce * metrics["ce"] + r.kl * metrics["kl"]
                regularized = r.regularizer != "none" and (number == 0 or r.regularize_later)
                more = behind(True) if regularized or r.contrast else None
                if r.contrast:
                    metrics["contrast"] = mean(contrast(found.prefix, more.prefix))
                    value += r.contrast * metrics["contrast"]
                if regularized:
                    terms = {
                        "both": (r.ce * mean(more.ce), r.kl * mean(more.kl)),
                        "ce": (r.ce * mean(more.ce),),
                        "kl": (r.kl * mean(more.kl),),
                        "mse": (mean(more.mse),),
                    }[r.regularizer]
                    metrics["regularizer"] = sum(terms)
                    value += metrics["regularizer"]
            metrics["loss"] = value
            return value, metrics

        def gradients(params):
            grads, metrics = jax.grad(loss, (0, 1), has_aux=True)(params, still)
            reaches = dict(zip(("student_grad", "sft_grad"), map(_norm, grads[1]), strict=True))
            return grads[0], metrics | reaches

        # Zeros at the student's states, to see what gradient comes to them.
        side, width = examples.student, student.width
        length = student.image_tokens + side.question.shape[1]
        shapes = (len(side.answer), length, width), (*side.answer.shape, width)
        still = _Nudge(*map(jnp.zeros, shapes))
        return gradients

    return Method(make, step, lambda state: state.student, batches)


def _read(
    teacher: Language, params: PyTree, made: States, pair: TokenisedPair, r: Recalibration
) -> Float[Array, "b a d"]:
    """What the Recalibrator reads of the answers."""
    if r.reads == "states":
        return made.answer
    return teacher.embed(params, pair.teacher.answer)


def _weights(there: Bool[Array, "b a"], r: Recalibration) -> Float[Array, "b a"]:
    """What each token of the answers weighs."""
    first = 0.0 if r.boundary == "exclude" else r.first
    weights = there.astype(jnp.float32).at[:, 0].multiply(first)
    if r.mean == "examples":
        weights = weights / jnp.maximum(weights.sum(1, keepdims=True), 1e-6)
    return weights


def _seen(teacher: States, keys: Key[Array, " b"] | None, r: Recalibration) -> dict[str, Any]:
    """What the Recalibrator is told beside the states."""
    told = {}
    if r.positions == "kept":
        told["answer_starts"] = teacher.prefix_there.sum(1, dtype=jnp.int32)
    if r.hide:
        own = jax.vmap(lambda key: jax.random.fold_in(key, _HIDING))(keys)
        length = teacher.answer_there.shape[1]
        told["hidden"] = jax.vmap(lambda key: jax.random.bernoulli(key, r.hide, (length,)))(own)
    return told


class _Nudge(NamedTuple):
    """What is added to the student's states: where the Recalibrator reads them, and its head."""

    prefix: Array
    answer: Array


def _norm(grads: Array) -> Array:
    """The norm over the examples of all devices; see `supervised.mean` for its scale on each."""
    devices = collective.sum(jnp.float32(1))
    return jnp.sqrt(collective.sum(jnp.square(grads).sum())) / devices


def recipe(task: VLMTask, **rest: Annotated[Any, Recalibration, Stages, Pace]) -> Recipe:
    """A student that is taught through a Recalibrator.

    Args:
        task: What it is for.
        **rest: Settings of `Recalibration`, `Stages` and `Pace`.

    Raises:
        InputError: If the settings do not fit each other.
    """
    recalibration, stages, pace = grouped(rest, Recalibration, Stages, Pace)
    student, teacher = task.student_model, task.teacher_model
    module = Recalibrator(
        student.block,
        teacher.width,
        recalibration.depth,
        recalibration.norm,
        recalibration.hide > 0,
    )

    stacked = jax.tree.leaves(task.start.shapes["student"].get("body", {}))
    there = min((x.shape[0] for x in stacked), default=0)
    if recalibration.start == "last" and there < module.depth:
        raise InputError(
            f"method.start=last copies the student's last {module.depth} blocks, and it has "
            f"{there}; set method.depth lower, or method.start=fresh"
        )

    def recalibrate(params, *args, **options):
        return module.apply({"params": params}, *args, **options)

    def init(key, frozen, pair):
        small = supervised.begun(frozen)
        own = states(student, small, pair.images[:1], pair.student.first())
        theirs = states(teacher, frozen["teacher"], pair.images[:1], pair.teacher.first())
        made = module.init(key, own.prefix, own.prefix_there, theirs.answer, theirs.answer_there)[
            "params"
        ]
        if recalibration.start == "last":
            made["body"] = jax.tree.map(lambda x: x[-recalibration.depth :], small["body"])
        return small, jax.tree.map(lambda x: x.astype(jnp.float32), made)

    method = genrecal(
        student,
        teacher,
        recalibrate,
        init,
        parts=functools.partial(staged.parts_of, student),
        recalibration=recalibration,
        stages=stages,
        pace=pace,
        batches=task.batches(pace.batch_size),
        pair=task.pair,
    )

    def diagnose(output, recalibrator, frozen, pair):
        base = frozen["teacher"]
        theirs = teacher_states(teacher, base, pair)
        told = _seen(theirs, None, recalibration._replace(hide=0.0))
        return diagnosis(
            functools.partial(recalibrate, recalibrator, **told),
            functools.partial(teacher.head, base),
            states(student, output, pair.images, pair.student),
            theirs,
            pair.teacher.answer,
            _read(teacher, base, theirs, pair, recalibration),
        )

    made = supervised.made(task, method, stages.align + stages.distil + stages.tune)
    aside = Aside(lambda state: state.recalibrator, diagnose)
    return made._replace(examples=task.read, aside=aside)
