"""Which tokens of two tokenizations of one text belong together, found on the host.

Everything is by the bytes of the pieces, added up: never by offsets in characters, which are the
same for all tokens of a character that is split, and never by ids. A tokenization is a list of
pieces as in `jaxdistill.vlm.vocabularies`, one a slot: bytes; the name of a special token; or None
for what is not compared, such as a prompt, a BOS of one side alone, or padding.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int

from jaxdistill.errors import InputError
from jaxdistill.vlm.groups import Groups
from jaxdistill.vlm.vocabularies import Piece, distance

_distance = functools.lru_cache(2**16)(distance)  # texts have the same tokens again and again


def align(
    teacher_pieces: Sequence[Piece],
    student_pieces: Sequence[Piece],
    *,
    specials: bool = True,
    teacher_length: int | None = None,
    student_length: int | None = None,
) -> Groups:
    """The groups of tokens between the byte boundaries that both tokenizations have.

    Special tokens of one name at one place of both texts are a group of their own. Those of one
    side alone are in none, and neither are tokens of no bytes.

    Args:
        teacher_pieces: Of the teacher's tokens.
        student_pieces: Of the student's.
        specials: Whether special tokens, EOS among them, make groups.
        teacher_length: Static length of the teacher's array; further slots are in no group.
        student_length: Likewise.

    Returns:
        Two int32 arrays: the group of each slot, counted from 0 in the order of the text, or -1.

    Raises:
        InputError: If the two sides spell different bytes, or a length is too short.

    Example:
        >>> align([b"he", b"llo", b"!", "eos"], [None, b"hell", b"o", b"!", "eos"])
        Groups(teacher=array([0, 0, 1, 2]), student=array([-1,  0,  0,  1,  2]))
    """
    sides = [list(teacher_pieces), list(student_pieces)]
    texts = [b"".join(p for p in side if isinstance(p, bytes)) for side in sides]
    _same_bytes(*texts)
    starts, ends = zip(*(_spans(side) for side in sides), strict=True)
    common = sorted(set(ends[0]) & set(ends[1]) | {0})
    keys = [[_key(p, *span, common) for p, *span in zip(*side, strict=True)]
            for side in zip(sides, starts, ends, strict=True)]  # fmt: skip
    if specials:
        for i, j in _special_pairs(sides, starts):
            # Before the group of bytes that starts at the same place.
            keys[0][i] = keys[1][j] = (starts[0][i], 0, i)
    shared = sorted(set(keys[0]) & set(keys[1]) - {None})
    numbers = {key: number for number, key in enumerate(shared)}
    return Groups(
        _padded([numbers.get(key, -1) for key in keys[0]], teacher_length, "teacher"),
        _padded([numbers.get(key, -1) for key in keys[1]], student_length, "student"),
    )


def partners(
    teacher_pieces: Sequence[Piece],
    student_pieces: Sequence[Piece],
    *,
    student_length: int | None = None,
) -> np.ndarray:
    """One-to-one partners by dynamic programming with edit distances, as in FuseLLM (2401.10491).

    The cheapest monotone path through all pairs of slots is found, diagonal steps first. Slots that
    meet exactly one of the other side there, and are met by no other, are partners.

    Args:
        teacher_pieces: Of the teacher's tokens.
        student_pieces: Of the student's.
        student_length: Static length of the array; further slots have no partner.

    Returns:
        (k,) int32: the teacher's slot for each of the student's, or -1.
    """
    m, k = len(teacher_pieces), len(student_pieces)
    # A list of lists: single numbers of an array are slow to reach.
    cost = [[0.0, *[np.inf] * k]]
    for ours in teacher_pieces:
        above, row = cost[-1], [np.inf]
        for j, theirs in enumerate(student_pieces):
            row.append(min(above[j], above[j + 1], row[j]) + _distance(ours, theirs))
        cost.append(row)
    path, i, j = [], m, k
    while i and j:
        path.append((i - 1, j - 1))
        steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = min(steps, key=lambda step: cost[step[0]][step[1]])
    met = [[pair[side] for pair in path] for side in (0, 1)]
    found = [-1] * k
    for i, j in path:
        if met[0].count(i) == met[1].count(j) == 1:
            found[j] = i
    return _padded(found, student_length, "student")


def agreeing(
    found: Int[Array | np.ndarray, " k"],
    teacher_tokens: Int[Array | np.ndarray, " m"],
    student_tokens: Int[Array | np.ndarray, " k"],
    nearest: Int[Array | np.ndarray, " v_teacher"],
) -> Int[Array | np.ndarray, " k"]:
    """Partners whose tokens are also mapped to each other by the vocabularies.

    Arrays are NumPy's, or all JAX's, in a compiled program too.

    Args:
        found: (k,) integers, of `partners`.
        teacher_tokens: (m,) integers, the ids of the teacher's slots.
        student_tokens: (k,) integers, likewise.
        nearest: (v_teacher,) integers, of `vocabularies.nearest_pieces`.

    Returns:
        (k,) integers: `found`, with -1 where they are not.
    """
    there = found >= 0
    kept = there & (nearest[teacher_tokens[found * there]] == student_tokens)
    return (found + 1) * kept - 1


def _same_bytes(ours: bytes, theirs: bytes) -> None:
    if ours != theirs:
        at = next(
            (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
            min(len(ours), len(theirs)),
        )
        raise InputError(
            f"the two sides spell different texts from byte {at} on: {ours[at : at + 20]!r} and "
            f"{theirs[at : at + 20]!r}; encode the same text with both tokenizers, and pass None "
            "for what one side alone has"
        )


def _spans(pieces: list[Piece]) -> tuple[list[int], list[int]]:
    """Where each piece starts and ends in the bytes of the text."""
    widths = [len(p) if isinstance(p, bytes) else 0 for p in pieces]
    ends = np.cumsum(widths, dtype=np.int64)
    return (ends - widths).tolist(), ends.tolist()


def _key(piece: Piece, start: int, end: int, common: list[int]) -> tuple[int, int, int] | None:
    """What the tokens of a group have in common: where it starts."""
    if not isinstance(piece, bytes) or start == end:
        return None
    return (common[np.searchsorted(common, start, side="right") - 1], 1, 0)


def _special_pairs(sides, starts) -> list[tuple[int, int]]:
    """Slots of specials with one name at one place, in order."""
    pairs, left = [], [j for j, piece in enumerate(sides[1]) if isinstance(piece, str)]
    for i, piece in enumerate(sides[0]):
        if isinstance(piece, str):
            place = (piece, starts[0][i])
            same = [j for j in left if (sides[1][j], starts[1][j]) == place]
            if same:
                pairs.append((i, same[0]))
                left = [j for j in left if j > same[0]]
    return pairs


def _padded(numbers: list[int], length: int | None, side: str) -> np.ndarray:
    length = len(numbers) if length is None else length
    if len(numbers) > length:
        raise InputError(f"{len(numbers)} slots of the {side} do not fit into {length}")
    return np.array(numbers + [-1] * (length - len(numbers)), np.int32)
