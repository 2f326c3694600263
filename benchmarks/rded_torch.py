"""Times the choice of crops in eager PyTorch: crops are cut one by one, batches are scored.

    path/to/python benchmarks/rded_torch.py --json out.json

As `rded_jax.py` does it: 10 classes, 300 images each, 5 crops of each, 32x32x3, a ConvNet of three
blocks of 128 channels. Needs torch and NumPy, and `ncfm_torch.py` beside it.
"""

import math

import ncfm_torch
import numpy as np
import rded_sides
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
    args = rded_sides.arguments(__doc__, at_once=128)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    shape = (args.classes, args.mipc, 3, args.size, args.size)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    model = ncfm_torch.ConvNet(
        args.classes, size=args.size, channels=3, width=args.width, depth=args.depth
    ).eval()
    rded_sides.measure(
        args,
        lambda _: choose(model, images, args.crops, args.ipc, args.at_once),
        torch=torch.__version__,
    )


if __name__ == "__main__":
    main()
