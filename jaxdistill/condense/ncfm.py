"""NCFM: data-set distillation by matching characteristic functions of features.

Wang et al., "Dataset Distillation with Neural Characteristic Function: A Minmax Perspective"
(CVPR 2025, arXiv:2502.20653). Images descend, and the distribution of frequencies ascends, the
discrepancy between the characteristic functions of real and synthetic features.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from jaxdistill import collective
from jaxdistill.condense import charfn
from jaxdistill.condense.synthetic import (
    Budget,
    Factor,
    Features,
    ImagesByClass,
    Pixels,
    Rows,
    by_class,
    classes_a_pass,
    descended,
    distilled,
    in_microbatches,
    initial_pixels,
    longest,
    over_classes,
    present,
    real_needed,
    real_statistic,
    repeated,
    start_of,
    synthetic_outputs,
    synthetic_rows,
)
from jaxdistill.data.augment import parse
from jaxdistill.errors import InputError
from jaxdistill.keywords import Between, Count, Dtype, Fraction, Natural, Rate, Weight
from jaxdistill.method import CLASS_AXIS, BatchSpec, Method
from jaxdistill.nn.frequency_net import ReleasedSampleNet, ScaleNet
from jaxdistill.task import CondenseTask, Recipe

#: Factor of the published loss on the mean discrepancy.
LOSS_SCALE = 300.0

OBJECTIVES = ("gap", "excess", "ratio")

# Most rows whose phases at all frequencies exist at a time.
_ECF_ROWS = 1024


class NCFMState(NamedTuple):
    """Everything that changes during condensation.

    Attributes:
        step: Number of steps taken.
        pixels: Synthetic images (classes, ipc, H, W, C) in [0, 1].
        pixels_opt: State of the pixels' optimizer.
        sampler: Parameters of the distribution of frequencies.
        sampler_opt: State of the sampler's optimizer.
        tuned: The trained ends of the extractor pool when they are fine-tuned, else `()`.
    """

    step: Array
    pixels: Pixels
    pixels_opt: Any
    sampler: Any
    sampler_opt: Any
    tuned: Any


def pick_extractor(pool: Any, key: PRNGKeyArray) -> tuple[Any, Any, Array]:
    """Draws a network of the pool and a point on the line from its start to its trained end.

    Args:
        pool: `{"initial": params, "trained": params}`, each leaf stacked over networks.
        key: Key of the draw.

    Returns:
        The interpolated parameters, the trained ones, and the index of the network.
    """
    k_index, k_mix = jax.random.split(key)
    size = jax.tree.leaves(pool["trained"])[0].shape[0]
    index = jax.random.randint(k_index, (), 0, size)
    initial, trained = (jax.tree.map(lambda x: x[index], pool[k]) for k in ("initial", "trained"))
    mix = jax.random.uniform(k_mix)
    blend = jax.tree.map(lambda a, b: mix * a + (1 - mix) * b, initial, trained)
    return blend, trained, index


def check_objective(objective: str, alpha: float, beta: float) -> None:
    """Refuses an objective of the sampler that does not exist or has no floor to compare with.

    Raises:
        InputError: in these cases.
    """
    if objective not in OBJECTIVES:
        raise InputError(f"unknown objective {objective!r}; choose from {', '.join(OBJECTIVES)}")
    if objective != "gap" and alpha != beta:
        raise InputError(
            f"objective={objective!r} is only known for alpha = beta, not {alpha} and {beta};"
            " use objective='gap'"
        )


def ncfm(
    features: Features,
    logits: Callable[[Any, Float[Array, "b h w c"]], Float[Array, "b classes"]],
    optimizer: optax.GradientTransformation,
    sampler: charfn.FrequencySampler,
    sampler_optimizer: optax.GradientTransformation | None = None,
    *,
    normalize: Callable[[Array], Array],
    feature_dim: int,
    ipc: Budget,
    factor: int = 2,
    start: str = "tiled",
    pixels: Pixels | None = None,
    batch_real: int = 1024,
    num_freqs: int = 4096,
    alpha: float = 0.5,
    beta: float = 0.5,
    calibration: float = 0.0,
    finetune_learning_rate: float = 0.0,
    strategy: str = "color_crop_cutout",
    objective: str = "gap",
    ascent_steps: int = 1,
    warmup: int = 0,
    microbatch: int = 128,
    real_dtype: DTypeLike = jnp.float32,
) -> Method:
    """Builds the NCFM method.

    Its `frozen` argument is the extractor pool, `{"initial": params, "trained": params}` with
    each leaf stacked over networks.

    Args:
        features: `(params, normalized images) -> penultimate features`.
        logits: `(params, normalized images) -> logits`, used by calibration and fine-tuning.
        optimizer: Optimizer of the pixels (descent). It must act image by image, as Adam does and
            clipping by a global norm does not, where classes are split over devices.
        sampler: Distribution of the frequencies, see `jaxdistill.condense.charfn`.
        sampler_optimizer: Optimizer of the sampler (it is fed the negative gradient: ascent).
            Needed if the sampler has parameters.
        normalize: uint8 or [0, 1] images to normalized ones, see `data.augment.normalizer`.
        feature_dim: Length of a feature vector.
        ipc: Synthetic images of every class, or a tuple with those of each.
        factor: Tiles per side stored in each synthetic image.
        start: Initial images, see `initial_pixels`.
        pixels: Initial images given outright, instead of `start`.
        batch_real: Real images of each class per step.
        num_freqs: Frequencies per step, shared by the classes.
        alpha: Weight of the amplitude term.
        beta: Weight of the phase term.
        calibration: Weight of the cross-entropy of the synthetic images under the trained
            network. At 0 it costs nothing.
        finetune_learning_rate: SGD rate at which the chosen trained network of the pool follows the
            synthetic images, after each step. At 0 the pool is frozen.
        strategy: Siamese augmentation shared by the real and synthetic images of a class.
        objective: What the sampler maximises: `gap`, the discrepancy itself; `excess`, what
            exceeds the gap expected by chance of two samples of these sizes; `ratio`, the
            discrepancy over that expected gap.
        ascent_steps: Ascent steps of the sampler per descent step.
        warmup: Steps before the sampler begins to ascend.
        microbatch: Images in one pass of the network, on each device.
        real_dtype: The network's dtype on the real images, which takes no gradient; bfloat16 halves
            what its activations move. Features and all that follows are float32.

    Returns:
        A `Method`. Its output is a dict with `images` (classes, m, H, W, C), decoded, and
        `pixels` as stored.

    Raises:
        InputError: for settings that do not fit together.
    """
    check_objective(objective, alpha, beta)
    if min(batch_real, num_freqs, *(ipc if isinstance(ipc, tuple) else (ipc,))) < 1:
        raise InputError("ipc, batch_real and num_freqs must be at least 1")
    needed = 1 if pixels is not None else real_needed(start, longest(ipc), factor)
    probe = jax.eval_shape(lambda k: sampler.init(k, feature_dim), jax.random.key(0))
    learned = bool(jax.tree.leaves(probe))
    if learned and sampler_optimizer is None:
        raise InputError("a sampler with parameters needs sampler_optimizer, an optax optimizer")
    sampler_optimizer = sampler_optimizer or optax.identity()

    num_real, there = max(batch_real, needed), present(ipc, factor)

    def init(key, frozen, batch):
        k_pixels, k_sampler = jax.random.split(key)
        first = initial_pixels(
            k_pixels, batch["images"], ipc=ipc, factor=factor, start=start, pixels=pixels
        )
        params = sampler.init(k_sampler, feature_dim)
        return NCFMState(
            step=jnp.zeros((), jnp.int32),
            pixels=first,
            pixels_opt=optimizer.init(first),
            sampler=params,
            sampler_opt=sampler_optimizer.init(params),
            tuned=frozen["trained"] if finetune_learning_rate else (),
        )

    augmentation = {"normalize": normalize, "strategy": strategy}

    def classification_losses(params, pixels, keys):
        """The mean cross-entropy of each class."""
        out, rows = synthetic_outputs(
            logits,
            params,
            pixels,
            keys,
            factor=factor,
            microbatch=microbatch,
            there=there,
            **augmentation,
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(out, rows.labels)
        return rows.class_means(losses[:, None])[:, 0]

    def ascend(params, opt, real, syn, rows, key):
        """One ascent step on features that stay as they are."""

        def gain(params):
            freqs = sampler.draw(params, key, num_freqs, feature_dim)
            real_ecf = collective.mean(jax.lax.map(lambda f: charfn.ecf(f, freqs), real))
            syn_ecf = _synthetic_ecf(syn, freqs, rows)
            gap = charfn.discrepancy_at(real_ecf, syn_ecf, alpha=alpha, beta=beta)
            gap = collective.class_mean(gap.mean())
            if objective == "gap":
                return gap
            per_class = longest(ipc) * factor**2
            if there is not None:
                own = collective.class_ids(real_ecf.real.shape[0])
                per_class = jnp.asarray(there.sum(1, keepdims=True), jnp.float32)[own]
            floor = charfn.sampling_floor(real_ecf, num_real, per_class, alpha=alpha)
            floor = collective.class_mean(floor.mean())
            if objective == "excess":
                return gap - floor
            return gap / jnp.maximum(floor, 1e-6)

        value, grads = jax.value_and_grad(gain)(params)
        grads = collective.mean(collective.class_mean(grads))
        updates, opt = sampler_optimizer.update(jax.tree.map(jnp.negative, grads), opt, params)
        return optax.apply_updates(params, updates), opt, value

    def step(state, frozen, batch, key):
        k_net, k_freq, k_match, k_calib, k_ascent, k_tune = jax.random.split(key, 6)
        pool = {**frozen, "trained": state.tuned} if finetune_learning_rate else frozen
        blend, trained, index = pick_extractor(pool, k_net)
        real_images = batch["images"]
        classes = real_images.shape[0]
        match_keys, calib_keys = (collective.class_keys(k, classes) for k in (k_match, k_calib))
        freqs = jax.lax.stop_gradient(sampler.draw(state.sampler, k_freq, num_freqs, feature_dim))

        def statistic(real):
            real = charfn.normalize_rows(real)
            # Only an ascent looks at the features again.
            return charfn.ecf(real, freqs), real if learned else ()

        real_ecf, real = real_statistic(
            statistic,
            features,
            blend,
            real_images,
            match_keys,
            microbatch=microbatch,
            dtype=real_dtype,
            **augmentation,
        )
        real_ecf = collective.mean(real_ecf)

        def whole_classes(batch):
            syn = charfn.normalize_rows(features(blend, batch))
            by_class = syn.reshape(-1, longest(ipc) * factor**2, feature_dim)
            return charfn.ecf(by_class, freqs), syn if learned else ()

        def loss(pixels):
            # Whole classes at a time are of one size.
            group = 0 if there is not None else classes_a_pass(pixels, factor, microbatch)
            rows = synthetic_rows(
                pixels, match_keys, factor=factor, kept=not group, there=there, **augmentation
            )
            if group:  # the phases too are made anew for each pass
                syn_ecf, syn = over_classes(
                    whole_classes, pixels, match_keys, group, factor=factor, **augmentation
                )
            else:
                syn = in_microbatches(lambda part: features(blend, part), rows.images, microbatch)
                syn = charfn.normalize_rows(syn)
                syn_ecf = _synthetic_ecf(syn, freqs, rows)
            gap = charfn.discrepancy_at(real_ecf, syn_ecf, alpha=alpha, beta=beta)
            total = match = LOSS_SCALE * gap.mean(-1).sum()
            metrics = {"match": match / classes}
            if calibration:
                losses = classification_losses(trained, pixels, calib_keys)
                metrics["calibration"] = losses.mean()
                total += calibration * losses.sum()
            return total, (metrics, syn, rows)

        (_, (metrics, syn, rows)), grads = jax.value_and_grad(loss, has_aux=True)(state.pixels)
        new_pixels, pixels_opt = descended(optimizer, grads, state.pixels_opt, state.pixels)

        params, opt = state.sampler, state.sampler_opt
        if learned:

            def many(params, opt):
                for k in jax.random.split(k_ascent, ascent_steps):
                    params, opt, gain = ascend(params, opt, real, syn, rows, k)
                return params, opt, gain

            hold = lambda params, opt: (params, opt, jnp.zeros(()))  # noqa: E731
            params, opt, gain = jax.lax.cond(state.step >= warmup, many, hold, params, opt)
            metrics |= {"sampler_gain": gain, "freq_rms": jnp.sqrt(jnp.mean(jnp.square(freqs)))}

        tuned = state.tuned
        if finetune_learning_rate:
            keys = collective.class_keys(k_tune, classes)
            grads = jax.grad(lambda p: classification_losses(p, new_pixels, keys).mean())(trained)
            grads = collective.mean(collective.class_mean(grads))
            tuned = jax.tree.map(
                lambda t, g: t.at[index].add(-finetune_learning_rate * g), tuned, grads
            )
        state = NCFMState(state.step + 1, new_pixels, pixels_opt, params, opt, tuned)
        return state, metrics

    def output(state):
        return distilled(state.pixels, factor, ipc)

    return Method(init, step, output, BatchSpec("per_class", num_real), _specs)


def _synthetic_ecf(features: Array, freqs: Array, rows: Rows) -> charfn.ECF:
    """The characteristic function of each class, from this device's rows."""
    n = features.shape[0]
    parts = -(-n // _ECF_ROWS)
    if parts == 1:
        return collective.sum(charfn.ecf(features, freqs, rows.weights))
    # Equal blocks: to fill up the last of two might cost as much again.
    size = -(-n // parts)
    pad = parts * size - n
    blocks = jnp.pad(features, ((0, pad), (0, 0))).reshape(parts, size, -1)
    weights = jnp.pad(rows.weights, ((0, 0), (0, pad))).reshape(-1, parts, size)

    @jax.checkpoint
    def add(total, block):
        part = charfn.ecf(block[0], freqs, block[1])
        return jax.tree.map(jnp.add, total, part), None

    zeros = jnp.zeros((rows.weights.shape[0], freqs.shape[0]), features.dtype)
    total, _ = jax.lax.scan(add, charfn.ECF(zeros, zeros), (blocks, weights.swapaxes(0, 1)))
    return collective.sum(total)


def _specs(state: NCFMState, mesh: Mesh) -> NCFMState:
    """Images, and what their optimizer keeps of each, are split by class."""
    del mesh
    whole = jax.tree.map(lambda _: PartitionSpec(), state)
    return whole._replace(
        pixels=PartitionSpec(CLASS_AXIS),
        pixels_opt=by_class(state.pixels_opt, state.pixels.shape),
    )


def recipe(
    task: CondenseTask,
    *,
    ipc: ImagesByClass = 1,
    steps: Count = 20_000,
    factor: Factor = 2,
    start: str = "tiled",
    learning_rate: Rate = 0.02,
    learning_rate_decay: Fraction = 0.05,
    batch_real: Count = 1024,
    real_dtype: Dtype = "float32",
    strategy: str = "color_crop_cutout",
    num_freqs: Count = 4096,
    alpha: Weight = 0.5,
    beta: Weight = 0.5,
    calibration: Weight = 0.0,
    finetune_learning_rate: Rate = 0.0,
    sampler: Literal["gaussian", "learned", "released"] = "gaussian",
    freq_scale: Annotated[float, Between(1e-6, 1e6)] = 2.0,
    freq_spread: Annotated[float, Between(1, 1e6)] = 1.5,
    objective: Literal["ratio", "gap", "excess"] = "ratio",
    ascent_steps: Annotated[int, Between(1, 1000)] = 1,
    warmup: Natural = 100,
    sampler_learning_rate: Annotated[float, Between(0, 1e38)] = 3e-4,
    sampler_clip: Annotated[float, Between(1e-12, 1e12)] = 1.0,
) -> Recipe:
    """NCFM on the extractors of a task, with Adam on the pixels.

    Args:
        task: What it is for.
        ipc: Synthetic images of every class, or a tuple with those of each.
        steps: Length of the run.
        factor: Tiles per side that a synthetic image stores.
        start: `tiled`, `random`, `noise`, or the path of a `distilled.npz`.
        learning_rate: The pixels' learning rate.
        learning_rate_decay: The last learning rate over the first, by a cosine.
        batch_real: Real images of each class in a step.
        real_dtype: The network's dtype on the real images. Accelerators wait for memory there; CPUs
            gain nothing.
        strategy: Siamese augmentation; see `jaxdistill.data.augment`.
        num_freqs: Frequencies in a step.
        alpha: Weight of the amplitude term.
        beta: Weight of the phase term.
        calibration: Weight of the cross-entropy under the trained extractor.
        finetune_learning_rate: The extractors' learning rate on the synthetic images; at 0
            they are frozen.
        sampler: The distribution of the frequencies: `gaussian`; `learned`, a mixture of scales;
            `released`, the network of the published code.
        freq_scale: Standard deviation of the Gaussian frequencies.
        freq_spread: A learned scale stays within `freq_scale` over and times this.
        objective: What a learned sampler maximises; see `ncfm`.
        ascent_steps: Steps of the sampler in one of the images.
        warmup: Steps before the sampler begins.
        sampler_learning_rate: The sampler's learning rate.
        sampler_clip: Global norm that its gradients are clipped to.

    Raises:
        InputError: If the settings do not fit each other or the task.
    """
    parse(strategy)
    net = task.network
    distribution, sampler_optimizer = _sampler(sampler, freq_scale, freq_spread), None
    if sampler != "gaussian":
        sampler_optimizer = optax.chain(
            optax.clip_by_global_norm(sampler_clip), optax.adam(sampler_learning_rate)
        )
    method = ncfm(
        net.features,
        net.logits,
        optax.adam(optax.cosine_decay_schedule(learning_rate, steps, learning_rate_decay)),
        distribution,
        sampler_optimizer,
        normalize=task.normalize,
        feature_dim=net.feature_dim,
        ipc=ipc,
        factor=factor,
        start=start,
        pixels=start_of(task, start=start, ipc=ipc, factor=factor, batch_real=batch_real),
        batch_real=batch_real,
        num_freqs=num_freqs,
        alpha=alpha,
        beta=beta,
        calibration=calibration,
        finetune_learning_rate=finetune_learning_rate,
        strategy=strategy,
        objective=objective,
        ascent_steps=ascent_steps,
        warmup=warmup,
        microbatch=task.microbatch,
        real_dtype=real_dtype,
    )
    rates = ("learning_rate", "sampler_learning_rate", "finetune_learning_rate")
    note = repeated(task, batch_real)
    return Recipe(method, steps, task.extractors, rates, note=note)


def _sampler(name: str, scale: float, spread: float) -> charfn.FrequencySampler:
    if name == "gaussian":
        return charfn.gaussian(scale)
    net = {"learned": ScaleNet(), "released": ReleasedSampleNet()}[name]
    functions = (
        lambda key, dim: net.init(key, jnp.zeros((2, dim)))["params"],
        lambda params, noise: net.apply({"params": params}, noise),
    )
    if name == "released":
        return charfn.direct(*functions)
    return charfn.scale_mixture(*functions, scale=scale, spread=spread)
