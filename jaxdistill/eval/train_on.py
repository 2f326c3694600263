"""Trains networks from scratch and measures them: the judge of every distilled set.

The last epoch counts. No checkpoint, rate or length is chosen on test data.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt8

from jaxdistill.data.augment import augment
from jaxdistill.interrupt import ShouldStop, never, wait

# Launches of a training, between which its progress is seen and it can be stopped.
_BLOCKS = 20
# Images of a training set by which a network is known to be lost.
_LOOKED_AT = 64


class Protocol(NamedTuple):
    """How a fresh network is trained.

    The defaults are the hard-label protocol of the dataset-distillation literature (Zhao, Mopuri
    and Bilen 2021; Zhao and Bilen 2021): SGD with momentum, one tenfold decay half way at which
    the momentum starts anew, one DSA operation per step.

    Attributes:
        epochs: Passes over the set; the network is measured after the last.
        batch: Images per step; the whole set if it is smaller.
        rate: Learning rate.
        momentum: Momentum of SGD.
        weight_decay: L2 coefficient, added to the gradient.
        strategy: DSA operations, see `jaxdistill.data.augment`.
        decay_at: Fractions of the training at which the rate falls tenfold, down to whole epochs
            but never in the first.
    """

    epochs: int = 1000
    batch: int = 256
    rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    strategy: str = "color_crop_cutout_flip_scale_rotate"
    decay_at: tuple[float, ...] = (0.5,)


class Network(NamedTuple):
    """A network as two functions: `init(key) -> params`, `logits(params, images) -> logits`."""

    init: Callable[[PRNGKeyArray], Any]
    logits: Callable[[Any, Float[Array, "b h w c"]], Float[Array, "b classes"]]


Loss = Callable[[Float[Array, "n classes"], Float[Array, "n classes"]], Float[Array, " n"]]
"""`(logits, targets) -> loss` of each image."""


def squares(logits: Float[Array, "n classes"], targets: Float[Array, "n classes"]) -> Array:
    """Half the squared distance, for labels that are no probabilities."""
    return 0.5 * jnp.square(logits - targets).sum(-1)


def optimizer(protocol: Protocol) -> optax.GradientTransformation:
    """SGD with L2 and momentum; the rate is applied by the caller, as it changes per stage."""
    return optax.chain(
        optax.add_decayed_weights(protocol.weight_decay), optax.trace(protocol.momentum)
    )


class _Carry(NamedTuple):
    """What changes while networks are trained; every leaf has a leading axis of networks."""

    params: Any
    momentum: Any


_SEED_AXIS = "seed"


@functools.partial(
    jax.jit,
    static_argnames=("network", "protocol", "normalize", "loss", "microbatch", "mesh"),
    donate_argnames="carry",
)
def _train_block(
    carry,
    keys,
    images,
    targets,
    rate,
    first,
    count,
    *,
    mesh,
    **options,
):
    """`count` optimizer steps from the `first` of a stage, of all networks; one program."""
    steps = functools.partial(_train_steps, **options)

    def local(carry, keys, *args):
        if keys.shape[0] == 1:  # A mapped convolution is another one, and slow on a CPU.
            one = jax.tree.map(lambda x: x[0], (carry, keys))
            return jax.tree.map(lambda x: x[None], steps(*one, *args))
        return jax.vmap(lambda carry, key: steps(carry, key, *args))(carry, keys)

    own, whole = PartitionSpec(_SEED_AXIS), PartitionSpec()
    return jax.shard_map(
        local, mesh=mesh, in_specs=(own, own) + (whole,) * 5, out_specs=own, check_vma=False
    )(carry, keys, images, targets, rate, first, count)


@functools.partial(jax.jit, static_argnames="network")
def _initial(keys, *, network):
    return lax.map(network.init, keys)


def _train_steps(
    carry,
    key,
    images,
    targets,
    rate,
    first,
    count,
    *,
    network,
    protocol,
    normalize,
    loss,
    microbatch,
):
    """`count` optimizer steps of one network."""
    n = images.shape[0]
    batch = min(protocol.batch, n)
    tx = optimizer(protocol)
    per_epoch = -(-n // batch)

    def step(i, carry):
        params, opt = carry
        epoch, position = i // per_epoch, i % per_epoch
        k_epoch = jax.random.fold_in(key, epoch)
        k_order, k_augment = jax.random.split(k_epoch)
        if batch >= n:
            x, y, weight = images, targets, jnp.full((n,), 1 / n)
        else:
            order = jax.random.permutation(k_order, n)
            index = position * batch + jnp.arange(batch)
            # The last batch of an epoch is short: absent images have weight zero.
            weight = (index < n).astype(jnp.float32)
            weight /= weight.sum()
            index = order[index % n]
            x, y = images[index], targets[index]
        x = augment(jax.random.fold_in(k_augment, position), normalize(x), protocol.strategy)

        def weighted(params, part):
            x, y, weight = part
            return jnp.sum(weight * loss(network.logits(params, x), y))

        grads = _accumulate(jax.grad(weighted), params, (x, y, weight), microbatch)
        updates, opt = tx.update(grads, opt, params)
        return _Carry(jax.tree.map(lambda p, u: p - rate * u, params, updates), opt)

    return lax.fori_loop(first, first + count, step, carry)


def _accumulate(grad: Callable, params: Any, batch: tuple, microbatch: int) -> Any:
    """Sums the gradients of slices of a batch, one slice at a time."""
    n = batch[0].shape[0]
    parts = -(-n // microbatch)
    if parts <= 1:
        return grad(params, batch)
    size = -(-n // parts)
    pad = parts * size - n
    # Padding rows have weight zero: the last leaf of the batch is the weight.
    padded = [jnp.concatenate([x, jnp.zeros((pad, *x.shape[1:]), x.dtype)]) for x in batch]
    slices = [x.reshape(parts, size, *x.shape[1:]) for x in padded]

    def body(total, part):
        return jax.tree.map(jnp.add, total, grad(params, part)), None

    total, _ = lax.scan(body, jax.tree.map(jnp.zeros_like, params), tuple(slices))
    return total


def together() -> int:
    """How many networks `train_many` should be given: as many as train in the time of one.

    One for each device. An accelerator takes several at once, for the networks are small.
    """
    per_device = 1 if jax.default_backend() == "cpu" else 8
    return per_device * jax.local_device_count()


def train(key: PRNGKeyArray, *args: Any, params: Any = None, **options: Any) -> Any:
    """`train_many` of one network: no leading axis in the key, the parameters and the result."""
    if params is not None:
        params = jax.tree.map(lambda x: jnp.asarray(x)[None], params)
    trained = train_many(key[None], *args, params=params, **options)
    return jax.tree.map(lambda x: x[0], trained)


def train_many(
    keys: Key[Array, " seeds"],
    network: Network,
    images: Array,
    targets: Float[Array, "n classes"],
    *,
    normalize: Callable[[Array], Array],
    protocol: Protocol,
    loss: Loss = optax.softmax_cross_entropy,
    microbatch: int = 256,
    params: Any = None,
    on_block: Callable[[float], None] = lambda fraction: None,
    should_stop: ShouldStop = never,
) -> Any:
    """Trains fresh networks (or `params`) and returns their parameters after the last epoch.

    The networks are dealt to this process's devices; a device trains its own at the same time.

    Args:
        keys: For each network, the source of its initialization, order and augmentation.
        network: What to train.
        images: uint8, or float32 in [0, 1], (n, H, W, C).
        targets: One-hot or soft labels, or what else the loss takes.
        normalize: Images to normalized images.
        protocol: How.
        loss: What is descended.
        microbatch: Images in one pass; gradients of a batch are accumulated over passes.
        params: Initial parameters with a leading axis of networks, instead of `network.init`.
        on_block: Called now and then with the fraction done.
        should_stop: Whether to give up.

    Returns:
        Parameters on one device, with a leading axis of networks.

    Raises:
        Interrupted: If `should_stop` said yes.
    """
    count = keys.shape[0]
    devices = jax.local_devices()[:count]
    # Equal shares: some networks are trained twice rather than none.
    padded = jnp.arange(-(-count // len(devices)) * len(devices)) % count
    split = jax.vmap(jax.random.split)(keys[padded])
    k_init, k_train = split[:, 0], split[:, 1]
    if params is None:
        params = _initial(k_init, network=network)
    else:
        params = jax.tree.map(lambda x: jnp.asarray(x)[padded], params)
    mesh = Mesh(np.array(devices), (_SEED_AXIS,))
    own = NamedSharding(mesh, PartitionSpec(_SEED_AXIS))
    images, targets = jax.device_put((images, targets), NamedSharding(mesh, PartitionSpec()))
    options = {
        "network": network,
        "protocol": protocol,
        "normalize": normalize,
        "loss": loss,
        "microbatch": microbatch,
    }

    per_epoch = -(-images.shape[0] // min(protocol.batch, images.shape[0]))
    total = protocol.epochs * per_epoch
    block = -(-total // _BLOCKS)
    for stage, epochs in enumerate(_stages(protocol)):
        begin, end = (epoch * per_epoch for epoch in epochs)
        keys_stage = jax.vmap(lambda k, stage=stage: jax.random.fold_in(k, stage))(k_train)
        # Fresh momentum in each stage.
        carry = _Carry(params, jax.vmap(optimizer(protocol).init)(params))
        carry, keys_stage = jax.device_put((carry, keys_stage), own)
        for first in range(0, end - begin, block):
            carry = _train_block(
                carry,
                keys_stage,
                images,
                targets,
                jnp.float32(protocol.rate * 0.1**stage),
                jnp.int32(first),
                jnp.int32(min(block, end - begin - first)),
                mesh=mesh,
                **options,
            )
            wait(carry, should_stop, "stopped while training networks")
            on_block(min(begin + first + block, end) / total)
        params = carry.params
    return jax.tree.map(lambda x: x[:count], jax.device_put(params, devices[0]))


def _stages(protocol: Protocol) -> list[tuple[int, int]]:
    """The epochs from which and up to which the rate is the same."""
    # Whole epochs, the first of which has the full rate, however few there are.
    decays = [max(int(protocol.epochs * f), 1) for f in protocol.decay_at]
    return list(itertools.pairwise([0, *decays, protocol.epochs]))


def train_observed(
    key: PRNGKeyArray,
    network: Network,
    images: Array,
    targets: Float[Array, "n classes"],
    observe: Callable[[Any, Any], Any],
    seen: Any,
    *,
    normalize: Callable[[Array], Array],
    protocol: Protocol,
    loss: Loss = optax.softmax_cross_entropy,
    microbatch: int = 256,
    on_epoch: Callable[[int], None] = lambda epochs: None,
    should_stop: ShouldStop = never,
) -> tuple[Any, Any]:
    """Trains a fresh network as `train` does, and looks at it after each epoch.

    Args:
        key: As `train` has it; the network ends in the same state.
        network: What to train.
        images: uint8, or float32 in [0, 1], (n, H, W, C).
        targets: One-hot or soft labels, or what else the loss takes.
        observe: `(params, seen) -> tree`, a part of the program of an epoch; one program is
            compiled for each function.
        seen: What it looks at: a tree of arrays.
        normalize: Images to normalized images.
        protocol: How.
        loss: What is descended.
        microbatch: Images in one pass.
        on_epoch: Called with the number of epochs that are done, after each.
        should_stop: Whether to give up.

    Returns:
        The parameters after the last epoch, and what was observed, on the host, with a leading
        axis of epochs.

    Raises:
        Interrupted: If `should_stop` said yes.
    """
    k_init, k_train = jax.random.split(key)
    params = jax.tree.map(lambda x: x[0], _initial(k_init[None], network=network))
    images, targets, seen = jax.device_put((images, targets, seen))
    found = []
    for stage, (begin, end) in enumerate(_stages(protocol)):
        carry = _Carry(params, optimizer(protocol).init(params))
        for epoch in range(end - begin):
            carry, observed = _observed_epoch(
                carry,
                jax.random.fold_in(k_train, stage),
                images,
                targets,
                seen,
                jnp.float32(protocol.rate * 0.1**stage),
                jnp.int32(epoch),
                observe=observe,
                network=network,
                protocol=protocol,
                normalize=normalize,
                loss=loss,
                microbatch=microbatch,
            )
            wait(carry, should_stop, "stopped while training networks")
            found.append(jax.device_get(observed))
            on_epoch(begin + epoch + 1)
        params = carry.params
    return params, jax.tree.map(lambda *x: np.stack(x), *found)


@functools.partial(
    jax.jit,
    static_argnames=("observe", "network", "protocol", "normalize", "loss", "microbatch"),
    donate_argnames="carry",
)
def _observed_epoch(carry, key, images, targets, seen, rate, epoch, *, observe, **options):
    n = images.shape[0]
    per_epoch = -(-n // min(options["protocol"].batch, n))
    carry = _train_steps(carry, key, images, targets, rate, epoch * per_epoch, per_epoch, **options)
    return carry, observe(carry.params, seen)


def have_diverged(
    params: Any,
    network: Network,
    images: Any,
    targets: Float[Array, "n classes"],
    *,
    normalize: Callable[[Array], Array],
    loss: Loss = optax.softmax_cross_entropy,
) -> np.ndarray:
    """Which of the networks that `train_many` gives are lost, bool (networks,).

    Those are lost whose loss on what they were trained on is not finite, or ten times that of a
    guess: a learning rate that is too high may keep all numbers finite, and means nothing.
    """
    some = np.unique(np.linspace(0, len(images) - 1, min(len(images), _LOOKED_AT)).astype(int))
    images, targets = jnp.asarray(images)[some], jnp.asarray(targets)[some]
    losses = _losses(params, images, targets, network=network, normalize=normalize, loss=loss)
    guess = loss(jnp.zeros_like(targets), targets).mean()
    return ~(np.asarray(losses) <= 10 * np.asarray(guess))


@functools.partial(jax.jit, static_argnames=("network", "normalize", "loss"))
def _losses(params, images, targets, *, network, normalize, loss):
    def one(params):
        return loss(network.logits(params, normalize(images)), targets).mean()

    return lax.map(one, params)


@functools.partial(jax.jit, static_argnames=("network", "normalize", "microbatch"))
def _answers(params, images, *, network, normalize, microbatch):
    """The class of the highest logit (n,), and the probabilities of all (n, classes)."""
    n = images.shape[0]
    parts = -(-n // microbatch)
    index = (jnp.arange(parts * microbatch) % n).reshape(parts, microbatch)

    def part(i):
        logits = network.logits(params, normalize(images[i]))
        return logits.argmax(-1), jax.nn.softmax(logits.astype(jnp.float32))

    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], lax.map(part, index))


class Accuracy(NamedTuple):
    """What part of some images a network gives their label, and how well it knows.

    Attributes:
        value: Of all.
        classes: Of those of each class; None where there is no image of it.
        calibration_error: See `calibration_error`.
        brier: The squared distance of the probabilities from the labels, 0 to 2, a mean over the
            images (Brier 1950).
    """

    value: float
    classes: tuple[float | None, ...]
    calibration_error: float
    brier: float


def accuracy(
    network: Network,
    params: Any,
    images: UInt8[Array, "n h w c"],
    labels: Int[Array, " n"],
    *,
    num_classes: int,
    normalize: Callable[[Array], Array],
    microbatch: int = 256,
) -> Accuracy:
    """The fraction of images whose highest logit is the label's, without augmentation."""
    answers = _answers(params, images, network=network, normalize=normalize, microbatch=microbatch)
    guess, probabilities = map(np.asarray, answers)
    labels = np.asarray(labels)
    right = guess == labels
    there = np.bincount(labels, minlength=num_classes).tolist()
    known = np.bincount(labels[right], minlength=num_classes).tolist()
    distance = np.square(probabilities - np.eye(probabilities.shape[-1])[labels]).sum(-1)
    return Accuracy(
        int(right.sum()) / len(labels),
        tuple(k / n if n else None for k, n in zip(known, there, strict=True)),
        calibration_error(probabilities.max(-1), right),
        float(distance.mean()),
    )


