"""What the losses across tokenizers need to know of two vocabularies, made once on the host.

A vocabulary is a list of pieces, one a token id: `bytes` are what the token stands for in a text, a
`str` is the name of a special token, common to both vocabularies whatever each calls it, and None
is a token that is never compared, such as padding.
"""

from collections.abc import Callable, Sequence

import numpy as np

from jaxdistill.errors import InputError

Piece = bytes | str | None
Encode = Callable[[bytes], Sequence[int]]

_STRANGE = 100  # the distance of a special from anything else


def byte_level(token: str) -> bytes:
    """The bytes of a token of a byte-level BPE tokenizer, which writes each byte as one letter.

    Printable letters of Latin-1 stand for themselves there, the others for letters from 256 on.

    Args:
        token: As in the tokenizer's vocabulary, such as "Ġhello" for " hello".

    Raises:
        InputError: If a letter stands for no byte.
    """
    try:
        return bytes(_BYTES[letter] for letter in token)
    except KeyError as error:
        raise InputError(
            f"{token!r} is no byte-level token: {error.args[0]!r} stands for no byte"
        ) from None


def _byte_letters() -> dict[str, int]:
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_letters()


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
        counterpart and for tokens that are never compared.
    """
    known = _ids(student_pieces)
    texts = [(i, piece) for i, piece in enumerate(student_pieces) if isinstance(piece, bytes)]
    nearest = np.full(len(teacher_pieces), -1, np.int32)
    for i, piece in enumerate(teacher_pieces):
        if piece in known:
            nearest[i] = known[piece]
        elif isinstance(piece, bytes) and texts:
            nearest[i] = min(texts, key=lambda other: distance(piece, other[1]))[0]
    return nearest


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
) -> np.ndarray:
    """The matrix W of X-Token (arXiv 2605.21699): each student's token as a few of the teacher's.

    A token's bytes are encoded anew by the other tokenizer, and the i-th of the tokens that this
    gives has a weight of `decay**i`.

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

    Returns:
        (student's size, teacher's size) float32. Rows sum to one, but those of tokens that nothing
        corresponds to are zero.
    """
    matrix = np.zeros((len(student_pieces), len(teacher_pieces)), np.float64)
    weights = decay ** np.arange(longest)

    def spread(pieces, encode):
        for i, piece in enumerate(pieces):
            if isinstance(piece, bytes) and piece:
                others = list(encode(piece))[:longest]
                yield i, others, weights[: len(others)] / weights[: len(others)].sum()

    for i, others, share in spread(student_pieces, teacher_encode):
        np.add.at(matrix[i], others, share)
    if both_ways:
        for i, others, share in spread(teacher_pieces, student_encode):
            np.add.at(matrix[:, i], others, share)
    ours, theirs = same_pieces(teacher_pieces, student_pieces)
    for i, j in zip(ours, theirs, strict=True):
        if pinned or isinstance(teacher_pieces[i], str):
            matrix[j] = 0.0
            matrix[j, i] = 1.0
    if keep < matrix.shape[1]:
        smallest = np.argsort(-matrix, axis=1, kind="stable")[:, keep:]
        np.put_along_axis(matrix, smallest, 0.0, axis=1)
    sums = matrix.sum(1, keepdims=True)
    return (matrix / np.where(sums > 0, sums, 1.0)).astype(np.float32)


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
