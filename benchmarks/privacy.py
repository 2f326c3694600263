"""What a guarantee costs in accuracy, and what attackers find with and without one.

    python benchmarks/privacy.py membership     # who was among the training images, by LiRA
    python benchmarks/privacy.py accuracy       # Fashion-MNIST at several epsilons
    python benchmarks/privacy.py --picture      # sets at several epsilons, made anew
    python benchmarks/privacy.py --table        # from the records

`membership`: of 2,000 training images of Fashion-MNIST each pipeline gets a random half. It makes a
set of a few images from its half (or takes the half itself) and trains a softmax regression on the
pixels of the set, by 200 iterations of L-BFGS. The attacker has the regression and the images,
knows the pipeline, has run it on halves of its own, and says by LiRA which images were in. Of the
sums themselves the score of an image is its product with the mean of its class.
`accuracy`: fresh ConvNets of width 32 on the test split, trained on sets that were learned from two
releases under networks of that width; the scale of frequencies was chosen on training images alone.
Records go to `benchmarks/records/`, and the same command goes on.
"""

import argparse
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import recording
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from jaxdistill import release
from jaxdistill.condense import accounting, released
from jaxdistill.data import dataset, sources
from jaxdistill.data.augment import normalizer
from jaxdistill.eval import attacks, classify, results, train_on
from jaxdistill.io import pictures
from jaxdistill.io.versions import versions
from jaxdistill.nn.classifiers import classifier

_MEMBERSHIP = recording.FOLDER / "privacy_membership.json"
_ACCURACY = recording.FOLDER / "privacy_fashion_mnist.json"
_PICTURE = Path(__file__).parent.parent / "docs" / "images" / "privacy_membership.png"
_SETS_PICTURE = _PICTURE.with_name("privacy_sets.png")
_DELTA = 1e-5

# Of the attack.
_POOL, _CLASSES, _SHADOWS, _TARGETS = 2000, 10, 16, 8
_RELEASES, _STEPS, _RATE = 4, 200, 0.05
_ALLOWED = (0.001, 0.01)


class Arm(NamedTuple):
    """What is attacked.

    Attributes:
        kind: `real` images, images learned from `released` sums, or the `sums` themselves.
        ipc: Images per class; 0 for the whole half.
        epsilon: Of the sums, if they have one.
    """

    kind: str
    ipc: int = 10
    epsilon: float | None = None


_ARMS = {
    "the half itself": Arm("real", 0),
    "random real images, 10 a class": Arm("real"),
    "released, exact, 1 a class": Arm("released", 1),
    "released, exact, 10 a class": Arm("released"),
    "released, epsilon=10, 10 a class": Arm("released", epsilon=10.0),
    "released, epsilon=1, 10 a class": Arm("released", epsilon=1.0),
    "the sums, exact": Arm("sums"),
    "the sums, epsilon=10": Arm("sums", epsilon=10.0),
    "the sums, epsilon=1": Arm("sums", epsilon=1.0),
}

# Of the accuracies.
_EPSILONS = (None, 10.0, 4.0, 1.0)
_SETS = (
    ("random", None),
    *(("direction", epsilon) for epsilon in _EPSILONS),
    *(("characteristic", epsilon) for epsilon in _EPSILONS),
)
_WIDTH, _NETWORKS, _LONG = 32, 2, 300
_EPOCHS = {1: 300, 10: 100}
_NORMALIZE = normalizer((released.MEAN,), (released.STD,))
_KEYS = ("embedding", "epsilon", "ipc", "seed")


# ---------------------------------------------------------------------------- the attack