def as_record(found: Accuracy, diverged: bool, probabilities: bool = True) -> dict[str, Any]:
    """An accuracy as a part of a record, whose `value` is not a number where it diverged.

    Args:
        found: The accuracy.
        diverged: Whether the network is lost; see `have_diverged`.
        probabilities: Whether its outputs were trained to be logits; else nothing is said of them.
    """
    record = {"value": math.nan if diverged else found.value, "classes": list(found.classes)}
    if probabilities and not diverged:
        record |= {"calibration_error": found.calibration_error, "brier": found.brier}
    return record


def calibration_error(
    confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int = 15
) -> float:
    """How far confidence and accuracy are apart, in bins of equal numbers of images.

    The expected calibration error of Naeini, Cooper and Hauskrecht (AAAI 2015), with bins of equal
    mass.

    Args:
        confidence: The probability of each guess.
        right: Whether it is the label.
        bins: How many; no more than there are images.
    """
    order = np.argsort(confidence, kind="stable")
    excess = np.float64(confidence)[order] - right[order]
    parts = np.array_split(excess, min(bins, len(excess)))
    return sum(abs(float(part.sum())) for part in parts) / len(excess)


class Judged(NamedTuple):
    """A network that was trained on a set and asked about test images.

    Attributes:
        accuracy: What it is worth.
        diverged: Whether it is lost; see `have_diverged`.
        wall_seconds: Of it and those trained together with it, training and asking.
        cpu_seconds: Likewise.
    """

    accuracy: Accuracy
    diverged: bool
    wall_seconds: float
    cpu_seconds: float


