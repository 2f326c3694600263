"""Files of byte-pair encodings as plain data: read, spelt in bytes, and cut to what is used.

What a `tokenizer.json` of the package `tokenizers` says is a dict here. SentencePiece's own
`tokenizer.model`, a protocol buffer (`sentencepiece_model.proto` of google/sentencepiece), is
brought to the same form: its pieces have scores instead of merges, and a merge is any pair of
pieces whose letters together are a piece, the better the higher that piece's score.

SentencePiece puts a space before every text, so that a first word is the same piece as a later one.
That space is in no text, and texts are aligned by their bytes: it is left out here, and the first
word is what the same letters are after anything but a space.
"""

import itertools
import json
import re
import struct
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxdistill.errors import InputError

SPACE = "\u2581"
"""What SentencePiece writes for a space."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Of the protocol buffer: types of pieces, and of models.
_NORMAL, _UNKNOWN, _CONTROL, _SINGLE = 1, 2, 3, 6
_BPE = 2


def of_sentencepiece(path: Path) -> dict[str, Any]:
    """A SentencePiece model of byte pairs as a `tokenizer.json` says it, without the first space.

    Ids are the file's. Control pieces keep theirs, and no text is split into them.

    Args:
        path: The `tokenizer.model`.

    Raises:
        InputError: If the file is none, is of another kind than byte pairs, changes texts before it
            splits them, or lacks pieces for single bytes.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read; give a tokenizer.model") from error
    try:
        pieces, trainer, normalizer = _model(data)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no SentencePiece model, or a damaged one") from error
    if trainer.get(3, 1) != _BPE:
        raise InputError(f"{path} is a SentencePiece model of another kind than byte pairs (BPE)")
    if normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1) or trainer.get(24):
        raise InputError(
            f"{path} changes texts before it splits them, and their bytes would be lost; give a "
            "model with the identity for its normalizer"
        )
    kinds = {kind for _, _, kind in pieces}
    if strange := kinds - {_NORMAL, _UNKNOWN, _CONTROL, _SINGLE}:
        raise InputError(f"{path} has pieces of type {min(strange)}; give its tokenizer.json")
    if sum(kind == _SINGLE for _, _, kind in pieces) != 256:
        raise InputError(f"{path} has no pieces for all bytes; give a model with byte fallback")
    vocabulary = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise InputError(f"{path} is damaged: it has a piece twice")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(pieces),
        },
    }


def spaced(said: dict[str, Any]) -> bool:
    """Whether a tokenizer writes spaces as SentencePiece does."""
    rules = [said.get("normalizer"), said.get("pre_tokenizer")]
    return SPACE in json.dumps(rules, ensure_ascii=False)


def without_first_space(said: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, but that it puts no space before a text."""

    def changed(rule):
        if not isinstance(rule, dict):
            return rule
        if rule.get("type") == "Prepend" and rule.get("prepend") == SPACE:
            return None
        if rule.get("type") == "Metaspace":
            return rule | {"prepend_scheme": "never"}
        for name in ("normalizers", "pretokenizers"):
            if name in rule:
                kept = [changed(inner) for inner in rule[name]]
                return rule | {name: [inner for inner in kept if inner is not None]}
        return rule

    rules = {name: changed(said.get(name)) for name in ("normalizer", "pre_tokenizer")}
    return said | rules


def bytes_of(token: str) -> bytes:
    """The bytes of a SentencePiece token, such as "▁hello" for " hello" or "<0x0A>" for a line."""
    one = _BYTE.fullmatch(token)
    return bytes([int(one[1], 16)]) if one else token.replace(SPACE, " ").encode()


def cut(said: dict[str, Any], used: Collection[str], always: Collection[str]) -> dict[str, Any]:
    """A byte-pair encoding with only the tokens that are used, and those that lead to them.

    Texts that were split into used tokens are split as before: of all merges exactly those that
    made these tokens are left, in their order, and one that is missing was not made there. Other
    texts are split into smaller tokens. Special tokens are left out.

    Args:
        said: What its `tokenizer.json` says.
        used: Tokens that texts were split into.
        always: Tokens that are kept besides, those of single bytes.

    Raises:
        InputError: If it is no byte-pair encoding.
    """
    model = said["model"]
    if model.get("type") != "BPE":
        raise InputError(f"only byte-pair encodings can be cut, and this is {model.get('type')}")
    pairs = [tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"]]
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    wanted, made = {*used, *always}, set()
    for token in wanted - {*always}:  # `<0x0A>` is no word
        made.update(_way(token, ranks))
    for left, right in made:
        wanted |= {left, right, left + right}
    vocabulary = model["vocab"]
    kept = sorted(wanted & vocabulary.keys(), key=vocabulary.__getitem__)
    unknown = model.get("unk_token")
    return said | {
        "added_tokens": [],
        "post_processor": None,
        "model": model
        | {
            "vocab": {token: i for i, token in enumerate(kept)},
            "merges": [list(pair) for pair in pairs if pair in made],
            "unk_token": unknown if unknown in wanted else None,
        },
    }


def _way(token: str, ranks: dict[tuple[str, ...], int]) -> Iterator[tuple[str, str]]:
    """The merges that make a token of its letters, as the encoding does them."""
    parts = list(token)
    while len(parts) > 1:
        pairs = list(itertools.pairwise(parts))
        best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        if pairs[best] not in ranks:
            return  # a token of another origin
        yield pairs[best]
        parts[best : best + 2] = ["".join(pairs[best])]


def _merges(pieces: Sequence[tuple[str, float, int]]) -> list[list[str]]:
    """Pairs of pieces that make a piece, that with the highest score first."""
    normal = {piece: i for i, (piece, _, kind) in enumerate(pieces) if kind == _NORMAL}
    found = []
    for piece, i in normal.items():
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in normal and right in normal:
                found.append((-pieces[i][1], normal[left], normal[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _model(data: bytes) -> tuple[list[tuple[str, float, int]], dict, dict]:
    """Pieces with scores and types; numbers and texts of the trainer's and normalizer's specs."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data):
        if number == 1:
            own = dict(_fields(value))
            pieces.append((own[1].decode(), float(own.get(2, 0.0)), int(own.get(3, _NORMAL))))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("no pieces")
    return pieces, trainer, normalizer


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a message of protocol buffers; groups, which are obsolete, are none."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while at < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or (varint() if wire == 2 else None)
        if size is None or at + size > len(data):
            raise ValueError("no such field")
        value, at = data[at : at + size], at + size
        yield number, struct.unpack("<f", value)[0] if wire == 5 else value
