"""What both sides of `rded_speed.py` share: the standard library alone, for either interpreter."""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

_SIZES = {
    "classes": 10,
    "mipc": 300,
    "crops": 5,
    "ipc": 10,
    "size": 32,
    "width": 128,
    "depth": 3,
    "rounds": 2,
}


def arguments(description: str, at_once: int) -> argparse.Namespace:
    """The command line of a side.

    Args:
        description: What the side does.
        at_once: Crops in one pass of the network, by default.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for name, default in _SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--at-once", type=int, default=at_once)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure(args: argparse.Namespace, choose: Callable[[int], float], **versions: str) -> None:
    """Times some rounds after a first one, prints the record as JSON and writes it where asked.

    Args:
        args: Those of `arguments`.
        choose: A round by its number: the mean loss of the crops that it keeps.
        **versions: Of what it runs on.
    """
    wall, cpu, losses = [], [], []
    for number in range(args.rounds + 1):
        begun = time.perf_counter(), time.process_time()
        losses.append(choose(number))
        if number:  # the first warms up
            wall.append(time.perf_counter() - begun[0])
            cpu.append(time.process_time() - begun[1])
    record = {
        "crops": math.prod((args.classes, args.mipc, args.crops)),
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "losses": losses,
        **versions,
    }
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if args.json:
        args.json.write_text(text)