def judged(
    seeds: Sequence[int],
    network: Network,
    images: Any,
    targets: Float[Array, "n classes"],
    test: tuple[Any, Any],
    *,
    num_classes: int,
    normalize: Callable[[Array], Array],
    protocol: Protocol,
    loss: Loss = optax.softmax_cross_entropy,
    microbatch: int = 256,
    on_block: Callable[[float], None] = lambda fraction: None,
    should_stop: ShouldStop = never,
) -> list[Judged]:
    """Trains fresh networks on a set and asks them about test images.

    Args:
        seeds: One for each network.
        network: What to train.
        images: The set's images, uint8 or float32 in [0, 1].
        targets: One-hot or soft labels, or what else the loss takes.
        test: Test images, uint8 (n, h, w, c), and their labels.
        num_classes: Number of classes.
        normalize: Images to normalized images.
        protocol: How to train.
        loss: What is descended.
        microbatch: Images in one pass.
        on_block: Called now and then with the fraction of the training that is done.
        should_stop: Whether to give up.

    Raises:
        Interrupted: If `should_stop` said yes.
    """
    start = time.perf_counter(), time.process_time()
    params = train_many(
        jnp.stack([jax.random.key(seed) for seed in seeds]),
        network,
        jnp.asarray(images),
        targets,
        normalize=normalize,
        protocol=protocol,
        loss=loss,
        microbatch=microbatch,
        on_block=on_block,
        should_stop=should_stop,
    )
    lost = have_diverged(params, network, images, targets, normalize=normalize, loss=loss)
    shown = [jnp.asarray(x) for x in test]
    found = [
        accuracy(
            network,
            jax.tree.map(lambda x, i=i: x[i], params),
            *shown,
            num_classes=num_classes,
            normalize=normalize,
            microbatch=microbatch,
        )
        for i in range(len(seeds))
    ]
    spent = time.perf_counter() - start[0], time.process_time() - start[1]
    return [
        Judged(each, bool(gone), *(round(seconds, 2) for seconds in spent))
        for each, gone in zip(found, lost, strict=True)
    ]


def one_hot(labels: Int[np.ndarray, " n"], num_classes: int) -> Float[Array, "n classes"]:
    """Hard labels as probabilities."""
    return jax.nn.one_hot(jnp.asarray(labels), num_classes)
