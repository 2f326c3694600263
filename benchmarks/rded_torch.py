"""Times the choice of crops in eager PyTorch: crops are cut one by one, batches are scored.

    path/to/python benchmarks/rded_torch.py --json out.json

As `rded_jax.py` does it: 10 classes, 300 images each, 5 crops of each, 32x32x3, a ConvNet of three
blocks of 128 channels. Needs torch and NumPy, and `ncfm_torch.py` beside it.
"""

import argparse
import json
import math
import time
from pathlib import Path

import ncfm_torch
import numpy as np
import torch

MEAN, STD = 0.5, 0.25


def cut(image: torch.Tensor) -> torch.Tensor:
    """A random square of an image at the image's size, as torchvision cuts and resizes tensors."""
    size = image.shape[-1]
    area = torch.empty(1).uniform_(0.08, 1.0).item()
    side = min(max(round(size * math.sqrt(area)), 1), size)
    top, left = (int(torch.randint(0, size - side + 1, (1,))) for _ in range(2))
    part = image[None, :, top : top + side, left : left + side].float()
    options = {"mode": "bilinear", "align_corners": False, "antialias": True}
    return torch.nn.functional.interpolate(part, (size, size), **options)[0].round().byte()


@torch.no_grad()
def choose(model, images: torch.Tensor, crops: int, ipc: int, batch: int) -> float:
    """Scores the crops of all classes and keeps the best; the mean loss of those kept."""
    kept = []
    for label, own in enumerate(images):
        losses, pieces = [], []
        for _ in range(crops):
            cuts = torch.stack([cut(image) for image in own])
            pieces.append(cuts)
            own_losses = []
            for part in cuts.split(batch):
                logits, _ = model((part.float() / 255 - MEAN) / STD)
                target = torch.full((len(part),), label)
                own_losses.append(
                    torch.nn.functional.cross_entropy(logits, target, reduction="none")
                )
            losses.append(torch.cat(own_losses))
        losses, best = torch.stack(losses).min(0)
        order = losses.argsort()[:ipc]
        torch.stack(pieces)[best[order], order]  # the crops themselves
        kept.append(losses[order].mean())
    return float(torch.stack(kept).mean())


def main() -> None:
    """Prints the record as JSON and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {
        "classes": 10, "mipc": 300, "crops": 5, "ipc": 10, "size": 32, "width": 128, "depth": 3,
        "batch": 128, "rounds": 2,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    shape = (args.classes, args.mipc, 3, args.size, args.size)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    model = ncfm_torch.ConvNet(
        args.classes, size=args.size, channels=3, width=args.width, depth=args.depth
    ).eval()
    wall, cpu, losses = [], [], []
    for number in range(args.rounds + 1):
        begun = time.perf_counter(), time.process_time()
        losses.append(choose(model, images, args.crops, args.ipc, args.batch))
        if number:
            wall.append(time.perf_counter() - begun[0])
            cpu.append(time.process_time() - begun[1])
    record = {
        "crops": math.prod((args.classes, args.mipc, args.crops)),
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "losses": losses,
        "torch": torch.__version__,
    }
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
