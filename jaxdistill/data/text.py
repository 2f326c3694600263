"""Texts as tokens: characters, bytes, or byte-pair encodings trained here or read from a file.

Three ids are ours in every vocabulary: padding, the end of an answer, and the mark between question
and answer. Each other token is a piece of bytes, so that texts under two tokenizers can be laid
side by side by their bytes. Byte-pair encodings are those of the package `tokenizers`, which
comes with `pip install "jaxdistill[vlm]"`; their pieces are byte-level ones, as GPT-2's, or
SentencePiece's, as those of Llama 2.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from jaxdistill.data import subwords
from jaxdistill.errors import InputError
from jaxdistill.io.files import expanded
from jaxdistill.io.reading import one_line, read_json

PAD, EOS, ANSWER = 0, 1, 2
"""Ids of padding, of the end of an answer, and of the mark that an answer follows."""
SPECIALS = ("<pad>", "<eos>", "<answer>")
_OURS = len(SPECIALS)
_FORMAT = "jaxdistill.tokenizer/1"


class Tokenizer(NamedTuple):
    """How texts become ids.

    Attributes:
        name: What kind it is.
        pieces: The bytes of each id, none of `SPECIALS`, which come first.
        split: `text -> ids`, without any of ours.
        stored: What a file says of it that `tokenizer` reads.
    """

    name: str
    pieces: tuple[bytes, ...]
    split: Callable[[str], list[int]]
    stored: str = "{}"

    @property
    def size(self) -> int:
        """The number of ids."""
        return len(self.pieces)

    def fingerprint(self) -> str:
        """Hex SHA-256 over the pieces and the rules by which texts are split into them."""
        said = json.loads(self.stored)
        model = said.get("model", {})
        rules = [said.get("normalizer"), said.get("pre_tokenizer"), model.get("merges")]
        rules += [name for name in ("byte_fallback", "ignore_merges") if model.get(name)]
        rules += [said["added_tokens"]] if said.get("added_tokens") else []
        known = json.dumps([[piece.hex() for piece in self.pieces], rules], sort_keys=True)
        return hashlib.sha256(known.encode()).hexdigest()

    def text(self, ids: Iterable[int]) -> str:
        """The text of some ids; what is no whole character is shown as a mark of that."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")


class Tokens(NamedTuple):
    """Texts as ids of one length, padded on the right.

    Attributes:
        ids: int32 (n, length).
        there: Which are no padding.
    """

    ids: Int32[np.ndarray, "n length"]
    there: Bool[np.ndarray, "n length"]


def tokenizer(kind: str, texts: Sequence[str]) -> Tokenizer:
    """A tokenizer by its name.

    Args:
        kind: `characters` of the texts; `bytes`; `bpe:SIZE`, a byte-pair encoding with so many ids
            that is trained on the texts, the same for the same texts; the path of a
            `tokenizer.json` of byte-level pieces or SentencePiece's, of one that was stored here,
            or of SentencePiece's own `tokenizer.model`; or `cut:PATH`, one of these with only the
            ids that the texts need, and those of single bytes, by which any other text is written.
        texts: What the vocabulary is made for.

    Raises:
        InputError: If there is no such tokenizer, or the file cannot be read.
    """
    if kind == "characters":
        return _characters(sorted(set("".join(texts))))
    if kind == "bytes":
        return _bytes()
    if kind.startswith("bpe:") and kind[4:].isdigit():
        return _trained(kind, int(kind[4:]), texts)
    path = kind.removeprefix("cut:")
    if path.endswith((".json", ".model")):
        return _read(expanded(path), texts if path != kind else None)
    raise InputError(
        f"no tokenizer is called {kind}: give characters, bytes, bpe:SIZE, a tokenizer.json or "
        "tokenizer.model, or cut: before such a file"
    )


def tokens(by: Tokenizer, texts: Sequence[str], end: int, length: int | None = None) -> Tokens:
    """Texts as ids of one length.

    Args:
        by: The tokenizer.
        texts: Questions, or answers.
        end: The id that each ends with: `ANSWER` or `EOS`.
        length: The length; by default that of the longest.

    Raises:
        InputError: If a text is longer.
    """
    found = [[*by.split(text), end] for text in texts]
    longest = max(map(len, found), default=1)
    length = longest if length is None else length
    if longest > length:
        text = texts[max(range(len(found)), key=lambda i: len(found[i]))]
        raise InputError(
            f"{text[:60]!r} takes {longest} tokens of {by.name}, and there is room for {length}; "
            "give more, or a shorter text"
        )
    ids = np.full((len(found), length), PAD, np.int32)
    for row, own in zip(ids, found, strict=True):
        row[: len(own)] = own
    there = np.arange(length) < np.array([len(own) for own in found], int)[:, None]
    return Tokens(ids, there)


def answer_text(by: Tokenizer, ids: Int32[np.ndarray, " n"]) -> str:
    """The text of an answer: what stands before its end."""
    known = ids.tolist()
    return by.text(known[: known.index(EOS)] if EOS in known else known)


