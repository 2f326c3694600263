"""Real tokenizers' files: small SentencePiece models and byte-pair encodings, made here."""

import itertools
import json
import random
import struct

import pytest

from jaxdistill.data import subwords, text
from jaxdistill.errors import InputError

tokenizers = pytest.importorskip("tokenizers")

CORPUS = [
    "there is a tower with a black block",
    "the black block is at the top",
    "there are two towers  with three blocks each.",
]
NORMAL, CONTROL, USER, SINGLE = 1, 3, 4, 6
LETTERS = "▁abcdehiklorstw.é"
MERGED = ("▁t", "he", "▁the", "re", "▁there", "▁a", "bl", "ack", "ck", "ac", "lack", "block", "▁▁")
NORMALIZER = {1: b"identity", 4: 0}


def varint(number):
    found = []
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def message(fields):
    """A message of protocol buffers; a field is a number, a float or bytes."""
    found = b""
    for number, value in fields:
        if isinstance(value, float):
            found += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            found += varint(number << 3) + varint(value)
        else:
            found += varint(number << 3 | 2) + varint(len(value)) + value
    return found


def pieces():
    """Pieces, scores and types; the last merged ones score lowest, and letters lower still."""
    yield from (("<unk>", 0.0, 2), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL))
    yield from ((f"<0x{b:02X}>", 0.0, SINGLE) for b in range(256))
    yield from ((p, -float(i), NORMAL) for i, p in enumerate([*MERGED, *LETTERS]))


def model(own=None, trainer=None, normalizer=None):
    rows = [
        (1, message([(1, piece.encode()), (2, score), (3, kind)]))
        for piece, score, kind in own or pieces()
    ]
    specs = [(2, {3: 2} if trainer is None else trainer), (3, normalizer or NORMALIZER)]
    return message([*rows, *((n, message(spec.items())) for n, spec in specs)])


@pytest.fixture
def sentencepiece(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model())
    return path


@pytest.fixture
def byte_level(tmp_path):
    path = tmp_path / "byte_level.json"
    path.write_text(text.tokenizer("bpe:300", CORPUS * 3).stored)
    return path


def by_scores(words):
    """What SentencePiece does: the pair whose piece scores highest is merged, from the left."""
    scores = {piece: score for piece, score, kind in pieces() if kind == NORMAL}
    parts = list(words.replace(" ", "▁"))
    while True:
        pairs = [
            (-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in scores
        ]  # fmt: skip
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    single = lambda part: [f"<0x{b:02X}>" for b in part.encode()]  # noqa: E731
    return [piece for part in parts for piece in ([part] if part in scores else single(part))]


def strange_texts():
    draw = random.Random(0)
    return [
        "".join(draw.choice(" abckhertélow<>x0A😀\n/s") for _ in range(draw.randrange(20)))
        for _ in range(300)
    ]


def test_sentencepiece_models_split_by_their_scores(sentencepiece):
    by = text.tokenizer(str(sentencepiece), [])
    names = [piece for piece, _, _ in pieces()]
    assert by.size == 3 + len(names)
    assert by.pieces[3 + names.index("▁the")] == b" the" and by.pieces[3 + 3 + 10] == b"\n"
    for words in [*CORPUS, *strange_texts(), "<s> is no <0x41>, and é not either"]:
        ids = by.split(words)
        assert [names[i - 3] for i in ids] == by_scores(words)
        assert b"".join(by.pieces[i] for i in ids) == words.encode()
        assert by.text(ids) == words


def test_a_text_starts_without_a_space(sentencepiece):
    by = text.tokenizer(str(sentencepiece), [])
    assert [by.pieces[i] for i in by.split("there there")][-1] == b" there"
    assert by.split("there there")[-1] not in by.split("there") and by.split("") == []
    with pytest.raises(InputError, match="writes 'a▁b' as 'a b'; change the text"):
        by.split("a▁b")


@pytest.mark.parametrize("form", ["Metaspace", "Prepend"])
def test_other_files_of_such_pieces_lose_their_first_space_too(sentencepiece, tmp_path, form):
    said = subwords.of_sentencepiece(sentencepiece)
    if form == "Metaspace":
        said["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False,
        }  # fmt: skip
        said["normalizer"] = None
    else:
        rules = [{"type": "Prepend", "prepend": "▁"}, said["normalizer"]]
        said["normalizer"] = {"type": "Sequence", "normalizers": rules}
    path = tmp_path / "other.json"
    path.write_text(json.dumps(said))
    one, other = text.tokenizer(str(sentencepiece), []), text.tokenizer(str(path), [])
    for words in [*CORPUS, *strange_texts()]:
        assert one.split(words) == other.split(words)
    path.write_text(other.stored)
    assert text.tokenizer(str(path), []).fingerprint() == other.fingerprint()


def test_without_pieces_for_bytes_unknown_letters_are_refused(tmp_path):
    path = tmp_path / "trained.json"
    made = tokenizers.SentencePieceBPETokenizer()
    made.train_from_iterator(CORPUS, vocab_size=60, show_progress=False)
    made.save(str(path))
    by = text.tokenizer(str(path), [])
    for words in CORPUS:
        assert b"".join(by.pieces[i] for i in by.split(words)) == words.encode()
    with pytest.raises(InputError, match="take a tokenizer that keeps all bytes"):
        by.split("quiz")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"trainer": {3: 1}}, "another kind than byte pairs"),
        ({"trainer": {}}, "another kind than byte pairs"),
        ({"trainer": {3: 2, 24: 1}}, "changes texts before it splits them"),
        ({"normalizer": {2: b"map", 4: 0}}, "changes texts before it splits them"),
        ({"normalizer": {1: b"identity"}}, "changes texts before it splits them"),
        ({"own": [*pieces(), ("at once", 0.0, USER)]}, "type 4; give its tokenizer.json"),
        ({"own": [*pieces()][:200]}, "no pieces for all bytes"),
        ({"own": [*pieces(), ("he", 0.0, NORMAL)]}, "it has a piece twice"),
    ],
)
def test_models_that_cannot_be_used(given, said, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model(**given))
    with pytest.raises(InputError, match=said):
        text.tokenizer(str(path), [])


