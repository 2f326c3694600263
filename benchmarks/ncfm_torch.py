"""Time one NCFM iteration in eager PyTorch, the yardstick for the JAX implementation.

The iteration does what the public PyTorch reference of NCFM (arXiv 2502.20653) does with its
frequency sampler off, at the same cost: a Python loop over the classes, two products per side of
the characteristic function, fresh Gaussian frequencies per class, weight gradients of both
networks, and one AdamW over all pixels that steps once per class in each of the two passes.

It departs from the reference where that makes the comparison cleaner and never slower: real
batches are drawn at random, gradients are those of the current pixels (no queue of stale batches),
and networks stay in memory instead of being read from disk in every iteration. The "trained"
network is a second random one: its weights do not change the cost.

Needs only torch and numpy; neither is a dependency of the package::

    python benchmarks/ncfm_torch.py --threads 2 --json out.json
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MATCH_WEIGHT = 300.0
CALIBRATION_WEIGHT = 1.0
PIXEL_LR = 1e-3
PIXEL_WEIGHT_DECAY = 5e-4
CROP_RATIO = 0.125
CUTOUT_RATIO = 0.5
# As many random images as CIFAR has, so that the resident data weigh what they do in practice.
RANDOM_IMAGES = 50_000
# TypeError: a plain npy array, which cannot be entered as an archive.
NOT_AN_NPZ = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)


class BenchmarkInputError(ValueError):
    """Arguments or data that cannot be benchmarked."""


class Data(NamedTuple):
    """Real images on the CPU.

    Attributes:
        by_class: one uint8 tensor (n_c, C, H, W) per class.
        mean: (1, C, 1, 1) float32, of pixels in [0, 1].
        std: (1, C, 1, 1) float32, of pixels in [0, 1].
    """

    by_class: list[Tensor]
    mean: Tensor
    std: Tensor


class Losses(NamedTuple):
    """Losses of one iteration, each a mean over the classes."""

    match: float
    calibration: float


def first_padding(channels: int, size: int) -> int:
    """Padding of the first convolution: 28x28 grey images grow to 32x32."""
    return 3 if channels == 1 and size == 28 else 1


def feature_side(size: int, channels: int, depth: int) -> int:
    """Side of the last feature map of a `ConvNet`."""
    return (size + 2 * first_padding(channels, size) - 2) >> depth


class ConvNet(nn.Module):
    """ConvNet-D: blocks of convolution, instance norm, ReLU and 2x2 average pooling."""

    def __init__(self, classes: int, *, size: int, channels: int, width: int, depth: int):
        """Build the network with PyTorch's default initialization.

        Args:
            classes: number of logits.
            size: side of the square input images.
            channels: input channels.
            width: channels of every convolution.
            depth: number of blocks.
        """
        super().__init__()
        layers: list[nn.Module] = []
        for block in range(depth):
            inputs, padding = (width, 1) if block else (channels, first_padding(channels, size))
            layers += [
                nn.Conv2d(inputs, width, 3, padding=padding),
                nn.GroupNorm(width, width),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            ]
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(width * feature_side(size, channels, depth) ** 2, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, classes) and flattened features (N, D) of images (N, C, H, W)."""
        features = self.blocks(images).flatten(1)
        return self.head(features), features


@torch.no_grad()
def blend(target: nn.Module, initial: nn.Module, trained: nn.Module, weight: float) -> None:
    """Set every parameter of `target` to weight * initial + (1 - weight) * trained."""
    parameters = zip(target.parameters(), initial.parameters(), trained.parameters(), strict=True)
    for out, start, end in parameters:
        out.copy_(weight * start + (1 - weight) * end)


