"""A text encoder without weights: words and pieces of words, hashed into a vector.

Weinberger et al., "Feature Hashing for Large Scale Multitask Learning" (ICML 2009). It knows no
language and needs no file; the same sentence has the same vector everywhere.
"""

import functools
import itertools
import re
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

_WORD = re.compile(r"\w+")
_PIECES = (3, 4)  # letters of a piece of a word
_CACHED = 2**16  # words; a corpus says the same ones again and again


def hashed(sentences: Sequence[str], dim: int) -> Float32[np.ndarray, "n dim"]:
    """Vectors of length one: signed counts of words, pairs of words, and pieces of words.

    Each gram adds 1 or -1 to the place that its CRC-32 gives. Case and punctuation are not looked
    at; a sentence without a letter or digit is one word.

    Args:
        sentences: The texts, none of them empty.
        dim: Length of a vector.
    """
    out = np.zeros((len(sentences), dim), np.float32)
    for row, sentence in zip(out, sentences, strict=True):
        words = _WORD.findall(sentence.casefold()) or [sentence]
        grams = [*itertools.chain.from_iterable(map(_of_word, words))]
        grams += [_hash(f"{a} {b}") for a, b in itertools.pairwise(words)]
        marks = np.array(grams)
        np.add.at(row, (marks >> 1) % dim, 1 - 2 * (marks & 1).astype(np.float32))
        # Grams may cancel, and a sentence must not come out as nothing.
        norm = np.linalg.norm(row)
        if norm == 0:
            row[_hash(sentence) % dim] = norm = 1
        row /= norm
    return out


@functools.lru_cache(_CACHED)
def _of_word(word: str) -> tuple[int, ...]:
    marked = f"<{word}>"
    pieces = {marked[i : i + n] for n in _PIECES for i in range(len(marked) - n + 1)} - {marked}
    return tuple(_hash(gram) for gram in (marked, *sorted(pieces)))


def _hash(gram: str) -> int:
    return zlib.crc32(gram.encode("utf-8", "surrogatepass"))
