"""What a number of bytes is worth: accuracy of networks that are trained on what fits into them.

    python benchmarks/frontier.py --tune --workdir=runs/frontier   # the rate of each arm
    python benchmarks/frontier.py --workdir=runs/frontier          # the table
    python benchmarks/frontier.py --table
    python benchmarks/frontier.py --picture                        # docs/images/frontier.png

Fashion-MNIST, 4, 16 and 64 KiB. The bytes of an arm are the length of one string from which a
fixed program makes images and labels (`pack`, `unpack`): a header with the number of images of each
class, in whose order they stand, the images, and soft labels where there are any. What is *trained*
counts: a student that makes images, and the classifier that is sent instead of any data. All
networks are trained with equal steps, by one recipe but for the rate, which is chosen for each arm
on 5,000 training images that are held out of everything. Interrupted, the same command goes on.
"""

import argparse
import io
import json
import lzma
import shutil
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import recording
from PIL import Image

import jaxdistill
from jaxdistill.condense.decode import decode
from jaxdistill.condense.labels import soft_labels
from jaxdistill.data import dataset, sources
from jaxdistill.data.augment import normalizer
from jaxdistill.data.dataset import Dataset
from jaxdistill.eval import classify, results, train_on
from jaxdistill.io import versions, weights

_RECORD = recording.FOLDER / "frontier.json"
_TUNING = recording.FOLDER / "frontier_tuning.json"
_BUDGETS = (4096, 16_384, 65_536)
_RATES = (0.003, 0.01, 0.03)
_TUNED_AT = 16_384
_STEPS, _BATCH, _WIDTH = 600, 64, 32
_HOLDOUT = 500  # of each class
_CLASSES, _SIDE, _COLUMNS = 10, 28, 10
_FACTOR = 2
# Stored images of a class: at 4 bits a pixel they fill the budgets.
_IPC = {4096: 1, 16_384: 4, 65_536: 16}
_NCFM_STEPS = {4096: 400, 16_384: 250, 65_536: 150}
# Widths of what is sent at a byte a parameter.
_CLASSIFIERS = {4096: 10, 16_384: 25, 65_536: 55}
_GENERATORS = {
    4096: {"width": 4, "depth": 2, "heads": 1},
    16_384: {"width": 16, "depth": 1, "heads": 2},
    65_536: {"width": 32, "depth": 2, "heads": 2},
}
_GENERATED = 500  # images of a class; their number is free
# Of real images: arguments of `pack`.
_CONTAINERS = {
    "real, uint8": ("bits", 8),
    "real, PNG": ("png",),
    "real, JPEG 20": ("jpeg",),
    "real, 4 bits": ("bits", 4),
}
_SETS = (*_CONTAINERS, "NCFM", "NCFM, soft labels", "RDED, 4 bits")
_ARMS = (*_SETS, "two-call student", "classifier")


# ---------------------------------------------------------------------------- bytes


class Packed(NamedTuple):
    """What is sent.

    Attributes:
        images: float32 (n, 28, 28) in [0, 1], in the order of their classes, as they are stored.
        counts: Stored images of each class (10,).
        factor: Tiles per side of a stored image.
        soft: float (n factor^2, 10), a label for each decoded image, or None.
    """

    images: np.ndarray
    counts: np.ndarray
    factor: int
    soft: np.ndarray | None


_HEADER = struct.Struct("<4sBBBB10H")  # magic, kind, bits, factor, whether soft, counts
_KINDS = ("bits", "bits.xz", "png", "jpeg")


def _levels(images: np.ndarray, bits: int) -> np.ndarray:
    return np.rint(np.clip(images, 0, 1) * (2**bits - 1)).astype(np.uint8)


def _shortest(packed: Packed, bits: int) -> tuple[str, bytes]:
    """The levels side by side, or these compressed."""
    levels = _levels(packed.images, bits).reshape(-1, 1)
    plain = np.packbits(np.unpackbits(levels, axis=1)[:, 8 - bits :]).tobytes()
    # Neither a container nor a checksum, and settings that the receiver knows.
    small = lzma.compress(plain, lzma.FORMAT_RAW, filters=_XZ)
    return ("bits.xz", small) if len(small) < len(plain) else ("bits", plain)


_XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]