def tile_side(size: int, factor: int) -> int:
    """Side of one tile of a synthetic image, rounded up."""
    return -(-size // factor)


def tiled_start(data: Data, ipc: int, factor: int) -> Tensor:
    """Synthetic images made of shrunk real ones.

    Tile k of the i-th image of a class shows real image k * ipc + i of that class.

    Returns:
        (classes * ipc, C, H, W) float32 in [0, 1], class-major.
    """
    size = data.by_class[0].shape[-1]
    side = tile_side(size, factor)
    images = []
    for real in data.by_class:
        tiles = F.interpolate(real[: ipc * factor**2].float() / 255, size=(side, side))
        rows = tiles.unflatten(0, (factor, factor, ipc)).permute(2, 3, 0, 4, 1, 5)
        images.append(rows.reshape(ipc, -1, factor * side, factor * side)[..., :size, :size])
    return torch.cat(images)


def decode(images: Tensor, factor: int) -> Tensor:
    """Cut images into factor x factor tiles and enlarge each to the full size.

    Args:
        images: (N, C, H, H).
        factor: tiles per side; where it does not divide H the images are padded with 0.5.

    Returns:
        (factor**2 * N, C, H, H): all first tiles, then all second ones, row by row.
    """
    if factor == 1:
        return images
    size = images.shape[-1]
    side = tile_side(size, factor)
    missing = factor * side - size
    if missing:
        images = F.pad(images, (0, missing, 0, missing), value=0.5)
    tiles = [
        images[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
        for row in range(factor)
        for column in range(factor)
    ]
    return F.interpolate(torch.cat(tiles), size=(size, size), mode="bilinear", align_corners=False)


def draw_integer(low: int, high: int) -> int:
    """Uniform integer in [low, high)."""
    return int(torch.randint(low, high, ()))


def color(images: Tensor) -> Tensor:
    """Change brightness, saturation and contrast, each by one draw for all of (N, C, H, W)."""
    brightness, saturation, contrast = torch.rand(3).tolist()
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    level = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - level) * (contrast + 0.5) + level


def crop(images: Tensor) -> Tensor:
    """Shift all of (N, C, H, H) by the same random offset and fill with zeros."""
    size = images.shape[-1]
    reach = int(size * CROP_RATIO + 0.5)
    top, left = draw_integer(0, 2 * reach + 1), draw_integer(0, 2 * reach + 1)
    padded = F.pad(images, (reach, reach, reach, reach))
    return padded[:, :, top : top + size, left : left + size]


def cutout(images: Tensor) -> Tensor:
    """Blank the same random square, clipped at the border, in all of (N, C, H, H)."""
    size = images.shape[-1]
    side = int(size * CUTOUT_RATIO + 0.5)
    centres = size + 1 - side % 2
    top, left = (draw_integer(0, centres) - side // 2 for _ in range(2))
    mask = images.new_ones(size, size)
    mask[max(top, 0) : top + side, max(left, 0) : left + side] = 0
    return images * mask


def augment(images: Tensor, data: Data) -> Tensor:
    """Normalize (N, C, H, H) in [0, 1], then apply the siamese color, crop and cutout."""
    return cutout(crop(color((images - data.mean) / data.std)))


def discrepancy(
    real: Tensor, syn: Tensor, freqs: Tensor, *, alpha: float = 0.5, beta: float = 0.5
) -> Tensor:
    """Discrepancy of two empirical characteristic functions (NCFM, equations 5 to 8).

    Args:
        real: (N, D) features.
        syn: (M, D) features.
        freqs: (K, D) frequencies.
        alpha: weight of the squared amplitude gap.
        beta: weight of the phase gap.

    Returns:
        Scalar, the mean over frequencies of sqrt(alpha * amplitude gap + beta * phase gap).
    """
    # The product is formed once for the cosine and once for the sine because the reference, whose
    # cost this file measures, does so.
    real_cos = torch.cos(freqs @ real.T).mean(dim=1)
    real_sin = torch.sin(freqs @ real.T).mean(dim=1)
    syn_cos = torch.cos(freqs @ syn.T).mean(dim=1)
    syn_sin = torch.sin(freqs @ syn.T).mean(dim=1)
    real_modulus = torch.sqrt(real_cos**2 + real_sin**2)
    syn_modulus = torch.sqrt(syn_cos**2 + syn_sin**2)
    amplitude = (real_modulus - syn_modulus) ** 2
    phase = 2 * (real_modulus * syn_modulus - real_cos * syn_cos - real_sin * syn_sin)
    return torch.sqrt(alpha * amplitude + beta * phase.clamp(min=1e-12)).mean()


def match_loss(extractor: ConvNet, real: Tensor, syn: Tensor, data: Data, freqs: int) -> Tensor:
    """Weighted discrepancy of a class between real (N, C, H, H) and decoded (M, C, H, H) images."""
    augmented = augment(torch.cat([real, syn]), data)
    with torch.no_grad():
        real_features = F.normalize(extractor(augmented[: len(real)])[1], dim=1)
    syn_features = F.normalize(extractor(augmented[len(real) :])[1], dim=1)
    frequencies = torch.randn(freqs, syn_features.shape[1])
    return MATCH_WEIGHT * discrepancy(real_features, syn_features, frequencies)


def calibration_loss(trained: ConvNet, syn: Tensor, label: int, data: Data) -> Tensor:
    """Weighted cross-entropy of the trained network on decoded images (M, C, H, H) of a class."""
    logits, _ = trained(augment(syn, data))
    return CALIBRATION_WEIGHT * F.cross_entropy(logits, torch.full((len(syn),), label))


class Condenser:
    """Synthetic pixels, their optimizer and the networks of a run."""

    def __init__(self, data: Data, args: argparse.Namespace):
        """Start from tiled real images and freshly drawn networks.

        Args:
            data: real images.
            args: the parsed command line.
        """
        self.data = data
        self.ipc, self.factor, self.real, self.freqs = args.ipc, args.factor, args.real, args.freqs
        self.initial, self.trained, self.extractor = (
            ConvNet(
                args.classes,
                size=args.size,
                channels=args.channels,
                width=args.width,
                depth=args.depth,
            )
            for _ in range(3)
        )
        self.pixels = tiled_start(data, args.ipc, args.factor).requires_grad_()
        self.optimizer = torch.optim.AdamW(
            [self.pixels], lr=PIXEL_LR, weight_decay=PIXEL_WEIGHT_DECAY
        )
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=0.5, patience=500, threshold=1e-4
        )

    def real_batch(self, label: int) -> Tensor:
        """Random distinct images (real, C, H, H) of a class, float32 in [0, 1]."""
        images = self.data.by_class[label]
        return images[torch.randperm(len(images))[: self.real]].float() / 255

    def decoded(self, label: int) -> Tensor:
        """Decoded synthetic images (factor**2 * ipc, C, H, H) of a class."""
        return decode(self.pixels[label * self.ipc : (label + 1) * self.ipc], self.factor)

    def descend(self, loss: Tensor) -> float:
        """Step all pixels on the loss of one class; the other classes see zero gradients."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def iterate(self) -> Losses:
        """Run one iteration: a matching pass over the classes, then a calibration pass."""
        blend(self.extractor, self.initial, self.trained, float(torch.rand(())))
        with torch.no_grad():
            self.pixels.clamp_(0, 1)
        labels = range(len(self.data.by_class))
        match = [
            self.descend(
                match_loss(
                    self.extractor,
                    self.real_batch(label),
                    self.decoded(label),
                    self.data,
                    self.freqs,
                )
            )
            for label in labels
        ]
        calibration = [
            self.descend(calibration_loss(self.trained, self.decoded(label), label, self.data))
            for label in labels
        ]
        losses = Losses(statistics.fmean(match), statistics.fmean(calibration))
        self.scheduler.step(losses.match + losses.calibration)
        return losses


def random_images(classes: int, per_class: int, size: int, channels: int) -> list[Tensor]:
    """Uniform random uint8 images (per_class, C, size, size) for each class."""
    shape = (per_class, channels, size, size)
    return [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(classes)]


def read_images(path: Path, classes: int, size: int, channels: int) -> list[Tensor]:
    """Read an npz with `images` uint8 (N, H, W, C) and `labels` (N,), and split it by class.

    Returns:
        One uint8 tensor (n_c, C, size, size) per class.

    Raises:
        BenchmarkInputError: the file is missing, is no such npz, or has images of another shape.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
    except NOT_AN_NPZ as error:
        raise BenchmarkInputError(f"{path}: not an npz with images and labels ({error})") from error
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, channels):
        raise BenchmarkInputError(
            f"{path}: images are {images.dtype} {images.shape}, expected uint8 "
            f"(N, {size}, {size}, {channels}); set --size and --channels to fit"
        )
    if labels.shape != images.shape[:1]:
        raise BenchmarkInputError(f"{path}: labels {labels.shape} do not fit {len(images)} images")
    channels_first = images.transpose(0, 3, 1, 2)
    return [
        torch.from_numpy(np.ascontiguousarray(channels_first[labels == c])) for c in range(classes)
    ]


