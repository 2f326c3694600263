"""NCFM: data-set distillation by matching characteristic functions of features.

Wang et al., "Dataset Distillation with Neural Characteristic Function: A Minmax Perspective"
(CVPR 2025, arXiv:2502.20653). Images descend, and the law of frequencies ascends, the
discrepancy between the characteristic functions of real and synthetic features.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from jaxdistill import collective
from jaxdistill.condense import charfn
from jaxdistill.condense.synthetic import (
    Features,
    Pixels,
    Rows,
    by_class,
    classes_a_pass,
    decoded,
    in_chunks,
    initial_pixels,
    over_classes,
    real_needed,
    real_statistic,
    synthetic_outputs,
    synthetic_rows,
)
from jaxdistill.errors import InputError
from jaxdistill.method import CLASS_AXIS, BatchSpec, Method

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
        pixels_opt: State of the pixels' optimiser.
        sampler: Parameters of the law of frequencies.
        sampler_opt: State of the sampler's optimiser.
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
    images_tx: optax.GradientTransformation,
    sampler: charfn.FrequencySampler,
    sampler_tx: optax.GradientTransformation | None = None,
    *,
    prepare: Callable[[Array], Array],
    feature_dim: int,
    ipc: int,
    factor: int = 2,
    start: str = "tiled",
    pixels: Pixels | None = None,
    batch_real: int = 1024,
    num_freqs: int = 4096,
    alpha: float = 0.5,
    beta: float = 0.5,
    calibration: float = 0.0,
    finetune_rate: float = 0.0,
    strategy: str = "color_crop_cutout",
    objective: str = "gap",
    ascent_steps: int = 1,
    warmup: int = 0,
    chunk: int = 128,
    real_dtype: DTypeLike = jnp.float32,
) -> Method:
    """Builds the NCFM method.

    Its `frozen` argument is the extractor pool, `{"initial": params, "trained": params}` with
    each leaf stacked over networks.

    Args:
        features: `(params, normalised images) -> penultimate features`.
        logits: `(params, normalised images) -> logits`, used by calibration and fine-tuning.
        images_tx: Optimiser of the pixels (descent). It must act image by image, as Adam does and
            clipping by a global norm does not, where classes are split over devices.
        sampler: Law of the frequencies, see `jaxdistill.condense.charfn`.
        sampler_tx: Optimiser of the sampler (it is fed the negative gradient: ascent). Needed
            if the sampler has parameters.
        prepare: uint8 or [0, 1] images to normalised ones, see `data.augment.normalizer`.
        feature_dim: Length of a feature vector.
        ipc: Synthetic images per class.
        factor: Tiles per side stored in each synthetic image.
        start: Initial images, see `initial_pixels`.
        pixels: Initial images given outright, instead of `start`.
        batch_real: Real images of each class per step.
        num_freqs: Frequencies per step, shared by the classes.
        alpha: Weight of the amplitude term.
        beta: Weight of the phase term.
        calibration: Weight of the cross-entropy of the synthetic images under the trained
            network. At 0 it costs nothing.
        finetune_rate: SGD rate at which the chosen trained network of the pool follows the
            synthetic images, after each step. At 0 the pool is frozen.
        strategy: Siamese augmentation shared by the real and synthetic images of a class.
        objective: What the sampler maximises: `gap`, the discrepancy itself; `excess`, what
            exceeds the gap expected by chance of two samples of these sizes; `ratio`, the
            discrepancy over that expected gap.
        ascent_steps: Ascent steps of the sampler per descent step.
        warmup: Steps before the sampler begins to ascend.
        chunk: Images in one pass of the network, on each device.
        real_dtype: Of the network on the real images, which takes no gradient; bfloat16 halves
            what its activations move. Features and all that follows are float32.

    Returns:
        A `Method`. Its output is a dict with `images` (classes, m, H, W, C), decoded, and
        `pixels` as stored.

    Raises:
        InputError: for settings that do not fit together.
    """
    check_objective(objective, alpha, beta)
    if batch_real < 1 or ipc < 1 or num_freqs < 1:
        raise InputError("ipc, batch_real and num_freqs must be at least 1")
    needed = 1 if pixels is not None else real_needed(start, ipc, factor)
    probe = jax.eval_shape(lambda k: sampler.init(k, feature_dim), jax.random.key(0))
    learned = bool(jax.tree.leaves(probe))
    if learned and sampler_tx is None:
        raise InputError("a sampler with parameters needs sampler_tx, an optax optimiser")
    sampler_tx = sampler_tx or optax.identity()

    num_real = max(batch_real, needed)

    def init(key, frozen, batch):
        k_pixels, k_sampler = jax.random.split(key)
        first = initial_pixels(k_pixels, batch, ipc=ipc, factor=factor, start=start, pixels=pixels)
        params = sampler.init(k_sampler, feature_dim)
        return NCFMState(
            step=jnp.zeros((), jnp.int32),
            pixels=first,
            pixels_opt=images_tx.init(first),
            sampler=params,
            sampler_opt=sampler_tx.init(params),
            tuned=frozen["trained"] if finetune_rate else (),
        )

    augmentation = {"prepare": prepare, "strategy": strategy}

    def classification_losses(params, pixels, keys):
        """The mean cross-entropy of each class."""
        out, rows = synthetic_outputs(
            logits, params, pixels, keys, factor=factor, chunk=chunk, **augmentation
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
            per_class = ipc * factor**2
            floor = charfn.sampling_floor(real_ecf, num_real, per_class, alpha=alpha)
            floor = collective.class_mean(floor.mean())
            if objective == "excess":
                return gap - floor
            return gap / jnp.maximum(floor, 1e-6)

        value, grads = jax.value_and_grad(gain)(params)
        grads = collective.mean(collective.class_mean(grads))
        updates, opt = sampler_tx.update(jax.tree.map(jnp.negative, grads), opt, params)
        return optax.apply_updates(params, updates), opt, value

    def step(state, frozen, batch, key):
        k_net, k_freq, k_match, k_calib, k_ascent, k_tune = jax.random.split(key, 6)
        pool = {**frozen, "trained": state.tuned} if finetune_rate else frozen
        blend, trained, index = pick_extractor(pool, k_net)
        classes = batch.shape[0]
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
            batch,
            match_keys,
            chunk=chunk,
            dtype=real_dtype,
            **augmentation,
        )
        real_ecf = collective.mean(real_ecf)

        def whole_classes(batch):
            syn = charfn.normalize_rows(features(blend, batch))
            by_class = syn.reshape(-1, ipc * factor**2, feature_dim)
            return charfn.ecf(by_class, freqs), syn if learned else ()

        def loss(pixels):
            group = classes_a_pass(pixels, factor, chunk)
            rows = synthetic_rows(pixels, match_keys, factor=factor, kept=not group, **augmentation)
            if group:  # the phases too are made anew for each pass
                syn_ecf, syn = over_classes(
                    whole_classes, pixels, match_keys, group, factor=factor, **augmentation
                )
            else:
                syn = in_chunks(lambda part: features(blend, part), rows.images, chunk)
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
        updates, pixels_opt = images_tx.update(
            collective.mean(grads), state.pixels_opt, state.pixels
        )
        new_pixels = jnp.clip(optax.apply_updates(state.pixels, updates), 0.0, 1.0)

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
        if finetune_rate:
            keys = collective.class_keys(k_tune, classes)
            grads = jax.grad(lambda p: classification_losses(p, new_pixels, keys).mean())(trained)
            grads = collective.mean(collective.class_mean(grads))
            tuned = jax.tree.map(lambda t, g: t.at[index].add(-finetune_rate * g), tuned, grads)
        state = NCFMState(state.step + 1, new_pixels, pixels_opt, params, opt, tuned)
        return state, metrics

    def output(state):
        # Bilinear weights may sum to a hair above one.
        images = jnp.clip(decoded(state.pixels, factor), 0.0, 1.0)
        return {"images": images, "pixels": state.pixels}

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
    """Images, and what their optimiser keeps of each, are split by class."""
    del mesh
    whole = jax.tree.map(lambda _: PartitionSpec(), state)
    return whole._replace(
        pixels=PartitionSpec(CLASS_AXIS),
        pixels_opt=by_class(state.pixels_opt, state.pixels.shape),
    )