def _nothing() -> tuple[bytes, ...]:
    return (b"",) * _OURS


def _characters(known: Sequence[str]) -> Tokenizer:
    ids = {character: _OURS + i for i, character in enumerate(known)}

    def split(text: str) -> list[int]:
        strange = next((c for c in text if c not in ids), None)
        if strange is not None:
            raise InputError(f"no token is {strange!r}, of {text[:60]!r}; take bytes instead")
        return [ids[c] for c in text]

    stored = json.dumps({"format": _FORMAT, "characters": "".join(known)})
    return Tokenizer("characters", (*_nothing(), *(c.encode() for c in known)), split, stored)


def _bytes() -> Tokenizer:
    pieces = (*_nothing(), *(bytes([b]) for b in range(256)))
    stored = json.dumps({"format": _FORMAT})
    return Tokenizer("bytes", pieces, lambda text: [_OURS + b for b in text.encode()], stored)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(
            'byte-pair encodings need the package tokenizers: pip install "jaxdistill[vlm]"'
        ) from error
    return tokenizers


def _trained(kind: str, size: int, texts: Sequence[str]) -> Tokenizer:
    library = _library()
    if size < _OURS + 256:
        raise InputError(f"{kind}: byte-pair encodings start at {_OURS + 256} ids")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=size - _OURS,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return _wrapped(kind, made)


def _read(path: Path, texts: Sequence[str] | None) -> Tokenizer:
    """The tokenizer of a file, cut to what some texts need where they are given."""
    if not path.is_file():
        raise InputError(f"{path} is no file; give a tokenizer.json or tokenizer.model")
    if path.suffix == ".model":
        made = _library().Tokenizer.from_str(json.dumps(subwords.of_sentencepiece(path)))
        return _whole_or_cut(path.name, made, texts)
    said = read_json(path)
    if isinstance(said, dict) and said.get("format") == _FORMAT:
        if texts is not None:
            raise InputError(f"{path} is no byte-pair encoding, which alone can be cut")
        known = said.get("characters", "")
        if not isinstance(known, str) or len(set(known)) != len(known):
            raise InputError(f"{path} is damaged: its characters are no text of different ones")
        return _characters(known) if known else _bytes()
    library = _library()
    try:
        made = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library's own has no other base
        raise InputError(f"{path} is no tokenizer ({one_line(error)})") from error
    return _whole_or_cut(path.name, made, texts)


def _whole_or_cut(name: str, made: Any, texts: Sequence[str] | None) -> Tokenizer:
    if texts is None:
        return _wrapped(name, made)
    # Without its special tokens a text that spells one is split as any other, as it is later.
    said = json.loads(made.to_str())
    bare = _library().Tokenizer.from_str(json.dumps(said | {"added_tokens": []}))
    by = _wrapped(name, bare)
    said = json.loads(by.stored)
    tokens = {_OURS + i: token for token, i in bare.get_vocab(with_added_tokens=False).items()}
    used = {tokens[i] for text in texts for i in by.split(text)}
    always = {token for i, token in tokens.items() if len(by.pieces[i]) == 1}
    cut = subwords.cut(said, used, always)
    return _wrapped(f"{name}, cut", _library().Tokenizer.from_str(json.dumps(cut)))


def _wrapped(name: str, made: Any) -> Tokenizer:
    """A tokenizer of the library, its ids behind ours."""
    made.no_padding()
    made.no_truncation()
    said = json.loads(made.to_str())
    spaced = subwords.spaced(said)
    if spaced:
        made = _library().Tokenizer.from_str(json.dumps(subwords.without_first_space(said)))
    by_id = {i: piece for piece, i in made.get_vocab().items()}
    pieces = [*_nothing(), *(_spelt(by_id.get(i, ""), spaced) for i in range(max(by_id) + 1))]

    def ids_of(text):
        return [_OURS + i for i in made.encode(text, add_special_tokens=False).ids]

    def spelt(ids):
        return b"".join(pieces[i] for i in ids)

    def split(text):
        ids = ids_of(text)
        # Unknown letters, normalizers, and the letter that stands for a space.
        if spelt(ids) != text.encode():
            raise InputError(
                f"{name} writes {text[:60]!r} as {spelt(ids).decode('utf-8', 'replace')[:60]!r}; "
                "change the text, or take a tokenizer that keeps all bytes"
            )
        return ids

    whole = "The 3 é"
    found = whole.encode() if spaced else spelt(ids_of(whole))
    if found == b" " + whole.encode():
        raise InputError(f"{name} puts a space before a text; set its add_prefix_space to false")
    if found != whole.encode():
        raise InputError(
            f"{name} has other pieces than byte-level ones and SentencePiece's; give such a "
            "tokenizer"
        )
    return Tokenizer(name, tuple(pieces), split, made.to_str())


def _spelt(token: str, spaced: bool) -> bytes:
    """The bytes of a token of the library, as a special one of the file's own those of its name."""
    if spaced:
        return subwords.bytes_of(token)
    try:
        return byte_level(token)
    except InputError:
        return token.encode()


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