def pixel_moments(by_class: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, C, 1, 1), float32, of uint8 images scaled to [0, 1]."""
    # From histograms: float copies of the images could exceed the peak memory being measured.
    histograms = sum(
        torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
        for images in by_class
    )
    weights = histograms.double() / histograms.sum(dim=1, keepdim=True)
    levels = torch.linspace(0, 1, 256, dtype=torch.float64)
    mean = weights @ levels
    variance = (weights * (levels - mean[:, None]) ** 2).sum(dim=1)
    return mean.float().view(1, -1, 1, 1), variance.sqrt().float().view(1, -1, 1, 1)


def load_data(args: argparse.Namespace) -> Data:
    """Load or draw the real images of a run and measure their mean and standard deviation.

    Raises:
        BenchmarkInputError: the file is unusable or a class has too few images.
    """
    needed = max(args.real, args.ipc * args.factor**2)
    if args.data is None:
        per_class = max(needed, RANDOM_IMAGES // args.classes)
        by_class = random_images(args.classes, per_class, args.size, args.channels)
    else:
        by_class = read_images(args.data, args.classes, args.size, args.channels)
    for label, images in enumerate(by_class):
        if len(images) < needed:
            raise BenchmarkInputError(
                f"class {label} has {len(images)} images but {needed} are needed; "
                "lower --classes, --real, --ipc or --factor"
            )
    mean, std = pixel_moments(by_class)
    return Data(by_class, mean, std)


def cpu_model() -> str:
    """Name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def peak_rss_bytes() -> int:
    """Highest resident set size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def summary(seconds: list[float]) -> dict[str, float | list[float]]:
    """Median, least, greatest and all of a list of durations in seconds."""
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "all": seconds,
    }


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Run warm-up and timed iterations and return the record of the benchmark.

    Raises:
        BenchmarkInputError: the data are unusable or a loss is not finite.
    """
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    condenser = Condenser(load_data(args), args)
    wall, cpu, losses = [], [], []
    for _ in range(args.warmup + args.iterations):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        losses.append(condenser.iterate())
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)
        if not all(map(math.isfinite, losses[-1])):
            raise BenchmarkInputError(f"losses are not finite ({losses[-1]}); check the images")
    config = {name: value for name, value in vars(args).items() if name != "json"}
    config["data"] = "random" if args.data is None else args.data.name
    return {
        "benchmark": "ncfm_torch",
        "config": config,
        "wall_seconds": summary(wall[args.warmup :]),
        "cpu_seconds": summary(cpu[args.warmup :]),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_rss_note": "ru_maxrss of the whole process: interpreter, libraries and images too",
        "match_loss": [loss.match for loss in losses],
        "calibration_loss": [loss.calibration for loss in losses],
        "loss_note": "means over the classes, warm-up iterations first",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
    }


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def positive(text: str) -> int:
    """Parse an integer of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def natural(text: str) -> int:
    """Parse an integer of at least zero."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Command line; the defaults are the CIFAR-10 configuration at ten images per class."""
    parser = argparse.ArgumentParser(
        description="Time one NCFM iteration in eager PyTorch on the CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--classes", type=positive, default=10, help="number of classes")
    parser.add_argument("--real", type=positive, default=1024, help="real images per class")
    parser.add_argument("--freqs", type=positive, default=4096, help="frequencies per class")
    parser.add_argument("--width", type=positive, default=128, help="channels of the ConvNet")
    parser.add_argument("--depth", type=positive, default=3, help="blocks of the ConvNet")
    parser.add_argument("--factor", type=positive, default=2, help="tiles per side of an image")
    parser.add_argument("--ipc", type=positive, default=10, help="synthetic images per class")
    parser.add_argument("--size", type=positive, default=32, help="side of the images")
    parser.add_argument("--channels", type=positive, default=3, help="channels of the images")
    parser.add_argument("--iterations", type=positive, default=3, help="timed iterations")
    parser.add_argument("--warmup", type=natural, default=1, help="iterations before the timing")
    parser.add_argument("--threads", type=positive, default=2, help="threads of PyTorch")
    parser.add_argument("--data", type=Path, help="npz: images uint8 (N, H, W, C), labels (N,)")
    parser.add_argument("--json", type=Path, help="write the record to this file as well")
    return parser


def main() -> None:
    """Run the benchmark, print its record as JSON and write it where asked."""
    parser = build_parser()
    args = parser.parse_args()
    if feature_side(args.size, args.channels, args.depth) < 1:
        parser.error(f"--depth {args.depth} halves images of --size {args.size} to nothing")
    if args.factor > args.size:
        parser.error(f"--factor {args.factor} exceeds --size {args.size}")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json: no folder {args.json.parent}")
    try:
        record = measure(args)
    except BenchmarkInputError as error:
        parser.error(str(error))
    text = json.dumps(record, indent=2) + "\n"
    print(text, end="")
    if args.json is not None:
        write_text(args.json, text)


if __name__ == "__main__":
    main()