def test_damaged_models_are_one_line(tmp_path):
    path, whole, draw = tmp_path / "tokenizer.model", model(), random.Random(1)
    broken = [b"", b"\xff" * 40, whole[:-3], whole[:1], message([(1, 7)]), message([(1, b"")])]
    for _ in range(60):
        bad = bytearray(whole)
        bad[draw.randrange(len(bad))] = draw.randrange(256)
        broken.append(bytes(bad))
    refused = 0
    for data in broken:
        path.write_bytes(data)
        try:
            subwords.of_sentencepiece(path)
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused >= 6


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
def test_a_cut_vocabulary_splits_the_same_texts_the_same(kind, tmp_path, request):
    path = request.getfixturevalue(kind)
    whole, cut = text.tokenizer(str(path), []), text.tokenizer(f"cut:{path}", CORPUS[:2])
    assert 3 + 200 < cut.size < whole.size
    for words in CORPUS[:2]:
        assert [cut.pieces[i] for i in cut.split(words)] == [
            whole.pieces[i] for i in whole.split(words)
        ]
    for words in [*CORPUS, *strange_texts()]:
        assert b"".join(cut.pieces[i] for i in cut.split(words)) == words.encode()
    others = [whole.pieces[i] for i in whole.split(CORPUS[2])]
    assert [cut.pieces[i] for i in cut.split(CORPUS[2])] != others
    again = text.tokenizer(f"cut:{path}", [CORPUS[1], CORPUS[0], CORPUS[1]])
    assert again.fingerprint() == cut.fingerprint() != whole.fingerprint()
    stored = tmp_path / "student.json"
    stored.write_text(cut.stored)
    read = text.tokenizer(str(stored), [])
    assert (read.fingerprint(), read.pieces) == (cut.fingerprint(), cut.pieces)
    assert read.split(CORPUS[2]) == cut.split(CORPUS[2])


def test_special_tokens_are_not_kept(byte_level):
    made = tokenizers.Tokenizer.from_file(str(byte_level))
    made.add_special_tokens(["<end>"])
    made.save(str(byte_level))
    cut = text.tokenizer(f"cut:{byte_level}", ["the <end>"])
    assert b"<end>" not in cut.pieces and cut.text(cut.split("the <end>")) == "the <end>"


def test_what_cannot_be_cut(tmp_path):
    path = tmp_path / "characters.json"
    path.write_text(text.tokenizer("characters", CORPUS).stored)
    with pytest.raises(InputError, match="no byte-pair encoding, which alone can be cut"):
        text.tokenizer(f"cut:{path}", CORPUS)
    with pytest.raises(InputError, match=r"no tokenizer is called cut:bytes: give"):
        text.tokenizer("cut:bytes", CORPUS)
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([("▁", -1.0), ("a", -1.0)]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    path = tmp_path / "unigram.json"
    made.save(str(path))
    assert text.tokenizer(str(path), []).text(text.tokenizer(str(path), []).split("a a")) == "a a"
    with pytest.raises(
        InputError, match="only byte-pair encodings can be cut, and this is Unigram"
    ):
        text.tokenizer(f"cut:{path}", ["a a"])
