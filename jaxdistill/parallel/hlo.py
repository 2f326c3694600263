"""What a compiled program does, read from its text.

JAX's own `cost_analysis` counts the body of a loop once, however often it runs.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple


class Traffic(NamedTuple):
    """Collectives of one kind, of one device.

    Attributes:
        count: How many.
        bytes: What the device puts into them.
    """

    count: int
    bytes: int


class Cost(NamedTuple):
    """What one device does, by the text of the compiled program.

    Attributes:
        flops: What matrix products and convolutions take; a multiplication and an addition are
            two.
        bytes: Read from and written to main memory, without the padding of tiles.
        cycles: The compiler's own estimate, where it makes one: its kernels without waits.
        custom_kernels: Runs of kernels written by hand, whose FLOPs and cycles are not in the
            above, and whose bytes are there as if each operand were read once.
        collectives: By kind.
    """

    flops: int = 0
    bytes: int = 0
    cycles: int = 0
    custom_kernels: int = 0
    collectives: Mapping[str, Traffic] = {}


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str


_Computation = dict[str, _Instruction]

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
# Neither of them moves anything: names, places, and the ends of what was counted at its start.
_STILL = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "custom-call:AllocateBuffer",
    "custom-call:ConcatBitcast",
}


def walk(text: str) -> Cost:
    """Adds up what a compiled program does, loops as often as they run.

    The branches of a conditional count as the most expensive of them, and a loop whose length is
    not in the text, such as the loop over steps in `runner`, counts once. Nothing is known of
    what goes on inside a custom call: kernels written by hand, and products on GPUs.

    Args:
        text: `compiled.as_text()`.
    """
    entry, computations = _parse(text)

    @cache
    def cost(name: str, fused: bool) -> Cost:
        body = computations[name]
        return _add([_cost(x, body, computations, cost, fused) for x in body.values()])

    return cost(entry, False)


def _parse(text: str) -> tuple[str, dict[str, _Computation]]:
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif current is not None and " = " in line:
            found = _instruction(line)
            current[found.name] = found
    if not entry:
        raise ValueError("no HLO module")
    return entry, computations


def _instruction(line: str) -> _Instruction:
    name, _, rest = line.strip().partition(" = ")
    shape_end = _close(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:shape_end], rest[shape_end:].lstrip()
    open_ = rest.index("(")
    close = _close(rest, open_)
    inside, attributes = rest[open_ + 1 : close - 1], rest[close:]
    opcode = rest[:open_]
    if opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', attributes)
        opcode += f":{target[1]}" if target else ""
    name = name.removeprefix("ROOT ").lstrip("%")
    root = " ROOT" if line.lstrip().startswith("ROOT ") else ""
    return _Instruction(
        name, shape, opcode, tuple(_NAME.findall(inside)), attributes + root, inside
    )


def _close(text: str, start: int) -> int:
    """The position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position + 1
    raise ValueError(f"unbalanced parentheses in {text!r}")


def _add(costs: Sequence[Cost], times: int = 1) -> Cost:
    kinds = {kind for cost in costs for kind in cost.collectives}
    collectives = {}
    for kind in sorted(kinds):
        parts = [cost.collectives[kind] for cost in costs if kind in cost.collectives]
        collectives[kind] = Traffic(*(times * sum(column) for column in zip(*parts, strict=True)))
    sums = (times * sum(column) for column in zip(*(cost[:4] for cost in costs), strict=True))
    return Cost(*sums, collectives=collectives) if costs else Cost()


def _cost(x: _Instruction, body: _Computation, computations, cost, fused: bool) -> Cost:
    """What an instruction does; in a fusion nothing but products goes for itself."""
    if x.opcode == "while":
        inner = [cost(_called(x, key)[0], fused) for key in ("body", "condition")]
        return _add(inner, _trips(x, body, computations) or 1)
    if x.opcode == "conditional":
        keys = ("branch_computations", "true_computation", "false_computation")
        branches = [cost(name, fused) for key in keys for name in _called(x, key)]
        return max(branches, key=lambda c: (c.flops, c.custom_kernels, c.bytes))
    if x.opcode == "call" or x.opcode == "async-start":
        return cost((_called(x, "to_apply") + _called(x, "calls"))[0], fused)
    kind = x.opcode.removesuffix("-start")
    collectives = {}
    if kind in _COLLECTIVES:
        given = sum(_bytes(body[name].shape) for name in x.operands)
        collectives = {kind: Traffic(1, given)}
    flops = 0
    if x.opcode == "dot":
        flops = _dot_flops(x, body)
    elif x.opcode == "convolution":
        flops = _convolution_flops(x, body)
    elif x.opcode == "fusion":
        (called,) = _called(x, "calls")
        inside = cost(called, True)
        flops, collectives = inside.flops, inside.collectives
    if fused:
        return Cost(flops, collectives=collectives)
    cycles = re.search(r'"estimated_cycles":"(\d+)"', x.attributes)
    moved = 0 if collectives and kind in _COLLECTIVES else _moved(x, body, computations)
    custom = int(x.opcode == "custom-call:tpu_custom_call")
    return Cost(flops, moved, int(cycles[1]) if cycles else 0, custom, collectives)


def _called(x: _Instruction, key: str) -> tuple[str, ...]:
    found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", x.attributes)
    return tuple(_NAME.findall(found[1])) if found else ()


