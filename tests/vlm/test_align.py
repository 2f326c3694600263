"""Groups by the bytes of pieces, and what the losses need of vocabularies."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.vlm import vocabularies
from jaxdistill.vlm.align import agreeing, align, partners
from jaxdistill.vlm.toy_language import random_bpe
from jaxdistill.vlm.vocabularies import distance, nearest_pieces, same_pieces

TEXT = "é€😀a!"


def of_bytes(text):
    return [bytes([b]) for b in text.encode()]


def sizes(groups):
    most = max(groups.teacher.max(), groups.student.max()) + 1
    return [tuple(int((side == g).sum()) for side in groups) for g in range(most)]


def test_characters_that_are_split_stay_together():
    found = align(of_bytes(TEXT), [c.encode() for c in TEXT])
    assert sizes(found) == [(2, 1), (3, 1), (4, 1), (1, 1), (1, 1)]


def covered(pieces, ids):
    """The bytes of each group of one side, in order."""
    return [
        b"".join(p for p, i in zip(pieces, ids, strict=True) if i == g and isinstance(p, bytes))
        for g in range(max(ids) + 1)
    ]


def cuts(data, key):
    """A random tokenization of some bytes."""
    chosen = np.random.default_rng(key).uniform(size=len(data) - 1) < 0.4
    ends = [0, *(np.flatnonzero(chosen) + 1).tolist(), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("seed", range(20))
def test_groups_cover_every_byte_once_and_cannot_be_cut_further(seed):
    data = (TEXT * 3).encode()
    ours, theirs = cuts(data, seed), cuts(data, seed + 100)
    groups = align([None, *ours, "eos"], [*theirs, "eos", None])
    first, second = (
        covered([None, *ours, "eos"], groups.teacher),
        covered([*theirs, "eos", None], groups.student),
    )
    assert first == second and b"".join(first) == data
    assert all(np.diff([i for i in side if i >= 0]).max() <= 1 for side in groups)
    ends = [set(np.cumsum([len(p) for p in side]).tolist()) for side in (ours, theirs)]
    assert len(first) == len(ends[0] & ends[1]) + 1  # and EOS
    assert groups.teacher[0] == groups.student[-1] == -1


def test_a_bos_of_one_side_is_in_no_group_whatever_it_is_taken_for():
    wanted = align([b"he", b"llo"], [b"hell", b"o"])
    for bos in (None, "bos", b""):
        found = align([bos, b"he", b"llo"], [b"hell", b"o"])
        assert found.teacher.tolist() == [-1, *wanted.teacher]
        assert found.student.tolist() == wanted.student.tolist()
    # Counted as its letters it is text, which only one side has: refused, not misaligned.
    with pytest.raises(InputError, match="from byte 0 on"):
        align([b"<s>", b"he", b"llo"], [b"hell", b"o"])


def test_specials_meet_by_name_and_place():
    ours = ["bos", b"a", "sep", "sep", b"b", "eos", None]
    theirs = ["bos", b"a", "sep", b"b", "eos"]
    found = align(ours, theirs)
    assert found.teacher.tolist() == [0, 1, 2, -1, 3, 4, -1]
    assert found.student.tolist() == [0, 1, 2, 3, 4]
    found = align(ours, theirs, specials=False)
    assert found.teacher.tolist() == [-1, 0, -1, -1, 1, -1, -1]
    assert align([b"a", "eos"], [b"a"]).teacher.tolist() == [0, -1]
    assert align(["eos", b"a"], [b"a", "eos"]).teacher.tolist() == [-1, 0]


def test_lengths_are_fixed():
    found = align([b"ab"], [b"a", b"b"], teacher_length=4, student_length=3)
    assert found.teacher.tolist() == [0, -1, -1, -1] and found.student.tolist() == [0, 0, -1]
    assert found.teacher.dtype == np.int32
    with pytest.raises(InputError, match="do not fit"):
        align([b"ab"], [b"a", b"b"], student_length=1)


def test_different_texts_are_refused_with_the_place():
    with pytest.raises(InputError, match="from byte 3 on: b'lo' and b'p'"):
        align([b"hel", b"lo"], [b"help"])
    with pytest.raises(InputError, match="from byte 2 on"):
        align([b"ab", b"c"], [b"ab"])


def test_vocabularies_meet_in_equal_pieces():
    ours, theirs = same_pieces([b"a", "eos", None, b"bc", b"a"], ["eos", b"x", b"a", None])
    assert ours.tolist() == [0, 1] and theirs.tolist() == [2, 0]


def slow_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    changed = slow_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(changed, slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1)


def test_edit_distances():
    numbers = np.random.default_rng(0)
    for _ in range(50):
        a, b = (bytes(numbers.integers(97, 100, numbers.integers(0, 5)).tolist()) for _ in "ab")
        assert distance(a, b) == slow_distance(a, b) == distance(b, a)
    assert distance("eos", "eos") == 0 and distance("eos", b"eos") == 100


def test_the_nearest_piece_is_the_equal_or_the_first_of_the_nearest():
    found = nearest_pieces([b"abc", b"b", "eos", "sep", None], [b"ab", b"bc", b"b", "eos"])
    assert found.tolist() == [0, 2, 3, -1, -1]


def test_partners_are_one_to_one_and_agree_with_the_vocabularies():
    ours, theirs = [b"the", b"cat", b"s", "eos"], [b"the", b"cats", "eos"]
    found = partners(ours, theirs, student_length=4)
    # "s" and "cat" share a partner, so neither has one.
    assert found.tolist() == [0, -1, 3, -1]
    ours = [b"x", b"cat"]
    found = partners(ours, [b"x", b"car"])
    assert found.tolist() == [0, 1]
    ids = np.array([5, 6]), np.array([7, 8]), np.array([0] * 5 + [7, 9])
    assert agreeing(found, *ids).tolist() == [0, -1]
    again = jax.jit(agreeing)(*map(jnp.asarray, (found, *ids)))
    assert again.tolist() == [0, -1] and again.dtype == found.dtype == np.int32


def test_the_projection_spreads_tokens_over_their_pieces():
    ours, theirs = [b"a", b"b", b"ab", "eos"], [b"a", b"b", b"ba", "eos"]
    index = {p: i for i, p in enumerate(ours)}

    def one(text):
        return [index[text]] if text in index else [index[text[:1]], index[text[1:]]]

    def other(text):
        return [0, 1] if text == b"ab" else {b"a": [0], b"b": [1], b"ba": [2]}[text]

    def dense(**options):
        ids, weights = vocabularies.token_projection(ours, theirs, one, other, **options)
        matrix = np.zeros((4, 4))
        for row, i, w in zip(matrix, ids, weights, strict=True):
            np.add.at(row, i, w)
        return matrix

    plain = dense(both_ways=False)
    np.testing.assert_allclose(plain[2], [1 / 11, 10 / 11, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(plain[[0, 1, 3]], np.eye(4)[[0, 1, 3]])
    both = dense()
    np.testing.assert_allclose(both[0], np.array([2, 0, 10 / 11, 0]) / (2 + 10 / 11), rtol=1e-6)
    np.testing.assert_allclose(both.sum(1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(dense(pinned=True)[[0, 1, 3]], np.eye(4)[[0, 1, 3]])
    kept = dense(keep=1)
    assert (np.count_nonzero(kept, axis=1) == 1).all() and (kept.sum(1) == 1).all()


def test_boundaries_are_tokens_that_start_with_a_byte_that_none_crosses():
    assert vocabularies.starts_with([b" a", b"a", b" ", None, "eos"], b" ").tolist() == [
        *[True, False, True, False, True]
    ]
    with pytest.raises(InputError, match="crosses"):
        vocabularies.starts_with([b"a b"], b" ")
    assert vocabularies.first_bytes([b"ab", "eos", None, b""], ["bos", "eos"]).tolist() == [
        *[97, 257, 511, 511]
    ]


def test_random_tokenizers_spell_what_they_encode():
    tokenizer = random_bpe(jax.random.key(0), b"abc", 5, opener=b"c")
    for text in (b"", b"abcabcba", b"ccabbac"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(b"c" not in p[1:] for p in tokenizer.pieces[:-1]) and len(tokenizer.merges) == 5