def _sheet(packed: Packed, kind: str, quality: int) -> bytes:
    """All images in one picture, ten in a row; what is left of the last row is black."""
    rows = -(-len(packed.images) // _COLUMNS)
    cells = np.zeros((rows * _COLUMNS, _SIDE, _SIDE), np.uint8)
    cells[: len(packed.images)] = _levels(packed.images, 8)
    cells = cells.reshape(rows, _COLUMNS, _SIDE, _SIDE).swapaxes(1, 2)
    sheet, file = Image.fromarray(cells.reshape(rows * _SIDE, -1)), io.BytesIO()
    options = {"optimize": True} | ({"quality": quality} if kind == "jpeg" else {})
    sheet.save(file, kind.upper(), **options)
    return file.getvalue()


def pack(packed: Packed, kind: str, bits: int = 8, quality: int = 20) -> bytes:
    """One string of bytes; `bits` a pixel, or a picture as PNG or JPEG."""
    if kind == "bits":
        kind, body = _shortest(packed, bits)
    else:
        body = _sheet(packed, kind, quality)
    soft = b"" if packed.soft is None else packed.soft.astype("<f2").tobytes()
    head = _HEADER.pack(
        b"jdp1", _KINDS.index(kind), bits, packed.factor, packed.soft is not None, *packed.counts
    )
    return head + soft + body


def unpack(data: bytes) -> Packed:
    """What `pack` has packed, with what it has lost."""
    magic, kind, bits, factor, soft, *counts = _HEADER.unpack_from(data)
    if magic != b"jdp1":
        raise ValueError("these bytes are no packed set")
    n, rest, labels = sum(counts), data[_HEADER.size :], None
    if soft:
        size = 2 * n * factor**2 * _CLASSES
        labels = np.frombuffer(rest[:size], "<f2").reshape(-1, _CLASSES).astype(np.float32)
        rest = rest[size:]
    if _KINDS[kind].startswith("bits"):
        if _KINDS[kind] == "bits.xz":
            rest = lzma.decompress(rest, lzma.FORMAT_RAW, filters=_XZ)
        flags = np.unpackbits(np.frombuffer(rest, np.uint8))[: n * _SIDE**2 * bits]
        levels = flags.reshape(-1, bits) @ (1 << np.arange(bits)[::-1])
        images = levels / (2**bits - 1)
    else:
        cells = np.asarray(Image.open(io.BytesIO(rest))) / 255
        images = cells.reshape(-1, _SIDE, _COLUMNS, _SIDE).swapaxes(1, 2).reshape(-1, _SIDE, _SIDE)
    images = images.reshape(-1, _SIDE, _SIDE)[:n].astype(np.float32)
    return Packed(images, np.array(counts), factor, labels)


def training_set(packed: Packed) -> tuple[np.ndarray, np.ndarray]:
    """Decoded images (m, 28, 28, 1), and one-hot or soft labels."""
    images = np.asarray(decode(jnp.asarray(packed.images[..., None]), packed.factor))
    hard = np.repeat(np.arange(_CLASSES), packed.counts)
    targets = np.eye(_CLASSES, dtype=np.float32)[np.tile(hard, packed.factor**2)]
    return images, targets if packed.soft is None else packed.soft


# ---------------------------------------------------------------------------- arms


def _prefix(images: np.ndarray, n: int) -> Packed:
    """The first n of images (10, m, 28, 28), one class after the other, as a set in order."""
    counts = np.full(_CLASSES, n // _CLASSES) + (np.arange(_CLASSES) < n % _CLASSES)
    chosen = [own[:count] for own, count in zip(images, counts, strict=True)]
    return Packed(np.concatenate(chosen), counts, 1, None)


def _fitting(images: np.ndarray, budget: int, *container: Any) -> bytes:
    """As many images as fit, all classes alike to one image."""
    low, high = 1, _CLASSES * images.shape[1]
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(pack(_prefix(images, middle), *container)) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return pack(_prefix(images, low), *container)


def _real(data: Dataset, seed: int) -> np.ndarray:
    """Real images (10, 700, 28, 28) in a random order."""
    numbers = np.random.default_rng(seed)
    images = data.train.images[..., 0] / np.float32(255)
    return np.stack(
        [
            images[numbers.permutation(np.flatnonzero(data.train.labels == c))[:700]]
            for c in range(_CLASSES)
        ]
    )


def _condensed(spec: str, overrides: dict[str, str], workdir: Path) -> Any:
    shared = {"data.holdout_per_class": str(_HOLDOUT), "pool.dir": str(workdir.parent / "pool")}
    config = jaxdistill.load_config(spec, shared | overrides).unlock()
    config.evals = {}
    jaxdistill.train(config, workdir)
    return jaxdistill.load_distilled(workdir)


def _ncfm(budget: int, seed: int, workdir: Path) -> Packed:
    """NCFM's stored images; the artefact has them decoded."""
    ipc = _IPC[budget]
    made = _condensed(
        f"ncfm:dataset=fashion_mnist,ipc={ipc},baselines=,seed={seed}",
        {"method.steps": str(_NCFM_STEPS[budget]), "extractor.width": "32"},
        workdir / f"ncfm-{ipc}-{seed}",
    )
    # Enlarging a tile is linear, and can be undone.
    side = _SIDE // _FACTOR
    enlarge = np.asarray(jax.image.resize(jnp.eye(side), (_SIDE, side), "bilinear"))
    back = np.linalg.pinv(enlarge)
    tiles = np.einsum("th,nhw,sw->nts", back, made.images[..., 0], back)
    # Of each class tile by tile, and image by image within a tile.
    grid = tiles.reshape(_CLASSES, _FACTOR, _FACTOR, ipc, side, side).transpose(0, 3, 1, 4, 2, 5)
    n = _CLASSES * ipc
    assert (made.labels == np.repeat(np.arange(_CLASSES), ipc * _FACTOR**2)).all()
    counts = np.full(_CLASSES, ipc)
    return Packed(grid.reshape(n, _SIDE, _SIDE), counts, _FACTOR, None)


def _most_bits(packed: Packed, budget: int) -> bytes:
    """With as many bits a pixel as fit."""
    for bits in range(8, 0, -1):
        data = pack(packed, "bits", bits)
        if len(data) <= budget:
            return data
    raise ValueError(f"{len(packed.images)} images do not fit into {budget} bytes")


def _rded(seed: int, workdir: Path) -> np.ndarray:
    """RDED's images (10, 150, 28, 28), the easiest first."""
    made = _condensed(
        f"rded:dataset=fashion_mnist,ipc=150,baselines=,seed={seed}",
        {},
        workdir / f"rded-{seed}",
    )
    return np.stack([made.images[made.labels == c][..., 0] for c in range(_CLASSES)])


def _softened(data: bytes, logits: Callable, judge: Any, normalize: Callable) -> Packed:
    """With soft labels of what the receiver will see, by a network of the sender's."""
    packed = unpack(data)
    images, _ = training_set(packed)
    soft = soft_labels(logits, judge, jnp.asarray(images), normalize=normalize, microbatch=500)
    return packed._replace(soft=np.asarray(soft))


# ---------------------------------------------------------------------------- what is trained


def quantized(params: Any) -> tuple[bytes, Any]:
    """Parameters with 8 bits and a scale in 16 bits for each channel, and what is left of them."""
    parts: list[bytes] = []

    def one(x):
        x = np.asarray(x, np.float32)
        if x.ndim < 2:
            parts.append(x.astype("<f2").tobytes())
            return x.astype("<f2").astype(np.float32)
        scale = np.abs(x).max(tuple(range(x.ndim - 1)), keepdims=True) / 127
        scale = np.maximum(scale, 1e-7).astype("<f2").astype(np.float32)
        levels = np.clip(np.rint(x / scale), -127, 127).astype(np.int8)
        parts.append(levels.tobytes() + scale.astype("<f2").tobytes())
        return levels * scale

    back = jax.tree.map(one, params)
    return b"".join(parts), back


def _convnet(width: int) -> train_on.Network:
    return classify.judge("convnet", _CLASSES, (_SIDE, _SIDE, 1), 3, width, "instance")


def _on_all(seed: int, network: train_on.Network, data: Dataset, normalize: Callable) -> Any:
    """Parameters of a classifier that the sender trains, on two passes over all images."""
    return train_on.train(
        jax.random.key(seed),
        network,
        jnp.asarray(data.train.images),
        train_on.one_hot(data.train.labels, _CLASSES),
        normalize=normalize,
        protocol=train_on.Protocol(2, 64, 0.02, strategy="color_crop_flip_scale_rotate"),
    )


def _classifier(budget: int, seed: int, data: Dataset, normalize: Callable) -> tuple[int, float]:
    """Bytes and accuracy of a classifier that is sent itself."""
    network = _convnet(_CLASSIFIERS[budget])
    sent, params = quantized(_on_all(seed, network, data, normalize))
    images, labels = (jnp.asarray(x) for x in data.test)
    found = train_on.accuracy(
        network, params, images, labels, num_classes=_CLASSES, normalize=normalize
    )
    return len(sent), found.value


def _generator(budget: int, workdir: Path) -> tuple[int, np.ndarray, dict]:
    """Bytes of a two-call student, and the images (10, 500, 28, 28) that it makes of each class."""
    folder = workdir / f"generator-{budget}"
    config = jaxdistill.load_config(
        "flow:dataset=fashion_mnist,baselines=",
        {f"model.{name}": str(value) for name, value in _GENERATORS[budget].items()}
        | {
            "data.holdout_per_class": str(_HOLDOUT),
            # All weights are the student's own: the teacher is not needed to use it.
            "method.rank": "0",
            "method.modes": "2",
            "method.steps": "1500",
            "method.batch_size": "32",
            "method.learning_rate": "0.001",
        },
    ).unlock()
    config.evals = {}
    jaxdistill.train(config, folder)
    params, card = weights.load(folder / "artifacts", "student")
    sent, params = quantized(params)
    short = workdir / f"sent-{budget}"
    shutil.rmtree(short, ignore_errors=True)
    weights.save(short, "student", params, card)
    student = jaxdistill.load_student(short, folder / "teacher")
    made = [
        np.concatenate(
            [
                np.asarray(student.sample(jax.random.key(100 * c + i), np.full(100, c)))[..., 0]
                for i in range(_GENERATED // 100)
            ]
        )
        for c in range(_CLASSES)
    ]
    return len(sent), np.clip((np.stack(made) + 1) / 2, 0, 1), card["cost"]


# ---------------------------------------------------------------------------- measuring


def _accuracy(
    images: np.ndarray,
    targets: np.ndarray,
    rate: float,
    seed: int,
    data: Dataset,
    normalize: Callable,
) -> float:
    network = _convnet(_WIDTH)
    # Full batches of a small set too: its images come several times in one.
    times = -(-_BATCH // len(images))
    images, targets = (np.tile(x, (times, *(1,) * (x.ndim - 1))) for x in (images, targets))
    epochs = max(_STEPS // -(-len(images) // _BATCH), 1)
    params = train_on.train(
        jax.random.key(seed),
        network,
        jnp.asarray(images),
        jnp.asarray(targets),
        normalize=normalize,
        protocol=train_on.Protocol(epochs, _BATCH, rate),
    )
    test, labels = (jnp.asarray(x) for x in data.test)
    return train_on.accuracy(
        network, params, test, labels, num_classes=_CLASSES, normalize=normalize
    ).value


class _Bench:
    """What all arms share: the data without what is held out, and the sender's classifier."""

    def __init__(self, workdir: Path, tuning: bool):
        whole = sources.load("fashion_mnist")
        self.workdir = workdir
        self.held = dataset.holdout(whole, _HOLDOUT, seed=0)
        # Both are trained on the same images; they differ in what is measured with.
        self.data = self.held if tuning else replace(self.held, test=whole.test)
        self.normalize = normalizer(self.held.mean, self.held.std)
        self.judge = _convnet(_WIDTH)

    def trained(self) -> Any:
        """The classifier that makes soft labels, kept in the workdir."""
        path = self.workdir / "judge"
        if not (path / "judge.safetensors").is_file():
            params = _on_all(0, self.judge, self.held, self.normalize)
            weights.save(path, "judge", params, {})
        return weights.load(path, "judge")[0]


def _sent(bench: _Bench, arm: str, budget: int, seed: int) -> bytes:
    """What an arm sends."""
    if arm.startswith("real"):
        return _fitting(_real(bench.held, seed), budget, *_CONTAINERS[arm])
    if arm == "RDED, 4 bits":
        return _fitting(_rded(seed, bench.workdir), budget, "bits", 4)
    made = _ncfm(budget, seed, bench.workdir)
    if arm == "NCFM":
        return _most_bits(made, budget)
    # As many bits as leave room for the labels, which are of the images as the receiver sees them.
    room = 2 * _CLASSES * len(made.images) * _FACTOR**2
    plain = _most_bits(made, budget - room)
    softened = _softened(plain, bench.judge.logits, _one(bench.trained()), bench.normalize)
    return pack(softened, "bits", _HEADER.unpack_from(plain)[2])


def _one(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x)[None], params)


def _measure(bench: _Bench, arm: str, budget: int, seed: int, rate: float) -> dict:
    began = time.process_time()
    found: dict[str, Any] = {}
    if arm == "classifier":
        size, accuracy = _classifier(budget, seed, bench.data, bench.normalize)
    elif arm == "two-call student":
        size, images, found["cost"] = _generator(budget, bench.workdir)
        targets = np.repeat(np.eye(_CLASSES, dtype=np.float32), _GENERATED, axis=0)
        flat = images.reshape(-1, _SIDE, _SIDE, 1)
        accuracy = _accuracy(flat, targets, rate, seed, bench.data, bench.normalize)
    else:
        data = _sent(bench, arm, budget, seed)
        size, packed = len(data), unpack(data)
        kind, bits = _HEADER.unpack_from(data)[1:3]
        found |= {"stored": len(packed.images), "kind": _KINDS[kind], "bits": bits}
        accuracy = _accuracy(*training_set(packed), rate, seed, bench.data, bench.normalize)
    assert size <= budget, f"{arm} takes {size} bytes of {budget}"
    return {
        "arm": arm,
        "budget": budget,
        "seed": seed,
        "rate": rate,
        "bytes": size,
        "accuracy": accuracy,
        "cpu_seconds": round(time.process_time() - began, 1),
        **found,
        "versions": versions.versions(),
    }


def rates() -> dict[str, float]:
    """The best rate of each arm on held-out images; the classifier has one of its own."""
    best: dict[str, tuple[float, float]] = {}
    for record in recording.read(_TUNING):
        best[record["arm"]] = max(
            best.get(record["arm"], (0.0, 0.0)), (record["accuracy"], record["rate"])
        )
    return {arm: rate for arm, (_, rate) in best.items()}


def _percent(values: Sequence[float]) -> str:
    """Without a spread where there is one seed, or none."""
    if len(values) > 1:
        return results.percent(values)
    return "".join(f"{100 * value:.1f}" for value in values) or "–"


def table(records: Sequence[dict]) -> str:
    """Markdown: accuracies in %, mean ± std over the seeds, and the bytes."""
    lines = [["sent", *(f"{b // 1024} KiB" for b in _BUDGETS), "stored images", "bytes"]]
    for arm in _ARMS:
        mine = [[r for r in records if (r["arm"], r["budget"]) == (arm, b)] for b in _BUDGETS]
        cells = [_percent([r["accuracy"] for r in cell]) for cell in mine]
        stored = [str(cell[0]["stored"]) for cell in mine if cell and "stored" in cell[0]]
        sizes = [str(max(r["bytes"] for r in cell)) for cell in mine if cell]
        lines.append([arm, *cells, ", ".join(stored), ", ".join(sizes)])
    return results.markdown(lines)


def picture(records: Sequence[dict], path: Path) -> None:
    """Accuracy against bytes, a line for each arm."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for arm, marker in zip(_ARMS, "osD^vP*Xd", strict=True):
        points = sorted({(r["budget"], r["bytes"]) for r in records if r["arm"] == arm})
        sizes = sorted({budget for budget, _ in points})
        means, bytes_of = [], []
        for budget in sizes:
            mine = [r for r in records if (r["arm"], r["budget"]) == (arm, budget)]
            means.append(100 * np.mean([r["accuracy"] for r in mine]))
            bytes_of.append(np.mean([r["bytes"] for r in mine]))
        axes.plot(bytes_of, means, marker=marker, label=arm)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes that are sent")
    axes.set_ylabel("accuracy on test images, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--arms", nargs="*", choices=_ARMS, default=_ARMS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--tune", action="store_true", help="compare rates on held-out images")
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    parser.add_argument("--picture", action="store_true", help="only draw what is recorded")
    args = parser.parse_args()
    if args.picture:
        images = Path(__file__).parent.parent / "docs" / "images"
        picture(recording.read(_RECORD), images / "frontier.png")
        return
    path = _TUNING if args.tune else _RECORD
    if not args.table:
        bench = _Bench(args.workdir, args.tune)
        chosen = rates()
        for seed in [0] if args.tune else args.seeds:
            for budget in [_TUNED_AT] if args.tune else _BUDGETS:
                for arm in args.arms:
                    if args.tune and arm == "classifier":
                        continue
                    for rate in _RATES if args.tune else [chosen.get(arm, 0.02)]:
                        names = ("arm", "budget", "seed", "rate")
                        if recording.has(path, (arm, budget, seed, rate), names):
                            continue
                        record = _measure(bench, arm, budget, seed, rate)
                        recording.put(path, record, names)
                        print(json.dumps({n: record[n] for n in (*names, "accuracy")}))
    if args.tune:
        lines = [["sent", *(f"rate {rate}" for rate in _RATES)]]
        known = {(r["arm"], r["rate"]): r["accuracy"] for r in recording.read(_TUNING)}
        for arm in dict.fromkeys(arm for arm, _ in known):
            lines.append([arm, *(results.percent([known[arm, rate]]) for rate in _RATES)])
        print(results.markdown(lines))
        return
    print(table(recording.read(_RECORD)))


if __name__ == "__main__":
    main()