def _trips(loop: _Instruction, body: _Computation, computations) -> int | None:
    """How often a loop runs, if it counts from zero by ones to a number in the text."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = computations[_called(loop, "condition")[0]]
    root = next(x for x in condition.values() if x.attributes.endswith(" ROOT"))
    if root.opcode == "fusion":
        # The comparison of what the fusion is given, in the same order.
        given = root.operands
        inner = computations[_called(root, "calls")[0]]
        root = next(x for x in inner.values() if x.attributes.endswith(" ROOT"))
        places = {x.name: given[int(x.literal)] for x in inner.values() if x.opcode == "parameter"}
        condition = condition | {name: condition[place] for name, place in places.items()}
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    limit = condition.get(root.operands[1])
    if limit is not None and limit.opcode == "get-tuple-element":
        # The number was moved out of the loop and comes in with what the loop carries.
        place = int(re.search(r"index=(\d+)", limit.attributes)[1])
        carried = body[loop.operands[0]]
        limit = body.get(carried.operands[place]) if carried.opcode == "tuple" else None
    while limit is not None and limit.opcode in ("copy", "bitcast"):
        limit = (condition | body).get(limit.operands[0])
    if limit is None or limit.opcode != "constant" or not limit.literal.isdigit():
        return None
    return int(limit.literal)


def _dims(shape: str) -> list[int]:
    return [int(d) for d in _ARRAY.search(shape)[2].split(",") if d]


def _bytes(shape: str, main_memory: bool = False) -> int:
    """Bytes of an array or a tuple; if asked, without what lies in a memory of the core."""
    total = 0
    for dtype, dims, layout in _ARRAY.findall(shape):
        if main_memory and re.search(r"S\([1-9]", layout):
            continue
        bits = _BITS[dtype] if dtype in _BITS else int(re.search(r"\d+", dtype)[0])
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


def _dot_flops(x: _Instruction, body: _Computation) -> int:
    left = _dims(body[x.operands[0]].shape)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)[1]
    length = math.prod(left[int(d)] for d in contracted.split(",") if d)
    return 2 * math.prod(_dims(x.shape)) * length


def _convolution_flops(x: _Instruction, body: _Computation) -> int:
    """Multiplications of real input values only: those with padding are not work.

    The compiler writes batched products as convolutions that are mostly padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes)
    left, right, out = ([*part] for part in labels.groups())
    sizes = [_dims(body[name].shape) for name in x.operands[:2]] + [_dims(x.shape)]
    at = lambda which, label: sizes[which][(left, right, out)[which].index(label)]  # noqa: E731
    window = re.search(r"window=\{([^}]*)\}", x.attributes)
    fields = dict(f.split("=") for f in window[1].split()) if window else {}
    spatial = sorted(d for d in out if d.isdigit())

    def field(name: str, i: int, default: str) -> str:
        return fields[name].split("x")[i] if name in fields else default

    pairs = 1
    for i, d in enumerate(spatial):
        low = int(field("pad", i, "0_0").split("_")[0])
        stride, spread, gaps = (
            int(field(name, i, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        pairs *= _pairs(at(0, d), at(1, d), at(2, d), low, stride, spread, gaps)
    return 2 * at(2, "b") * at(2, "f") * at(1, "i") * pairs


@cache
def _pairs(size: int, window: int, out: int, low: int, stride: int, spread: int, gaps: int) -> int:
    """Pairs of an output position and a position of the window that meet on an input value."""
    reach = (size - 1) * spread
    positions = (o * stride + k * gaps - low for o in range(out) for k in range(window))
    return sum(0 <= p <= reach and p % spread == 0 for p in positions)


def _moved(x: _Instruction, body: _Computation, computations) -> int:
    """Bytes that an instruction reads from and writes to main memory."""
    if x.opcode in _STILL or x.opcode.endswith("-done"):
        return 0
    if x.opcode in ("copy-start", "slice-start"):
        # From one memory to the other; the result names the target first and the source again.
        target = _ARRAY.search(x.shape)[0]
        source = _ARRAY.search(body[x.operands[0]].shape)
        sides = ("S(" not in target) + ("S(" not in source[0])
        return sides * _bytes(target)
    given = [(body[name].shape, index) for index, name in enumerate(x.operands)]
    out = _bytes(x.shape, main_memory=True)
    if x.opcode in ("dynamic-slice", "gather", "slice"):
        source = 1 if _bytes(given[0][0], main_memory=True) else 0
        return out + source * _bytes(x.shape)
    if x.opcode == "dynamic-update-slice":
        return 2 * _bytes(given[1][0]) if out else _bytes(given[1][0], main_memory=True)
    if x.opcode != "fusion":
        return out + sum(_bytes(shape, main_memory=True) for shape, _ in given)
    inner = computations[_called(x, "calls")[0]]
    total = 0
    updates = _updates(inner)
    for shape, index in given:
        if _bytes(shape, main_memory=True):
            total += _read(inner, index, _bytes(shape, main_memory=True))
    for whole, update in updates:
        # Written in place: no more than the update goes out, and the rest is not touched.
        out -= min(out, whole - update)
    return total + out


def _read(inner: _Computation, index: int, whole: int) -> int:
    """Bytes of its operand `index` that a fusion reads."""
    name = next(
        x.name for x in inner.values() if x.opcode == "parameter" and x.literal == str(index)
    )
    total, sources = 0, {name}
    for x in inner.values():
        if not sources & set(x.operands):
            continue
        if x.opcode == "bitcast":
            sources.add(x.name)
        elif x.opcode in ("dynamic-slice", "slice", "gather") and x.operands[0] in sources:
            total += _bytes(x.shape)
        elif x.opcode == "dynamic-update-slice" and x.operands[0] in sources:
            continue
        else:
            return whole
    return min(total, whole)


def _updates(inner: _Computation) -> list[tuple[int, int]]:
    """Sizes of what a fusion updates in place, and of the updates."""
    found = [x for x in inner.values() if x.opcode == "dynamic-update-slice"]
    return [(_bytes(x.shape), _bytes(inner[x.operands[1]].shape)) for x in found]
