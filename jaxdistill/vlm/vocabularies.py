"""What the losses across tokenizers need to know of two vocabularies, made once on the host.

A vocabulary is a list of pieces, one a token id: `bytes` are what the token stands for in a text, a
`str` is the name of a special token, common to both vocabularies whatever each calls it, and None
is a token that is never compared, such as padding.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxdistill.errors import InputError

Piece = bytes | str | None
Encode = Callable[[bytes], Sequence[int]]

_STRANGE = 100  # the distance of a special from anything else


def same_pieces(
    teacher_pieces: Sequence[Piece], student_pieces: Sequence[Piece]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of tokens that are the same in both vocabularies, the teacher's and the student's.

    Args:
        teacher_pieces: The teacher's vocabulary.
        student_pieces: The student's.

    Returns:
        Two int32 arrays of one length, in the teacher's order. Of several tokens of one side with
        the same bytes the first one counts.
    """
    ours, theirs = _ids(teacher_pieces), _ids(student_pieces)
    pairs = [(i, theirs[piece]) for piece, i in ours.items() if piece in theirs]
    found = np.array(pairs, np.int32).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def nearest_pieces(teacher_pieces: Sequence[Piece], student_pieces: Sequence[Piece]) -> np.ndarray:
    """For each of the teacher's tokens that of the student at the least edit distance.

    Every pair without an equal partner is compared: for two vocabularies of a hundred thousand
    tokens that is a long computation, to be kept.

    Args:
        teacher_pieces: The teacher's vocabulary.
        student_pieces: The student's.

    Returns:
        (teacher's size,) int32. Of equally near tokens the first; -1 for specials without a
        counterpart, for tokens of no bytes and for those that are never compared.
    """
    known = _ids(student_pieces)
    # Tokens of no bytes are a vocabulary's unknown or padding.
    texts = [(i, p) for i, p in enumerate(student_pieces) if p and isinstance(p, bytes)]
    nearest = np.full(len(teacher_pieces), -1, np.int32)
    for i, piece in enumerate(teacher_pieces):
        if piece in known:
            nearest[i] = known[piece]
        elif piece and isinstance(piece, bytes) and texts:
            nearest[i] = min(texts, key=lambda other: distance(piece, other[1]))[0]
    return nearest


class Projection(NamedTuple):
    """A sparse matrix from the student's vocabulary to the teacher's, a few entries a row.

    Attributes:
        ids: (student's size, entries) int32. The teacher's tokens of a row.
        weights: (student's size, entries) float32. Rows sum to one, but are zero for tokens that
            nothing corresponds to.
    """

    ids: np.ndarray
    weights: np.ndarray


def token_projection(
    teacher_pieces: Sequence[Piece],
    student_pieces: Sequence[Piece],
    teacher_encode: Encode,
    student_encode: Encode,
    *,
    longest: int = 4,
    decay: float = 0.1,
    keep: int = 4,
    both_ways: bool = True,
    pinned: bool = False,
) -> Projection:
    """The matrix W of X-Token (arXiv 2605.21699): each student's token as a few of the teacher's.

    A token's bytes are encoded anew by the other tokenizer, and the i-th of the tokens that this
    gives has a weight of `decay**i`. Specials of one name go to each other alone.

    Args:
        teacher_pieces: The teacher's vocabulary.
        student_pieces: The student's.
        teacher_encode: From bytes to the teacher's ids.
        student_encode: From bytes to the student's ids.
        longest: How many of these tokens count.
        decay: The ratio of weights.
        keep: How many entries a row has at most.
        both_ways: Whether the same is done for the teacher's tokens, and added.
        pinned: Whether tokens that are the same in both vocabularies go to each other alone.
    """
    rows: list[dict[int, float]] = [{} for _ in student_pieces]

    def spread(pieces, encode):
        for i, piece in enumerate(pieces):
            if isinstance(piece, bytes) and piece:
                others = list(encode(piece))[:longest]
                weights = decay ** np.arange(len(others))
                yield from ((i, j, w) for j, w in zip(others, weights / weights.sum(), strict=True))

    for i, j, weight in spread(student_pieces, teacher_encode):
        rows[i][j] = rows[i].get(j, 0.0) + weight
    if both_ways:
        for j, i, weight in spread(teacher_pieces, student_encode):
            rows[i][j] = rows[i].get(j, 0.0) + weight
    for j, i in zip(*same_pieces(teacher_pieces, student_pieces), strict=True):
        if pinned or isinstance(teacher_pieces[j], str):
            rows[i] = {int(j): 1.0}
    found = Projection(
        np.zeros((len(rows), keep), np.int32), np.zeros((len(rows), keep), np.float32)
    )
    for i, row in enumerate(rows):
        best = sorted(row.items(), key=lambda entry: (-entry[1], entry[0]))[:keep]
        for place, (j, weight) in enumerate(best):
            found.ids[i, place] = j
            found.weights[i, place] = weight / sum(w for _, w in best)
    return found


def starts_with(pieces: Sequence[Piece], starts: bytes) -> np.ndarray:
    """Which tokens are boundaries: those that start with one of some bytes, and all specials.

    Args:
        pieces: A vocabulary.
        starts: Bytes that no token crosses, only starts with, such as `b" "`.

    Raises:
        InputError: If a token has one of them further on: then it is no boundary.
    """
    for piece in pieces:
        if isinstance(piece, bytes) and set(piece[1:]) & set(starts):
            raise InputError(f"the token {piece!r} crosses a byte of {starts!r}")
    return np.array(
        [isinstance(p, str) or (isinstance(p, bytes) and p[:1] in _singles(starts)) for p in pieces]
    )


def first_bytes(pieces: Sequence[Piece], specials: Sequence[str]) -> np.ndarray:
    """The first byte of each token, specials beyond 255 in the order of a list, all else 511.

    Args:
        pieces: A vocabulary.
        specials: Names, at most 255, the same list for both vocabularies.
    """
    numbers = {name: 256 + i for i, name in enumerate(specials)}
    return np.array(
        [p[0] if isinstance(p, bytes) and p else numbers.get(p, 511) for p in pieces], np.int32
    )


def distance(one: Piece, other: Piece) -> int:
    """The edit distance of two pieces in bytes: insertions, deletions and replacements.

    Of a special it is 0 to itself and a hundred to anything else.
    """
    if one == other:
        return 0
    if not (isinstance(one, bytes) and isinstance(other, bytes)):
        return _STRANGE
    row = list(range(len(other) + 1))
    for i, byte in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, letter in enumerate(other, 1):
            replaced = diagonal + (byte != letter)
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, replaced)
    return row[-1]


def _singles(starts: bytes) -> set[bytes]:
    return {bytes([byte]) for byte in starts}


def _ids(pieces: Sequence[Piece]) -> dict[bytes | str, int]:
    """The first id of each piece that can be compared."""
    found: dict[bytes | str, int] = {}
    for i, piece in enumerate(pieces):
        if piece:
            found.setdefault(piece, i)
    return found