def halves(count: int, pipelines: int) -> np.ndarray:
    """Which images each pipeline has: a random half and the other half, in turn."""
    numbers = np.random.default_rng(0)
    order = [numbers.permutation(count) < count // 2 for _ in range(pipelines // 2)]
    return np.stack([half for first in order for half in (first, ~first)])


def _learner(embedding, ipc: int, releases: int, steps: int):
    """`(means, key) -> images`, compiled."""
    method = released.matching(
        embedding,
        optax.adam(optax.cosine_decay_schedule(_RATE, steps, 0.05)),
        num_classes=_CLASSES,
        image_shape=(28, 28, 1),
        releases=releases,
        ipc=ipc,
    )

    @jax.jit
    def learn(means, key):
        frozen = {"means": means}
        step = lambda i, s: method.step(s, frozen, (), jax.random.fold_in(key, i))[0]  # noqa: E731
        last = jax.lax.fori_loop(0, steps, step, method.init(key, frozen, ()))
        return method.output(last)["images"]

    return learn


def _chosen(labels, members, ipc: int) -> Iterator[np.ndarray]:
    """Which real images each pipeline takes of its half."""
    for i, own in enumerate(members):
        numbers, rows = np.random.default_rng(i), np.flatnonzero(own)
        if ipc:
            by_class = [numbers.permutation(rows[labels[rows] == c])[:ipc] for c in range(_CLASSES)]
            rows = np.concatenate(by_class)
        yield rows


def _vectors(embedding, images) -> list[np.ndarray]:
    """What each image adds to a sum, which does not depend on the half that it is in."""
    apply = jax.jit(embedding.apply)
    return [
        release.contributions(np.asarray(apply(embedding.draw(r), images)))
        for r in range(_RELEASES)
    ]


def _means(vectors, labels, members, epsilon: float | None) -> Iterator[np.ndarray]:
    """What each pipeline releases of its half, as means."""
    one_hot = np.eye(_CLASSES)[labels]
    for own in members:
        sums = np.stack([(one_hot * own[:, None]).T @ each for each in vectors])
        if epsilon is not None:
            sigma = accounting.deviation(epsilon, _DELTA, _RELEASES)
            sums += sigma * release.unit_normals(sums.shape)
        yield released.means(sums[..., :-1], sums[..., -1] / accounting.COUNT_WEIGHT)


def _scores(arm: Arm, images, labels, members, test) -> tuple[np.ndarray, list[float]]:
    """A score of every image under every pipeline, and the accuracies of what was trained."""
    flat = images.reshape(len(images), -1) / 255.0
    embedding = released.characteristic(
        classifier("mlp", _CLASSES, (28, 28, 1)), 1, num_freqs=256, scale=1.0
    )
    if arm.kind == "real":
        made = ((flat[rows], labels[rows]) for rows in _chosen(labels, members, arm.ipc))
    else:
        vectors = _vectors(embedding, images)
        means = _means(vectors, labels, members, arm.epsilon)
        if arm.kind == "sums":
            stacked = np.stack(vectors)[..., :-1]
            trace = lambda mean: np.einsum("rnd,rnd->n", stacked, mean[:, labels])  # noqa: E731
            return np.stack([trace(mean) for mean in means]), []
        learn = _learner(embedding, arm.ipc, _RELEASES, _STEPS)
        own_labels = np.repeat(np.arange(_CLASSES), arm.ipc)
        sets = (learn(jnp.asarray(mean), jax.random.key(i)) for i, mean in enumerate(means))
        made = ((np.asarray(each).reshape(len(own_labels), -1), own_labels) for each in sets)
    scores, right = [], []
    for pixels, own in made:
        model = LogisticRegression(C=10.0, max_iter=200).fit(pixels, own)
        scores.append(attacks.confidences(model.decision_function(flat), labels))
        right.append(model.score(test.images.reshape(len(test.labels), -1) / 255.0, test.labels))
    return np.stack(scores), right


def attack(name: str) -> dict:
    """Runs all pipelines of an arm, and LiRA on the last ones of them."""
    began = time.process_time()
    data = sources.load("fashion_mnist")
    numbers = np.random.default_rng(1)
    chosen = [numbers.permutation(np.flatnonzero(data.train.labels == c)) for c in range(_CLASSES)]
    rows = np.concatenate([each[: _POOL // _CLASSES] for each in chosen])
    images, labels = data.train.images[rows], data.train.labels[rows]
    members = halves(_POOL, _SHADOWS + _TARGETS)
    warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of iterations is meant
    scores, right = _scores(_ARMS[name], images, labels, members, data.test)
    ratios = attacks.likelihood_ratios(scores[:_SHADOWS], members[:_SHADOWS], scores[_SHADOWS:])
    seen = members[_SHADOWS:].ravel()
    false, true = attacks.curve(ratios.ravel(), seen)
    # As many points as a picture has pixels.
    kept = np.unique(np.searchsorted(false, np.geomspace(1e-4, 1, 200)).clip(0, len(false) - 1))
    return {
        "accuracies": right,
        "auc": float(roc_auc_score(seen, ratios.ravel())),
        "rates": {str(f): attacks.true_rate(ratios.ravel(), seen, f)._asdict() for f in _ALLOWED},
        "threshold_auc": float(roc_auc_score(seen, scores[_SHADOWS:].ravel())),
        "false": [round(float(x), 6) for x in false[kept]],
        "true": [round(float(x), 6) for x in true[kept]],
        "cpu_seconds": round(time.process_time() - began, 1),
        "versions": versions(),
    }


def membership_table(found: dict[str, dict]) -> str:
    """Markdown: what the attacker finds."""
    head = [f"{100 * f:g} %" for f in _ALLOWED]
    lines = [
        ["the attacked set", "accuracy", *(f"TPR at {h} (95 %)" for h in head), "AUC", "loss, AUC"]
    ]
    for arm in _ARMS:
        if arm in found:
            own = found[arm]
            rates = [own["rates"][str(f)] for f in _ALLOWED]
            shown = [
                f"{100 * r['value']:.2f} ({100 * r['low']:.2f} to {100 * r['high']:.2f})"
                for r in rates
            ]
            accuracy = results.percent(own["accuracies"]) if own["accuracies"] else "–"
            lines.append(
                [arm, accuracy, *shown, f"{own['auc']:.3f}", f"{own['threshold_auc']:.3f}"]
            )
    return results.markdown(lines)


def picture(found: dict[str, dict], path: Path) -> None:
    """Rates of true alarms against those of false ones, on logarithmic axes."""
    figure, axes = plt.subplots(figsize=(6.5, 5), layout="constrained")
    for arm, style in zip(
        _ARMS, ("k-", "C1-", "C0:", "C0-", "C0--", "C0-.", "C3-", "C3--", "C3-."), strict=True
    ):
        if arm in found:
            axes.plot(found[arm]["false"], found[arm]["true"], style, label=arm)
    line = np.geomspace(1e-4, 1, 100)
    axes.plot(line, line, color="0.6", lw=0.8, label="chance")
    axes.set(xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(1e-4, 1))
    axes.set(xlabel="false alarms: share of the others", ylabel="true alarms: share of the members")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------------------- the accuracy


def _embedding(kind: str):
    network = classifier("convnet", _CLASSES, (28, 28, 1), width=_WIDTH)
    if kind == "direction":
        return released.direction(network, 1)
    return released.characteristic(network, 1, num_freqs=256, scale=1.0)


def _exact(kind: str, data: dataset.Dataset, workdir: Path) -> np.ndarray:
    """The exact sums over all of Fashion-MNIST, which is public: kept, for they take a minute."""
    path = workdir / f"exact-{kind}.npz"
    if not path.is_file():
        sums = release.class_sums(
            _embedding(kind), *data.train, releases=_NETWORKS, num_classes=_CLASSES, microbatch=32
        )
        workdir.mkdir(parents=True, exist_ok=True)
        np.savez(path, sums=sums)
    with np.load(path, allow_pickle=False) as file:
        return file["sums"]


def _learned(kind, epsilon, ipc, seed, data, workdir) -> np.ndarray:
    embedding, sums = _embedding(kind), _exact(kind, data, workdir)
    if epsilon is not None:
        sigma = accounting.deviation(epsilon, _DELTA, _NETWORKS)
        sums = sums + sigma * release.unit_normals(sums.shape)
    means = released.means(sums[..., :-1], sums[..., -1] / accounting.COUNT_WEIGHT)
    learn = _learner(embedding, ipc, _NETWORKS, _LONG)
    return np.asarray(learn(jnp.asarray(means), jax.random.key(seed))).reshape(-1, 28, 28, 1)


def accuracy(kind: str, epsilon: float | None, ipc: int, seed: int, workdir: Path) -> dict:
    """Makes a set and trains a network on it."""
    began = time.process_time()
    data = sources.load("fashion_mnist")
    if kind == "random":
        numbers = np.random.default_rng(seed)
        rows = [
            numbers.choice(np.flatnonzero(data.train.labels == c), ipc, False) for c in range(10)
        ]
        images = data.train.images[np.concatenate(rows)] / np.float32(255)
    else:
        images = _learned(kind, epsilon, ipc, seed, data, workdir)
    learned, labels = time.process_time() - began, np.repeat(np.arange(_CLASSES), ipc)
    network = classify.judge("convnet", _CLASSES, (28, 28, 1), 3, _WIDTH, "instance")
    protocol = train_on.Protocol(_EPOCHS[ipc], 256, 0.01)
    passes = {"normalize": _NORMALIZE, "microbatch": 100}
    params = train_on.train_many(
        jnp.stack([jax.random.key(seed)]),
        network,
        jnp.asarray(images),
        train_on.one_hot(labels, _CLASSES),
        protocol=protocol,
        **passes,
    )
    one = jax.tree.map(lambda x: x[0], params)
    test = (jnp.asarray(x) for x in data.test)
    found = train_on.accuracy(network, one, *test, num_classes=_CLASSES, **passes)
    return {
        "embedding": kind,
        "epsilon": epsilon,
        "ipc": ipc,
        "seed": seed,
        "accuracy": found.value,
        "epochs": protocol.epochs,
        "cpu_seconds": round(time.process_time() - began, 1),
        "learned_seconds": round(learned, 1),
        "versions": versions(),
    }


def accuracy_table(records: list[dict]) -> str:
    """Markdown: accuracy in %, mean ± std over the seeds, and how many there are."""
    sizes = sorted({r["ipc"] for r in records})
    lines = [["embedding", "guarantee", *(f"{ipc} a class" for ipc in sizes)]]
    for kind, epsilon in _SETS:
        cells = []
        for ipc in sizes:
            own = [r for r in records if (r["embedding"], r["epsilon"]) == (kind, epsilon)]
            values = [r["accuracy"] for r in own if r["ipc"] == ipc]
            cells.append(f"{results.percent(values)} ({len(values)})" if values else "–")
        told = "none" if epsilon is None else f"epsilon={epsilon:g}, delta={_DELTA:g}"
        lines.append(["random real images" if kind == "random" else kind, told, *cells])
    return results.markdown(lines)


def sets_picture(workdir: Path, path: Path) -> None:
    """One image a class, learned from noisy sums: a row for each epsilon."""
    data = sources.load("fashion_mnist")
    rows = {
        "no noise": None,
        **{f"epsilon={epsilon:g}": epsilon for epsilon in _EPSILONS if epsilon is not None},
    }
    made = [_learned("direction", epsilon, 1, 0, data, workdir) for epsilon in rows.values()]
    labels = np.repeat(np.arange(len(rows), dtype=np.int32), _CLASSES)
    Image.fromarray(pictures.grid(np.concatenate(made), labels, list(rows))).save(path)


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("membership", "accuracy"))
    parser.add_argument("--ipc", type=int, nargs="*", default=[1])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--workdir", type=Path, default=Path("runs/privacy"))
    parser.add_argument("--picture", action="store_true", help="draw sets at several epsilons")
    parser.add_argument(
        "--table", action="store_true", help="only tables and curve, from the records"
    )
    args = parser.parse_args()
    if args.picture:
        sets_picture(args.workdir, _SETS_PICTURE)
    if args.part == "membership" and not args.table:
        for arm in _ARMS:
            recording.kept(_MEMBERSHIP, arm, lambda arm=arm: attack(arm))
    if args.part == "accuracy" and not args.table:
        for seed in args.seeds:
            for ipc in args.ipc:
                for kind, epsilon in _SETS:
                    if not recording.has(_ACCURACY, (kind, epsilon, ipc, seed), _KEYS):
                        record = accuracy(kind, epsilon, ipc, seed, args.workdir)
                        recording.put(_ACCURACY, record, _KEYS)
    found = recording.read(_MEMBERSHIP)
    if found:
        print(f"\n{membership_table(found)}")
        picture(found, _PICTURE)
    if records := recording.read(_ACCURACY):
        print(f"\n{accuracy_table(records)}")


if __name__ == "__main__":
    main()
